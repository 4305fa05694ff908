//! How a phase ends, by its runner's word.

use super::{
    ApplyOutcome, Effect, FailureKind, PlanOutcome, Refusal, Step, current_lease, done, ended,
    moved,
};
use crate::environment::Change;
use crate::id::{Epoch, RunnerId};
use crate::lease::Engine;
use crate::policy::{Demands, Phase};
use crate::run::{Approval, Planned, Run, RunState};
use crate::time::Timestamp;

const WAITS_FOR_ANOTHER: &str =
    "it does not apply by itself: somebody else than who queued it has to confirm";

pub(super) fn plan_ended(
    run: &Run,
    (runner, epoch, log_length): (RunnerId, Epoch, u64),
    outcome: PlanOutcome,
    current: &Demands,
    now: Timestamp,
) -> Step {
    let lease = match current_lease(run, Phase::Plan, runner, epoch) {
        Some(lease) if lease.released.is_some() => lease,
        Some(_) | None => return Step::Refused(Refusal::LeaseLost),
    };
    let mut next = moved(run, run.state, now);
    next.plan.ended_at = Some(now);
    next.plan.log_length = Some(log_length);
    next.plan.lease = None;
    if let Some(by) = &run.cancel_requested_by {
        return ended(next, RunState::Canceled, Some(format!("canceled by {by}")), vec![]);
    }
    let planned = match outcome {
        PlanOutcome::Planned(planned) => *planned,
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
    if !lease.engine.admits(&planned.engine, &planned.terraform_version) {
        let reason = other_engine(&lease.engine, &planned);
        return ended(next, RunState::Errored, Some(reason), vec![]);
    }
    let applyable = planned.applyable;
    let digest = planned.digest;
    next.planned = Some(planned);
    if run.is_plan_only() || !applyable {
        let reason = (!applyable).then(|| "nothing is to be changed".to_owned());
        return ended(next, RunState::Planned, reason, vec![]);
    }
    let mut effects = vec![];
    next.plan.evidence = None;
    if next.requires_code(Phase::Apply, current) {
        next.state = RunState::AwaitingApplyMfa;
        next.code_reason = next.rule_match(Phase::Apply, current).map(|why| why.to_string());
        next.reason = next.code_reason.clone();
    } else if run.request.auto_apply && !run.requires_second_person(current) {
        next.state = RunState::ApplyQueued;
        next.apply.queued_at = Some(now);
        let by = run.request.queued_by.name().to_owned();
        next.approval = Some(Approval { by, at: now, digest });
        effects.push(Effect::Offer(run.job_id(Phase::Apply)));
    } else {
        next.state = RunState::AwaitingConfirmation;
        if run.request.auto_apply {
            next.reason = Some(WAITS_FOR_ANOTHER.to_owned());
        }
    }
    done(next, effects)
}

/// The apply is held to the engine of its plan, so a plan by another engine than was asked for
/// must not come to one.
fn other_engine(wanted: &Engine, planned: &Planned) -> String {
    let Engine { name, version } = wanted;
    let wanted = [name.as_str(), version.as_str()].join(" ");
    format!(
        "the plan was made by {} {} and its runner was told to use {}; queue the run again",
        planned.engine,
        planned.terraform_version,
        wanted.trim()
    )
}

pub(super) fn apply_ended(
    run: &Run,
    (runner, epoch, log_length): (RunnerId, Epoch, u64),
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
    next.apply.log_length = Some(log_length);
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
pub(super) fn thaw(run: &Run, step: Step) -> Step {
    match step {
        Step::Moved { next, effects, .. } if run.state == RunState::Lost => {
            Step::Moved { next, environment: Change::Thaw, effects }
        }
        other @ (Step::Moved { .. } | Step::Unchanged | Step::Refused(_)) => other,
    }
}
