//! A device is lost: whoever has the control plane's host breaks the glass, everybody hears of it,
//! and the team works on with a new device. Nobody else on the host can.

use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::Output;

use anyhow::Context;
use latchkey_aws_simulator::User;
use latchkey_harness::{Mail, Stage, StageOptions, finished};
use latchkey_proto::v1::variable_scope::Scope;
use latchkey_proto::v1::{MfaPolicy, RunState};

use crate::support::{options, small};
use crate::terminal::Cli;
use crate::told::{Told, check_signature};

const CLEAR: [&str; 5] = ["break-glass", "acme", "--clear-triple", "--reason", "the phone is lost"];
const LOWER: [&str; 7] =
    ["break-glass", "acme", "vault", "--policy", "never", "--reason", "it burns\r\nBcc: eve@x"];

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_device_is_replaced_loudly_by_whoever_has_the_host() -> anyhow::Result<()> {
    let told = Told::start().await?;
    let mut options = StageOptions { runners: vec![], ..options() };
    options.plane.arguments = told.arguments();
    let mut stage = Stage::start(options).await?;
    let ada = stage.owner.clone();
    for environment in ["vault", "web"] {
        ada.create_environment(environment, MfaPolicy::PlansAndApplies).await?;
    }
    let said = stage
        .plane
        .on_host(&["break-glass", "acme", "web", "--reason", "x", "--policy", "applies-only"])
        .await?;
    assert!(stdout(&said).contains("Nobody is told"), "{said:?}");
    let cli = Cli::of(&stage, &ada)?;
    // What they chose has nothing to do with it.
    let narrow = ["webhook", "create", &told.hooks.url(), "--event", "applied", "--env", "web"];
    let made = cli.json(&narrow).await?;
    let secret = made["secret"].as_str().context("a webhook has a secret")?;
    cli.text(&["mail", "set", "ops@example.com", "--event", "errored"]).await?;

    // The device is gone, and with it every way to change what it guards.
    let mut facts = stage.aws.facts().clone();
    let (account, lost) = (facts.account_id.clone(), facts.mfa_serial.clone());
    let user = User::with_key_and_device("aws", &account, "bob");
    let world = stage.aws.simulator().change_world(|world| {
        world.remove_device(&lost)?;
        world.add_user(&account, user)?;
        Ok::<_, latchkey_aws_simulator::Invalid>(world.accounts[0].users.clone())
    })?;
    let bob = world.into_iter().find(|user| user.name == "bob").context("bob was added")?;
    facts.access_key_id = bob.access_keys[0].id.clone();
    facts.secret_access_key = bob.access_keys[0].secret.clone();
    facts.mfa_serial = bob.devices[0].serial.clone();
    let whole = || Scope::WholeOrganization(true);
    assert!(ada.set_triple(whole(), &facts).await.is_err(), "without a code");
    let run = ada.queue("vault", &small()).await?;
    assert_eq!(run.state(), RunState::AwaitingPlanMfa);

    // The host clears it.
    let output = stage.plane.on_host(&CLEAR).await?;
    assert!(output.status.success(), "{output:?}");
    let said = stdout(&output);
    assert!(said.contains("Done: the keys and the device of the organization were cleared."));
    assert!(said.contains("Told: 2 of"), "{said}");
    let hook = told
        .hooks
        .wait_for("the cleared triple", |hook| hook.json()["reason"] == "the phone is lost");
    let hook = hook.await?;
    assert_eq!(hook.header("x-latchkey-event"), "break_glass");
    check_signature(&hook, secret)?;
    let is_it = |mail: &Mail| mail.body.contains("the phone is lost");
    let mail = told.mail.wait_for("a mail of it", is_it).await?;
    assert!(mail.encrypted && mail.head.contains("broken open on the control plane"), "{mail:?}");

    // A new device guards from now on; its code opens what waited.
    ada.set_triple(whole(), &facts).await?;
    let code = stage.aws.unused_code_of(&facts.mfa_serial).await?;
    let run = ada.authenticate(&run.run_id, &code).await?;
    assert_eq!(run.state(), RunState::PlanQueued);

    // A policy is lowered; the next run needs no code. The other environment keeps its own.
    let output = stage.plane.on_host(&LOWER).await?;
    assert!(stdout(&output).contains("Done: environment vault: the policy was set to never."));
    let lowered = |mail: &Mail| mail.body.contains("it burns");
    let mail = told.mail.wait_for("a mail of it", lowered).await?;
    assert!(mail.head.contains("acme/vault") && !mail.head.contains("Bcc"), "{mail:?}");
    assert!(!mail.body.lines().any(|line| line.starts_with("Bcc")), "{mail:?}");
    let lowered = |hook: &latchkey_harness::Hook| hook.json()["environment"] == "vault";
    let hook = told.hooks.wait_for("the lowered policy", lowered).await?;
    assert_eq!(hook.header("x-latchkey-event"), "break_glass");
    let run = ada.queue("vault", &small()).await?;
    assert!(matches!(run.state(), RunState::Pending | RunState::PlanQueued), "{run:?}");
    let settings = ada.environment("web").await?.settings.context("it has settings")?;
    assert_eq!(settings.mfa_policy(), MfaPolicy::AppliesOnly);

    // Again it does nothing; and it never does what it was not asked to.
    let output = stage.plane.on_host(&LOWER).await?;
    assert_eq!(stdout(&output).trim(), "Nothing had to be done.");
    for (arguments, complaint) in [
        (["break-glass", "nobody", "--policy", "never", "--reason", "x"], "no such organization"),
        (["break-glass", "acme", "--policy", "never", "--reason", "  "], "say why"),
    ] {
        let output = stage.plane.on_host(&arguments).await?;
        assert!(!output.status.success());
        assert!(stderr(&output).contains(complaint), "{output:?}");
    }

    // It is in the chain, and everybody sees it with the environment.
    let records = ada.audit_records("").await?;
    let broken: Vec<_> = records.iter().filter(|record| record.action == "break_glass").collect();
    assert_eq!(broken.len(), 3, "{broken:?}");
    assert!(broken.iter().all(|record| record.actor == "host"), "{broken:?}");
    assert!(ada.verify_audit().await?.intact);
    let shown = ada.environment("vault").await?.break_glass.context("it is shown")?;
    assert_eq!(shown.reason, "it burnsBcc: eve@x");
    let text = cli.text(&["env", "show", "vault"]).await?;
    assert!(text.contains("break-glass") && text.contains("the policy was set to never"), "{text}");

    // Without a control plane nothing is done.
    stage.plane.stop().await?;
    let output = stage.plane.on_host(&LOWER).await?;
    assert!(stderr(&output).contains("start it first"), "{output:?}");
    Ok(())
}

/// Runs the command as a user who is not the control plane's.
async fn as_another(stage: &Stage) -> anyhow::Result<Output> {
    let mut command = stage.plane.host_command(&LOWER);
    command.uid(65_534).gid(65_534);
    finished("somebody else's command", command).await
}

fn open(path: &Path, mode: u32) -> anyhow::Result<()> {
    Ok(fs::set_permissions(path, Permissions::from_mode(mode))?)
}

#[tokio::test(flavor = "multi_thread")]
async fn another_user_of_the_host_cannot_break_the_glass() -> anyhow::Result<()> {
    let stage = Stage::start(StageOptions { runners: vec![], ..options() }).await?;
    let ada = &stage.owner;
    ada.create_environment("vault", MfaPolicy::PlansAndApplies).await?;
    let (data, socket) = (stage.plane.data_dir(), stage.plane.data_dir().join("host.sock"));
    let mode = |path: &Path| anyhow::Ok(fs::metadata(path)?.permissions().mode() & 0o777);
    assert_eq!((mode(&data)?, mode(&socket)?), (0o700, 0o600));

    // Only root can become somebody else.
    if fs::metadata("/proc/self")?.uid() == 0 {
        open(stage.directory(), 0o755)?;
        let output = as_another(&stage).await?;
        assert!(stderr(&output).contains("Permission denied"), "{output:?}");
        open(&data, 0o755)?;
        let output = as_another(&stage).await?;
        assert!(stderr(&output).contains("Permission denied"), "{output:?}");
        // Not even by a socket that somebody has opened to all.
        open(&socket, 0o777)?;
        let output = as_another(&stage).await?;
        assert!(!output.status.success(), "{output:?}");
        assert!(stderr(&output).contains("own user"), "{output:?}");
    }
    let environment = ada.environment("vault").await?;
    assert!(environment.break_glass.is_none());
    let settings = environment.settings.context("it has settings")?;
    assert_eq!(settings.mfa_policy(), MfaPolicy::PlansAndApplies);
    let records = ada.audit_records("").await?;
    assert!(records.iter().all(|record| record.action != "break_glass"), "{records:?}");
    Ok(())
}
