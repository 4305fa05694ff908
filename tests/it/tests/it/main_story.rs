//! A run that waits for a code before its plan, waits for another before its apply, and is
//! executed by a runner that never held a long-term key.

use anyhow::Context;
use latchkey_harness::{after_plan, files_with, is_ended, reason};
use latchkey_proto::v1::variable_scope::Scope;
use latchkey_proto::v1::{Lock, MfaPolicy, Phase, RunState, VariableCategory};

use crate::support::{small, stage, states};

#[tokio::test(flavor = "multi_thread")]
async fn a_code_opens_the_plan_and_another_code_the_apply() -> anyhow::Result<()> {
    let stage = stage().await?;
    let ada = &stage.owner;
    ada.create_environment("web", MfaPolicy::PlansAndApplies).await?;
    let scope = Scope::Environment("web".into());
    ada.set_variable(scope, VariableCategory::Terraform, "greeting", "good morning", false).await?;

    let run = ada.queue("web", &small()).await?;
    let id = run.run_id.as_str();
    assert_eq!((run.state(), run.lock()), (RunState::AwaitingPlanMfa, Lock::CodeRequired));
    let watched = tokio::spawn({
        let (ada, id) = (ada.clone(), id.to_owned());
        async move { ada.watch_until(&id, is_ended).await }
    });

    // The plan.
    let first = stage.aws.unused_code().await?;
    let run = ada.authenticate(id, &first).await?;
    let authenticated = run.plan.and_then(|plan| plan.authenticated).context("who was it?")?;
    assert_eq!(authenticated.user, "ada");
    let run = ada.wait_for_run(id, "the end of the plan", after_plan).await?;
    assert_eq!(run.state(), RunState::AwaitingApplyMfa, "{}", run.reason);
    assert_eq!(run.lock(), Lock::CodeRequired, "a new code is wanted for the apply");
    let plan = run.plan_result.context("the plan has a result")?;
    assert_eq!((plan.add, plan.change, plan.destroy, plan.applyable), (2, 0, 0, true));
    let addresses: Vec<&str> =
        plan.change_list.iter().map(|change| change.address.as_str()).collect();
    assert_eq!(addresses, ["terraform_data.first", "terraform_data.second"]);
    let log = ada.log_text(id, Phase::Plan).await?;
    assert!(log.contains("terraform_data.first: Plan to create"), "{log}");

    // The code of the plan is not good for the apply.
    let refused = ada.authenticate(id, &first).await.unwrap_err();
    assert_eq!(reason(&refused), "CODE_USED");

    // A confirmation does not stand in for a code.
    let refused = ada.confirm(id).await.unwrap_err();
    assert_eq!(reason(&refused), "MFA_REQUIRED");

    // The apply.
    let second = stage.aws.unused_code().await?;
    let run = ada.authenticate(id, &second).await?;
    assert_eq!(run.approval.context("the code approves")?.plan_digest, plan.digest);
    let run = ada.wait_for_run(id, "the end of the apply", is_ended).await?;
    assert_eq!(run.state(), RunState::Applied, "{}", run.reason);
    let log = ada.log_text(id, Phase::Apply).await?;
    assert!(log.contains("the local-exec says good morning"), "{log}");
    assert!(log.contains("terraform_data.second: Creation complete"), "{log}");
    let outputs: serde_json::Value = serde_json::from_str(&run.outputs_json)?;
    assert_eq!(outputs["said"]["value"], "good morning");
    let environment = ada.environment("web").await?;
    assert!(environment.state_serial > 0 && environment.active_run_id.is_empty());

    // Each code reached AWS once, as one exchange.
    let aws = stage.aws.simulator();
    assert_eq!((aws.requests_with_code(&first), aws.requests_with_code(&second)), (1, 1));
    assert_eq!(aws.requests_for("GetSessionToken"), 2);

    // Who it was is recorded twice, in a chain that is whole.
    let records = ada.audit_records(id).await?;
    let codes: Vec<_> =
        records.iter().filter(|record| record.action == "authenticate_run").collect();
    assert_eq!(codes.len(), 2, "{records:?}");
    assert!(codes.iter().all(|record| record.actor.contains("ada")), "{codes:?}");
    let verified = ada.verify_audit().await?;
    assert!(verified.intact, "{}", verified.problem);

    // The states were passed in order, and none twice.
    let seen = states(&watched.await??);
    let order = [
        RunState::AwaitingPlanMfa,
        RunState::Pending,
        RunState::PlanQueued,
        RunState::Planning,
        RunState::AwaitingApplyMfa,
        RunState::ApplyQueued,
        RunState::Applying,
        RunState::Applied,
    ];
    let mut rest = order.iter();
    assert!(seen.iter().all(|state| rest.any(|next| next == state)), "{seen:?}");

    // The long-term key is nowhere on disk: not with the runner, not in clear with the plane.
    let secret = stage.aws.facts().secret_access_key.expose();
    let found = files_with(stage.directory(), secret.as_bytes())?;
    assert!(found.is_empty(), "{found:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_code_turns_the_lock_red_and_the_run_keeps_waiting() -> anyhow::Result<()> {
    let stage = stage().await?;
    let ada = &stage.owner;
    ada.create_environment("web", MfaPolicy::PlansAndApplies).await?;
    let run = ada.queue("web", &small()).await?;
    let id = run.run_id.as_str();

    let wrong = stage.aws.wrong_code().await?;
    let refused = ada.authenticate(id, &wrong).await.unwrap_err();
    assert_eq!(reason(&refused), "CODE_REJECTED");
    let run = ada.run(id).await?;
    assert_eq!((run.state(), run.lock()), (RunState::AwaitingPlanMfa, Lock::Failed));
    let refusal = run.last_refusal.context("the run says why")?;
    assert_eq!(refusal.reason, "CODE_REJECTED");
    assert!(!refusal.aws_request_id.is_empty() && !refusal.message.is_empty(), "{refusal:?}");

    // The same code again is refused here, without asking AWS.
    let refused = ada.authenticate(id, &wrong).await.unwrap_err();
    assert_eq!(reason(&refused), "CODE_USED");
    assert_eq!(stage.aws.simulator().requests_with_code(&wrong), 1);

    // What is no code at all is refused before anything is counted.
    for bad in ["", "12345", "1234567", "12345a", "１２３４５６", " 123456"] {
        let refused = ada.authenticate(id, bad).await.unwrap_err();
        assert_eq!(reason(&refused), "FIELD_INVALID", "{bad:?}");
    }
    assert_eq!(stage.aws.simulator().requests_for("GetSessionToken"), 1);

    // The right one opens the lock.
    let run = ada.authenticate(id, &stage.aws.unused_code().await?).await?;
    assert_eq!(run.lock(), Lock::Authenticated);
    assert!(run.last_refusal.is_none());
    let run = ada.wait_for_run(id, "the end of the plan", after_plan).await?;
    assert_eq!(run.state(), RunState::AwaitingApplyMfa, "{}", run.reason);

    // Both outcomes are recorded, each after its submission.
    let records = ada.audit_records(id).await?;
    let actions: Vec<&str> = records
        .iter()
        .map(|record| record.action.as_str())
        .filter(|action| action.contains("code") || action.contains("authenticate"))
        .collect();
    assert_eq!(actions, ["submit_code", "refuse_code", "submit_code", "authenticate_run"]);
    assert!(ada.verify_audit().await?.intact);
    Ok(())
}
