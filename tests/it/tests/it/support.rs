//! What the stories share.

use latchkey_harness::{Configuration, Programs, Stage, StageOptions};
use latchkey_proto::v1::RunState;

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
pub(crate) fn states(seen: &[latchkey_proto::v1::Run]) -> Vec<RunState> {
    let mut states: Vec<RunState> = seen.iter().map(latchkey_proto::v1::Run::state).collect();
    states.dedup();
    states
}
