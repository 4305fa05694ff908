//! That nothing is deleted which anybody needs, and that what nobody needs does not stay.

use std::time::Duration;

use latchkey_domain::id::Digest;
use latchkey_domain::policy::{MfaPolicy, Phase};
use latchkey_domain::run::{FailureKind, Run, RunState};
use latchkey_proto::v1::Reason;

use super::DELETING;
use crate::app::artifacts::{ArtifactHeader, Made};
use crate::app::claims::Claim;
use crate::app::finish_job::JobResult;
use crate::app::fixture::{ENVIRONMENT, Fixture, ORGANIZATION};
use crate::auth::{RunnerIdentity, sha256};
use crate::job::LeaseRef;
use crate::store::keys::{BlobUser, Kind};
use crate::store::{Batch, Expect, keys};

const STATE: &[u8] = br#"{"version":4,"serial":1,"lineage":"l"}"#;

async fn planning() -> (Fixture, Run, RunnerIdentity, LeaseRef) {
    let fixture = Fixture::new(MfaPolicy::Never).await;
    let run = fixture.queue("first").await;
    let (runner, lease, _) = fixture.start(&run, Phase::Plan).await;
    (fixture, run, runner, lease)
}

async fn applying() -> (Fixture, Run, RunnerIdentity, LeaseRef) {
    let fixture = Fixture::new(MfaPolicy::Never).await;
    let run = fixture.queue("first").await;
    let run = fixture.plan(&run).await;
    let seen = run.planned.as_ref().unwrap().digest;
    let run = fixture.app.confirm_run(&fixture.owner, run.id, seen).await.unwrap();
    let (runner, lease, _) = fixture.start(&run, Phase::Apply).await;
    (fixture, run, runner, lease)
}

async fn store(fixture: &Fixture, data: &[u8]) -> Claim {
    let organization = fixture.organization().await;
    let app = &fixture.app;
    let mut upload = app.blobs.begin(organization, None, data.len() as u64).await.unwrap();
    upload.write(data).await.unwrap();
    app.store_blob(organization, upload).await.unwrap()
}

fn archive() -> Vec<u8> {
    let packed = flate2::write::GzEncoder::new(vec![], flate2::Compression::fast());
    let mut builder = tar::Builder::new(packed);
    let mut header = tar::Header::new_gnu();
    header.set_size(1);
    header.set_mode(0o644);
    builder.append_data(&mut header, "main.tf", b"#".as_slice()).unwrap();
    builder.into_inner().unwrap().finish().unwrap()
}

async fn exists(fixture: &Fixture, data: &[u8]) -> bool {
    let organization = fixture.organization().await;
    fixture.app.blobs.exists(organization, sha256(data)).await.unwrap()
}

async fn note(fixture: &Fixture, digest: &Digest, value: &[u8]) {
    let key = keys::garbage(fixture.organization().await, digest);
    fixture.store.commit(Batch::new().put(key, Expect::Anything, value)).await.unwrap();
}

#[tokio::test]
async fn what_is_being_deleted_is_not_taken_and_its_mark_stays_whatever_is_refused() {
    let (fixture, _, runner, lease) = applying().await;
    let key = keys::garbage(runner.organization, &sha256(STATE));
    note(&fixture, &sha256(STATE), DELETING).await;
    for _ in 0..2 {
        let refused = fixture.upload(&runner, lease, Made::State, STATE).await.unwrap_err();
        assert_eq!(refused.reason(), Reason::StoreUnavailable, "it is sent again");
        let found = fixture.store.fetch(&key).await.unwrap().unwrap();
        assert_eq!(found.value, DELETING);
        assert!(!exists(&fixture, STATE).await, "it has no name before it is claimed");
    }
    fixture.app.collect_garbage().await.unwrap();
    fixture.upload(&runner, lease, Made::State, STATE).await.unwrap();
    fixture.app.collect_garbage().await.unwrap();
    assert!(exists(&fixture, STATE).await);
}

#[tokio::test]
async fn a_collection_between_an_uploads_name_and_its_record_leaves_it_alone() {
    let (fixture, _, runner, lease) = applying().await;
    // Refused before, and so noted.
    note(&fixture, &sha256(STATE), b"").await;
    let claim = store(&fixture, STATE).await;
    fixture.app.collect_garbage().await.unwrap();
    assert!(exists(&fixture, STATE).await);
    // Equal content that is settled and given up meanwhile takes nothing from it either.
    let twin = store(&fixture, STATE).await;
    fixture.app.release_claim(&twin).await.unwrap();
    fixture.app.collect_garbage().await.unwrap();
    assert!(exists(&fixture, STATE).await);

    let user = BlobUser::Made(lease.job.run);
    let batch = fixture.app.settle_claim(Batch::new(), &claim, user).await.unwrap();
    fixture.store.commit(batch).await.unwrap();
    fixture.app.collect_garbage().await.unwrap();
    assert!(exists(&fixture, STATE).await);
    let uses = keys::blob_uses(runner.organization, &claim.digest);
    assert_eq!(fixture.app.list(uses).await.unwrap().len(), 1);
}

#[tokio::test]
async fn an_upload_that_was_never_settled_is_deleted_in_the_end_and_cannot_be_settled_then() {
    let (fixture, _, _, lease) = applying().await;
    let claim = store(&fixture, STATE).await;
    fixture.clock.advance(Duration::from_secs(3601));
    fixture.app.collect_garbage().await.unwrap();
    assert!(!exists(&fixture, STATE).await);
    let user = BlobUser::Made(lease.job.run);
    let batch = fixture.app.settle_claim(Batch::new(), &claim, user).await.unwrap();
    fixture.store.commit(batch).await.unwrap_err();
}

#[tokio::test]
async fn an_upload_whose_caller_hangs_up_at_its_end_is_recorded_or_leaves_nothing() {
    let (fixture, _, runner, lease) = applying().await;
    let (digest, size) = (sha256(STATE), STATE.len() as u64);
    let header = ArtifactHeader { lease, kind: Made::State, digest, size, sequence: 1 };
    let mut upload = fixture.app.upload_artifact(&runner, header).await.unwrap();
    upload.write(STATE).await.unwrap();
    let mut finishing = Box::pin(upload.finish());
    // Begun, and dropped.
    let _ = futures_poll_once(&mut finishing).await;
    drop(finishing);
    let state = || async {
        let app = &fixture.app;
        let view = app.show_environment(&fixture.owner, ORGANIZATION, ENVIRONMENT).await;
        view.unwrap().environment.state
    };
    tokio::time::timeout(Duration::from_secs(10), async {
        while state().await.is_none() {
            tokio::task::yield_now().await;
        }
    })
    .await
    .unwrap();
}

async fn futures_poll_once<F: Future + Unpin>(future: &mut F) -> Option<F::Output> {
    std::future::poll_fn(|context| {
        std::task::Poll::Ready(match std::pin::Pin::new(&mut *future).poll(context) {
            std::task::Poll::Ready(output) => Some(output),
            std::task::Poll::Pending => None,
        })
    })
    .await
}

#[tokio::test]
async fn a_configuration_is_claimed_before_it_has_its_name() {
    let (fixture, ..) = planning().await;
    let archive = archive();
    note(&fixture, &sha256(&archive), DELETING).await;
    let upload = async || {
        let app = &fixture.app;
        let mut upload =
            app.upload_configuration(&fixture.owner, ORGANIZATION, ENVIRONMENT).await.unwrap();
        upload.write(&archive).await.unwrap();
        upload.finish().await
    };
    assert_eq!(upload().await.unwrap_err().reason(), Reason::StoreUnavailable);
    assert!(!exists(&fixture, &archive).await);
    fixture.app.collect_garbage().await.unwrap();
    for _ in 0..2 {
        upload().await.unwrap();
        fixture.app.collect_garbage().await.unwrap();
        assert!(exists(&fixture, &archive).await);
    }
    assert!(fixture.app.list(keys::all(Kind::Garbage)).await.unwrap().is_empty());
}

#[tokio::test]
async fn while_a_backup_holds_all_blobs_nothing_waits_is_marked_or_refused() {
    let (fixture, _, runner, lease) = applying().await;
    let app = &fixture.app;
    let held = app.blobs.hold().await;
    let _ = fixture.upload(&runner, lease, Made::State, b"no state").await.unwrap_err();
    let collected = tokio::time::timeout(Duration::from_secs(10), app.collect_garbage()).await;
    collected.unwrap().unwrap();
    let key = keys::garbage(runner.organization, &sha256(b"no state"));
    assert_ne!(fixture.store.fetch(&key).await.unwrap().unwrap().value, DELETING);
    // Equal content is answered as ever.
    let again = fixture.upload(&runner, lease, Made::State, b"no state").await.unwrap_err();
    assert_eq!(again.reason(), Reason::FieldInvalid);
    fixture.upload(&runner, lease, Made::ErroredState, STATE).await.unwrap();
    let kept = app.list_quarantined(&fixture.owner, ORGANIZATION, None, Default::default()).await;
    let id = kept.unwrap().items[0].record.id.0;
    let dropped = app.drop_quarantined(&fixture.owner, ORGANIZATION, id);
    tokio::time::timeout(Duration::from_secs(10), dropped).await.unwrap().unwrap();
    drop(held);
    app.collect_garbage().await.unwrap();
    assert!(!exists(&fixture, b"no state").await && !exists(&fixture, STATE).await);
}

#[tokio::test]
async fn a_workspace_that_a_lease_replaced_goes_while_the_run_goes_on() {
    let (fixture, _, runner, lease) = planning().await;
    for data in [b"one", b"two"] {
        fixture.upload(&runner, lease, Made::Workspace, data).await.unwrap();
    }
    // The same bytes as another kind are needed still.
    fixture.upload(&runner, lease, Made::Changes, b"two").await.unwrap();
    fixture.upload(&runner, lease, Made::Workspace, b"three").await.unwrap();
    fixture.app.collect_garbage().await.unwrap();
    assert!(!exists(&fixture, b"one").await);
    assert!(exists(&fixture, b"two").await && exists(&fixture, b"three").await);
}

#[tokio::test]
async fn what_a_failed_plan_made_goes_with_its_run() {
    let (fixture, run, runner, lease) = planning().await;
    fixture.upload(&runner, lease, Made::Workspace, b"made").await.unwrap();
    fixture.upload(&runner, lease, Made::Changes, b"{}").await.unwrap();
    let result = JobResult::Failed { kind: FailureKind::Errored, reason: "no".into() };
    fixture.app.finish_job(&runner, lease, 0, result).await.unwrap();
    assert_eq!(fixture.run(&run).await.state, RunState::Errored);
    fixture.app.collect_garbage().await.unwrap();
    assert!(!exists(&fixture, b"made").await && !exists(&fixture, b"{}").await);
}

#[tokio::test]
async fn blobs_that_nobody_names_are_found_once_they_are_a_day_old() {
    let (fixture, _, runner, lease) = applying().await;
    let app = &fixture.app;
    fixture.upload(&runner, lease, Made::State, STATE).await.unwrap();
    // As a crash or a restore leaves it.
    app.blobs.put(runner.organization, b"orphan").await.unwrap();
    let sweep = async || {
        app.sweep_blobs().await.unwrap();
        app.collect_garbage().await.unwrap();
    };
    sweep().await;
    assert!(exists(&fixture, b"orphan").await, "it may be on its way");
    fixture.clock.advance(Duration::from_secs(2 * 24 * 3600));
    sweep().await;
    assert!(!exists(&fixture, b"orphan").await);
    assert!(exists(&fixture, STATE).await && exists(&fixture, b"{}").await);
}

#[tokio::test]
async fn what_was_stored_before_uses_were_recorded_is_kept() {
    let (fixture, run, runner, lease) = applying().await;
    let app = &fixture.app;
    fixture.upload(&runner, lease, Made::State, STATE).await.unwrap();
    let later = br#"{"version":4,"serial":2,"lineage":"l"}"#;
    fixture.upload(&runner, lease, Made::ErroredState, later).await.unwrap();
    // As the version before left it.
    let uses = app.list(keys::all(Kind::BlobUse)).await.unwrap();
    assert!(!uses.is_empty());
    for (key, _) in uses {
        fixture.store.commit(Batch::new().delete(key, Expect::Anything)).await.unwrap();
    }
    for (key, _) in app.list(keys::all(Kind::Setting)).await.unwrap() {
        fixture.store.commit(Batch::new().delete(key, Expect::Anything)).await.unwrap();
    }
    let workspace = fixture.run(&run).await.planned.unwrap().digests.workspace;
    for digest in [sha256(STATE), sha256(later), sha256(b"{}"), workspace] {
        note(&fixture, &digest, b"").await;
    }
    fixture.clock.advance(Duration::from_secs(2 * 24 * 3600));
    app.collect_garbage().await.unwrap();
    app.sweep_blobs().await.unwrap();
    app.collect_garbage().await.unwrap();
    for data in [STATE, later, b"{}", b"made"] {
        assert!(exists(&fixture, data).await, "{}", String::from_utf8_lossy(data));
    }
}
