//! `dev`: the demo's tree, left running, with the CLI signed in.

use std::io::Write;

use anyhow::Context;
use latchkey_harness::Stage;
use latchkey_proto::v1::variable_scope::Scope;
use latchkey_proto::v1::{MfaPolicy, VariableCategory};

use crate::narrator::Narrator;
use crate::play::Player;
use crate::{example, stage};

/// Starts everything, says how to use it, and stays until Ctrl-C.
pub(crate) async fn run() -> anyhow::Result<()> {
    let mut stage = stage().await?;
    let config = stage.directory().join("ada.json");
    let address = stage.plane.people_url();
    let (ca_file, token) = (stage.plane.ca_file(), stage.owner.token());
    Player::sign_in(Narrator::new(), &config, &address, ca_file, token).await?;
    stage.owner.create_environment("web", MfaPolicy::PlansAndApplies).await?;
    let (scope, category) = (Scope::Environment("web".into()), VariableCategory::Terraform);
    let set = stage.owner.set_variable(scope, category, "release", "2026.11", false).await;
    set.context("failed to set the example's variable")?;
    show(&stage, &config.display().to_string()).context("failed to say how to use it")?;
    tokio::select! {
        interrupted = tokio::signal::ctrl_c() => {
            interrupted.context("failed to listen for Ctrl-C")?;
        }
        ended = one_ends(&mut stage) => {
            let logs = stage.keep_directory().join("logs");
            anyhow::bail!("{ended} has ended by itself; logs: {}", logs.display());
        }
    }
    writeln!(anstream::stdout(), "\nStopped; everything is removed.").context("failed to say so")
}

fn show(stage: &Stage, config: &str) -> std::io::Result<()> {
    let aws = stage.aws.facts().address;
    let example = example();
    let example = example.display();
    let logs = stage.directory().join("logs");
    let logs = logs.display();
    let people = stage.plane.people_url();
    let terraform = stage.terraform.display();
    write!(
        anstream::stdout(),
        "\
Latchkey runs:
  control plane   {people}
  simulated AWS   http://{aws}
  a runner        with {terraform}

You are ada, owner of acme; its environment web demands a code for plans and one for applies.
In another terminal, in this directory:

  export LATCHKEY_CONFIG={config}
  alias latchkey='cargo run --quiet --package latchkey-cli --'
  alias code='cargo run --quiet --package latchkey-dev -- code {aws}'

  latchkey queue web {example} --watch
                        queues the example, asks for codes, follows to the end
  code                  what the device shows: a code that was not used yet
  latchkey --help       the rest

Logs are in {logs}. Ctrl-C stops and removes everything.
"
    )
}

/// Waits until one of the processes ends, which none should.
async fn one_ends(stage: &mut Stage) -> String {
    loop {
        if let Some(name) = stage.ended() {
            return name;
        }
        tokio::time::sleep(std::time::Duration::from_millis(500)).await;
    }
}
