//! A control plane that comes back with an older copy of its data while a runner applies.
//!
//! 1. A run is planned; the data are copied, control plane down.
//! 2. The run is approved and applied; terraform is held in the middle.
//! 3. The copy takes the data's place: raw, or by `restore` from a backup.
//! 4. The runner comes back. From then on nothing may be granted that could apply the plan a
//!    second time, however hard a person tries.
//! 5. Raw: the newest data return, and the run ends as if nothing had been. Restored: its runner is
//!    resumed, and applies another.

use std::fs;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use anyhow::Context;
use latchkey_harness::stub::{Script, What};
use latchkey_harness::{LIMIT, Person, is_ended, wait_for};
use latchkey_proto::v1;
use latchkey_proto::v1::{MfaPolicy, Phase, PlainCredentials, RunState};
use tokio::time::sleep;

use crate::bed::Bed;
use crate::check::Violation;
use crate::frames::Played;
use crate::programs::programs;
use crate::random::Random;

/// How long a person tries to have it applied again.
const TRYING: Duration = Duration::from_secs(3);

/// What the control plane says once it knows.
const ALARM: &str = "old copy of";

/// How the copy comes back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum How {
    Raw,
    Restored,
}

pub(crate) async fn play(bed: &mut Bed, how: How, random: &mut Random) -> anyhow::Result<Played> {
    bed.rounds += 1;
    let owner = bed.owner.clone();
    let environment = format!("o{}", bed.rounds);
    let settings = v1::EnvironmentSettings {
        mfa_policy: MfaPolicy::Never.into(),
        pool: latchkey_harness::Stage::POOL.to_owned(),
        plain_credentials: PlainCredentials::None.into(),
        ..Default::default()
    };
    owner.create_environment_with(&environment, settings.clone()).await?;
    let script = Script { hold: true, lines: 20 + random.below(40), ..Script::default() };
    let run = owner.queue(&environment, &script.configuration()).await?;
    let run_id = run.run_id.as_str();
    owner.wait_for_state(run_id, RunState::AwaitingConfirmation).await?;

    // 1.
    let (data, old) = (bed.plane.data_dir(), bed.directory().join("old"));
    bed.kill_plane().await;
    let _ = fs::remove_dir_all(&old);
    match how {
        How::Raw => copy(&data, &old)?,
        How::Restored => tool(&["backup", "--data-dir"], &data, "--to", &old).await?,
    }
    bed.revive_plane().await?;

    // 2.
    let confirmed = wait_for("the confirmation", LIMIT, async || {
        owner.confirm(run_id).await.map_err(|status| status.to_string())
    });
    confirmed.await?;
    let stub = bed.stub.clone();
    wait_for("terraform to be in the middle", LIMIT, async || {
        stub.holds(run_id).then_some(()).ok_or_else(|| "it is not".to_owned())
    })
    .await?;
    // A runner remembers what it is told with heartbeats.
    sleep(random.millis(0, 1_500)).await;

    // 3.
    bed.kill_plane().await;
    let newest = bed.directory().join("newest");
    let _ = fs::remove_dir_all(&newest);
    fs::rename(&data, &newest).context("put the newest data aside")?;
    match how {
        How::Raw => copy(&old, &data)?,
        How::Restored => tool(&["restore", "--from"], &old, "--data-dir", &data).await?,
    }
    let welcomes = bed.runner.log().matches("welcomed").count();
    let logged = bed.plane.log().len();
    bed.revive_plane().await?;

    // 4.
    wait_for("the runner to come back", LIMIT, async || {
        let now = bed.runner.log().matches("welcomed").count();
        let alarm = bed.plane.log().get(logged..).is_some_and(|log| log.contains(ALARM));
        (alarm || now > welcomes).then_some(()).ok_or_else(|| format!("{now} welcomes"))
    })
    .await?;
    let begin = tokio::time::Instant::now();
    while begin.elapsed() < TRYING {
        let _ = owner.confirm(run_id).await;
        sleep(Duration::from_millis(100)).await;
    }
    let mut violations = Vec::new();
    let mut unless = |holds: bool, invariant: &'static str, detail: String| {
        if !holds {
            violations.push(Violation { invariant, detail });
        }
    };
    let now = owner.run(run_id).await?;
    let granted = now.apply.as_ref().map_or(0, |apply| apply.epoch);
    unless(
        granted == 0 && now.state() != RunState::Applying,
        "an old copy grants nothing",
        format!("the run is {:?}, epoch {granted}", now.state()),
    );
    let log = bed.plane.log().get(logged..).unwrap_or_default().to_owned();
    match how {
        How::Raw => unless(
            log.contains(ALARM),
            "an old copy raises an alarm",
            "the control plane says nothing of it".to_owned(),
        ),
        How::Restored => {
            let frozen = owner.environment(&environment).await?.frozen.is_some();
            unless(
                frozen,
                "a restore freezes what was under way",
                "the environment is not frozen".to_owned(),
            );
        }
    }

    // 5.
    if how == How::Raw {
        bed.kill_plane().await;
        fs::remove_dir_all(&data)?;
        fs::rename(&newest, &data)?;
        bed.revive_plane().await?;
    }
    bed.stub.release(run_id)?;
    if how == How::Raw {
        let ended = owner
            .wait_for_run(run_id, "its end", |run| {
                // One that is lost comes back with its runner.
                is_ended(run) && run.state() != RunState::Lost
            })
            .await?;
        unless(
            ended.state() == RunState::Applied,
            "terraform never fails because of us",
            format!("the run is {:?}: {}", ended.state(), ended.reason),
        );
        let lines = owner.log_text(run_id, Phase::Apply).await?;
        let count = lines.lines().filter(|line| line.starts_with("stub ")).count() as u64;
        unless(
            count == script.lines,
            "the log is what terraform printed",
            format!("{} were printed, {count} are there", script.lines),
        );
    }
    let jobs = bed.runner.work_dir().join("jobs");
    let empty = wait_for("the host to be empty", LIMIT, async || {
        let left = fs::read_dir(&jobs).into_iter().flatten().flatten().count();
        if left == 0 { Ok(()) } else { Err(format!("{left} jobs are there")) }
    });
    if let Err(error) = empty.await {
        unless(false, "nothing is left on the host", format!("{error:#}"));
    }
    let starts = bed.stub.ledger()?;
    let starts = starts.iter().filter(|entry| {
        entry.run_id == run_id && entry.phase == "apply" && entry.what == What::Started
    });
    let starts = starts.count();
    unless(
        starts == 1,
        "one start of apply per approval",
        format!("run {run_id} was applied {starts} times"),
    );
    if how == How::Restored {
        // Work goes on once a person has let the runner take it.
        resume(&owner).await?;
        let environment = format!("after-{}", bed.rounds);
        owner.create_environment_with(&environment, settings).await?;
        let next = owner.queue(&environment, &Script::default().configuration()).await?;
        owner.wait_for_state(&next.run_id, RunState::AwaitingConfirmation).await?;
        owner.confirm(&next.run_id).await?;
        owner.wait_for_state(&next.run_id, RunState::Applied).await?;
    }
    let verified = owner.verify_audit().await?;
    unless(verified.intact, "the audit chain verifies", verified.problem);
    Ok(Played { struck: 1, violations })
}

async fn resume(owner: &Person) -> anyhow::Result<()> {
    let request = v1::ListRunnersRequest {
        organization: owner.organization.clone(),
        page_size: 200,
        page_token: String::new(),
    };
    for runner in owner.pools().list_runners(request).await?.into_inner().runners {
        let request = v1::ResumeRunnerRequest { runner_id: runner.runner_id };
        owner.pools().resume_runner(request).await?;
    }
    Ok(())
}

/// Runs a command of the control plane's program that works on its data.
async fn tool(command: &[&str], first: &Path, option: &str, second: &Path) -> anyhow::Result<()> {
    let mut tool = programs()?.control_plane().command();
    tool.args(command).arg(first).arg(option).arg(second);
    let mut running = tool.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    // The program ends when this closes.
    let _tether = running.stdin.take();
    let output = running.wait_with_output().await?;
    let said = String::from_utf8_lossy(&output.stderr);
    anyhow::ensure!(output.status.success(), "{command:?} failed: {said}");
    Ok(())
}

fn copy(from: &Path, to: &Path) -> anyhow::Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let to = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy(&entry.path(), &to)?;
        } else if entry.file_type()?.is_file() {
            // Sockets are made again.
            fs::copy(entry.path(), to)?;
        }
    }
    Ok(())
}
