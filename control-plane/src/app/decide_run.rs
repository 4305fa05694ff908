//! What a person decides about a run without a code: confirm, discard, cancel, kill.

use std::sync::Arc;

use latchkey_domain::id::{Digest, RunId};
use latchkey_domain::policy::Phase;
use latchkey_domain::run::{Event, Run, RunState};
use latchkey_proto::v1::Reason;

use super::App;
use super::transition::Decision;
use crate::auth::{Caller, Right};
use crate::error::{Error, Result};
use crate::store::{Batch, Expect, keys};

impl App {
    /// Confirms the apply of exactly the plan that the person was shown.
    pub async fn confirm_run(
        self: &Arc<Self>,
        caller: &Caller,
        id: RunId,
        seen: Digest,
    ) -> Result<Run> {
        self.run_for(caller, id, Right::Decide).await?;
        let (_, by) = caller.person()?;
        let advance = self
            .advance(id, &caller.audit_name(), "confirm_run", |subject| {
                let current = subject.environment.value.settings.policy;
                Ok(Event::Confirmed { by: by.to_owned(), seen, current })
            })
            .await?;
        Ok(advance.into_run())
    }

    pub async fn discard_run(self: &Arc<Self>, caller: &Caller, id: RunId) -> Result<Run> {
        self.run_for(caller, id, Right::Decide).await?;
        let (_, by) = caller.person()?;
        let advance = self
            .advance(id, &caller.audit_name(), "discard_run", |_| {
                Ok(Event::Discarded { by: by.to_owned() })
            })
            .await?;
        Ok(advance.into_run())
    }

    /// Stops a run: at once while it waits, gracefully while terraform runs.
    pub async fn cancel_run(self: &Arc<Self>, caller: &Caller, id: RunId) -> Result<Run> {
        let (_, run) = self.run_for(caller, id, Right::Operate).await?;
        if run.value.state == RunState::Lost {
            // To give a lost apply up is to decide about its remains.
            caller.person()?;
        }
        let advance = self
            .advance(id, &caller.audit_name(), "cancel_run", |_| {
                Ok(Event::CancelRequested { by: caller.name().to_owned() })
            })
            .await?;
        Ok(advance.into_run())
    }

    /// Has terraform and all that it started killed, once a graceful cancel had its grace. Its
    /// credentials are withdrawn in the same commit; the run ends by its runner's word alone.
    pub async fn force_cancel_run(self: &Arc<Self>, caller: &Caller, id: RunId) -> Result<Run> {
        self.run_for(caller, id, Right::Own).await?;
        let (_, by) = caller.person()?;
        let advance = self
            .advance_with(id, &caller.audit_name(), "force_cancel_run", |subject| {
                let run = &subject.run.value;
                let can_be_told = run.cancel_requested_by.is_some() && run.apply.lease.is_some();
                if run.state == RunState::Lost && !can_be_told {
                    let message = "the run is lost and its runner cannot be told; cancel it without \
                                   force to give it up";
                    return Err(Error::refused(Reason::WrongState, message));
                }
                let phase = match run.state {
                    RunState::Planning => Phase::Plan,
                    RunState::Applying
                    | RunState::Lost
                    | RunState::AwaitingPlanMfa
                    | RunState::Pending
                    | RunState::PlanQueued
                    | RunState::AwaitingConfirmation
                    | RunState::AwaitingApplyMfa
                    | RunState::ApplyQueued
                    | RunState::Planned
                    | RunState::Applied
                    | RunState::Errored
                    | RunState::Canceled
                    | RunState::Discarded => Phase::Apply,
                };
                let session = keys::session(id, phase);
                Ok(Decision {
                    event: Event::ForceRequested {
                        by: by.to_owned(),
                        grace: self.force_cancel_grace,
                    },
                    batch: Batch::new().delete(session, Expect::Anything),
                    details: vec![("phase", phase.to_string().into())],
                })
            })
            .await?;
        Ok(advance.into_run())
    }
}
