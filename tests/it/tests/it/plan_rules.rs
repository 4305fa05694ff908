//! Plan rules under `never`, on plans that the real terraform made: what matches waits for a code
//! and says why, also where it was to be applied without anybody; what does not goes on as ever.

use latchkey_harness::{Configuration, Person, Stage, StageOptions};
use latchkey_proto::v1::{
    self, MfaPolicy, QueueRunRequest, RunKind, RunState, RunVariable, VariableCategory,
};

use crate::support::{options, settings};
use crate::terminal::Terminal;

/// `pair` is replaced by another release, `calm` by none.
const MAIN: &str = r#"
variable "release" {
  type = string
}

resource "terraform_data" "pair" {
  count            = 2
  triggers_replace = var.release
}

resource "terraform_data" "calm" {
  input = var.release
}
"#;

async fn environment(ada: &Person, name: &str, rule: v1::PlanRule) {
    let settings = v1::EnvironmentSettings { plan_rule: Some(rule), ..settings(MfaPolicy::Never) };
    ada.create_environment_with(name, settings).await.unwrap();
}

/// Queues with auto-apply and waits until a person is needed, or nobody any more.
async fn played(ada: &Person, name: &str, release: &str, request: QueueRunRequest) -> v1::Run {
    let variables = vec![RunVariable {
        name: "release".into(),
        category: VariableCategory::Terraform.into(),
        value: release.into(),
        hcl: false,
        sensitive: false,
    }];
    let request = QueueRunRequest {
        variables,
        auto_apply: Some(request.auto_apply.unwrap_or(true)),
        ..request
    };
    let configuration = Configuration::of(&[("main.tf", MAIN)]);
    let run = ada.queue_with(name, &configuration, request).await.unwrap();
    let stops = |run: &v1::Run| {
        let waits = [RunState::AwaitingConfirmation, RunState::AwaitingApplyMfa];
        waits.contains(&run.state()) || latchkey_harness::is_ended(run)
    };
    ada.wait_for_run(&run.run_id, "a wait or the end", stops).await.unwrap()
}

/// It waits for a code, and `run show` says why; with the code it is applied.
#[track_caller]
fn assert_waits(run: &v1::Run, why: &str) {
    assert_eq!(run.state(), RunState::AwaitingApplyMfa, "{}", run.reason);
    assert_eq!(run.mfa_policy(), MfaPolicy::Never);
    assert!(run.code_reason.contains(why), "{}", run.code_reason);
}

async fn assert_shown(terminal: &Terminal<'_>, run: &v1::Run) {
    let shown = terminal.done(&format!("run show {}", run.run_id), "").await;
    for part in [&run.code_reason, "[?] waiting: a token code is required", "AwaitingApplyMfa"] {
        assert!(shown.contains(part), "{part} is missing:\n{shown}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_plan_does_decides_whether_its_apply_needs_a_code() {
    let stage = Stage::start(StageOptions { slots: 3, ..options() }).await.unwrap();
    let ada = &stage.owner;
    let terminal = Terminal::of_owner(&stage).await;
    let (destructive, types, many) = ("destructive", "types", "many");
    let rule = v1::PlanRule { destructive: true, ..Default::default() };
    environment(ada, destructive, rule).await;
    let rule = v1::PlanRule { resource_types: vec!["terraform_*".into()], ..Default::default() };
    environment(ada, types, rule).await;
    environment(ada, many, v1::PlanRule { more_than: Some(2), ..Default::default() }).await;

    let first = async {
        // Nothing is destroyed: nobody is needed.
        let created = played(ada, destructive, "1", QueueRunRequest::default()).await;
        assert_eq!(created.state(), RunState::Applied, "{}", created.reason);
        assert_eq!(created.code_reason, "");
        let replaced = played(ada, destructive, "2", QueueRunRequest::default()).await;
        assert_waits(&replaced, "the plan replaces terraform_data.pair[0]");
        let plan = replaced.plan_result.as_ref().unwrap();
        assert_eq!((plan.replace, plan.change), (2, 1), "{plan:?}");
        assert_shown(&terminal, &replaced).await;
        // A confirmation does not do in its place.
        assert!(ada.confirm(&replaced.run_id).await.is_err());
        ada.authenticate(&replaced.run_id, &stage.aws.unused_code().await.unwrap()).await.unwrap();
        ada.wait_for_state(&replaced.run_id, RunState::Applied).await.unwrap();
        let destroy = QueueRunRequest {
            kind: RunKind::Destroy.into(),
            destroy_confirmation: destructive.into(),
            auto_apply: Some(false),
            ..Default::default()
        };
        let destroyed = played(ada, destructive, "2", destroy).await;
        assert_waits(&destroyed, "the plan destroys terraform_data.calm");
    };
    let second = async {
        let typed = played(ada, types, "1", QueueRunRequest::default()).await;
        assert_waits(&typed, "terraform_data");
        assert_shown(&terminal, &typed).await;
    };
    let third = async {
        let pair = QueueRunRequest {
            target: vec!["terraform_data.pair".into()],
            auto_apply: Some(false),
            ..Default::default()
        };
        // As many as are allowed, and to be confirmed as ever.
        let few = played(ada, many, "1", pair).await;
        assert_eq!(few.state(), RunState::AwaitingConfirmation, "{}", few.reason);
        ada.give_up(&few.run_id).await.unwrap();
        let all = QueueRunRequest { auto_apply: Some(false), ..Default::default() };
        let more = played(ada, many, "1", all).await;
        assert_waits(&more, "3");
        assert_shown(&terminal, &more).await;
    };
    tokio::join!(first, second, third);
}
