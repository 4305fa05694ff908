//! Who may lock, what a lock holds up, and what it does not.

use latchkey_domain::policy::{MfaPolicy, Phase};
use latchkey_domain::run::{RunKind, RunState};
use latchkey_proto::v1::Reason;

use crate::app::fixture::{ENVIRONMENT, Fixture, ORGANIZATION};
use crate::store::record::people::Access;

#[tokio::test]
async fn a_lock_keeps_changing_runs_waiting_and_lets_the_others_go_on() {
    let fixture = Fixture::new(MfaPolicy::Never).await;
    let (app, owner) = (&fixture.app, &fixture.owner);
    let running = fixture.queue("running").await;
    fixture.start(&running, Phase::Plan).await;
    let locked = app.lock_environment(owner, ORGANIZATION, ENVIRONMENT, "an audit").await.unwrap();
    let lock = locked.environment.hold.locked.unwrap();
    assert_eq!((lock.by.as_str(), lock.reason.as_str()), ("ada", "an audit"));
    assert_eq!(fixture.run(&running).await.state, RunState::Planning);
    let waiting = fixture.queue("waiting").await;
    app.cancel_run(owner, running.id).await.unwrap();
    let speculative = fixture.queue_kind(RunKind::PlanOnly, "speculative").await;
    assert_eq!(speculative.state, RunState::PlanQueued);
    app.give_all_turns().await.unwrap();
    let view = app.show_run(owner, waiting.id).await.unwrap();
    assert_eq!(view.run.state, RunState::Pending);
    assert_eq!(view.run.reason.unwrap(), "ada has locked the environment: an audit");
}

#[tokio::test]
async fn an_unlock_gives_the_turns_that_wait_and_both_are_audited() {
    let fixture = Fixture::new(MfaPolicy::Never).await;
    let (app, owner) = (&fixture.app, &fixture.owner);
    app.lock_environment(owner, ORGANIZATION, ENVIRONMENT, "an audit").await.unwrap();
    let waiting = fixture.queue("waiting").await;
    assert_eq!(waiting.state, RunState::Pending);
    // Another who administers it may take it away.
    let bob = fixture.member("bob", Access::Admin).await;
    app.unlock_environment(&bob, ORGANIZATION, ENVIRONMENT).await.unwrap();
    assert_eq!(fixture.run(&waiting).await.state, RunState::PlanQueued);
    app.unlock_environment(&bob, ORGANIZATION, ENVIRONMENT).await.unwrap();
    let audited = fixture.audited().await;
    let of = |action: &str| audited.iter().filter(|(known, _)| known == action).count();
    assert_eq!((of("lock_environment"), of("unlock_environment")), (1, 1));
}

#[tokio::test]
async fn a_lock_is_for_who_administers_and_has_one_reason() {
    let fixture = Fixture::new(MfaPolicy::Never).await;
    let (app, owner) = (&fixture.app, &fixture.owner);
    let bob = fixture.member("bob", Access::Write).await;
    let lock = |who, reason| app.lock_environment(who, ORGANIZATION, ENVIRONMENT, reason);
    assert_eq!(lock(&bob, "mine").await.unwrap_err().reason(), Reason::NotAllowed);
    let long = "x".repeat(501);
    for bad in ["", "   ", "two\nlines", long.as_str()] {
        assert_eq!(lock(owner, bad).await.unwrap_err().field_name(), Some("reason"));
    }
    let first = lock(owner, "an audit").await.unwrap().environment.hold.locked;
    assert_eq!(lock(owner, "an audit").await.unwrap().environment.hold.locked, first);
    assert_eq!(lock(owner, "another").await.unwrap_err().reason(), Reason::WrongState);
    let refused = app.unlock_environment(&bob, ORGANIZATION, ENVIRONMENT).await.unwrap_err();
    assert_eq!(refused.reason(), Reason::NotAllowed);
}
