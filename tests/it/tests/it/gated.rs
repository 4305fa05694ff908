//! Configurations that a test holds in its hand: they plan or apply only when it lets them.

use std::fs;
use std::path::{Path, PathBuf};

use latchkey_harness::{Configuration, LIMIT, Stage, wait_for};
use latchkey_proto::v1::RunState;

/// One resource, one output.
pub(crate) const SMALL: &str = r#"
resource "terraform_data" "one" {
  input = "first"
}

output "one" {
  value = terraform_data.one.output
}
"#;

/// An apply that begins and then waits for its gate to be opened.
pub(crate) struct Gated {
    started: PathBuf,
    gate: PathBuf,
}

impl Gated {
    pub(crate) fn new(stage: &Stage) -> Self {
        let within = |name: &str| stage.shared().join(name);
        Self { started: within("started"), gate: within("gate") }
    }

    pub(crate) fn configuration(&self) -> Configuration {
        Configuration::of(&[("main.tf", &gated_apply(&self.started, &self.gate))])
    }

    /// The same with its state in the simulated S3, behind `role`; see [`with_s3`].
    pub(crate) fn with_s3(&self, stage: &Stage, role: &str) -> Configuration {
        self.kept_by(&s3_backend(stage, &assumed(role)))
    }

    /// The same with the credentials as they are given.
    pub(crate) fn with_s3_as_given(&self, stage: &Stage) -> Configuration {
        self.kept_by(&s3_backend(stage, ""))
    }

    fn kept_by(&self, backend: &str) -> Configuration {
        let main = gated_apply(&self.started, &self.gate);
        Configuration::of(&[("main.tf", &main), ("backend.tf", backend)])
    }

    /// Queues, confirms, and returns the run's id when its apply has begun.
    pub(crate) async fn begin(&self, stage: &Stage, environment: &str) -> anyhow::Result<String> {
        let ada = &stage.owner;
        let run_id = ada.queue(environment, &self.configuration()).await?.run_id;
        ada.wait_for_state(&run_id, RunState::AwaitingConfirmation).await?;
        ada.confirm(&run_id).await?;
        self.wait_until_begun().await?;
        Ok(run_id)
    }

    pub(crate) async fn wait_until_begun(&self) -> anyhow::Result<()> {
        wait_for_file(&self.started).await
    }

    pub(crate) fn open(&self) -> anyhow::Result<()> {
        Ok(fs::write(&self.gate, "")?)
    }

    /// How often terraform got to the gate.
    pub(crate) fn starts(&self) -> usize {
        fs::read_to_string(&self.started).unwrap_or_default().lines().count()
    }
}

pub(crate) async fn wait_for_file(path: &Path) -> anyhow::Result<()> {
    wait_for(&format!("the file {}", path.display()), LIMIT, async || {
        path.exists().then_some(()).ok_or_else(|| "no file".to_owned())
    })
    .await
}

/// Applies only once the file `gate` exists; says so when it begins.
pub(crate) fn gated_apply(started: &Path, gate: &Path) -> String {
    format!(
        r#"
resource "terraform_data" "first" {{
  input = "kept in the state"
}}

resource "terraform_data" "gated" {{
  depends_on = [terraform_data.first]
  provisioner "local-exec" {{
    command = "echo started >> {started}; while [ ! -e {gate} ]; do sleep 0.05; done; echo the gate is open"
  }}
}}
"#,
        started = started.display(),
        gate = gate.display()
    )
}

/// Keeps its state in the simulated S3, behind a role that demands MFA or, as `read`, none. Its
/// plan takes as long as AWS takes to answer, which is the test's to script.
pub(crate) fn with_s3(stage: &Stage, role: &str) -> Configuration {
    kept_in_s3(&s3_backend(stage, &assumed(role)))
}

/// The same with the credentials as they are given, for sessions of a role.
pub(crate) fn with_s3_as_given(stage: &Stage) -> Configuration {
    kept_in_s3(&s3_backend(stage, ""))
}

fn kept_in_s3(backend: &str) -> Configuration {
    let main = r#"
resource "terraform_data" "one" {
  input = "kept in the bucket"
}
"#;
    Configuration::of(&[("main.tf", main), ("backend.tf", backend)])
}

fn assumed(role: &str) -> String {
    format!("assume_role    = {{ role_arn = \"arn:aws:iam::123456789012:role/{role}\" }}")
}

fn s3_backend(stage: &Stage, assume_role: &str) -> String {
    let url = &stage.aws.facts().url;
    format!(
        r#"
terraform {{
  backend "s3" {{
    bucket         = "latchkey-state"
    key            = "web/terraform.tfstate"
    region         = "us-east-1"
    use_path_style = true
    use_lockfile   = true
    endpoints      = {{ s3 = "{url}", sts = "{url}" }}
    {assume_role}
  }}
}}
"#
    )
}
