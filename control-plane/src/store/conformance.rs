//! What the port promises, tried on every adapter.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use latchkey_domain::id::{EnvironmentId, OrganizationId, RunId, UserId};
use latchkey_domain::time::Timestamp;

use super::feed::{Seen, What};
use super::{
    Batch, CommitError, Expect, Key, SCAN_LIMIT, Scan, Snapshot, Store, StoreError, VALUE_LIMIT,
    Version, Versioned, keys, list,
};
use crate::audit::{Draft, Head, Record, verify_stored};

macro_rules! conformance {
    ($($name:ident)*) => {
        mod memory_store {
            use std::sync::Arc;

            use crate::store::memory::Memory;

            $(#[tokio::test(flavor = "multi_thread")]
            async fn $name() {
                super::$name(Arc::new(Memory::new())).await;
            })*
        }

        mod sled_store {
            use std::sync::Arc;

            use crate::store::sled::{Options, Sled};

            $(#[tokio::test(flavor = "multi_thread")]
            async fn $name() {
                let directory = tempfile::tempdir().unwrap();
                let store = Sled::open(&Options::new(directory.path().join("store"))).unwrap();
                super::$name(Arc::new(store)).await;
            })*
        }

        /// Moves audit records away from the first on.
        mod archiving_sled_store {
            use std::num::NonZeroU32;
            use std::sync::Arc;

            use crate::store::sled::{Options, Sled};

            $(#[tokio::test(flavor = "multi_thread")]
            async fn $name() {
                let directory = tempfile::tempdir().unwrap();
                let options = Options::new(directory.path().join("store"));
                let options = Options { segment: NonZeroU32::MIN, ..options };
                super::$name(Arc::new(Sled::open(&options).unwrap())).await;
            })*
        }
    };
}

conformance! {
    a_record_is_fetched_as_it_was_put
    a_stale_writer_is_told_and_leaves_nothing
    of_many_that_write_once_exactly_one_succeeds
    of_many_that_expect_a_version_exactly_one_succeeds
    a_check_guards_without_writing
    a_delete_removes_what_it_expects
    versions_rise_and_are_shared_by_a_batch
    invalid_batches_are_refused_whole
    scans_are_ordered_and_stay_within_their_prefix
    pages_join_without_gap_or_repeat
    a_page_never_shows_half_a_batch
    audit_drafts_are_stamped_in_the_same_batch
    concurrent_audit_drafts_make_one_chain
    the_feed_reports_commits_in_order
    the_feed_reports_only_its_prefix
    a_lagging_reader_is_told
    a_commit_outlives_a_caller_that_stops_waiting
    a_snapshot_shows_one_version_whatever_is_committed_meanwhile
    snapshots_do_not_disturb_each_other
    history_grows_with_every_commit
}

type Tested = Arc<dyn Store>;

fn user(number: u8) -> Key {
    keys::user(UserId::from_bytes([number; 16]))
}

fn organization(number: u8) -> OrganizationId {
    OrganizationId::from_bytes([number; 16])
}

fn environment() -> EnvironmentId {
    EnvironmentId::from_bytes([8; 16])
}

fn run(number: u32) -> Key {
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(&number.to_be_bytes());
    keys::run_by_environment(environment(), RunId::from_bytes(bytes))
}

fn draft(number: u8, action: &str) -> Draft {
    Draft::new(organization(number), Timestamp::from_millis(7), "user ada", action, "run 1")
}

async fn value(store: &Tested, key: &Key) -> Option<Vec<u8>> {
    store.fetch(key).await.unwrap().map(|found| found.value)
}

async fn put(store: &Tested, key: Key, value: &[u8]) -> Version {
    store.commit(Batch::new().put(key, Expect::Anything, value)).await.unwrap()
}

#[track_caller]
fn assert_conflict(result: Result<Version, CommitError>, on: &Key) {
    match result {
        Err(CommitError::Conflict { key }) => assert_eq!(key, *on),
        other => panic!("expected a conflict, got {other:?}"),
    }
}

async fn a_record_is_fetched_as_it_was_put(store: Tested) {
    assert_eq!(store.fetch(&user(1)).await.unwrap(), None);
    let version = put(&store, user(1), b"ada").await;
    let found = store.fetch(&user(1)).await.unwrap().unwrap();
    assert_eq!((found.version, found.value.as_slice()), (version, b"ada".as_slice()));
    let empty = put(&store, user(1), b"").await;
    let found = store.fetch(&user(1)).await.unwrap().unwrap();
    assert_eq!((found.version, found.value.as_slice()), (empty, b"".as_slice()));
}

async fn a_stale_writer_is_told_and_leaves_nothing(store: Tested) {
    let old = put(&store, user(1), b"old").await;
    put(&store, user(1), b"new").await;
    let batch = Batch::new()
        .put(user(0), Expect::Absent, b"before")
        .put(user(1), Expect::At(old), b"stale")
        .put(user(2), Expect::Absent, b"after")
        .delete(user(3), Expect::Anything)
        .audit(draft(1, "stale"));
    assert_conflict(store.commit(batch).await, &user(1));
    assert_eq!(value(&store, &user(0)).await, None);
    assert_eq!(value(&store, &user(1)).await.as_deref(), Some(b"new".as_slice()));
    assert_eq!(value(&store, &user(2)).await, None);
    assert_eq!(value(&store, &keys::audit(organization(1), 1)).await, None);
    assert_eq!(value(&store, &keys::audit_head(organization(1))).await, None);
}

async fn of_many_that_write_once_exactly_one_succeeds(store: Tested) {
    let writers: Vec<_> = (0..100_u8)
        .map(|number| {
            let store = Arc::clone(&store);
            tokio::spawn(async move {
                let batch = Batch::new().put(user(1), Expect::Absent, [number]);
                store.commit(batch).await.is_ok().then_some(number)
            })
        })
        .collect();
    let mut winners = Vec::new();
    for writer in writers {
        winners.extend(writer.await.unwrap());
    }
    assert_eq!(winners.len(), 1);
    assert_eq!(value(&store, &user(1)).await, Some(winners));
}

async fn of_many_that_expect_a_version_exactly_one_succeeds(store: Tested) {
    let version = put(&store, user(1), b"start").await;
    let writers: Vec<_> = (0..100_u8)
        .map(|number| {
            let store = Arc::clone(&store);
            tokio::spawn(async move {
                let batch = Batch::new().put(user(1), Expect::At(version), [number]);
                store.commit(batch).await.is_ok()
            })
        })
        .collect();
    let mut winners = 0;
    for writer in writers {
        winners += usize::from(writer.await.unwrap());
    }
    assert_eq!(winners, 1);
}

async fn a_check_guards_without_writing(store: Tested) {
    let version = put(&store, user(1), b"guard").await;
    let guarded = |expect| Batch::new().check(user(1), expect).put(user(2), Expect::Anything, b"x");
    store.commit(guarded(Expect::At(version))).await.unwrap();
    assert_eq!(store.fetch(&user(1)).await.unwrap().unwrap().version, version);
    assert_conflict(store.commit(guarded(Expect::Absent)).await, &user(1));
    assert_conflict(store.commit(guarded(Expect::At(Version::new(u64::MAX)))).await, &user(1));
    store.commit(Batch::new().check(user(1), Expect::At(version))).await.unwrap();
    store.commit(Batch::new()).await.unwrap();
}

async fn a_delete_removes_what_it_expects(store: Tested) {
    let version = put(&store, user(1), b"gone soon").await;
    let stale = Batch::new().delete(user(1), Expect::At(Version::new(u64::MAX)));
    assert_conflict(store.commit(stale).await, &user(1));
    store.commit(Batch::new().delete(user(1), Expect::At(version))).await.unwrap();
    assert_eq!(value(&store, &user(1)).await, None);
    store.commit(Batch::new().delete(user(1), Expect::Anything)).await.unwrap();
    let again = Batch::new().delete(user(1), Expect::At(version));
    assert_conflict(store.commit(again).await, &user(1));
    let reborn = Batch::new().put(user(1), Expect::Absent, b"reborn");
    assert!(store.commit(reborn).await.unwrap() > version);
}

async fn versions_rise_and_are_shared_by_a_batch(store: Tested) {
    let first = put(&store, user(1), b"a").await;
    let batch = Batch::new()
        .put(user(2), Expect::Absent, b"b")
        .put(user(3), Expect::Absent, b"c")
        .audit(draft(1, "shared"));
    let second = store.commit(batch).await.unwrap();
    assert!(second > first);
    for key in [user(2), user(3), keys::audit(organization(1), 1)] {
        assert_eq!(store.fetch(&key).await.unwrap().unwrap().version, second);
    }
}

async fn invalid_batches_are_refused_whole(store: Tested) {
    let any = Expect::Anything;
    let valid = || Batch::new().put(user(9), any, b"x");
    let large = vec![0; VALUE_LIMIT + 1];
    let batches = [
        valid().put(user(1), any, large.clone()),
        valid().put(user(1), any, b"a").put(user(1), any, b"b"),
        valid().put(user(1), any, b"a").check(user(1), any),
        valid().put(keys::audit(organization(1), 1), any, b"forged"),
        valid().delete(keys::audit_head(organization(1)), any),
        valid().put(keys::setting(&"x".repeat(2000)), any, b"a"),
        valid().audit(draft(1, "large").with("log", String::from_utf8(large).unwrap())),
    ];
    for batch in batches {
        match store.commit(batch).await {
            Err(CommitError::Store(StoreError::Invalid { .. })) => {}
            other => panic!("expected a refusal, got {other:?}"),
        }
    }
    assert_eq!(value(&store, &user(9)).await, None);
    let largest = Batch::new().put(user(1), any, vec![1; VALUE_LIMIT]);
    store.commit(largest).await.unwrap();
    assert_eq!(value(&store, &user(1)).await.unwrap().len(), VALUE_LIMIT);
}

async fn fill(store: &Tested, count: u32) {
    let mut batch = Batch::new();
    // In an order that is not that of the keys, with neighbours on both sides.
    for number in (0..count).rev() {
        batch = batch.put(run(number), Expect::Absent, number.to_be_bytes());
    }
    let before = keys::run(RunId::from_bytes([0xff; 16]));
    let after = keys::run_by_organization(organization(0), RunId::from_bytes([0; 16]));
    let batch = batch.put(before, Expect::Absent, b"x").put(after, Expect::Absent, b"x");
    store.commit(batch).await.unwrap();
}

async fn scanned(store: &Tested, scan: Scan) -> Vec<Key> {
    store.scan(scan).await.unwrap().into_iter().map(|(key, _)| key).collect()
}

async fn scans_are_ordered_and_stay_within_their_prefix(store: Tested) {
    fill(&store, 20).await;
    let prefix = || keys::runs_by_environment(environment());
    let expect: Vec<Key> = (0..20).map(run).collect();
    assert_eq!(scanned(&store, Scan::ascending(prefix(), 100)).await, expect);
    let reversed: Vec<Key> = (0..20).rev().map(run).collect();
    assert_eq!(scanned(&store, Scan::descending(prefix(), 100)).await, reversed);
    assert_eq!(scanned(&store, Scan::ascending(prefix(), 3)).await, expect[..3]);
    assert_eq!(scanned(&store, Scan::descending(prefix(), 3)).await, reversed[..3]);
    assert_eq!(scanned(&store, Scan::ascending(prefix(), 0)).await, []);
    // A place outside of the prefix never widens the scan.
    let (low, high) = (user(0), keys::audit_head(organization(9)));
    let ascending = |after: &Key| Scan::ascending(prefix(), 100).after(Some(after.clone()));
    let descending = |after: &Key| Scan::descending(prefix(), 100).after(Some(after.clone()));
    assert_eq!(scanned(&store, ascending(&low)).await, expect);
    assert_eq!(scanned(&store, ascending(&high)).await, []);
    assert_eq!(scanned(&store, descending(&high)).await, reversed);
    assert_eq!(scanned(&store, descending(&low)).await, []);
    // A key that is gone still marks a place.
    store.commit(Batch::new().delete(run(5), Expect::Anything)).await.unwrap();
    assert_eq!(scanned(&store, ascending(&run(5))).await, expect[6..]);
    assert_eq!(scanned(&store, descending(&run(5))).await, reversed[15..]);
}

async fn pages_join_without_gap_or_repeat(store: Tested) {
    let count = u32::try_from(SCAN_LIMIT).unwrap() + 7;
    fill(&store, count).await;
    let prefix = || keys::runs_by_environment(environment());
    let all: Vec<Key> = (0..count).map(run).collect();
    let listed: Vec<Key> =
        list(&*store, prefix()).await.unwrap().into_iter().map(|(key, _)| key).collect();
    assert_eq!(listed, all);
    let mut seen = Vec::new();
    loop {
        let page =
            scanned(&store, Scan::descending(prefix(), 64).after(seen.last().cloned())).await;
        if page.is_empty() {
            break;
        }
        seen.extend(page);
    }
    seen.reverse();
    assert_eq!(seen, all);
    assert_eq!(scanned(&store, Scan::ascending(prefix(), usize::MAX)).await.len(), SCAN_LIMIT);
}

async fn a_page_never_shows_half_a_batch(store: Tested) {
    let writer = tokio::spawn({
        let store = Arc::clone(&store);
        async move {
            for round in 0..200_u32 {
                let mut batch = Batch::new();
                for number in 0..40 {
                    batch = batch.put(run(number), Expect::Anything, round.to_be_bytes());
                }
                store.commit(batch).await.unwrap();
            }
        }
    });
    while !writer.is_finished() {
        let scan = Scan::ascending(keys::runs_by_environment(environment()), 100);
        let page = store.scan(scan).await.unwrap();
        let values: BTreeSet<_> = page.iter().map(|(_, found)| &found.value).collect();
        assert!(values.len() <= 1 && (page.is_empty() || page.len() == 40));
    }
    writer.await.unwrap();
}

async fn audit_drafts_are_stamped_in_the_same_batch(store: Tested) {
    let batch = Batch::new()
        .put(user(1), Expect::Absent, b"x")
        .audit(draft(1, "one"))
        .audit(draft(2, "other tenant"))
        .audit(draft(1, "two").with("phase", "plan"));
    store.commit(batch).await.unwrap();
    store.commit(Batch::new().audit(draft(1, "three"))).await.unwrap();

    let mut actions = Vec::new();
    for (_, found) in list(&*store, keys::audit_of(organization(1))).await.unwrap() {
        let record = Record::decode(&found.value).unwrap();
        actions.push((record.sequence, record.draft.action));
    }
    assert_eq!(actions, [(1, "one".into()), (2, "two".into()), (3, "three".into())]);
    for (number, count) in [(1, 3), (2, 1), (3, 0)] {
        let verified = verify_stored(&*store, organization(number)).await.unwrap();
        assert_eq!(verified.count, count);
    }
    let head = value(&store, &keys::audit_head(organization(1))).await.unwrap();
    assert_eq!(Head::decode(&head).unwrap().sequence, 3);
}

async fn concurrent_audit_drafts_make_one_chain(store: Tested) {
    let writers: Vec<_> = (0..200_u32)
        .map(|number| {
            let store = Arc::clone(&store);
            tokio::spawn(async move {
                let batch = Batch::new()
                    .put(run(number), Expect::Absent, b"x")
                    .audit(draft(1, "concurrent").with("number", number));
                store.commit(batch).await.unwrap();
            })
        })
        .collect();
    for writer in writers {
        writer.await.unwrap();
    }
    assert_eq!(verify_stored(&*store, organization(1)).await.unwrap().count, 200);
}

async fn the_feed_reports_commits_in_order(store: Tested) {
    put(&store, run(1), b"before the watch").await;
    let mut feed = store.watch(keys::runs_by_environment(environment()));
    let writers: Vec<_> = (10..60_u32)
        .map(|number| {
            let store = Arc::clone(&store);
            tokio::spawn(async move { put(&store, run(number), b"x").await })
        })
        .collect();
    let mut expect = BTreeSet::new();
    for writer in writers {
        expect.insert(writer.await.unwrap());
    }
    let gone = store.commit(Batch::new().delete(run(1), Expect::Anything)).await.unwrap();
    for version in expect {
        match feed.next().await {
            Seen::Change(change) => {
                assert_eq!((change.version, change.what), (version, What::Put));
            }
            other => panic!("expected a change, got {other:?}"),
        }
    }
    match feed.next().await {
        Seen::Change(change) => {
            assert_eq!((change.key, change.version, change.what), (run(1), gone, What::Deleted));
        }
        other => panic!("expected the removal, got {other:?}"),
    }
    drop(store);
    assert_eq!(feed.next().await, Seen::Closed);
}

async fn the_feed_reports_only_its_prefix(store: Tested) {
    let mut feed = store.watch(keys::open_runs());
    let id = RunId::from_bytes([3; 16]);
    let other = Batch::new().put(user(1), Expect::Anything, b"x");
    store.commit(other.audit(draft(1, "elsewhere"))).await.unwrap();
    let batch = Batch::new().put(keys::open_run(id), Expect::Absent, b"").put(
        keys::run(id),
        Expect::Absent,
        b"x",
    );
    store.commit(batch).await.unwrap();
    match feed.next().await {
        Seen::Change(change) => assert_eq!(change.key, keys::open_run(id)),
        other => panic!("expected a change, got {other:?}"),
    }
    let more = tokio::time::timeout(Duration::from_millis(1), feed.next()).await;
    assert!(more.is_err(), "the feed reported {more:?} as well");
}

async fn a_lagging_reader_is_told(store: Tested) {
    let mut feed = store.watch(keys::runs_by_environment(environment()));
    let writers: Vec<_> = (0..5_000_u32)
        .map(|number| {
            let store = Arc::clone(&store);
            tokio::spawn(async move { put(&store, run(number), b"x").await })
        })
        .collect();
    for writer in writers {
        writer.await.unwrap();
    }
    assert_eq!(feed.next().await, Seen::Lagged);
    assert!(matches!(feed.next().await, Seen::Change(_)));
}

async fn a_commit_outlives_a_caller_that_stops_waiting(store: Tested) {
    let mut feed = store.watch(keys::all(keys::Kind::User));
    let batch = Batch::new().put(user(1), Expect::Absent, b"x");
    {
        let mut commit = store.commit(batch);
        // Poll once, then give up on the answer.
        let _ = std::future::poll_fn(|context| {
            std::task::Poll::Ready(commit.as_mut().poll(context).is_ready())
        })
        .await;
    }
    assert!(matches!(feed.next().await, Seen::Change(_)));
    assert_eq!(value(&store, &user(1)).await.as_deref(), Some(b"x".as_slice()));
}

async fn taken(mut snapshot: Box<dyn Snapshot>) -> Vec<(Key, Versioned)> {
    let mut all = Vec::new();
    loop {
        let page = snapshot.next().await.unwrap();
        if page.is_empty() {
            return all;
        }
        all.extend(page);
    }
}

async fn everything(store: &Tested) -> Vec<(Key, Versioned)> {
    let mut all = Vec::new();
    for kind in keys::Kind::ALL {
        all.extend(list(&**store, keys::all(*kind)).await.unwrap());
    }
    all
}

async fn a_snapshot_shows_one_version_whatever_is_committed_meanwhile(store: Tested) {
    for number in 0..3000 {
        put(&store, run(number * 2), &number.to_be_bytes()).await;
    }
    store.commit(Batch::new().audit(draft(1, "begin"))).await.unwrap();
    let before = everything(&store).await;
    let mut snapshot = store.snapshot().await.unwrap();
    assert_eq!(snapshot.version(), store.newest().await.unwrap());
    let mut seen = snapshot.next().await.unwrap();
    for number in 0..3000 {
        // Before, at and behind where the reader is: changed, made, made and removed, removed.
        put(&store, run(number * 2), b"changed").await;
        put(&store, run(number * 2 + 1), b"new").await;
        if number.is_multiple_of(3) {
            let batch = Batch::new().delete(run(number * 2), Expect::Anything);
            store.commit(batch.delete(run(number * 2 + 1), Expect::Anything)).await.unwrap();
        }
        if number.is_multiple_of(500) {
            seen.extend(snapshot.next().await.unwrap());
        }
        if number.is_multiple_of(7) {
            store.commit(Batch::new().audit(draft(1, "again"))).await.unwrap();
        }
    }
    seen.extend(taken(snapshot).await);
    assert_eq!(seen.len(), before.len());
    assert!(seen == before, "the snapshot is not what there was");
}

async fn snapshots_do_not_disturb_each_other(store: Tested) {
    for number in 0..600 {
        put(&store, run(number), b"first").await;
    }
    let first = store.snapshot().await.unwrap();
    for number in 300..900 {
        put(&store, run(number), b"second").await;
    }
    let (before, second) = (everything(&store).await, store.snapshot().await.unwrap());
    drop(store.snapshot().await.unwrap());
    for number in 0..900 {
        put(&store, run(number), b"third").await;
    }
    assert!(first.version() < second.version());
    assert!(taken(second).await == before);
    let first = taken(first).await;
    assert_eq!(first.len(), 600);
    assert!(first.iter().all(|(_, found)| found.value == b"first"));
}

async fn history_grows_with_every_commit(store: Tested) {
    let start = store.history();
    let version = put(&store, user(1), b"ada").await;
    assert!(store.history() >= version && version > start);
    assert_eq!(store.newest().await.unwrap(), version);
    let conflict = Batch::new().put(user(1), Expect::Absent, b"x".as_slice());
    assert_conflict(store.commit(conflict).await, &user(1));
    assert_eq!(store.newest().await.unwrap(), version);
    assert!(store.history() >= version);
}
