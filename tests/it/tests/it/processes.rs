//! What the other stories rely on: processes can be killed and come back, and none outlives its
//! stage.

use std::fs;

use latchkey_harness::{Configuration, LIMIT, after_plan, is_ended, wait_for};
use latchkey_proto::v1::{MfaPolicy, RunState};

use crate::support::{small, stage};

#[tokio::test(flavor = "multi_thread")]
async fn a_control_plane_killed_between_the_phases_goes_on_where_it_was() -> anyhow::Result<()> {
    let mut stage = stage().await?;
    let ada = stage.owner.clone();
    ada.create_environment("web", MfaPolicy::PlansAndApplies).await?;
    let id = ada.queue("web", &small()).await?.run_id;
    stage.plane.kill().await?;
    stage.plane.restart().await?;
    ada.wait_for_state(&id, RunState::AwaitingPlanMfa).await?;
    ada.authenticate(&id, &stage.aws.unused_code().await?).await?;
    let run = ada.wait_for_run(&id, "the end of the plan", after_plan).await?;
    assert_eq!(run.state(), RunState::AwaitingApplyMfa, "{}", run.reason);
    stage.plane.stop().await?;
    stage.plane.restart().await?;
    ada.wait_for_state(&id, RunState::AwaitingApplyMfa).await?;
    ada.authenticate(&id, &stage.aws.unused_code().await?).await?;
    let run = ada.wait_for_run(&id, "the end of the apply", is_ended).await?;
    assert_eq!(run.state(), RunState::Applied, "{}", run.reason);
    assert!(ada.verify_audit().await?.intact);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_outlives_its_stage() -> anyhow::Result<()> {
    let stage = stage().await?;
    let ada = stage.owner.clone();
    ada.create_environment("web", MfaPolicy::Never).await?;
    let marker = stage.shared().join("started");
    // Longer than any test.
    let main = format!(
        r#"resource "terraform_data" "slow" {{
  provisioner "local-exec" {{
    command = "echo $$ > '{}'; exec sleep 86400"
  }}
}}"#,
        marker.display()
    );
    let id = ada.queue("web", &Configuration::of(&[("main.tf", &main)])).await?.run_id;
    ada.wait_for_state(&id, RunState::AwaitingConfirmation).await?;
    ada.confirm(&id).await?;
    let sleeping = async || {
        let process = fs::read_to_string(&marker).unwrap_or_default();
        let command = format!("/proc/{}/cmdline", process.trim());
        match fs::read_to_string(&command) {
            Ok(text) if text.starts_with("sleep") => Ok(command),
            Ok(text) => Err(text),
            Err(error) => Err(error.to_string()),
        }
    };
    let command = wait_for("the local-exec to sleep", LIMIT, sleeping).await?;
    let directory = stage.directory().to_owned();
    drop(stage);
    wait_for("the local-exec to end", LIMIT, async || match fs::read_to_string(&command) {
        Ok(text) if text.starts_with("sleep") => Err(text),
        Ok(_) | Err(_) => Ok(()),
    })
    .await?;
    assert!(!directory.exists());
    Ok(())
}
