//! The doctor against the simulated AWS.

use latchkey_aws_simulator::{KeyStatus, MfaCondition, Role};
use latchkey_domain::policy::MfaPolicy;
use latchkey_proto::v1::Reason;

use super::Check;
use crate::app::fixture::{ENVIRONMENT, Fixture, ORGANIZATION};
use crate::app::settings::SettingsChange;
use crate::error::Result;
use crate::store::record::check::{CheckOutcome, CheckStep};
use crate::store::record::environment::{CodeCredentials, RoleSettings, Roles};

async fn check(fixture: &Fixture, code: Option<&str>, id: &str) -> Result<Vec<CheckStep>> {
    let check = Check {
        organization: ORGANIZATION.into(),
        environment: ENVIRONMENT.into(),
        code: code.map(Into::into),
        request_id: id.into(),
    };
    fixture.app.check_environment(&fixture.owner, check).await
}

async fn with_roles(roles: [&str; 2]) -> Fixture {
    let fixture = Fixture::new(MfaPolicy::PlansAndApplies).await;
    let role = |name: &str| RoleSettings {
        arn: format!("arn:aws:iam::123456789012:role/{name}"),
        ..RoleSettings::default()
    };
    let change = SettingsChange {
        code_credentials: Some(CodeCredentials::Role),
        roles: Some(Roles { plan: role(roles[0]), apply: role(roles[1]) }),
        ..SettingsChange::default()
    };
    let (app, owner) = (&fixture.app, &fixture.owner);
    app.update_environment(owner, ORGANIZATION, ENVIRONMENT, change, None).await.unwrap();
    fixture
}

#[track_caller]
fn outcome(steps: &[CheckStep], name: &str) -> CheckOutcome {
    let found = steps.iter().find(|step| step.name == name);
    found.unwrap_or_else(|| panic!("{name}: {steps:#?}")).outcome
}

#[tokio::test]
async fn a_sound_session_environment_is_found_so_with_one_code_and_no_more() {
    let fixture = Fixture::new(MfaPolicy::PlansAndApplies).await;
    let steps = check(&fixture, None, "").await.unwrap();
    for name in ["triple", "serial", "partition", "account", "keys"] {
        assert_eq!(outcome(&steps, name), CheckOutcome::Ok, "{steps:#?}");
    }
    assert_eq!(outcome(&steps, "device"), CheckOutcome::Skipped);
    assert_eq!(fixture.aws.requests_for("GetSessionToken"), 0);

    let code = fixture.code();
    let steps = check(&fixture, Some(&code), "one").await.unwrap();
    assert_eq!(outcome(&steps, "device"), CheckOutcome::Ok);
    let again = check(&fixture, Some(&code), "one").await.unwrap();
    assert_eq!(again, steps, "a repeat is answered from the record");
    let other = check(&fixture, Some(&code), "two").await.unwrap();
    assert_eq!(outcome(&other, "device"), CheckOutcome::Failed);
    assert_eq!(fixture.aws.requests_with_code(&code), 1);
}

#[tokio::test]
async fn roles_are_assumed_as_a_run_would() {
    let fixture = with_roles(["read", "deploy"]).await;
    let steps = check(&fixture, None, "").await.unwrap();
    assert_eq!(outcome(&steps, "plan_role"), CheckOutcome::Ok);
    assert_eq!(outcome(&steps, "plan_role_duration"), CheckOutcome::Ok);
    assert_eq!(outcome(&steps, "apply_role"), CheckOutcome::Skipped);
    let steps = check(&fixture, Some(&fixture.code()), "one").await.unwrap();
    for name in ["device", "plan_role", "apply_role", "apply_role_external_id"] {
        assert_eq!(outcome(&steps, name), CheckOutcome::Ok, "{name}: {steps:#?}");
    }
    let with_code = fixture.aws.calls().into_iter().filter(|call| call.had_code).count();
    assert_eq!(with_code, 1);
}

#[tokio::test]
async fn each_thing_that_is_wrong_with_a_role_is_told_with_its_remedy() {
    let fixture = with_roles(["missing", "other"]).await;
    let external = fixture.app.external_id(fixture.organization().await).await.unwrap();
    fixture.aws.change_world(|world| {
        let mut role = Role::new("other", MfaCondition::NotDemanded);
        role.max_session_seconds = 3600;
        role.trust.external_id = Some(external.clone());
        world.put_role("123456789012", role).unwrap();
    });
    let change = SettingsChange {
        session_duration: Some(std::time::Duration::from_secs(7200)),
        ..SettingsChange::default()
    };
    let (app, owner) = (&fixture.app, &fixture.owner);
    app.update_environment(owner, ORGANIZATION, ENVIRONMENT, change, None).await.unwrap();
    let steps = check(&fixture, Some(&fixture.code()), "one").await.unwrap();
    assert_eq!(outcome(&steps, "plan_role"), CheckOutcome::Failed);
    let told = steps.iter().find(|step| step.name == "plan_role").unwrap();
    for part in ["user/latchkey", "role/missing", &external] {
        assert!(told.sentence.contains(part), "{part}: {told:?}");
    }
    assert_eq!(outcome(&steps, "apply_role"), CheckOutcome::Ok);
    assert_eq!(outcome(&steps, "apply_role_duration"), CheckOutcome::Failed);
    assert_eq!(outcome(&steps, "apply_role_external_id"), CheckOutcome::Ok);
    let told = steps.iter().find(|step| step.name == "apply_role_external_id").unwrap();
    assert!(told.sentence.contains(&external), "{told:?}");
}

#[tokio::test]
async fn no_code_is_spent_while_the_rest_is_wrong() {
    let fixture = Fixture::new(MfaPolicy::PlansAndApplies).await;
    let key = fixture.aws.facts().access_key_id;
    fixture.aws.change_world(|world| world.set_key_status(&key, KeyStatus::Inactive)).unwrap();
    let code = fixture.code();
    let steps = check(&fixture, Some(&code), "one").await.unwrap();
    assert_eq!(outcome(&steps, "keys"), CheckOutcome::Failed);
    assert_eq!(outcome(&steps, "device"), CheckOutcome::Skipped);
    assert_eq!(fixture.aws.requests_with_code(&code), 0);
    let error = check(&fixture, Some("12345"), "two").await.unwrap_err();
    assert_eq!(error.reason(), Reason::FieldInvalid);
}

#[tokio::test]
async fn a_request_that_comes_twice_at_once_is_one_check() {
    let fixture = Fixture::new(MfaPolicy::PlansAndApplies).await;
    let code = fixture.code();
    let (one, other) =
        tokio::join!(check(&fixture, Some(&code), "one"), check(&fixture, Some(&code), "one"));
    assert_eq!(fixture.aws.requests_with_code(&code), 1);
    for found in [one, other, check(&fixture, Some(&code), "one").await] {
        match found {
            Ok(steps) => assert_eq!(outcome(&steps, "device"), CheckOutcome::Ok, "{steps:#?}"),
            Err(error) => assert!(error.message().contains("under way"), "{error}"),
        }
    }
    let again = check(&fixture, Some(&code), "one").await.unwrap();
    assert_eq!(outcome(&again, "device"), CheckOutcome::Ok);
}
