//! A new environment takes a code where it would give or allow more than one does by default.

use latchkey_domain::policy::MfaPolicy;
use latchkey_proto::v1::Reason;

use super::policy;
use crate::app::fixture::{Fixture, ORGANIZATION};
use crate::app::settings::SettingsChange;
use crate::error::Result;
use crate::store::record::environment::{CodeCredentials, PlainCredentials, RoleSettings, Roles};

async fn create(
    fixture: &Fixture,
    (name, request_id): (&str, &str),
    settings: SettingsChange,
    code: Option<String>,
) -> Result<String> {
    let (app, owner) = (&fixture.app, &fixture.owner);
    let code = code.map(Into::into);
    let made = app.create_environment(owner, ORGANIZATION, name, settings, request_id, code);
    Ok(made.await?.environment.id.to_string())
}

fn roles() -> Option<Roles> {
    let role = RoleSettings {
        arn: "arn:aws:iam::123456789012:role/admin".into(),
        ..RoleSettings::default()
    };
    Some(Roles { plan: role.clone(), apply: role })
}

fn long_term() -> SettingsChange {
    let plain_credentials = Some(PlainCredentials::Static);
    SettingsChange { plain_credentials, ..policy(MfaPolicy::Never) }
}

#[tokio::test]
async fn the_long_term_keys_do_not_leave_by_a_new_environment_without_a_code() {
    let fixture = Fixture::new(MfaPolicy::PlansAndApplies).await;
    let by_role = SettingsChange {
        plain_credentials: Some(PlainCredentials::Role),
        roles: roles(),
        ..SettingsChange::default()
    };
    let by_itself = SettingsChange { auto_apply: Some(true), ..SettingsChange::default() };
    for settings in [long_term(), by_role, by_itself] {
        let refused = create(&fixture, ("x", "x"), settings, None).await.unwrap_err();
        let said = (refused.reason(), refused.field_name());
        assert_eq!(said, (Reason::MfaRequired, Some("token_code")));
    }
    assert_eq!(fixture.aws.calls().len(), 0);
    let wrong = Some("000000".to_owned());
    let refused = create(&fixture, ("x", "wrong"), long_term(), wrong).await.unwrap_err();
    assert_eq!(refused.reason(), Reason::CodeRejected);
    let code = Some(fixture.code());
    let made = create(&fixture, ("x", "right"), long_term(), code.clone()).await.unwrap();
    // A repeat answers the same and spends nothing.
    let again = create(&fixture, ("x", "right"), long_term(), code).await.unwrap();
    assert_eq!(made, again);
    assert_eq!(fixture.aws.requests_for("GetSessionToken"), 2);
    // A name that is taken costs no code.
    let code = Some(fixture.code());
    let refused = create(&fixture, ("x", "taken"), long_term(), code).await.unwrap_err();
    assert_eq!(refused.reason(), Reason::NameTaken);
    assert_eq!(fixture.aws.requests_for("GetSessionToken"), 2);
}

#[tokio::test]
async fn what_is_no_weaker_than_the_default_is_made_without_a_code() {
    let fixture = Fixture::new(MfaPolicy::PlansAndApplies).await;
    let settings = SettingsChange {
        plain_credentials: Some(PlainCredentials::None),
        code_credentials: Some(CodeCredentials::Role),
        roles: roles(),
        second_person: Some(true),
        ..policy(MfaPolicy::AppliesOnly)
    };
    create(&fixture, ("x", "x"), settings, None).await.unwrap();
    create(&fixture, ("y", "y"), SettingsChange::default(), None).await.unwrap();
}

#[tokio::test]
async fn one_request_sent_twice_at_once_makes_one_environment_and_answers_it_twice() {
    let fixture = Fixture::new(MfaPolicy::Never).await;
    let app = fixture.in_twos().await;
    let make = || {
        let settings = SettingsChange::default();
        app.create_environment(&fixture.owner, ORGANIZATION, "x", settings, "x", None)
    };
    let (one, other) = tokio::join!(make(), make());
    assert_eq!(one.unwrap().environment.id, other.unwrap().environment.id);
}
