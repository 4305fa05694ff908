//! What happens between what a change was judged by and its commit.

use std::sync::Arc;

use latchkey_domain::policy::MfaPolicy;
use latchkey_proto::v1::Reason;

use super::{level, policy};
use crate::app::fixture::{ENVIRONMENT, Fixture, ORGANIZATION};
use crate::app::settings::SettingsChange;
use crate::app::variables::Scope;
use crate::store::record::people::Role;
use crate::store::record::variable::Category;

/// More requests than a change makes of the store.
pub(super) const MOST: usize = 60;

#[tokio::test]
async fn what_became_stricter_meanwhile_is_not_weakened_without_a_code() {
    for nth in 1..MOST {
        let fixture = Fixture::new(MfaPolicy::Never).await;
        let mallory = fixture.user("mallory", Role::Owner).await;
        let (app, owner) = (fixture.app.clone(), fixture.owner.clone());
        let (between, store) = fixture
            .with_between(nth, async move {
                let stricter = policy(MfaPolicy::PlansAndApplies);
                let set = app.update_environment(&owner, ORGANIZATION, ENVIRONMENT, stricter, None);
                set.await.unwrap();
            })
            .await;
        let lower = policy(MfaPolicy::AppliesOnly);
        let done =
            between.update_environment(&mallory, ORGANIZATION, ENVIRONMENT, lower, None).await;
        if !store.is_done() {
            assert!(nth > 5, "it was never in between");
            return;
        }
        assert_eq!(level(&fixture).await, MfaPolicy::PlansAndApplies, "before request {nth}");
        if let Err(refused) = done {
            assert_eq!(refused.reason(), Reason::MfaRequired, "before request {nth}: {refused}");
        }
    }
    panic!("a change makes more requests than were tried");
}

#[tokio::test]
async fn accounts_that_somebody_else_listed_meanwhile_are_not_replaced_without_a_code() {
    for nth in 1..MOST {
        let fixture = Fixture::new(MfaPolicy::Never).await;
        let account = fixture.aws.facts().account_id;
        fixture.list_accounts(vec![]).await;
        let (app, owner) = (fixture.app.clone(), fixture.owner.clone());
        let listed = vec![account.clone()];
        let (between, store) = fixture
            .with_between(nth, async move {
                app.update_organization(&owner, ORGANIZATION, listed, None).await.unwrap();
            })
            .await;
        let other = vec!["210987654321".to_owned()];
        let owner = &fixture.owner;
        // Where it comes first it guards the one in between, which is refused then.
        let done = tokio::spawn({
            let (between, owner) = (Arc::clone(&between), owner.clone());
            async move { between.update_organization(&owner, ORGANIZATION, other, None).await }
        });
        let Ok(done) = done.await else { return };
        if !store.is_done() {
            return;
        }
        let now = fixture.app.show_organization(owner, ORGANIZATION).await.unwrap().aws_accounts;
        assert_eq!(now, [account], "before request {nth}");
        assert_eq!(done.unwrap_err().reason(), Reason::MfaRequired);
    }
    panic!("a change makes more requests than were tried");
}

#[tokio::test]
async fn a_record_that_runs_move_too_stands_in_nobodys_way() {
    for nth in 1..MOST {
        let fixture = Fixture::new(MfaPolicy::Never).await;
        let (app, owner) = (fixture.app.clone(), fixture.owner.clone());
        let (between, store) = fixture
            .with_between(nth, async move {
                let engine = Some("tofu".to_owned());
                let change = SettingsChange { engine, ..SettingsChange::default() };
                let set = app.update_environment(&owner, ORGANIZATION, ENVIRONMENT, change, None);
                set.await.unwrap();
            })
            .await;
        let region = Some("eu-central-1".to_owned());
        let change = SettingsChange { region, ..SettingsChange::default() };
        let set =
            between.update_environment(&fixture.owner, ORGANIZATION, ENVIRONMENT, change, None);
        let done = set.await;
        if !store.is_done() {
            return;
        }
        done.unwrap_or_else(|error| panic!("before request {nth}: {error}"));
        let settings = fixture.environment().await.environment.settings;
        assert_eq!((settings.region.as_str(), settings.engine.as_str()), ("eu-central-1", "tofu"));
    }
    panic!("a change makes more requests than were tried");
}

#[tokio::test]
async fn a_variable_whose_device_was_lost_meanwhile_is_not_said_to_be_missing() {
    for nth in 1..MOST {
        let fixture = Arc::new(Fixture::new(MfaPolicy::Never).await);
        let others = Arc::clone(&fixture);
        let (between, store) = fixture
            .with_between(nth, async move { others.unset("AWS_MFA_SERIAL_NUMBER").await })
            .await;
        let name = (Category::Environment, "AWS_ACCESS_KEY_ID");
        let (scope, given) = (Scope::Organization, fixture.proof("one"));
        let gone = between.delete_variable(&fixture.owner, ORGANIZATION, &scope, name, given).await;
        if let Err(error) = gone {
            assert_ne!(error.reason(), Reason::NotFound, "before request {nth}: {error}");
        }
        if !store.is_done() || nth > 20 {
            return;
        }
    }
}
