//! Who may do what with states, what is refused, and what keeps runs and workstations apart.

use std::time::Duration;

use latchkey_domain::environment::Hold;
use latchkey_domain::policy::{MfaPolicy, Phase};
use latchkey_domain::run::{Run, RunState};
use latchkey_proto::v1::Reason;

use super::StateVersionView;
use super::push::{Sending, StateUpload};
use crate::app::PageRequest;
use crate::app::artifacts::Made;
use crate::app::audit_trail::AuditFilter;
use crate::app::fixture::{ENVIRONMENT, Fixture, ORGANIZATION};
use crate::app::service_tokens::TokenScope;
use crate::app::settings::SettingsChange;
use crate::app::state_lock::{LockAnswer, LockRequest};
use crate::auth::Caller;
use crate::error::Result;
use crate::store::record::environment::StateOrigin;
use crate::store::record::people::{Access, Role};
use crate::store::{Batch, Expect, keys};

const ENV: (&str, &str) = (ORGANIZATION, ENVIRONMENT);

fn state(lineage: &str, serial: u64) -> Vec<u8> {
    marked(lineage, serial, "v")
}

fn marked(lineage: &str, serial: u64, value: &str) -> Vec<u8> {
    format!(
        r#"{{"version":4,"serial":{serial},"lineage":"{lineage}","outputs":{{"n":{{"value":"{value}"}}}},"resources":[]}}"#
    )
    .into_bytes()
}

async fn send(
    fixture: &Fixture,
    caller: &Caller,
    sending: Sending,
    data: &[u8],
) -> Result<StateVersionView> {
    let mut upload = begin(fixture, caller, ENV, sending).await?;
    upload.write(data).await?;
    upload.finish().await
}

async fn begin(
    fixture: &Fixture,
    caller: &Caller,
    (organization, environment): (&str, &str),
    sending: Sending,
) -> Result<StateUpload> {
    let proof = fixture.prove(caller).await;
    fixture.app.send_state(&proof, organization, environment, sending).await
}

async fn import(fixture: &Fixture, data: &[u8]) -> Result<StateVersionView> {
    send(fixture, &fixture.owner, Sending::Import, data).await
}

async fn push(fixture: &Fixture, lock: &str, data: &[u8]) -> Result<StateVersionView> {
    send(fixture, &fixture.owner, Sending::Push { lock: lock.into() }, data).await
}

async fn lock(fixture: &Fixture, caller: &Caller, id: &str) -> Result<LockAnswer> {
    let request = LockRequest {
        id: id.into(),
        operation: "OperationTypeApply".into(),
        workstation: "ada@desk\u{1b}[2J".into(),
        ..LockRequest::default()
    };
    fixture.app.lock_state(caller, ENV.0, ENV.1, request).await
}

async fn unlock(fixture: &Fixture, id: &str) -> LockAnswer {
    fixture.app.unlock_state(&fixture.owner, ENV.0, ENV.1, id).await.unwrap()
}

async fn rollback(fixture: &Fixture, number: u64, typed: &str) -> Result<StateVersionView> {
    fixture.app.rollback_state(&fixture.owner, ENV.0, ENV.1, number, typed).await
}

async fn listed(fixture: &Fixture, page: PageRequest) -> (Vec<StateVersionView>, Option<String>) {
    let (page, _) =
        fixture.app.list_state_versions(&fixture.owner, ENV.0, ENV.1, page).await.unwrap();
    (page.items, page.next)
}

async fn content(fixture: &Fixture, number: u64) -> String {
    let read = fixture.app.read_state_version(&fixture.owner, ENV.0, ENV.1, number).await;
    let mut reader = read.unwrap();
    let mut bytes = vec![];
    while let Some(part) = reader.next().await.unwrap() {
        bytes.extend(part);
    }
    String::from_utf8(bytes).unwrap()
}

async fn hold(fixture: &Fixture) -> Hold {
    let view = fixture.app.show_environment(&fixture.owner, ENV.0, ENV.1).await;
    view.unwrap().environment.hold
}

async fn member(fixture: &Fixture, name: &str, access: Access) -> Caller {
    let (app, owner) = (&fixture.app, &fixture.owner);
    let made = app.create_user(owner, ORGANIZATION, name, Role::Member, access, name).await;
    app.caller(&made.unwrap()).await.unwrap()
}

/// A run that applies.
async fn applying(fixture: &Fixture) -> Run {
    let run = fixture.queue("first").await;
    let run = fixture.plan(&run).await;
    let seen = run.planned.as_ref().unwrap().digest;
    fixture.app.confirm_run(&fixture.owner, run.id, seen).await.unwrap()
}

async fn audited(fixture: &Fixture, action: &str) -> usize {
    let page = PageRequest { size: 200, ..PageRequest::default() };
    let page = fixture
        .app
        .list_audit(&fixture.owner, ORGANIZATION, AuditFilter::default(), page)
        .await
        .unwrap();
    page.items.iter().filter(|record| record.draft.action == action).count()
}

#[track_caller]
fn refused<T: std::fmt::Debug>(answer: Result<T>, reason: Reason, says: &str) {
    let error = answer.unwrap_err();
    assert_eq!(error.reason(), reason, "{error}");
    assert!(error.message().contains(says), "{error}");
}

#[tokio::test]
async fn versions_tell_who_made_them_and_how() {
    let fixture = Fixture::new(MfaPolicy::Never).await;
    let run = applying(&fixture).await;
    let (runner, lease, _) = fixture.start(&run, Phase::Apply).await;
    fixture.upload(&runner, lease, Made::State, &state("l", 1)).await.unwrap();
    let result = crate::app::finish_job::JobResult::Applied { outputs: None };
    fixture.app.finish_job(&runner, lease, 0, result).await.unwrap();
    assert!(matches!(lock(&fixture, &fixture.owner, "id-1").await.unwrap(), LockAnswer::Done));
    push(&fixture, "id-1", &state("l", 2)).await.unwrap();
    assert_eq!(unlock(&fixture, "id-1").await, LockAnswer::Done);
    import(&fixture, &state("l", 9)).await.unwrap();
    rollback(&fixture, 1, ENVIRONMENT).await.unwrap();

    let (all, next) = listed(&fixture, PageRequest::default()).await;
    let told: Vec<_> = all
        .iter()
        .map(|view| {
            let version = &view.version;
            let run = version.run.map(|run| run.0);
            (view.number, version.serial, version.origin, version.user.as_str(), run)
        })
        .collect();
    assert_eq!(
        told,
        [
            (4, 10, StateOrigin::Rollback(1), "ada", None),
            (3, 9, StateOrigin::Import, "ada", None),
            (2, 2, StateOrigin::Push, "ada", None),
            (1, 1, StateOrigin::Run, "", Some(run.id)),
        ]
    );
    assert_eq!(next, None);
    assert!(all[0].is_current && !all[1].is_current);
    let sizes: Vec<_> = all.iter().map(|view| view.version.size.unwrap()).collect();
    let plain = state("l", 1).len() as u64;
    assert_eq!(sizes, [plain + 1, plain, plain, plain]);
    // The content is that of then, under the next serial.
    assert_eq!(content(&fixture, 4).await.into_bytes(), state("l", 10));
    assert_eq!(content(&fixture, 0).await.into_bytes(), state("l", 10));

    let two = PageRequest { size: 3, token: String::new() };
    let (first, next) = listed(&fixture, two).await;
    assert_eq!(first.len(), 3);
    let (rest, none) = listed(&fixture, PageRequest { size: 3, token: next.unwrap() }).await;
    assert_eq!((rest.len(), rest[0].number, none), (1, 1, None));
    for (action, count) in
        [("push_state", 1), ("import_state", 1), ("rollback_state", 1), ("read_state", 2)]
    {
        assert_eq!(audited(&fixture, action).await, count, "{action}");
    }
}

#[tokio::test]
async fn records_of_before_people_made_versions_stay_readable() {
    let old = br#"{"digest":"0000000000000000000000000000000000000000000000000000000000000001","lineage":"l","serial":3,"run":"01890a5d-ac96-774b-bcce-b302099a8057","at":5}"#;
    let version: super::StateVersion = serde_json::from_slice(old).unwrap();
    assert_eq!((version.origin, version.size), (StateOrigin::Run, None));
    assert!(version.run.is_some() && version.user.is_empty());
}

#[tokio::test]
async fn a_state_of_another_line_or_of_before_is_refused_and_leaves_nothing() {
    let fixture = Fixture::new(MfaPolicy::Never).await;
    refused(rollback(&fixture, 1, ENVIRONMENT).await, Reason::NotFound, "state version");
    import(&fixture, &state("l", 5)).await.unwrap();
    let again = import(&fixture, &state("l", 5)).await.unwrap();
    assert_eq!(again.number, 1, "a repeat answers the version that it is");

    refused(import(&fixture, &state("m", 6)).await, Reason::WrongState, "another lineage");
    refused(import(&fixture, &state("l", 4)).await, Reason::WrongState, "not above the current 5");
    refused(
        import(&fixture, &marked("l", 5, "w")).await,
        Reason::WrongState,
        "not above the current 5",
    );
    refused(import(&fixture, b"{}").await, Reason::FieldInvalid, "not a Terraform state");
    let old = br#"{"version":3,"serial":9,"lineage":"l"}"#;
    refused(import(&fixture, old).await, Reason::FieldInvalid, "format version 4");
    lock(&fixture, &fixture.owner, "id").await.unwrap();
    refused(push(&fixture, "id", &state("m", 6)).await, Reason::WrongState, "another lineage");
    refused(push(&fixture, "id", &state("l", 3)).await, Reason::WrongState, "not above");
    push(&fixture, "id", &state("l", 5)).await.unwrap();
    push(&fixture, "id", &state("l", 6)).await.unwrap();
    unlock(&fixture, "id").await;

    refused(
        rollback(&fixture, 1, "wed").await,
        Reason::FieldInvalid,
        "type the environment's name",
    );
    refused(rollback(&fixture, 2, ENVIRONMENT).await, Reason::WrongState, "current one already");
    refused(rollback(&fixture, 7, ENVIRONMENT).await, Reason::NotFound, "state version");
    refused(rollback(&fixture, 0, ENVIRONMENT).await, Reason::FieldInvalid, "name the version");
    assert_eq!(listed(&fixture, PageRequest::default()).await.0.len(), 2);
}

#[tokio::test]
async fn content_is_for_persons_who_administer_and_a_listing_for_who_may_read() {
    let fixture = Fixture::new(MfaPolicy::Never).await;
    import(&fixture, &state("l", 1)).await.unwrap();
    import(&fixture, &state("l", 2)).await.unwrap();
    let app = &fixture.app;
    let scope = TokenScope { access: Access::Write, environments: vec![] };
    let (token, _) = app
        .create_service_token(&fixture.owner, ORGANIZATION, "ci", None, scope, "ci")
        .await
        .unwrap();
    let service = app.caller(&token).await.unwrap();
    let admin = member(&fixture, "ann", Access::Admin).await;
    let callers = [
        (member(&fixture, "eve", Access::None).await, Some(Reason::NotFound), Reason::NotFound),
        (member(&fixture, "bob", Access::Write).await, None, Reason::NotAllowed),
        (service, None, Reason::PersonRequired),
    ];
    for (caller, listing, content) in &callers {
        let page = PageRequest::default();
        let list = app.list_state_versions(caller, ENV.0, ENV.1, page).await;
        assert_eq!(list.err().map(|error| error.reason()), *listing, "{caller:?}");
        let show = app.show_state_version(caller, ENV.0, ENV.1, 0).await;
        assert_eq!(show.err().map(|error| error.reason()), *listing, "{caller:?}");
        let reasons = [
            app.read_state_version(caller, ENV.0, ENV.1, 1).await.err(),
            app.read_newest_state(caller, ENV.0, ENV.1).await.err(),
            app.diff_state_versions(caller, ENV.0, ENV.1, (1, 2)).await.err(),
            app.rollback_state(caller, ENV.0, ENV.1, 1, ENVIRONMENT).await.err(),
            app.force_unlock_state(caller, ENV.0, ENV.1, "id").await.err(),
            app.unlock_state(caller, ENV.0, ENV.1, "id").await.err(),
            lock(&fixture, caller, "id").await.err(),
            send(&fixture, caller, Sending::Import, &state("l", 3)).await.err(),
            send(&fixture, caller, Sending::Push { lock: "id".into() }, b"").await.err(),
        ];
        for (number, error) in reasons.into_iter().enumerate() {
            assert_eq!(error.map(|error| error.reason()), Some(*content), "{caller:?} {number}");
        }
    }
    assert!(app.read_state_version(&admin, ENV.0, ENV.1, 1).await.is_ok());
    let (diff, before, after) =
        app.diff_state_versions(&admin, ENV.0, ENV.1, (0, 0)).await.unwrap();
    assert_eq!((before.number, after.number, diff.changed), (1, 2, 0));
    refused(
        app.diff_state_versions(&admin, ENV.0, ENV.1, (0, 1)).await,
        Reason::FieldInvalid,
        "first version",
    );
}

#[tokio::test]
async fn a_run_keeps_workstations_away_and_is_named_to_them() {
    let fixture = Fixture::new(MfaPolicy::Never).await;
    import(&fixture, &state("l", 1)).await.unwrap();
    let run = applying(&fixture).await;
    let LockAnswer::Held(holder) = lock(&fixture, &fixture.owner, "id").await.unwrap() else {
        panic!("the run has the environment");
    };
    assert!(holder.id.starts_with(&format!("run {} of ada", run.id)), "{}", holder.id);
    for answer in [
        push(&fixture, "id", &state("l", 2)).await,
        import(&fixture, &state("l", 2)).await,
        rollback(&fixture, 1, ENVIRONMENT).await,
    ] {
        let error = answer.unwrap_err();
        assert_eq!(error.reason(), Reason::WrongState);
        assert!(error.metadata().iter().any(|(name, _)| *name == "holder"), "{error}");
    }
    // Its end leaves remains: frozen, for workstations too.
    let (_, lease, _) = fixture.start(&run, Phase::Apply).await;
    fixture.app.expire(lease.job, lease.epoch).await.unwrap();
    let LockAnswer::Held(holder) = lock(&fixture, &fixture.owner, "id").await.unwrap() else {
        panic!("the environment is frozen");
    };
    assert!(holder.id.contains("froze"), "{}", holder.id);
    refused(import(&fixture, &state("l", 2)).await, Reason::WrongState, "frozen");
}

#[tokio::test]
async fn a_workstation_keeps_the_next_run_waiting_and_gives_way_when_it_unlocks() {
    let fixture = Fixture::new(MfaPolicy::Never).await;
    lock(&fixture, &fixture.owner, "id").await.unwrap();
    assert_eq!(lock(&fixture, &fixture.owner, "id").await.unwrap(), LockAnswer::Done, "a repeat");
    let run = fixture.queue("first").await;
    assert_eq!(run.state, RunState::Pending);
    let why = fixture.run(&run).await.reason.unwrap();
    assert!(why.contains("ada (OperationTypeApply) works on it from ada@desk[2J"), "{why}");
    assert!(why.contains("lock id;"), "{why}");
    fixture.app.give_all_turns().await.unwrap();
    assert_eq!(fixture.run(&run).await.state, RunState::Pending);

    // Another lock of the same person, or another person with the same id.
    let other = member(&fixture, "ann", Access::Admin).await;
    assert!(matches!(lock(&fixture, &fixture.owner, "2").await.unwrap(), LockAnswer::Held(_)));
    assert!(matches!(lock(&fixture, &other, "id").await.unwrap(), LockAnswer::Held(_)));
    assert!(matches!(unlock(&fixture, "2").await, LockAnswer::Held(_)));
    let by_other = fixture.app.unlock_state(&other, ENV.0, ENV.1, "id").await.unwrap();
    assert!(matches!(by_other, LockAnswer::Held(_)));
    let push_of_other = Sending::Push { lock: "id".into() };
    let push_of_other = send(&fixture, &other, push_of_other, &state("l", 1)).await;
    refused(push_of_other, Reason::WrongState, "locked");
    refused(push(&fixture, "2", &state("l", 1)).await, Reason::WrongState, "locked");
    refused(import(&fixture, &state("l", 1)).await, Reason::WrongState, "locked");
    refused(rollback(&fixture, 1, ENVIRONMENT).await, Reason::WrongState, "locked");

    assert_eq!(unlock(&fixture, "id").await, LockAnswer::Done);
    assert_eq!(unlock(&fixture, "id").await, LockAnswer::Done, "a repeat");
    fixture.app.give_all_turns().await.unwrap();
    assert_eq!(fixture.run(&run).await.state, RunState::PlanQueued);
    assert_eq!(hold(&fixture).await.state_lock, None);
}

#[tokio::test]
async fn a_lock_left_behind_is_taken_away_by_its_id_alone() {
    let fixture = Fixture::new(MfaPolicy::Never).await;
    let admin = member(&fixture, "ann", Access::Admin).await;
    lock(&fixture, &fixture.owner, "id").await.unwrap();
    let force = |id: &'static str| fixture.app.force_unlock_state(&admin, ENV.0, ENV.1, id);
    refused(force("other").await, Reason::FieldInvalid, "lock id;");
    assert!(hold(&fixture).await.state_lock.is_some());
    force("id").await.unwrap();
    force("id").await.unwrap();
    assert_eq!(hold(&fixture).await.state_lock, None);
    assert_eq!(audited(&fixture, "force_unlock_state").await, 1);
    // Who had it writes no more.
    refused(push(&fixture, "id", &state("l", 1)).await, Reason::WrongState, "taken away");
    refused(lock(&fixture, &admin, "a b").await, Reason::FieldInvalid, "lock's id");
}

#[tokio::test]
async fn a_lock_taken_away_while_a_state_comes_lets_it_in_no_more() {
    let fixture = Fixture::new(MfaPolicy::Never).await;
    lock(&fixture, &fixture.owner, "id").await.unwrap();
    let sending = Sending::Push { lock: "id".into() };
    let mut upload = begin(&fixture, &fixture.owner, ENV, sending).await.unwrap();
    upload.write(&state("l", 1)).await.unwrap();
    fixture.app.force_unlock_state(&fixture.owner, ENV.0, ENV.1, "id").await.unwrap();
    refused(upload.finish().await, Reason::WrongState, "not locked");
    assert!(listed(&fixture, PageRequest::default()).await.0.is_empty());
}

#[tokio::test]
async fn a_kept_state_is_compared_with_the_current_one_and_not_accepted_under_a_lock() {
    let fixture = Fixture::new(MfaPolicy::Never).await;
    let (app, owner) = (&fixture.app, &fixture.owner);
    let run = applying(&fixture).await;
    let (runner, lease, _) = fixture.start(&run, Phase::Apply).await;
    fixture.upload(&runner, lease, Made::State, &marked("l", 6, "old")).await.unwrap();
    app.expire(lease.job, lease.epoch).await.unwrap();
    app.discard_run(owner, run.id).await.unwrap();
    fixture.upload(&runner, lease, Made::State, &marked("l", 7, "new")).await.unwrap();
    let page = PageRequest::default();
    let kept = app.list_quarantined(owner, ORGANIZATION, None, page).await.unwrap().items.remove(0);
    let id = kept.record.id.0;

    let diff = app.compare_quarantined(owner, ORGANIZATION, id).await.unwrap();
    assert_eq!(diff.changes.len(), 1);
    let change = &diff.changes[0];
    assert_eq!(change.address, "output.n");
    let side = |side: &Option<String>| side.clone().unwrap();
    let (before, after) = (&change.attributes[0].before, &change.attributes[0].after);
    assert_eq!((side(before).as_str(), side(after).as_str()), ("\"old\"", "\"new\""));
    assert_eq!(audited(&fixture, "compare_quarantined").await, 1);
    let admin = member(&fixture, "ann", Access::Admin).await;
    let by_admin = app.compare_quarantined(&admin, ORGANIZATION, id).await;
    refused(by_admin, Reason::NotAllowed, "only an owner");

    // A person went on at a workstation before anybody looked at what was kept.
    app.unfreeze_environment(owner, ORGANIZATION, ENVIRONMENT, run.id).await.unwrap();
    assert_eq!(lock(&fixture, owner, "id").await.unwrap(), LockAnswer::Done);
    let accepted = app.accept_state(owner, ORGANIZATION, id, ENVIRONMENT, false).await;
    refused(accepted, Reason::WrongState, "locked");
    unlock(&fixture, "id").await;
    app.accept_state(owner, ORGANIZATION, id, ENVIRONMENT, false).await.unwrap();
    let (all, _) = listed(&fixture, PageRequest::default()).await;
    let newest = &all[0].version;
    assert_eq!((newest.origin, newest.user.as_str()), (StateOrigin::Accepted, "ada"));
    assert_eq!(newest.run.map(|run| run.0), Some(run.id));
    let none = app.compare_quarantined(owner, ORGANIZATION, id).await.unwrap();
    assert_eq!(none.changes, []);
}

#[tokio::test]
async fn states_on_their_way_to_one_environment_take_no_place_from_another() {
    let fixture = Fixture::new(MfaPolicy::Never).await;
    let (app, owner) = (&fixture.app, &fixture.owner);
    for name in ["a", "b", "c", "d", "e"] {
        app.create_environment(owner, ENV.0, name, SettingsChange::default(), name, None)
            .await
            .unwrap();
    }
    let spent = keys::setting("bootstrap");
    fixture.store.commit(Batch::new().delete(spent, Expect::Anything)).await.unwrap();
    let secret = app.prepare_bootstrap().await.unwrap().unwrap();
    let bob = app.caller(&app.bootstrap(&secret, "umbra", "bob").await.unwrap()).await.unwrap();
    app.create_environment(&bob, "umbra", "web", SettingsChange::default(), "w", None)
        .await
        .unwrap();
    tokio::time::pause();
    let mut coming = vec![];
    // Until it is refused.
    let mut fill = async |environment| loop {
        match begin(&fixture, owner, (ENV.0, environment), Sending::Import).await {
            Ok(upload) => coming.push(upload),
            Err(error) => return (coming.len(), error.reason()),
        }
    };
    assert_eq!(fill("web").await, (2, Reason::StoreUnavailable));
    let mut all = 2;
    for environment in ["a", "b", "c", "d", "e"] {
        all = fill(environment).await.0;
    }
    assert_eq!(all, 8);
    begin(&fixture, &bob, ("umbra", "web"), Sending::Import).await.unwrap();
    coming.truncate(6);
    begin(&fixture, owner, (ENV.0, "e"), Sending::Import).await.unwrap();
}

#[tokio::test]
async fn one_rollback_at_a_time_has_a_state_in_memory() {
    let fixture = Fixture::new(MfaPolicy::Never).await;
    import(&fixture, &state("l", 1)).await.unwrap();
    import(&fixture, &state("l", 2)).await.unwrap();
    tokio::time::pause();
    let turn = fixture.app.uploads.whole(fixture.organization().await).await.unwrap();
    let waits = tokio::time::timeout(Duration::from_secs(600), rollback(&fixture, 1, ENVIRONMENT));
    assert!(waits.await.is_err(), "it went on beside another");
    drop(turn);
    rollback(&fixture, 1, ENVIRONMENT).await.unwrap();
}

/// Lets everything go on as far as it can.
async fn yielded() {
    for _ in 0..1000 {
        tokio::task::yield_now().await;
    }
}

#[test]
fn a_comparison_that_nobody_waits_for_keeps_its_turn_to_its_end() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(1)
        .build()
        .unwrap();
    runtime.block_on(async {
        let fixture = Fixture::new(MfaPolicy::Never).await;
        import(&fixture, &state("l", 1)).await.unwrap();
        import(&fixture, &state("l", 2)).await.unwrap();
        let (release, released) = std::sync::mpsc::channel::<()>();
        let busy = tokio::task::spawn_blocking(move || released.recv().is_err());
        let organization = fixture.organization().await;
        let mut turn = Box::pin(fixture.app.uploads.whole(organization));
        {
            let diff = fixture.app.diff_state_versions(&fixture.owner, ENV.0, ENV.1, (1, 2));
            tokio::select! {
                biased;
                _ = diff => panic!("it had no thread"),
                () = yielded() => {}
            }
        }
        tokio::select! {
            biased;
            _ = &mut turn => panic!("it gave its turn back and goes on"),
            () = yielded() => {}
        }
        drop(release);
        busy.await.unwrap();
        drop(tokio::time::timeout(Duration::from_secs(20), turn).await.unwrap().unwrap());
    });
}

#[tokio::test]
async fn a_token_that_ends_before_the_record_lets_the_state_in_no_more() {
    let fixture = Fixture::new(MfaPolicy::Never).await;
    let (app, proof) = (&fixture.app, fixture.prove(&fixture.owner).await);
    let mut upload = app.send_state(&proof, ENV.0, ENV.1, Sending::Import).await.unwrap();
    upload.write(&state("l", 1)).await.unwrap();
    let token = keys::token(proof.token.as_bytes());
    fixture.store.commit(Batch::new().delete(token, Expect::Anything)).await.unwrap();
    refused(upload.finish().await, Reason::IdentityRequired, "revoked");
    assert!(listed(&fixture, PageRequest::default()).await.0.is_empty());
}

#[tokio::test]
async fn a_persons_lock_keeps_all_others_from_the_state_and_says_who_and_why() {
    let fixture = Fixture::new(MfaPolicy::Never).await;
    let (app, owner) = (&fixture.app, &fixture.owner);
    import(&fixture, &state("l", 1)).await.unwrap();
    import(&fixture, &state("l", 2)).await.unwrap();
    let bob = member(&fixture, "bob", Access::Admin).await;
    // What goes on at a workstation goes on, as runs do.
    lock(&fixture, &bob, "before").await.unwrap();
    app.lock_environment(owner, ENV.0, ENV.1, "an incident").await.unwrap();
    let push = async |by, id: &str, serial| {
        send(&fixture, by, Sending::Push { lock: id.into() }, &state("l", serial)).await
    };
    push(&bob, "before", 3).await.unwrap();
    app.unlock_state(&bob, ENV.0, ENV.1, "before").await.unwrap();

    let LockAnswer::Held(holder) = lock(&fixture, &bob, "after").await.unwrap() else {
        panic!("ada has locked the environment");
    };
    assert_eq!(holder.id, "ada has locked the environment: an incident");
    for answer in [
        push(&bob, "after", 4).await,
        send(&fixture, &bob, Sending::Import, &state("l", 4)).await,
        app.rollback_state(&bob, ENV.0, ENV.1, 1, ENVIRONMENT).await,
    ] {
        let error = answer.unwrap_err();
        assert!(error.metadata().iter().any(|(name, _)| *name == "holder"), "{error}");
        refused(Err::<(), _>(error), Reason::WrongState, "ada has locked it: an incident");
    }
    // Who locked it works on it.
    assert_eq!(lock(&fixture, owner, "own").await.unwrap(), LockAnswer::Done);
    push(owner, "own", 4).await.unwrap();
    unlock(&fixture, "own").await;
    import(&fixture, &state("l", 5)).await.unwrap();
    rollback(&fixture, 1, ENVIRONMENT).await.unwrap();
    app.unlock_environment(owner, ENV.0, ENV.1).await.unwrap();
    assert_eq!(lock(&fixture, &bob, "after").await.unwrap(), LockAnswer::Done);
}
