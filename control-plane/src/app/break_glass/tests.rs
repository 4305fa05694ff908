//! The way out for a lost device: loud, and shown until a code backs the policy again.

use latchkey_domain::policy::MfaPolicy;
use latchkey_proto::v1::Reason;

use super::{Glass, Level};
use crate::app::fixture::{ENVIRONMENT, Fixture, ORGANIZATION};
use crate::app::settings::SettingsChange;

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
