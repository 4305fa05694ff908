//! Configurations that a test holds in its hand: they plan or apply only when it lets them.

use std::path::Path;

use latchkey_harness::{Configuration, Stage};

/// One resource, one output.
pub(crate) const SMALL: &str = r#"
resource "terraform_data" "one" {
  input = "first"
}

output "one" {
  value = terraform_data.one.output
}
"#;

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
    command = "touch {started}; while [ ! -e {gate} ]; do sleep 0.05; done; echo the gate is open"
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
    let url = &stage.aws.facts().url;
    let main = format!(
        r#"
terraform {{
  backend "s3" {{
    bucket         = "latchkey-state"
    key            = "web/terraform.tfstate"
    region         = "us-east-1"
    use_path_style = true
    use_lockfile   = true
    endpoints      = {{ s3 = "{url}", sts = "{url}" }}
    assume_role    = {{ role_arn = "arn:aws:iam::123456789012:role/{role}" }}
  }}
}}

resource "terraform_data" "one" {{
  input = "kept in the bucket"
}}
"#
    );
    Configuration::of(&[("main.tf", &main)])
}
