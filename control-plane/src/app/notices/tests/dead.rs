//! Subscribers who cannot be reached, and what others have of that: nothing.

use super::*;

/// Tests to a subscriber, oldest first.
async fn test(app: &App, fixture: &Fixture, id: SubscriberId, count: usize) -> Vec<DeliveryId> {
    let mut sent = vec![];
    for _ in 0..count {
        sent.push(app.send_test(&fixture.owner, ORGANIZATION, id).await.unwrap());
    }
    sent
}

#[tokio::test]
async fn who_never_answers_holds_up_nobody_else() {
    let fixture = Fixture::new(MfaPolicy::Never).await;
    let (silent, well) = (Http::silent().await, Http::start(&[]).await);
    let app = fixture.telling_through(outbound()).await;
    for path in ["/a", "/b", "/c"] {
        let id = hook(&app, &fixture, &silent.url(path), &[Event::Errored]).await;
        test(&app, &fixture, id, 3).await;
    }
    let id = hook(&app, &fixture, &well.url("/"), &[Event::Errored]).await;
    let _worker = Worker::of(&app);
    silent.next(2).await;
    test(&app, &fixture, id, 2).await;
    // An attempt that is not answered takes twice as long.
    let heard = tokio::time::timeout(LIMIT / 2, well.next(2)).await;
    assert_eq!(heard.expect("it waited for others").len(), 2);
}

#[tokio::test]
async fn after_a_failure_all_that_waits_for_the_same_subscriber_waits() {
    let fixture = Fixture::new(MfaPolicy::Never).await;
    let (dead, well) = (Http::start(&[500; 64]).await, Http::start(&[]).await);
    let hour = Duration::from_secs(3600);
    let pace = Pace { first: hour, longest: hour, ..Pace::USUAL };
    let app = fixture.telling_through(Outbound { pace, ..outbound() }).await;
    let id = hook(&app, &fixture, &dead.url("/"), &[Event::Errored]).await;
    test(&app, &fixture, id, 10).await;
    let id = hook(&app, &fixture, &well.url("/"), &[Event::Errored]).await;
    test(&app, &fixture, id, 30).await;
    let _worker = Worker::of(&app);
    well.next(30).await;
    settled(&app, &fixture, id).await;
    assert_eq!(dead.heard(), 1);
}

#[tokio::test]
async fn who_is_reached_again_gets_all_that_waited() {
    let fixture = Fixture::new(MfaPolicy::Never).await;
    let server = Http::start(&[500, 500, 500]).await;
    let app = fixture.telling_through(outbound()).await;
    let id = hook(&app, &fixture, &server.url("/"), &[Event::Errored]).await;
    test(&app, &fixture, id, 6).await;
    let _worker = Worker::of(&app);
    let ended = settled(&app, &fixture, id).await;
    assert!(ended.iter().all(|delivery| delivery.state == DeliveryState::Delivered));
    assert_eq!(ended.len(), 6);
}

#[tokio::test]
async fn a_subscriber_has_a_bounded_number_on_their_way_and_the_drop_is_audited() {
    let fixture = Fixture::new(MfaPolicy::Never).await;
    let server = Http::silent().await;
    let app = fixture.telling_through(outbound()).await;
    let other = hook(&app, &fixture, &server.url("/other"), &[Event::Errored]).await;
    test(&app, &fixture, other, 2).await;
    let id = hook(&app, &fixture, &server.url("/"), &[Event::Errored]).await;
    let sent = test(&app, &fixture, id, worker::QUEUE + 3).await;
    let _worker = Worker::of(&app);
    server.next(2).await;
    assert_eq!(waiting(&fixture).await, worker::QUEUE + 2);
    let dropped = audited(&fixture, "drop_notices").await;
    assert_eq!(dropped.len(), 1);
    assert_eq!(dropped[0].draft.details["count"], 3);
    assert_eq!(dropped[0].draft.details["oldest"], sent[0].to_string());
}

#[tokio::test]
async fn what_is_too_old_is_given_up_without_being_sent() {
    let fixture = Fixture::new(MfaPolicy::Never).await;
    let server = Http::start(&[]).await;
    let app = fixture.telling_through(outbound()).await;
    let id = hook(&app, &fixture, &server.url("/"), &[Event::Errored]).await;
    test(&app, &fixture, id, 1).await;
    // As after a restore.
    fixture.clock.advance(Duration::from_secs(24 * 3600));
    let _worker = Worker::of(&app);
    let ended = settled(&app, &fixture, id).await;
    assert_eq!((ended[0].state, ended[0].attempts), (DeliveryState::GivenUp, 0));
    assert_eq!(ended[0].last.as_ref().unwrap().detail, "it was not sent in time");
    assert_eq!(server.heard(), 0);
}
