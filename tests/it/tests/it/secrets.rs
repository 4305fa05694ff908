//! Planted secrets are searched in everything that a whole story leaves behind, at TRACE.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use latchkey_harness::{Configuration, PlaneOptions, Stage, StageOptions, files_with};
use latchkey_proto::v1::variable_scope::Scope;
use latchkey_proto::v1::{MfaPolicy, Phase, RunState, VariableCategory};

use crate::support::options;

const CANARY: &str = "canary-of-a-sensitive-variable-4711";

/// Reads the session from the credentials endpoint, as any code in a job can; writes it where
/// the test finds it, and prints it, which must not reach the log.
fn leaking(outside: &std::path::Path) -> String {
    format!(
        r#"
variable "password" {{
  type      = string
  sensitive = true
}}

resource "terraform_data" "leak" {{
  input = nonsensitive(var.password)

  provisioner "local-exec" {{
    interpreter = ["bash", "-c"]
    command     = <<-SCRIPT
      address=$${{AWS_CONTAINER_CREDENTIALS_FULL_URI#http://}}
      host=$${{address%%/*}}
      exec 3<>"/dev/tcp/$${{host%:*}}/$${{host#*:}}"
      printf 'GET /%s HTTP/1.1\r\nHost: %s\r\nAuthorization: %s\r\nConnection: close\r\n\r\n' \
        "$${{address#*/}}" "$host" "$(cat "$AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE")" >&3
      answer=$(cat <&3)
      printf '%s' "$answer" > {outside}
      echo "leaked: $answer"
      echo "variable: ${{nonsensitive(var.password)}}"
      env | grep -c AWS_SECRET_ACCESS_KEY || true
    SCRIPT
  }}
}}
"#,
        outside = outside.display()
    )
}

/// What the command line says, on both of its outputs, when a person looks at all there is.
async fn said_by_the_cli(stage: &Stage, run_id: &str) -> String {
    let config = stage.directory().join("cli.json");
    let signed_in = serde_json::json!({
        "address": stage.plane.people_url(),
        "ca_pem": stage.plane.ca_pem().unwrap(),
        "token": stage.owner.token(),
        "organization": stage.owner.organization,
    });
    fs::write(&config, signed_in.to_string()).unwrap();
    fs::set_permissions(&config, fs::Permissions::from_mode(0o600)).unwrap();
    let mut said = String::new();
    for arguments in [
        &["run", "show", run_id][..],
        &["run", "show", run_id, "-o", "json"],
        &["logs", run_id],
        &["logs", run_id, "--raw"],
        &["var", "list", "--environment", "web", "-o", "json"],
        &["var", "list", "--organization-wide", "-o", "json"],
        &["audit", "list", "-o", "json"],
        &["whoami"],
    ] {
        let mut command = stage.programs().cli().command();
        let output =
            command.env("LATCHKEY_CONFIG", &config).args(arguments).output().await.unwrap();
        assert!(output.status.success(), "{arguments:?}: {output:?}");
        said.push_str(&String::from_utf8_lossy(&output.stdout));
        said.push_str(&String::from_utf8_lossy(&output.stderr));
    }
    // The one place where the token belongs.
    fs::remove_file(&config).unwrap();
    said
}

/// The value of a field of the endpoint's JSON answer.
fn field(answer: &str, name: &str) -> String {
    let body = &answer[answer.find('{').expect("a JSON body")..=answer.rfind('}').unwrap()];
    let body: serde_json::Value = serde_json::from_str(body).unwrap();
    body[name].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn no_secret_is_left_anywhere() {
    let outside = tempfile::tempdir().unwrap();
    let answer_file = outside.path().join("answer");
    let options = StageOptions {
        plane: PlaneOptions { log: Some("trace".into()), ..PlaneOptions::default() },
        runner_log: Some("trace".into()),
        ..options()
    };
    let stage = Stage::start(options).await.unwrap();
    let ada = &stage.owner;
    ada.create_environment("web", MfaPolicy::PlansAndApplies).await.unwrap();
    let scope = Scope::Environment("web".into());
    let category = VariableCategory::Terraform;
    ada.set_variable(scope, category, "password", CANARY, true).await.unwrap();
    let main = leaking(&answer_file);
    let run = ada.queue("web", &Configuration::of(&[("main.tf", &main)])).await.unwrap();

    let wrong = stage.aws.wrong_code().await.unwrap();
    ada.authenticate(&run.run_id, &wrong).await.unwrap_err();
    let plan_code = stage.aws.unused_code().await.unwrap();
    ada.authenticate(&run.run_id, &plan_code).await.unwrap();
    ada.wait_for_state(&run.run_id, RunState::AwaitingApplyMfa).await.unwrap();
    let apply_code = stage.aws.unused_code().await.unwrap();
    ada.authenticate(&run.run_id, &apply_code).await.unwrap();
    ada.wait_for_state(&run.run_id, RunState::Applied).await.unwrap();

    let log = ada.log_text(&run.run_id, Phase::Apply).await.unwrap();
    assert!(log.contains("leaked: ") && log.contains("***"), "{log}");
    let answer = fs::read_to_string(&answer_file).unwrap();
    let (secret, token) = (field(&answer, "SecretAccessKey"), field(&answer, "Token"));
    let long_term = stage.aws.facts().secret_access_key.expose().to_owned();
    assert_ne!(secret, long_term, "a runner never holds a long-term key");

    let said = said_by_the_cli(&stage, &run.run_id).await;
    assert!(said.contains("Applied") && said.contains("leaked: "));
    for (what, planted) in [
        ("the session's secret key", secret.as_str()),
        ("the session token", token.as_str()),
        ("the long-term secret key", long_term.as_str()),
        ("the sensitive variable", CANARY),
        ("the owner's token", ada.token()),
    ] {
        assert!(!log.contains(planted), "{what} is in the run's log");
        assert!(!said.contains(planted), "the command line says {what}");
        let found = files_with(stage.directory(), planted.as_bytes()).unwrap();
        assert!(found.is_empty(), "{what} is in {found:?}");
    }
    for code in [&wrong, &plan_code, &apply_code] {
        let whole = said.split(|c: char| !c.is_ascii_alphanumeric()).any(|word| word == code);
        assert!(!whole, "the command line says a token code");
    }
    // Six digits may stand anywhere by chance, as part of a longer number: only whole ones count.
    for (what, code) in [("wrong", &wrong), ("plan", &plan_code), ("apply", &apply_code)] {
        for file in files_with(stage.directory(), code.as_bytes()).unwrap() {
            let text = String::from_utf8_lossy(&fs::read(&file).unwrap()).into_owned();
            let whole = text.match_indices(code.as_str()).any(|(at, _)| {
                let digit = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric());
                !digit(text[..at].chars().next_back()) && !digit(text[at + 6..].chars().next())
            });
            let is_text = !file.components().any(|part| part.as_os_str() == "blobs");
            assert!(!(whole && is_text), "the {what} code is in {}", file.display());
        }
    }
}
