//! The state machine: (run, event, time) to moved, already so, or refused.
//!
//! Commit `next` and what [`Step::Moved`] says of the environment in one batch; perform the
//! effects after that and only then. Every effect can be derived again from the stored run.
//!
//! What persons decide is in [`person`], what becomes of a lease in [`lease`], how a phase ends
//! in [`result`].

mod lease;
mod person;
mod result;

use std::time::Duration;

use self::lease::{
    cannot_start, granted, handed_back, lease_expired, returned, runner_revoked, starting,
    topped_up,
};
use self::person::{
    cancel_requested, code_accepted, confirmed, discarded, force_requested, limit_reached,
};
use self::result::{apply_ended, plan_ended};
use super::{Approval, Limits, Planned, RefusedCode, Run, RunState, deadline};
use crate::environment::Change;
use crate::id::{Digest, Epoch, JobId, RunnerId};
use crate::lease::{Engine, Lease, Site};
use crate::policy::{Demands, Evidence, Phase};
use crate::time::Timestamp;

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// STS accepted a code submitted for `evidence.phase`. `seen` is the plan digest that the
    /// person was shown; required for an apply.
    CodeAccepted {
        evidence: Evidence,
        seen: Option<Digest>,
        current: Demands,
    },
    CodeRefused {
        phase: Phase,
        refused: RefusedCode,
        current: Demands,
    },
    /// The environment is free and this run is next.
    TurnCame,
    /// `state` is the number of the environment's newest state version, `engine` what it asks for:
    /// both stay as they are until the lease ends. `site` is where it would make a plan now; an apply
    /// is made where its plan was. A session that lives shorter than `floor` is not leased out.
    Granted {
        phase: Phase,
        runner: RunnerId,
        log_base: u64,
        state: Option<u64>,
        engine: Engine,
        site: Site,
        floor: Duration,
    },
    /// The runner declined or gave back a job that it has not started.
    HandedBack {
        phase: Phase,
        runner: RunnerId,
        epoch: Epoch,
    },
    /// The runner is about to start terraform and asks for the credentials.
    Starting {
        phase: Phase,
        runner: RunnerId,
        epoch: Epoch,
        current: Demands,
        floor: Duration,
    },
    /// STS accepted a code submitted while `evidence.phase` runs, so that it can run on.
    ToppedUp {
        evidence: Evidence,
        current: Demands,
    },
    /// The credentials that the phase needs cannot be had, for a reason that waiting does not
    /// cure.
    CannotStart {
        phase: Phase,
        runner: RunnerId,
        epoch: Epoch,
        reason: String,
    },
    LeaseExpired {
        phase: Phase,
        epoch: Epoch,
    },
    /// An owner has ended the identity of the runner that holds the lease: it will never speak
    /// again.
    RunnerRevoked {
        phase: Phase,
        runner: RunnerId,
        epoch: Epoch,
    },
    /// A lost runner is back with the lease it had.
    Returned {
        phase: Phase,
        runner: RunnerId,
        epoch: Epoch,
    },
    PlanEnded {
        runner: RunnerId,
        epoch: Epoch,
        /// Of the phase, with what earlier leases left.
        log_length: u64,
        outcome: PlanOutcome,
        current: Demands,
    },
    ApplyEnded {
        runner: RunnerId,
        epoch: Epoch,
        /// Of the phase, with what earlier leases left.
        log_length: u64,
        outcome: ApplyOutcome,
    },
    Confirmed {
        by: String,
        seen: Digest,
        current: Demands,
    },
    Discarded {
        by: String,
    },
    CancelRequested {
        by: String,
    },
    /// A person wants terraform and all it started killed, `grace` after they were asked to stop.
    ForceRequested {
        by: String,
        grace: Duration,
    },
    /// A limit of the environment may have been reached.
    LimitReached {
        limits: Limits,
    },
    /// The control plane was restored from a backup in which the run had not ended: what became
    /// of it since is not known.
    Restored,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PlanOutcome {
    Planned(Box<Planned>),
    Failed(Failure),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ApplyOutcome {
    Applied { outputs: Option<String> },
    Failed(Failure),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    pub kind: FailureKind,
    pub reason: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FailureKind {
    Errored,
    /// terraform stopped because it was asked to.
    Canceled,
    /// It ended, but how is not known.
    EndedUnknown,
    /// State was written that could not be delivered.
    StateUndelivered,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Some run of the environment may have its turn now.
    GiveTurn,
    /// The job waits for a runner.
    Offer(JobId),
    /// The job no longer waits for a runner.
    Withdraw(JobId),
    /// Ask the runner to stop terraform gracefully.
    Cancel(JobId, Epoch),
    /// Have the runner kill terraform and all that it started.
    Kill(JobId, Epoch),
    /// Tell the runner that its lease is over.
    Revoke(JobId, Epoch),
    /// Give the runner the phase's credentials again: there are others.
    Renew(JobId, Epoch),
    /// Plan and workspace are not needed any more.
    DropPlan,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    Moved {
        next: Box<Run>,
        environment: Change,
        effects: Vec<Effect>,
    },
    /// It is so already; a repeat of the same message.
    Unchanged,
    Refused(Refusal),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The run is in no state for this.
    WrongState,
    NotAwaitingCode,
    /// The code was meant for the other phase.
    OtherPhase,
    MfaRequired,
    /// Who queued must not be who approves.
    SecondPersonRequired,
    /// What the person saw is not what would be applied.
    PlanChanged,
    /// What is in use lives longer than what would replace it.
    ExpiresSooner,
    /// The lease is not the current one.
    LeaseLost,
    AlreadyEnded,
    /// A forced cancel follows a graceful one, and none was asked for.
    NotCanceled,
    /// The graceful cancel has its grace until then.
    CancelGrace {
        until: Timestamp,
    },
    /// A person had it killed: there are no credentials for it any more.
    Forced,
}

/// Moves `run` by `event`.
pub fn step(run: &Run, event: Event, now: Timestamp) -> Step {
    let mut step = moved_by(run, event, now);
    if let Step::Moved { next, .. } = &mut step
        && next.state != run.state
    {
        next.entered_at = now;
    }
    step
}

fn moved_by(run: &Run, event: Event, now: Timestamp) -> Step {
    match event {
        Event::CodeAccepted { evidence, seen, current } => {
            code_accepted(run, evidence, seen, &current, now)
        }
        Event::CodeRefused { phase, refused, current } => {
            if run.awaits_code(&current) != Some(phase) {
                return Step::Refused(Refusal::NotAwaitingCode);
            }
            let mut next = moved(run, run.state, now);
            next.refused_code = Some(refused);
            done(next, vec![])
        }
        Event::TurnCame => turn_came(run, now),
        Event::Granted { phase, runner, log_base, state, engine, site, floor } => {
            granted(run, (phase, runner), log_base, (state, engine, site), floor, now)
        }
        Event::ToppedUp { evidence, current } => topped_up(run, evidence, &current, now),
        Event::HandedBack { phase, runner, epoch } => handed_back(run, phase, runner, epoch, now),
        Event::Starting { phase, runner, epoch, current, floor } => {
            starting(run, (phase, runner, epoch), &current, floor, now)
        }
        Event::CannotStart { phase, runner, epoch, reason } => {
            cannot_start(run, (phase, runner, epoch), reason, now)
        }
        Event::LeaseExpired { phase, epoch } => lease_expired(run, phase, epoch, now),
        Event::RunnerRevoked { phase, runner, epoch } => {
            runner_revoked(run, (phase, runner, epoch), now)
        }
        Event::Returned { phase, runner, epoch } => returned(run, phase, runner, epoch, now),
        Event::PlanEnded { runner, epoch, log_length, outcome, current } => {
            plan_ended(run, (runner, epoch, log_length), outcome, &current, now)
        }
        Event::ApplyEnded { runner, epoch, log_length, outcome } => {
            apply_ended(run, (runner, epoch, log_length), outcome, now)
        }
        Event::Confirmed { by, seen, current } => confirmed(run, by, seen, &current, now),
        Event::Discarded { by } => discarded(run, by, now),
        Event::CancelRequested { by } => cancel_requested(run, by, now),
        Event::ForceRequested { by, grace } => force_requested(run, by, grace, now),
        Event::LimitReached { limits } => match deadline(run, &limits) {
            Some(at) if at <= now => limit_reached(run, &limits, now),
            Some(_) | None => Step::Refused(Refusal::WrongState),
        },
        Event::Restored => restored(run, now),
    }
}

/// The state a phase is in while a runner holds its lease.
const fn running(phase: Phase) -> RunState {
    match phase {
        Phase::Plan => RunState::Planning,
        Phase::Apply => RunState::Applying,
    }
}

const fn queued(phase: Phase) -> RunState {
    match phase {
        Phase::Plan => RunState::PlanQueued,
        Phase::Apply => RunState::ApplyQueued,
    }
}

fn moved(run: &Run, state: RunState, now: Timestamp) -> Run {
    let mut next = run.clone();
    next.state = state;
    next.updated_at = now;
    next
}

fn done(next: Run, effects: Vec<Effect>) -> Step {
    Step::Moved { next: Box::new(next), environment: Change::Keep, effects }
}

fn done_with(next: Run, environment: Change, effects: Vec<Effect>) -> Step {
    Step::Moved { next: Box::new(next), environment, effects }
}

/// Ends the run, gives the environment to the next and forgets what only a live run needs.
fn ended(mut next: Run, state: RunState, reason: Option<String>, mut effects: Vec<Effect>) -> Step {
    next.state = state;
    next.reason = reason;
    for phase in Phase::ALL {
        let job = next.job_mut(phase);
        job.lease = None;
        job.evidence = None;
    }
    if next.planned.is_some() {
        effects.push(Effect::DropPlan);
    }
    effects.push(Effect::GiveTurn);
    done_with(next, Change::Free, effects)
}

/// Finds the current lease of a phase that runs, if `runner` and `epoch` speak for it.
fn current_lease(run: &Run, phase: Phase, runner: RunnerId, epoch: Epoch) -> Option<&Lease> {
    let lease = run.job(phase).lease.as_ref()?;
    (run.state == running(phase) && lease.is(runner, epoch)).then_some(lease)
}

fn approve(run: &Run, by: String, seen: Option<Digest>, at: Timestamp) -> Option<Approval> {
    let digest = run.planned.as_ref()?.digest;
    (seen == Some(digest)).then_some(Approval { by, at, digest })
}

fn turn_came(run: &Run, now: Timestamp) -> Step {
    match run.state {
        RunState::Pending => {
            let mut next = moved(run, RunState::PlanQueued, now);
            next.plan.queued_at = Some(now);
            let hold = if run.is_plan_only() { Change::Keep } else { Change::Hold };
            done_with(next, hold, vec![Effect::Offer(run.job_id(Phase::Plan))])
        }
        RunState::PlanQueued
        | RunState::Planning
        | RunState::AwaitingConfirmation
        | RunState::AwaitingApplyMfa
        | RunState::ApplyQueued
        | RunState::Applying
        | RunState::Lost => Step::Unchanged,
        RunState::AwaitingPlanMfa
        | RunState::Planned
        | RunState::Applied
        | RunState::Errored
        | RunState::Canceled
        | RunState::Discarded => Step::Refused(Refusal::WrongState),
    }
}

/// What a restored run's reason and the frozen environment say.
const RESTORED: &str = "interrupted by a restore from a backup; what became of it after the backup \
                        was taken must be checked";

/// Ends what a backup shows as unended. Its lease, its code and its approval stood for a history
/// that is gone; terraform may have run, or be running still.
fn restored(run: &Run, now: Timestamp) -> Step {
    if run.state.is_end() {
        return Step::Refused(Refusal::AlreadyEnded);
    }
    let mut next = moved(run, run.state, now);
    next.approval = None;
    match ended(next, RunState::Errored, Some(RESTORED.to_owned()), vec![]) {
        Step::Moved { next, effects, .. } => {
            let environment = Change::Freeze { reason: RESTORED.to_owned() };
            Step::Moved { next, environment, effects }
        }
        other @ (Step::Unchanged | Step::Refused(_)) => other,
    }
}

/// Says that a running phase was asked to stop, and how.
fn stopping(run: &Run) -> Option<String> {
    match (&run.forced_by, &run.cancel_requested_by) {
        (Some(by), _) => Some(format!(
            "{by} had it killed; the run ends when its runner confirms that nothing is left of it"
        )),
        (None, Some(by)) => {
            Some(format!("{by} asked it to stop; terraform finishes what it is doing"))
        }
        (None, None) => None,
    }
}

fn lost_reason(run: &Run) -> String {
    let wish = match (&run.forced_by, &run.cancel_requested_by) {
        (Some(by), _) => {
            format!("; {by} wants it killed, which the runner is told when it comes back")
        }
        (None, Some(by)) => {
            format!("; {by} wants it to stop, which the runner is told when it comes back")
        }
        (None, None) => String::new(),
    };
    format!(
        "the runner went silent after the apply may have started; what it did is not known{wish}"
    )
}
