//! `demo`: the main story, told with the real command line against real processes. What the
//! closing lines say was looked up, not assumed.

use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, ensure};
use latchkey_cli::Exit;
use latchkey_harness::{Stage, after_plan, files_with, is_ended};
use latchkey_proto::v1::{Lock, RunState};

use crate::narrator::{Narrator, Show};
use crate::play::Player;
use crate::{complain, example, stage};

const ENVIRONMENT: &str = "web";

/// Plays it and tells how it went.
pub(crate) fn main() -> ExitCode {
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            complain(format!("error: failed to start the runtime: {error}"));
            return ExitCode::FAILURE;
        }
    };
    let exit = runtime.block_on(async {
        let start = Instant::now();
        let narrator = Narrator::new();
        narrator.title("Latchkey: terraform that waits for a person with an MFA code");
        narrator.chapter("The parts, on loopback and in a temporary directory").await;
        let mut stage = match stage().await {
            Ok(stage) => stage,
            Err(error) => {
                complain(format!("\nThe demo cannot start: {error:#}"));
                return ExitCode::FAILURE;
            }
        };
        match story(&narrator, &stage).await {
            Ok(()) => {
                narrator.say(&format!(
                    "That was the main story, in {} seconds. `cargo dev` leaves it running for \
                     you.",
                    start.elapsed().as_secs()
                ));
                ExitCode::SUCCESS
            }
            Err(error) => {
                complain(format!("\nThe demo failed: {error:#}"));
                complain(format!("Logs: {}", stage.keep_directory().join("logs").display()));
                ExitCode::FAILURE
            }
        }
    });
    runtime.shutdown_background();
    exit
}

async fn story(narrator: &Narrator, stage: &Stage) -> anyhow::Result<()> {
    show_parts(narrator, stage);
    let config = stage.directory().join("ada.json");
    let (address, token) = (stage.plane.people_url(), stage.owner.token());
    let ada =
        Player::sign_in(narrator.clone(), &config, &address, stage.plane.ca_file(), token).await?;

    narrator.chapter("Ada, an owner, gates plans and applies, and queues a run").await;
    let create = ["env", "create", ENVIRONMENT, "--pool", Stage::POOL];
    ada.play(&[&create[..], &["--mfa-policy", "plans-and-applies"]].concat(), "").await?;
    let set = ["var", "set", "release", "--environment", ENVIRONMENT, "--value", "2026.11"];
    ada.play(&set, "").await?;
    let directory = example().display().to_string();
    let queued =
        ada.play(&["queue", ENVIRONMENT, &directory, "--message", "first release"], "").await?;
    let run_id = queued
        .lines()
        .find_map(|line| line.strip_prefix("Queued run "))
        .context("`latchkey queue` named no run")?
        .to_owned();

    let wrong = stage.aws.wrong_code().await?;
    wrong_code(narrator, stage, &ada, &run_id, &wrong).await?;

    narrator.chapter("The right code opens the lock, and the plan begins").await;
    let first = stage.aws.unused_code().await?;
    narrator.aside("Ada types what her device shows");
    ada.play(&["authenticate", &run_id], &first).await?;
    let plan_log = ["logs", &run_id, "--phase", "plan", "--follow"];
    ada.play_part(&plan_log, "", Show::Ends { first: 34, last: 14 }).await?;
    let run = stage.owner.wait_for_run(&run_id, "the end of the plan", after_plan).await?;
    ensure!(run.state() == RunState::AwaitingApplyMfa, "the plan ended: {}", run.reason);

    narrator.chapter("A second, different code approves exactly this plan").await;
    let second = stage.aws.unused_code().await?;
    narrator.aside("Ada has read the plan, and types the next code");
    ada.play(&["authenticate", &run_id], &second).await?;
    ada.play(&["logs", &run_id, "--phase", "apply", "--follow"], "").await?;
    let run = stage.owner.wait_for_run(&run_id, "the end of the apply", is_ended).await?;
    ensure!(run.state() == RunState::Applied, "the apply ended: {}", run.reason);

    narrator.chapter("What is left: outputs, who it was, and a chained record").await;
    let show = Show::Ends { first: 14, last: 5 };
    let shown = ada.play_part(&["run", "show", &run_id], "", show).await?;
    let times = shown.matches("Authenticated with MFA by ada").count();
    ensure!(times == 2, "`latchkey run show` names who authenticated {times} times");
    ada.play(&["audit", "list", "--run", &run_id], "").await?;
    ada.play(&["audit", "verify"], "").await?;

    narrator.chapter("Looked up, not assumed").await;
    check(narrator, stage, &[("the wrong", &wrong), ("the first", &first), ("the second", &second)])
        .await
}

fn show_parts(narrator: &Narrator, stage: &Stage) {
    let engine = stage.terraform.display();
    narrator.say(&format!(
        "simulated AWS   {}   checks signatures and codes for real",
        stage.aws.facts().url
    ));
    narrator.say(&format!(
        "control plane   {}  on sled, TLS from a CA of its own",
        stage.plane.people_url()
    ));
    narrator.say(&format!("runner build-1  with {engine}; it has no AWS key"));
}

async fn wrong_code(
    narrator: &Narrator,
    stage: &Stage,
    ada: &Player,
    run_id: &str,
    wrong: &str,
) -> anyhow::Result<()> {
    narrator.chapter("A wrong code is refused, and the run keeps waiting").await;
    narrator.aside("somebody types six digits that the device does not show");
    let refused = ada.try_play(&["authenticate", run_id], wrong, Show::All).await;
    ensure!(refused.exit == Exit::Refused, "the wrong code ended: {:?}", refused.exit);
    ensure!(
        refused.text.contains("CODE_REJECTED"),
        "the wrong code was refused for another reason"
    );
    let shown = ada.play(&["run", "show", run_id], "").await?;
    ensure!(shown.contains("[x] failed"), "the lock does not show the refusal");
    let run = stage.owner.run(run_id).await?;
    ensure!(run.lock() == Lock::Failed && run.state() == RunState::AwaitingPlanMfa);
    Ok(())
}

async fn check(narrator: &Narrator, stage: &Stage, codes: &[(&str, &str)]) -> anyhow::Result<()> {
    for (which, code) in codes {
        let seen = stage.aws.requests_with_code(code).await?;
        ensure!(seen == 1, "AWS saw {which} code {seen} times");
    }
    narrator.true_("AWS saw each of the three codes exactly once");
    let secret = stage.aws.facts().secret_access_key.expose();
    // The simulated AWS itself must know it.
    let mut found = files_with(stage.directory(), secret.as_bytes())?;
    found.retain(|path| !path.ends_with("aws.json"));
    ensure!(found.is_empty(), "the secret key is in {found:?}");
    narrator.true_("the secret key is in no file of runner or control plane, and in no log");
    let verified = stage.owner.verify_audit().await?;
    ensure!(verified.intact, "the audit chain is broken: {}", verified.problem);
    narrator.true_(&format!("the audit chain of {} records is whole", verified.records));
    narrator.true_("Authenticated with MFA by ada: once for the plan, once for the apply");
    Ok(())
}
