//! What an operator puts around terraform on a build host: hooks, and what keeps jobs apart.

use latchkey_harness::{Configuration, Stage, StageOptions};
use latchkey_proto::v1::{MfaPolicy, Phase, RunState};

use crate::gated::SMALL;
use crate::runners::hook;
use crate::support::options;

#[tokio::test(flavor = "multi_thread")]
async fn hooks_are_heard_and_a_failing_one_before_the_apply_stops_it() -> anyhow::Result<()> {
    let mut stage = Stage::start(StageOptions { runners: vec![], ..options() }).await?;
    let ada = stage.owner.clone();
    ada.create_environment("web", MfaPolicy::Never).await?;
    let hooks = stage.directory().join("hooks");
    hook(&hooks, "before-init", "echo the hook before init")?;
    hook(&hooks, "after-plan", "echo the hook after $LATCHKEY_PHASE")?;
    let guard = hook(&hooks, "before-apply", "echo no change on fridays; exit 3")?;
    let arguments = vec!["--hooks".to_owned(), hooks.display().to_string()];
    stage.add_runner_with("build-1", |options| options.arguments = arguments).await?;
    let configuration = Configuration::of(&[("main.tf", SMALL)]);
    let run = async || {
        let id = ada.queue("web", &configuration).await?.run_id;
        ada.wait_for_state(&id, RunState::AwaitingConfirmation).await?;
        ada.confirm(&id).await?;
        anyhow::Ok(id)
    };

    let id = run().await?;
    let ended = ada.wait_for_state(&id, RunState::Errored).await?;
    assert!(ended.reason.contains("before-apply exited with code 3"), "{}", ended.reason);
    assert!(ended.reason.contains("nothing was changed"), "{}", ended.reason);
    let log = ada.log_text(&id, Phase::Plan).await?;
    assert!(log.contains("the hook before init"), "{log}");
    assert!(log.contains("the hook after plan"), "{log}");
    let log = ada.log_text(&id, Phase::Apply).await?;
    assert!(log.contains("no change on fridays"), "{log}");
    assert!(!log.contains("terraform_data.one: Creating"), "{log}");
    let environment = ada.environment("web").await?;
    assert_eq!(environment.state_serial, 0, "nothing was applied");
    assert!(environment.frozen.is_none() && environment.active_run_id.is_empty());

    // Without the objection, the same is applied.
    std::fs::remove_file(guard)?;
    let id = run().await?;
    ada.wait_for_state(&id, RunState::Applied).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_sees_of_its_host_what_the_runner_says() -> anyhow::Result<()> {
    let stage = crate::support::stage().await?;
    let ada = &stage.owner;
    ada.create_environment("web", MfaPolicy::Never).await?;
    let host = ada.runner("build-1").await?.host.unwrap_or_default();
    let hidden = "other jobs and the runner's key are hidden";
    let hides = host.isolation.iter().any(|fact| fact == hidden);
    assert!(hides || !host.isolation_missing.is_empty(), "{host:?}");
    assert!(host.isolation.iter().any(|fact| fact == "environment allow-list"), "{host:?}");

    let main = format!(
        r#"
resource "terraform_data" "curious" {{
  provisioner "local-exec" {{
    command = "ls '{}' >/dev/null 2>&1 && echo key: seen || echo key: hidden; echo core: $(ulimit -c)"
  }}
}}
"#,
        stage.runners[0].work_dir().display()
    );
    let id = ada.queue("web", &Configuration::of(&[("main.tf", &main)])).await?.run_id;
    ada.wait_for_state(&id, RunState::AwaitingConfirmation).await?;
    ada.confirm(&id).await?;
    ada.wait_for_state(&id, RunState::Applied).await?;
    let log = ada.log_text(&id, Phase::Apply).await?;
    let expected = if hides { "(local-exec): key: hidden" } else { "(local-exec): key: seen" };
    assert!(log.contains(expected), "{hides}: {log}");
    assert!(log.contains("(local-exec): core: 0"), "{log}");
    Ok(())
}
