//! What becomes of a lease: granted, given back, released, expired, ended, taken up again.

use std::time::Duration;

use super::result::thaw;
use super::{
    Effect, Refusal, Step, current_lease, done, done_with, ended, lost_reason, moved, queued,
    running, stopping,
};
use crate::environment::Change;
use crate::id::{Epoch, RunnerId};
use crate::lease::{Engine, Lease, Released, Site};
use crate::policy::{Demands, Denial, Evidence, Phase, Release, judge};
use crate::run::{Run, RunState};
use crate::time::Timestamp;

const REVOKED: &str =
    "the runner was revoked after the apply may have started; what it did is not known";

const NEVER_STARTED: &str =
    "the runner came back and had not started terraform: nothing was applied; queue a new run";

pub(super) fn granted(
    run: &Run,
    (phase, runner): (Phase, RunnerId),
    log_base: u64,
    (state, engine, site): (Option<u64>, Engine, Site),
    floor: Duration,
    now: Timestamp,
) -> Step {
    if run.state != queued(phase) {
        return Step::Refused(Refusal::WrongState);
    }
    if let Some(evidence) = &run.job(phase).evidence
        && evidence.expires_at.since(now) < floor
    {
        let denial = Denial::ExpiresTooSoon { expires_at: evidence.expires_at, floor };
        return withdrawn(run, phase, denial, now);
    }
    let mut next = moved(run, running(phase), now);
    match phase {
        Phase::Plan => next.site = Some(site),
        Phase::Apply => {}
    }
    let job = next.job_mut(phase);
    let lease = Lease { engine, ..Lease::after(job.epoch, runner, log_base, state, now) };
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

pub(super) fn handed_back(
    run: &Run,
    phase: Phase,
    runner: RunnerId,
    epoch: Epoch,
    now: Timestamp,
) -> Step {
    let was_lost = is_lost_with(run, phase, runner, epoch);
    if current_lease(run, phase, runner, epoch).is_none() && !was_lost {
        return Step::Refused(Refusal::LeaseLost);
    }
    let next = moved(run, run.state, now);
    if let Some(by) = &run.cancel_requested_by {
        let reason = Some(format!("canceled by {by}"));
        return thaw(run, ended(next, RunState::Canceled, reason, vec![]));
    }
    if was_lost {
        // Not started anew: by now nobody may look any more.
        let reason = Some(NEVER_STARTED.to_owned());
        return thaw(run, ended(next, RunState::Errored, reason, vec![]));
    }
    requeue(run, phase, now)
}

/// Tells whether this lease is that of an apply that was marked as lost.
fn is_lost_with(run: &Run, phase: Phase, runner: RunnerId, epoch: Epoch) -> bool {
    run.state == RunState::Lost
        && phase == Phase::Apply
        && run.apply.lease.as_ref().is_some_and(|lease| lease.is(runner, epoch))
}

pub(super) fn starting(
    run: &Run,
    (phase, runner, epoch): (Phase, RunnerId, Epoch),
    current: &Demands,
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
    if phase == Phase::Apply && !run.is_approved_by_another(current) {
        return denied(run, (phase, epoch), Denial::SecondPersonRequired, current, now);
    }
    let release = Release {
        phase,
        carried: run.request.policy,
        current: current.policy,
        matched: run.rule_match(phase, current),
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
        Err(denial) => denied(run, (phase, epoch), denial, current, now),
    }
}

/// Sends a run that nobody has been granted back to wait for a code.
fn withdrawn(run: &Run, phase: Phase, denial: Denial, now: Timestamp) -> Step {
    let epoch = run.job(phase).epoch;
    match denied(run, (phase, epoch), denial, &Demands::default(), now) {
        Step::Moved { next, environment, mut effects } => {
            effects.retain(|effect| !matches!(effect, Effect::Revoke(..)));
            effects.push(Effect::Withdraw(run.job_id(phase)));
            Step::Moved { next, environment, effects }
        }
        other @ (Step::Unchanged | Step::Refused(_)) => other,
    }
}

/// Puts another session in place of the one that a running phase has. Who approved it stays who
/// did; but an apply goes on under the name of whoever tops it up, so that has to be somebody who
/// could have approved it.
pub(super) fn topped_up(run: &Run, evidence: Evidence, current: &Demands, now: Timestamp) -> Step {
    let phase = evidence.phase;
    if run.running_phase() != Some(phase) {
        return Step::Refused(Refusal::WrongState);
    }
    if run.forced_by.is_some() {
        return Step::Refused(Refusal::Forced);
    }
    let lease = run.job(phase).lease.as_ref().filter(|lease| lease.released.is_some());
    let Some(lease) = lease else { return Step::Refused(Refusal::WrongState) };
    if phase == Phase::Apply && !run.may_be_approved_by(&evidence.user, current) {
        return Step::Refused(Refusal::SecondPersonRequired);
    }
    let in_use = run.job(phase).evidence.as_ref().map(|evidence| evidence.expires_at);
    if in_use.is_some_and(|expires_at| evidence.expires_at < expires_at) {
        // One that was verified late: a later one was faster.
        return Step::Refused(Refusal::ExpiresSooner);
    }
    let renew = Effect::Renew(run.job_id(phase), lease.epoch);
    let mut next = moved(run, run.state, now);
    let job = next.job_mut(phase);
    if let Some(authenticated) = &mut job.authenticated {
        authenticated.expires_at = evidence.expires_at;
    }
    job.evidence = Some(evidence);
    done(next, vec![renew])
}

pub(super) fn cannot_start(
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

/// Sends the run back to wait for a person, who is mostly to give a code. A plan gives its turn up: a person may take long. An
/// apply keeps it: the plan would be stale otherwise.
fn denied(
    run: &Run,
    (phase, epoch): (Phase, Epoch),
    denial: Denial,
    current: &Demands,
    now: Timestamp,
) -> Step {
    let state = match (phase, &denial) {
        (Phase::Plan, _) => RunState::AwaitingPlanMfa,
        (Phase::Apply, Denial::SecondPersonRequired)
            if !run.requires_code(Phase::Apply, current) =>
        {
            RunState::AwaitingConfirmation
        }
        (Phase::Apply, _) => RunState::AwaitingApplyMfa,
    };
    let mut next = moved(run, state, now);
    next.reason = Some(denial.to_string());
    if let Denial::RuleMatched(matched) = &denial {
        next.code_reason = Some(matched.to_string());
    }
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

pub(super) fn lease_expired(run: &Run, phase: Phase, epoch: Epoch, now: Timestamp) -> Step {
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
pub(super) fn runner_revoked(
    run: &Run,
    (phase, runner, epoch): (Phase, RunnerId, Epoch),
    now: Timestamp,
) -> Step {
    let held = |lease: &Lease| lease.is(runner, epoch);
    if !run.job(phase).lease.as_ref().is_some_and(held) {
        return Step::Refused(Refusal::LeaseLost);
    }
    let reason = REVOKED.to_owned();
    let (mut next, environment) = if run.state == RunState::Lost {
        (moved(run, RunState::Lost, now), Change::Keep)
    } else {
        match lease_expired(run, phase, epoch, now) {
            Step::Moved { next, environment: Change::Freeze { .. }, .. } => {
                (*next, Change::Freeze { reason: reason.clone() })
            }
            other @ (Step::Moved { .. } | Step::Unchanged | Step::Refused(_)) => return other,
        }
    };
    next.reason = Some(reason);
    let job = next.job_mut(phase);
    job.lease = None;
    job.evidence = None;
    done_with(next, environment, vec![])
}

pub(super) fn returned(
    run: &Run,
    phase: Phase,
    runner: RunnerId,
    epoch: Epoch,
    now: Timestamp,
) -> Step {
    if current_lease(run, phase, runner, epoch).is_some() {
        return Step::Unchanged;
    }
    if !is_lost_with(run, phase, runner, epoch) {
        return Step::Refused(Refusal::LeaseLost);
    }
    let mut next = moved(run, RunState::Applying, now);
    next.reason = stopping(run);
    done_with(next, Change::Hold, vec![])
}
