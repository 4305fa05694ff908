//! What becomes of sessions: that none is leased out with too little life, and what replaces one
//! while its phase runs.

use std::time::Duration;

use super::step_tests::{RUNNER, evidence, given};
use super::{Effect, Event, Refusal, Run, RunState, Step, step};
use crate::id::AuthenticationId;
use crate::lease::{Engine, Site};
use crate::policy::{Demands, Evidence, Phase};
use crate::time::Timestamp;

const FLOOR: Duration = Duration::from_secs(1800);

fn granted_at(run: &Run, phase: Phase, seconds: i64) -> Step {
    let (engine, site, floor) = (Engine::default(), Site::default(), FLOOR);
    let event =
        Event::Granted { phase, runner: RUNNER, log_base: 0, state: None, engine, site, floor };
    step(run, event, Timestamp::from_millis(seconds * 1000))
}

#[test]
fn a_session_at_its_floor_is_leased_out_and_one_below_is_not() {
    let run = given("ApplyQueued");
    let Step::Moved { next, .. } = granted_at(&run, Phase::Apply, 1800) else { panic!() };
    assert!(next.apply.lease.is_some());
    let Step::Moved { next, effects, .. } = granted_at(&run, Phase::Apply, 1801) else { panic!() };
    assert_eq!(next.state, RunState::AwaitingApplyMfa);
    assert!(next.apply.lease.is_none() && next.apply.evidence.is_none());
    assert_eq!(next.apply.epoch, run.apply.epoch);
    assert_eq!(next.approval, None);
    assert_eq!(effects, [Effect::Withdraw(run.job_id(Phase::Apply))]);
    assert!(next.reason.is_some_and(|reason| reason.contains("1800 s")));
}

#[test]
fn a_plan_below_its_floor_gives_its_turn_up() {
    let mut run = given("PlanQueued");
    run.plan.evidence = Some(evidence(Phase::Plan));
    let Step::Moved { next, effects, .. } = granted_at(&run, Phase::Plan, 3000) else { panic!() };
    assert_eq!(next.state, RunState::AwaitingPlanMfa);
    assert!(effects.contains(&Effect::GiveTurn));
}

fn another(phase: Phase) -> Evidence {
    Evidence {
        authentication: AuthenticationId::from_bytes([42; 16]),
        user: "bob".into(),
        expires_at: Timestamp::from_millis(9_000_000),
        ..evidence(phase)
    }
}

fn topped_up(evidence: Evidence) -> Event {
    Event::ToppedUp { evidence, current: Demands::default() }
}

#[test]
fn a_running_apply_is_topped_up_and_who_approved_it_stays() {
    for name in ["Applying (released)", "Applying (released, cancel requested)", "Lost"] {
        let run = given(name);
        let event = topped_up(another(Phase::Apply));
        let Step::Moved { next, effects, .. } = step(&run, event, Timestamp::from_millis(5)) else {
            panic!("{name}");
        };
        assert_eq!((next.state, &next.approval), (run.state, &run.approval));
        assert_eq!(next.apply.evidence, Some(another(Phase::Apply)));
        let before = run.apply.authenticated.as_ref().map(|by| by.user.clone());
        let after = next.apply.authenticated.map(|by| (by.user, by.expires_at));
        assert_eq!(after, before.map(|by| (by, another(Phase::Apply).expires_at)));
        assert_eq!(effects, [Effect::Renew(run.job_id(Phase::Apply), run.apply.epoch)]);
    }
}

#[test]
fn nothing_else_is_topped_up() {
    for (name, refusal) in [
        ("ApplyQueued", Refusal::WrongState),
        ("Applying (leased, nothing released)", Refusal::WrongState),
        ("Applying (released, forced)", Refusal::Forced),
        ("Applied", Refusal::WrongState),
        ("AwaitingApplyMfa", Refusal::WrongState),
    ] {
        let event = topped_up(another(Phase::Apply));
        assert_eq!(
            step(&given(name), event, Timestamp::from_millis(5)),
            Step::Refused(refusal),
            "{name}"
        );
    }
}

#[test]
fn who_may_not_approve_an_apply_does_not_top_it_up() {
    let run = given("Applying (released)");
    let demanded = Demands { second_person: true, ..Demands::default() };
    let own = Evidence { user: "ada".into(), ..another(Phase::Apply) };
    let mut carrying = run.clone();
    carrying.request.second_person = true;
    for (run, current) in [(&run, demanded), (&carrying, Demands::default())] {
        let event = Event::ToppedUp { evidence: own.clone(), current: current.clone() };
        let refused = Step::Refused(Refusal::SecondPersonRequired);
        assert_eq!(step(run, event, Timestamp::from_millis(5)), refused);
        let event = Event::ToppedUp { evidence: another(Phase::Apply), current };
        assert!(matches!(step(run, event, Timestamp::from_millis(5)), Step::Moved { .. }));
    }
}

#[test]
fn a_session_that_ends_sooner_does_not_replace_the_one_in_use() {
    let run = given("Applying (released)");
    let later = topped_up(another(Phase::Apply));
    let Step::Moved { next, .. } = step(&run, later, Timestamp::from_millis(5)) else { panic!() };
    let sooner = Timestamp::from_millis(8_999_999);
    let first = Evidence { expires_at: sooner, ..another(Phase::Apply) };
    let refused = Step::Refused(Refusal::ExpiresSooner);
    assert_eq!(step(&next, topped_up(first), Timestamp::from_millis(6)), refused);
    let equal = topped_up(another(Phase::Apply));
    assert!(matches!(step(&next, equal, Timestamp::from_millis(6)), Step::Moved { .. }));
}
