//! Drains and revocations over the whole path: records, leases, runs, audit.

use latchkey_domain::id::Digest;
use latchkey_domain::policy::MfaPolicy;
use latchkey_domain::run::Run;
use tokio::sync::mpsc;

use super::*;
use crate::app::audit_trail::AuditFilter;
use crate::app::finish_job::JobResult;
use crate::app::fixture::{ENVIRONMENT, Fixture, ORGANIZATION};
use crate::app::service_tokens::TokenScope;
use crate::app::settings::SettingsChange;
use crate::app::start_job::Start;
use crate::dispatch::{Introduction, RUNNER_QUEUE, ToRunner};
use crate::job::LeaseRef;
use crate::store::record::Text;
use crate::store::record::environment::EnvironmentRecord;

/// A runner of a pool that the environment is assigned to.
async fn enrolled(fixture: &Fixture) -> RunnerIdentity {
    let (app, owner) = (&fixture.app, &fixture.owner);
    let pool = app.create_pool(owner, ORGANIZATION, "build", "pool").await.unwrap();
    let change = SettingsChange { pool: Some("build".into()), ..SettingsChange::default() };
    app.update_environment(owner, ORGANIZATION, ENVIRONMENT, change, None).await.unwrap();
    record(fixture, pool.id.0, 7).await
}

async fn record(fixture: &Fixture, pool: PoolId, number: u8) -> RunnerIdentity {
    let organization = fixture.organization().await;
    let (id, key) = (RunnerId::from_bytes([number; 16]), Digest::from_bytes([number; 32]));
    let runner = Runner {
        id: Text(id),
        name: format!("host-{number}"),
        pool: Text(pool),
        organization: Text(organization),
        key: Text(key),
        enrolled_at: fixture.app.now().into(),
        said: None,
        drained_at: None,
        revoked_at: None,
        fought_at: None,
    };
    let batch = Batch::new()
        .put(keys::runner(id), Expect::Absent, encode(&runner))
        .put(keys::runner_by_key(key.as_bytes()), Expect::Absent, encode(&Text(id)))
        .put(keys::runner_by_pool(pool, id), Expect::Absent, []);
    fixture.store.commit(batch).await.unwrap();
    RunnerIdentity { id, name: runner.name, organization, pool }
}

fn said() -> Said {
    Said { slots: 2, engines: vec![("terraform".into(), "1.11.4".into())], ..Said::default() }
}

async fn connect(fixture: &Fixture, runner: &RunnerIdentity) -> mpsc::Receiver<ToRunner> {
    let standing = fixture.app.introduce(runner, &said(), &Budget::default()).await.unwrap();
    let (sender, frames) = mpsc::channel(RUNNER_QUEUE);
    let introduction =
        Introduction { abilities: (&said()).into(), held: vec![], standing, draining: false };
    fixture.app.dispatch.connect(runner.clone(), introduction, sender).await.unwrap();
    frames
}

async fn offer(frames: &mut mpsc::Receiver<ToRunner>) -> LeaseRef {
    let limit = std::time::Duration::from_secs(20);
    match tokio::time::timeout(limit, frames.recv()).await.expect("an offer was due") {
        Some(ToRunner::Offer { lease, .. }) => lease,
        other => panic!("{other:?}"),
    }
}

async fn actions(fixture: &Fixture) -> Vec<String> {
    let page = PageRequest { size: 200, token: String::new() };
    let records = fixture
        .app
        .list_audit(&fixture.owner, ORGANIZATION, AuditFilter::default(), page)
        .await
        .unwrap();
    records.items.into_iter().map(|record| record.draft.action).collect()
}

async fn reason(fixture: &Fixture, run: &Run) -> String {
    fixture.run(run).await.reason.unwrap_or_default()
}

#[tokio::test]
async fn what_a_runner_said_last_is_shown_when_it_is_gone() {
    let fixture = Fixture::new(MfaPolicy::Never).await;
    fixture.dispatch();
    let runner = enrolled(&fixture).await;
    let (app, owner) = (&fixture.app, &fixture.owner);
    let first = app.introduce(&runner, &said(), &Budget::default()).await.unwrap();
    let again = app.introduce(&runner, &said(), &Budget::default()).await.unwrap();
    assert_eq!(first, again, "what is no news is not written");
    let news = Said { version: "2".into(), ..said() };
    assert!(
        app.introduce(&runner, &news, &Budget::default()).await.unwrap().version > first.version
    );
    let view = app.show_runner(owner, runner.id).await.unwrap();
    assert_eq!(view.runner.said, Some(news));
    assert!(!view.seen.connected);
}

#[tokio::test]
async fn a_drain_outlives_both_sides_and_is_taken_back() {
    let fixture = Fixture::new(MfaPolicy::Never).await;
    fixture.dispatch();
    let runner = enrolled(&fixture).await;
    let (app, owner) = (&fixture.app, &fixture.owner);
    let drained = app.drain_runner(owner, runner.id).await.unwrap();
    let repeated = app.drain_runner(owner, runner.id).await.unwrap();
    assert_eq!(drained.runner.drained_at, repeated.runner.drained_at);
    assert_eq!(actions(&fixture).await.iter().filter(|a| *a == "drain_runner").count(), 1);
    // A control plane that was started anew knows, and grants nothing, whatever dispatch thinks.
    let restarted = fixture.restarted(None).await;
    assert!(restarted.introduce(&runner, &said(), &Budget::default()).await.unwrap().drained);
    let run = fixture.queue("first").await;
    let job = run.job_id(Phase::Plan);
    assert_eq!(restarted.grant(job, runner.id).await.unwrap_err().reason(), Reason::NotAllowed);
    let mut frames = connect(&fixture, &runner).await;
    assert!(matches!(frames.recv().await, Some(ToRunner::Drain)));
    let waits = "waits for a runner of pool build: all suitable runners are busy or draining";
    assert_eq!(reason(&fixture, &run).await, waits);
    app.resume_runner(owner, runner.id).await.unwrap();
    assert!(matches!(frames.recv().await, Some(ToRunner::Resume)));
    assert_eq!(offer(&mut frames).await.job, job);
    let view = app.show_runner(owner, runner.id).await.unwrap();
    assert_eq!(view.holds.iter().map(|held| held.job).collect::<Vec<_>>(), [job]);
    assert!(view.seen.connected && view.holds[0].started_at.is_none());
}

#[tokio::test]
async fn a_plan_of_a_revoked_runner_is_granted_again_at_once() {
    let fixture = Fixture::new(MfaPolicy::Never).await;
    fixture.dispatch();
    let runner = enrolled(&fixture).await;
    let other = record(&fixture, runner.pool, 9).await;
    let mut frames = connect(&fixture, &runner).await;
    let run = fixture.queue("first").await;
    let old = offer(&mut frames).await;
    let app = &fixture.app;
    assert!(matches!(app.start_job(&runner, old).await.unwrap(), Start::Go(_)));
    let mut others = connect(&fixture, &other).await;
    let revocation = app.revocations.of(runner.id);
    app.revoke_runner(&fixture.owner, runner.id).await.unwrap();
    revocation.revoked().await;
    assert!(frames.recv().await.is_none());
    let new = offer(&mut others).await;
    assert_eq!((new.job, new.epoch), (run.job_id(Phase::Plan), old.epoch.next()));
    // Its certificate, its key and what it held are worth nothing.
    let key = Digest::from_bytes([7; 32]);
    for error in [
        app.runner_with_key(&key).await.unwrap_err(),
        app.introduce(&runner, &said(), &Budget::default()).await.unwrap_err(),
        app.confirm_standing(runner.id).await.unwrap_err(),
        app.grant(new.job, runner.id).await.unwrap_err(),
    ] {
        assert!(matches!(error.reason(), Reason::IdentityRequired | Reason::WrongState));
    }
    let late = fixture.upload(&runner, old, crate::app::artifacts::Made::Workspace, b"late").await;
    assert_eq!(late.unwrap_err().reason(), Reason::IdentityRequired);
    assert!(app.start_again(&runner, old).await.is_err());
    assert!(actions(&fixture).await.contains(&"revoke_runner".into()));
    // For good, and safe to repeat.
    app.revoke_runner(&fixture.owner, runner.id).await.unwrap();
    for refused in [
        app.resume_runner(&fixture.owner, runner.id).await.unwrap_err(),
        app.drain_runner(&fixture.owner, runner.id).await.unwrap_err(),
    ] {
        assert_eq!(refused.reason(), Reason::WrongState);
    }
}

async fn confirmed(fixture: &Fixture) -> (Run, RunnerIdentity, LeaseRef) {
    let runner = enrolled(fixture).await;
    let run = fixture.queue("first").await;
    let run = fixture.plan(&run).await;
    let seen = run.planned.as_ref().unwrap().digest;
    fixture.app.confirm_run(&fixture.owner, run.id, seen).await.unwrap();
    let (lease, _) = fixture.app.grant(run.job_id(Phase::Apply), runner.id).await.unwrap();
    (run, runner, lease)
}

#[tokio::test]
async fn an_apply_that_a_revoked_runner_had_not_started_is_granted_again() {
    let fixture = Fixture::new(MfaPolicy::Never).await;
    fixture.dispatch();
    let (run, runner, lease) = confirmed(&fixture).await;
    fixture.app.revoke_runner(&fixture.owner, runner.id).await.unwrap();
    assert_eq!(fixture.run(&run).await.state, RunState::ApplyQueued);
    assert!(fixture.app.start_job(&runner, lease).await.is_err());
    let other = record(&fixture, runner.pool, 9).await;
    let (again, _) = fixture.app.grant(lease.job, other.id).await.unwrap();
    assert_eq!(again.epoch, lease.epoch.next());
}

#[tokio::test]
async fn an_apply_that_a_revoked_runner_had_started_is_lost_and_it_cannot_end_it() {
    let fixture = Fixture::new(MfaPolicy::Never).await;
    fixture.dispatch();
    let (run, runner, lease) = confirmed(&fixture).await;
    assert!(matches!(fixture.app.start_job(&runner, lease).await.unwrap(), Start::Go(_)));
    fixture.app.revoke_runner(&fixture.owner, runner.id).await.unwrap();
    let lost = fixture.run(&run).await;
    assert_eq!(lost.state, RunState::Lost);
    let reason = lost.reason.unwrap();
    assert!(reason.contains("revoked") && !reason.contains("wait for the runner"), "{reason}");
    let applied = JobResult::Applied { outputs: None };
    let late = fixture.app.finish_job(&runner, lease, 0, applied).await;
    assert_eq!(late.unwrap_err().reason(), Reason::IdentityRequired);
    assert_eq!(fixture.run(&run).await.state, RunState::Lost);
    let (key, value) =
        crate::store::list(&*fixture.store, keys::environments_of(fixture.organization().await))
            .await
            .unwrap()
            .remove(0);
    let environment: EnvironmentRecord = decode(&key, &value).unwrap();
    let environment = crate::store::record::environment::Environment::from(environment);
    assert_eq!(environment.hold.frozen.unwrap().run, run.id);
}

#[tokio::test]
async fn a_waiting_run_says_what_it_waits_for() {
    let fixture = Fixture::new(MfaPolicy::Never).await;
    fixture.dispatch();
    let runner = enrolled(&fixture).await;
    let run = fixture.queue("first").await;
    let nobody = "waits for a runner of pool build: none is connected";
    assert_eq!(reason(&fixture, &run).await, nobody);
    let change = SettingsChange {
        runner_labels: Some([("gpu".into(), "yes".into())].into()),
        engine: Some("tofu".into()),
        engine_version: Some("1.9.0".into()),
        ..SettingsChange::default()
    };
    let (app, owner) = (&fixture.app, &fixture.owner);
    app.update_environment(owner, ORGANIZATION, ENVIRONMENT, change, None).await.unwrap();
    let mut frames = connect(&fixture, &runner).await;
    let lacking = "waits for a runner of pool build with tofu 1.9.0 and label gpu=yes";
    assert_eq!(reason(&fixture, &run).await, lacking);
    let change = SettingsChange {
        runner_labels: Some([].into()),
        engine: Some("terraform".into()),
        engine_version: Some("1.11.4".into()),
        ..SettingsChange::default()
    };
    app.update_environment(owner, ORGANIZATION, ENVIRONMENT, change, None).await.unwrap();
    // Settings that were changed while it waits count at once.
    assert_eq!(offer(&mut frames).await.job.run, run.id);
}

fn engine(name: &str, version: &str) -> SettingsChange {
    SettingsChange {
        engine: Some(name.into()),
        engine_version: Some(version.into()),
        ..SettingsChange::default()
    }
}

#[tokio::test]
async fn a_plan_is_asked_for_by_its_settings_and_an_apply_by_its_plan() {
    let fixture = Fixture::new(MfaPolicy::Never).await;
    fixture.dispatch();
    let runner = enrolled(&fixture).await;
    let (app, owner) = (&fixture.app, &fixture.owner);
    let change = engine("terraform", "1.11.4");
    app.update_environment(owner, ORGANIZATION, ENVIRONMENT, change, None).await.unwrap();
    let run = fixture.queue("first").await;
    let (lease, spec) = app.grant(run.job_id(Phase::Plan), runner.id).await.unwrap();
    assert_eq!((spec.engine.as_str(), spec.terraform_version.as_str()), ("terraform", "1.11.4"));
    app.hand_back(&runner, lease).await.unwrap();
    let run = fixture.plan(&run).await;
    app.update_environment(owner, ORGANIZATION, ENVIRONMENT, engine("tofu", "1.9.0"), None)
        .await
        .unwrap();
    let seen = run.planned.as_ref().unwrap().digest;
    app.confirm_run(owner, run.id, seen).await.unwrap();
    let (_, spec) = app.grant(run.job_id(Phase::Apply), runner.id).await.unwrap();
    assert_eq!((spec.engine.as_str(), spec.terraform_version.as_str()), ("terraform", "1.11.4"));
}

#[tokio::test]
async fn a_runner_that_says_something_else_each_time_is_let_in_and_not_recorded_each_time() {
    let fixture = Fixture::new(MfaPolicy::Never).await;
    fixture.dispatch();
    let runner = enrolled(&fixture).await;
    let (app, budget) = (&fixture.app, Budget::default());
    let told = |number: u32| Said { version: number.to_string(), ..said() };
    let mut versions = vec![];
    for number in 0..40 {
        versions.push(app.introduce(&runner, &told(number), &budget).await.unwrap().version);
    }
    versions.dedup();
    assert_eq!(versions.len(), 8);
    // What is recorded stands, and saying it again costs nothing.
    let shown = app.show_runner(&fixture.owner, runner.id).await.unwrap().runner;
    assert_eq!(shown.said, Some(told(7)));
    app.drain_runner(&fixture.owner, runner.id).await.unwrap();
    assert!(app.introduce(&runner, &told(77), &budget).await.unwrap().drained);
}

/// Somebody who wants another engine from now on means the next run.
#[tokio::test]
async fn settings_that_change_in_the_middle_of_a_plan_break_nothing() {
    let fixture = Fixture::new(MfaPolicy::Never).await;
    fixture.dispatch();
    let (app, owner) = (&fixture.app, &fixture.owner);
    let change = engine("terraform", "1.11.4");
    app.update_environment(owner, ORGANIZATION, ENVIRONMENT, change, None).await.unwrap();
    let run = fixture.queue("first").await;
    let (runner, lease, _) = fixture.start(&run, Phase::Plan).await;
    app.update_environment(owner, ORGANIZATION, ENVIRONMENT, engine("tofu", "1.9.0"), None)
        .await
        .unwrap();
    let run = fixture.planned(&runner, lease).await;
    assert_eq!(run.state, RunState::AwaitingConfirmation, "{:?}", run.reason);
}

#[tokio::test]
async fn runners_are_listed_page_by_page_over_all_pools() {
    let fixture = Fixture::new(MfaPolicy::Never).await;
    fixture.dispatch();
    let runner = enrolled(&fixture).await;
    let (app, owner) = (&fixture.app, &fixture.owner);
    let second = app.create_pool(owner, ORGANIZATION, "more", "more").await.unwrap();
    for number in 20..23 {
        record(&fixture, runner.pool, number).await;
        record(&fixture, second.id.0, number + 40).await;
    }
    let mut found = vec![];
    let mut token = String::new();
    loop {
        let page = PageRequest { size: 2, token };
        let page = app.list_runners(owner, ORGANIZATION, page).await.unwrap();
        assert!(page.items.len() <= 2);
        found.extend(page.items.into_iter().map(|view| (view.pool, view.runner.id.0)));
        let Some(next) = page.next else { break };
        token = next;
    }
    assert_eq!(found.len(), 7);
    found.sort_unstable();
    found.dedup();
    assert_eq!(found.len(), 7);
}

#[tokio::test]
async fn a_fight_over_one_identity_is_audited_and_shown() {
    let fixture = Fixture::new(MfaPolicy::Never).await;
    fixture.dispatch();
    let runner = enrolled(&fixture).await;
    let streams = futures_of(&fixture, &runner).await;
    drop(streams);
    let limit = std::time::Duration::from_secs(20);
    let shown = async {
        loop {
            let view = fixture.app.show_runner(&fixture.owner, runner.id).await.unwrap();
            if view.runner.fought_at.is_some() {
                return;
            }
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(limit, shown).await.expect("the fight was recorded");
    assert!(actions(&fixture).await.contains(&"two_programs_of_one_runner".into()));
}

async fn futures_of(fixture: &Fixture, runner: &RunnerIdentity) -> Vec<mpsc::Receiver<ToRunner>> {
    let mut streams = vec![];
    for _ in 0..8 {
        streams.push(connect(fixture, runner).await);
    }
    streams
}

#[tokio::test]
async fn members_look_and_owners_steer() {
    let fixture = Fixture::new(MfaPolicy::Never).await;
    fixture.dispatch();
    let runner = enrolled(&fixture).await;
    let (app, owner) = (&fixture.app, &fixture.owner);
    let (token, _) = app
        .create_service_token(owner, ORGANIZATION, "ci", None, TokenScope::default(), "make-ci")
        .await
        .unwrap();
    let ci = app.caller(&token).await.unwrap();
    app.show_runner(&ci, runner.id).await.unwrap();
    let refused = app.revoke_runner(&ci, runner.id).await.unwrap_err();
    assert_eq!(refused.reason(), Reason::PersonRequired);
    let stranger = RunnerId::from_bytes([99; 16]);
    assert_eq!(app.show_runner(owner, stranger).await.unwrap_err().reason(), Reason::NotFound);
}

#[tokio::test]
async fn a_revocation_that_only_the_store_knows_of_stops_every_word_of_its_runner() {
    let fixture = Fixture::new(MfaPolicy::Never).await;
    fixture.dispatch();
    let (run, runner, lease) = confirmed(&fixture).await;
    let app = &fixture.app;
    // As another control plane has it: nothing in this process was told.
    let Loaded { key, version, value } = app.runner_record(runner.id).await.unwrap();
    let revoked = Runner { revoked_at: Some(app.now().into()), ..value };
    let batch = Batch::new().put(key, Expect::At(version), encode(&revoked));
    fixture.store.commit(batch).await.unwrap();
    let applied = JobResult::Applied { outputs: None };
    for error in [
        app.start_job(&runner, lease).await.unwrap_err(),
        app.start_again(&runner, lease).await.unwrap_err(),
        app.hand_back(&runner, lease).await.unwrap_err(),
        app.decline_job(&runner, lease, "no".into()).await.unwrap_err(),
        app.take_up(&runner, lease).await.unwrap_err(),
        app.finish_job(&runner, lease, 0, applied).await.unwrap_err(),
    ] {
        assert_eq!(error.reason(), Reason::IdentityRequired, "{error}");
    }
    assert_eq!(fixture.run(&run).await.state, RunState::Applying);
    // What the owner's process did not come to, the reaper of any does.
    app.reconcile().await.unwrap();
    assert_eq!(fixture.run(&run).await.state, RunState::ApplyQueued);
}
