//! What takes a code is not done without; what becomes of a code is recorded once.

mod between;
mod bounds;
mod create;
mod guard;
mod right;

use std::time::Duration;

use latchkey_aws_simulator::{Effect, Fault};
use latchkey_domain::policy::MfaPolicy;
use latchkey_proto::v1::Reason;

use super::GivenCode;
use crate::app::fixture::{ENVIRONMENT, Fixture, ORGANIZATION};
use crate::app::settings::SettingsChange;
use crate::app::variables::{NewVariable, Scope};
use crate::error::Result;
use crate::store::record::variable::Category;

fn policy(policy: MfaPolicy) -> SettingsChange {
    SettingsChange { policy: Some(policy), ..SettingsChange::default() }
}

fn proof(code: &str, request_id: &str) -> Option<GivenCode> {
    Some(GivenCode { code: code.into(), request_id: request_id.into() })
}

async fn level(fixture: &Fixture) -> MfaPolicy {
    fixture.environment().await.environment.settings.policy
}

fn variable(name: &str, value: &str) -> NewVariable {
    NewVariable {
        name: name.into(),
        category: Category::Environment,
        value: value.into(),
        sensitive: true,
        hcl: false,
    }
}

async fn set(fixture: &Fixture, name: &str, value: &str, proof: Option<GivenCode>) -> Result<()> {
    let (app, owner) = (&fixture.app, &fixture.owner);
    let variable = variable(name, value);
    app.set_variable(owner, ORGANIZATION, &Scope::Organization, variable, proof).await.map(drop)
}

#[tokio::test]
async fn a_lower_level_takes_a_code_and_is_set_once() {
    let fixture = Fixture::new(MfaPolicy::PlansAndApplies).await;
    let refused = fixture.try_settings(policy(MfaPolicy::Never), None).await.unwrap_err();
    let said = (refused.reason(), refused.field_name());
    assert_eq!(said, (Reason::MfaRequired, Some("token_code")));
    assert_eq!(fixture.aws.calls().len(), 0);

    let wrong = proof("000000", "wrong");
    let refused = fixture.try_settings(policy(MfaPolicy::Never), wrong).await.unwrap_err();
    let said = (refused.reason(), refused.field_name());
    assert_eq!(said, (Reason::CodeRejected, Some("token_code")));
    assert_eq!(level(&fixture).await, MfaPolicy::PlansAndApplies);

    let right = fixture.proof("right");
    let changed = fixture.try_settings(policy(MfaPolicy::Never), right.clone()).await.unwrap();
    assert_eq!(changed.environment.settings.policy, MfaPolicy::Never);
    assert_eq!(fixture.aws.requests_for("GetSessionToken"), 2);
    assert_eq!(fixture.aws.requests_for("GetCallerIdentity"), 1);
    let audited: Vec<_> = fixture.audited().await.into_iter().map(|(action, _)| action).collect();
    let last: Vec<_> = audited.iter().rev().take(5).rev().map(String::as_str).collect();
    assert_eq!(
        last,
        ["submit_code", "refuse_code", "submit_code", "update_environment", "authenticate_change"]
    );

    // A repeat spends nothing and undoes nothing that was set since.
    fixture.settings(policy(MfaPolicy::AppliesOnly)).await;
    fixture.try_settings(policy(MfaPolicy::Never), right.clone()).await.unwrap();
    assert_eq!(level(&fixture).await, MfaPolicy::AppliesOnly);
    assert_eq!(fixture.aws.requests_for("GetSessionToken"), 2);
    // One request id is for one change, and one code for one request.
    let other = SettingsChange { auto_apply: Some(true), ..policy(MfaPolicy::Never) };
    let refused = fixture.try_settings(other.clone(), right.clone()).await.unwrap_err();
    assert_eq!(refused.field_name(), Some("request_id"));
    let again = GivenCode { request_id: "again".into(), ..right.unwrap() };
    let refused = fixture.try_settings(other, Some(again)).await.unwrap_err();
    assert_eq!(refused.reason(), Reason::CodeUsed);
}

#[tokio::test]
async fn attempts_for_changes_and_for_runs_are_counted_together() {
    let fixture = Fixture::new(MfaPolicy::PlansAndApplies).await;
    let run = fixture.queue("one").await;
    for n in 0..3 {
        let wrong = proof(&format!("00000{n}"), &format!("w{n}"));
        fixture.try_settings(policy(MfaPolicy::Never), wrong).await.unwrap_err();
    }
    for n in 3..5 {
        fixture.submit(&run, &format!("00000{n}"), &format!("w{n}")).await.unwrap_err();
    }
    let code = fixture.code();
    let sixth = proof(&code, "sixth");
    let refused = fixture.try_settings(policy(MfaPolicy::Never), sixth).await.unwrap_err();
    assert_eq!(refused.reason(), Reason::DeviceBusy);
    assert_eq!(fixture.aws.requests_with_code(&code), 0);
    // Nothing was recorded of it: the same request may come again.
    fixture.clock.advance(Duration::from_secs(180));
    fixture.try_settings(policy(MfaPolicy::Never), proof(&code, "sixth")).await.unwrap();
}

#[tokio::test]
async fn what_is_malformed_or_forbidden_spends_no_code() {
    let fixture = Fixture::new(MfaPolicy::PlansAndApplies).await;
    let never = || policy(MfaPolicy::Never);
    let refused = fixture.try_settings(never(), proof("12345", "bad")).await.unwrap_err();
    assert_eq!(refused.field_name(), Some("token_code"));
    let refused = fixture.try_settings(never(), proof("123456", "")).await.unwrap_err();
    assert_eq!(refused.field_name(), Some("request_id"));
    let odd = SettingsChange { pool: Some("nowhere".into()), ..never() };
    let refused = fixture.try_settings(odd, fixture.proof("odd")).await.unwrap_err();
    assert_eq!(refused.field_name(), Some("pool"));
    let admin = fixture.member("bob", crate::store::record::people::Access::Admin).await;
    let refused = fixture
        .app
        .update_environment(&admin, ORGANIZATION, ENVIRONMENT, never(), fixture.proof("bob"))
        .await
        .unwrap_err();
    assert_eq!(refused.reason(), Reason::NotAllowed);
    // What needs none spends none, also where one is given.
    let region = SettingsChange { region: Some("eu-west-1".into()), ..SettingsChange::default() };
    fixture.try_settings(region, fixture.proof("spare")).await.unwrap();
    assert_eq!(fixture.aws.calls().len(), 0);
}

#[tokio::test]
async fn a_lost_answer_changes_nothing_and_the_code_is_never_resent() {
    let fixture = Fixture::new(MfaPolicy::PlansAndApplies).await;
    fixture.aws.script(Fault::new(Effect::Reset).on("GetSessionToken").after_processing());
    let given = fixture.proof("one");
    let never = || policy(MfaPolicy::Never);
    for _ in 0..2 {
        let refused = fixture.try_settings(never(), given.clone()).await.unwrap_err();
        assert_eq!(refused.reason(), Reason::ExchangeUnknown);
    }
    assert_eq!(fixture.aws.requests_for("GetSessionToken"), 1);
    assert_eq!(level(&fixture).await, MfaPolicy::PlansAndApplies);
}

#[tokio::test]
async fn an_attempt_that_a_crash_cut_off_is_unknown_after_the_start() {
    let fixture = Fixture::new(MfaPolicy::PlansAndApplies).await;
    fixture.aws.script(Fault::delay(Duration::from_secs(600)).on("GetSessionToken"));
    let given = fixture.proof("cut");
    let (app, owner, cut) = (fixture.app.clone(), fixture.owner.clone(), given.clone());
    let asking = tokio::spawn(async move {
        let change = policy(MfaPolicy::Never);
        app.update_environment(&owner, ORGANIZATION, ENVIRONMENT, change, cut).await
    });
    let limit = Duration::from_secs(10);
    fixture.aws.wait_for_calls(limit, |calls| calls.len() == 1).await.unwrap();
    asking.abort();
    let after = fixture.restarted(None).await;
    after.settle_changes().await.unwrap();
    let change = policy(MfaPolicy::Never);
    let refused = after
        .update_environment(&fixture.owner, ORGANIZATION, ENVIRONMENT, change, given)
        .await
        .unwrap_err();
    assert_eq!(refused.reason(), Reason::ExchangeUnknown);
    assert_eq!(level(&fixture).await, MfaPolicy::PlansAndApplies);
    after.settle_changes().await.unwrap();
}

#[tokio::test]
async fn another_list_of_accounts_takes_a_code_but_not_the_first() {
    let fixture = Fixture::new(MfaPolicy::Never).await;
    let (app, owner) = (&fixture.app, &fixture.owner);
    let listed = app.show_organization(owner, ORGANIZATION).await.unwrap().aws_accounts;
    // The same list is no change.
    app.update_organization(owner, ORGANIZATION, listed.clone(), None).await.unwrap();
    let more = [listed, vec!["210987654321".to_owned()]].concat();
    let refused = app.update_organization(owner, ORGANIZATION, more.clone(), None).await;
    assert_eq!(refused.unwrap_err().reason(), Reason::MfaRequired);
    let given = fixture.proof("more");
    let changed = app.update_organization(owner, ORGANIZATION, more.clone(), given).await.unwrap();
    assert_eq!(changed.aws_accounts, more);
}

#[tokio::test]
async fn the_triple_is_replaced_with_a_code_of_the_one_before() {
    let fixture = Fixture::new(MfaPolicy::Never).await;
    let facts = fixture.aws.facts();
    for name in ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_MFA_SERIAL_NUMBER"] {
        let value = if name.ends_with("NUMBER") { "GAHT12345678" } else { "AKIAQNZGKIQY56JQ7WML" };
        let refused = set(&fixture, name, value, None).await.unwrap_err();
        assert_eq!(refused.reason(), Reason::MfaRequired, "{name}");
        let variable = (Category::Environment, name);
        let refused = fixture
            .app
            .delete_variable(&fixture.owner, ORGANIZATION, &Scope::Organization, variable, None)
            .await
            .unwrap_err();
        assert_eq!(refused.reason(), Reason::MfaRequired, "{name}");
    }
    assert_eq!(fixture.aws.calls().len(), 0);
    // Terraform variables and others are nobody's business.
    set(&fixture, "AWS_DEFAULT_REGION", "eu-west-1", None).await.unwrap();
    // Another access key takes the secret of the old one away, or nobody could go on.
    let given = fixture.proof("replace");
    set(&fixture, "AWS_ACCESS_KEY_ID", "AKIAQNZGKIQY56JQ7WML", given).await.unwrap();
    set(&fixture, "AWS_SECRET_ACCESS_KEY", "another", None).await.unwrap();
    // It is whole again.
    let refused = set(&fixture, "AWS_ACCESS_KEY_ID", &facts.access_key_id, None).await;
    assert_eq!(refused.unwrap_err().reason(), Reason::MfaRequired);
}

#[tokio::test]
async fn a_personal_triple_guards_its_owners_changes() {
    let fixture = Fixture::new(MfaPolicy::AppliesOnly).await;
    let (app, owner, facts) = (&fixture.app, &fixture.owner, fixture.aws.facts());
    let secret = facts.secret_access_key.expose().to_owned();
    let own = [
        ("AWS_ACCESS_KEY_ID", facts.access_key_id.as_str()),
        ("AWS_SECRET_ACCESS_KEY", secret.as_str()),
        ("AWS_MFA_SERIAL_NUMBER", facts.mfa_serial.as_str()),
    ];
    let scope = Scope::Personal;
    for (name, value) in own {
        let first = variable(name, value);
        // Of the organization's device, for what makes it whole.
        let given = fixture.proof("first").filter(|_| name == "AWS_MFA_SERIAL_NUMBER");
        app.set_variable(owner, ORGANIZATION, &scope, first, given).await.unwrap();
    }
    let other = variable("AWS_MFA_SERIAL_NUMBER", "GAHT12345678");
    let refused = app.set_variable(owner, ORGANIZATION, &scope, other.clone(), None).await;
    assert_eq!(refused.unwrap_err().reason(), Reason::MfaRequired);
    app.set_variable(owner, ORGANIZATION, &scope, other, fixture.proof("own")).await.unwrap();
    // From now on it is that device which owns the changes: AWS does not know it.
    let never = policy(MfaPolicy::Never);
    let refused = fixture.try_settings(never, fixture.proof("no")).await.unwrap_err();
    assert_eq!(refused.reason(), Reason::DeviceRejected, "{refused}");
    assert!(refused.message().contains("break-glass"), "{refused}");
}

#[tokio::test]
async fn the_first_set_up_takes_no_code() {
    let fixture = Fixture::new(MfaPolicy::PlansAndApplies).await;
    let name = (Category::Environment, "AWS_MFA_SERIAL_NUMBER");
    let (app, owner, scope) = (&fixture.app, &fixture.owner, Scope::Organization);
    app.delete_variable(owner, ORGANIZATION, &scope, name, fixture.proof("gone")).await.unwrap();
    fixture.settings(policy(MfaPolicy::Never)).await;
    set(&fixture, "AWS_MFA_SERIAL_NUMBER", &fixture.aws.facts().mfa_serial, None).await.unwrap();
}
