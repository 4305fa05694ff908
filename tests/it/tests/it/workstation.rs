//! The state of an environment from a workstation: the real terraform, its `http` backend over
//! TLS, and the command line, beside runs of the same environment.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};

use anyhow::Context;
use latchkey_harness::{Person, Stage, StageOptions};
use latchkey_proto::v1;
use latchkey_proto::v1::{MfaPolicy, RunState};
use serde_json::Value;
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

use crate::gated::{Gated, SMALL};
use crate::support::options;

const BACKEND: &str = "terraform {\n  backend \"http\" {}\n}\n";

/// Somebody's machine: a signed-in command line, and a directory with a configuration.
struct Workstation<'a> {
    stage: &'a Stage,
    directory: PathBuf,
    backend: Vec<(String, String)>,
}

impl<'a> Workstation<'a> {
    /// Signs in and takes the backend's settings as the command line prints them.
    async fn new(stage: &'a Stage, person: &Person, environment: &str) -> anyhow::Result<Self> {
        let directory = stage.directory().join(format!("workstation-{}", person.name));
        fs::create_dir(&directory)?;
        let mut workstation = Self { stage, directory, backend: vec![] };
        let (address, ca) = (stage.plane.people_url(), stage.plane.ca_file().display().to_string());
        let login = ["login", &address, "--ca-file", &ca, "--organization", "acme"];
        workstation.latchkey(&login, person.token()).await?;
        let lines = workstation
            .latchkey(&["state", "backend-config", environment, "--with-token"], "")
            .await?;
        workstation.backend = exported(&lines);
        Ok(workstation)
    }

    fn write(&self, name: &str, text: &str) -> anyhow::Result<()> {
        Ok(fs::write(self.directory.join(name), text)?)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// Runs the command line with a line typed; fails with what it said.
    async fn latchkey(&self, args: &[&str], typed: &str) -> anyhow::Result<String> {
        let output = self.try_latchkey(args, typed).await?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        anyhow::ensure!(output.status.success(), "latchkey {args:?}: {said}");
        Ok(String::from_utf8(output.stdout)?)
    }

    async fn try_latchkey(&self, args: &[&str], typed: &str) -> anyhow::Result<Output> {
        let mut command = self.stage.programs().cli().command();
        command.arg("--config").arg(self.path("credentials.json")).args(args);
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        let mut stdin = child.stdin.take().context("it has a standard input")?;
        stdin.write_all(format!("{typed}\n").as_bytes()).await?;
        drop(stdin);
        Ok(child.wait_with_output().await?)
    }

    /// Runs terraform as the person would, in the directory of the workstation.
    async fn try_terraform(&self, args: &[&str]) -> anyhow::Result<Output> {
        self.terraform_in(&self.directory, args).await
    }

    async fn terraform_in(&self, directory: &Path, args: &[&str]) -> anyhow::Result<Output> {
        let mut command = Command::new(&self.stage.terraform);
        command.args(args).current_dir(directory).kill_on_drop(true).stdin(Stdio::null());
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("TF_") {
                command.env_remove(name);
            }
        }
        command.env("CHECKPOINT_DISABLE", "1").env("TF_CLI_CONFIG_FILE", "/dev/null");
        command.envs(self.backend.iter().map(|(name, value)| (name, value)));
        Ok(command.output().await?)
    }

    async fn terraform(&self, args: &[&str]) -> anyhow::Result<String> {
        let output = self.try_terraform(args).await?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        anyhow::ensure!(output.status.success(), "terraform {args:?}: {said}");
        Ok(String::from_utf8(output.stdout)?)
    }
}

/// Reads lines for a shell, values of several lines too.
fn exported(text: &str) -> Vec<(String, String)> {
    let of_one = |part: &str| {
        let (name, value) = part.split_once("='")?;
        let value = value.rsplit_once('\'')?.0;
        Some((name.to_owned(), value.to_owned()))
    };
    text.split("export ").filter_map(of_one).collect()
}

/// A resource with a value that its state marks as sensitive.
fn secret(value: &str) -> String {
    format!(
        "resource \"terraform_data\" \"secret\" {{\n  triggers_replace = {{\n    password = \
         sensitive(\"{value}\")\n    open     = 1\n  }}\n}}\n"
    )
}

async fn versions(person: &Person) -> anyhow::Result<Vec<v1::StateVersion>> {
    let request = v1::ListStateVersionsRequest {
        organization: person.organization.clone(),
        environment: "web".into(),
        ..Default::default()
    };
    Ok(person.states().list_state_versions(request).await?.into_inner().versions)
}

async fn bare_stage() -> anyhow::Result<Stage> {
    let stage = Stage::start(StageOptions { runners: vec![], ..options() }).await?;
    stage.owner.create_environment("web", MfaPolicy::Never).await?;
    Ok(stage)
}

fn said(output: &Output) -> String {
    // Terraform breaks lines where it likes.
    let text = String::from_utf8_lossy(&output.stderr);
    text.split_whitespace().filter(|word| *word != "│").collect::<Vec<_>>().join(" ")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_workstation_and_runs_use_one_state_one_after_the_other() -> anyhow::Result<()> {
    let stage = Stage::start(options()).await?;
    let ada = &stage.owner;
    ada.create_environment("web", MfaPolicy::Never).await?;
    let desk = Workstation::new(&stage, ada, "web").await?;
    assert!(desk.backend.iter().any(|(name, _)| name == "TF_HTTP_CLIENT_CA_CERTIFICATE_PEM"));
    desk.write("main.tf", &format!("{BACKEND}{SMALL}"))?;
    desk.terraform(&["init", "-input=false"]).await?;
    desk.terraform(&["apply", "-auto-approve"]).await?;
    let pushed = versions(ada).await?;
    assert_eq!((pushed[0].origin(), pushed[0].user.as_str()), (v1::StateOrigin::Push, "ada"));
    assert!(pushed[0].current && pushed[0].run_id.is_empty() && pushed[0].size > 0, "{pushed:?}");
    assert!(ada.environment("web").await?.state_lock.is_none(), "terraform gave the lock back");
    let planned = desk.terraform(&["plan", "-no-color"]).await?;
    assert!(planned.contains("No changes"), "{planned}");

    // A run goes on from there, and while it applies, terraform is told who has the state.
    let gated = Gated::new(&stage);
    let run = gated.begin(&stage, "web").await?;
    let refused = desk.try_terraform(&["plan", "-no-color"]).await?;
    assert!(!refused.status.success());
    let told = said(&refused);
    assert!(told.contains("HTTP remote state already locked"), "{told}");
    assert!(told.contains(&format!("ID=run {run} of ada (Applying)")), "{told}");
    // Nor does a state get in past the lock.
    let state = desk.terraform(&["state", "pull"]).await?;
    let next = state.replace(&format!("\"serial\": {}", pushed[0].serial), "\"serial\": 1000");
    desk.write("next.tfstate", &next)?;
    let refused = desk.try_terraform(&["state", "push", "-lock=false", "next.tfstate"]).await?;
    assert!(said(&refused).contains("423"), "{}", said(&refused));
    let path = desk.path("next.tfstate").display().to_string();
    let refused = desk.try_latchkey(&["state", "import", "web", &path], "").await?;
    assert!(said(&refused).contains(&format!("run {run} has the environment")));
    gated.open()?;
    ada.wait_for_state(&run, RunState::Applied).await?;
    let of_run = versions(ada).await?.remove(0);
    assert_eq!((of_run.origin(), of_run.run_id.as_str()), (v1::StateOrigin::Run, run.as_str()));
    assert_eq!(of_run.lineage, pushed[0].lineage);

    // While a workstation has the state, the next run waits and says so.
    let (started, gate) = (stage.shared().join("desk-started"), stage.shared().join("desk-gate"));
    let slow = crate::gated::gated_apply(&started, &gate);
    desk.write("main.tf", &format!("{BACKEND}{}", slow.replace("gated\"", "slow\"")))?;
    let applying = desk.try_terraform(&["apply", "-auto-approve", "-no-color"]);
    let meanwhile = async {
        crate::gated::wait_for_file(&started).await?;
        let lock = ada.environment("web").await?.state_lock.context("it is locked")?;
        assert_eq!((lock.user.as_str(), lock.operation.as_str()), ("ada", "OperationTypeApply"));
        let listed = desk.latchkey(&["state", "list", "web"], "").await?;
        assert!(listed.starts_with("Locked by ada from ") && listed.contains(&lock.lock_id));
        let shown = desk.latchkey(&["env", "show", "web"], "").await?;
        assert!(shown.contains(&lock.lock_id), "{shown}");
        let next = ada.queue("web", &gated.configuration()).await?;
        assert_eq!(next.state(), RunState::Pending);
        let reason = ada.run(&next.run_id).await?.reason;
        assert!(reason.contains("the state is locked: ada (OperationTypeApply)"), "{reason}");
        fs::write(&gate, "")?;
        anyhow::Ok(next.run_id)
    };
    let (applied, next) = tokio::join!(applying, meanwhile);
    let (applied, next) = (applied?, next?);
    assert!(applied.status.success(), "{}", said(&applied));
    ada.wait_for_state(&next, RunState::AwaitingConfirmation).await?;
    assert!(ada.verify_audit().await?.intact);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_state_is_brought_in_compared_and_gone_back_to() -> anyhow::Result<()> {
    let stage = bare_stage().await?;
    let ada = &stage.owner;
    let desk = Workstation::new(&stage, ada, "web").await?;

    // What was kept in a file until now.
    let before = desk.path("before");
    fs::create_dir(&before)?;
    let first = format!("{SMALL}{}", secret("canary-1"));
    fs::write(before.join("main.tf"), &first)?;
    for args in [&["init", "-input=false"][..], &["apply", "-auto-approve"]] {
        let done = desk.terraform_in(&before, args).await?;
        assert!(done.status.success(), "{}", said(&done));
    }
    let file = before.join("terraform.tfstate").display().to_string();
    let imported = desk.latchkey(&["state", "import", "web", &file], "").await?;
    assert!(imported.contains("import by ada"), "{imported}");
    desk.write("main.tf", &format!("{BACKEND}{first}"))?;
    desk.terraform(&["init", "-input=false"]).await?;
    let planned = desk.terraform(&["plan", "-no-color"]).await?;
    assert!(planned.contains("No changes"), "{planned}");

    let second = SMALL.replace("\"first\"", "\"second\"") + &secret("canary-2");
    desk.write("main.tf", &format!("{BACKEND}{second}"))?;
    desk.terraform(&["apply", "-auto-approve"]).await?;
    let diff = desk.latchkey(&["state", "diff", "web"], "").await?;
    assert!(diff.contains("~ terraform_data.one\n    input: \"first\" -> \"second\"\n"), "{diff}");
    assert!(diff.contains("~ output.one\n    value: \"first\" -> \"second\"\n"), "{diff}");

    assert!(diff.contains("    triggers_replace.password: (sensitive)\n"), "{diff}");
    assert!(!diff.contains("canary"), "{diff}");

    // Only under the environment's name, and then the next plan shows the difference.
    let refused = desk.try_latchkey(&["state", "rollback", "web", "1"], "other").await?;
    assert!(said(&refused).contains("type the environment's name"), "{}", said(&refused));
    desk.latchkey(&["state", "rollback", "web", "1"], "web").await?;
    let all: Value =
        serde_json::from_str(&desk.latchkey(&["-o", "json", "state", "list", "web"], "").await?)?;
    assert_eq!(all["versions"][0]["origin"], "rollback");
    assert_eq!((&all["versions"][0]["from_version"], &all["lock"]), (&1.into(), &Value::Null));
    let newest = all["versions"][1]["serial"].as_u64().context("it has a serial")?;
    assert_eq!(all["versions"][0]["serial"].as_u64(), Some(newest + 1));
    let planned = desk.terraform(&["plan", "-no-color"]).await?;
    assert!(planned.contains("\"first\" -> \"second\""), "{planned}");

    // The state of something else, or of before, is refused, even by force.
    let state = desk.terraform(&["state", "pull"]).await?;
    let mut other: Value = serde_json::from_str(&state)?;
    other["lineage"] = "another".into();
    other["serial"] = 1000.into();
    desk.write("other.tfstate", &other.to_string())?;
    let refused = desk.try_terraform(&["state", "push", "-force", "other.tfstate"]).await?;
    assert!(said(&refused).contains("409"), "{}", said(&refused));
    let other = desk.path("other.tfstate").display().to_string();
    let refused = desk.try_latchkey(&["state", "import", "web", &other], "").await?;
    assert!(said(&refused).contains("another lineage"), "{}", said(&refused));
    let refused = desk.try_latchkey(&["state", "import", "web", &file], "").await?;
    assert!(said(&refused).contains("not above the current"), "{}", said(&refused));

    let kept = desk.path("kept.tfstate").display().to_string();
    desk.latchkey(&["state", "download", "web", &kept, "--version", "1"], "").await?;
    assert_eq!(fs::read(&kept)?, fs::read(&file)?);
    let records = ada.audit_records("").await?;
    let told = |action: &str| records.iter().filter(|record| record.action == action).count();
    assert_eq!((told("import_state"), told("rollback_state"), told("push_state")), (1, 1, 1));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lock_that_was_left_behind_is_taken_away_by_its_id() -> anyhow::Result<()> {
    let stage = bare_stage().await?;
    let ada = &stage.owner;
    let desk = Workstation::new(&stage, ada, "web").await?;
    let (started, gate) = (stage.shared().join("started"), stage.shared().join("gate"));
    desk.write("main.tf", &format!("{BACKEND}{}", crate::gated::gated_apply(&started, &gate)))?;
    desk.terraform(&["init", "-input=false"]).await?;
    let mut dying = Box::pin(desk.try_terraform(&["apply", "-auto-approve"]));
    tokio::select! {
        ended = &mut dying => anyhow::bail!("it ended: {ended:?}"),
        begun = crate::gated::wait_for_file(&started) => begun?,
    }
    // Killed: nobody gives the lock back.
    drop(dying);
    let lock = ada.environment("web").await?.state_lock.context("it is locked")?.lock_id;
    let refused = desk.try_terraform(&["plan", "-no-color"]).await?;
    assert!(said(&refused).contains(&format!("ID={lock} of ada")), "{}", said(&refused));
    // Terraform's own way cannot say whose lock it means.
    let refused = desk.try_terraform(&["force-unlock", "-force", &lock]).await?;
    assert!(!refused.status.success());
    let refused = desk.try_latchkey(&["state", "unlock", "web"], "no").await?;
    assert!(said(&refused).contains("not the id of the lock"), "{}", said(&refused));
    desk.latchkey(&["state", "unlock", "web"], &lock).await?;
    fs::write(&gate, "")?;
    desk.terraform(&["apply", "-auto-approve"]).await?;

    // Whose token it is decides.
    let bob = ada.create_user(&stage.plane, "bob", v1::Role::Member).await?;
    let mut other = Workstation::new(&stage, &bob, "web").await?;
    other.write("main.tf", BACKEND)?;
    let refused = other.try_terraform(&["init", "-input=false"]).await?;
    assert!(
        said(&refused).contains("HTTP remote state endpoint invalid auth"),
        "{}",
        said(&refused)
    );
    for (_, value) in other.backend.iter_mut().filter(|(name, _)| name == "TF_HTTP_PASSWORD") {
        *value = "lk_unknown".into();
    }
    let refused = other.try_terraform(&["init", "-input=false"]).await?;
    assert!(
        said(&refused).contains("HTTP remote state endpoint requires auth"),
        "{}",
        said(&refused)
    );
    Ok(())
}
