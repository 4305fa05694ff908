//! The state machine: (run, event, time) to moved, already so, or refused.
//!
//! Commit `next` and what [`Step::Moved`] says of the environment in one batch; perform the
//! effects after that and only then. Every effect can be derived again from the stored run.

use std::time::Duration;

use super::{Approval, Authenticated, Job, Planned, RefusedCode, Run, RunState};
use crate::environment::Change;
use crate::id::{Digest, Epoch, JobId, RunnerId};
use crate::lease::{Lease, Released};
use crate::policy::{Denial, Evidence, MfaPolicy, Phase, Release, judge};
use crate::time::Timestamp;

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// STS accepted a code submitted for `evidence.phase`. `seen` is the plan digest that the
    /// person was shown; required for an apply.
    CodeAccepted {
        evidence: Evidence,
        seen: Option<Digest>,
        current: MfaPolicy,
    },
    CodeRefused {
        phase: Phase,
        refused: RefusedCode,
        current: MfaPolicy,
    },
    /// The environment is free and this run is next.
    TurnCame,
    /// `state` is the number of the environment's newest state version.
    Granted {
        phase: Phase,
        runner: RunnerId,
        log_base: u64,
        state: Option<u64>,
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
        current: MfaPolicy,
        floor: Duration,
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
        outcome: PlanOutcome,
        current: MfaPolicy,
    },
    ApplyEnded {
        runner: RunnerId,
        epoch: Epoch,
        outcome: ApplyOutcome,
    },
    Confirmed {
        by: String,
        seen: Digest,
        current: MfaPolicy,
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
    /// The control plane was restored from a backup in which the run had not ended: what became
    /// of it since is not known.
    Restored,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PlanOutcome {
    Planned(Planned),
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
    /// What the person saw is not what would be applied.
    PlanChanged,
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
    match event {
        Event::CodeAccepted { evidence, seen, current } => {
            code_accepted(run, evidence, seen, current, now)
        }
        Event::CodeRefused { phase, refused, current } => {
            if run.awaits_code(current) != Some(phase) {
                return Step::Refused(Refusal::NotAwaitingCode);
            }
            let mut next = moved(run, run.state, now);
            next.refused_code = Some(refused);
            done(next, vec![])
        }
        Event::TurnCame => turn_came(run, now),
        Event::Granted { phase, runner, log_base, state } => {
            granted(run, (phase, runner), log_base, state, now)
        }
        Event::HandedBack { phase, runner, epoch } => handed_back(run, phase, runner, epoch, now),
        Event::Starting { phase, runner, epoch, current, floor } => {
            starting(run, (phase, runner, epoch), current, floor, now)
        }
        Event::CannotStart { phase, runner, epoch, reason } => {
            cannot_start(run, (phase, runner, epoch), reason, now)
        }
        Event::LeaseExpired { phase, epoch } => lease_expired(run, phase, epoch, now),
        Event::RunnerRevoked { phase, runner, epoch } => {
            runner_revoked(run, (phase, runner, epoch), now)
        }
        Event::Returned { phase, runner, epoch } => returned(run, phase, runner, epoch, now),
        Event::PlanEnded { runner, epoch, outcome, current } => {
            plan_ended(run, runner, epoch, outcome, current, now)
        }
        Event::ApplyEnded { runner, epoch, outcome } => {
            apply_ended(run, runner, epoch, outcome, now)
        }
        Event::Confirmed { by, seen, current } => confirmed(run, by, seen, current, now),
        Event::Discarded { by } => discarded(run, by, now),
        Event::CancelRequested { by } => cancel_requested(run, by, now),
        Event::ForceRequested { by, grace } => force_requested(run, by, grace, now),
        Event::Restored => restored(run, now),
    }
}

const REVOKED: &str =
    "the runner was revoked after the apply may have started; what it did is not known";

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

fn code_accepted(
    run: &Run,
    evidence: Evidence,
    seen: Option<Digest>,
    current: MfaPolicy,
    now: Timestamp,
) -> Step {
    let phase = evidence.phase;
    match run.awaits_code(current) {
        None => return Step::Refused(Refusal::NotAwaitingCode),
        Some(awaited) if awaited != phase => return Step::Refused(Refusal::OtherPhase),
        Some(_) => {}
    }
    let state = match phase {
        Phase::Plan => RunState::Pending,
        Phase::Apply => RunState::ApplyQueued,
    };
    let mut next = moved(run, state, now);
    next.refused_code = None;
    next.reason = None;
    let effect = match phase {
        Phase::Plan => Effect::GiveTurn,
        Phase::Apply => {
            let Some(approval) = approve(run, evidence.user.clone(), seen, now) else {
                return Step::Refused(Refusal::PlanChanged);
            };
            next.approval = Some(approval);
            next.apply.queued_at = Some(now);
            Effect::Offer(run.job_id(Phase::Apply))
        }
    };
    let job = next.job_mut(phase);
    job.authenticated = Some(Authenticated {
        user: evidence.user.clone(),
        at: evidence.authenticated_at,
        expires_at: evidence.expires_at,
    });
    job.evidence = Some(evidence);
    done(next, vec![effect])
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

fn granted(
    run: &Run,
    (phase, runner): (Phase, RunnerId),
    log_base: u64,
    state: Option<u64>,
    now: Timestamp,
) -> Step {
    if run.state != queued(phase) {
        return Step::Refused(Refusal::WrongState);
    }
    let mut next = moved(run, running(phase), now);
    let job = next.job_mut(phase);
    let lease = Lease::after(job.epoch, runner, log_base, state, now);
    job.epoch = lease.epoch;
    job.remember(runner, lease.epoch);
    job.lease = Some(lease);
    done(next, vec![])
}

/// Returns a job that was provably not started to the queue.
fn requeue(run: &Run, phase: Phase, now: Timestamp) -> Step {
    let mut next = moved(run, queued(phase), now);
    next.job_mut(phase).lease = None;
    next.job_mut(phase).started_at = None;
    done(next, vec![Effect::Offer(run.job_id(phase))])
}

fn handed_back(run: &Run, phase: Phase, runner: RunnerId, epoch: Epoch, now: Timestamp) -> Step {
    if current_lease(run, phase, runner, epoch).is_none() {
        return Step::Refused(Refusal::LeaseLost);
    }
    if let Some(by) = &run.cancel_requested_by {
        let reason = format!("canceled by {by}");
        return ended(moved(run, run.state, now), RunState::Canceled, Some(reason), vec![]);
    }
    requeue(run, phase, now)
}

fn starting(
    run: &Run,
    (phase, runner, epoch): (Phase, RunnerId, Epoch),
    current: MfaPolicy,
    floor: Duration,
    now: Timestamp,
) -> Step {
    let Some(lease) = current_lease(run, phase, runner, epoch) else {
        return Step::Refused(Refusal::LeaseLost);
    };
    if run.forced_by.is_some() {
        return Step::Refused(Refusal::Forced);
    }
    if lease.released.is_some() {
        return Step::Unchanged;
    }
    if phase == Phase::Apply && !is_approved(run) {
        return Step::Refused(Refusal::PlanChanged);
    }
    let release = Release {
        phase,
        carried: run.request.policy,
        current,
        evidence: run.job(phase).evidence.as_ref(),
        floor,
    };
    match judge(release, now) {
        Ok(permit) => {
            let mut next = moved(run, run.state, now);
            let job = next.job_mut(phase);
            job.started_at = Some(now);
            if let Some(lease) = &mut job.lease {
                lease.released = Some(Released { at: now, permit });
            }
            done(next, vec![])
        }
        Err(denial) => denied(run, (phase, epoch), denial, now),
    }
}

fn cannot_start(
    run: &Run,
    (phase, runner, epoch): (Phase, RunnerId, Epoch),
    reason: String,
    now: Timestamp,
) -> Step {
    match current_lease(run, phase, runner, epoch) {
        Some(lease) if lease.released.is_none() => {
            let revoke = Effect::Revoke(run.job_id(phase), epoch);
            ended(moved(run, run.state, now), RunState::Errored, Some(reason), vec![revoke])
        }
        Some(_) | None => Step::Refused(Refusal::LeaseLost),
    }
}

fn is_approved(run: &Run) -> bool {
    match (&run.approval, &run.planned) {
        (Some(approval), Some(planned)) => approval.digest == planned.digest,
        (None, _) | (_, None) => false,
    }
}

/// Sends the run back to wait for a code. A plan gives its turn up: a person may take long. An
/// apply keeps it: the plan would be stale otherwise.
fn denied(run: &Run, (phase, epoch): (Phase, Epoch), denial: Denial, now: Timestamp) -> Step {
    let state = match phase {
        Phase::Plan => RunState::AwaitingPlanMfa,
        Phase::Apply => RunState::AwaitingApplyMfa,
    };
    let mut next = moved(run, state, now);
    next.reason = Some(denial.to_string());
    next.approval = None;
    let mut effects = vec![Effect::Revoke(run.job_id(phase), epoch)];
    let job = next.job_mut(phase);
    job.lease = None;
    job.evidence = None;
    job.authenticated = None;
    match phase {
        Phase::Plan => {
            effects.push(Effect::GiveTurn);
            done_with(next, Change::Free, effects)
        }
        Phase::Apply => done(next, effects),
    }
}

fn lease_expired(run: &Run, phase: Phase, epoch: Epoch, now: Timestamp) -> Step {
    let lease = match &run.job(phase).lease {
        Some(lease) if run.state == running(phase) && lease.epoch == epoch => lease,
        Some(_) | None => return Step::Refused(Refusal::LeaseLost),
    };
    match (phase, lease.released) {
        (Phase::Apply, Some(_)) => {
            let reason = lost_reason(run);
            let mut next = moved(run, RunState::Lost, now);
            next.reason = Some(reason.clone());
            done_with(next, Change::Freeze { reason }, vec![])
        }
        (Phase::Plan, Some(_) | None) | (Phase::Apply, None) => {
            if let Some(by) = &run.cancel_requested_by {
                let reason = format!("canceled by {by}");
                return ended(moved(run, run.state, now), RunState::Canceled, Some(reason), vec![]);
            }
            requeue(run, phase, now)
        }
    }
}

/// As if the lease had expired, but for good: not even a lost apply can be told of any more.
fn runner_revoked(
    run: &Run,
    (phase, runner, epoch): (Phase, RunnerId, Epoch),
    now: Timestamp,
) -> Step {
    let held = |lease: &Lease| lease.is(runner, epoch);
    if !run.job(phase).lease.as_ref().is_some_and(held) {
        return Step::Refused(Refusal::LeaseLost);
    }
    let reason = REVOKED.to_owned();
    let (mut next, environment) = match (run.state, lease_expired(run, phase, epoch, now)) {
        (RunState::Lost, _) => (moved(run, RunState::Lost, now), Change::Keep),
        (_, Step::Moved { next, environment: Change::Freeze { .. }, .. }) => {
            (*next, Change::Freeze { reason: reason.clone() })
        }
        (_, other @ (Step::Moved { .. } | Step::Unchanged | Step::Refused(_))) => return other,
    };
    next.reason = Some(reason);
    let job = next.job_mut(phase);
    job.lease = None;
    job.evidence = None;
    done_with(next, environment, vec![])
}

fn returned(run: &Run, phase: Phase, runner: RunnerId, epoch: Epoch, now: Timestamp) -> Step {
    if current_lease(run, phase, runner, epoch).is_some() {
        return Step::Unchanged;
    }
    let was_lost = run.state == RunState::Lost
        && phase == Phase::Apply
        && run.apply.lease.as_ref().is_some_and(|lease| lease.is(runner, epoch));
    if !was_lost {
        return Step::Refused(Refusal::LeaseLost);
    }
    let mut next = moved(run, RunState::Applying, now);
    next.reason = stopping(run);
    done_with(next, Change::Hold, vec![])
}

fn plan_ended(
    run: &Run,
    runner: RunnerId,
    epoch: Epoch,
    outcome: PlanOutcome,
    current: MfaPolicy,
    now: Timestamp,
) -> Step {
    match current_lease(run, Phase::Plan, runner, epoch) {
        Some(lease) if lease.released.is_some() => {}
        Some(_) | None => return Step::Refused(Refusal::LeaseLost),
    }
    let mut next = moved(run, run.state, now);
    next.plan.ended_at = Some(now);
    next.plan.lease = None;
    if let Some(by) = &run.cancel_requested_by {
        return ended(next, RunState::Canceled, Some(format!("canceled by {by}")), vec![]);
    }
    let planned = match outcome {
        PlanOutcome::Planned(planned) => planned,
        PlanOutcome::Failed(failure) => {
            let state = match failure.kind {
                FailureKind::Canceled => RunState::Canceled,
                FailureKind::Errored
                | FailureKind::EndedUnknown
                | FailureKind::StateUndelivered => RunState::Errored,
            };
            return ended(next, state, Some(failure.reason), vec![]);
        }
    };
    let applyable = planned.applyable;
    let digest = planned.digest;
    next.planned = Some(planned);
    if run.is_plan_only() || !applyable {
        let reason = (!applyable).then(|| "nothing is to be changed".to_owned());
        return ended(next, RunState::Planned, reason, vec![]);
    }
    let mut effects = vec![];
    next.plan.evidence = None;
    if run.request.policy.max(current).requires_code(Phase::Apply) {
        next.state = RunState::AwaitingApplyMfa;
    } else if run.request.auto_apply {
        next.state = RunState::ApplyQueued;
        next.apply.queued_at = Some(now);
        let by = run.request.queued_by.name().to_owned();
        next.approval = Some(Approval { by, at: now, digest });
        effects.push(Effect::Offer(run.job_id(Phase::Apply)));
    } else {
        next.state = RunState::AwaitingConfirmation;
    }
    done(next, effects)
}

fn apply_ended(
    run: &Run,
    runner: RunnerId,
    epoch: Epoch,
    outcome: ApplyOutcome,
    now: Timestamp,
) -> Step {
    let speaks = matches!(run.state, RunState::Applying | RunState::Lost)
        && run.apply.lease.as_ref().is_some_and(|l| l.is(runner, epoch) && l.released.is_some());
    if !speaks {
        return Step::Refused(Refusal::LeaseLost);
    }
    let mut next = moved(run, run.state, now);
    next.apply.ended_at = Some(now);
    let failure = match outcome {
        ApplyOutcome::Applied { outputs } => {
            next.outputs = outputs;
            return thaw(run, ended(next, RunState::Applied, None, vec![]));
        }
        ApplyOutcome::Failed(failure) => failure,
    };
    if let Some(by) = &run.forced_by {
        // What was killed may have changed things that no state tells of.
        let reason = format!("killed by {by} in the middle of the apply: {}", failure.reason);
        return match ended(next, RunState::Canceled, Some(reason.clone()), vec![]) {
            Step::Moved { next, effects, .. } => {
                Step::Moved { next, environment: Change::Freeze { reason }, effects }
            }
            other @ (Step::Unchanged | Step::Refused(_)) => other,
        };
    }
    match failure.kind {
        FailureKind::Errored => {
            thaw(run, ended(next, RunState::Errored, Some(failure.reason), vec![]))
        }
        FailureKind::Canceled => {
            thaw(run, ended(next, RunState::Canceled, Some(failure.reason), vec![]))
        }
        FailureKind::EndedUnknown | FailureKind::StateUndelivered => {
            let reason = failure.reason;
            match ended(next, RunState::Errored, Some(reason.clone()), vec![]) {
                Step::Moved { next, effects, .. } => {
                    Step::Moved { next, environment: Change::Freeze { reason }, effects }
                }
                other @ (Step::Unchanged | Step::Refused(_)) => other,
            }
        }
    }
}

/// A run that was lost and told its end after all: its remains are dealt with, so the
/// environment it froze is free again.
fn thaw(run: &Run, step: Step) -> Step {
    match step {
        Step::Moved { next, effects, .. } if run.state == RunState::Lost => {
            Step::Moved { next, environment: Change::Thaw, effects }
        }
        other @ (Step::Moved { .. } | Step::Unchanged | Step::Refused(_)) => other,
    }
}

fn confirmed(run: &Run, by: String, seen: Digest, current: MfaPolicy, now: Timestamp) -> Step {
    match run.state {
        RunState::AwaitingConfirmation => {
            if run.awaits_code(current).is_some() {
                return Step::Refused(Refusal::MfaRequired);
            }
            let Some(approval) = approve(run, by, Some(seen), now) else {
                return Step::Refused(Refusal::PlanChanged);
            };
            let mut next = moved(run, RunState::ApplyQueued, now);
            next.approval = Some(approval);
            next.apply.queued_at = Some(now);
            done(next, vec![Effect::Offer(run.job_id(Phase::Apply))])
        }
        RunState::AwaitingPlanMfa | RunState::AwaitingApplyMfa => {
            Step::Refused(Refusal::MfaRequired)
        }
        RunState::ApplyQueued | RunState::Applying | RunState::Applied | RunState::Lost
            if run.was_confirmed_by(&by) =>
        {
            Step::Unchanged
        }
        RunState::ApplyQueued
        | RunState::Applying
        | RunState::Applied
        | RunState::Lost
        | RunState::Pending
        | RunState::PlanQueued
        | RunState::Planning
        | RunState::Planned
        | RunState::Errored
        | RunState::Canceled
        | RunState::Discarded => Step::Refused(Refusal::WrongState),
    }
}

fn discarded(run: &Run, by: String, now: Timestamp) -> Step {
    match run.state {
        RunState::AwaitingConfirmation | RunState::AwaitingApplyMfa => {
            let next = moved(run, run.state, now);
            ended(next, RunState::Discarded, Some(format!("discarded by {by}")), vec![])
        }
        RunState::Discarded => Step::Unchanged,
        RunState::AwaitingPlanMfa
        | RunState::Pending
        | RunState::PlanQueued
        | RunState::Planning
        | RunState::ApplyQueued
        | RunState::Applying
        | RunState::Planned
        | RunState::Applied
        | RunState::Errored
        | RunState::Canceled
        | RunState::Lost => Step::Refused(Refusal::WrongState),
    }
}

fn cancel_requested(run: &Run, by: String, now: Timestamp) -> Step {
    match run.state {
        RunState::AwaitingPlanMfa
        | RunState::Pending
        | RunState::AwaitingConfirmation
        | RunState::AwaitingApplyMfa => cancel_at_once(run, by, vec![], now),
        RunState::PlanQueued => {
            cancel_at_once(run, by, vec![Effect::Withdraw(run.job_id(Phase::Plan))], now)
        }
        RunState::ApplyQueued => {
            cancel_at_once(run, by, vec![Effect::Withdraw(run.job_id(Phase::Apply))], now)
        }
        RunState::Planning => cancel_running(run, Phase::Plan, by, now),
        RunState::Applying => cancel_running(run, Phase::Apply, by, now),
        RunState::Canceled => Step::Unchanged,
        RunState::Lost => cancel_lost(run, by, now),
        RunState::Planned | RunState::Applied | RunState::Errored | RunState::Discarded => {
            Step::Refused(Refusal::AlreadyEnded)
        }
    }
}

fn cancel_at_once(run: &Run, by: String, effects: Vec<Effect>, now: Timestamp) -> Step {
    ended(
        moved(run, run.state, now),
        RunState::Canceled,
        Some(format!("canceled by {by}")),
        effects,
    )
}

fn cancel_running(run: &Run, phase: Phase, by: String, now: Timestamp) -> Step {
    let Job { lease: Some(lease), .. } = run.job(phase) else {
        return cancel_at_once(run, by, vec![], now);
    };
    if lease.released.is_none() {
        let revoke = Effect::Revoke(run.job_id(phase), lease.epoch);
        return cancel_at_once(run, by, vec![revoke], now);
    }
    if run.cancel_requested_by.is_some() {
        return Step::Unchanged;
    }
    let mut next = moved(run, run.state, now);
    next.cancel_requested_by = Some(by);
    next.cancel_requested_at = Some(now);
    next.reason = stopping(&next);
    done(next, vec![Effect::Cancel(run.job_id(phase), lease.epoch)])
}

/// A person gives a lost run up. What it left behind stays frozen with the environment.
fn cancel_lost(run: &Run, by: String, now: Timestamp) -> Step {
    let reason = format!(
        "lost, and given up by {by}: what the apply did is not known; the environment stays frozen \
         until an owner unfreezes it"
    );
    ended(moved(run, run.state, now), RunState::Errored, Some(reason), vec![])
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

/// Has a running phase killed. Nothing but the runner's word ends the run: as long as it is
/// silent, terraform may be running.
fn force_requested(run: &Run, by: String, grace: Duration, now: Timestamp) -> Step {
    let phase = match run.state {
        RunState::Planning => Phase::Plan,
        RunState::Applying | RunState::Lost => Phase::Apply,
        RunState::AwaitingPlanMfa
        | RunState::Pending
        | RunState::PlanQueued
        | RunState::AwaitingConfirmation
        | RunState::AwaitingApplyMfa
        | RunState::ApplyQueued => return Step::Refused(Refusal::NotCanceled),
        RunState::Canceled => return Step::Unchanged,
        RunState::Planned | RunState::Applied | RunState::Errored | RunState::Discarded => {
            return Step::Refused(Refusal::AlreadyEnded);
        }
    };
    let (Some(until), Some(lease)) = (run.force_cancel_time(grace), &run.job(phase).lease) else {
        return Step::Refused(Refusal::NotCanceled);
    };
    if run.forced_by.is_some() {
        return Step::Unchanged;
    }
    if now < until {
        return Step::Refused(Refusal::CancelGrace { until });
    }
    let mut next = moved(run, run.state, now);
    next.forced_by = Some(by);
    next.reason = match run.state {
        RunState::Lost => Some(lost_reason(&next)),
        RunState::AwaitingPlanMfa
        | RunState::Pending
        | RunState::PlanQueued
        | RunState::Planning
        | RunState::AwaitingConfirmation
        | RunState::AwaitingApplyMfa
        | RunState::ApplyQueued
        | RunState::Applying
        | RunState::Planned
        | RunState::Applied
        | RunState::Errored
        | RunState::Canceled
        | RunState::Discarded => stopping(&next),
    };
    done(next, vec![Effect::Kill(run.job_id(phase), lease.epoch)])
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
    let killed = run
        .forced_by
        .as_ref()
        .map(|by| format!("; {by} wants it killed, which the runner is told when it comes back"));
    format!(
        "the runner went silent after the apply may have started; what it did is not known{}",
        killed.unwrap_or_default()
    )
}
