use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use latchkey_domain::id::Generation;
use latchkey_domain::policy::{MfaPolicy, Phase};
use latchkey_domain::run::{Run, RunState};
use latchkey_proto::v1::Reason;

use crate::app::App;
use crate::app::fixture::{ENVIRONMENT, Fixture, ORGANIZATION};
use crate::app::organizations::FirstOwner;
use crate::app::service_tokens::TokenScope;
use crate::app::start_job::Start;
use crate::backup::{self, Named, Restored, Source};
use crate::clock::Clock;
use crate::store::record::people::{Access, Role};
use crate::store::record::runner::{Pool, Runner};
use crate::store::record::{Text, encode};
use crate::store::sled::{Options, Sled};
use crate::store::{Batch, Expect, Store, keys, list};

async fn back_up(fixture: &Fixture, to: &Path) {
    let source = Source {
        data_dir: fixture.directory(),
        store: &*fixture.store,
        logs: &fixture.app.logs,
        blobs: Some(&fixture.app.blobs),
        master: &fixture.app.master,
    };
    backup::take(source, to, fixture.app.now()).await.unwrap();
}

async fn restore(fixture: &Fixture, from: &Path, to: &Path) -> Restored {
    restore_above(fixture, from, to, None).await
}

async fn restore_above(
    fixture: &Fixture,
    from: &Path,
    to: &Path,
    above: Option<Generation>,
) -> Restored {
    let clock: Arc<dyn Clock> = Arc::clone(&fixture.clock) as Arc<dyn Clock>;
    let plan = backup::Plan { from, data_dir: to, key_file: &fixture.key_file(), above };
    backup::restore(plan, clock).await.unwrap()
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
async fn nobody_who_was_revoked_since_the_backup_gets_a_job_or_acts_for_a_program() {
    let fixture = Fixture::new(MfaPolicy::Never).await;
    let (app, owner) = (&fixture.app, &fixture.owner);
    let (secret, _) = app
        .create_service_token(owner, ORGANIZATION, "ci", None, TokenScope::default(), "ci")
        .await
        .unwrap();
    let login = app
        .create_user(owner, ORGANIZATION, "bob", Role::Member, Access::Write, "bob")
        .await
        .unwrap();
    let bob = app.prove(&login).await.unwrap();
    let login = fixture.create_user("eve", Role::Member, Access::Write).await;
    let password = || secrecy::SecretString::from("bob's long password");
    app.set_password(&bob, "".into(), password(), None).await.unwrap();
    let (session, _) = app.sign_in("bob", password(), "", None).await.unwrap();
    let runner = fixture.runner().await;
    let key = keys::runner(runner.id);
    let pool = Pool {
        id: Text(runner.pool),
        organization: Text(runner.organization),
        name: "build".into(),
        created_at: app.now().into(),
    };
    let pool_key = keys::pool(runner.organization, runner.pool);
    let batch = Batch::new().put(pool_key, Expect::Absent, encode(&pool));
    fixture.store.commit(batch).await.unwrap();
    let root = tempfile::tempdir().unwrap();
    let (copy, data) = (root.path().join("backup"), root.path().join("data"));
    back_up(&fixture, &copy).await;
    // Now the runner is revoked and the service token lost; then comes the restore.
    let restored = restore(&fixture, &copy, &data).await;
    let shown = |names: &[Named]| names.iter().map(ToString::to_string).collect::<Vec<_>>();
    let returned = &restored.returned;
    assert!(shown(&returned.service_tokens)[0].starts_with("ci of acme, since 2"));
    assert!(shown(&returned.runners)[0].starts_with("builder of acme, since 2"));
    let mut people: Vec<_> = returned.people.iter().map(ToString::to_string).collect();
    people.sort();
    assert!(people[0].starts_with("ada, since 2") && people[0].ends_with(": owner of acme"));
    assert!(people[1].starts_with("bob, since 2") && people[1].ends_with(": member of acme"));

    let app = open(&fixture, &data).await;
    app.settle_restore().await.unwrap();
    app.settle_restore().await.unwrap();
    let error = app.caller(&secret).await.unwrap_err();
    assert_eq!(error.reason(), Reason::IdentityRequired);
    assert_eq!(count(&app, keys::Kind::ServiceToken).await, 0);
    // People can act, or nobody could mend anything; also make the token anew.
    app.caller(&login).await.unwrap();
    let error = app.caller(&session).await.unwrap_err();
    assert_eq!(error.reason(), Reason::IdentityRequired);
    app.sign_in("bob", password(), "", None).await.unwrap();
    app.create_service_token(owner, ORGANIZATION, "ci", None, TokenScope::default(), "new")
        .await
        .unwrap();
    let found = app.fetch::<Runner>(key).await.unwrap().unwrap().value;
    assert!(found.drained_at.is_some());
    let run = fixture.queue_at(&app, "after").await;
    let refused = app.grant(run.job_id(Phase::Plan), runner.id).await.unwrap_err();
    assert_eq!(refused.reason(), Reason::NotAllowed, "{refused}");
    let organization = fixture.organization().await;
    let trail = list(&*app.store, keys::audit_of(organization)).await.unwrap();
    let told = trail.iter().filter(|(_, found)| {
        String::from_utf8_lossy(&found.value).contains("resume it once you know it was not revoked")
    });
    assert_eq!(told.count(), 1);
    // An owner has looked.
    app.resume_runner(owner, runner.id).await.unwrap();
    app.grant(run.job_id(Phase::Plan), runner.id).await.unwrap();
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
    let runner = fixture.runner().await;
    app.greet(&runner, fixture.app.mark().as_ref()).await.unwrap();
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
        master: &app.master,
    };
    let second = root.path().join("second");
    backup::take(source, &second, app.now()).await.unwrap();
    let restored = restore(&fixture, &second, &root.path().join("data-3")).await;
    assert!(restored.generation > last);
    // And above what runners have seen, where a clock was ahead once.
    let seen = Generation::new(1 << 60);
    let restored = restore_above(&fixture, &second, &root.path().join("data-4"), Some(seen)).await;
    assert_eq!(restored.generation.get(), seen.get() + 1);
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
    let alarm = |clear| {
        let data = data.clone();
        tokio::task::spawn_blocking(move || backup::socket::ask_alarm(&data, clear).unwrap())
    };
    assert_eq!(alarm(false).await.unwrap(), Some(None));
    let later = fixture.told_later().await;
    fixture.app.greet(&fixture.runner().await, Some(&later)).await.unwrap_err();
    let shown = alarm(false).await.unwrap().unwrap().unwrap();
    assert!(shown.contains("it has seen generation 2"), "{shown}");
    assert_eq!(alarm(true).await.unwrap(), Some(Some(shown)));
    assert_eq!(alarm(false).await.unwrap(), Some(None));
    fixture.app.check_history().unwrap();
    let organization = |owner: FirstOwner| {
        let data = data.clone();
        tokio::task::spawn_blocking(move || {
            backup::socket::ask_organization(&data, "web".into(), owner)
        })
    };
    let made = organization(FirstOwner::New("eve".into())).await.unwrap().unwrap();
    let eve = fixture.app.caller(&made.unwrap().unwrap()).await.unwrap();
    assert_eq!(eve.name(), "eve");
    let taken = organization(FirstOwner::Existing("ada".into())).await.unwrap().unwrap_err();
    assert!(taken.to_string().contains("the name is taken"), "{taken}");
    serving.abort();
    let _ = serving.await;
    assert_eq!(alarm(false).await.unwrap(), None);
    assert!(ask("later").await.unwrap().unwrap().is_none());
}
