//! Bad input over the wire: a clear refusal that names field and remedy, nothing changed.

use std::fs;

use latchkey_harness::{Configuration, Stage, StageOptions, is_ended, reason};
use latchkey_proto::v1::variable_scope::Scope;
use latchkey_proto::v1::{self, MfaPolicy, Phase, RunState, VariableCategory};
use tonic::Code;
use tonic_types::StatusExt;

use crate::gated::SMALL;
use crate::support::{options, stage};

#[tokio::test]
async fn a_confirmation_where_a_code_is_demanded_is_refused_and_changes_nothing() {
    let stage = stage().await.unwrap();
    let ada = &stage.owner;
    ada.create_environment("web", MfaPolicy::AppliesOnly).await.unwrap();
    let run = ada.queue("web", &Configuration::of(&[("main.tf", SMALL)])).await.unwrap();
    ada.wait_for_state(&run.run_id, RunState::AwaitingApplyMfa).await.unwrap();
    let status = ada.confirm(&run.run_id).await.unwrap_err();
    assert_eq!(
        (status.code(), reason(&status).as_str()),
        (Code::FailedPrecondition, "MFA_REQUIRED")
    );

    // A code for another plan than the one that is there is refused before anything is spent.
    let request = v1::AuthenticateRequest {
        run_id: run.run_id.clone(),
        phase: Phase::Apply.into(),
        token_code: stage.aws.unused_code().await.unwrap(),
        plan_digest: "0".repeat(64),
        request_id: "one".into(),
    };
    let status = ada.runs().authenticate(request).await.unwrap_err();
    assert_eq!(reason(&status), "PLAN_CHANGED");
    assert_eq!(ada.run(&run.run_id).await.unwrap().state(), RunState::AwaitingApplyMfa);
    assert_eq!(stage.aws.simulator().calls().iter().filter(|call| call.had_code).count(), 0);
}

#[tokio::test]
async fn a_service_token_never_submits_a_code() {
    let stage = stage().await.unwrap();
    let ada = &stage.owner;
    ada.create_environment("web", MfaPolicy::PlansAndApplies).await.unwrap();
    let ci = ada.create_service_token(&stage.plane, "ci").await.unwrap();
    let run = ci.queue("web", &Configuration::of(&[("main.tf", SMALL)])).await.unwrap();
    let code = stage.aws.unused_code().await.unwrap();
    let status = ci.authenticate(&run.run_id, &code).await.unwrap_err();
    assert_eq!(
        (status.code(), reason(&status).as_str()),
        (Code::PermissionDenied, "PERSON_REQUIRED")
    );
    assert_eq!(stage.aws.simulator().requests_with_code(&code), 0);
}

#[tokio::test]
async fn only_an_owner_changes_the_policy() {
    let stage = Stage::start(StageOptions { runners: vec![], ..options() }).await.unwrap();
    let ada = &stage.owner;
    ada.create_environment("web", MfaPolicy::PlansAndApplies).await.unwrap();
    let bob = ada.create_user(&stage.plane, "bob", v1::Role::Member).await.unwrap();
    let ci = ada.create_service_token(&stage.plane, "ci").await.unwrap();
    for (caller, expect) in [(&bob, "NOT_ALLOWED"), (&ci, "PERSON_REQUIRED")] {
        let request = v1::UpdateEnvironmentRequest {
            organization: "acme".into(),
            environment: "web".into(),
            mfa_policy: Some(MfaPolicy::Never.into()),
            ..Default::default()
        };
        let status = caller.environments().update_environment(request).await.unwrap_err();
        assert_eq!((status.code(), reason(&status).as_str()), (Code::PermissionDenied, expect));
    }
    let settings = ada.environment("web").await.unwrap().settings.unwrap();
    assert_eq!(settings.mfa_policy(), MfaPolicy::PlansAndApplies);
}

#[tokio::test]
async fn variables_that_would_change_whose_credentials_are_used_are_refused_by_name() {
    let stage = Stage::start(StageOptions { runners: vec![], ..options() }).await.unwrap();
    let ada = &stage.owner;
    ada.create_environment("web", MfaPolicy::Never).await.unwrap();
    for (name, value, expect, field) in [
        ("AWS_PROFILE", "admin", "VARIABLE_RESERVED", "name"),
        ("TF_WORKSPACE", "other", "VARIABLE_RESERVED", "name"),
        ("AWS_MFA_SERIAL_NUMBER", "arn:aws:iam::123456789012:user/ada", "SERIAL_UNUSABLE", "value"),
        (
            "AWS_MFA_SERIAL_NUMBER",
            "arn:aws:iam::123456789012:u2f/user/ada/k",
            "SERIAL_UNUSABLE",
            "value",
        ),
        ("9lives", "x", "FIELD_INVALID", "name"),
    ] {
        let scope = Scope::WholeOrganization(true);
        let category = VariableCategory::Environment;
        let status = ada.set_variable(scope, category, name, value, false).await.unwrap_err();
        assert_eq!(reason(&status), expect, "{name}");
        assert_eq!(
            status.code(),
            match expect {
                "SERIAL_UNUSABLE" => Code::FailedPrecondition,
                _ => Code::InvalidArgument,
            }
        );
        let violations = status.get_details_bad_request().unwrap().field_violations;
        assert_eq!(violations[0].field, field);
    }
}

#[tokio::test]
async fn an_archive_that_slips_out_of_its_root_is_refused_at_the_upload() {
    let stage = Stage::start(StageOptions { runners: vec![], ..options() }).await.unwrap();
    let ada = &stage.owner;
    ada.create_environment("web", MfaPolicy::Never).await.unwrap();
    let status =
        ada.queue("web", &Configuration::of_bytes(b"not an archive".to_vec())).await.unwrap_err();
    assert_eq!(
        (status.code(), reason(&status).as_str()),
        (Code::InvalidArgument, "ARCHIVE_REFUSED")
    );
}

#[tokio::test]
async fn what_terraform_rejects_ends_the_run_and_its_log_shows_why() {
    let stage = stage().await.unwrap();
    let ada = &stage.owner;
    ada.create_environment("web", MfaPolicy::Never).await.unwrap();
    let broken = Configuration::of(&[("main.tf", "resource \"terraform_data\" {")]);
    let run = ada.queue("web", &broken).await.unwrap();
    let run = ada.wait_for_run(&run.run_id, "the end", is_ended).await.unwrap();
    assert_eq!(run.state(), RunState::Errored);
    let log = ada.read_log(&run.run_id, Phase::Plan).await.unwrap();
    let log = String::from_utf8(log).unwrap();
    assert!(log.contains("Unclosed configuration block") && log.contains("main.tf"), "{log}");

    let backend = "terraform {\n  backend \"local\" {}\n}\n";
    let sneaky = Configuration::of(&[("main.tf", SMALL), ("zzz_override.tf", backend)]);
    let run = ada.queue("web", &sneaky).await.unwrap();
    let run = ada.wait_for_run(&run.run_id, "the end", is_ended).await.unwrap();
    assert_eq!(run.state(), RunState::Errored);
    assert!(run.reason.contains("zzz_override.tf"), "{}", run.reason);
}

#[tokio::test]
async fn a_second_control_plane_on_the_same_data_refuses_to_start() {
    let options = StageOptions { runners: vec![], ..options() };
    let mut stage = Stage::start(options).await.unwrap();
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_latchkey-it"))
        .args(["control-plane", "--people-address", "127.0.0.1:0"])
        .args(["--runners-address", "127.0.0.1:0"])
        .arg("--data-dir")
        .arg(stage.plane.data_dir())
        .output()
        .unwrap();
    assert!(!output.status.success());
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("another process has it open"), "{said}");
    // The first one never noticed.
    stage.owner.create_environment("web", MfaPolicy::Never).await.unwrap();

    // A database that is gone is never replaced by an empty one.
    stage.plane.kill().await.unwrap();
    let store = stage.plane.data_dir().join("store");
    for lost in [store.join("sled"), store.clone(), stage.plane.data_dir().join("logs")] {
        fs::remove_dir_all(&lost).unwrap();
        let said = stage.plane.refused_start().await.unwrap();
        assert!(said.contains("restore the data directory from a backup"), "{said}");
    }
}
