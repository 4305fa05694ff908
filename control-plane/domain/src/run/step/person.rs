//! What persons decide: by a code, by a confirmation, or that a run shall stop or be given up.

use std::time::Duration;

use super::{Effect, Refusal, Step, approve, done, ended, lost_reason, moved, stopping};
use crate::id::Digest;
use crate::policy::{Demands, Evidence, Phase};
use crate::run::{Authenticated, Decided, Job, Limits, Run, RunState};
use crate::time::Timestamp;

pub(super) fn code_accepted(
    run: &Run,
    evidence: Evidence,
    seen: Option<Digest>,
    current: &Demands,
    now: Timestamp,
) -> Step {
    let phase = evidence.phase;
    match run.awaits_code(current) {
        None => return Step::Refused(Refusal::NotAwaitingCode),
        Some(awaited) if awaited != phase => return Step::Refused(Refusal::OtherPhase),
        Some(_) => {}
    }
    if phase == Phase::Apply && !run.may_be_approved_by(&evidence.user, current) {
        return Step::Refused(Refusal::SecondPersonRequired);
    }
    let state = match phase {
        Phase::Plan => RunState::Pending,
        Phase::Apply => RunState::ApplyQueued,
    };
    let mut next = moved(run, state, now);
    next.refused_code = None;
    next.reason = None;
    next.decide(Decided::authenticated(phase), &evidence.user, now);
    let effect = match phase {
        Phase::Plan => Effect::GiveTurn,
        Phase::Apply => {
            let Some(approval) = approve(run, evidence.user.clone(), seen, now) else {
                return Step::Refused(Refusal::PlanChanged);
            };
            next.approval = Some(approval);
            next.apply.queued_at = Some(now);
            let matched = run.rule_match(phase, current).map(|matched| matched.to_string());
            next.code_reason = next.code_reason.or(matched);
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

pub(super) fn confirmed(
    run: &Run,
    by: String,
    seen: Digest,
    current: &Demands,
    now: Timestamp,
) -> Step {
    match run.state {
        RunState::AwaitingConfirmation => {
            if run.awaits_code(current).is_some() {
                return Step::Refused(Refusal::MfaRequired);
            }
            if !run.may_be_approved_by(&by, current) {
                return Step::Refused(Refusal::SecondPersonRequired);
            }
            let Some(approval) = approve(run, by, Some(seen), now) else {
                return Step::Refused(Refusal::PlanChanged);
            };
            let mut next = moved(run, RunState::ApplyQueued, now);
            next.decide(Decided::ApprovedApply, &approval.by, now);
            next.approval = Some(approval);
            next.reason = None;
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

pub(super) fn discarded(run: &Run, by: String, now: Timestamp) -> Step {
    match run.state {
        RunState::AwaitingConfirmation | RunState::AwaitingApplyMfa => {
            let mut next = moved(run, run.state, now);
            next.decide(Decided::Discarded, &by, now);
            ended(next, RunState::Discarded, Some(format!("discarded by {by}")), vec![])
        }
        RunState::Lost => give_up(run, by, now),
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
        | RunState::Canceled => Step::Refused(Refusal::WrongState),
    }
}

/// Gives a lost run up, by a person's word for just that. What it left behind stays frozen with
/// the environment.
fn give_up(run: &Run, by: String, now: Timestamp) -> Step {
    let reason = format!(
        "lost, and given up by {by}: what the apply did is not known; the environment stays frozen \
         until an owner unfreezes it"
    );
    let mut next = moved(run, run.state, now);
    next.decide(Decided::GaveUp, &by, now);
    ended(next, RunState::Errored, Some(reason), vec![])
}

pub(super) fn cancel_requested(run: &Run, by: String, now: Timestamp) -> Step {
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
    let mut next = moved(run, run.state, now);
    next.decide(Decided::Canceled, &by, now);
    ended(next, RunState::Canceled, Some(format!("canceled by {by}")), effects)
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
    next.decide(Decided::AskedToStop, &by, now);
    next.cancel_requested_by = Some(by);
    next.cancel_requested_at = Some(now);
    next.reason = stopping(&next);
    done(next, vec![Effect::Cancel(run.job_id(phase), lease.epoch)])
}

/// Cancels what has waited or run for too long, as if a person had asked for it.
pub(super) fn limit_reached(run: &Run, limits: &Limits, now: Timestamp) -> Step {
    let said = |what: &str, limit: Option<Duration>| {
        format!("system ({what}: {} s)", limit.unwrap_or_default().as_secs())
    };
    match run.state {
        RunState::AwaitingPlanMfa | RunState::AwaitingConfirmation | RunState::AwaitingApplyMfa => {
            let by = said("no person decided within the environment's limit", limits.person);
            cancel_at_once(run, by, vec![], now)
        }
        RunState::Planning => {
            let by = said("the plan ran longer than the environment's limit", limits.plan);
            cancel_running(run, Phase::Plan, by, now)
        }
        RunState::Applying => {
            let by = said("the apply ran longer than the environment's limit", limits.apply);
            cancel_running(run, Phase::Apply, by, now)
        }
        RunState::Pending
        | RunState::PlanQueued
        | RunState::ApplyQueued
        | RunState::Planned
        | RunState::Applied
        | RunState::Errored
        | RunState::Canceled
        | RunState::Discarded
        | RunState::Lost => Step::Refused(Refusal::WrongState),
    }
}

/// Notes that a lost run is to stop, for its runner when it comes back. Never gives it up: who
/// asks a second time why it does not stop has decided nothing about what it left behind.
fn cancel_lost(run: &Run, by: String, now: Timestamp) -> Step {
    if run.lost_its_runner() {
        // There is nobody to be told.
        return Step::Refused(Refusal::WrongState);
    }
    if run.cancel_requested_by.is_some() {
        return Step::Unchanged;
    }
    let mut next = moved(run, run.state, now);
    next.decide(Decided::AskedToStop, &by, now);
    next.cancel_requested_by = Some(by);
    next.cancel_requested_at = Some(now);
    next.reason = Some(lost_reason(&next));
    done(next, vec![])
}

/// Has a running phase killed. Nothing but the runner's word ends the run: as long as it is
/// silent, terraform may be running.
pub(super) fn force_requested(run: &Run, by: String, grace: Duration, now: Timestamp) -> Step {
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
    next.decide(Decided::AskedToKill, &by, now);
    next.forced_by = Some(by);
    next.reason =
        if run.state == RunState::Lost { Some(lost_reason(&next)) } else { stopping(&next) };
    done(next, vec![Effect::Kill(run.job_id(phase), lease.epoch)])
}
