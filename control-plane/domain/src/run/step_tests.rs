//! What the state machine promises: single moves by name, and random sequences of events held
//! against the invariants.

use std::collections::HashSet;
use std::time::Duration;

use proptest::collection::vec;
use proptest::prelude::{Just, Strategy, any, prop_oneof, proptest};
use proptest::test_runner::TestCaseResult;
use proptest::{prop_assert, prop_assert_eq};

use super::{
    Actor, ApplyOutcome, Counts, Effect, Event, Failure, FailureKind, Limits, PlanDigests,
    PlanOutcome, Planned, Refusal, Request, Run, RunKind, RunState, Step, step,
};
use crate::environment::{Change, Hold};
use crate::id::{
    AuthenticationId, Digest, EnvironmentId, Epoch, OrganizationId, RunId, RunnerId, UserId,
};
use crate::lease::{Engine, Site};
use crate::policy::{
    Demands, DestroyedBy, Evidence, MfaPolicy, Permit, Phase, PlanFacts, PlanRule,
};
use crate::time::Timestamp;

pub(super) const RUNNER: RunnerId = RunnerId::from_bytes([9; 16]);
const OTHER_RUNNER: RunnerId = RunnerId::from_bytes([8; 16]);
pub(super) const START: Timestamp = Timestamp::from_millis(0);

pub(super) fn request(policy: MfaPolicy) -> Request {
    Request {
        organization: OrganizationId::from_bytes([1; 16]),
        environment: EnvironmentId::from_bytes([2; 16]),
        kind: RunKind::PlanAndApply,
        configuration: Digest::from_bytes([4; 32]),
        message: String::new(),
        target: vec![],
        replace: vec![],
        auto_apply: false,
        policy,
        plan_rule: PlanRule::default(),
        second_person: false,
        queued_by: Actor::User { id: UserId::from_bytes([5; 16]), name: "ada".into() },
        queued_at: START,
        retry_of: None,
        given: vec![],
    }
}

pub(super) fn queue(policy: MfaPolicy) -> Run {
    Run::queue(RunId::from_bytes([6; 16]), request(policy))
}

pub(super) fn evidence(phase: Phase) -> Evidence {
    Evidence {
        authentication: AuthenticationId::from_bytes([phase as u8 + 10; 16]),
        phase,
        user: "ada".into(),
        authenticated_at: START,
        expires_at: Timestamp::from_millis(3_600_000),
    }
}

pub(super) fn planned(applyable: bool) -> Planned {
    let digest = Digest::from_bytes([7; 32]);
    Planned {
        digests: PlanDigests { plan: digest, workspace: digest, lock_file: None, changes: digest },
        digest,
        applyable,
        counts: Counts { add: 1, ..Counts::default() },
        facts: Some(facts()),
        engine: "terraform".into(),
        terraform_version: "1.11.4".into(),
    }
}

/// Of a plan that replaces a role.
pub(super) fn facts() -> PlanFacts {
    let mut facts = PlanFacts::default();
    facts.add("aws_iam_role.admin", "aws_iam_role", Some(DestroyedBy::Replacing));
    facts
}

#[track_caller]
pub(super) fn go(run: &Run, event: Event) -> Run {
    match step(run, event.clone(), START) {
        Step::Moved { next, .. } => *next,
        other => panic!("{} on {event:?}: {other:?}", run.state),
    }
}

pub(super) fn accepted(run: &Run, phase: Phase) -> Event {
    Event::CodeAccepted {
        evidence: evidence(phase),
        seen: run.planned.as_ref().map(|planned| planned.digest),
        current: Demands::default(),
    }
}

pub(super) fn started(run: &Run, phase: Phase) -> Event {
    Event::Starting {
        phase,
        runner: RUNNER,
        epoch: run.job(phase).epoch,
        current: Demands::default(),
        floor: Duration::from_secs(300),
    }
}

pub(super) fn plan_ended(run: &Run, applyable: bool) -> Event {
    Event::PlanEnded {
        runner: RUNNER,
        epoch: run.plan.epoch,
        log_length: 70,
        outcome: PlanOutcome::Planned(Box::new(planned(applyable))),
        current: Demands::default(),
    }
}

pub(super) fn granted(phase: Phase) -> Event {
    asked_for(phase, Engine::default())
}

fn asked_for(phase: Phase, engine: Engine) -> Event {
    let (site, floor) = (Site::default(), Duration::ZERO);
    Event::Granted { phase, runner: RUNNER, log_base: 0, state: None, engine, site, floor }
}

fn forced(grace: Duration) -> Event {
    Event::ForceRequested { by: "ada".into(), grace }
}

fn apply_ended(run: &Run, outcome: ApplyOutcome) -> Event {
    Event::ApplyEnded { runner: RUNNER, epoch: run.apply.epoch, log_length: 90, outcome }
}

/// A run in each state, and in each that depends on it before and after the credentials were
/// released.
pub(super) fn one_of_each() -> Vec<(&'static str, Run)> {
    let awaiting_plan = queue(MfaPolicy::PlansAndApplies);
    let pending = go(&awaiting_plan, accepted(&awaiting_plan, Phase::Plan));
    let plan_queued = go(&pending, Event::TurnCame);
    let leased = go(&plan_queued, granted(Phase::Plan));
    let planning = go(&leased, started(&leased, Phase::Plan));
    let canceling = go(&planning, Event::CancelRequested { by: "ada".into() });
    let awaiting_apply = go(&planning, plan_ended(&planning, true));
    let apply_queued = go(&awaiting_apply, accepted(&awaiting_apply, Phase::Apply));
    let apply_leased = go(&apply_queued, granted(Phase::Apply));
    let applying = go(&apply_leased, started(&apply_leased, Phase::Apply));
    let asked = go(&applying, Event::CancelRequested { by: "ada".into() });
    let killing = go(&asked, forced(Duration::ZERO));
    let lost =
        go(&applying, Event::LeaseExpired { phase: Phase::Apply, epoch: applying.apply.epoch });
    let applied = go(&applying, apply_ended(&applying, ApplyOutcome::Applied { outputs: None }));
    let failure = Failure { kind: FailureKind::Errored, reason: "exit code 1".into() };
    let errored = go(&applying, apply_ended(&applying, ApplyOutcome::Failed(failure)));
    let unguarded = queue(MfaPolicy::Never);
    let unguarded = go(&unguarded, Event::TurnCame);
    let unguarded = go(&unguarded, granted(Phase::Plan));
    let unguarded = go(&unguarded, started(&unguarded, Phase::Plan));
    vec![
        ("AwaitingPlanMfa", awaiting_plan.clone()),
        ("Pending", pending),
        ("PlanQueued", plan_queued),
        ("Planning (leased, nothing released)", leased),
        ("Planning (released)", planning.clone()),
        ("Planning (released, cancel requested)", canceling),
        ("AwaitingConfirmation", go(&unguarded, plan_ended(&unguarded, true))),
        ("AwaitingApplyMfa", awaiting_apply.clone()),
        ("ApplyQueued", apply_queued),
        ("Applying (leased, nothing released)", apply_leased),
        ("Applying (released)", applying),
        ("Applying (released, cancel requested)", asked.clone()),
        ("Applying (released, forced)", killing),
        ("Planned", go(&planning, plan_ended(&planning, false))),
        ("Applied", applied),
        ("Errored", errored),
        ("Canceled", go(&awaiting_plan, Event::CancelRequested { by: "ada".into() })),
        ("Discarded", go(&awaiting_apply, Event::Discarded { by: "ada".into() })),
        ("Lost", lost),
        (
            "Lost (cancel requested)",
            go(&asked, Event::LeaseExpired { phase: Phase::Apply, epoch: asked.apply.epoch }),
        ),
    ]
}

pub(super) fn given(name: &str) -> Run {
    one_of_each().into_iter().find(|(known, _)| *known == name).expect("a known circumstance").1
}

#[test]
fn an_apply_stays_where_its_plan_was_last_made() {
    let at = |run: &Run, phase, region: &str| {
        let site = Site { region: region.into(), working_directory: "stage".into() };
        let (engine, floor) = (Engine::default(), Duration::ZERO);
        let runner = RUNNER;
        go(run, Event::Granted { phase, runner, log_base: 0, state: None, engine, site, floor })
    };
    let region = |run: &Run| run.site.as_ref().map(|site| site.region.clone());
    let run = go(&queue(MfaPolicy::Never), Event::TurnCame);
    let run = at(&run, Phase::Plan, "a");
    let run = go(&run, started(&run, Phase::Plan));
    let run = go(&run, Event::LeaseExpired { phase: Phase::Plan, epoch: run.plan.epoch });
    let run = at(&run, Phase::Plan, "b");
    let run = go(&run, started(&run, Phase::Plan));
    let run = go(&run, plan_ended(&run, true));
    let seen = run.planned.as_ref().unwrap().digest;
    let run = go(&run, Event::Confirmed { by: "ada".into(), seen, current: Demands::default() });
    let run = at(&run, Phase::Apply, "c");
    assert_eq!(region(&run).as_deref(), Some("b"));
}

#[test]
fn a_confirmation_never_stands_in_for_a_code() {
    for name in ["AwaitingApplyMfa", "AwaitingPlanMfa"] {
        let confirm = Event::Confirmed {
            by: "ada".into(),
            seen: planned(true).digest,
            current: Demands::default(),
        };
        assert_eq!(step(&given(name), confirm, START), Step::Refused(Refusal::MfaRequired));
    }
}

#[test]
fn a_policy_tightened_while_a_person_reads_the_plan_demands_a_code() {
    let run = given("AwaitingConfirmation");
    let confirm = Event::Confirmed {
        by: "ada".into(),
        seen: planned(true).digest,
        current: MfaPolicy::AppliesOnly.into(),
    };
    assert_eq!(step(&run, confirm, START), Step::Refused(Refusal::MfaRequired));
    assert_eq!(run.awaits_code(&MfaPolicy::AppliesOnly.into()), Some(Phase::Apply));
}

#[test]
fn only_who_confirmed_may_repeat_it() {
    let confirm = |by: &str| Event::Confirmed {
        by: by.into(),
        seen: planned(true).digest,
        current: Demands::default(),
    };
    let run = go(&given("AwaitingConfirmation"), confirm("ada"));
    assert_eq!(step(&run, confirm("ada"), START), Step::Unchanged);
    assert_eq!(step(&run, confirm("bob"), START), Step::Refused(Refusal::WrongState));
    // A code approved this one.
    let run = given("Applied");
    assert_eq!(step(&run, confirm("ada"), START), Step::Refused(Refusal::WrongState));
}

#[test]
fn a_plan_is_held_to_the_engine_that_was_asked_for_when_it_was_granted() {
    let engine = |name: &str, version: &str| Engine { name: name.into(), version: version.into() };
    // Nothing but the lease says what was asked for: what the environment asks for when the plan
    // ends has no way in.
    let ended_under = |engine: &Engine| {
        let run = go(&given("PlanQueued"), asked_for(Phase::Plan, engine.clone()));
        let run = go(&run, started(&run, Phase::Plan));
        assert_eq!(run.plan.lease.as_ref().map(|lease| &lease.engine), Some(engine));
        go(&run, plan_ended(&run, true))
    };
    for asked in [
        engine("terraform", "1.11.4"),
        engine("terraform", ""),
        engine("", "1.11.4"),
        engine("", ""),
    ] {
        let run = ended_under(&asked);
        assert_eq!(run.state, RunState::AwaitingApplyMfa, "{asked:?}");
        // What the apply is held to.
        let planned = run.planned.unwrap();
        assert_eq!(
            (planned.engine.as_str(), planned.terraform_version.as_str()),
            ("terraform", "1.11.4")
        );
    }
    for asked in [engine("terraform", "1.12.0"), engine("tofu", ""), engine("tofu", "1.11.4")] {
        let run = ended_under(&asked);
        assert_eq!((run.state, run.planned), (RunState::Errored, None), "{asked:?}");
        assert!(run.reason.unwrap().contains("was made by terraform 1.11.4"));
    }
}

#[test]
fn a_plan_that_is_granted_again_is_held_to_what_is_asked_for_then() {
    let old = Engine { name: "terraform".into(), version: "1.9.0".into() };
    let new = Engine { version: "1.11.4".into(), ..old.clone() };
    let run = go(&given("PlanQueued"), asked_for(Phase::Plan, old));
    let epoch = run.plan.epoch;
    let run = go(&run, Event::LeaseExpired { phase: Phase::Plan, epoch });
    let run = go(&run, asked_for(Phase::Plan, new));
    let run = go(&run, started(&run, Phase::Plan));
    assert_eq!(go(&run, plan_ended(&run, true)).state, RunState::AwaitingApplyMfa);
}

#[test]
fn auto_apply_does_not_skip_the_code() {
    let mut run = given("Planning (released)");
    run.request.auto_apply = true;
    assert_eq!(go(&run, plan_ended(&run, true)).state, RunState::AwaitingApplyMfa);
    run.request.policy = MfaPolicy::Never;
    assert_eq!(go(&run, plan_ended(&run, true)).state, RunState::ApplyQueued);
}

#[test]
fn an_approval_of_another_plan_is_refused() {
    let run = given("AwaitingApplyMfa");
    let event = Event::CodeAccepted {
        evidence: evidence(Phase::Apply),
        seen: Some(Digest::from_bytes([0; 32])),
        current: Demands::default(),
    };
    assert_eq!(step(&run, event, START), Step::Refused(Refusal::PlanChanged));
}

#[test]
fn an_expired_session_sends_a_plan_back_and_gives_up_its_turn() {
    let run = given("Planning (leased, nothing released)");
    let late = Timestamp::from_millis(3_500_000);
    let Step::Moved { next, environment, effects } = step(&run, started(&run, Phase::Plan), late)
    else {
        panic!("it must move");
    };
    assert_eq!(next.state, RunState::AwaitingPlanMfa);
    assert_eq!(environment, Change::Free);
    assert!(effects.contains(&Effect::GiveTurn));
    assert_eq!(next.plan.evidence, None);
    assert!(next.reason.is_some_and(|reason| reason.contains("300 s")));
}

#[test]
fn an_expired_session_sends_an_apply_back_and_keeps_its_turn() {
    let run = given("Applying (leased, nothing released)");
    let late = Timestamp::from_millis(3_500_000);
    let Step::Moved { next, environment, .. } = step(&run, started(&run, Phase::Apply), late)
    else {
        panic!("it must move");
    };
    assert_eq!(next.state, RunState::AwaitingApplyMfa);
    assert_eq!(environment, Change::Keep);
    assert_eq!(next.approval, None);
}

#[test]
fn a_repeated_starting_is_answered_again_and_not_judged_again() {
    let run = given("Applying (released)");
    let late = Timestamp::from_millis(i64::MAX / 2);
    assert_eq!(step(&run, started(&run, Phase::Apply), late), Step::Unchanged);
}

#[test]
fn a_lost_apply_freezes_and_a_returning_runner_thaws() {
    let lost = given("Lost");
    let hold = Hold { holder: Some(lost.id), ..Hold::default() };
    let frozen = hold.after(lost.id, &Change::Freeze { reason: "lost".into() });
    assert!(!frozen.admits(RunId::from_bytes([42; 16])));
    let event = Event::Returned { phase: Phase::Apply, runner: RUNNER, epoch: lost.apply.epoch };
    let Step::Moved { next, environment, .. } = step(&lost, event, START) else {
        panic!("it must move");
    };
    assert_eq!(next.state, RunState::Applying);
    assert_eq!(frozen.after(lost.id, &environment), hold);
}

#[test]
fn a_restore_ends_and_freezes_whatever_had_not_ended() {
    let before = Hold { holder: Some(RunId::from_bytes([6; 16])), ..Hold::default() };
    for (name, run) in one_of_each() {
        let Step::Moved { next, environment, effects } = step(&run, Event::Restored, START) else {
            assert!(run.state.is_end(), "{name} stays");
            continue;
        };
        assert!(!run.state.is_end(), "{name} moves");
        assert_eq!(next.state, RunState::Errored, "{name}");
        assert_eq!(
            (&next.approval, &next.plan.evidence, &next.apply.evidence),
            (&None, &None, &None)
        );
        assert_eq!((&next.plan.lease, &next.apply.lease), (&None, &None), "{name}");
        assert!(next.reason.as_ref().is_some_and(|reason| reason.contains("restore")), "{name}");
        assert_eq!(effects.contains(&Effect::DropPlan), run.planned.is_some(), "{name}");
        let after = before.after(run.id, &environment);
        assert_eq!(after.holder, None, "{name}");
        assert_eq!(after.frozen.map(|frozen| frozen.run), Some(run.id), "{name}");
        assert_eq!(
            step(&next, Event::Restored, START),
            Step::Refused(Refusal::AlreadyEnded),
            "{name}"
        );
    }
}

#[test]
fn a_forced_cancel_follows_a_graceful_one_and_its_grace() {
    let grace = Duration::from_secs(30);
    let running = given("Applying (released)");
    assert_eq!(step(&running, forced(grace), START), Step::Refused(Refusal::NotCanceled));
    let asked = given("Applying (released, cancel requested)");
    let until = START + grace;
    assert_eq!(asked.force_cancel_time(grace), Some(until));
    let early = step(&asked, forced(grace), START + Duration::from_secs(29));
    assert_eq!(early, Step::Refused(Refusal::CancelGrace { until }));
    let Step::Moved { next, environment, effects } = step(&asked, forced(grace), until) else {
        panic!("it must move");
    };
    assert_eq!((next.state, environment), (RunState::Applying, Change::Keep));
    assert_eq!(effects, [Effect::Kill(asked.job_id(Phase::Apply), asked.apply.epoch)]);
    assert_eq!(step(&next, forced(grace), until), Step::Unchanged);
}

#[test]
fn a_forced_cancel_withdraws_the_credentials() {
    let run = given("Applying (released, forced)");
    assert_eq!(step(&run, started(&run, Phase::Apply), START), Step::Refused(Refusal::Forced));
}

#[test]
fn a_lost_apply_that_was_never_started_ends_and_thaws() {
    let lost = given("Lost");
    let event = Event::HandedBack { phase: Phase::Apply, runner: RUNNER, epoch: lost.apply.epoch };
    let Step::Moved { next, environment, .. } = step(&lost, event, START) else {
        panic!("its runner knows that nothing ran");
    };
    assert_eq!((next.state, environment), (RunState::Errored, Change::Thaw));
    assert!(next.apply.lease.is_none() && next.reason.unwrap().contains("nothing was applied"));
    let older = Event::HandedBack { phase: Phase::Apply, runner: RUNNER, epoch: Epoch::NONE };
    assert_eq!(step(&lost, older, START), Step::Refused(Refusal::LeaseLost));
}

#[test]
fn a_forced_cancel_of_a_lost_run_ends_nothing_until_its_runner_is_back() {
    let lost = given("Lost (cancel requested)");
    let lost = go(&lost, forced(Duration::ZERO));
    assert_eq!(lost.state, RunState::Lost);
    assert!(lost.reason.as_ref().is_some_and(|reason| reason.contains("when it comes back")));
    let event = Event::Returned { phase: Phase::Apply, runner: RUNNER, epoch: lost.apply.epoch };
    let back = go(&lost, event);
    assert_eq!((back.state, back.forced_by.as_deref()), (RunState::Applying, Some("ada")));
    assert!(back.reason.is_some_and(|reason| reason.contains("had it killed")));
}

#[test]
fn a_cancel_never_gives_a_lost_run_up() {
    let cancel = || Event::CancelRequested { by: "eve".into() };
    // A repeat of one that was asked for while terraform ran.
    let canceled = given("Lost (cancel requested)");
    assert_eq!(step(&canceled, cancel(), START), Step::Unchanged);
    // The first: the runner is told when it comes back.
    let lost = go(&given("Lost"), cancel());
    assert_eq!((lost.state, lost.cancel_requested_by.as_deref()), (RunState::Lost, Some("eve")));
    assert!(lost.reason.as_ref().is_some_and(|reason| reason.contains("eve wants it to stop")));
    // Its runner was revoked: nobody will ever be told.
    let (runner, epoch) = (RUNNER, lost.apply.epoch);
    let revoked = go(&given("Lost"), Event::RunnerRevoked { phase: Phase::Apply, runner, epoch });
    assert_eq!(step(&revoked, cancel(), START), Step::Refused(Refusal::WrongState));
    for lost in [canceled, lost, revoked] {
        let next = go(&lost, Event::Discarded { by: "ada".into() });
        assert_eq!(next.state, RunState::Errored);
        assert!(next.reason.is_some_and(|reason| reason.contains("given up by ada")));
    }
}

#[test]
fn a_killed_apply_freezes_its_environment() {
    let run = given("Applying (released, forced)");
    let failure = Failure { kind: FailureKind::Canceled, reason: "got signal 9".into() };
    let event = apply_ended(&run, ApplyOutcome::Failed(failure));
    let Step::Moved { next, environment, .. } = step(&run, event, START) else {
        panic!("it must move");
    };
    assert_eq!(next.state, RunState::Canceled);
    assert!(matches!(environment, Change::Freeze { reason } if reason.contains("got signal 9")));
}

/// A rule that mostly demands nothing; one that demands something matches [`facts`] or not.
fn rule() -> impl Strategy<Value = PlanRule> {
    let types =
        |name: &str| PlanRule { resource_types: [name.to_owned()].into(), ..Default::default() };
    prop_oneof![
        6 => Just(PlanRule::default()),
        1 => Just(PlanRule { destructive: true, ..PlanRule::default() }),
        1 => Just(types("aws_iam_*")),
        1 => Just(types("aws_vpc")),
        1 => Just(PlanRule { more_than: Some(1), ..PlanRule::default() }),
    ]
}

/// An event drawn at random; runner, epoch, phase and digest are often not the current ones.
#[derive(Clone, Debug)]
struct Draw {
    kind: u8,
    phase: Phase,
    stale: bool,
    other_runner: bool,
    wrong_digest: bool,
    applyable: bool,
    current: Demands,
    wait: u32,
}

fn draw() -> impl Strategy<Value = Draw> {
    let phase = prop_oneof![Just(Phase::Plan), Just(Phase::Apply)];
    let policy = prop_oneof![
        4 => Just(MfaPolicy::Never),
        1 => Just(MfaPolicy::AppliesOnly),
        1 => Just(MfaPolicy::PlansAndApplies)
    ];
    let rarely = || prop_oneof![6 => Just(false), 1 => Just(true)];
    let flags = (rarely(), rarely(), rarely(), any::<bool>());
    let current = (policy, rule(), rarely()).prop_map(|(policy, plan_rule, second_person)| {
        Demands { policy, plan_rule, second_person }
    });
    (0..15_u8, phase, flags, current, 0..900_u32).prop_map(
        |(kind, phase, (stale, other_runner, wrong_digest, applyable), current, wait)| Draw {
            kind,
            phase,
            stale,
            other_runner,
            wrong_digest,
            applyable,
            current,
            wait,
        },
    )
}

fn event(run: &Run, draw: &Draw, now: Timestamp, number: u8) -> Event {
    let runner = if draw.other_runner { OTHER_RUNNER } else { RUNNER };
    let epoch = |phase| {
        let current = run.job(phase).epoch.get();
        Epoch::new(if draw.stale { current.saturating_sub(1) } else { current })
    };
    let (phase, current) = (draw.phase, draw.current.clone());
    let seen = if draw.wrong_digest {
        Digest::from_bytes([0; 32])
    } else {
        run.planned.as_ref().map_or(Digest::from_bytes([1; 32]), |planned| planned.digest)
    };
    let failed = || Failure { kind: FailureKind::Errored, reason: "exit code 1".into() };
    match draw.kind {
        0 => Event::CodeAccepted {
            evidence: Evidence {
                authentication: AuthenticationId::from_bytes([number; 16]),
                phase,
                user: if draw.stale { "ada" } else { "bob" }.into(),
                authenticated_at: now,
                expires_at: now + Duration::from_secs(3600),
            },
            seen: Some(seen),
            current,
        },
        1 | 2 => Event::TurnCame,
        3 => asked_for(phase, Engine::default()),
        4 => Event::HandedBack { phase, runner, epoch: epoch(phase) },
        5 | 6 => Event::Starting {
            phase,
            runner,
            epoch: epoch(phase),
            current,
            floor: Duration::from_secs(300),
        },
        7 if draw.wrong_digest => Event::RunnerRevoked { phase, runner, epoch: epoch(phase) },
        7 => Event::LeaseExpired { phase, epoch: epoch(phase) },
        8 => Event::Returned { phase, runner, epoch: epoch(phase) },
        9 => Event::PlanEnded {
            runner,
            epoch: epoch(Phase::Plan),
            log_length: number.into(),
            outcome: PlanOutcome::Planned(Box::new(Planned {
                digest: Digest::from_bytes([number; 32]),
                facts: (!draw.stale || draw.wait.is_multiple_of(3)).then(facts),
                ..planned(draw.applyable)
            })),
            current,
        },
        10 => Event::ApplyEnded {
            runner,
            epoch: epoch(Phase::Apply),
            log_length: number.into(),
            outcome: if draw.applyable {
                ApplyOutcome::Applied { outputs: None }
            } else {
                ApplyOutcome::Failed(failed())
            },
        },
        11 => {
            let by = if draw.stale { "ada" } else { "bob" }.into();
            Event::Confirmed { by, seen, current }
        }
        14 => {
            let limit = Some(Duration::from_secs(u64::from(draw.wait)));
            Event::LimitReached { limits: Limits { person: limit, plan: limit, apply: limit } }
        }
        12 => forced(Duration::from_secs(30)),
        _ if draw.wait.is_multiple_of(5) => Event::CancelRequested { by: "ada".into() },
        _ if draw.wait.is_multiple_of(97) => Event::Restored,
        _ => granted(phase),
    }
}

/// What must hold of every single move, whatever came before it.
fn check_move(
    before: &Run,
    event: &Event,
    next: &Run,
    now: Timestamp,
    released: &mut HashSet<AuthenticationId>,
) -> TestCaseResult {
    // I13: ends are final, and an apply that was reached never becomes a plan again.
    prop_assert!(!before.state.is_end(), "{} moved", before.state);
    if let Event::ForceRequested { grace, .. } = event {
        prop_assert!(before.cancel_requested_at.is_some_and(|at| at + *grace <= now));
        prop_assert_eq!(next.state, before.state, "a forced cancel alone ended something");
    }
    for phase in Phase::ALL {
        let (old, new) = (before.job(phase), next.job(phase));
        prop_assert!(new.epoch >= old.epoch);
        let fresh = |job: &super::Job| job.lease.as_ref().and_then(|lease| lease.released);
        let (None, Some(release)) = (fresh(old), fresh(new)) else { continue };
        // I9
        prop_assert!(before.cancel_requested_by.is_none() && before.forced_by.is_none());
        // I2: a release answers exactly one lease; the apply's never a second time.
        if phase == Phase::Apply {
            // I1
            let approval = next.approval.as_ref();
            prop_assert_eq!(approval.map(|a| a.digest), next.planned.as_ref().map(|p| p.digest));
            prop_assert!(approval.is_some());
        }
        // I4
        let second = next.request.second_person
            || matches!(event, Event::Starting { current, .. } if current.second_person);
        if second && phase == Phase::Apply {
            let by = next.approval.as_ref().map(|approval| approval.by.as_str());
            prop_assert!(by.is_some_and(|by| by != next.request.queued_by.name()));
        }
        let Event::Starting { current, .. } = event else {
            panic!("released by {event:?}");
        };
        match release.permit {
            Permit::PlainSession => {
                prop_assert!(!next.request.policy.max(current.policy).requires_code(phase));
                let facts = next.planned.as_ref().and_then(|planned| planned.facts.as_ref());
                for rule in [&next.request.plan_rule, &current.plan_rule] {
                    let matched = phase == Phase::Apply && rule.matches(facts).is_some();
                    prop_assert!(!matched, "{rule:?} was passed by");
                }
            }
            Permit::MfaSession { authentication } => {
                let evidence = new.evidence.as_ref().expect("what was released is kept");
                prop_assert_eq!(evidence.authentication, authentication);
                prop_assert_eq!(evidence.phase, phase);
                prop_assert!(evidence.expires_at > now);
                released.insert(authentication);
            }
        }
    }
    Ok(())
}

/// I3: whoever does not hold the current lease changes nothing.
fn check_stale(before: &Run, event: &Event, moved: bool) -> TestCaseResult {
    let (phase, runner, epoch) = match event {
        Event::HandedBack { phase, runner, epoch }
        | Event::Starting { phase, runner, epoch, .. }
        | Event::CannotStart { phase, runner, epoch, .. }
        | Event::RunnerRevoked { phase, runner, epoch }
        | Event::Returned { phase, runner, epoch } => (*phase, *runner, *epoch),
        Event::PlanEnded { runner, epoch, .. } => (Phase::Plan, *runner, *epoch),
        Event::ApplyEnded { runner, epoch, .. } => (Phase::Apply, *runner, *epoch),
        Event::CodeAccepted { .. }
        | Event::CodeRefused { .. }
        | Event::TurnCame
        | Event::Granted { .. }
        | Event::LeaseExpired { .. }
        | Event::Confirmed { .. }
        | Event::Discarded { .. }
        | Event::CancelRequested { .. }
        | Event::ForceRequested { .. }
        | Event::LimitReached { .. }
        | Event::ToppedUp { .. }
        | Event::Restored => return Ok(()),
    };
    let speaks = before.job(phase).lease.as_ref().is_some_and(|lease| lease.is(runner, epoch));
    prop_assert!(speaks || !moved, "{event:?} moved a run in {}", before.state);
    Ok(())
}

proptest! {
    #![proptest_config(proptest::test_runner::Config::with_cases(2_000))]

    #[test]
    fn random_events_keep_the_invariants(
        policy in prop_oneof![
            Just(MfaPolicy::Never), Just(MfaPolicy::AppliesOnly), Just(MfaPolicy::PlansAndApplies)
        ],
        (auto_apply, plan_rule, second_person) in (any::<bool>(), rule(), any::<bool>()),
        draws in vec(draw(), 1..120),
    ) {
        let mut run = queue(policy);
        run.request.auto_apply = auto_apply;
        run.request.plan_rule = plan_rule;
        run.request.second_person = second_person;
        let mut hold = Hold::default();
        let mut now = START;
        let mut released = HashSet::new();
        let mut apply_starts = 0;
        for (number, draw) in draws.iter().enumerate() {
            now = now + Duration::from_secs(u64::from(draw.wait));
            let event = event(&run, draw, now, number as u8 + 1);
            let step = step(&run, event.clone(), now);
            check_stale(&run, &event, matches!(step, Step::Moved { .. }))?;
            let Step::Moved { next, environment, .. } = step else { continue };
            check_move(&run, &event, &next, now, &mut released)?;
            let may_have_run = |run: &Run| {
                run.apply.lease.as_ref().is_some_and(|lease| lease.released.is_some())
            };
            if may_have_run(&next) && !may_have_run(&run) {
                apply_starts += 1;
            }
            // The runner itself vouches that what it hands back was never executed.
            if matches!(event, Event::HandedBack { phase: Phase::Apply, .. }) && may_have_run(&run)
            {
                apply_starts -= 1;
            }
            prop_assert!(apply_starts <= 1, "a second start");
            hold = hold.after(run.id, &environment);
            run = *next;
            let remains = hold.frozen.is_some();
            prop_assert_eq!(
                hold.holder == Some(run.id),
                run.state.holds_environment() && !remains,
            );
        }
    }
}
