//! The doctor against the simulated AWS.

use latchkey_aws_simulator::{Account, KeyStatus, MfaCondition, Role};
use latchkey_domain::policy::MfaPolicy;
use latchkey_proto::v1::Reason;

use super::{Check, Findings, check_device};
use crate::app::fixture::{ENVIRONMENT, Fixture, ORGANIZATION, narrowed_by};
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

/// Answers what the one step that failed says of it and of what to do.
#[track_caller]
fn one_failure<'a>(steps: &'a [CheckStep], name: &str) -> &'a CheckStep {
    let failed: Vec<_> = steps.iter().filter(|step| step.outcome == CheckOutcome::Failed).collect();
    let [one] = failed.as_slice() else { panic!("{failed:#?}") };
    assert_eq!(one.name, name, "{failed:#?}");
    one
}

/// None can be saved any more; one may have been before it was known for what it is.
#[test]
fn a_serial_that_is_none_is_told_with_what_one_looks_like() {
    for (serial, told) in [
        ("arn:aws:iam::123456789012:user/latchkey", "`:mfa/`"),
        ("arn:aws:iam::123456789012:u2f/user/latchkey/key", "virtual"),
        ("latchkey", "arn:aws:iam::"),
    ] {
        let mut findings = Findings::default();
        let serial = check_device(serial, "the organization's variables");
        assert!(!findings.judged("serial", serial, "it can be a device").unwrap());
        let step = one_failure(&findings.0, "serial");
        assert!(step.sentence.contains(told), "{step:?}");
    }
}

#[tokio::test]
async fn a_device_of_another_partition_is_told_with_what_to_set() {
    let fixture = Fixture::new(MfaPolicy::PlansAndApplies).await;
    let serial = "arn:aws-cn:iam::123456789012:mfa/latchkey";
    fixture.set("AWS_MFA_SERIAL_NUMBER", serial).await;
    let steps = check(&fixture, None, "").await.unwrap();
    let step = one_failure(&steps, "partition");
    for part in ["aws-cn", "us-east-1", "latchkey env set --region", "latchkey var set"] {
        assert!(step.sentence.contains(part), "{part}: {step:?}");
    }
}

#[tokio::test]
async fn an_account_that_is_not_listed_is_told_with_how_to_list_it() {
    let fixture = Fixture::new(MfaPolicy::PlansAndApplies).await;
    fixture.list_accounts(vec!["210987654321".into()]).await;
    let steps = check(&fixture, None, "").await.unwrap();
    let step = one_failure(&steps, "account");
    for part in ["123456789012", "latchkey org"] {
        assert!(step.sentence.contains(part), "{part}: {step:?}");
    }
    fixture.list_accounts(vec!["123456789012".into()]).await;
    let steps = check(&fixture, None, "").await.unwrap();
    assert_eq!(outcome(&steps, "account"), CheckOutcome::Ok);
}

#[tokio::test]
async fn a_far_role_that_demands_no_external_id_is_told_with_the_condition_to_add() {
    let fixture = Fixture::new(MfaPolicy::PlansAndApplies).await;
    let external_id = fixture.app.external_id(fixture.organization().await).await.unwrap();
    let far = |external_id: Option<String>| {
        fixture.aws.change_world(|world| {
            let mut account = Account::new("210987654321");
            let mut role = Role::new("far", MfaCondition::Demanded);
            role.trust.principals = vec!["123456789012".into()];
            role.trust.external_id = external_id;
            account.roles.push(role);
            world.accounts.retain(|known| known.id != account.id);
            world.accounts.push(account);
        });
    };
    far(None);
    let role = RoleSettings {
        arn: "arn:aws:iam::210987654321:role/far".into(),
        ..RoleSettings::default()
    };
    let change = SettingsChange {
        code_credentials: Some(CodeCredentials::Role),
        roles: Some(Roles { plan: role.clone(), apply: role }),
        ..SettingsChange::default()
    };
    let (app, owner) = (&fixture.app, &fixture.owner);
    app.update_environment(owner, ORGANIZATION, ENVIRONMENT, change, None).await.unwrap();
    let steps = check(&fixture, Some(&fixture.code()), "one").await.unwrap();
    for name in ["plan_role_external_id", "apply_role_external_id"] {
        assert_eq!(outcome(&steps, name), CheckOutcome::Failed, "{steps:#?}");
        let step = steps.iter().find(|step| step.name == name).unwrap();
        let condition = format!("StringEquals sts:ExternalId {external_id}");
        assert!(step.remedy.contains(&condition), "{step:?}");
    }
    // As told.
    far(Some(external_id));
    let steps = check(&fixture, Some(&fixture.code()), "two").await.unwrap();
    for name in ["plan_role", "apply_role", "plan_role_external_id", "apply_role_external_id"] {
        assert_eq!(outcome(&steps, name), CheckOutcome::Ok, "{steps:#?}");
    }
}

#[tokio::test]
async fn policies_that_nearly_fill_their_space_are_told_with_where_else_to_put_them() {
    let fixture = with_roles(["read", "read"]).await;
    let change = SettingsChange {
        roles: Some(Roles { plan: narrowed_by(700), apply: narrowed_by(900) }),
        ..SettingsChange::default()
    };
    let (app, owner) = (&fixture.app, &fixture.owner);
    let proof = fixture.proof("change");
    app.update_environment(owner, ORGANIZATION, ENVIRONMENT, change, proof).await.unwrap();
    let steps = check(&fixture, None, "").await.unwrap();
    assert_eq!(outcome(&steps, "plan_role_packed_size"), CheckOutcome::Ok, "{steps:#?}");
    let step = one_failure(&steps, "apply_role_packed_size");
    assert!(step.sentence.contains(" % of the space"), "{step:?}");
    assert!(step.remedy.contains("shorten the session policy"), "{step:?}");
}
