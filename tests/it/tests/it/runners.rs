//! Runners that come and go: drained, resumed, revoked, stopped, and jobs that find the one that
//! suits them.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::Context;
use latchkey_harness::{Configuration, LIMIT, Stage, StageOptions, wait_for};
use latchkey_proto::v1::{EnvironmentSettings, MfaPolicy, Phase, Run, RunState, Runner};

use crate::gated::{Gated, SMALL, wait_for_file};
use crate::support::{options, stage};

fn one() -> Configuration {
    Configuration::of(&[("main.tf", SMALL)])
}

async fn without_runners() -> anyhow::Result<Stage> {
    Stage::start(StageOptions { runners: vec![], ..options() }).await
}

/// Waits until a run says that it waits for this.
async fn waits_for(stage: &Stage, run_id: &str, what: &str) -> anyhow::Result<Run> {
    let says = |run: &Run| run.reason.contains(what);
    stage.owner.wait_for_run(run_id, &format!("waiting for \"{what}\""), says).await
}

async fn runner(stage: &Stage, is: impl Fn(&Runner) -> bool) -> anyhow::Result<Runner> {
    wait_for("the runner to be as wanted", LIMIT, async || {
        let runner = stage.owner.runner("build-1").await.map_err(|status| status.to_string())?;
        if is(&runner) { Ok(runner) } else { Err(format!("{runner:?}")) }
    })
    .await
}

/// Writes a hook of a runner into a directory of its own.
pub(crate) fn hook(directory: &Path, name: &str, script: &str) -> anyhow::Result<PathBuf> {
    fs::create_dir_all(directory)?;
    let path = directory.join(name);
    fs::write(&path, format!("#!/bin/sh\n{script}\n"))?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    Ok(path)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drained_runner_ends_its_job_and_takes_the_next_when_resumed() -> anyhow::Result<()> {
    let stage = stage().await?;
    let (ada, gated) = (&stage.owner, Gated::new(&stage));
    for name in ["web", "next"] {
        ada.create_environment(name, MfaPolicy::Never).await?;
    }
    let id = gated.begin(&stage, "web").await?;
    assert!(ada.drain("build-1").await?.drain_time.is_some());
    let shown = runner(&stage, |runner| runner.drain_time.is_some()).await?;
    assert!(shown.connected && shown.holds.len() == 1, "{shown:?}");
    assert_eq!((shown.holds[0].run_id.as_str(), shown.holds[0].phase()), (&*id, Phase::Apply));
    assert!(shown.holds[0].start_time.is_some());
    assert!(!shown.engines.is_empty() && !shown.version.is_empty() && shown.host.is_some());

    let next = ada.queue("next", &one()).await?.run_id;
    waits_for(&stage, &next, "busy or draining").await?;
    gated.open()?;
    ada.wait_for_state(&id, RunState::Applied).await?;
    runner(&stage, |runner| runner.holds.is_empty() && runner.connected).await?;
    waits_for(&stage, &next, "busy or draining").await?;
    assert!(ada.resume("build-1").await?.drain_time.is_none());
    ada.wait_for_state(&next, RunState::AwaitingConfirmation).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_plan_of_a_revoked_runner_is_granted_to_another() -> anyhow::Result<()> {
    let mut stage = without_runners().await?;
    let ada = stage.owner.clone();
    ada.create_environment("web", MfaPolicy::Never).await?;
    // It never gets to terraform.
    let (hooks, begun) = (stage.directory().join("hooks"), stage.shared().join("begun"));
    hook(&hooks, "before-plan", &format!("touch {}; exec sleep 600", begun.display()))?;
    let arguments = vec!["--hooks".to_owned(), hooks.display().to_string()];
    stage.add_runner_with("build-1", |options| options.arguments = arguments).await?;
    let id = ada.queue("web", &one()).await?.run_id;
    wait_for_file(&begun).await?;
    stage.add_runner("build-2").await?;
    assert!(ada.revoke("build-1").await?.revoke_time.is_some());
    let run = ada.wait_for_state(&id, RunState::AwaitingConfirmation).await?;
    let plan = run.plan.context("it was planned")?;
    assert_eq!((plan.runner_name.as_str(), plan.epoch), ("build-2", 2));
    let log = ada.log_text(&id, Phase::Plan).await?;
    assert_eq!(log.matches("terraform_data.one: Plan to create").count(), 1, "{log}");
    runner(&stage, |runner| !runner.connected && runner.holds.is_empty()).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_apply_of_a_revoked_runner_is_lost_until_a_person_decides() -> anyhow::Result<()> {
    let mut stage = stage().await?;
    let (ada, gated) = (stage.owner.clone(), Gated::new(&stage));
    ada.create_environment("web", MfaPolicy::Never).await?;
    let id = gated.begin(&stage, "web").await?;
    ada.revoke("build-1").await?;
    let run = ada.run(&id).await?;
    assert_eq!(run.state(), RunState::Lost);
    assert!(run.reason.contains("revoked"), "{}", run.reason);
    assert_eq!(ada.environment("web").await?.frozen.context("it is frozen")?.run_id, id);

    // It is believed nothing any more, and another starts nothing by itself.
    gated.open()?;
    stage.add_runner("build-2").await?;
    runner(&stage, |runner| !runner.connected).await?;
    assert_eq!(ada.run(&id).await?.state(), RunState::Lost);
    assert_eq!(ada.environment("web").await?.state_serial, 0);
    assert_eq!(ada.give_up(&id).await?.state(), RunState::Errored);
    ada.unfreeze("web", &id).await?;
    let next = ada.queue("web", &gated.configuration()).await?.run_id;
    let next = ada.wait_for_state(&next, RunState::AwaitingConfirmation).await?;
    assert_eq!(next.plan.context("it was planned")?.runner_name, "build-2");
    assert_eq!(gated.starts(), 1);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_lets_a_runner_end_its_job_and_leave() -> anyhow::Result<()> {
    let mut stage = stage().await?;
    let (ada, gated) = (stage.owner.clone(), Gated::new(&stage));
    for name in ["web", "next"] {
        ada.create_environment(name, MfaPolicy::Never).await?;
    }
    let id = gated.begin(&stage, "web").await?;
    stage.runners[0].terminate()?;
    runner(&stage, |runner| runner.draining && runner.holds.len() == 1).await?;
    let next = ada.queue("next", &one()).await?.run_id;
    waits_for(&stage, &next, "busy or draining").await?;
    gated.open()?;
    ada.wait_for_state(&id, RunState::Applied).await?;
    assert!(stage.runners[0].wait().await?.success());
    waits_for(&stage, &next, "none is connected").await?;
    // What a runner decides for itself does not outlive it.
    stage.runners[0].restart()?;
    ada.wait_for_state(&next, RunState::AwaitingConfirmation).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn labels_and_phases_lead_a_run_from_one_runner_to_the_next() -> anyhow::Result<()> {
    let mut stage = without_runners().await?;
    let ada = stage.owner.clone();
    let settings = EnvironmentSettings {
        mfa_policy: MfaPolicy::Never.into(),
        pool: Stage::POOL.to_owned(),
        runner_labels: [("zone".to_owned(), "eu".to_owned())].into(),
        ..Default::default()
    };
    ada.create_environment_with("web", settings).await?;
    let id = ada.queue("web", &moving()).await?.run_id;
    waits_for(&stage, &id, "none is connected").await?;
    stage.add_runner("plain").await?;
    waits_for(&stage, &id, "with label zone=eu").await?;

    let only = |phase: &str| ["--label", "zone=eu", "--accept", phase].map(str::to_owned).to_vec();
    stage.add_runner_with("planner", |options| options.arguments = only("plan")).await?;
    let run = ada.wait_for_state(&id, RunState::AwaitingConfirmation).await?;
    assert_eq!(run.plan.context("it was planned")?.runner_name, "planner");
    ada.confirm(&id).await?;
    waits_for(&stage, &id, "that takes applies").await?;

    stage.add_runner_with("applier", |options| options.arguments = only("apply")).await?;
    let run = ada.wait_for_state(&id, RunState::Applied).await?;
    assert_eq!(run.apply.context("it was applied")?.runner_name, "applier");
    // A file of the module, and one that only the plan's runner made.
    let log = ada.log_text(&id, Phase::Apply).await?;
    assert!(log.contains("(local-exec): from the module"), "{log}");
    let outputs: serde_json::Value = serde_json::from_str(&run.outputs_json)?;
    assert_eq!(outputs["said"]["value"], "from the module\n");
    Ok(())
}

/// Needs at its apply what was unpacked for its plan.
fn moving() -> Configuration {
    let main = r#"
module "part" {
  source = "./part"
}

output "said" {
  value = module.part.said
}
"#;
    let part = r#"
resource "terraform_data" "one" {
  input = file("${path.module}/words")
  provisioner "local-exec" {
    command = "cat ${path.module}/words"
  }
}

output "said" {
  value = terraform_data.one.output
}
"#;
    Configuration::of(&[
        ("main.tf", main),
        ("part/part.tf", part),
        ("part/words", "from the module\n"),
    ])
}

#[tokio::test(flavor = "multi_thread")]
async fn a_runner_for_one_job_takes_one_and_leaves() -> anyhow::Result<()> {
    let mut stage = without_runners().await?;
    let ada = stage.owner.clone();
    ada.create_environment("web", MfaPolicy::Never).await?;
    let once = vec!["--once".to_owned()];
    stage.add_runner_with("build-1", |options| options.arguments = once).await?;
    let id = ada.queue("web", &one()).await?.run_id;
    ada.wait_for_state(&id, RunState::AwaitingConfirmation).await?;
    assert!(stage.runners[0].wait().await?.success());
    ada.confirm(&id).await?;
    waits_for(&stage, &id, "none is connected").await?;
    stage.add_runner("build-2").await?;
    let run = ada.wait_for_state(&id, RunState::Applied).await?;
    assert_eq!(run.apply.context("it was applied")?.runner_name, "build-2");
    Ok(())
}
