//! Who loses the right before the commit changes nothing.

use std::sync::{Arc, Mutex};

use latchkey_domain::policy::MfaPolicy;
use latchkey_proto::v1::Reason;

use super::between::MOST;
use super::{level, policy};
use crate::app::fixture::{ENVIRONMENT, Fixture, ORGANIZATION};
use crate::app::settings::SettingsChange;
use crate::store::keys;
use crate::store::record::people::Role;

#[tokio::test]
async fn who_lost_the_right_before_the_commit_changes_nothing() {
    for nth in 1..MOST {
        let fixture = Fixture::new(MfaPolicy::Never).await;
        let bob = fixture.user("bob", Role::Owner).await;
        let (app, owner) = (fixture.app.clone(), fixture.owner.clone());
        let at_the_end: Arc<Mutex<Option<String>>> = Arc::default();
        let noted = Arc::clone(&at_the_end);
        let (between, store) = fixture
            .with_between(nth, async move {
                app.remove_member(&owner, ORGANIZATION, "bob").await.unwrap();
                let shown = app.show_environment(&owner, ORGANIZATION, ENVIRONMENT).await.unwrap();
                *noted.lock().unwrap() = Some(shown.environment.settings.region);
            })
            .await;
        let region = Some("eu-central-1".to_owned());
        let change = SettingsChange { region, ..SettingsChange::default() };
        let _ = between.update_environment(&bob, ORGANIZATION, ENVIRONMENT, change, None).await;
        if !store.is_done() {
            return;
        }
        let region = fixture.environment().await.environment.settings.region;
        assert_eq!(*at_the_end.lock().unwrap(), Some(region), "before request {nth}");
    }
    panic!("a change makes more requests than were tried");
}

#[tokio::test]
async fn a_code_buys_nothing_for_who_lost_the_right_while_aws_answered() {
    let fixture = Fixture::new(MfaPolicy::PlansAndApplies).await;
    let bob = fixture.user("bob", Role::Owner).await;
    let (app, owner) = (fixture.app.clone(), fixture.owner.clone());
    let late = fixture
        .with_late_answers(async move {
            app.remove_member(&owner, ORGANIZATION, "bob").await.unwrap();
        })
        .await;
    let (never, given) = (policy(MfaPolicy::Never), fixture.proof("bob"));
    let done = late.update_environment(&bob, ORGANIZATION, ENVIRONMENT, never, given).await;
    let refused = done.unwrap_err();
    assert_eq!(refused.reason(), Reason::NotAllowed, "{refused}");
    assert!(refused.message().contains("the code is spent"), "{refused}");
    assert_eq!(level(&fixture).await, MfaPolicy::PlansAndApplies);
    let (last, _) = fixture.audited().await.pop().unwrap();
    assert_eq!(last, "refuse_code");
    // Nothing of it is open.
    let open = keys::all(keys::Kind::ChangeOpen);
    assert!(fixture.app.list(open).await.unwrap().is_empty());
}
