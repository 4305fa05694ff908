//! The control plane is killed with SIGKILL and started again: nothing acknowledged is gone,
//! and runs go on.

use std::fs;
use std::time::Duration;

use latchkey_aws_simulator::{Call, Fault};
use latchkey_harness::{Configuration, LIMIT, Stage, StageOptions};
use latchkey_proto::v1::{MfaPolicy, Phase, RunState};

use crate::gated::{SMALL, gated_apply, with_s3};
use crate::support::{options, stage};

#[tokio::test]
async fn a_run_that_waits_for_a_code_waits_on_and_takes_it() {
    let mut stage = stage().await.unwrap();
    let ada = stage.owner.clone();
    ada.create_environment("web", MfaPolicy::PlansAndApplies).await.unwrap();
    let run = ada.queue("web", &Configuration::of(&[("main.tf", SMALL)])).await.unwrap();
    let wrong = stage.aws.wrong_code().await.unwrap();
    ada.authenticate(&run.run_id, &wrong).await.unwrap_err();
    stage.plane.kill().await.unwrap();
    stage.plane.restart().await.unwrap();

    let after = ada.run(&run.run_id).await.unwrap();
    assert_eq!(after.state(), RunState::AwaitingPlanMfa);
    assert_eq!(after.last_refusal.unwrap().reason, "CODE_REJECTED");
    // What was used before the crash is known after it.
    let status = ada.authenticate(&run.run_id, &wrong).await.unwrap_err();
    assert_eq!(latchkey_harness::reason(&status), "CODE_USED");
    ada.authenticate(&run.run_id, &stage.aws.unused_code().await.unwrap()).await.unwrap();
    ada.wait_for_state(&run.run_id, RunState::AwaitingApplyMfa).await.unwrap();
    assert!(ada.verify_audit().await.unwrap().intact);
}

#[tokio::test]
async fn a_queued_run_with_its_session_is_planned_after_the_start() {
    let mut stage = Stage::start(StageOptions { runners: vec![], ..options() }).await.unwrap();
    let ada = stage.owner.clone();
    ada.create_environment("web", MfaPolicy::PlansAndApplies).await.unwrap();
    let run = ada.queue("web", &Configuration::of(&[("main.tf", SMALL)])).await.unwrap();
    let run = ada.authenticate(&run.run_id, &stage.aws.unused_code().await.unwrap()).await.unwrap();
    assert_eq!(run.state(), RunState::PlanQueued);
    stage.plane.kill().await.unwrap();
    stage.plane.restart().await.unwrap();
    stage.add_runner("build-1").await.unwrap();
    let run = ada.wait_for_state(&run.run_id, RunState::AwaitingApplyMfa).await.unwrap();
    assert_eq!(run.plan.unwrap().authenticated.unwrap().user, "ada");
    assert_eq!(stage.aws.simulator().requests_for("GetSessionToken"), 1);
}

#[tokio::test]
async fn a_plan_goes_on_without_its_control_plane_and_is_started_once() {
    let mut stage = stage().await.unwrap();
    let ada = stage.owner.clone();
    ada.create_environment("web", MfaPolicy::PlansAndApplies).await.unwrap();
    let run = ada.queue("web", &with_s3(&stage, "deploy")).await.unwrap();
    // terraform waits for AWS while the control plane is killed.
    let aws = stage.aws.simulator();
    aws.script(Fault::delay(Duration::from_secs(3)).on("AssumeRole"));
    ada.authenticate(&run.run_id, &stage.aws.unused_code().await.unwrap()).await.unwrap();
    let asked = |calls: &[Call]| calls.iter().any(|call| call.action == "AssumeRole");
    aws.wait_for_calls(LIMIT, asked).await.unwrap();
    stage.plane.kill().await.unwrap();
    stage.plane.restart().await.unwrap();
    let run = ada.wait_for_state(&run.run_id, RunState::AwaitingApplyMfa).await.unwrap();
    assert_eq!(run.plan.unwrap().epoch, 1, "the lease outlived the crash");
    let log = ada.log_text(&run.run_id, Phase::Plan).await.unwrap();
    assert_eq!(log.matches("terraform_data.one: Plan to create").count(), 1, "{log}");
}

#[tokio::test]
async fn an_apply_survives_the_control_plane_and_the_agent() {
    let mut stage = stage().await.unwrap();
    let ada = stage.owner.clone();
    let (started, gate) = (stage.shared().join("started"), stage.shared().join("gate"));
    ada.create_environment("web", MfaPolicy::Never).await.unwrap();
    let main = gated_apply(&started, &gate);
    let run = ada.queue("web", &Configuration::of(&[("main.tf", &main)])).await.unwrap();
    ada.wait_for_state(&run.run_id, RunState::AwaitingConfirmation).await.unwrap();
    ada.confirm(&run.run_id).await.unwrap();
    latchkey_harness::wait_for("the apply to begin", LIMIT, async || {
        started.exists().then_some(()).ok_or_else(|| "no file".to_owned())
    })
    .await
    .unwrap();
    stage.plane.kill().await.unwrap();
    stage.runners[0].kill().await.unwrap();
    fs::write(&gate, "").unwrap();
    stage.plane.restart().await.unwrap();
    stage.runners[0].restart().unwrap();
    let run = ada.wait_for_state(&run.run_id, RunState::Applied).await.unwrap();
    assert_eq!(run.apply.unwrap().epoch, 1);
    let log = ada.log_text(&run.run_id, Phase::Apply).await.unwrap();
    assert_eq!(log.matches("(local-exec): the gate is open").count(), 1, "{log}");
    let environment = ada.environment("web").await.unwrap();
    assert!(environment.state_serial > 0 && environment.active_run_id.is_empty());
}
