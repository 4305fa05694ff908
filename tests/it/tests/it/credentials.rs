//! What phases are given: the phase's role by a code and without one, and long-term keys where
//! owners ask for them, through the real terraform and its S3 backend; what a job sees of another
//! code in the middle of its apply; what is said of roles before they are assumed. That of the
//! session a code buys is told in `provider.rs`, of terraform's own part in a top-up in
//! `top_up.rs`, of the doctor and what follows in `doctor.rs`.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use latchkey_harness::{Configuration, Person, Stage, StageOptions, is_ended, reason};
use latchkey_proto::v1;
use latchkey_proto::v1::{CheckOutcome, CodeCredentials, MfaPolicy, PlainCredentials, RunState};

use crate::gated::{SMALL, wait_for_file, with_s3, with_s3_as_given};
use crate::support::{options, roles, settings, stage};
use crate::terminal::Terminal;

#[tokio::test]
async fn codes_assume_the_phases_roles_and_terraform_works_in_them() {
    let stage = stage().await.unwrap();
    let ada = &stage.owner;
    let settings = v1::EnvironmentSettings {
        code_credentials: CodeCredentials::Role.into(),
        roles: roles("read", "deploy"),
        ..settings(MfaPolicy::PlansAndApplies)
    };
    ada.create_environment_with("web", settings).await.unwrap();
    let run = ada.queue("web", &with_s3_as_given(&stage)).await.unwrap();
    ada.authenticate(&run.run_id, &stage.aws.unused_code().await.unwrap()).await.unwrap();
    let run = ada.wait_for_state(&run.run_id, RunState::AwaitingApplyMfa).await.unwrap();
    let planned_by = run.plan.unwrap().authenticated.unwrap();
    assert_eq!(planned_by.role_arn, "arn:aws:iam::123456789012:role/read");
    assert!(planned_by.packed_policy_percent > 0);
    ada.authenticate(&run.run_id, &stage.aws.unused_code().await.unwrap()).await.unwrap();
    ada.wait_for_state(&run.run_id, RunState::Applied).await.unwrap();

    let aws = stage.aws.simulator();
    let state = aws.object("latchkey-state", "web/terraform.tfstate").expect("the state is there");
    assert!(String::from_utf8(state).unwrap().contains("kept in the bucket"));
    let calls = aws.calls();
    let assumed: Vec<_> = calls.iter().filter(|call| call.action == "AssumeRole").collect();
    assert_eq!(assumed.len(), 2, "each by a code, and none by terraform");
    assert!(assumed.iter().all(|call| call.had_code && call.members["SourceIdentity"] == "ada"));
    // CloudTrail shows whose work it is.
    let session = format!("assumed-role/deploy/run-{}", run.run_id);
    let puts = calls.iter().filter(|call| call.action == "PutObject");
    assert!(puts.clone().count() > 0);
    assert!(puts.filter_map(|call| call.caller.as_ref()).any(|arn| arn.ends_with(&session)));
}

#[tokio::test]
async fn without_a_code_a_role_and_long_term_keys_work_where_owners_say_so() {
    let stage = stage().await.unwrap();
    let ada = &stage.owner;
    let in_role = v1::EnvironmentSettings {
        plain_credentials: PlainCredentials::Role.into(),
        roles: roles("read", "read"),
        ..settings(MfaPolicy::Never)
    };
    let refused = ada.create_environment_with("role", in_role.clone()).await.unwrap_err();
    assert_eq!(reason(&refused), "MFA_REQUIRED");
    let code = stage.aws.unused_code().await.unwrap();
    ada.create_environment_by("role", in_role, &code).await.unwrap();
    let of_keys = v1::EnvironmentSettings {
        plain_credentials: PlainCredentials::Static.into(),
        ..settings(MfaPolicy::Never)
    };
    let code = stage.aws.unused_code().await.unwrap();
    let environment = ada.create_environment_by("static", of_keys, &code).await.unwrap();
    assert!(environment.warnings[0].contains("long-term AWS keys"), "{environment:?}");
    for (name, configuration) in
        [("role", with_s3_as_given(&stage)), ("static", with_s3(&stage, "read"))]
    {
        let run = ada.queue(name, &configuration).await.unwrap();
        // The second finds the state that the first has made, and nothing to change.
        if name == "role" {
            ada.wait_for_state(&run.run_id, RunState::AwaitingConfirmation).await.unwrap();
            ada.confirm(&run.run_id).await.unwrap();
            ada.wait_for_state(&run.run_id, RunState::Applied).await.unwrap();
        } else {
            ada.wait_for_state(&run.run_id, RunState::Planned).await.unwrap();
        }
        let records = format!("{:?}", ada.audit_records(&run.run_id).await.unwrap());
        let told = records.contains("long-term keys themselves");
        assert_eq!(told, name == "static", "{records}");
    }
    let key = &stage.aws.facts().access_key_id;
    let calls = stage.aws.simulator().calls();
    // terraform's own SDK takes keys without a token and an expiry from the endpoint.
    assert!(calls.iter().any(|call| {
        call.action == "AssumeRole"
            && call.access_key_id.as_ref() == Some(key)
            && !call.members.contains_key("SourceIdentity")
    }));
    // The codes by which the environments were made, and none for a run.
    assert_eq!(calls.iter().filter(|call| call.had_code).count(), 2);
}

/// An apply that looks at its credentials before its gate is opened and again behind it, until they
/// are others.
struct Looking {
    shared: PathBuf,
}

impl Looking {
    fn new(stage: &Stage) -> Self {
        Self { shared: stage.shared() }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.shared.join(name)
    }

    fn configuration(&self) -> Configuration {
        let shown = |path: &Path| path.display().to_string();
        let (before, gate, after) =
            (shown(&self.file("before")), shown(&self.file("gate")), shown(&self.file("after")));
        let main = format!(
            r#"
resource "terraform_data" "looks" {{
  provisioner "local-exec" {{
    command = <<-EOT
      key() {{
        curl -s -H "Authorization: $(cat "$AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE")" \
          "$AWS_CONTAINER_CREDENTIALS_FULL_URI" | grep -o '"AccessKeyId":"[A-Z0-9]*"'
      }}
      key > {before}.new && mv {before}.new {before}
      while [ ! -e {gate} ]; do sleep 0.05; done
      until [ "$(key)" != "$(cat {before})" ]; do sleep 0.05; done
      key > {after}
    EOT
  }}
}}
"#
        );
        Configuration::of(&[("main.tf", &main)])
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.file(name)).unwrap()
    }
}

async fn top_up(person: &Person, run_id: &str, code: &str, id: &str) -> v1::Run {
    let request = v1::TopUpRequest {
        run_id: run_id.to_owned(),
        token_code: code.to_owned(),
        request_id: id.to_owned(),
    };
    person.runs().top_up(request).await.unwrap().into_inner().run.unwrap_or_default()
}

#[tokio::test]
async fn a_running_apply_gets_the_session_of_another_code_without_a_restart() {
    let stage = stage().await.unwrap();
    let ada = &stage.owner;
    ada.create_environment("web", MfaPolicy::AppliesOnly).await.unwrap();
    let looking = Looking::new(&stage);
    let run = ada.queue("web", &looking.configuration()).await.unwrap();
    ada.wait_for_state(&run.run_id, RunState::AwaitingApplyMfa).await.unwrap();
    ada.authenticate(&run.run_id, &stage.aws.unused_code().await.unwrap()).await.unwrap();
    wait_for_file(&looking.file("before")).await.unwrap();
    let code = stage.aws.unused_code().await.unwrap();
    let topped = top_up(ada, &run.run_id, &code, "more").await;
    assert_eq!(topped.state(), RunState::Applying);
    fs::write(looking.file("gate"), "").unwrap();
    let run = ada.wait_for_state(&run.run_id, RunState::Applied).await.unwrap();
    assert_ne!(looking.read("before"), looking.read("after"));
    let apply = run.apply.unwrap();
    assert_eq!(apply.epoch, 1, "terraform went on");
    let authenticated = apply.authenticated.unwrap();
    assert_eq!(authenticated.top_ups.len(), 1);
    assert_eq!(authenticated.top_ups[0].user, "ada");
    let records = ada.audit_records(&run.run_id).await.unwrap();
    for action in ["submit_top_up", "top_up"] {
        assert!(records.iter().any(|record| record.action == action), "{action}");
    }
    assert_eq!(stage.aws.requests_with_code(&code).await.unwrap(), 1);
}

#[tokio::test]
async fn a_runner_that_was_away_gets_the_new_session_when_it_is_back() {
    let mut stage = stage().await.unwrap();
    let ada = stage.owner.clone();
    ada.create_environment("web", MfaPolicy::AppliesOnly).await.unwrap();
    let looking = Looking::new(&stage);
    let run = ada.queue("web", &looking.configuration()).await.unwrap();
    ada.wait_for_state(&run.run_id, RunState::AwaitingApplyMfa).await.unwrap();
    ada.authenticate(&run.run_id, &stage.aws.unused_code().await.unwrap()).await.unwrap();
    wait_for_file(&looking.file("before")).await.unwrap();
    stage.runners[0].kill().await.unwrap();
    top_up(&ada, &run.run_id, &stage.aws.unused_code().await.unwrap(), "more").await;
    fs::write(looking.file("gate"), "").unwrap();
    stage.runners[0].restart().unwrap();
    let run = ada.wait_for_run(&run.run_id, "the end", is_ended).await.unwrap();
    assert_eq!(run.state(), RunState::Applied, "{}", run.reason);
    assert_ne!(looking.read("before"), looking.read("after"));
}

#[tokio::test]
async fn the_doctor_tries_both_roles_with_one_code() {
    let stage = stage().await.unwrap();
    let ada = &stage.owner;
    let settings = v1::EnvironmentSettings {
        code_credentials: CodeCredentials::Role.into(),
        roles: roles("read", "deploy"),
        ..settings(MfaPolicy::PlansAndApplies)
    };
    ada.create_environment_with("web", settings).await.unwrap();
    let code = stage.aws.unused_code().await.unwrap();
    let request = v1::CheckEnvironmentRequest {
        organization: ada.organization.clone(),
        environment: "web".into(),
        token_code: code.clone(),
        request_id: "check".into(),
    };
    let answer = ada.environments().check_environment(request).await.unwrap().into_inner();
    let failed: Vec<_> =
        answer.steps.iter().filter(|step| step.outcome() == CheckOutcome::Failed).collect();
    assert!(failed.is_empty(), "{failed:#?}");
    for name in ["triple", "keys", "device", "plan_role", "apply_role"] {
        let step = answer.steps.iter().find(|step| step.name == name);
        assert_eq!(step.unwrap().outcome(), CheckOutcome::Ok, "{name}");
    }
    let calls = stage.aws.simulator().calls();
    assert_eq!(calls.iter().filter(|call| call.had_code).count(), 1);
    assert_eq!(stage.aws.requests_with_code(&code).await.unwrap(), 1);
    assert!(ada.verify_audit().await.unwrap().intact);
}

/// A terraform whose plans are configured with a provider that cannot be had here: `show -json`
/// tells of it as terraform does.
fn with_far_provider(stage: &Stage) -> PathBuf {
    let path = stage.shared().join("terraform");
    let provider = r#""aws.far":{"name":"aws","full_name":"registry.terraform.io/hashicorp/aws","alias":"far","expressions":{"assume_role":[{"duration":{"constant_value":"2h"},"role_arn":{"constant_value":"arn"}}]}}"#;
    let real = stage.terraform.display();
    let script = format!(
        "#!/bin/sh\ncase \"$1 $2\" in\n  'show -json') '{real}' \"$@\" | sed \
         's|\"provider_config\":{{|&{provider},|' ;;\n  *) exec '{real}' \"$@\" \
         ;;\nesac\n"
    );
    fs::write(&path, script).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

#[tokio::test]
async fn a_role_that_would_be_chained_too_long_is_explained_before_the_code() {
    let options = StageOptions { runners: vec![], ..options() };
    let mut stage = Stage::start(options).await.unwrap();
    let terraform = with_far_provider(&stage);
    stage.add_runner_with("far", |options| options.terraform = Some(terraform)).await.unwrap();
    let ada = &stage.owner;
    ada.create_environment("web", MfaPolicy::AppliesOnly).await.unwrap();
    let run = ada.queue("web", &Configuration::of(&[("main.tf", SMALL)])).await.unwrap();
    let run = ada.wait_for_state(&run.run_id, RunState::AwaitingApplyMfa).await.unwrap();
    let why = "provider aws.far assumes a role for 2 h, and AWS allows 1 h to a role";
    assert!(run.warnings.iter().any(|warning| warning.starts_with(why)), "{:?}", run.warnings);
    let terminal = Terminal::of_owner(&stage).await;
    let shown = terminal.done(&format!("run show {}", run.run_id), "").await;
    let (warned, next) = (shown.find(&format!("WARNING: {why}")), shown.find("next: latchkey"));
    assert!(warned.is_some() && warned < next, "{shown}");

    // What it is about is over once the apply has begun.
    ada.authenticate(&run.run_id, &stage.aws.unused_code().await.unwrap()).await.unwrap();
    let run = ada.wait_for_state(&run.run_id, RunState::Applied).await.unwrap();
    assert!(run.warnings.is_empty(), "{:?}", run.warnings);
}

#[tokio::test]
async fn bounds_of_a_session_are_told_on_the_command_line() {
    let stage = Stage::start(StageOptions { runners: vec![], ..options() }).await.unwrap();
    let terminal = Terminal::of_owner(&stage).await;
    let of_roles = "--code-credentials role --plan-role arn:aws:iam::123456789012:role/read \
                    --apply-role arn:aws:iam::123456789012:role/deploy";
    let create = format!("env create web --session-duration 20h {of_roles}");
    let told = terminal.done(&create, "").await;
    assert!(told.contains("live 12 h at most") && told.contains("not 20 h"), "{told}");
    for duration in ["14m", "37h"] {
        let set = format!("env set web --session-duration {duration}");
        let (code, _, err) = terminal.run(&set, "").await;
        assert_eq!(code, 1, "{err}");
        for part in ["FIELD_INVALID", "session_duration", "15 minutes to 36 hours", "1h"] {
            assert!(err.contains(part), "{part}: {err}");
        }
    }
    let kept = terminal.json("env show web").await;
    assert_eq!(kept["session_duration_seconds"], 20 * 3600, "{kept}");
}
