//! The MFA mark travels: the S3 backend, with terraform's own AWS SDK, assumes a role that
//! demands MFA with nothing but the session that a token code bought.

use latchkey_harness::is_ended;
use latchkey_proto::v1::{MfaPolicy, Phase, RunState};

use crate::gated::with_s3;
use crate::support::stage;

#[tokio::test]
async fn a_role_that_demands_mfa_is_assumed_with_the_session_of_a_code() {
    let stage = stage().await.unwrap();
    let ada = &stage.owner;
    ada.create_environment("web", MfaPolicy::PlansAndApplies).await.unwrap();
    let run = ada.queue("web", &with_s3(&stage, "deploy")).await.unwrap();
    ada.authenticate(&run.run_id, &stage.aws.unused_code().await.unwrap()).await.unwrap();
    ada.wait_for_state(&run.run_id, RunState::AwaitingApplyMfa).await.unwrap();
    ada.authenticate(&run.run_id, &stage.aws.unused_code().await.unwrap()).await.unwrap();
    ada.wait_for_state(&run.run_id, RunState::Applied).await.unwrap();

    let aws = stage.aws.simulator();
    let state = aws.object("latchkey-state", "web/terraform.tfstate").expect("the state is there");
    assert!(String::from_utf8(state).unwrap().contains("kept in the bucket"));
    let calls = aws.calls();
    let assumed: Vec<_> = calls.iter().filter(|call| call.action == "AssumeRole").collect();
    assert!(!assumed.is_empty());
    // By the session: a temporary key, and no code in the call itself.
    assert!(assumed.iter().all(|call| {
        let temporary = call.access_key_id.as_ref().is_some_and(|id| id.starts_with("ASIA"));
        temporary && !call.had_code
    }));
}

#[tokio::test]
async fn without_a_code_the_role_refuses_and_the_log_says_why() {
    let stage = stage().await.unwrap();
    let ada = &stage.owner;
    ada.create_environment("web", MfaPolicy::Never).await.unwrap();
    let run = ada.queue("web", &with_s3(&stage, "deploy")).await.unwrap();
    let run = ada.wait_for_run(&run.run_id, "the end", is_ended).await.unwrap();
    assert_eq!(run.state(), RunState::Errored);
    let log = ada.read_log(&run.run_id, Phase::Plan).await.unwrap();
    let log = String::from_utf8(log).unwrap();
    assert!(log.contains("is not authorized to perform: sts:AssumeRole"), "{log}");
    assert!(stage.aws.simulator().object("latchkey-state", "web/terraform.tfstate").is_none());
}
