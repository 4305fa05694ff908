//! Canceling a run while terraform runs: it finishes what it is doing and writes its state.

use std::fs;
use std::time::Duration;

use anyhow::Context;
use latchkey_aws_simulator::{Call, Fault};
use latchkey_harness::stub::{OnInterrupt, Script, Stub, What};
use latchkey_harness::{Configuration, LIMIT, Stage, StageOptions, is_ended, reason, wait_for};
use latchkey_proto::v1::{CancelRequest, MfaPolicy, Phase, RunState};

use crate::gated::{gated_apply, with_s3};
use crate::support::{options, stage};

#[tokio::test]
async fn a_canceled_apply_writes_what_it_did_and_frees_the_environment() {
    let stage = stage().await.unwrap();
    let ada = &stage.owner;
    let (started, gate) = (stage.shared().join("started"), stage.shared().join("gate"));
    ada.create_environment("web", MfaPolicy::Never).await.unwrap();
    let main = gated_apply(&started, &gate);
    let run = ada.queue("web", &Configuration::of(&[("main.tf", &main)])).await.unwrap();
    ada.wait_for_state(&run.run_id, RunState::AwaitingConfirmation).await.unwrap();
    ada.confirm(&run.run_id).await.unwrap();
    wait_for("the apply to begin", LIMIT, async || {
        started.exists().then_some(()).ok_or_else(|| "no file".to_owned())
    })
    .await
    .unwrap();
    let request = CancelRequest { run_id: run.run_id.clone(), force: false };
    let canceling = ada.runs().cancel(request).await.unwrap().into_inner().run.unwrap();
    assert!(canceling.cancel_requested && canceling.state() == RunState::Applying);
    let run = ada.wait_for_run(&run.run_id, "the end", is_ended).await.unwrap();
    assert_eq!(run.state(), RunState::Canceled, "{}", run.reason);
    let environment = ada.environment("web").await.unwrap();
    assert!(environment.state_serial > 0, "the first resource is in the state");
    assert!(environment.active_run_id.is_empty() && environment.frozen.is_none());
}

#[tokio::test]
async fn a_canceled_plan_ends_and_the_next_run_has_its_turn() {
    let stage = stage().await.unwrap();
    let ada = &stage.owner;
    ada.create_environment("web", MfaPolicy::PlansAndApplies).await.unwrap();
    let first = ada.queue("web", &with_s3(&stage, "deploy")).await.unwrap();
    // terraform waits for AWS while the run is canceled.
    let aws = stage.aws.simulator();
    aws.script(Fault::delay(Duration::from_secs(3)).on("AssumeRole"));
    ada.authenticate(&first.run_id, &stage.aws.unused_code().await.unwrap()).await.unwrap();
    let asked = |calls: &[Call]| calls.iter().any(|call| call.action == "AssumeRole");
    aws.wait_for_calls(LIMIT, asked).await.unwrap();
    let small = Configuration::of(&[("main.tf", crate::gated::SMALL)]);
    let second = ada.queue("web", &small).await.unwrap();
    let code = stage.aws.unused_code().await.unwrap();
    let second = ada.authenticate(&second.run_id, &code).await.unwrap();
    assert_eq!((second.state(), second.queue_position), (RunState::Pending, 1));
    assert!(second.reason.contains(&first.run_id), "{}", second.reason);
    ada.runs().cancel(CancelRequest { run_id: first.run_id.clone(), force: false }).await.unwrap();
    let first = ada.wait_for_run(&first.run_id, "the end", is_ended).await.unwrap();
    assert_eq!(first.state(), RunState::Canceled);
    ada.wait_for_state(&second.run_id, RunState::AwaitingApplyMfa).await.unwrap();
}

/// Says whether a process runs, other than as a zombie.
fn lives(pid: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.trim_start().starts_with('Z'))
}

#[tokio::test(flavor = "multi_thread")]
async fn force_kills_a_terraform_that_does_not_listen_and_all_its_children() -> anyhow::Result<()> {
    const GRACE: u64 = 3;
    let mut options = StageOptions { runners: vec![], ..options() };
    options.plane.arguments = vec!["--force-cancel-grace".to_owned(), GRACE.to_string()];
    let mut stage = Stage::start(options).await?;
    let executable = env!("CARGO_BIN_EXE_latchkey-it");
    let stub = Stub::of(executable.as_ref(), &stage.directory().join("stub"))?;
    let runner = stage.add_runner_with("build-1", |options| {
        options.terraform = Some(stub.program());
        options.pass_env = vec![stub.environment()];
    });
    runner.await?;
    let ada = &stage.owner;
    ada.create_environment("web", MfaPolicy::Never).await?;
    // A state is written before it stops listening in the middle.
    let on_interrupt = OnInterrupt::Ignore;
    let script = Script { states: 4, hold: true, child: true, on_interrupt, ..Script::default() };
    let id = ada.queue("web", &script.configuration()).await?.run_id;
    ada.wait_for_state(&id, RunState::AwaitingConfirmation).await?;
    ada.confirm(&id).await?;
    wait_for("terraform to be in the middle", LIMIT, async || {
        stub.holds(&id).then_some(()).ok_or_else(|| "it is not".to_owned())
    })
    .await?;
    let is_of_apply = |entry: &latchkey_harness::stub::Entry| entry.phase == "apply";
    let ledger = stub.ledger()?;
    let terraform = ledger.iter().find(|entry| is_of_apply(entry)).context("it was started")?.pid;
    let mut family = stub.children(&id);
    assert_eq!(family.len(), 2);
    family.push(terraform);
    assert!(family.iter().all(|pid| lives(*pid)), "{family:?}");

    // Force comes after patience.
    let refused = ada.cancel_by_force(&id).await.unwrap_err();
    assert_ne!(reason(&refused), "", "{refused:?}");
    let canceling = ada.cancel(&id).await?;
    let until = canceling.force_cancel_time.context("it says from when on")?;
    let since = canceling.cancel_request_time.context("it says since when")?;
    assert_eq!(until.seconds - since.seconds, i64::try_from(GRACE)?);
    let refused = ada.cancel_by_force(&id).await.unwrap_err();
    assert_eq!(reason(&refused), "CANCEL_GRACE", "{refused:?}");
    wait_for("the grace to pass", LIMIT, async || {
        ada.cancel_by_force(&id).await.map_err(|status| status.to_string())
    })
    .await?;
    let run = ada.wait_for_run(&id, "the end", is_ended).await?;
    assert_eq!(run.state(), RunState::Canceled, "{}", run.reason);
    assert!(run.reason.contains("killed by ada"), "{}", run.reason);
    wait_for("all its processes to be gone", LIMIT, async || {
        let left: Vec<_> = family.iter().filter(|pid| lives(**pid)).collect();
        if left.is_empty() { Ok(()) } else { Err(format!("{left:?}")) }
    })
    .await?;

    // What it had written is kept; what else it did nobody knows.
    let ledger = stub.ledger()?;
    let written = |entry: &latchkey_harness::stub::Entry| match entry.what {
        What::State { serial } => Some(serial),
        What::Started | What::Errored { .. } | What::Ended { .. } => None,
    };
    let last = ledger.iter().filter_map(written).max().context("it wrote a state")?;
    assert_eq!(ledger.iter().filter(|entry| is_of_apply(entry)).count(), 2, "{ledger:?}");
    let environment = ada.environment("web").await?;
    assert_eq!(environment.state_serial, last);
    assert_eq!(environment.frozen.context("it is frozen")?.run_id, id);
    let log = ada.log_text(&id, Phase::Apply).await?;
    assert!(log.contains("stub "), "{log}");
    Ok(())
}
