//! What the stories share.

use latchkey_harness::{Configuration, Programs, Stage, StageOptions};
use latchkey_proto::v1;
use latchkey_proto::v1::{MfaPolicy, RunState};

/// The executable that contains every program.
pub(crate) fn programs() -> Programs {
    Programs::in_one(env!("CARGO_BIN_EXE_latchkey-it"))
}

pub(crate) fn options() -> StageOptions {
    StageOptions::new(programs())
}

/// A stage with one runner and the simulated AWS in this process.
pub(crate) async fn stage() -> anyhow::Result<Stage> {
    Stage::start(options()).await
}

/// Settings of an environment whose jobs the stage's runners execute.
pub(crate) fn settings(policy: MfaPolicy) -> v1::EnvironmentSettings {
    v1::EnvironmentSettings {
        mfa_policy: policy.into(),
        pool: Stage::POOL.to_owned(),
        ..Default::default()
    }
}

/// Roles of the simulated account, for the plan and the apply.
pub(crate) fn roles(plan: &str, apply: &str) -> Option<v1::Roles> {
    let role = |name: &str| {
        let arn = format!("arn:aws:iam::123456789012:role/{name}");
        Some(v1::RoleSettings { arn, ..Default::default() })
    };
    Some(v1::Roles { plan: role(plan), apply: role(apply) })
}

/// Two resources, an input variable, a line from a `local-exec`, an output.
pub(crate) fn small() -> Configuration {
    Configuration::of(&[(
        "main.tf",
        r#"
variable "greeting" {
  type    = string
  default = "hello"
}

resource "terraform_data" "first" {
  input = var.greeting
}

resource "terraform_data" "second" {
  input = terraform_data.first.output
  provisioner "local-exec" {
    command = "echo the local-exec says ${var.greeting}"
  }
}

output "said" {
  value = terraform_data.second.output
}
"#,
    )])
}

/// Takes repeats of a state out of what a stream told.
pub(crate) fn states(seen: &[v1::Run]) -> Vec<RunState> {
    let mut states: Vec<RunState> = seen.iter().map(v1::Run::state).collect();
    states.dedup();
    states
}
