//! What those who look at a run are told, and those who watch it hear.

use std::time::Duration;

use latchkey_domain::policy::{MfaPolicy, Phase};
use latchkey_domain::run::{FailureKind, Run, RunState};
use tokio::sync::mpsc;

use super::RunView;
use crate::app::finish_job::JobResult;
use crate::app::fixture::Fixture;
use crate::app::run_output::Piece;
use crate::error::Result;
use crate::store::record::encode;
use crate::store::record::run::RunRecord;
use crate::store::{Batch, Expect, keys};

async fn plan_log_length(fixture: &Fixture, run: &Run) -> u64 {
    fixture.app.show_run(&fixture.owner, run.id).await.unwrap().plan_log_length
}

#[tokio::test]
async fn the_log_of_an_ended_phase_is_measured_without_its_file_unless_its_record_is_old() {
    let fixture = Fixture::new(MfaPolicy::Never).await;
    let app = &fixture.app;
    let run = fixture.queue("one").await;
    let (runner, lease, _) = fixture.start(&run, Phase::Plan).await;
    let appender = app.append_log(&runner, lease).await.unwrap();
    appender.append(vec![Piece { offset: 0, data: b"planning\n".to_vec() }]).await.unwrap();
    assert_eq!(plan_log_length(&fixture, &run).await, 9);

    let failed = JobResult::Failed { kind: FailureKind::Errored, reason: "no".into() };
    app.finish_job(&runner, lease, 9, failed).await.unwrap();
    let ended = fixture.run(&run).await;
    assert_eq!((ended.plan.log_length, ended.apply.log_length), (Some(9), None));

    let mut old = ended.clone();
    old.plan.log_length = None;
    let put = |run: &Run| {
        let record = encode(&RunRecord::from(run));
        fixture.store.commit(Batch::new().put(keys::run(run.id), Expect::Anything, record))
    };
    put(&old).await.unwrap();
    assert_eq!(plan_log_length(&fixture, &run).await, 9);

    put(&ended).await.unwrap();
    app.logs.delete(run.id).await.unwrap();
    assert_eq!(plan_log_length(&fixture, &run).await, 9);
}

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
