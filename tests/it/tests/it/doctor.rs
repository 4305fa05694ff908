//! The doctor on the command line, held against what becomes of the runs: what it finds sound plans
//! and applies through the real terraform and its S3 backend, what it finds broken fails the same
//! step with the same words, and its remedy mends it.

use latchkey_aws_simulator::{KeyStatus, MfaCondition, Role};
use latchkey_harness::{Configuration, Stage, is_ended, reason};
use latchkey_proto::v1::{self, CodeCredentials, MfaPolicy, PlainCredentials, RunState};
use serde_json::Value;

use crate::gated::{with_s3, with_s3_as_given};
use crate::support::{roles, settings, stage};
use crate::terminal::Terminal;

/// Exit code of what was refused.
const REFUSED: i32 = 1;

struct Told(Vec<Value>);

impl Told {
    async fn by_doctor(terminal: &Terminal<'_>, code: Option<&str>, exit: i32) -> Self {
        let (arguments, typed) = match code {
            Some(code) => ("env doctor web --code -o json", format!("{code}\n")),
            None => ("env doctor web -o json", String::new()),
        };
        let (ended, out, err) = terminal.run(arguments, &typed).await;
        assert_eq!(ended, exit, "{out}\n{err}");
        let told: Value = serde_json::from_str(&out).unwrap();
        Self(told["steps"].as_array().unwrap().clone())
    }

    #[track_caller]
    fn step(&self, name: &str) -> &Value {
        let found = self.0.iter().find(|step| step["name"] == name);
        found.unwrap_or_else(|| panic!("{name}: {:#?}", self.0))
    }

    #[track_caller]
    fn assert(&self, name: &str, outcome: &str) {
        assert_eq!(self.step(name)["outcome"], outcome, "{:#?}", self.0);
    }

    fn sentence(&self, name: &str) -> &str {
        self.step(name)["sentence"].as_str().unwrap()
    }
}

async fn planned(stage: &Stage, configuration: &Configuration) -> v1::Run {
    let run = stage.owner.queue("web", configuration).await.unwrap();
    let done = |run: &v1::Run| run.state() == RunState::AwaitingApplyMfa || is_ended(run);
    stage.owner.wait_for_run(&run.run_id, "the plan", done).await.unwrap()
}

fn written(stage: &Stage) -> bool {
    stage.aws.simulator().object("latchkey-state", "web/terraform.tfstate").is_some()
}

#[tokio::test]
async fn a_role_that_the_doctor_cannot_assume_stops_the_apply_until_it_is_mended_as_told() {
    let stage = stage().await.unwrap();
    let ada = &stage.owner;
    let settings = v1::EnvironmentSettings {
        code_credentials: CodeCredentials::Role.into(),
        plain_credentials: PlainCredentials::Role.into(),
        roles: roles("read", "ship"),
        ..settings(MfaPolicy::AppliesOnly)
    };
    // Not to have the organization's whole session without a code, but a role of it, takes one.
    let code = stage.aws.unused_code().await.unwrap();
    ada.create_environment_by("web", settings, &code).await.unwrap();
    // Its trust names another external id than this organization's.
    let trust = |external_id: &str| {
        let mut role = Role::new("ship", MfaCondition::Demanded);
        role.trust.external_id = Some(external_id.to_owned());
        stage.aws.simulator().change_world(|world| {
            world.put_role("123456789012", role).unwrap();
            let arn = "arn:aws:iam::123456789012:role/ship".to_owned();
            world.buckets[0].allowed_roles.push(arn);
        });
    };
    trust("of-somebody-else");
    let terminal = Terminal::of_owner(&stage).await;
    let code = stage.aws.unused_code().await.unwrap();
    let told = Told::by_doctor(&terminal, Some(&code), REFUSED).await;
    for (step, outcome) in [("keys", "ok"), ("device", "ok"), ("plan_role", "ok")] {
        told.assert(step, outcome);
    }
    told.assert("apply_role", "failed");
    let why = told.sentence("apply_role").to_owned();

    // The plan passes, as the doctor said, and the apply is refused with its words.
    let run = planned(&stage, &with_s3_as_given(&stage)).await;
    assert_eq!(run.state(), RunState::AwaitingApplyMfa, "{}", run.reason);
    let code = stage.aws.unused_code().await.unwrap();
    let refused = ada.authenticate(&run.run_id, &code).await.unwrap_err();
    assert_eq!((reason(&refused).as_str(), refused.message()), ("EXCHANGE_REFUSED", why.as_str()));
    assert!(!written(&stage));

    // Mended with what the doctor named.
    let known = terminal.json("org show").await;
    let external_id = known["external_id"].as_str().unwrap();
    assert!(why.contains(external_id), "{why}");
    trust(external_id);
    let code = stage.aws.unused_code().await.unwrap();
    let told = Told::by_doctor(&terminal, Some(&code), 0).await;
    told.assert("apply_role", "ok");
    told.assert("apply_role_external_id", "ok");
    ada.authenticate(&run.run_id, &stage.aws.unused_code().await.unwrap()).await.unwrap();
    ada.wait_for_state(&run.run_id, RunState::Applied).await.unwrap();
    assert!(written(&stage));
}

#[tokio::test]
async fn keys_that_the_doctor_finds_dead_fail_the_plan_and_live_ones_carry_it_through() {
    let stage = stage().await.unwrap();
    let ada = &stage.owner;
    ada.create_environment("web", MfaPolicy::AppliesOnly).await.unwrap();
    let terminal = Terminal::of_owner(&stage).await;
    let key = stage.aws.facts().access_key_id.clone();
    let set = |status| {
        let changed =
            stage.aws.simulator().change_world(|world| world.set_key_status(&key, status));
        changed.unwrap();
    };
    set(KeyStatus::Inactive);
    let told = Told::by_doctor(&terminal, None, REFUSED).await;
    told.assert("triple", "ok");
    told.assert("keys", "failed");
    let run = planned(&stage, &with_s3(&stage, "read")).await;
    assert_eq!(run.state(), RunState::Errored);
    assert!(run.reason.contains(told.sentence("keys")), "{}", run.reason);

    set(KeyStatus::Active);
    let code = stage.aws.unused_code().await.unwrap();
    let told = Told::by_doctor(&terminal, Some(&code), 0).await;
    for step in ["keys", "account", "device"] {
        told.assert(step, "ok");
    }
    let run = planned(&stage, &with_s3(&stage, "read")).await;
    assert_eq!(run.state(), RunState::AwaitingApplyMfa, "{}", run.reason);
    ada.authenticate(&run.run_id, &stage.aws.unused_code().await.unwrap()).await.unwrap();
    ada.wait_for_state(&run.run_id, RunState::Applied).await.unwrap();
    assert!(written(&stage));
}
