//! How long a run may wait for a person, plan and apply.
//!
//! When a limit is reached is a matter of stored times alone, so a timer can be built again from
//! the store at any start; [`super::Event::LimitReached`] is believed only when it is so.

use std::time::Duration;

use super::{Job, Run, RunState};
use crate::time::Timestamp;

/// An environment's limits; what is absent has none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    pub person: Option<Duration>,
    pub plan: Option<Duration>,
    pub apply: Option<Duration>,
}

/// Returns when the run reaches a limit as things stand. A phase that was asked to stop reaches
/// none any more, nor does one that was not started.
pub fn deadline(run: &Run, limits: &Limits) -> Option<Timestamp> {
    match run.state {
        RunState::AwaitingPlanMfa | RunState::AwaitingConfirmation | RunState::AwaitingApplyMfa => {
            limits.person.map(|limit| run.entered_at + limit)
        }
        RunState::Planning => running(run, &run.plan, limits.plan),
        RunState::Applying => running(run, &run.apply, limits.apply),
        RunState::Pending
        | RunState::PlanQueued
        | RunState::ApplyQueued
        | RunState::Planned
        | RunState::Applied
        | RunState::Errored
        | RunState::Canceled
        | RunState::Discarded
        | RunState::Lost => None,
    }
}

fn running(run: &Run, job: &Job, limit: Option<Duration>) -> Option<Timestamp> {
    let released = job.lease.as_ref().and_then(|lease| lease.released)?;
    limit.filter(|_| run.cancel_requested_by.is_none()).map(|limit| released.at + limit)
}
