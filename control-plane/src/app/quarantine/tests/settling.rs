//! One command deals with all that a run left behind, or with nothing.

use latchkey_domain::run::{Run, RunState};
use latchkey_proto::v1::Reason;

use super::{accept, applying, bring, current_state, given_up, hold, listed, member, only, state};
use crate::app::artifacts::Made;
use crate::app::fixture::{ENVIRONMENT, Fixture, ORGANIZATION};
use crate::app::quarantine::Settlement;
use crate::app::quarantine::settle::Settled;
use crate::error::Result;
use crate::store::record::quarantine::Kind;

async fn settle(fixture: &Fixture, run: &Run, settlement: Settlement) -> Result<Settled> {
    let (app, owner) = (&fixture.app, &fixture.owner);
    app.settle_quarantine(owner, ORGANIZATION, run.id, ENVIRONMENT, settlement).await
}

async fn count(fixture: &Fixture, action: &str) -> usize {
    fixture.audited().await.iter().filter(|(done, _)| done == action).count()
}

const ACCEPT: Settlement = Settlement::Accept { older: false };

#[tokio::test]
async fn one_command_accepts_the_newest_state_drops_the_rest_and_lifts_the_freeze() {
    let (fixture, run, runner, lease) = given_up().await;
    let app = &fixture.app;
    bring(app, &runner, lease, (Made::State, 1), &state("l", 7)).await.unwrap();
    bring(app, &runner, lease, (Made::ErroredState, 0), &state("l", 8)).await.unwrap();
    bring(app, &runner, lease, (Made::Log, 0), b"a line\n").await.unwrap();
    let other = fixture.queue("second").await;
    assert_eq!(other.state, RunState::Pending, "it is frozen");

    let misnamed = app.settle_quarantine(&fixture.owner, ORGANIZATION, run.id, "wbe", ACCEPT).await;
    assert_eq!(misnamed.unwrap_err().field_name(), Some("environment_confirmation"));
    for (caller, reason) in [
        (member(&fixture).await, Reason::NotAllowed),
        (fixture.service_token("ci").await, Reason::PersonRequired),
    ] {
        let done = app.settle_quarantine(&caller, ORGANIZATION, run.id, ENVIRONMENT, ACCEPT).await;
        assert_eq!(done.unwrap_err().reason(), reason);
    }
    let unended = settle(&fixture, &other, Settlement::Drop).await.unwrap_err();
    assert_eq!(unended.reason(), Reason::WrongState);
    assert_eq!(listed(&fixture, None).await.len(), 3, "nothing was done by halves");

    let settled = settle(&fixture, &run, ACCEPT).await.unwrap();
    assert_eq!((settled.dropped, settled.unfrozen), (3, true));
    assert_eq!(settled.state.unwrap().serial, 8);
    assert_eq!(current_state(&fixture).await, state("l", 8));
    assert_eq!(listed(&fixture, None).await.len(), 0);
    assert!(hold(&fixture).await.frozen.is_none());
    assert_eq!(count(&fixture, "accept_state").await, 1);
    assert_eq!(count(&fixture, "drop_quarantined").await, 3);
    assert_eq!(count(&fixture, "unfreeze_environment").await, 1);
    app.collect_garbage().await.unwrap();
    assert_eq!(current_state(&fixture).await, state("l", 8), "what was accepted is kept");
}

#[tokio::test]
async fn one_command_drops_all_and_keeps_the_state_that_is() {
    let (fixture, run, runner, lease) = given_up().await;
    let app = &fixture.app;
    bring(app, &runner, lease, (Made::State, 1), &state("l", 7)).await.unwrap();
    bring(app, &runner, lease, (Made::Log, 0), b"a line\n").await.unwrap();
    let settled = settle(&fixture, &run, Settlement::Drop).await.unwrap();
    assert_eq!(settled, Settled { state: None, dropped: 2, unfrozen: true });
    assert_eq!(current_state(&fixture).await, state("l", 6));
    assert!(hold(&fixture).await.frozen.is_none());
    // A repeat finds nothing to do.
    let again = settle(&fixture, &run, Settlement::Drop).await.unwrap();
    assert_eq!(again, Settled { state: None, dropped: 0, unfrozen: false });
    assert_eq!(count(&fixture, "unfreeze_environment").await, 1);
}

#[tokio::test]
async fn what_cannot_be_settled_is_left_as_it_is() {
    let (fixture, run, runner, lease) = applying().await;
    let app = &fixture.app;
    app.expire(lease.job, lease.epoch).await.unwrap();
    let lost = settle(&fixture, &run, Settlement::Drop).await.unwrap_err();
    assert!(lost.message().contains("latchkey discard"), "{lost}");
    app.discard_run(&fixture.owner, run.id).await.unwrap();
    let without = settle(&fixture, &run, ACCEPT).await.unwrap_err();
    assert!(without.message().contains("nothing that was kept"), "{without}");
    // Older than the current, and taken only when that is asked for.
    bring(app, &runner, lease, (Made::State, 1), &state("l", 5)).await.unwrap();
    assert_eq!(settle(&fixture, &run, ACCEPT).await.unwrap_err().reason(), Reason::WrongState);
    // Two that differ.
    let rival = state("l", 5).iter().chain(b" ").copied().collect::<Vec<_>>();
    bring(app, &runner, lease, (Made::ErroredState, 0), &rival).await.unwrap();
    let two = settle(&fixture, &run, Settlement::Accept { older: true }).await.unwrap_err();
    assert!(two.message().contains("two states of serial 5"), "{two}");
    assert_eq!(listed(&fixture, None).await.len(), 2);
    assert!(hold(&fixture).await.frozen.is_some());
    // One of them by its id, then the rest in one go.
    let id = only(&fixture, Kind::State).await.record.id.0;
    accept(&fixture, id, true).await.unwrap();
    let settled = settle(&fixture, &run, ACCEPT).await.unwrap();
    assert_eq!((settled.dropped, settled.unfrozen), (2, true));
    assert_eq!(settled.state.unwrap().serial, 7);
}
