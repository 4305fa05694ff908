//! What a plan rule, a second person and limits of time do to a run.

use std::time::Duration;

use super::step_tests::{RUNNER, START, evidence, facts, given, go, granted, planned, started};
use super::{Effect, Event, Limits, PlanOutcome, Planned, Refusal, Run, RunState, Step, step};
use crate::environment::Change;
use crate::policy::{Demands, MfaPolicy, Phase, PlanRule};

fn destructive() -> PlanRule {
    PlanRule { destructive: true, ..PlanRule::default() }
}

fn with_rule(plan_rule: PlanRule) -> Demands {
    Demands { plan_rule, ..Demands::default() }
}

fn two_persons() -> Demands {
    Demands { second_person: true, ..Demands::default() }
}

/// A run under `never` whose plan is about to end.
fn unguarded() -> Run {
    let mut run = given("Planning (released)");
    run.request.policy = MfaPolicy::Never;
    run
}

fn ends(run: &Run, planned: Planned, current: &Demands) -> Run {
    let (runner, epoch) = (RUNNER, run.plan.epoch);
    let outcome = PlanOutcome::Planned(Box::new(planned));
    go(run, Event::PlanEnded { runner, epoch, log_length: 0, outcome, current: current.clone() })
}

fn confirm(by: &str, current: &Demands) -> Event {
    Event::Confirmed { by: by.into(), seen: planned(true).digest, current: current.clone() }
}

fn code_of(user: &str, current: &Demands) -> Event {
    let mut evidence = evidence(Phase::Apply);
    evidence.user = user.into();
    Event::CodeAccepted { evidence, seen: Some(planned(true).digest), current: current.clone() }
}

fn starting(run: &Run, current: &Demands) -> Event {
    let mut event = started(run, Phase::Apply);
    let Event::Starting { current: known, .. } = &mut event else { panic!("{event:?}") };
    *known = current.clone();
    event
}

#[test]
fn a_matched_rule_turns_confirmation_and_auto_apply_into_a_code() {
    for auto_apply in [false, true] {
        // The rule it carries, and the one of now: either is enough.
        for (carried, current) in
            [(destructive(), PlanRule::default()), (PlanRule::default(), destructive())]
        {
            let mut run = unguarded();
            (run.request.auto_apply, run.request.plan_rule) = (auto_apply, carried);
            let current = with_rule(current);
            let next = ends(&run, planned(true), &current);
            assert_eq!(next.state, RunState::AwaitingApplyMfa);
            let why = "the plan replaces aws_iam_role.admin: the environment demands a code";
            assert!(next.reason.as_ref().is_some_and(|reason| reason.starts_with(why)));
            assert_eq!(next.code_reason, next.reason);
            let confirmed = step(&next, confirm("bob", &current), START);
            assert_eq!(confirmed, Step::Refused(Refusal::MfaRequired));
            let next = go(&next, code_of("bob", &current));
            assert_eq!((next.state, next.reason), (RunState::ApplyQueued, None));
            assert!(next.code_reason.is_some_and(|kept| kept.starts_with(why)));
        }
    }
}

#[test]
fn a_plan_that_cannot_be_told_in_full_needs_a_code_under_any_rule_and_none_without() {
    let unknown = || Planned { facts: None, ..planned(true) };
    let mut run = unguarded();
    run.request.auto_apply = true;
    assert_eq!(ends(&run, unknown(), &Demands::default()).state, RunState::ApplyQueued);
    let rule = PlanRule { more_than: Some(1_000_000), ..PlanRule::default() };
    let next = ends(&run, unknown(), &with_rule(rule));
    assert_eq!(next.state, RunState::AwaitingApplyMfa);
}

#[test]
fn a_rule_that_does_not_match_changes_nothing() {
    let rule = PlanRule { resource_types: ["aws_vpc".into()].into(), ..PlanRule::default() };
    let next = ends(&unguarded(), planned(true), &with_rule(rule));
    assert_eq!((next.state, next.code_reason), (RunState::AwaitingConfirmation, None));
}

#[test]
fn a_rule_tightened_after_the_confirmation_stops_the_release() {
    let run = ends(&unguarded(), planned(true), &Demands::default());
    let run = go(&run, confirm("bob", &Demands::default()));
    let run = go(&run, granted(Phase::Apply));
    let next = go(&run, starting(&run, &with_rule(destructive())));
    assert_eq!((next.state, next.approval.clone()), (RunState::AwaitingApplyMfa, None));
    assert!(next.code_reason.is_some_and(|why| why.contains("aws_iam_role.admin")));
    let allowed = go(&run, starting(&run, &Demands::default()));
    assert!(allowed.apply.lease.is_some_and(|lease| lease.released.is_some()));
}

#[test]
fn a_rule_tightened_while_a_person_reads_the_plan_demands_a_code_and_says_why() {
    let run = ends(&unguarded(), planned(true), &Demands::default());
    let current = with_rule(destructive());
    assert_eq!(run.awaits_code(&current), Some(Phase::Apply));
    let next = go(&run, code_of("bob", &current));
    assert!(next.code_reason.is_some_and(|why| why.contains("destroy or replace")));
}

#[test]
fn plans_and_plan_only_runs_are_not_the_rules_business() {
    let mut run = given("Planning (leased, nothing released)");
    run.request.policy = MfaPolicy::Never;
    run.plan.evidence = None;
    let mut event = started(&run, Phase::Plan);
    if let Event::Starting { current, .. } = &mut event {
        *current = with_rule(destructive());
    }
    assert_eq!(go(&run, event).state, RunState::Planning);
    let mut run = unguarded();
    run.request.kind = super::RunKind::PlanOnly;
    assert_eq!(ends(&run, planned(true), &with_rule(destructive())).state, RunState::Planned);
}

#[test]
fn who_queued_does_not_approve_where_a_second_person_is_demanded() {
    let refused = Step::Refused(Refusal::SecondPersonRequired);
    for (carried, current) in [(true, Demands::default()), (false, two_persons())] {
        let mut run = unguarded();
        run.request.second_person = carried;
        let waiting = ends(&run, planned(true), &current);
        assert_eq!(step(&waiting, confirm("ada", &current), START), refused);
        assert_eq!(go(&waiting, confirm("bob", &current)).state, RunState::ApplyQueued);
        run.request.policy = MfaPolicy::AppliesOnly;
        let waiting = ends(&run, planned(true), &current);
        assert_eq!(step(&waiting, code_of("ada", &current), START), refused);
        assert_eq!(go(&waiting, code_of("bob", &current)).state, RunState::ApplyQueued);
    }
}

#[test]
fn the_code_for_the_plan_may_be_that_of_who_queued() {
    let mut run = given("AwaitingPlanMfa");
    run.request.second_person = true;
    let accepted =
        Event::CodeAccepted { evidence: evidence(Phase::Plan), seen: None, current: two_persons() };
    assert_eq!(go(&run, accepted).state, RunState::Pending);
}

#[test]
fn nothing_applies_by_itself_where_a_second_person_is_demanded() {
    let mut run = unguarded();
    run.request.auto_apply = true;
    let next = ends(&run, planned(true), &two_persons());
    assert_eq!(next.state, RunState::AwaitingConfirmation);
    assert!(next.reason.is_some_and(|reason| reason.contains("somebody else")));
}

#[test]
fn a_second_person_demanded_after_the_approval_stops_the_release() {
    let (before, now) = (Demands::default(), two_persons());
    let mut automatic = unguarded();
    automatic.request.auto_apply = true;
    let own = go(&ends(&unguarded(), planned(true), &before), confirm("ada", &before));
    for run in [own, ends(&automatic, planned(true), &before)] {
        let run = go(&run, granted(Phase::Apply));
        let Step::Moved { next, environment, effects } = step(&run, starting(&run, &now), START)
        else {
            panic!("it must move");
        };
        assert_eq!((next.state, environment), (RunState::AwaitingConfirmation, Change::Keep));
        assert_eq!(next.approval, None);
        assert_eq!(effects, [Effect::Revoke(run.job_id(Phase::Apply), run.apply.epoch)]);
    }
    let run = go(&ends(&unguarded(), planned(true), &before), confirm("bob", &before));
    let run = go(&run, granted(Phase::Apply));
    assert_eq!(go(&run, starting(&run, &now)).state, RunState::Applying);
}

#[test]
fn a_limit_cancels_what_waits_and_asks_what_runs_to_stop() {
    let limit = Duration::from_secs(600);
    let limits = Limits { person: Some(limit), plan: Some(limit), apply: Some(limit) };
    let reached = |run: &Run, after: u64| {
        step(run, Event::LimitReached { limits }, START + Duration::from_secs(after))
    };
    for name in ["AwaitingPlanMfa", "AwaitingConfirmation", "AwaitingApplyMfa"] {
        let run = given(name);
        assert_eq!(reached(&run, 599), Step::Refused(Refusal::WrongState), "{name}");
        let Step::Moved { next, environment, .. } = reached(&run, 600) else {
            panic!("{name} must move");
        };
        assert_eq!((next.state, environment), (RunState::Canceled, Change::Free), "{name}");
        let reason = next.reason.unwrap();
        assert!(reason.contains("no person decided") && reason.contains("600 s"), "{reason}");
    }
    for name in ["Planning (released)", "Applying (released)"] {
        let run = given(name);
        assert_eq!(reached(&run, 599), Step::Refused(Refusal::WrongState), "{name}");
        let Step::Moved { next, effects, .. } = reached(&run, 600) else {
            panic!("{name} must move");
        };
        assert_eq!(next.state, run.state, "{name}");
        assert!(matches!(effects.as_slice(), [Effect::Cancel(..)]), "{name}");
        assert!(next.reason.as_ref().is_some_and(|r| r.contains("ran longer")), "{next:?}");
        // Once asked, never again: what remains is for a person to force.
        assert_eq!(reached(&next, 6_000), Step::Refused(Refusal::WrongState), "{name}");
    }
    for name in ["Pending", "PlanQueued", "ApplyQueued", "Applied", "Lost"] {
        assert_eq!(reached(&given(name), 6_000), Step::Refused(Refusal::WrongState), "{name}");
    }
}

#[test]
fn a_refused_code_does_not_make_the_wait_longer() {
    let run = given("AwaitingApplyMfa");
    let refused = super::RefusedCode {
        authentication: evidence(Phase::Apply).authentication,
        reason: "CODE_REJECTED".into(),
        message: "use the next code".into(),
        at: START,
        aws_request_id: None,
    };
    let event = Event::CodeRefused { phase: Phase::Apply, refused, current: Demands::default() };
    let later = START + Duration::from_secs(60);
    let Step::Moved { next, .. } = step(&run, event, later) else { panic!("it must move") };
    assert_eq!((next.entered_at, next.updated_at), (run.entered_at, later));
    assert_eq!(facts().changes, 1);
}
