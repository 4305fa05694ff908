mod faults;

use std::fmt::Debug;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use latchkey_domain::id::OrganizationId;
use latchkey_domain::time::Timestamp;
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::{Just, Strategy, any, prop_assert_eq, prop_oneof, proptest};
use proptest::test_runner::Config;

use super::{Bounds, Stretch, first_from, key, within};
use crate::audit::{Draft, verify_stored};
use crate::store::memory::Memory;
use crate::store::sled::archiver::{self, Hands};
use crate::store::sled::writer::RealDisk;
use crate::store::sled::{LoadError, OpenError, Options, Sled, load};
use crate::store::{
    Batch, Expect, Key, Order, Prefix, Scan, Seen, Snapshot, Store, Version, Versioned, keys, list,
};

const SEGMENT: u32 = 4;

/// How long a slow machine may take to reach a state.
const LIMIT: Duration = Duration::from_secs(120);

fn options(directory: &Path) -> Options {
    Options { segment: SEGMENT.try_into().unwrap(), ..Options::new(directory) }
}

#[track_caller]
fn open(directory: &Path) -> Sled {
    Sled::open(&options(directory)).unwrap()
}

/// Opens a store that moves nothing by itself.
fn open_idle(directory: &Path) -> (Sled, Hands) {
    Sled::open_idle(&options(directory), |path| Ok(Box::new(RealDisk::open(path)?))).unwrap()
}

fn organization(number: u8) -> OrganizationId {
    OrganizationId::from_bytes([number; 16])
}

fn draft(number: u8, action: &str) -> Draft {
    Draft::new(organization(number), Timestamp::from_millis(7), "user ada", action, "run 1")
}

async fn audit(store: &dyn Store, number: u8, count: u32) {
    for _ in 0..count {
        store.commit(Batch::new().audit(draft(number, "tell"))).await.unwrap();
    }
}

async fn all(store: &dyn Store) -> Vec<(Key, Versioned)> {
    let mut all = Vec::new();
    for kind in keys::Kind::ALL {
        all.extend(list(store, keys::all(*kind)).await.unwrap());
    }
    all
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

/// Waits until what `look` returns is what is wanted.
async fn until<T: PartialEq + Debug>(what: &str, wanted: T, look: impl Fn() -> T) {
    let began = Instant::now();
    loop {
        let seen = look();
        if seen == wanted {
            return;
        }
        assert!(began.elapsed() < LIMIT, "{what}: wanted {wanted:?}, last seen {seen:?}");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// Waits until the store has failed; returns why.
async fn failed(store: &Sled) -> Arc<str> {
    tokio::time::timeout(LIMIT, store.failed()).await.expect("the store has not failed")
}

fn sealed(store: &Sled, number: u8) -> u64 {
    store.shared.archive.next([number; 16]).first - 1
}

/// How many audit records the database itself has of an organization.
fn live(store: &Sled, number: u8) -> usize {
    store.shared.database.scan_prefix(keys::audit_of(organization(number)).as_bytes()).count()
}

async fn until_moved(store: &Sled, number: u8, through: u64, left: usize) {
    let look = || (sealed(store, number), live(store, number));
    until("how far records are moved, and how many are left", (through, left), look).await;
}

fn file(directory: &Path, first: u64) -> PathBuf {
    directory.join(format!("audit/{}/{first:020}", "01".repeat(16)))
}

/// Takes the archiver's steps for one file; the last only if asked.
async fn move_one(store: &Sled, hands: &Hands, then: Then) {
    let shared = Arc::clone(&store.shared);
    let hands = hands.clone();
    let work = move || {
        let range = shared.archive.next([1; 16]);
        let entry = archiver::write(&shared, range).unwrap();
        match then {
            Then::Stop => {}
            Then::Seal => archiver::seal(&hands, vec![(range, entry)]).unwrap(),
        }
    };
    tokio::task::spawn_blocking(work).await.unwrap();
}

#[derive(Clone, Copy)]
enum Then {
    Stop,
    Seal,
}

#[tokio::test(flavor = "multi_thread")]
async fn moved_records_are_found_as_they_were() {
    let root = tempfile::tempdir().unwrap();
    let (store, hands) = open_idle(root.path());
    audit(&store, 1, 19).await;
    audit(&store, 2, 9).await;
    let before = all(&store).await;
    let history = store.history();
    drop((store, hands));
    for _ in 0..3 {
        let store = open(root.path());
        until_moved(&store, 1, 12, 7).await;
        until_moved(&store, 2, 4, 5).await;
        assert!(all(&store).await == before);
        for (key, record) in &before {
            assert_eq!(store.fetch(key).await.unwrap().as_ref(), Some(record));
        }
        assert_eq!(store.fetch(&keys::audit(organization(1), 0)).await.unwrap(), None);
        assert_eq!(store.fetch(&keys::audit(organization(1), 20)).await.unwrap(), None);
        assert!(taken(store.snapshot().await.unwrap()).await == before);
        assert_eq!(verify_stored(&store, organization(1)).await.unwrap().count, 19);
        assert_eq!(store.history(), history);
    }
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&file(root.path(), 9)), 0o600);
    assert_eq!(mode(file(root.path(), 9).parent().unwrap()), 0o700);
    assert_eq!(mode(&root.path().join("audit")), 0o700);
    // The size of an organization's files stays what it was.
    let store = Sled::open(&Options::new(root.path())).unwrap();
    assert!(all(&store).await == before);
    audit(&store, 1, 1).await;
    until_moved(&store, 1, 16, 4).await;
    assert_eq!(verify_stored(&store, organization(1)).await.unwrap().count, 20);
}

#[tokio::test(flavor = "multi_thread")]
async fn moving_is_told_to_nobody_and_uses_no_version() {
    let root = tempfile::tempdir().unwrap();
    let store = open(root.path());
    let mut feed = store.watch(keys::audit_of(organization(1)));
    audit(&store, 1, 23).await;
    until_moved(&store, 1, 16, 7).await;
    assert_eq!(store.history(), Version::new(23));
    audit(&store, 1, 1).await;
    assert_eq!(store.newest().await.unwrap(), Version::new(24));
    for number in 1..=24 {
        let Seen::Change(change) = feed.next().await else { panic!("no change") };
        assert_eq!(change.key, keys::audit(organization(1), number));
        assert_eq!(change.version, Version::new(number));
    }
    let more = tokio::time::timeout(Duration::from_millis(1), feed.next()).await;
    assert!(more.is_err(), "{more:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_the_database_does_not_know_is_written_over() {
    let root = tempfile::tempdir().unwrap();
    let (store, hands) = open_idle(root.path());
    audit(&store, 1, 8).await;
    let before = all(&store).await;
    move_one(&store, &hands, Then::Stop).await;
    drop((store, hands));
    let path = file(root.path(), 1);
    let whole = fs::read(&path).unwrap();
    fs::write(&path, b"torn").unwrap();
    fs::write(path.with_extension("new"), b"torn, too").unwrap();
    let (store, hands) = open_idle(root.path());
    assert!(all(&store).await == before);
    drop((store, hands));
    let store = open(root.path());
    until_moved(&store, 1, 4, 4).await;
    assert!(all(&store).await == before);
    assert!(fs::read(&path).unwrap() == whole, "the same records made another file");
    assert!(!path.with_extension("new").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn records_that_a_kill_left_in_the_database_are_not_seen_and_then_removed() {
    let root = tempfile::tempdir().unwrap();
    let (store, hands) = open_idle(root.path());
    audit(&store, 1, 8).await;
    let before = all(&store).await;
    move_one(&store, &hands, Then::Seal).await;
    drop((store, hands));
    let (store, hands) = open_idle(root.path());
    assert_eq!((sealed(&store, 1), live(&store, 1)), (4, 8));
    // What lies there must not be what is read.
    let left = keys::audit(organization(1), 3);
    store.shared.database.insert(left.as_bytes(), b"12345678another").unwrap();
    assert!(all(&store).await == before);
    assert!(taken(store.snapshot().await.unwrap()).await == before);
    // Some of them may be gone.
    store.shared.database.remove(keys::audit(organization(1), 1).as_bytes()).unwrap();
    drop((store, hands));
    let store = open(root.path());
    until_moved(&store, 1, 4, 4).await;
    assert!(all(&store).await == before);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_shows_what_there_was_whatever_is_moved_meanwhile() {
    let root = tempfile::tempdir().unwrap();
    let (store, hands) = open_idle(root.path());
    audit(&store, 1, 600).await;
    let before = all(&store).await;
    let mut snapshot = store.snapshot().await.unwrap();
    let untouched = store.snapshot().await.unwrap();
    let mut seen = snapshot.next().await.unwrap();
    audit(&store, 1, 30).await;
    for _ in 0..100 {
        move_one(&store, &hands, Then::Seal).await;
    }
    seen.extend(snapshot.next().await.unwrap());
    for _ in 0..57 {
        move_one(&store, &hands, Then::Seal).await;
    }
    assert_eq!(sealed(&store, 1), 628);
    seen.extend(taken(snapshot).await);
    assert!(seen == before, "the snapshot is not what there was");
    assert!(taken(untouched).await == before, "the snapshot is not what there was");
}

#[tokio::test(flavor = "multi_thread")]
async fn readers_see_no_gap_while_records_are_moved() {
    let root = tempfile::tempdir().unwrap();
    let store = Arc::new(open(root.path()));
    let writer = tokio::spawn({
        let store = Arc::clone(&store);
        async move {
            for _ in 0..60 {
                let batch = (0..10).fold(Batch::new(), |batch, _| batch.audit(draft(1, "tell")));
                store.commit(batch).await.unwrap();
            }
        }
    });
    let mut rounds = 0;
    while !writer.is_finished() || rounds < 5 {
        let ascending = Scan::ascending(keys::audit_of(organization(1)), 1000);
        let page = store.scan(ascending).await.unwrap();
        assert_eq!(page.len() % 10, 0);
        for (number, (key, _)) in (1..).zip(&page) {
            assert_eq!(*key, keys::audit(organization(1), number));
        }
        if let Some((key, record)) = page.get(rounds % 10) {
            assert_eq!(store.fetch(key).await.unwrap().as_ref(), Some(record));
        }
        let snapshot = taken(store.snapshot().await.unwrap()).await;
        assert_eq!(snapshot.len() % 10, usize::from(!snapshot.is_empty()), "and the head");
        rounds += 1;
    }
    writer.await.unwrap();
    until_moved(&store, 1, 596, 4).await;
    assert_eq!(verify_stored(&*store, organization(1)).await.unwrap().count, 600);
}

type Records = Vec<(Key, Versioned)>;

fn loaded(records: Records, last: Version, to: &Path) -> Result<(), LoadError<std::io::Error>> {
    load(&options(to), last, records.into_iter().map(Ok))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_seals_what_fills_files_and_keeps_every_version() {
    let root = tempfile::tempdir().unwrap();
    let store = open(&root.path().join("old"));
    audit(&store, 1, 19).await;
    audit(&store, 2, 3).await;
    audit(&store, 3, 8).await;
    let user = keys::setting("x");
    store.commit(Batch::new().put(user, Expect::Absent, b"x")).await.unwrap();
    let records = taken(store.snapshot().await.unwrap()).await;
    let new = root.path().join("new");
    loaded(records.clone(), store.history(), &new).unwrap();
    let (restored, _hands) = open_idle(&new);
    assert_eq!((sealed(&restored, 1), live(&restored, 1)), (16, 3));
    assert_eq!((sealed(&restored, 2), live(&restored, 2)), (0, 3));
    assert_eq!((sealed(&restored, 3), live(&restored, 3)), (8, 0));
    assert!(all(&restored).await == records);
    assert_eq!(restored.history(), store.history());
    for (number, count) in [(1, 19), (2, 3), (3, 8)] {
        let verified = verify_stored(&restored, organization(number)).await.unwrap();
        assert_eq!(verified.count, count);
        audit(&restored, number, 1).await;
        let verified = verify_stored(&restored, organization(number)).await.unwrap();
        assert_eq!(verified.count, count + 1);
    }
}

/// As the page on backups tells it.
#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_is_lost_can_be_had_from_a_backup_that_is_restored_elsewhere() {
    let root = tempfile::tempdir().unwrap();
    let (old, new) = (root.path().join("old"), root.path().join("new"));
    let store = open(&old);
    audit(&store, 1, 19).await;
    until_moved(&store, 1, 12, 7).await;
    let records = taken(store.snapshot().await.unwrap()).await;
    loaded(records.clone(), store.history(), &new).unwrap();
    drop(store);
    fs::remove_file(file(&old, 5)).unwrap();
    assert!(matches!(Sled::open(&options(&old)), Err(OpenError::Audit { .. })));
    fs::copy(file(&new, 5), file(&old, 5)).unwrap();
    let store = open(&old);
    assert!(all(&store).await == records);
    assert_eq!(verify_stored(&store, organization(1)).await.unwrap().count, 19);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_takes_over_a_chain_with_a_gap_as_it_is() {
    let root = tempfile::tempdir().unwrap();
    let store = open(&root.path().join("old"));
    audit(&store, 1, 19).await;
    audit(&store, 2, 5).await;
    let mut records = taken(store.snapshot().await.unwrap()).await;
    let gone = keys::audit(organization(1), 7);
    records.retain(|(key, _)| *key != gone);
    let new = root.path().join("new");
    loaded(records.clone(), store.history(), &new).unwrap();
    let (restored, _hands) = open_idle(&new);
    assert_eq!((sealed(&restored, 1), live(&restored, 1)), (4, 14));
    assert_eq!((sealed(&restored, 2), live(&restored, 2)), (4, 1));
    assert!(all(&restored).await == records);
}

fn bytes() -> impl Strategy<Value = Vec<u8>> {
    let near = (0..4_u8, 0..14_u64, 0..4_usize, vec(any::<u8>(), 0..3)).prop_map(
        |(number, sequence, cut, more)| {
            let mut bytes = key([number; 16], sequence).as_bytes().to_vec();
            bytes.truncate(bytes.len() - cut);
            bytes.extend(more);
            bytes
        },
    );
    let kind = prop_oneof![
        Just(vec![]),
        Just(vec![0x5f]),
        Just(vec![0x60]),
        Just(vec![0x61]),
        Just(vec![0x60, 1, 1]),
        Just(vec![0x60, 1, 1, 0]),
    ];
    prop_oneof![4 => near, 1 => kind]
}

fn bounds() -> impl Strategy<Value = Bounds> {
    use std::ops::Bound::{Excluded, Included, Unbounded};
    let bound =
        || prop_oneof![bytes().prop_map(Included), bytes().prop_map(Excluded), Just(Unbounded)];
    (bound(), bound())
}

#[derive(Clone, Debug)]
enum Step {
    Audit(u8, u32),
    Put(u32),
    Scan { prefix: u8, after: Option<(u8, u64)>, limit: usize, order: Order },
}

fn step() -> impl Strategy<Value = Step> {
    let order = prop_oneof![Just(Order::Ascending), Just(Order::Descending)];
    let scan = (0..6_u8, option::of((0..4_u8, 0..40_u64)), 0..30_usize, order)
        .prop_map(|(prefix, after, limit, order)| Step::Scan { prefix, after, limit, order });
    prop_oneof![
        2 => (1..4_u8, 1..12_u32).prop_map(|(number, count)| Step::Audit(number, count)),
        1 => any::<u32>().prop_map(Step::Put),
        4 => scan,
    ]
}

fn prefix(number: u8) -> Prefix {
    match number {
        0 => keys::all(keys::Kind::Audit),
        1..4 => keys::audit_of(organization(number)),
        4 => keys::all(keys::Kind::Setting),
        _ => keys::all(keys::Kind::AuditHead),
    }
}

proptest! {
    #[test]
    fn what_lies_within_bounds_is_found_without_looking(
        (low, high) in bounds(), number in 0..4_u8, through in 1..12_u64
    ) {
        use std::ops::RangeBounds;
        let inside: Vec<u64> = (1..=through)
            .filter(|sequence| {
                let key = key([number; 16], *sequence).as_bytes().to_vec();
                (low.clone(), high.clone()).contains(&key)
            })
            .collect();
        let expected = inside.first().zip(inside.last()).map(|(from, to)| Stretch {
            organization: [number; 16],
            from: *from,
            to: *to,
        });
        prop_assert_eq!(within([number; 16], through, &low, &high), expected);
    }

    #[test]
    fn the_first_number_from_a_place_on_is_the_first(bytes in bytes(), number in 0..4_u8) {
        let expected = (0..20).find(|sequence| key([number; 16], *sequence).as_bytes() >= &bytes[..]);
        if let Some(expected) = expected {
            prop_assert_eq!(first_from([number; 16], &bytes), Some(expected));
        }
    }
}

proptest! {
    #![proptest_config(Config { cases: 24, ..Config::default() })]

    #[test]
    fn scans_are_those_of_the_other_adapter_while_records_are_moved(
        steps in vec(step(), 1..40)
    ) {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
        let root = tempfile::tempdir().unwrap();
        let mut store = open(root.path());
        let memory = Memory::new();
        runtime.block_on(async {
            for (index, step) in steps.into_iter().enumerate() {
                if index % 15 == 14 {
                    drop(store);
                    store = open(root.path());
                }
                let batch = match step {
                    Step::Audit(number, count) => (0..count)
                        .fold(Batch::new(), |batch, _| batch.audit(draft(number, "tell"))),
                    Step::Put(number) => {
                        let key = keys::setting(&number.to_string());
                        Batch::new().put(key, Expect::Anything, b"x")
                    }
                    Step::Scan { prefix: covered, after, limit, order } => {
                        let after = after.map(|(number, sequence)| key([number; 16], sequence));
                        let scan = Scan { prefix: prefix(covered), after, limit, order };
                        let expected = memory.scan(scan.clone()).await.unwrap();
                        assert_eq!(store.scan(scan).await.unwrap(), expected);
                        continue;
                    }
                };
                let version = memory.commit(batch.clone()).await.unwrap();
                assert_eq!(store.commit(batch).await.unwrap(), version);
            }
            assert_eq!(all(&store).await, all(&memory).await);
            let snapshot = taken(store.snapshot().await.unwrap()).await;
            assert_eq!(snapshot, all(&memory).await);
        });
    }
}
