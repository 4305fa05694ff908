//! Whose device guards, and that nobody gets round it.

use latchkey_domain::policy::MfaPolicy;
use latchkey_proto::v1::Reason;

use super::{level, policy, proof, set, variable};
use crate::app::fixture::{ENVIRONMENT, Fixture, ORGANIZATION};
use crate::app::variables::Scope;
use crate::auth::Caller;
use crate::error::Result;
use crate::store::record::people::Role;
use crate::store::record::variable::Category;

const TRIPLE: [&str; 3] = ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_MFA_SERIAL_NUMBER"];

/// Sets a personal triple, the device last.
async fn own(
    fixture: &Fixture,
    who: &Caller,
    given: Option<crate::app::guarded_change::GivenCode>,
) -> Result<()> {
    let facts = fixture.aws.facts();
    let secret = facts.secret_access_key.expose().to_owned();
    let values = [facts.access_key_id, secret, facts.mfa_serial];
    for (name, value) in TRIPLE.into_iter().zip(values) {
        let given = given.clone().filter(|_| name == TRIPLE[2]);
        let variable = variable(name, &value);
        let app = &fixture.app;
        app.set_variable(who, ORGANIZATION, &Scope::Personal, variable, given).await?;
    }
    Ok(())
}

async fn never(fixture: &Fixture, who: &Caller) -> Result<()> {
    let change = policy(MfaPolicy::Never);
    let app = &fixture.app;
    app.update_environment(who, ORGANIZATION, ENVIRONMENT, change, None).await.map(drop)
}

/// An organization whose people use devices of their own, and ada hers.
async fn of_persons() -> Fixture {
    let fixture = Fixture::new(MfaPolicy::PlansAndApplies).await;
    for name in TRIPLE {
        fixture.unset(name).await;
    }
    own(&fixture, &fixture.owner, None).await.unwrap();
    fixture
}

#[tokio::test]
async fn another_owner_without_a_device_weakens_nothing() {
    let fixture = of_persons().await;
    let mallory = fixture.user("mallory", Role::Owner).await;
    let refused = never(&fixture, &mallory).await.unwrap_err();
    assert_eq!(refused.reason(), Reason::TripleIncomplete, "{refused}");
    assert!(refused.message().contains("your own"), "{refused}");
    let more = vec!["210987654321".to_owned()];
    let refused = fixture.app.update_organization(&mallory, ORGANIZATION, more, None).await;
    assert_eq!(refused.unwrap_err().reason(), Reason::TripleIncomplete);
    // Nor do they set keys for everybody.
    let name = variable(TRIPLE[0], "AKIAQNZGKIQY56JQ7WML");
    let scope = Scope::Organization;
    let refused = fixture.app.set_variable(&mallory, ORGANIZATION, &scope, name, None).await;
    assert_eq!(refused.unwrap_err().reason(), Reason::TripleIncomplete);
    assert_eq!(level(&fixture).await, MfaPolicy::PlansAndApplies);
    // What it protects less by is still theirs to change; and with a device of their own, all.
    let stricter = policy(MfaPolicy::PlansAndApplies);
    let app = &fixture.app;
    app.update_environment(&mallory, ORGANIZATION, ENVIRONMENT, stricter, None).await.unwrap();
    own(&fixture, &mallory, None).await.unwrap();
    let (change, given) = (policy(MfaPolicy::Never), fixture.proof("mallory"));
    app.update_environment(&mallory, ORGANIZATION, ENVIRONMENT, change, given).await.unwrap();
}

#[tokio::test]
async fn a_reset_or_a_removal_takes_the_guard_from_nobody() {
    let fixture = of_persons().await;
    let app = &fixture.app;
    app.reset_user(&fixture.owner, ORGANIZATION, "ada", "own").await.unwrap();
    let refused = never(&fixture, &fixture.owner).await.unwrap_err();
    assert_eq!(refused.reason(), Reason::TripleIncomplete, "{refused}");

    let fixture = of_persons().await;
    let app = &fixture.app;
    let mallory = fixture.user("mallory", Role::Owner).await;
    app.remove_member(&mallory, ORGANIZATION, "ada").await.unwrap();
    let refused = never(&fixture, &mallory).await.unwrap_err();
    assert_eq!(refused.reason(), Reason::TripleIncomplete, "{refused}");
    // Where nobody has a device any more, the organization gets one without a code, as after
    // break-glass; and what weakens takes its code.
    let facts = fixture.aws.facts();
    let secret = facts.secret_access_key.expose().to_owned();
    for (name, value) in TRIPLE.into_iter().zip([facts.access_key_id, secret, facts.mfa_serial]) {
        let variable = variable(name, &value);
        app.set_variable(&mallory, ORGANIZATION, &Scope::Organization, variable, None)
            .await
            .unwrap();
    }
    assert_eq!(never(&fixture, &mallory).await.unwrap_err().reason(), Reason::MfaRequired);
}

#[tokio::test]
async fn guards_of_before_they_were_noted_are_noted_at_the_start() {
    let fixture = of_persons().await;
    fixture.forget_guard().await;
    fixture.app.settle_changes().await.unwrap();
    fixture.app.reset_user(&fixture.owner, ORGANIZATION, "ada", "own").await.unwrap();
    let refused = never(&fixture, &fixture.owner).await.unwrap_err();
    assert_eq!(refused.reason(), Reason::TripleIncomplete, "{refused}");
}

#[tokio::test]
async fn the_last_device_is_given_up_with_a_code_of_it_and_then_nothing_takes_one() {
    let fixture = of_persons().await;
    let (app, owner) = (&fixture.app, &fixture.owner);
    let name = (crate::store::record::variable::Category::Environment, TRIPLE[2]);
    let given = fixture.proof("gone");
    app.delete_variable(owner, ORGANIZATION, &Scope::Personal, name, given).await.unwrap();
    never(&fixture, owner).await.unwrap();
}

#[tokio::test]
async fn an_owner_takes_a_device_of_their_own_by_a_code_of_the_organizations() {
    let fixture = Fixture::new(MfaPolicy::AppliesOnly).await;
    let owner = &fixture.owner;
    let refused = own(&fixture, owner, None).await.unwrap_err();
    assert_eq!(refused.reason(), Reason::MfaRequired, "{refused}");
    let wrong = proof("000000", "wrong");
    let refused = own(&fixture, owner, wrong).await.unwrap_err();
    assert_eq!(refused.reason(), Reason::CodeRejected, "{refused}");
    own(&fixture, owner, fixture.proof("own")).await.unwrap();
    // Others decide nothing of what a code guards.
    let bob = fixture.user("bob", Role::Member).await;
    own(&fixture, &bob, None).await.unwrap();
    assert!(set(&fixture, TRIPLE[2], "GAHT12345678", None).await.is_err());
}

#[tokio::test]
async fn who_replaces_keys_by_a_code_completes_them_without_another() {
    let fixture = Fixture::new(MfaPolicy::AppliesOnly).await;
    let app = &fixture.app;
    let other_key = "AKIAQNZGKIQY56JQ7WML";
    let secret = "another/secret/key/of/forty/characters/0";
    // The organization's, while somebody else has a device.
    let eve = fixture.user("eve", Role::Owner).await;
    own(&fixture, &eve, fixture.proof("eve")).await.unwrap();
    set(&fixture, TRIPLE[0], other_key, fixture.proof("key")).await.unwrap();
    let theirs = variable(TRIPLE[1], secret);
    let mallory = fixture.user("mallory", Role::Owner).await;
    let scope = Scope::Organization;
    let refused = app.set_variable(&mallory, ORGANIZATION, &scope, theirs, None).await;
    assert_eq!(refused.unwrap_err().reason(), Reason::TripleIncomplete);
    set(&fixture, TRIPLE[2], "arn:aws:iam::123456789012:mfa/other", None).await.unwrap();
    set(&fixture, TRIPLE[1], secret, None).await.unwrap();
    assert!(set(&fixture, TRIPLE[1], secret, None).await.is_err(), "it is whole again");
    // One's own, while the organization has one.
    let fixture = Fixture::new(MfaPolicy::AppliesOnly).await;
    let owner_of = &fixture.owner;
    own(&fixture, owner_of, fixture.proof("own")).await.unwrap();
    let (app, scope) = (&fixture.app, Scope::Personal);
    let key = variable(TRIPLE[0], other_key);
    app.set_variable(owner_of, ORGANIZATION, &scope, key, fixture.proof("key")).await.unwrap();
    let own_secret = variable(TRIPLE[1], secret);
    app.set_variable(owner_of, ORGANIZATION, &scope, own_secret, None).await.unwrap();
}

#[tokio::test]
async fn what_a_member_sets_for_themselves_guards_nothing_until_they_are_an_owner() {
    let fixture = Fixture::new(MfaPolicy::AppliesOnly).await;
    let bob = fixture.user("bob", Role::Member).await;
    own(&fixture, &bob, None).await.unwrap();
    let change =
        || crate::app::members::MemberChange { role: Some(Role::Owner), ..Default::default() };
    let (app, owner) = (&fixture.app, &fixture.owner);
    let refused = app.update_member(owner, ORGANIZATION, "bob", change()).await.unwrap_err();
    assert_eq!(refused.reason(), Reason::WrongState, "{refused}");
    // Without one of the organization's, three values of a member lock no owner out.
    let device = (Category::Environment, TRIPLE[2]);
    let scope = Scope::Organization;
    let by_code = fixture.proof("last");
    app.delete_variable(owner, ORGANIZATION, &scope, device, by_code).await.unwrap();
    never(&fixture, owner).await.unwrap();
    fixture.settings(policy(MfaPolicy::AppliesOnly)).await;
    // As an owner's they guard.
    app.update_member(owner, ORGANIZATION, "bob", change()).await.unwrap();
    let refused = never(&fixture, owner).await.unwrap_err();
    assert_eq!(refused.reason(), Reason::TripleIncomplete, "{refused}");
}
