use std::path::Path;
use std::sync::Arc;

use latchkey_domain::id::{Digest, Epoch, Generation, JobId, RunId};
use latchkey_domain::policy::{MfaPolicy, Phase};
use latchkey_domain::run::{Run, RunState};
use latchkey_proto::v1::Reason;

use super::Seen;
use crate::app::App;
use crate::app::fixture::{Fixture, ORGANIZATION};
use crate::auth::RunnerIdentity;
use crate::job::LeaseRef;
use crate::store::record::runner::Runner;
use crate::store::record::{Text, encode};
use crate::store::sled::{Options, Sled};
use crate::store::{Batch, Expect, Store, keys};

const NOTHING: Seen = Seen { generation: Generation::new(0), history: 0 };

async fn leased() -> (Fixture, Run, RunnerIdentity, LeaseRef) {
    let fixture = Fixture::new(MfaPolicy::Never).await;
    let run = fixture.queue("first").await;
    let runner = fixture.runner().await;
    let (lease, _) = fixture.app.grant(run.job_id(Phase::Plan), runner.id).await.unwrap();
    (fixture, run, runner, lease)
}

fn now(app: &App) -> Seen {
    Seen { generation: app.generation, history: app.store.history().get() }
}

#[tokio::test]
async fn what_was_told_and_granted_here_proves_nothing() {
    let (fixture, _, runner, lease) = leased().await;
    let app = &fixture.app;
    app.greet(&runner, NOTHING, &[]).await.unwrap();
    app.greet(&runner, now(app), &[lease]).await.unwrap();
    // Of another history, whose numbers say nothing of this one.
    let old = LeaseRef { generation: Generation::new(0), epoch: Epoch::new(99), ..lease };
    let seen = Seen { generation: Generation::new(0), history: u64::MAX };
    app.greet(&runner, seen, &[old]).await.unwrap();
    assert_eq!(app.take_up(&runner, old).await.unwrap_err().reason(), Reason::LeaseLost);
    assert!(!app.history.is_lost());
    app.start_job(&runner, lease).await.unwrap();
}

#[tokio::test]
async fn whoever_has_seen_more_proves_that_the_data_are_an_old_copy() {
    let elsewhere = |lease: LeaseRef| JobId { run: RunId::from_bytes([9; 16]), ..lease.job };
    type Case = fn(&App, LeaseRef, JobId) -> (Seen, Vec<LeaseRef>);
    let cases: [Case; 5] = [
        |app, _, _| (Seen { generation: Generation::new(2), ..now(app) }, vec![]),
        |app, _, _| (Seen { history: now(app).history + 1, ..now(app) }, vec![]),
        |_, lease, _| (NOTHING, vec![LeaseRef { generation: Generation::new(2), ..lease }]),
        |_, lease, _| (NOTHING, vec![lease, LeaseRef { epoch: lease.epoch.next(), ..lease }]),
        |_, lease, job| (NOTHING, vec![LeaseRef { job, ..lease }]),
    ];
    for (number, case) in cases.into_iter().enumerate() {
        let (fixture, run, runner, lease) = leased().await;
        let app = &fixture.app;
        let (seen, held) = case(app, lease, elsewhere(lease));
        let error = app.greet(&runner, seen, &held).await.unwrap_err();
        assert_eq!(error.reason(), Reason::HistoryLost, "case {number}: {error}");
        app.history.lost().await;
        // For good, and for everybody.
        let again = app.greet(&runner, NOTHING, &[]).await.unwrap_err();
        assert_eq!(again.reason(), Reason::HistoryLost);
        assert_eq!(fixture.run(&run).await.state, RunState::Planning);
    }
}

#[tokio::test]
async fn an_old_copy_grants_nothing_spends_nothing_and_changes_nothing() {
    let fixture = Fixture::new(MfaPolicy::PlansAndApplies).await;
    let app = &fixture.app;
    let waiting = fixture.queue("waiting").await;
    let run = fixture.queue("queued").await;
    let run = fixture.submit(&run, &fixture.code(), "one").await.unwrap();
    let runner = fixture.runner().await;
    let (lease, _) = app.grant(run.job_id(Phase::Plan), runner.id).await.unwrap();

    let seen = Seen { history: now(app).history + 1000, ..now(app) };
    app.greet(&runner, seen, &[lease]).await.unwrap_err();
    let lost = |error: crate::error::Error| assert_eq!(error.reason(), Reason::HistoryLost);
    lost(app.grant(run.job_id(Phase::Plan), runner.id).await.unwrap_err());
    lost(app.start_job(&runner, lease).await.unwrap_err());
    lost(app.start_again(&runner, lease).await.unwrap_err());
    lost(app.take_up(&runner, lease).await.unwrap_err());
    lost(app.hand_back(&runner, lease).await.unwrap_err());
    lost(app.expire(lease.job, lease.epoch).await.unwrap_err());
    let code = fixture.code();
    lost(fixture.submit(&waiting, &code, "two").await.unwrap_err());
    assert_eq!(fixture.aws.requests_with_code(&code), 0);

    // People can look, and are told in the audit trail, once.
    assert_eq!(fixture.run(&run).await.state, RunState::Planning);
    app.greet(&runner, seen, &[lease]).await.unwrap_err();
    let organization = fixture.organization().await;
    let trail = crate::store::list(&*fixture.store, keys::audit_of(organization)).await.unwrap();
    let alarms = trail
        .iter()
        .filter(|(_, found)| String::from_utf8_lossy(&found.value).contains("prove_old_copy"));
    assert_eq!(alarms.count(), 1);
    assert!(app.show_organization(&fixture.owner, ORGANIZATION).await.is_ok());
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        match entry.file_type().unwrap().is_dir() {
            true => copy(&entry.path(), &to.join(entry.file_name())),
            false => drop(std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap()),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_raw_old_copy_is_found_out_at_every_start() {
    let fixture = Fixture::new(MfaPolicy::Never).await;
    let runner = fixture.runner().await;
    let root = tempfile::tempdir().unwrap();
    let (data, old) = (root.path().join("data"), root.path().join("old"));
    let open = async |data: &Path| {
        let store: Arc<dyn Store> =
            Arc::new(Sled::open(&Options::new(data.join("store"))).unwrap());
        fixture.on(data, &store).await
    };
    let app = open(&data).await;
    let note = |number: u8| Batch::new().put(keys::setting("x"), Expect::Anything, [number]);
    app.store.commit(note(1)).await.unwrap();
    drop(app);
    copy(&data, &old);
    let app = open(&data).await;
    app.store.commit(note(2)).await.unwrap();
    let seen = now(&app);
    app.greet(&runner, seen, &[]).await.unwrap();
    drop(app);
    let app = open(&old).await;
    app.recall_alarm().await.unwrap();
    let error = app.greet(&runner, seen, &[]).await.unwrap_err();
    assert_eq!(error.reason(), Reason::HistoryLost);
    // Its own commits have taken the old copy on since; the proof stands all the same.
    app.store.commit(note(3)).await.unwrap();
    assert!(now(&app).history > seen.history);
    drop(app);
    let app = open(&old).await;
    app.recall_alarm().await.unwrap();
    assert_eq!(app.check_history().unwrap_err().reason(), Reason::HistoryLost);
    drop(app);
    let app = open(&data).await;
    app.recall_alarm().await.unwrap();
    app.greet(&runner, seen, &[]).await.unwrap();
}

#[tokio::test]
async fn the_word_of_a_runner_that_was_revoked_since_is_not_taken() {
    let (fixture, _, runner, _) = leased().await;
    let app = &fixture.app;
    let seen = Seen { history: u64::MAX, ..now(app) };
    app.greet(&runner, seen, &[]).await.unwrap_err();
    let after = fixture.restarted(None).await;
    after.recall_alarm().await.unwrap();
    assert!(after.history.is_lost());

    let revoked = Runner {
        id: Text(runner.id),
        name: runner.name.clone(),
        pool: Text(runner.pool),
        organization: Text(runner.organization),
        key: Text(Digest::from_bytes([1; 32])),
        enrolled_at: app.now().into(),
        said: None,
        drained_at: None,
        revoked_at: Some(app.now().into()),
        fought_at: None,
    };
    let batch = Batch::new().put(keys::runner(runner.id), Expect::Anything, encode(&revoked));
    fixture.store.commit(batch).await.unwrap();
    for _ in 0..2 {
        let after = fixture.restarted(None).await;
        after.recall_alarm().await.unwrap();
        assert!(!after.history.is_lost());
    }
}
