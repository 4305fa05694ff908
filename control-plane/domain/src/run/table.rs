//! Writes the whole (state, event) table to `LIFECYCLE.md`, and fails when it has changed.

use std::fmt::Write as _;
use std::path::Path;
use std::time::Duration;

use super::step_tests::{self as given, RUNNER, planned};
use super::{
    ApplyOutcome, Event, Failure, FailureKind, Limits, PlanOutcome, Refusal, RefusedCode, Run,
    RunState, Step, step,
};
use crate::environment::Change;
use crate::id::AuthenticationId;
use crate::lease::{Engine, Site};
use crate::policy::{Demands, Phase};
use crate::time::Timestamp;

/// One column: its title, and the event for a run. Messages of runners speak for the run's
/// current lease, where it has one.
type Column = (&'static str, fn(&Run) -> Event);

const COLUMNS: &[Column] = &[
    ("code accepted", |run| {
        let phase = run.awaits_code(&Demands::default()).unwrap_or(Phase::Plan);
        Event::CodeAccepted {
            evidence: given::evidence(phase),
            seen: run.planned.as_ref().map(|planned| planned.digest),
            current: Demands::default(),
        }
    }),
    ("code refused", |run| Event::CodeRefused {
        phase: run.awaits_code(&Demands::default()).unwrap_or(Phase::Plan),
        refused: RefusedCode {
            authentication: AuthenticationId::from_bytes([3; 16]),
            reason: "CODE_REJECTED".into(),
            message: "use the next code".into(),
            at: Timestamp::from_millis(1),
            aws_request_id: None,
        },
        current: Demands::default(),
    }),
    ("turn came", |_| Event::TurnCame),
    ("plan granted", |_| granted(Phase::Plan)),
    ("apply granted", |_| granted(Phase::Apply)),
    ("handed back", |run| Event::HandedBack {
        phase: phase_of(run),
        runner: RUNNER,
        epoch: run.job(phase_of(run)).epoch,
    }),
    ("starting", |run| Event::Starting {
        phase: phase_of(run),
        runner: RUNNER,
        epoch: run.job(phase_of(run)).epoch,
        current: Demands::default(),
        floor: Duration::ZERO,
    }),
    ("topped up", |run| topped_up(run, Demands::default())),
    ("topped up by who queued, another is demanded", |run| {
        topped_up(run, Demands { second_person: true, ..Demands::default() })
    }),
    ("cannot start", |run| Event::CannotStart {
        phase: phase_of(run),
        runner: RUNNER,
        epoch: run.job(phase_of(run)).epoch,
        reason: "the access key is unknown to AWS".into(),
    }),
    ("lease expired", |run| Event::LeaseExpired {
        phase: phase_of(run),
        epoch: run.job(phase_of(run)).epoch,
    }),
    ("runner revoked", |run| Event::RunnerRevoked {
        phase: phase_of(run),
        runner: RUNNER,
        epoch: run.job(phase_of(run)).epoch,
    }),
    ("returned", |run| Event::Returned {
        phase: phase_of(run),
        runner: RUNNER,
        epoch: run.job(phase_of(run)).epoch,
    }),
    ("planned", |run| Event::PlanEnded {
        runner: RUNNER,
        epoch: run.plan.epoch,
        log_length: 0,
        outcome: PlanOutcome::Planned(Box::new(planned(true))),
        current: Demands::default(),
    }),
    ("plan failed", |run| Event::PlanEnded {
        runner: RUNNER,
        epoch: run.plan.epoch,
        log_length: 0,
        outcome: PlanOutcome::Failed(failure(FailureKind::Errored)),
        current: Demands::default(),
    }),
    ("applied", |run| Event::ApplyEnded {
        runner: RUNNER,
        epoch: run.apply.epoch,
        log_length: 0,
        outcome: ApplyOutcome::Applied { outputs: None },
    }),
    ("apply failed", |run| Event::ApplyEnded {
        runner: RUNNER,
        epoch: run.apply.epoch,
        log_length: 0,
        outcome: ApplyOutcome::Failed(failure(FailureKind::Errored)),
    }),
    ("state undelivered", |run| Event::ApplyEnded {
        runner: RUNNER,
        epoch: run.apply.epoch,
        log_length: 0,
        outcome: ApplyOutcome::Failed(failure(FailureKind::StateUndelivered)),
    }),
    ("confirmed", |run| Event::Confirmed {
        by: "ada".into(),
        seen: planned(true).digest,
        current: run.request.policy.into(),
    }),
    ("discarded", |_| Event::Discarded { by: "ada".into() }),
    ("cancel requested", |_| Event::CancelRequested { by: "ada".into() }),
    ("force requested, after the grace", |_| force(Duration::ZERO)),
    ("force requested, within the grace", |_| force(Duration::from_secs(30))),
    ("limit reached", |_| Event::LimitReached { limits: limits(0) }),
    ("limit not reached", |_| Event::LimitReached { limits: limits(60) }),
    ("restored", |_| Event::Restored),
];

fn granted(phase: Phase) -> Event {
    let (engine, site, floor) = (Engine::default(), Site::default(), Duration::ZERO);
    Event::Granted { phase, runner: RUNNER, log_base: 0, state: None, engine, site, floor }
}

fn topped_up(run: &Run, current: Demands) -> Event {
    Event::ToppedUp { evidence: given::evidence(phase_of(run)), current }
}

fn force(grace: Duration) -> Event {
    Event::ForceRequested { by: "ada".into(), grace }
}

/// Limits that the run reaches this much later than the table's moment.
fn limits(later: u64) -> Limits {
    let limit = Some(Duration::from_secs(1 + later));
    Limits { person: limit, plan: limit, apply: limit }
}

fn failure(kind: FailureKind) -> Failure {
    Failure { kind, reason: "terraform exited with code 1".into() }
}

/// The phase that a runner's message would be about.
fn phase_of(run: &Run) -> Phase {
    if run.apply.lease.is_some() { Phase::Apply } else { Phase::Plan }
}

fn cell(run: &Run, event: Event) -> String {
    match step(run, event, Timestamp::from_millis(1_000)) {
        Step::Moved { next, environment, .. } => {
            let mark = match environment {
                Change::Keep => "",
                Change::Hold => " (takes the environment)",
                Change::Free => " (frees the environment)",
                Change::Thaw => " (thaws the environment)",
                Change::Freeze { .. } => " (freezes the environment)",
            };
            format!("**{}**{mark}", next.state)
        }
        Step::Unchanged => "unchanged".to_owned(),
        Step::Refused(Refusal::CancelGrace { .. }) => "CancelGrace".to_owned(),
        Step::Refused(refusal) => format!("{refusal:?}"),
    }
}

fn table() -> String {
    let mut text = String::from(
        "# The life of a run\n\nWritten by a test of `latchkey-domain` from the transition function; \
         do not edit. A row is a state, or a state with the run's circumstances in brackets; each \
         entry is the answer to one event: the **next state**, *unchanged*, or the refusal's \
         name.\n",
    );
    for (name, run) in given::one_of_each() {
        let _ = write!(text, "\n## {name}\n\n");
        for (title, event) in COLUMNS {
            let _ = writeln!(text, "- {title}: {}", cell(&run, event(&run)));
        }
    }
    text
}

#[test]
fn every_state_is_in_the_table() {
    for state in RunState::ALL {
        assert!(given::one_of_each().iter().any(|(_, run)| run.state == state), "{state}");
    }
}

#[test]
fn the_committed_table_is_the_machine() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("LIFECYCLE.md");
    let table = table();
    let committed = std::fs::read_to_string(&path).unwrap_or_default();
    if committed != table {
        std::fs::write(&path, table).unwrap();
        panic!("LIFECYCLE.md was out of date and has been rewritten: review and commit it");
    }
}
