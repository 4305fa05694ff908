//! Canceling a run while terraform runs: it finishes what it is doing and writes its state.

use std::time::Duration;

use latchkey_aws_simulator::{Call, Fault};
use latchkey_harness::{Configuration, LIMIT, is_ended, wait_for};
use latchkey_proto::v1::{CancelRequest, MfaPolicy, RunState};

use crate::gated::{gated_apply, with_s3};
use crate::support::stage;

#[tokio::test]
async fn a_canceled_apply_writes_what_it_did_and_frees_the_environment() {
    let stage = stage().await.unwrap();
    let ada = &stage.owner;
    let (started, gate) = (stage.directory().join("started"), stage.directory().join("gate"));
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
