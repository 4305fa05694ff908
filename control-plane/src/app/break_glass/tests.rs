//! The way out for a lost device: loud, and shown until a code backs the policy again.

use latchkey_domain::policy::MfaPolicy;
use latchkey_proto::v1::Reason;

use super::{Glass, Level};
use crate::app::fixture::{ENVIRONMENT, Fixture, ORGANIZATION};
use crate::app::members::MemberChange;
use crate::app::notices::Wish;
use crate::app::settings::SettingsChange;
use crate::store::record::notice::Event;
use crate::store::record::people::{Access, Role};

fn policy(policy: MfaPolicy) -> SettingsChange {
    SettingsChange { policy: Some(policy), ..SettingsChange::default() }
}

fn never(environment: Option<&str>) -> Glass {
    Glass::Policy { environment: environment.map(str::to_owned), level: Level::Never }
}

#[tokio::test]
async fn a_broken_policy_is_audited_and_shown_until_a_code_sets_it_again() {
    let fixture = Fixture::new(MfaPolicy::PlansAndApplies).await;
    let change = SettingsChange { second_person: Some(true), ..SettingsChange::default() };
    fixture.settings(change).await;
    let glass = never(Some(ENVIRONMENT));
    let done = fixture.app.break_glass(ORGANIZATION, &glass, "lost it").await.unwrap();
    assert_eq!(done.done, ["environment web: the policy was set to never"]);
    assert_eq!(done.told, 0);
    let environment = fixture.environment().await.environment;
    assert_eq!(environment.settings.policy, MfaPolicy::Never);
    assert!(!environment.settings.second_person);
    assert_eq!(environment.break_glass.unwrap().reason, "lost it");
    assert!(fixture.audited().await.contains(&("break_glass".into(), "host".into())));
    // Stricter takes no code, and so clears nothing.
    fixture.settings(policy(MfaPolicy::AppliesOnly)).await;
    assert!(fixture.environment().await.environment.break_glass.is_some());
    // With one that is given, it does.
    let change = policy(MfaPolicy::PlansAndApplies);
    fixture.try_settings(change, fixture.proof("mend")).await.unwrap();
    assert!(fixture.environment().await.environment.break_glass.is_none());
    assert_eq!(fixture.aws.requests_for("GetSessionToken"), 1);
}

#[tokio::test]
async fn glass_never_raises_a_level_and_does_nothing_twice() {
    let fixture = Fixture::new(MfaPolicy::Never).await;
    let glass = Glass::Policy { environment: None, level: Level::AppliesOnly };
    let done = fixture.app.break_glass(ORGANIZATION, &glass, "lost it").await.unwrap();
    assert!(done.done.is_empty());
    assert!(fixture.environment().await.environment.break_glass.is_none());
}

#[tokio::test]
async fn a_cleared_triple_guards_nothing_any_more_and_is_shown() {
    let fixture = Fixture::new(MfaPolicy::AppliesOnly).await;
    let glass = Glass::Triple { user: None };
    let done = fixture.app.break_glass(ORGANIZATION, &glass, "lost it").await.unwrap();
    assert_eq!(done.done.len(), 1);
    let broken = fixture.environment().await.environment.break_glass.unwrap();
    assert!(broken.what.contains("the organization were cleared"), "{broken:?}");
    fixture.settings(policy(MfaPolicy::Never)).await;
    assert!(fixture.environment().await.environment.break_glass.is_some());
}

#[tokio::test]
async fn glass_needs_a_reason_and_names_that_are_there() {
    let fixture = Fixture::new(MfaPolicy::AppliesOnly).await;
    let refused = |organization: &'static str, glass: Glass, reason: &'static str| {
        let app = &fixture.app;
        async move { app.break_glass(organization, &glass, reason).await.unwrap_err().reason() }
    };
    assert_eq!(refused(ORGANIZATION, never(None), "  ").await, Reason::FieldInvalid);
    assert_eq!(refused("nobody", never(None), "lost it").await, Reason::NotFound);
    assert_eq!(refused(ORGANIZATION, never(Some("no")), "lost it").await, Reason::NotFound);
    let glass = Glass::Triple { user: Some("nobody".into()) };
    assert_eq!(refused(ORGANIZATION, glass, "lost it").await, Reason::NotFound);
    assert_eq!(fixture.environment().await.environment.settings.policy, MfaPolicy::AppliesOnly);
}

/// What an owner is told, as (organization, what, reason).
async fn told(fixture: &Fixture, who: &crate::auth::Caller) -> Vec<(String, String, String)> {
    let who = fixture.app.who_am_i(who).await.unwrap();
    let told = who.broken_glass.into_iter();
    told.map(|(organization, glass)| (organization, glass.what, glass.reason)).collect()
}

#[tokio::test]
async fn every_owner_is_told_until_they_acknowledge_it_and_nobody_else() {
    let fixture = Fixture::new(MfaPolicy::PlansAndApplies).await;
    let (app, ada) = (&fixture.app, &fixture.owner);
    let bob = fixture.user("bob", Role::Owner).await;
    let carol = fixture.member("carol", Access::Admin).await;
    let program = fixture.service_token("ci").await;
    let glass = never(Some(ENVIRONMENT));
    app.break_glass(ORGANIZATION, &glass, "lost it").await.unwrap();
    app.break_glass(ORGANIZATION, &Glass::Triple { user: None }, "for good").await.unwrap();
    let both = [
        (ORGANIZATION, "environment web: the policy was set to never", "lost it"),
        (ORGANIZATION, "the keys and the device of the organization were cleared", "for good"),
    ];
    let both: Vec<_> =
        both.iter().map(|(a, b, c)| ((*a).to_owned(), (*b).to_owned(), (*c).to_owned())).collect();
    assert_eq!(told(&fixture, ada).await, both);
    assert_eq!(told(&fixture, ada).await, both, "to look is not to acknowledge");
    assert_eq!(told(&fixture, &carol).await, []);
    assert_eq!(told(&fixture, &program).await, []);

    let unseen = app.who_am_i(ada).await.unwrap().broken_glass;
    let (first, last) = (unseen[0].1.id.0, unseen[1].1.id.0);
    for (caller, reason) in [(&carol, Reason::NotAllowed), (&program, Reason::PersonRequired)] {
        let done = app.acknowledge_glass(caller, ORGANIZATION, last).await;
        assert_eq!(done.unwrap_err().reason(), reason);
    }
    let unknown = latchkey_domain::id::GlassId::from_bytes([9; 16]);
    let done = app.acknowledge_glass(ada, ORGANIZATION, unknown).await;
    assert_eq!(done.unwrap_err().reason(), Reason::NotFound);
    app.acknowledge_glass(ada, ORGANIZATION, first).await.unwrap();
    assert_eq!(told(&fixture, ada).await, both[1..]);
    app.acknowledge_glass(ada, ORGANIZATION, last).await.unwrap();
    // Never back.
    app.acknowledge_glass(ada, ORGANIZATION, first).await.unwrap();
    assert_eq!(told(&fixture, ada).await, []);
    assert_eq!(told(&fixture, &bob).await, both, "each for themselves");
    // Who becomes an owner is told, too.
    let change = MemberChange { role: Some(Role::Owner), ..MemberChange::default() };
    app.update_member(ada, ORGANIZATION, "carol", change).await.unwrap();
    assert_eq!(told(&fixture, &carol).await, both);
    let acknowledged = ("acknowledge_break_glass".to_owned(), "user ada".to_owned());
    let audited = fixture.audited().await;
    assert_eq!(audited.iter().filter(|record| **record == acknowledged).count(), 2);
}

#[tokio::test]
async fn a_broken_glass_goes_to_every_subscriber_whatever_they_chose() {
    let fixture = Fixture::new(MfaPolicy::PlansAndApplies).await;
    let (app, owner) = (&fixture.app, &fixture.owner);
    let none = SettingsChange::default();
    app.create_environment(owner, ORGANIZATION, "other", none, "other", None).await.unwrap();
    let mut hooks = vec![];
    for (name, event, environment) in [
        ("everywhere", Event::Applied, None),
        ("elsewhere", Event::Applied, Some("other")),
        ("asked", Event::BreakGlass, Some("other")),
    ] {
        let environments = environment.map(str::to_owned).into_iter().collect();
        let wish = Wish { events: [event].into(), environments };
        let url = format!("https://{name}.example.org/hook");
        let made = app.create_webhook(owner, ORGANIZATION, &url, wish, name).await.unwrap();
        hooks.push(made.0.id);
    }
    app.break_glass(ORGANIZATION, &never(Some(ENVIRONMENT)), "lost it").await.unwrap();
    // Nothing was broken: nothing is told.
    app.break_glass(ORGANIZATION, &never(Some(ENVIRONMENT)), "lost it").await.unwrap();
    for hook in hooks {
        let sent = app.list_deliveries(owner, ORGANIZATION, hook, 9).await.unwrap();
        assert_eq!(sent.len(), 1);
        let notice = &sent[0].notice;
        assert_eq!((notice.event, notice.reason.as_deref()), (Event::BreakGlass, Some("lost it")));
        assert_eq!(notice.environment.as_deref(), Some(ENVIRONMENT));
    }
}
