use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use latchkey_domain::id::Generation;
use latchkey_domain::policy::{MfaPolicy, Phase};
use latchkey_domain::run::{Run, RunState};
use latchkey_proto::v1::Reason;

use crate::app::App;
use crate::app::fixture::{ENVIRONMENT, Fixture, ORGANIZATION};
use crate::app::start_job::Start;
use crate::backup::{self, Restored, Source};
use crate::clock::Clock;
use crate::store::sled::{Options, Sled};
use crate::store::{Store, keys, list};

async fn back_up(fixture: &Fixture, to: &Path) {
    let source = Source {
        data_dir: fixture.directory(),
        store: &*fixture.store,
        logs: &fixture.app.logs,
        blobs: Some(&fixture.app.blobs),
    };
    backup::take(source, to, fixture.app.now()).await.unwrap();
}

async fn restore(fixture: &Fixture, from: &Path, to: &Path) -> Restored {
    let clock: Arc<dyn Clock> = Arc::clone(&fixture.clock) as Arc<dyn Clock>;
    backup::restore(from, to, &fixture.key_file(), clock).await.unwrap()
}

async fn open(fixture: &Fixture, data: &Path) -> Arc<App> {
    let store: Arc<dyn Store> = Arc::new(Sled::open(&Options::new(data.join("store"))).unwrap());
    fixture.on(data, &store).await
}

async fn count(app: &App, kind: keys::Kind) -> usize {
    list(&*app.store, keys::all(kind)).await.unwrap().len()
}

/// An applying run that holds the environment, one that waits behind it, and one that waits for
/// a code.
async fn busy() -> (Fixture, [Run; 3]) {
    let fixture = Fixture::new(MfaPolicy::PlansAndApplies).await;
    let run = fixture.queue("one").await;
    let run = fixture.submit(&run, &fixture.code(), "one").await.unwrap();
    let run = fixture.plan(&run).await;
    let run = fixture.submit(&run, &fixture.code(), "two").await.unwrap();
    let (_, _, start) = fixture.start(&run, Phase::Apply).await;
    assert!(matches!(start, Start::Go(_)));
    let pending = fixture.queue("two").await;
    let pending = fixture.submit(&pending, &fixture.code(), "three").await.unwrap();
    assert_eq!(pending.state, RunState::Pending);
    let waiting = fixture.queue("three").await;
    let (app, owner) = (&fixture.app, &fixture.owner);
    app.create_pool(owner, ORGANIZATION, "build", "pool").await.unwrap();
    app.create_pool_token(owner, ORGANIZATION, "build", None, 1, "token").await.unwrap();
    (fixture, [run, pending, waiting])
}

#[tokio::test(flavor = "multi_thread")]
async fn what_had_not_ended_is_ended_and_no_authority_comes_back() {
    let (fixture, runs) = busy().await;
    let root = tempfile::tempdir().unwrap();
    let (copy, data) = (root.path().join("backup"), root.path().join("data"));
    back_up(&fixture, &copy).await;
    let restored = restore(&fixture, &copy, &data).await;
    assert!(restored.generation > fixture.app.generation);

    let app = open(&fixture, &data).await;
    assert_eq!(app.generation, restored.generation);
    for kind in [keys::Kind::Session, keys::Kind::OpenRun, keys::Kind::PoolToken] {
        assert!(count(&app, kind).await > 0, "no {kind:?} to lose: the test is void");
    }
    // Twice: as after a kill midway.
    app.settle_restore().await.unwrap();
    app.settle_restore().await.unwrap();
    for run in &runs {
        let run = app.show_run(&fixture.owner, run.id).await.unwrap().run;
        assert_eq!(run.state, RunState::Errored);
        assert_eq!((run.approval, run.apply.lease, run.apply.evidence), (None, None, None));
        assert!(run.reason.unwrap().contains("must be checked"));
    }
    let environment =
        app.show_environment(&fixture.owner, ORGANIZATION, ENVIRONMENT).await.unwrap();
    let frozen = environment.environment.hold.frozen.unwrap();
    assert_eq!(frozen.run, runs[0].id, "the one that was applying is named");
    for kind in
        [keys::Kind::Session, keys::Kind::OpenRun, keys::Kind::PendingRun, keys::Kind::PoolToken]
    {
        assert_eq!(count(&app, kind).await, 0, "{kind:?}");
    }
    let organization = fixture.organization().await;
    let trail = list(&*app.store, keys::audit_of(organization)).await.unwrap();
    let told = trail
        .iter()
        .filter(|(_, found)| String::from_utf8_lossy(&found.value).contains("backup_taken_at"));
    assert_eq!(told.count(), 1);
    crate::audit::verify_stored(&*app.store, organization).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn no_code_is_spent_in_the_three_minutes_after_a_restore() {
    let fixture = Fixture::new(MfaPolicy::PlansAndApplies).await;
    let root = tempfile::tempdir().unwrap();
    let (copy, data) = (root.path().join("backup"), root.path().join("data"));
    back_up(&fixture, &copy).await;
    restore(&fixture, &copy, &data).await;
    let app = open(&fixture, &data).await;
    app.settle_restore().await.unwrap();
    app.check_codes_open().await.unwrap_err();
    fixture.clock.advance(Duration::from_secs(179));
    assert_eq!(app.check_codes_open().await.unwrap_err().reason(), Reason::DeviceBusy);
    fixture.clock.advance(Duration::from_secs(1));
    app.check_codes_open().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lease_from_before_the_restore_is_given_up_and_raises_no_alarm() {
    let (fixture, runs) = busy().await;
    let root = tempfile::tempdir().unwrap();
    let (copy, data) = (root.path().join("backup"), root.path().join("data"));
    back_up(&fixture, &copy).await;
    restore(&fixture, &copy, &data).await;
    let app = open(&fixture, &data).await;
    app.settle_restore().await.unwrap();

    let run = fixture.run(&runs[0]).await;
    let lease = crate::job::LeaseRef {
        job: run.job_id(Phase::Apply),
        epoch: run.apply.epoch,
        generation: fixture.app.generation,
    };
    let seen = crate::app::history::Seen {
        generation: fixture.app.generation,
        history: fixture.app.store.history().get() + 1000,
    };
    let runner = fixture.runner().await;
    app.greet(&runner, seen, &[lease]).await.unwrap();
    assert_eq!(app.take_up(&runner, lease).await.unwrap_err().reason(), Reason::LeaseLost);
    assert_eq!(app.start_again(&runner, lease).await.unwrap_err().reason(), Reason::LeaseLost);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_restore_is_a_higher_generation() {
    let fixture = Fixture::new(MfaPolicy::Never).await;
    let root = tempfile::tempdir().unwrap();
    let copy = root.path().join("backup");
    back_up(&fixture, &copy).await;
    let mut last = Generation::FIRST;
    for number in 0..3 {
        fixture.clock.advance(Duration::from_millis(1));
        let data = root.path().join(format!("data-{number}"));
        let restored = restore(&fixture, &copy, &data).await;
        assert!(restored.generation > last);
        last = restored.generation;
    }
    // And above the backup's, should the clock be wrong.
    let app = open(&fixture, &root.path().join("data-2")).await;
    fixture.clock.set(latchkey_domain::time::Timestamp::from_millis(5));
    let source = Source {
        data_dir: &root.path().join("data-2"),
        store: &*app.store,
        logs: &app.logs,
        blobs: None,
    };
    let second = root.path().join("second");
    backup::take(source, &second, app.now()).await.unwrap();
    let restored = restore(&fixture, &second, &root.path().join("data-3")).await;
    assert!(restored.generation > last);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_running_control_plane_takes_its_backup_when_asked_on_its_host() {
    let (fixture, _) = busy().await;
    // Longer than a socket's path may be.
    let root = tempfile::tempdir().unwrap();
    let data = root.path().join("d".repeat(120));
    std::os::unix::fs::symlink(fixture.directory(), &data).unwrap();
    assert!(backup::socket::ask_backup(&data, &root.path().join("none")).unwrap().is_none());
    let listener = backup::socket::listen(&data).unwrap();
    let mode = std::fs::metadata(data.join("host.sock")).unwrap().permissions();
    assert_eq!(std::os::unix::fs::PermissionsExt::mode(&mode) & 0o777, 0o600);
    let serving =
        tokio::spawn(backup::socket::serve(listener, Arc::clone(&fixture.app), data.clone()));
    let ask = |to: &str| {
        let (data, to) = (data.clone(), root.path().join(to));
        tokio::task::spawn_blocking(move || backup::socket::ask_backup(&data, &to))
    };
    let manifest = ask("backup").await.unwrap().unwrap().unwrap();
    assert!(manifest.records.count > 0);
    let again = ask("backup").await.unwrap().unwrap_err().to_string();
    assert!(again.contains("name a directory that does not"), "{again}");
    restore(&fixture, &root.path().join("backup"), &root.path().join("restored")).await;
    serving.abort();
    let _ = serving.await;
    assert!(ask("later").await.unwrap().unwrap().is_none());
}
