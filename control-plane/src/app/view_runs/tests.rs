//! What those who watch a run hear.

use std::time::Duration;

use latchkey_domain::policy::MfaPolicy;
use latchkey_domain::run::RunState;
use tokio::sync::mpsc;

use super::RunView;
use crate::app::fixture::Fixture;
use crate::error::Result;

async fn next(watch: &mut mpsc::Receiver<Result<RunView>>) -> RunView {
    let heard = tokio::time::timeout(Duration::from_secs(20), watch.recv()).await;
    heard.expect("something is heard").expect("it has not ended").unwrap()
}

#[tokio::test]
async fn who_waits_in_line_hears_that_those_before_have_gone() {
    let fixture = Fixture::new(MfaPolicy::Never).await;
    let first = fixture.queue("first").await;
    let second = fixture.queue("second").await;
    let third = fixture.queue("third").await;
    let mut watch = fixture.app.watch_run(&fixture.owner, third.id).await.unwrap();
    assert_eq!(next(&mut watch).await.queue_position, 2);
    fixture.app.cancel_run(&fixture.owner, second.id).await.unwrap();
    assert_eq!(next(&mut watch).await.queue_position, 1);
    fixture.app.cancel_run(&fixture.owner, first.id).await.unwrap();
    while next(&mut watch).await.run.state == RunState::Pending {}
}
