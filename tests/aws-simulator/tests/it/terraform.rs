//! The real terraform against the simulation: its S3 backend assumes a role that demands MFA, so
//! the mark must travel through terraform's own AWS SDK.

use std::path::Path;
use std::process::Output;

use latchkey_aws_simulator::{Clock, Outcome, Simulator, World};
use tokio::process::Command;

use crate::support::{Answer, Client, DEPLOY, SERIAL};

fn configuration(url: &str) -> String {
    format!(
        r#"
terraform {{
  backend "s3" {{
    bucket                      = "latchkey-state"
    key                         = "demo/terraform.tfstate"
    region                      = "us-east-1"
    use_path_style              = true
    use_lockfile                = true
    skip_requesting_account_id  = false
    endpoints                   = {{ s3 = "{url}", sts = "{url}" }}
    assume_role                 = {{ role_arn = "{DEPLOY}", session_name = "run-7" }}
  }}
}}

resource "terraform_data" "one" {{
  input = "kept in the bucket"
}}

output "one" {{
  value = terraform_data.one.output
}}
"#
    )
}

async fn terraform(directory: &Path, session: &Answer, arguments: &[&str]) -> Output {
    Command::new("terraform")
        .args(arguments)
        .current_dir(directory)
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap_or_default())
        .env("HOME", directory)
        .env("TF_IN_AUTOMATION", "1")
        .env("TF_INPUT", "0")
        .env("CHECKPOINT_DISABLE", "1")
        .env("AWS_EC2_METADATA_DISABLED", "true")
        .env("AWS_ACCESS_KEY_ID", session.text("AccessKeyId"))
        .env("AWS_SECRET_ACCESS_KEY", session.text("SecretAccessKey"))
        .env("AWS_SESSION_TOKEN", session.text("SessionToken"))
        .kill_on_drop(true)
        .output()
        .await
        .expect("terraform is on the PATH: install terraform 1.11 or newer to run this test")
}

fn said(output: &Output) -> String {
    let (stdout, stderr) = (&output.stdout, &output.stderr);
    format!("{}{}", String::from_utf8_lossy(stdout), String::from_utf8_lossy(stderr))
}

#[tokio::test]
async fn terraform_reaches_its_state_with_the_mark_and_not_without() {
    let simulator = Simulator::start(World::example(), Clock::wall()).await.unwrap();
    let user = Client::of(&simulator);
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    std::fs::write(path.join("main.tf"), configuration(&simulator.url())).unwrap();

    let plain = user.sts("GetSessionToken", &[]).await;
    let refused = terraform(path, &plain, &["init", "-no-color"]).await;
    assert!(!refused.status.success(), "{}", said(&refused));
    assert!(said(&refused).contains("is not authorized to perform"), "{}", said(&refused));

    let session = user.session(&simulator.unused_code(SERIAL).unwrap()).await;
    for arguments in [
        &["init", "-no-color"][..],
        &["plan", "-no-color", "-out=plan"],
        &["apply", "-no-color", "plan"],
        &["output", "-no-color"],
        &["workspace", "new", "-no-color", "other"],
    ] {
        let output = terraform(path, &session, arguments).await;
        assert!(output.status.success(), "{arguments:?}: {}", said(&output));
    }
    let state = simulator.object("latchkey-state", "demo/terraform.tfstate").unwrap();
    assert!(String::from_utf8(state).unwrap().contains("kept in the bucket"));
    let lock = simulator.object("latchkey-state", "demo/terraform.tfstate.tflock");
    assert!(lock.is_none(), "the lock is given back");
    let put = simulator.calls().into_iter().find(|call| call.action == "PutObject").unwrap();
    let caller = "arn:aws:sts::123456789012:assumed-role/deploy/run-7";
    assert_eq!((put.caller.as_deref(), put.outcome), (Some(caller), Outcome::Accepted));
}
