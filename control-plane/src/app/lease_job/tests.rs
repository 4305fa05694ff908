//! Leases over the whole path: grants race, old epochs speak, runners go silent and return.

use std::sync::Arc;

use latchkey_domain::id::{Epoch, Generation};
use latchkey_domain::policy::{MfaPolicy, Phase};
use latchkey_domain::run::{FailureKind, Run, RunState};
use latchkey_proto::v1::Reason;
use tokio::sync::mpsc;

use self::slow::Slow;
use super::Held;
use crate::app::artifacts::{Made, Needed};
use crate::app::finish_job::JobResult;
use crate::app::fixture::{ENVIRONMENT, Fixture, ORGANIZATION};
use crate::app::run_output::{Appender, Piece};
use crate::app::runners::Budget;
use crate::app::service_tokens::TokenScope;
use crate::app::settings::SettingsChange;
use crate::app::start_job::Start;
use crate::auth::RunnerIdentity;
use crate::dispatch::{Introduction, RUNNER_QUEUE, Stop, ToRunner};
use crate::job::LeaseRef;
use crate::store::record::runner::Said;
use crate::store::{Store, keys};

mod pinned;
mod slow;

async fn queued() -> (Fixture, Run) {
    let fixture = Fixture::new(MfaPolicy::Never).await;
    let run = fixture.queue("first").await;
    assert_eq!(run.state, RunState::PlanQueued);
    (fixture, run)
}

async fn applying() -> (Fixture, Run, RunnerIdentity, LeaseRef) {
    let (fixture, run) = queued().await;
    let run = fixture.plan(&run).await;
    assert_eq!(run.state, RunState::AwaitingConfirmation);
    let seen = run.planned.as_ref().unwrap().digest;
    let run = fixture.app.confirm_run(&fixture.owner, run.id, seen).await.unwrap();
    let (runner, lease, start) = fixture.start(&run, Phase::Apply).await;
    assert!(matches!(start, Start::Go(_)));
    (fixture, run, runner, lease)
}

async fn append(appender: &Appender, offset: u64, data: &[u8]) -> crate::error::Result<u64> {
    appender.append(vec![Piece { offset, data: data.to_vec() }]).await
}

fn failed() -> JobResult {
    JobResult::Failed { kind: FailureKind::Errored, reason: "exit code 1".into() }
}

fn state(lineage: &str, serial: u64) -> Vec<u8> {
    format!(r#"{{"version":4,"serial":{serial},"lineage":"{lineage}"}}"#).into_bytes()
}

#[tokio::test]
async fn one_of_many_grants_of_a_job_wins() {
    let (fixture, run) = queued().await;
    let mut grants = vec![];
    for number in 0..20 {
        let (app, job) = (fixture.app.clone(), run.job_id(Phase::Plan));
        let runner = fixture.enrolled(number).await.id;
        grants.push(tokio::spawn(async move { app.grant(job, runner).await }));
    }
    let mut won = 0;
    for grant in grants {
        match grant.await.unwrap() {
            Ok(_) => won += 1,
            Err(error) => assert_eq!(error.reason(), Reason::WrongState, "{error}"),
        }
    }
    assert_eq!(won, 1);
}

#[tokio::test]
async fn a_silent_plan_is_leased_again_and_the_old_lease_changes_nothing() {
    let (fixture, run) = queued().await;
    let (runner, old, _) = fixture.start(&run, Phase::Plan).await;
    let app = &fixture.app;
    let appender = app.append_log(&runner, old).await.unwrap();
    assert_eq!(append(&appender, 0, b"first try\n").await.unwrap(), 10);
    app.expire(old.job, old.epoch).await.unwrap();

    let other = fixture.enrolled(77).await;
    let (new, _) = app.grant(old.job, other.id).await.unwrap();
    assert_eq!(new.epoch, old.epoch.next());
    assert_eq!(append(&appender, 10, b"late\n").await.unwrap_err().reason(), Reason::LeaseLost);
    for error in [
        app.start_job(&runner, old).await.unwrap_err(),
        app.finish_job(&runner, old, 10, failed()).await.unwrap_err(),
        app.append_log(&runner, old).await.unwrap_err(),
        app.fetch_artifact(&runner, old, Needed::Configuration).await.unwrap_err(),
    ] {
        assert_eq!(error.reason(), Reason::LeaseLost);
    }
    assert_eq!(app.take_up(&runner, old).await.unwrap(), Held::GiveUp);

    // The new lease's log begins at its own offset 0, behind what was there.
    app.start_job(&other, new).await.unwrap();
    let appender = app.append_log(&other, new).await.unwrap();
    assert_eq!(append(&appender, 0, b"second try\n").await.unwrap(), 11);
    let length = app.stored_log_length(run.id, Phase::Plan).await.unwrap();
    let log = app.logs.read(run.id, Phase::Plan, 0, 4096).await.unwrap();
    let log = String::from_utf8(log).unwrap();
    assert_eq!(log.len() as u64, length);
    assert!(log.starts_with("first try\n") && log.ends_with("second try\n"), "{log}");
    assert!(log.contains("leased again"));
    app.finish_job(&other, new, 11, failed()).await.unwrap();
    assert_eq!(fixture.run(&run).await.plan.log_length, Some(length));
}

#[tokio::test]
async fn a_silent_apply_is_lost_freezes_the_environment_and_never_starts_twice() {
    let (fixture, run, _, lease) = applying().await;
    fixture.app.expire(lease.job, lease.epoch).await.unwrap();
    assert_eq!(fixture.run(&run).await.state, RunState::Lost);
    let stranger = fixture.enrolled(77).await.id;
    let error = fixture.app.grant(lease.job, stranger).await.unwrap_err();
    assert_eq!(error.reason(), Reason::WrongState);
    let view =
        fixture.app.show_environment(&fixture.owner, ORGANIZATION, ENVIRONMENT).await.unwrap();
    assert_eq!(view.environment.hold.frozen.unwrap().run, run.id);
    assert_eq!(fixture.queue("second").await.state, RunState::Pending);
}

#[tokio::test]
async fn a_lost_runner_that_returns_goes_on_and_ends_its_run() {
    let (fixture, run, runner, lease) = applying().await;
    fixture.app.expire(lease.job, lease.epoch).await.unwrap();
    assert_eq!(fixture.app.take_up(&runner, lease).await.unwrap(), Held::Keep);
    fixture.upload(&runner, lease, Made::State, &state("l", 1)).await.unwrap();
    let result = JobResult::Applied { outputs: None };
    fixture.app.finish_job(&runner, lease, 0, result).await.unwrap();
    assert_eq!(fixture.run(&run).await.state, RunState::Applied);
    let view =
        fixture.app.show_environment(&fixture.owner, ORGANIZATION, ENVIRONMENT).await.unwrap();
    assert_eq!(view.environment.hold, latchkey_domain::environment::Hold::default());
}

#[tokio::test]
async fn a_repeated_result_is_answered_the_same() {
    let (fixture, run, runner, lease) = applying().await;
    let result = JobResult::Applied { outputs: Some("{}".into()) };
    fixture.app.finish_job(&runner, lease, 0, result.clone()).await.unwrap();
    fixture.app.finish_job(&runner, lease, 0, result).await.unwrap();
    assert_eq!(fixture.run(&run).await.state, RunState::Applied);
}

#[tokio::test]
async fn a_result_before_its_log_is_refused() {
    let (fixture, _, runner, lease) = applying().await;
    let error = fixture.app.finish_job(&runner, lease, 100, failed()).await.unwrap_err();
    assert_eq!(error.reason(), Reason::LogOffset);
}

#[tokio::test]
async fn a_state_that_does_not_continue_the_last_is_refused() {
    let (fixture, _, runner, lease) = applying().await;
    fixture.upload(&runner, lease, Made::State, &state("l", 3)).await.unwrap();
    fixture.upload(&runner, lease, Made::State, &state("l", 4)).await.unwrap();
    for bad in [state("l", 2), state("other", 9)] {
        let error = fixture.upload(&runner, lease, Made::State, &bad).await.unwrap_err();
        assert_eq!(error.reason(), Reason::WrongState);
    }
    let view =
        fixture.app.show_environment(&fixture.owner, ORGANIZATION, ENVIRONMENT).await.unwrap();
    assert_eq!(view.environment.state.unwrap().serial, 4);
}

#[tokio::test]
async fn what_an_old_lease_brings_goes_to_quarantine_and_a_strangers_nowhere() {
    let (fixture, run) = queued().await;
    let (runner, old, _) = fixture.start(&run, Phase::Plan).await;
    fixture.app.expire(old.job, old.epoch).await.unwrap();
    fixture.upload(&runner, old, Made::Workspace, b"late").await.unwrap();
    let kept =
        crate::store::list(&*fixture.store, keys::quarantine_of(runner.organization, run.id))
            .await
            .unwrap();
    assert_eq!(kept.len(), 1);
    let forged = LeaseRef { epoch: Epoch::new(99), ..old };
    let error = fixture.upload(&runner, forged, Made::Workspace, b"x").await.unwrap_err();
    assert_eq!(error.reason(), Reason::LeaseLost);
}

#[tokio::test]
async fn another_generation_is_refused() {
    let (fixture, _, runner, lease) = applying().await;
    for (generation, reason) in [(0, Reason::LeaseLost), (2, Reason::HistoryLost)] {
        let other = LeaseRef { generation: Generation::new(generation), ..lease };
        let error = fixture.app.start_again(&runner, other).await.unwrap_err();
        assert_eq!(error.reason(), reason);
    }
    // What comes from a later history is not kept here: its runner keeps it.
    let later = LeaseRef { generation: Generation::new(2), ..lease };
    let error = fixture.upload(&runner, later, Made::State, b"x").await.unwrap_err();
    assert_eq!(error.reason(), Reason::HistoryLost);
    fixture.app.start_again(&runner, lease).await.unwrap();
}

#[tokio::test]
async fn a_policy_tightened_after_the_confirmation_stops_the_release() {
    let (fixture, run) = queued().await;
    let run = fixture.plan(&run).await;
    let seen = run.planned.as_ref().unwrap().digest;
    fixture.app.confirm_run(&fixture.owner, run.id, seen).await.unwrap();
    let stricter =
        SettingsChange { policy: Some(MfaPolicy::AppliesOnly), ..SettingsChange::default() };
    fixture
        .app
        .update_environment(&fixture.owner, ORGANIZATION, ENVIRONMENT, stricter, None)
        .await
        .unwrap();
    let (_, _, start) = fixture.start(&run, Phase::Apply).await;
    assert!(matches!(start, Start::Revoked { .. }), "{start:?}");
    assert_eq!(fixture.run(&run).await.state, RunState::AwaitingApplyMfa);
}

#[tokio::test]
async fn runs_have_their_turns_in_order_of_queueing() {
    let (fixture, first) = queued().await;
    let second = fixture.queue("second").await;
    let third = fixture.queue("third").await;
    assert_eq!((second.state, third.state), (RunState::Pending, RunState::Pending));
    let view = fixture.app.show_run(&fixture.owner, third.id).await.unwrap();
    assert_eq!(view.queue_position, 2);
    fixture.app.cancel_run(&fixture.owner, first.id).await.unwrap();
    let organization = fixture.organization().await;
    let environment = first.request.environment;
    fixture.app.give_turns(organization, environment).await.unwrap();
    assert_eq!(fixture.run(&second).await.state, RunState::PlanQueued);
    assert_eq!(fixture.run(&third).await.state, RunState::Pending);
}

#[tokio::test]
async fn a_session_without_mfa_is_released_where_no_code_is_demanded() {
    let (fixture, run) = queued().await;
    let (_, _, start) = fixture.start(&run, Phase::Plan).await;
    let Start::Go(go) = start else { panic!("{start:?}") };
    assert!(go.session.is_some());
    let calls = fixture.aws.calls();
    assert!(calls.iter().all(|call| !call.had_code));
}

#[tokio::test]
async fn keys_that_aws_refuses_end_the_run_with_the_reason() {
    let (fixture, run) = queued().await;
    fixture.set("AWS_SECRET_ACCESS_KEY", "of somebody else").await;
    let (_, _, start) = fixture.start(&run, Phase::Plan).await;
    assert!(matches!(start, Start::Revoked { .. }));
    let run = fixture.run(&run).await;
    assert_eq!(run.state, RunState::Errored);
    assert!(run.reason.unwrap().contains("AWS_SECRET_ACCESS_KEY"));
}

#[tokio::test]
async fn a_cancel_that_the_runner_could_not_hear_is_told_when_it_returns() {
    let (fixture, run, runner, lease) = applying().await;
    fixture.app.cancel_run(&fixture.owner, run.id).await.unwrap();
    assert_eq!(
        fixture.app.take_up(&runner, lease).await.unwrap(),
        Held::KeepCanceled { stop: Stop::Gracefully }
    );
}

/// A stream of the runner, registered with what `take_up` let it keep.
async fn connect(
    fixture: &Fixture,
    runner: &RunnerIdentity,
    held: Vec<LeaseRef>,
) -> mpsc::Receiver<ToRunner> {
    fixture.dispatch();
    let said = Said { slots: 1, ..Said::default() };
    let standing = fixture.app.introduce(runner, &said, &Budget::default()).await.unwrap();
    let (sender, frames) = mpsc::channel(RUNNER_QUEUE);
    let introduction = Introduction { abilities: (&said).into(), held, standing, draining: false };
    fixture.app.dispatch.connect(runner.clone(), introduction, sender).await.unwrap();
    frames
}

async fn told(frames: &mut mpsc::Receiver<ToRunner>) -> ToRunner {
    let limit = std::time::Duration::from_secs(20);
    tokio::time::timeout(limit, frames.recv()).await.expect("a frame was due").unwrap()
}

#[tokio::test]
async fn what_is_decided_while_a_runner_connects_is_told() {
    let (fixture, run, runner, lease) = applying().await;
    let app = &fixture.app;
    assert_eq!(app.take_up(&runner, lease).await.unwrap(), Held::Keep);
    app.cancel_run(&fixture.owner, run.id).await.unwrap();
    let mut frames = connect(&fixture, &runner, vec![lease]).await;
    app.confirm_held(&runner, &[lease]).await.unwrap();
    assert!(matches!(told(&mut frames).await, ToRunner::Cancel { stop: Stop::Gracefully, .. }));
    // Told again for as long as it is so.
    app.reconcile().await.unwrap();
    assert!(matches!(told(&mut frames).await, ToRunner::Cancel { stop: Stop::Gracefully, .. }));
    fixture.clock.advance(std::time::Duration::from_secs(60));
    app.force_cancel_run(&fixture.owner, run.id).await.unwrap();
    assert!(matches!(told(&mut frames).await, ToRunner::Cancel { stop: Stop::ByForce, .. }));
    app.reconcile().await.unwrap();
    assert!(matches!(told(&mut frames).await, ToRunner::Cancel { stop: Stop::ByForce, .. }));
}

#[tokio::test]
async fn a_lease_that_ends_while_its_runner_connects_is_revoked() {
    let (fixture, run) = queued().await;
    let (runner, lease, _) = fixture.start(&run, Phase::Plan).await;
    let app = &fixture.app;
    assert_eq!(app.take_up(&runner, lease).await.unwrap(), Held::Keep);
    app.expire(lease.job, lease.epoch).await.unwrap();
    let mut frames = connect(&fixture, &runner, vec![lease]).await;
    app.reconcile().await.unwrap();
    assert!(matches!(told(&mut frames).await, ToRunner::Revoke { .. }));
    assert!(app.dispatch.watched().await.is_empty());
    let mut frames = connect(&fixture, &runner, vec![lease]).await;
    app.confirm_held(&runner, &[lease]).await.unwrap();
    assert!(matches!(told(&mut frames).await, ToRunner::Revoke { .. }));
}

#[tokio::test]
async fn what_was_committed_follows_even_if_its_caller_hangs_up() {
    let (fixture, run, runner, lease) = applying().await;
    let mut frames = connect(&fixture, &runner, vec![lease]).await;
    let slow = Arc::new(Slow::new(&fixture.store));
    let app = fixture.committing_through(Arc::clone(&slow) as Arc<dyn Store>).await;
    slow.arm();
    let (canceling, owner, id) = (Arc::clone(&app), fixture.owner.clone(), run.id);
    hang_up(&slow, async move { canceling.cancel_run(&owner, id).await.map(drop) }).await;
    assert!(matches!(told(&mut frames).await, ToRunner::Cancel { stop: Stop::Gracefully, .. }));

    let revocation = app.revocations.of(runner.id);
    slow.arm();
    let (revoking, owner, id) = (Arc::clone(&app), fixture.owner.clone(), runner.id);
    hang_up(&slow, async move { revoking.revoke_runner(&owner, id).await.map(drop) }).await;
    let limit = std::time::Duration::from_secs(20);
    tokio::time::timeout(limit, revocation.revoked()).await.expect("the runner is cut off");
    let ended = async {
        while app.run(run.id).await.unwrap().value.state != RunState::Lost {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(limit, ended).await.expect("what it held is over");
}

/// Drops what is done for a caller after its commit and before the caller hears of it.
async fn hang_up(
    slow: &Slow,
    handler: impl Future<Output = crate::error::Result<()>> + Send + 'static,
) {
    let handler = tokio::spawn(handler);
    slow.committed.notified().await;
    handler.abort();
    assert!(handler.await.unwrap_err().is_cancelled());
    slow.go_on.notify_one();
}

#[tokio::test]
async fn a_kill_that_crosses_the_answer_to_again_lets_nothing_start() {
    let (fixture, run, runner, lease) = applying().await;
    let (app, owner) = (&fixture.app, &fixture.owner);
    app.cancel_run(owner, run.id).await.unwrap();
    fixture.clock.advance(std::time::Duration::from_secs(60));
    // `start_again` has looked at the run by now.
    app.force_cancel_run(owner, run.id).await.unwrap();
    let start = app.go(&runner, lease).await.unwrap();
    assert!(matches!(start, Start::Forced), "{start:?}");
}

#[tokio::test]
async fn whoever_has_no_record_is_given_nothing() {
    let (fixture, run) = queued().await;
    let nobody = latchkey_domain::id::RunnerId::from_bytes([99; 16]);
    let error = fixture.app.grant(run.job_id(Phase::Plan), nobody).await.unwrap_err();
    assert_eq!(error.reason(), Reason::IdentityRequired);
    assert_eq!(fixture.run(&run).await.state, RunState::PlanQueued);
}

#[tokio::test]
async fn a_plan_that_does_not_name_its_version_fails() {
    for version in ["", "*", ">= 1.9", "1.9"] {
        let (fixture, run) = queued().await;
        let (runner, lease, _) = fixture.start(&run, Phase::Plan).await;
        let changes = fixture.upload(&runner, lease, Made::Changes, b"{}").await.unwrap();
        let workspace = fixture.upload(&runner, lease, Made::Workspace, b"made").await.unwrap();
        let result = JobResult::Planned {
            digests: latchkey_domain::run::PlanDigests {
                plan: changes,
                workspace,
                lock_file: None,
                changes,
            },
            applyable: true,
            counts: latchkey_domain::run::Counts::default(),
            engine: String::new(),
            terraform_version: version.into(),
        };
        fixture.app.finish_job(&runner, lease, 0, result).await.unwrap();
        let run = fixture.run(&run).await;
        assert_eq!(run.state, RunState::Errored, "{version}");
        assert!(run.reason.unwrap().contains("which version"));
    }
}

#[tokio::test]
async fn a_grant_that_loses_leaves_no_word_in_the_winners_log() {
    let (fixture, run) = queued().await;
    let (runner, lease, _) = fixture.start(&run, Phase::Plan).await;
    let appender = fixture.app.append_log(&runner, lease).await.unwrap();
    append(&appender, 0, b"line\n").await.unwrap();
    let stranger = fixture.enrolled(77).await.id;
    fixture.app.grant(lease.job, stranger).await.unwrap_err();
    assert_eq!(append(&appender, 5, b"next\n").await.unwrap(), 10);
}

#[tokio::test]
async fn no_session_outlives_its_phase() {
    let (fixture, run) = queued().await;
    let (runner, lease, _) = fixture.start(&run, Phase::Plan).await;
    let key = keys::session(run.id, Phase::Plan);
    assert!(fixture.store.fetch(&key).await.unwrap().is_some());
    fixture.app.finish_job(&runner, lease, 0, failed()).await.unwrap();
    assert!(fixture.store.fetch(&key).await.unwrap().is_none());
}

#[tokio::test]
async fn a_plan_names_only_what_its_lease_has_uploaded() {
    let (fixture, run) = queued().await;
    let (runner, lease, _) = fixture.start(&run, Phase::Plan).await;
    // Known to the control plane, but not made by this job.
    let foreign = fixture.app.blobs.put(runner.organization, b"a state").await.unwrap();
    let changes = fixture.upload(&runner, lease, Made::Changes, b"{}").await.unwrap();
    let result = JobResult::Planned {
        digests: latchkey_domain::run::PlanDigests {
            plan: changes,
            workspace: foreign,
            lock_file: None,
            changes,
        },
        applyable: true,
        counts: latchkey_domain::run::Counts::default(),
        engine: String::new(),
        terraform_version: "1.11.4".into(),
    };
    let error = fixture.app.finish_job(&runner, lease, 0, result).await.unwrap_err();
    assert_eq!(error.reason(), Reason::FieldInvalid);
}

#[tokio::test]
async fn a_workspace_is_deleted_when_its_run_has_ended() {
    let (fixture, run, runner, lease) = applying().await;
    let digest = fixture.run(&run).await.planned.unwrap().digests.workspace;
    let result = JobResult::Applied { outputs: None };
    fixture.app.finish_job(&runner, lease, 0, result).await.unwrap();
    fixture.app.collect_garbage().await.unwrap();
    assert!(!fixture.app.blobs.exists(runner.organization, digest).await.unwrap());
}

#[tokio::test]
async fn a_service_token_cannot_ask_for_an_apply_that_no_owner_set() {
    let (fixture, _) = queued().await;
    let (app, owner) = (&fixture.app, &fixture.owner);
    let (token, _) = app
        .create_service_token(owner, ORGANIZATION, "ci", None, TokenScope::default(), "make-ci")
        .await
        .unwrap();
    let ci = app.caller(&token).await.unwrap();
    assert!(!fixture.queue_automatic(&ci, "a").await.unwrap().request.auto_apply);
    assert!(fixture.queue_automatic(owner, "b").await.unwrap().request.auto_apply);
}

#[tokio::test]
async fn an_owner_unfreezes_an_environment_once_its_lost_run_is_given_up() {
    let (fixture, run, _, lease) = applying().await;
    fixture.app.expire(lease.job, lease.epoch).await.unwrap();
    let next = fixture.queue("next").await;
    let (app, owner) = (&fixture.app, &fixture.owner);
    let unfreeze = || app.unfreeze_environment(owner, ORGANIZATION, ENVIRONMENT, run.id);
    assert_eq!(unfreeze().await.unwrap_err().reason(), Reason::WrongState);
    let given_up = app.discard_run(owner, run.id).await.unwrap();
    assert_eq!(given_up.state, RunState::Errored);
    assert_eq!(fixture.run(&next).await.state, RunState::Pending);
    unfreeze().await.unwrap();
    assert_eq!(fixture.run(&next).await.state, RunState::PlanQueued);
    unfreeze().await.unwrap();
}

#[tokio::test]
async fn only_an_owner_who_says_so_gives_a_lost_apply_up() {
    let (fixture, run, runner, lease) = applying().await;
    let (app, owner) = (&fixture.app, &fixture.owner);
    let (token, _) = app
        .create_service_token(owner, ORGANIZATION, "ci", None, TokenScope::default(), "make-ci")
        .await
        .unwrap();
    let ci = app.caller(&token).await.unwrap();
    app.cancel_run(owner, run.id).await.unwrap();
    app.expire(lease.job, lease.epoch).await.unwrap();
    // "Why does it not stop?"
    for caller in [owner, &ci] {
        assert_eq!(app.cancel_run(caller, run.id).await.unwrap().state, RunState::Lost);
    }
    let error = app.discard_run(&ci, run.id).await.unwrap_err();
    assert_eq!(error.reason(), Reason::PersonRequired);
    let shown = fixture.run(&run).await.reason.unwrap();
    assert!(shown.contains("wait for the runner") && shown.contains("latchkey discard"), "{shown}");
    // Its runner is as good as ever.
    assert_ne!(app.take_up(&runner, lease).await.unwrap(), Held::GiveUp);
    app.expire(lease.job, lease.epoch).await.unwrap();
    assert_eq!(app.discard_run(owner, run.id).await.unwrap().state, RunState::Errored);
    assert_eq!(app.take_up(&runner, lease).await.unwrap(), Held::GiveUp);
}
