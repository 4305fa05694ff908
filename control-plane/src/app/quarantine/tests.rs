//! What old leases bring, what a person makes of it, and how a lost or a killed apply ends.

mod settling;

use std::time::Duration;

use latchkey_domain::environment::Hold;
use latchkey_domain::id::{Epoch, Generation, OrganizationId, QuarantinedId, RunId};
use latchkey_domain::policy::{MfaPolicy, Phase};
use latchkey_domain::run::{FailureKind, Run, RunKind, RunState};
use latchkey_proto::v1::Reason;

use super::QuarantinedView;
use crate::app::artifacts::{ArtifactHeader, Destination, Made, Needed};
use crate::app::audit_trail::AuditFilter;
use crate::app::finish_job::JobResult;
use crate::app::fixture::{ENVIRONMENT, Fixture, ORGANIZATION};
use crate::app::lease_job::Held;
use crate::app::queue_run::NewRun;
use crate::app::run_output::Piece;
use crate::app::service_tokens::TokenScope;
use crate::app::start_job::Start;
use crate::app::{App, PageRequest};
use crate::auth::{Caller, RunnerIdentity, sha256};
use crate::dispatch::Stop;
use crate::error::Result;
use crate::job::LeaseRef;
use crate::store::record::people::{Access, Role};
use crate::store::record::quarantine::{Kind, Quarantined, StateFacts, Tally};
use crate::store::record::{Text, encode};
use crate::store::{Batch, Expect, keys};

/// An environment with state serial 6 of lineage `l`, whose apply goes on.
async fn applying() -> (Fixture, Run, RunnerIdentity, LeaseRef) {
    let fixture = Fixture::new(MfaPolicy::Never).await;
    let run = fixture.queue("first").await;
    let run = fixture.plan(&run).await;
    let seen = run.planned.as_ref().unwrap().digest;
    let run = fixture.app.confirm_run(&fixture.owner, run.id, seen).await.unwrap();
    let (runner, lease, start) = fixture.start(&run, Phase::Apply).await;
    assert!(matches!(start, Start::Go(_)));
    fixture.upload(&runner, lease, Made::State, &state("l", 6)).await.unwrap();
    (fixture, run, runner, lease)
}

/// The same, after its runner went silent and a person gave it up.
async fn given_up() -> (Fixture, Run, RunnerIdentity, LeaseRef) {
    let (fixture, run, runner, lease) = applying().await;
    fixture.app.expire(lease.job, lease.epoch).await.unwrap();
    let run = fixture.app.discard_run(&fixture.owner, run.id).await.unwrap();
    assert_eq!(run.state, RunState::Errored);
    (fixture, run, runner, lease)
}

fn state(lineage: &str, serial: u64) -> Vec<u8> {
    format!(r#"{{"version":4,"serial":{serial},"lineage":"{lineage}","outputs":{{"n":1.0}}}}"#)
        .into_bytes()
}

async fn bring(
    app: &std::sync::Arc<App>,
    runner: &RunnerIdentity,
    lease: LeaseRef,
    (kind, sequence): (Made, u64),
    data: &[u8],
) -> Result<Destination> {
    let (digest, size) = (sha256(data), data.len() as u64);
    let header = ArtifactHeader { lease, kind, digest, size, sequence };
    let mut upload = app.upload_artifact(runner, header).await?;
    upload.write(data).await?;
    if kind == Made::Result {
        upload.says(&JobResult::Applied { outputs: None });
    }
    upload.finish().await
}

async fn listed(fixture: &Fixture, run: Option<RunId>) -> Vec<QuarantinedView> {
    let page = PageRequest::default();
    fixture.app.list_quarantined(&fixture.owner, ORGANIZATION, run, page).await.unwrap().items
}

async fn only(fixture: &Fixture, kind: Kind) -> QuarantinedView {
    let mut found = listed(fixture, None).await;
    found.retain(|view| view.record.kind == kind);
    assert_eq!(found.len(), 1, "{found:?}");
    found.remove(0)
}

async fn accept(fixture: &Fixture, id: QuarantinedId, older: bool) -> Result<StateFacts> {
    let app = &fixture.app;
    app.accept_state(&fixture.owner, ORGANIZATION, id, ENVIRONMENT, older).await
}

async fn hold(fixture: &Fixture) -> Hold {
    let view = fixture.app.show_environment(&fixture.owner, ORGANIZATION, ENVIRONMENT).await;
    view.unwrap().environment.hold
}

async fn current_state(fixture: &Fixture) -> Vec<u8> {
    let view = fixture.app.show_environment(&fixture.owner, ORGANIZATION, ENVIRONMENT).await;
    let environment = view.unwrap().environment;
    let digest = environment.state.unwrap().digest.0;
    let bytes = fixture.app.blobs.get(environment.organization, digest, 1 << 20).await.unwrap();
    bytes.expose_secret().to_vec()
}

async fn member(fixture: &Fixture) -> Caller {
    let (app, owner) = (&fixture.app, &fixture.owner);
    let made =
        app.create_user(owner, ORGANIZATION, "bob", Role::Member, Access::Write, "make-bob").await;
    app.caller(&made.unwrap()).await.unwrap()
}

#[tokio::test]
async fn a_given_up_apply_whose_runner_returns_is_recovered_from_what_it_brings() {
    let (fixture, run, runner, lease) = given_up().await;
    let (app, owner) = (&fixture.app, &fixture.owner);
    let next = fixture.queue("next").await;
    let log_before = app.logs.read(run.id, Phase::Apply, 0, 4096).await.unwrap();

    assert_eq!(app.take_up(&runner, lease).await.unwrap(), Held::GiveUp);
    for (kind, data) in [
        (Made::Log, b"{\"type\":\"apply_complete\"}\n".to_vec()),
        (Made::State, state("l", 7)),
        (Made::Result, b"a frame".to_vec()),
    ] {
        let to = bring(app, &runner, lease, (kind, 1), &data).await.unwrap();
        assert_eq!(to, Destination::Quarantine, "{kind:?}");
    }
    assert_eq!(fixture.run(&run).await.state, RunState::Errored);
    assert_eq!(app.logs.read(run.id, Phase::Apply, 0, 4096).await.unwrap(), log_before);
    assert_eq!(current_state(&fixture).await, state("l", 6));
    let view = app.show_run(owner, run.id).await.unwrap();
    assert_eq!((view.plan_facts.quarantined, view.apply_facts.quarantined), (0, 3));

    let kept = only(&fixture, Kind::State).await;
    assert_eq!(kept.summary, "serial 7 continues the current 6 of the same lineage");
    assert_eq!(only(&fixture, Kind::Result).await.summary, "says that the apply ended well");
    let record = &kept.record;
    assert_eq!((record.run.0, record.epoch, record.generation), (run.id, lease.epoch.get(), 1));
    assert_eq!((record.runner.0, record.size), (runner.id, state("l", 7).len() as u64));

    let accepted = accept(&fixture, record.id.0, false).await.unwrap();
    assert_eq!(accepted, StateFacts { lineage: "l".into(), serial: 7 });
    assert_eq!(current_state(&fixture).await, state("l", 7));
    assert_eq!(accept(&fixture, record.id.0, false).await.unwrap(), accepted);
    let kept = only(&fixture, Kind::State).await;
    assert_eq!(kept.summary, "equal to the current, serial 7; it was accepted");

    assert_eq!(fixture.run(&next).await.state, RunState::Pending, "it does not unfreeze");
    app.unfreeze_environment(owner, ORGANIZATION, ENVIRONMENT, run.id).await.unwrap();
    assert_eq!(fixture.run(&next).await.state, RunState::PlanQueued);
}

#[tokio::test]
async fn of_the_snapshots_of_one_lease_the_newest_is_kept_in_whatever_order_they_come() {
    let (fixture, run, runner, lease) = given_up().await;
    let app = &fixture.app;
    for (sequence, serial) in [(1, 7), (3, 9), (2, 8)] {
        let data = state("l", serial);
        bring(app, &runner, lease, (Made::State, sequence), &data).await.unwrap();
    }
    let kept = listed(&fixture, Some(run.id)).await;
    assert_eq!(kept.len(), 1);
    assert_eq!(kept[0].record.state.as_ref().unwrap().serial, 9);
    app.collect_garbage().await.unwrap();
    let exists = |serial| {
        let digest = sha256(&state("l", serial));
        app.blobs.exists(runner.organization, digest)
    };
    assert!(exists(9).await.unwrap());
    assert!(!exists(7).await.unwrap() && !exists(8).await.unwrap());
}

#[tokio::test]
async fn whoever_never_held_the_lease_brings_nothing() {
    let (fixture, run, runner, lease) = given_up().await;
    let other = fixture.enrolled(77).await;
    let foreign = RunnerIdentity {
        organization: latchkey_domain::id::OrganizationId::from_bytes([66; 16]),
        ..runner.clone()
    };
    let older = LeaseRef { generation: Generation::new(0), ..lease };
    for (runner, lease) in [
        (&other, lease),
        (&foreign, lease),
        (&foreign, older),
        // Nothing was ever restored: there is no generation before this one.
        (&runner, LeaseRef { epoch: Epoch::new(9), ..older }),
        (&other, older),
        (&runner, LeaseRef { epoch: Epoch::new(9), ..lease }),
    ] {
        let error = bring(&fixture.app, runner, lease, (Made::Log, 0), b"x").await.unwrap_err();
        assert_eq!(error.reason(), Reason::LeaseLost, "{lease:?}");
    }
    // Only a newer history than this one has granted that.
    let newer = LeaseRef { generation: Generation::new(2), ..lease };
    let error = bring(&fixture.app, &runner, newer, (Made::Log, 0), b"x").await.unwrap_err();
    assert_eq!(error.reason(), Reason::HistoryLost);
    assert!(listed(&fixture, Some(run.id)).await.is_empty());
}

#[tokio::test]
async fn a_current_lease_has_no_use_for_quarantine() {
    let (fixture, _, runner, lease) = applying().await;
    for kind in [Made::Log, Made::Result] {
        let error = bring(&fixture.app, &runner, lease, (kind, 0), b"x").await.unwrap_err();
        assert_eq!(error.reason(), Reason::FieldInvalid);
    }
}

/// The same data in a newer generation.
async fn restored(fixture: &Fixture) -> std::sync::Arc<App> {
    let generation = crate::store::record::encode(&3);
    let batch = Batch::new().put(keys::generation(), Expect::Anything, generation);
    fixture.store.commit(batch).await.unwrap();
    fixture.restarted(None).await
}

#[tokio::test]
async fn one_thing_of_a_lease_is_not_replaced_without_end() {
    let (fixture, run, runner, lease) = given_up().await;
    let app = &fixture.app;
    let mut refused = None;
    // Each is in the audit trail.
    for round in 0..1100_u64 {
        let data = round.to_be_bytes();
        if let Err(error) = bring(app, &runner, lease, (Made::Result, 0), &data).await {
            refused = Some((round, error.reason()));
            break;
        }
    }
    assert_eq!(refused, Some((1025, Reason::LimitReached)));
    let id = listed(&fixture, Some(run.id)).await[0].record.id.0;
    app.drop_quarantined(&fixture.owner, ORGANIZATION, id).await.unwrap();
    bring(app, &runner, lease, (Made::Result, 0), b"again").await.unwrap();
}

#[tokio::test]
async fn quarantine_has_a_bound_for_a_runner_and_an_organization_and_states_are_tried_again() {
    let (fixture, _, runner, lease) = given_up().await;
    let app = &fixture.app;
    let organization = runner.organization;
    for (of, bytes) in [(Some(runner.id), 16_u64 << 30), (None, 64 << 30)] {
        let key = keys::quarantine_total(organization, 0, of);
        let full = |bytes| crate::store::record::encode(&Tally { entries: 1, bytes });
        let put = |bytes| Batch::new().put(key.clone(), Expect::Anything, full(bytes));
        fixture.store.commit(put(bytes)).await.unwrap();
        let error = bring(app, &runner, lease, (Made::Log, 0), b"x").await.unwrap_err();
        assert_eq!(error.reason(), Reason::LimitReached);
        let data = state("l", 7);
        bring(app, &runner, lease, (Made::State, 1), &data).await.unwrap();
        fixture.store.commit(put(2 * bytes)).await.unwrap();
        let error = bring(app, &runner, lease, (Made::StateDump, 0), &data).await.unwrap_err();
        assert_eq!(error.reason(), Reason::StoreUnavailable, "its runner keeps it");
        fixture.store.commit(put(0)).await.unwrap();
    }
    bring(app, &runner, lease, (Made::Log, 0), b"x").await.unwrap();
}

/// How full the organization's quarantine is said to be.
async fn say_full(fixture: &Fixture, runner: &RunnerIdentity, tally: Tally) {
    let key = keys::quarantine_total(runner.organization, 0, None);
    let batch = Batch::new().put(key, Expect::Anything, crate::store::record::encode(&tally));
    fixture.store.commit(batch).await.unwrap();
}

async fn audited(fixture: &Fixture, action: &str) -> usize {
    let page = PageRequest { size: 200, ..PageRequest::default() };
    let records =
        fixture.app.list_audit(&fixture.owner, ORGANIZATION, AuditFilter::default(), page).await;
    let records = records.unwrap().items;
    records.iter().filter(|record| record.draft.action == action).count()
}

#[tokio::test]
async fn in_a_full_quarantine_the_oldest_that_is_no_state_gives_way() {
    for full in [Tally { entries: 10_000, bytes: 9 }, Tally { entries: 9, bytes: (128 << 30) - 2 }]
    {
        let (fixture, _, runner, lease) = given_up().await;
        let app = &fixture.app;
        bring(app, &runner, lease, (Made::State, 1), &state("l", 7)).await.unwrap();
        bring(app, &runner, lease, (Made::Result, 0), b"result").await.unwrap();
        bring(app, &runner, lease, (Made::Log, 0), &[b'x'; 512]).await.unwrap();
        bring(app, &runner, lease, (Made::StateDump, 0), b"dump").await.unwrap();
        say_full(&fixture, &runner, full).await;
        bring(app, &runner, lease, (Made::ErroredState, 0), &state("l", 8)).await.unwrap();
        let mut kinds: Vec<_> =
            listed(&fixture, None).await.into_iter().map(|view| view.record.kind).collect();
        kinds.reverse();
        let kept = [Kind::State, Kind::Result, Kind::StateDump, Kind::ErroredState];
        assert_eq!(kinds, kept, "{full:?}");
        assert_eq!(audited(&fixture, "quarantine_gave_way").await, 1);
        assert_eq!(audited(&fixture, "quarantine_full").await, 0);
    }
}

#[tokio::test]
async fn something_bulky_displaces_no_more_than_its_own_size_and_one_entry() {
    const BULKY: u64 = 64 << 30;
    let (fixture, _, runner, lease) = given_up().await;
    let app = &fixture.app;
    bring(app, &runner, lease, (Made::Log, 0), &[b'x'; 512]).await.unwrap();
    bring(app, &runner, lease, (Made::Workspace, 0), &[b'y'; 512]).await.unwrap();
    // States have taken a byte of what is for bulky things; or there is an entry too many.
    for full in [
        Tally { entries: 9, bytes: BULKY + 1 },
        Tally { entries: 10_001, bytes: 1024 },
        Tally { entries: 10_000, bytes: BULKY + 1 },
    ] {
        say_full(&fixture, &runner, full).await;
        let error = bring(app, &runner, lease, (Made::Changes, 0), b"changes").await.unwrap_err();
        assert_eq!(error.reason(), Reason::LimitReached, "its runner keeps it: {full:?}");
        assert_eq!(audited(&fixture, "quarantine_gave_way").await, 0, "{full:?}");
    }
    say_full(&fixture, &runner, Tally { entries: 10_000, bytes: BULKY }).await;
    bring(app, &runner, lease, (Made::Changes, 0), b"changes").await.unwrap();
    assert_eq!(audited(&fixture, "quarantine_gave_way").await, 1);
}

/// Keeps as many more logs of other epochs as the one that is there.
async fn many_logs(fixture: &Fixture, organization: OrganizationId, count: u8) {
    let template = only(fixture, Kind::Log).await.record;
    let mut batch = Batch::new();
    for number in 0..count {
        let (id, epoch) = (QuarantinedId::from_bytes([number; 16]), 100 + u64::from(number));
        let record = encode(&Quarantined { id: Text(id), epoch, ..template.clone() });
        batch = batch.put(keys::quarantined(organization, id), Expect::Absent, record);
    }
    fixture.store.commit(batch).await.unwrap();
}

#[tokio::test]
async fn to_something_bulky_few_things_give_way_and_to_a_state_as_many_as_it_takes() {
    let (fixture, _, runner, lease) = given_up().await;
    let app = &fixture.app;
    bring(app, &runner, lease, (Made::Log, 0), b"x").await.unwrap();
    many_logs(&fixture, runner.organization, 100).await;
    say_full(&fixture, &runner, Tally { entries: 101, bytes: 64 << 30 }).await;
    let error = bring(app, &runner, lease, (Made::Changes, 0), &[b'x'; 80]).await.unwrap_err();
    assert_eq!(error.reason(), Reason::LimitReached);
    assert_eq!(audited(&fixture, "quarantine_gave_way").await, 0);
    let state = state("l", 8);
    let full = (128 << 30) + 80 - state.len() as u64;
    say_full(&fixture, &runner, Tally { entries: 101, bytes: full }).await;
    bring(app, &runner, lease, (Made::State, 1), &state).await.unwrap();
    assert_eq!(audited(&fixture, "quarantine_gave_way").await, 80);
}

#[tokio::test]
async fn no_state_is_dropped_for_another_and_the_one_refused_is_told_once() {
    let (fixture, _, runner, lease) = given_up().await;
    let app = &fixture.app;
    bring(app, &runner, lease, (Made::State, 1), &state("l", 7)).await.unwrap();
    bring(app, &runner, lease, (Made::Log, 0), b"log").await.unwrap();
    // More than the log takes.
    say_full(&fixture, &runner, Tally { entries: 9, bytes: 128 << 30 }).await;
    for _ in 0..3 {
        let error = bring(app, &runner, lease, (Made::StateDump, 0), &state("l", 8)).await;
        let error = error.unwrap_err();
        assert_eq!(error.reason(), Reason::StoreUnavailable, "its runner keeps it");
        assert!(error.message().contains("latchkey quarantine drop"), "{error}");
    }
    assert_eq!(audited(&fixture, "quarantine_full").await, 1);
    // What would not have been enough did not go either.
    assert_eq!(listed(&fixture, None).await.len(), 2);
    let id = only(&fixture, Kind::Log).await.record.id.0;
    app.drop_quarantined(&fixture.owner, ORGANIZATION, id).await.unwrap();
    say_full(&fixture, &runner, Tally { entries: 9, bytes: 0 }).await;
    bring(app, &runner, lease, (Made::StateDump, 0), &state("l", 8)).await.unwrap();
}

#[tokio::test]
async fn after_a_restore_a_runners_word_is_taken_within_bounds() {
    let (fixture, _, runner, lease) = given_up().await;
    let app = &restored(&fixture).await;
    let of = |run: u8, epoch| LeaseRef {
        job: latchkey_domain::id::JobId { run: RunId::from_bytes([run; 16]), phase: Phase::Apply },
        epoch: Epoch::new(epoch),
        generation: Generation::FIRST,
    };
    let later = state("l", 9);
    bring(app, &runner, of(100, 1), (Made::State, 1), &later).await.unwrap();
    let kept = only(&fixture, Kind::State).await;
    for part in ["its run is not known here", "on this runner's word alone"] {
        assert!(kept.summary.contains(part), "{}", kept.summary);
    }
    let never = LeaseRef { generation: Generation::new(0), ..of(100, 2) };
    let error = bring(app, &runner, never, (Made::Log, 0), b"x").await.unwrap_err();
    assert_eq!(error.reason(), Reason::LeaseLost);
    // A run that is known, at an epoch that is not.
    let unknown_epoch = LeaseRef { epoch: Epoch::new(40), ..lease };
    bring(app, &runner, unknown_epoch, (Made::Log, 0), b"x").await.unwrap();

    for epoch in 2..=16 {
        bring(app, &runner, of(100, epoch), (Made::Log, 0), b"x").await.unwrap();
    }
    let error = bring(app, &runner, of(100, 17), (Made::Log, 0), b"x").await.unwrap_err();
    assert_eq!(error.reason(), Reason::LimitReached);
    // Nor does it take the place of who really held the job.
    let holder = fixture.enrolled(6).await;
    bring(app, &holder, of(100, 1), (Made::State, 1), &state("l", 8)).await.unwrap();
    bring(app, &runner, lease, (Made::State, 1), &state("l", 7)).await.unwrap();
    let of_holder = listed(&fixture, Some(lease.job.run)).await;
    let of_holder = of_holder.iter().find(|view| view.record.kind == Kind::State).unwrap();
    assert!(!of_holder.summary.contains("word alone"), "{}", of_holder.summary);
    for run in 101..=162 {
        bring(app, &runner, of(run, 1), (Made::Log, 0), b"x").await.unwrap();
    }
    let error = bring(app, &runner, of(163, 1), (Made::Log, 0), b"x").await.unwrap_err();
    assert_eq!(error.reason(), Reason::LimitReached);
    let another = fixture.enrolled(5).await;
    bring(app, &another, of(163, 1), (Made::Log, 0), b"x").await.unwrap();

    // What is dropped makes room.
    let owner = &fixture.owner;
    let dropped = listed(&fixture, Some(RunId::from_bytes([101; 16]))).await[0].record.id.0;
    app.drop_quarantined(owner, ORGANIZATION, dropped).await.unwrap();
    bring(app, &runner, of(164, 1), (Made::Log, 0), b"x").await.unwrap();

    assert_eq!(accept(&fixture, kept.record.id.0, false).await.unwrap().serial, 9);
    assert_eq!(current_state(&fixture).await, later);
}

#[tokio::test]
async fn pages_are_newest_first_and_complete() {
    let (fixture, run, runner, lease) = given_up().await;
    for kind in [Made::Log, Made::State, Made::Result] {
        bring(&fixture.app, &runner, lease, (kind, 1), &state("l", 7)).await.unwrap();
    }
    for filter in [None, Some(run.id)] {
        let all = listed(&fixture, filter).await;
        let kinds: Vec<_> = all.iter().map(|view| view.record.kind).collect();
        assert_eq!(kinds, [Kind::Result, Kind::State, Kind::Log]);
        let (mut token, mut seen) = (String::new(), vec![]);
        loop {
            let page = PageRequest { size: 1, token };
            let (app, owner) = (&fixture.app, &fixture.owner);
            let page = app.list_quarantined(owner, ORGANIZATION, filter, page).await.unwrap();
            seen.extend(page.items.into_iter().map(|view| view.record.kind));
            let Some(next) = page.next else { break };
            token = next;
        }
        assert_eq!(seen, kinds);
    }
}

#[tokio::test]
async fn an_older_state_is_taken_when_asked_for_and_under_the_next_serial() {
    let (fixture, _, runner, lease) = given_up().await;
    bring(&fixture.app, &runner, lease, (Made::State, 1), &state("l", 4)).await.unwrap();
    let kept = only(&fixture, Kind::State).await;
    assert_eq!(kept.summary, "serial 4 is older than the current 6 of the same lineage");
    let error = accept(&fixture, kept.record.id.0, false).await.unwrap_err();
    assert_eq!(error.reason(), Reason::WrongState);
    assert_eq!(accept(&fixture, kept.record.id.0, true).await.unwrap().serial, 7);
    assert_eq!(current_state(&fixture).await, state("l", 7));
    assert_eq!(accept(&fixture, kept.record.id.0, true).await.unwrap().serial, 7, "a repeat");
}

#[tokio::test]
async fn a_state_of_another_lineage_is_never_taken() {
    let (fixture, _, runner, lease) = given_up().await;
    bring(&fixture.app, &runner, lease, (Made::ErroredState, 0), &state("m", 9)).await.unwrap();
    let kept = only(&fixture, Kind::ErroredState).await;
    assert_eq!(kept.summary, "serial 9 of another lineage than the current 6");
    for older in [false, true] {
        let error = accept(&fixture, kept.record.id.0, older).await.unwrap_err();
        assert_eq!(error.reason(), Reason::WrongState);
    }
}

#[tokio::test]
async fn a_state_is_taken_only_where_no_run_can_write_one() {
    let (fixture, run, runner, lease) = given_up().await;
    bring(&fixture.app, &runner, lease, (Made::State, 1), &state("l", 7)).await.unwrap();
    let kept = only(&fixture, Kind::State).await.record.id.0;
    let (app, owner) = (&fixture.app, &fixture.owner);
    app.unfreeze_environment(owner, ORGANIZATION, ENVIRONMENT, run.id).await.unwrap();
    let next = fixture.queue("next").await;
    assert_eq!(next.state, RunState::PlanQueued);
    assert_eq!(accept(&fixture, kept, false).await.unwrap_err().reason(), Reason::WrongState);
    app.cancel_run(owner, next.id).await.unwrap();
    accept(&fixture, kept, false).await.unwrap();
}

#[tokio::test]
async fn a_state_is_not_taken_while_a_lost_run_may_still_write_one() {
    let (fixture, run, runner, lease) = applying().await;
    let app = &fixture.app;
    bring(app, &runner, lease, (Made::ErroredState, 0), &state("l", 7)).await.unwrap();
    let kept = only(&fixture, Kind::ErroredState).await.record.id.0;
    app.expire(lease.job, lease.epoch).await.unwrap();
    assert_eq!(fixture.run(&run).await.state, RunState::Lost);
    let refused = accept(&fixture, kept, false).await.unwrap_err();
    assert_eq!(refused.reason(), Reason::WrongState);
    assert!(refused.message().contains("not given up"), "{refused}");
    app.discard_run(&fixture.owner, run.id).await.unwrap();
    accept(&fixture, kept, false).await.unwrap();
}

#[tokio::test]
async fn another_state_of_the_same_serial_does_not_take_the_newests_place() {
    let (fixture, _, runner, lease) = applying().await;
    let other = String::from_utf8(state("l", 6)).unwrap().replace("1.0", "2.0");
    let refused = bring(&fixture.app, &runner, lease, (Made::State, 1), other.as_bytes()).await;
    assert_eq!(refused.unwrap_err().reason(), Reason::WrongState);
    assert_eq!(current_state(&fixture).await, state("l", 6));
    // What is the newest already may come again.
    fixture.upload(&runner, lease, Made::State, &state("l", 6)).await.unwrap();
}

#[tokio::test]
async fn only_owners_in_person_read_accept_and_drop_and_every_one_is_recorded() {
    let (fixture, _, runner, lease) = given_up().await;
    let (app, owner) = (&fixture.app, &fixture.owner);
    bring(app, &runner, lease, (Made::State, 1), &state("l", 7)).await.unwrap();
    let id = only(&fixture, Kind::State).await.record.id.0;
    let token = app
        .create_service_token(owner, ORGANIZATION, "ci", None, TokenScope::default(), "make-ci")
        .await;
    let service = app.caller(&token.unwrap().0).await.unwrap();
    for (caller, reason) in
        [(member(&fixture).await, Reason::NotAllowed), (service, Reason::PersonRequired)]
    {
        let list = |run| app.list_quarantined(&caller, ORGANIZATION, run, PageRequest::default());
        assert_eq!(list(Some(lease.job.run)).await.unwrap().items.len(), 1);
        assert_eq!(list(None).await.unwrap_err().reason(), reason);
        let read = app.read_quarantined(&caller, ORGANIZATION, id).await;
        assert_eq!(read.map(drop).unwrap_err().reason(), reason);
        let accepted = app.accept_state(&caller, ORGANIZATION, id, ENVIRONMENT, false).await;
        assert_eq!(accepted.unwrap_err().reason(), reason);
        let dropped = app.drop_quarantined(&caller, ORGANIZATION, id).await;
        assert_eq!(dropped.unwrap_err().reason(), reason);
    }
    let misnamed = app.accept_state(owner, ORGANIZATION, id, "wbe", false).await.unwrap_err();
    assert_eq!(misnamed.field_name(), Some("environment_confirmation"));

    let mut reader = app.read_quarantined(owner, ORGANIZATION, id).await.unwrap();
    assert_eq!(reader.next().await.unwrap().unwrap(), state("l", 7));
    accept(&fixture, id, false).await.unwrap();
    app.drop_quarantined(owner, ORGANIZATION, id).await.unwrap();
    app.drop_quarantined(owner, ORGANIZATION, id).await.unwrap();
    let page = PageRequest { size: 200, token: String::new() };
    let records =
        app.list_audit(owner, ORGANIZATION, AuditFilter::default(), page).await.unwrap().items;
    for action in ["quarantine", "read_quarantined", "accept_state", "drop_quarantined"] {
        let told = records.iter().filter(|record| record.draft.action == action);
        assert_eq!(told.count(), 1, "{action}");
    }
}

#[tokio::test]
async fn what_is_in_quarantine_or_accepted_is_kept_and_what_is_dropped_is_deleted() {
    let (fixture, _, runner, lease) = given_up().await;
    let (app, owner) = (&fixture.app, &fixture.owner);
    bring(app, &runner, lease, (Made::State, 1), &state("l", 7)).await.unwrap();
    bring(app, &runner, lease, (Made::Workspace, 0), b"made").await.unwrap();
    let exists = |data: Vec<u8>| app.blobs.exists(runner.organization, sha256(&data));
    // The run's own workspace had the same content, and went with the run.
    app.collect_garbage().await.unwrap();
    assert!(exists(b"made".to_vec()).await.unwrap());
    let id = only(&fixture, Kind::Workspace).await.record.id.0;
    app.drop_quarantined(owner, ORGANIZATION, id).await.unwrap();
    app.collect_garbage().await.unwrap();
    assert!(!exists(b"made".to_vec()).await.unwrap());

    let id = only(&fixture, Kind::State).await.record.id.0;
    accept(&fixture, id, false).await.unwrap();
    app.drop_quarantined(owner, ORGANIZATION, id).await.unwrap();
    app.collect_garbage().await.unwrap();
    assert_eq!(current_state(&fixture).await, state("l", 7));
}

#[tokio::test]
async fn dropping_what_a_run_in_progress_made_as_well_takes_nothing_from_it() {
    let fixture = Fixture::new(MfaPolicy::Never).await;
    let run = fixture.queue("first").await;
    let (runner, old, _) = fixture.start(&run, Phase::Plan).await;
    fixture.app.expire(old.job, old.epoch).await.unwrap();
    let run = fixture.plan(&run).await;
    let app = &fixture.app;
    bring(app, &runner, old, (Made::Workspace, 0), b"made").await.unwrap();
    let id = only(&fixture, Kind::Workspace).await.record.id.0;
    app.drop_quarantined(&fixture.owner, ORGANIZATION, id).await.unwrap();
    app.collect_garbage().await.unwrap();
    let workspace = run.planned.unwrap().digests.workspace;
    assert!(app.blobs.exists(runner.organization, workspace).await.unwrap());
    app.discard_run(&fixture.owner, run.id).await.unwrap();
    app.collect_garbage().await.unwrap();
    assert!(!app.blobs.exists(runner.organization, workspace).await.unwrap());
}

#[tokio::test]
async fn a_state_that_could_not_be_delivered_freezes_whatever_the_runner_calls_its_end() {
    for (kind, result) in [
        (Made::ErroredState, JobResult::Failed { kind: FailureKind::Errored, reason: "1".into() }),
        (Made::StateDump, JobResult::Applied { outputs: None }),
    ] {
        let (fixture, run, runner, lease) = applying().await;
        let to = bring(&fixture.app, &runner, lease, (kind, 0), &state("l", 7)).await.unwrap();
        assert_eq!(to, Destination::Quarantine);
        fixture.app.finish_job(&runner, lease, 0, result).await.unwrap();
        assert_eq!(fixture.run(&run).await.state, RunState::Errored);
        assert_eq!(hold(&fixture).await.frozen.unwrap().run, run.id);
        let id = listed(&fixture, None).await[0].record.id.0;
        accept(&fixture, id, false).await.unwrap();
        assert_eq!(current_state(&fixture).await, state("l", 7));
    }
}

#[tokio::test]
async fn a_dump_that_is_no_state_is_kept_to_be_read_and_never_accepted() {
    let (fixture, _, runner, lease) = applying().await;
    let data = b"Error: Failed to persist state\n{\"serial\":";
    bring(&fixture.app, &runner, lease, (Made::StateDump, 0), data).await.unwrap();
    let kept = only(&fixture, Kind::StateDump).await;
    assert_eq!(kept.summary, "it cannot be read as a Terraform state");
    let error = accept(&fixture, kept.record.id.0, true).await.unwrap_err();
    assert_eq!(error.reason(), Reason::WrongState);
}

#[tokio::test]
async fn what_is_refused_at_its_end_leaves_no_blob_but_what_others_need() {
    let (fixture, _, runner, lease) = applying().await;
    let (app, other) = (&fixture.app, state("other", 9));
    let refused = bring(app, &runner, lease, (Made::State, 1), &other).await.unwrap_err();
    assert_eq!(refused.reason(), Reason::WrongState);
    app.collect_garbage().await.unwrap();
    assert!(!app.blobs.exists(runner.organization, sha256(&other)).await.unwrap());

    fixture.upload(&runner, lease, Made::State, &state("l", 7)).await.unwrap();
    let refused = bring(app, &runner, lease, (Made::State, 1), &state("l", 6)).await.unwrap_err();
    assert_eq!(refused.reason(), Reason::WrongState);
    app.collect_garbage().await.unwrap();
    let earlier = sha256(&state("l", 6));
    assert!(app.blobs.exists(runner.organization, earlier).await.unwrap(), "a state version");
}

#[tokio::test]
async fn a_lost_apply_says_what_is_known_and_ends_well_by_its_late_result() {
    let (fixture, run, runner, lease) = applying().await;
    let (app, owner) = (&fixture.app, &fixture.owner);
    let appender = app.append_log(&runner, lease).await.unwrap();
    let piece = |offset, data: &[u8]| vec![Piece { offset, data: data.to_vec() }];
    appender.append(piece(0, b"one\n")).await.unwrap();
    app.expire(lease.job, lease.epoch).await.unwrap();
    let lost = app.show_run(owner, run.id).await.unwrap();
    let reason = lost.run.reason.unwrap();
    for part in ["went silent", "quarantine list", "latchkey discard"] {
        assert!(reason.contains(part), "{reason}");
    }
    // A result that waited on the host while the connection was cut.
    appender.append(piece(4, b"two\n")).await.unwrap();
    fixture.upload(&runner, lease, Made::State, &state("l", 7)).await.unwrap();
    app.finish_job(&runner, lease, 8, JobResult::Applied { outputs: None }).await.unwrap();
    assert_eq!(fixture.run(&run).await.state, RunState::Applied);
    assert_eq!(hold(&fixture).await, Hold::default());
    assert_eq!(app.logs.read(run.id, Phase::Apply, 0, 64).await.unwrap(), b"one\ntwo\n");
}

#[tokio::test]
async fn a_forced_cancel_waits_for_the_grace_and_withdraws_the_credentials() {
    let (fixture, run, runner, lease) = applying().await;
    let (app, owner) = (&fixture.app, &fixture.owner);
    let force = || app.force_cancel_run(owner, run.id);
    assert_eq!(force().await.unwrap_err().reason(), Reason::CancelGrace);
    app.cancel_run(owner, run.id).await.unwrap();
    let early = force().await.unwrap_err();
    assert_eq!(early.reason(), Reason::CancelGrace);
    assert!(early.metadata().iter().any(|(key, _)| *key == "retry_at"), "{early:?}");
    // A graceful cancel leaves the endpoint be: terraform needs it for its last state.
    assert!(matches!(app.start_again(&runner, lease).await.unwrap(), Start::Go(_)));
    let view = app.show_run(owner, run.id).await.unwrap();
    assert_eq!(view.force_cancel_time, Some(app.now() + Duration::from_secs(30)));

    fixture.clock.advance(Duration::from_secs(30));
    let bob = member(&fixture).await;
    let error = app.force_cancel_run(&bob, run.id).await.unwrap_err();
    assert_eq!(error.reason(), Reason::NotAllowed);
    let forced = force().await.unwrap();
    assert_eq!((forced.state, forced.forced_by.as_deref()), (RunState::Applying, Some("ada")));
    force().await.unwrap();
    let session = crate::store::keys::session(run.id, Phase::Apply);
    assert!(fixture.store.fetch(&session).await.unwrap().is_none());
    assert!(matches!(app.start_again(&runner, lease).await.unwrap(), Start::Forced));
    assert!(matches!(app.start_job(&runner, lease).await.unwrap(), Start::Forced));
    assert_eq!(
        app.take_up(&runner, lease).await.unwrap(),
        Held::KeepCanceled { stop: Stop::ByForce }
    );

    let killed = JobResult::Failed { kind: FailureKind::Canceled, reason: "signal 9".into() };
    app.finish_job(&runner, lease, 0, killed).await.unwrap();
    assert_eq!(fixture.run(&run).await.state, RunState::Canceled);
    assert!(hold(&fixture).await.frozen.unwrap().reason.contains("signal 9"));
}

#[tokio::test]
async fn a_forced_cancel_of_a_silent_runners_run_ends_nothing_and_is_told_when_it_returns() {
    let (fixture, run, runner, lease) = applying().await;
    let (app, owner) = (&fixture.app, &fixture.owner);
    app.cancel_run(owner, run.id).await.unwrap();
    app.expire(lease.job, lease.epoch).await.unwrap();
    fixture.clock.advance(Duration::from_secs(60));
    let forced = app.force_cancel_run(owner, run.id).await.unwrap();
    assert_eq!(forced.state, RunState::Lost);
    assert!(forced.reason.unwrap().contains("when it comes back"));
    assert!(hold(&fixture).await.frozen.is_some());
    assert_eq!(
        app.take_up(&runner, lease).await.unwrap(),
        Held::KeepCanceled { stop: Stop::ByForce }
    );
    assert_eq!(fixture.run(&run).await.state, RunState::Applying);
}

#[tokio::test]
async fn a_lost_run_that_nobody_canceled_is_not_killed() {
    let (fixture, run, _, lease) = applying().await;
    fixture.app.expire(lease.job, lease.epoch).await.unwrap();
    let error = fixture.app.force_cancel_run(&fixture.owner, run.id).await.unwrap_err();
    assert_eq!(error.reason(), Reason::CancelGrace);
    assert!(error.message().contains("without force"));
}

#[tokio::test]
async fn a_plan_reads_the_state_of_its_lease_whatever_is_written_meanwhile() {
    let (fixture, _, runner, apply) = applying().await;
    let new = NewRun {
        organization: ORGANIZATION.into(),
        environment: ENVIRONMENT.into(),
        configuration: latchkey_domain::id::Digest::from_bytes([1; 32]),
        kind: RunKind::PlanOnly,
        message: String::new(),
        target: vec![],
        replace: vec![],
        auto_apply: None,
        destroy_confirmation: String::new(),
        variables: vec![],
        request_id: "beside".into(),
    };
    let beside = fixture.app.queue_run(&fixture.owner, new).await.unwrap();
    assert_eq!(beside.state, RunState::PlanQueued);
    let (planner, plan, _) = fixture.start(&beside, Phase::Plan).await;
    fixture.upload(&runner, apply, Made::State, &state("l", 7)).await.unwrap();
    let read = async |runner, lease| {
        let mut reader = fixture.app.fetch_artifact(runner, lease, Needed::State).await.unwrap();
        reader.next().await.unwrap().unwrap()
    };
    assert_eq!(read(&planner, plan).await, state("l", 6));
    assert_eq!(read(&runner, apply).await, state("l", 7));
}
