//! Kinds of runs and their options, through the real terraform.

use latchkey_harness::{Configuration, Person, Stage, StageOptions, reason};
use latchkey_proto::v1::{
    MfaPolicy, Plan, QueueRunRequest, RetryRunRequest, Run, RunKind, RunState, RunVariable,
    VariableCategory,
};

use crate::gated::{Gated, SMALL};
use crate::support::{options, stage};
use crate::terminal::Cli;

fn release(value: &str) -> Vec<RunVariable> {
    vec![RunVariable {
        name: "release".into(),
        category: VariableCategory::Terraform.into(),
        value: value.into(),
        hcl: false,
        sensitive: false,
    }]
}

fn pair() -> Configuration {
    let main = r#"
variable "release" {
  type = string
}

resource "terraform_data" "a" {
  input = "a ${var.release}"
}

resource "terraform_data" "b" {
  input = "b ${var.release}"
}
"#;
    Configuration::of(&[("main.tf", main)])
}

/// Queues, with `auto_apply` unless said otherwise, and waits for the end.
async fn done(ada: &Person, request: QueueRunRequest) -> anyhow::Result<Run> {
    let request = QueueRunRequest { auto_apply: request.auto_apply.or(Some(true)), ..request };
    let id = ada.queue_with("web", &pair(), request).await?.run_id;
    ada.wait_for_run(&id, "the end", latchkey_harness::is_ended).await
}

/// What a plan changes: action and address.
fn changes(run: &Run) -> Vec<(&str, &str)> {
    let plan = run.plan_result.as_ref().unwrap();
    let all = plan.change_list.iter().filter(|change| change.action != "no-op");
    all.map(|change| (change.action.as_str(), change.address.as_str())).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn each_kind_and_option_does_what_it_says() -> anyhow::Result<()> {
    let stage = stage().await?;
    let ada = &stage.owner;
    ada.create_environment("web", MfaPolicy::Never).await?;
    let (a, b) = ("terraform_data.a", "terraform_data.b");

    // Auto-apply needs no confirmation; the message stays with the run.
    let request = QueueRunRequest {
        variables: release("1"),
        message: "first release".into(),
        ..Default::default()
    };
    let first = done(ada, request).await?;
    assert_eq!((first.state(), first.message.as_str()), (RunState::Applied, "first release"));
    assert_eq!(changes(&first), [("create", a), ("create", b)]);

    // Nothing to do: the run ends with its plan.
    let same = done(ada, QueueRunRequest { variables: release("1"), ..Default::default() }).await?;
    assert_eq!((same.state(), changes(&same)), (RunState::Planned, vec![]));

    let request = QueueRunRequest {
        variables: release("2"),
        kind: RunKind::PlanOnly.into(),
        ..Default::default()
    };
    let plan_only = done(ada, request).await?;
    assert_eq!(plan_only.state(), RunState::Planned);
    assert_eq!(changes(&plan_only), [("update", a), ("update", b)]);

    let request = QueueRunRequest {
        variables: release("2"),
        kind: RunKind::RefreshOnly.into(),
        ..Default::default()
    };
    let refresh_only = done(ada, request).await?;
    assert_eq!((refresh_only.state(), changes(&refresh_only)), (RunState::Planned, vec![]));

    let request =
        QueueRunRequest { variables: release("2"), target: vec![a.into()], ..Default::default() };
    let targeted = done(ada, request).await?;
    assert_eq!((targeted.state(), changes(&targeted)), (RunState::Applied, vec![("update", a)]));

    let request = QueueRunRequest {
        variables: release("2"),
        target: vec![b.into()],
        replace: vec![b.into()],
        ..Default::default()
    };
    let replaced = done(ada, request).await?;
    assert_eq!((replaced.state(), changes(&replaced)), (RunState::Applied, vec![("replace", b)]));

    // Destroying takes the name typed again, also when it is tried once more.
    let destroy = |typed: &str| QueueRunRequest {
        variables: release("2"),
        kind: RunKind::Destroy.into(),
        destroy_confirmation: typed.into(),
        ..Default::default()
    };
    for typed in ["", "webb"] {
        let refused = ada.queue_with("web", &pair(), destroy(typed)).await.unwrap_err();
        assert_eq!(reason(&refused), "FIELD_INVALID");
    }
    let destroyed = done(ada, destroy("web")).await?;
    assert_eq!(destroyed.state(), RunState::Applied);
    assert_eq!(changes(&destroyed), [("delete", a), ("delete", b)]);

    // The first run again: what was given for it alone is gone, and has to be given again.
    let retry = |variables| RetryRunRequest {
        run_id: first.run_id.clone(),
        request_id: "again".into(),
        variables,
        destroy_confirmation: String::new(),
    };
    let refused = ada.runs().retry_run(retry(vec![])).await.unwrap_err();
    assert_eq!(reason(&refused), "FIELD_INVALID");
    assert!(refused.message().contains("release"), "{refused}");
    let again = ada.runs().retry_run(retry(release("3"))).await?.into_inner().run.unwrap();
    assert_eq!(again.retry_of, first.run_id);
    assert_eq!(again.message, format!("retry of {}: first release", first.run_id));
    assert_eq!(again.configuration_digest, first.configuration_digest);
    // What was asked for beyond the settings was for that run: this one is confirmed.
    let again = ada.wait_for_state(&again.run_id, RunState::AwaitingConfirmation).await?;
    assert_eq!(changes(&again), [("create", a), ("create", b)]);
    Ok(())
}

#[tokio::test]
async fn how_far_an_apply_came_is_shown_resource_by_resource() -> anyhow::Result<()> {
    let stage = stage().await?;
    let ada = &stage.owner;
    ada.create_environment("web", MfaPolicy::Never).await?;
    let main = r#"
resource "terraform_data" "good" {}

resource "terraform_data" "bad" {
  provisioner "local-exec" {
    command = "exit 1"
  }
  depends_on = [terraform_data.good]
}

resource "terraform_data" "never" {
  depends_on = [terraform_data.bad]
}
"#;
    let request = QueueRunRequest { auto_apply: Some(true), ..Default::default() };
    let run = ada.queue_with("web", &Configuration::of(&[("main.tf", main)]), request).await?;
    ada.wait_for_state(&run.run_id, RunState::Errored).await?;
    let cli = Cli::of(&stage, ada)?;
    let progress = cli.json(&["run", "progress", &run.run_id]).await?;
    let stands = |name: &str| {
        let address = format!("terraform_data.{name}");
        let all = progress["resources"].as_array().into_iter().flatten();
        let one = all.filter(|one| one["address"] == *address).collect::<Vec<_>>();
        assert_eq!(one.len(), 1, "{progress}");
        one[0]["state"].as_str().unwrap_or_default().to_owned()
    };
    assert_eq!([stands("good"), stands("bad"), stands("never")], ["done", "failed", "waiting"]);
    let shown = cli.text(&["run", "progress", &run.run_id]).await?;
    assert!(shown.ends_with("1 done, 1 failed, 0 under way, 1 waiting\n"), "{shown}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn plans_go_side_by_side_while_a_run_has_the_environment_and_the_line_moves()
-> anyhow::Result<()> {
    let stage = Stage::start(StageOptions { slots: 3, ..options() }).await?;
    let ada = &stage.owner;
    ada.create_environment("web", MfaPolicy::Never).await?;
    let gated = Gated::new(&stage);
    let holder = gated.begin(&stage, "web").await?;
    let small = Configuration::of(&[("main.tf", SMALL)]);

    // Two of them at once, and both end while the other still applies.
    let plan_only = || QueueRunRequest { kind: RunKind::PlanOnly.into(), ..Default::default() };
    let one = ada.queue_with("web", &small, plan_only()).await?;
    let two = ada.queue_with("web", &small, plan_only()).await?;
    for run in [&one, &two] {
        assert_ne!(run.state(), RunState::Pending, "{}", run.reason);
        ada.wait_for_state(&run.run_id, RunState::Planned).await?;
    }
    assert_eq!(ada.run(&holder).await?.state(), RunState::Applying);

    // The others wait in order, and say where they are and for whom.
    let mut waiting = Vec::new();
    for position in 1..=3 {
        let run = ada.queue("web", &small).await?;
        assert_eq!((run.state(), run.queue_position), (RunState::Pending, position));
        assert!(run.reason.contains(&holder), "{}", run.reason);
        waiting.push(run.run_id);
    }
    let request = latchkey_proto::v1::CancelRequest { run_id: waiting[0].clone(), force: false };
    ada.runs().cancel(request).await?;
    for (run, position) in waiting[1..].iter().zip(1..) {
        assert_eq!(ada.run(run).await?.queue_position, position);
    }
    gated.open()?;
    ada.wait_for_state(&holder, RunState::Applied).await?;
    ada.wait_for_state(&waiting[1], RunState::AwaitingConfirmation).await?;
    let last = ada.run(&waiting[2]).await?;
    assert_eq!((last.state(), last.queue_position), (RunState::Pending, 1));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_import_is_counted_and_a_refresh_writes_down_what_the_world_has_become()
-> anyhow::Result<()> {
    let stage = stage().await?;
    let ada = &stage.owner;
    ada.create_environment("web", MfaPolicy::Never).await?;
    let world = stage.shared().join("world");
    let main = format!(
        r#"
variable "release" {{
  type = string
}}

import {{
  to = terraform_data.old
  id = "kept-from-before"
}}

resource "terraform_data" "old" {{}}

resource "terraform_data" "new" {{
  triggers_replace = var.release
}}

output "world" {{
  value = file("{}")
}}
"#,
        world.display()
    );
    let configuration = Configuration::of(&[("main.tf", &main)]);
    let played = async |of: &str, kind: RunKind| {
        let variables = release(of);
        let request = QueueRunRequest { variables, kind: kind.into(), ..Default::default() };
        let run = ada.queue_with("web", &configuration, request).await?;
        let run = ada.wait_for_state(&run.run_id, RunState::AwaitingConfirmation).await?;
        let plan = run.plan_result.unwrap();
        ada.confirm(&run.run_id).await?;
        let run = ada.wait_for_state(&run.run_id, RunState::Applied).await?;
        anyhow::Ok((plan, run))
    };
    let counts = |plan: &Plan| {
        (plan.add, plan.change, plan.destroy, plan.replace, plan.import, plan.applyable)
    };

    std::fs::write(&world, "one")?;
    let (plan, run) = played("1", RunKind::PlanAndApply).await?;
    assert_eq!(counts(&plan), (1, 0, 0, 0, 1, true), "{plan:?}");
    assert!(run.outputs_json.contains("\"one\""), "{}", run.outputs_json);
    let (plan, _) = played("2", RunKind::PlanAndApply).await?;
    assert_eq!(counts(&plan), (1, 0, 1, 1, 0, true), "{plan:?}");

    // The world moves on by itself; another release is none of a refresh's business.
    std::fs::write(&world, "two")?;
    let (plan, run) = played("3", RunKind::RefreshOnly).await?;
    assert_eq!(counts(&plan), (0, 0, 0, 0, 0, true), "{plan:?}");
    assert!(run.outputs_json.contains("\"two\""), "{}", run.outputs_json);
    Ok(())
}
