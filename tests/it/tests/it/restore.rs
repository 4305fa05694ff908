//! A control plane that comes back with older data while a runner applies: from a backup, as it
//! should be, and as a raw copy, which is found out.

use std::fs;
use std::path::Path;

use anyhow::Context;
use latchkey_harness::{Configuration, LIMIT, Stage, StageOptions, reason, wait_for};
use latchkey_proto::v1::{EnvironmentSettings, MfaPolicy, QuarantinedKind, RunState};
use tonic::Code;

use crate::gated::{Gated, SMALL};
use crate::recovery::{of_kind, remains};
use crate::support::options;

/// Two slots: a job that is given up may hold one.
async fn stage() -> anyhow::Result<Stage> {
    let stage = Stage::start(StageOptions { slots: 2, ..options() }).await?;
    for name in ["web", "more"] {
        stage.owner.create_environment(name, MfaPolicy::Never).await?;
    }
    stage.owner.create_environment("coded", MfaPolicy::PlansAndApplies).await?;
    Ok(stage)
}

fn small() -> Configuration {
    Configuration::of(&[("main.tf", SMALL)])
}

async fn apply(stage: &Stage, environment: &str) -> anyhow::Result<String> {
    let ada = &stage.owner;
    let id = ada.queue(environment, &small()).await?.run_id;
    ada.wait_for_state(&id, RunState::AwaitingConfirmation).await?;
    ada.confirm(&id).await?;
    ada.wait_for_state(&id, RunState::Applied).await?;
    Ok(id)
}

async fn wait_for_log(what: &str, log: impl Fn() -> String, before: usize) -> anyhow::Result<()> {
    wait_for(&format!("{what} in a log"), LIMIT, async || {
        let count = log().matches(what).count();
        if count > before { Ok(()) } else { Err(format!("{count} times")) }
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_gives_up_what_runners_hold_and_starts_nothing_twice() -> anyhow::Result<()> {
    let mut stage = stage().await?;
    let (ada, gated) = (stage.owner.clone(), Gated::new(&stage));

    // In the backup: a state, a plan that may be approved, a session that waits for a runner.
    apply(&stage, "more").await?;
    let settings = EnvironmentSettings {
        mfa_policy: MfaPolicy::PlansAndApplies.into(),
        pool: Stage::POOL.to_owned(),
        runner_labels: [("zone".to_owned(), "none-has-it".to_owned())].into(),
        ..Default::default()
    };
    ada.create_environment_with("waiting", settings).await?;
    let waiting = ada.queue("waiting", &small()).await?.run_id;
    let run = ada.authenticate(&waiting, &stage.aws.unused_code().await?).await?;
    assert_eq!(run.state(), RunState::PlanQueued);
    let id = ada.queue("web", &gated.configuration()).await?.run_id;
    let planned = ada.wait_for_state(&id, RunState::AwaitingConfirmation).await?;
    let backup = stage.directory().join("backup");
    stage.plane.backup(&backup).await?;

    // Not in it: one more run, and an apply under way.
    let unknown = ada.queue("coded", &small()).await?.run_id;
    ada.confirm(&id).await?;
    gated.wait_until_begun().await?;

    stage.plane.kill().await?;
    let restored = stage.directory().join("restored");
    stage.plane.restore(&backup, &restored).await?;
    let welcomes = stage.runners[0].log().matches("welcomed").count();
    stage.plane.restart().await?;
    wait_for_log("welcomed", || stage.runners[0].log(), welcomes).await?;

    // What had not ended is ended, and no authority is left.
    for (run_id, environment) in [(&id, "web"), (&waiting, "waiting")] {
        let run = ada.run(run_id).await?;
        assert_eq!(run.state(), RunState::Errored);
        assert!(run.reason.contains("restore") && run.approval.is_none(), "{run:?}");
        let frozen = ada.environment(environment).await?.frozen.context("it is frozen")?;
        assert_eq!(&frozen.run_id, run_id);
    }
    assert_eq!(ada.run(&unknown).await.unwrap_err().code(), Code::NotFound);
    let refused = ada.confirm(&id).await.unwrap_err();
    assert_eq!(reason(&refused), "WRONG_STATE");
    // Which codes were spent since the backup nobody knows.
    let coded = ada.queue("coded", &small()).await?.run_id;
    let exchanges = stage.aws.simulator().requests_for("GetSessionToken");
    let refused = ada.authenticate(&coded, &stage.aws.unused_code().await?).await.unwrap_err();
    assert_eq!(reason(&refused), "DEVICE_BUSY", "{refused:?}");
    assert_eq!(stage.aws.simulator().requests_for("GetSessionToken"), exchanges);

    // The apply goes on to its end; what it made is of a history that is over.
    gated.open()?;
    let found = remains(&stage, &id).await?;
    let generation = found[0].generation;
    assert!(found.iter().all(|one| one.generation == generation && one.epoch == 1), "{found:?}");
    assert_eq!(ada.run(&id).await?.state(), RunState::Errored);
    assert_eq!(ada.environment("web").await?.state_serial, 0);
    let state = of_kind(&found, QuarantinedKind::State)?;

    // A person looks, and runs go on. Runners may have been revoked since the backup, so an owner
    // says that this one was not.
    ada.accept_state("web", &state.quarantined_id).await?;
    ada.unfreeze("web", &id).await?;
    ada.resume("build-1").await?;
    let next = ada.queue("web", &gated.configuration()).await?.run_id;
    let next = ada.wait_for_state(&next, RunState::Planned).await?;
    assert_ne!(
        next.plan_result.context("it was planned")?.digest,
        planned.plan_result.context("so was it")?.digest
    );
    let next = ada.queue("more", &small()).await?.run_id;
    ada.wait_for_state(&next, RunState::Planned).await?;
    assert_eq!(gated.starts(), 1);
    assert!(ada.verify_audit().await?.intact);
    let restores = ada.audit_records("").await?;
    assert!(restores.iter().any(|record| record.action == "restore"));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_raw_old_copy_is_found_out_by_the_runner_and_stands_still() -> anyhow::Result<()> {
    let mut stage = stage().await?;
    let (ada, gated) = (stage.owner.clone(), Gated::new(&stage));
    let coded = ada.queue("coded", &small()).await?.run_id;
    let id = ada.queue("web", &gated.configuration()).await?.run_id;
    ada.wait_for_state(&id, RunState::AwaitingConfirmation).await?;
    let (data, old) = (stage.plane.data_dir(), stage.directory().join("old"));
    stage.plane.stop().await?;
    copy(&data, &old)?;
    stage.plane.restart().await?;
    ada.wait_for_runner("build-1").await?;
    ada.confirm(&id).await?;
    gated.wait_until_begun().await?;

    // By hand.
    stage.plane.kill().await?;
    let newest = stage.directory().join("newest");
    fs::rename(&data, &newest)?;
    copy(&old, &data)?;
    stage.plane.restart().await?;
    wait_for_log("old copy", || stage.plane.log(), 0).await?;

    // People can look, and nothing is spent or granted.
    assert_eq!(ada.run(&id).await?.state(), RunState::AwaitingConfirmation);
    let exchanges = stage.aws.simulator().requests_for("GetSessionToken");
    let refused = ada.authenticate(&coded, &stage.aws.unused_code().await?).await.unwrap_err();
    assert_eq!(reason(&refused), "HISTORY_LOST", "{refused:?}");
    assert_eq!(stage.aws.simulator().requests_for("GetSessionToken"), exchanges);
    // Whether the wish itself is taken does not matter.
    let _ = ada.confirm(&id).await;
    let other = ada.queue("more", &small()).await;
    // An agent says each reason once: another one is refused again, and would be granted.
    let refusals = stage.runners[0].log().matches("old copy").count();
    stage.runners[0].kill().await?;
    stage.runners[0].restart()?;
    wait_for_log("old copy", || stage.runners[0].log(), refusals).await?;
    for run in [Ok(ada.run(&id).await?), other] {
        let Ok(run) = run else { continue };
        let run = ada.run(&run.run_id).await?;
        let granted = run.apply.as_ref().is_some_and(|job| job.epoch > 0);
        assert!(!granted && run.state() != RunState::Planning, "{run:?}");
    }

    // With the newest data it is as if nothing had been.
    stage.plane.kill().await?;
    fs::remove_dir_all(&data)?;
    fs::rename(&newest, &data)?;
    stage.plane.restart().await?;
    gated.open()?;
    ada.wait_for_state(&id, RunState::Applied).await?;
    assert_eq!(gated.starts(), 1);
    Ok(())
}

fn copy(from: &Path, to: &Path) -> std::io::Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        let kind = entry.file_type()?;
        if kind.is_dir() {
            copy(&entry.path(), &target)?;
        } else if kind.is_file() {
            fs::copy(entry.path(), target)?;
        }
    }
    Ok(())
}
