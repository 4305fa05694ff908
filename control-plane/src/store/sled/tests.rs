use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use latchkey_domain::id::{OrganizationId, RunId};
use latchkey_domain::time::Timestamp;

use super::writer::{Disk, RealDisk};
use super::{OpenError, Options, Sled, exists};
use crate::audit::{Draft, verify_stored};
use crate::store::{
    Batch, CommitError, Expect, Key, Seen, Store, StoreError, VALUE_LIMIT, keys, list,
};

fn run(number: u32) -> Key {
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(&number.to_be_bytes());
    keys::run(RunId::from_bytes(bytes))
}

fn put(number: u32) -> Batch {
    Batch::new().put(run(number), Expect::Absent, number.to_be_bytes())
}

fn organization() -> OrganizationId {
    OrganizationId::from_bytes([1; 16])
}

#[track_caller]
fn open(directory: &Path) -> Sled {
    Sled::open(&Options::new(directory)).unwrap()
}

fn refusal(directory: &Path) -> OpenError {
    Sled::open(&Options::new(directory)).unwrap_err()
}

/// Makes a store with one record in it.
async fn made(directory: &Path) {
    open(directory).commit(put(1)).await.unwrap();
}

async fn assert_made(directory: &Path) {
    let store = open(directory);
    assert!(store.fetch(&run(1)).await.unwrap().is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_committed_is_there_after_reopening() {
    let root = tempfile::tempdir().unwrap();
    let mut last = None;
    for round in 0..5 {
        let store = open(root.path());
        for number in 0..20 {
            let draft = Draft::new(organization(), Timestamp::from_millis(1), "a", "b", "c");
            let version = store.commit(put(round * 20 + number).audit(draft)).await.unwrap();
            assert!(Some(version) > last, "a version was used twice");
            last = Some(version);
        }
        drop(store);
        let store = open(root.path());
        let all = list(&store, keys::all(keys::Kind::Run)).await.unwrap();
        assert_eq!(all.len() as u32, (round + 1) * 20);
        assert_eq!(all.last().map(|(_, found)| found.version), last);
        let verified = verify_stored(&store, organization()).await.unwrap();
        assert_eq!(verified.count, u64::from((round + 1) * 20));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_taken_at_any_moment_holds_all_that_was_acknowledged() {
    let root = tempfile::tempdir().unwrap();
    let store = open(&root.path().join("store"));
    for number in 0..30 {
        store.commit(put(number)).await.unwrap();
        // What a kill at this moment would leave: the files, without a close.
        let copy = root.path().join(format!("copy-{number}"));
        copy_directory(&root.path().join("store"), &copy);
        let copy = open(&copy);
        let all = list(&copy, keys::all(keys::Kind::Run)).await.unwrap();
        assert_eq!(all.len() as u32, number + 1);
    }
}

fn copy_directory(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let to = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_directory(&entry.path(), &to);
        } else {
            fs::copy(entry.path(), to).unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_concurrent_commits_do_not_hang() {
    let root = tempfile::tempdir().unwrap();
    let store = Arc::new(open(root.path()));
    let commits = async {
        let writers: Vec<_> = (0..10_000)
            .map(|number| {
                let store = Arc::clone(&store);
                tokio::spawn(async move { store.commit(put(number)).await })
            })
            .collect();
        for writer in writers {
            writer.await.unwrap().unwrap();
        }
    };
    tokio::time::timeout(Duration::from_secs(60), commits).await.expect("the store hangs");
    assert_eq!(list(&*store, keys::all(keys::Kind::Run)).await.unwrap().len(), 10_000);
}

#[tokio::test(flavor = "multi_thread")]
async fn groups_of_large_batches_are_bounded_and_survive() {
    let root = tempfile::tempdir().unwrap();
    let store = Arc::new(open(root.path()));
    let writers: Vec<_> = (0..200_u32)
        .map(|number| {
            let store = Arc::clone(&store);
            tokio::spawn(async move {
                let value = || vec![number as u8; VALUE_LIMIT];
                let batch = Batch::new().put(run(number * 2), Expect::Absent, value()).put(
                    run(number * 2 + 1),
                    Expect::Absent,
                    value(),
                );
                store.commit(batch).await.unwrap();
            })
        })
        .collect();
    for writer in writers {
        writer.await.unwrap();
    }
    drop(store);
    let all = list(&open(root.path()), keys::all(keys::Kind::Run)).await.unwrap();
    assert_eq!(all.len(), 400);
    assert!(all.iter().all(|(_, found)| found.value.len() == VALUE_LIMIT));
}

#[tokio::test(flavor = "multi_thread")]
async fn records_of_the_largest_size_survive() {
    let root = tempfile::tempdir().unwrap();
    let store = open(root.path());
    for number in 0..60 {
        let value = vec![number as u8; VALUE_LIMIT];
        store.commit(Batch::new().put(run(number), Expect::Absent, value)).await.unwrap();
    }
    drop(store);
    let store = open(root.path());
    let all = list(&store, keys::all(keys::Kind::Run)).await.unwrap();
    assert_eq!(all.len(), 60);
    for (number, (_, found)) in all.iter().enumerate() {
        assert_eq!(found.value, vec![number as u8; VALUE_LIMIT]);
    }
}

#[tokio::test]
async fn a_snapshot_left_unfinished_by_a_kill_is_removed() {
    let root = tempfile::tempdir().unwrap();
    made(root.path()).await;
    let planted = root.path().join("sled/snap.00000000000000FF.generating");
    fs::write(&planted, b"torn").unwrap();
    assert_made(root.path()).await;
    assert!(!planted.exists());
}

#[tokio::test]
async fn the_directory_is_private() {
    let root = tempfile::tempdir().unwrap();
    let directory = root.path().join("a/store");
    made(&directory).await;
    assert_eq!(fs::metadata(&directory).unwrap().permissions().mode() & 0o777, 0o700);
}

#[tokio::test]
async fn a_store_in_use_is_told_from_other_trouble() {
    let root = tempfile::tempdir().unwrap();
    let store = open(root.path());
    let error = refusal(root.path());
    assert!(matches!(error, OpenError::InUse { .. }), "{error}");
    assert!(error.to_string().contains("stop that one"));
    drop(store);
    made(root.path()).await;
}

#[tokio::test]
async fn a_database_that_is_gone_is_never_replaced_by_an_empty_one() {
    for damage in ["directory", "file", "emptied", "zeroed"] {
        let root = tempfile::tempdir().unwrap();
        assert!(!exists(root.path()));
        made(root.path()).await;
        assert!(exists(root.path()));
        let file = root.path().join("sled/db");
        match damage {
            "directory" => fs::remove_dir_all(root.path().join("sled")).unwrap(),
            "file" => fs::remove_file(&file).unwrap(),
            "emptied" => fs::write(&file, b"").unwrap(),
            _ => {
                // Sled takes this for a new file, once its snapshot is gone too.
                let length = fs::metadata(&file).unwrap().len();
                fs::write(&file, vec![0; usize::try_from(length).unwrap()]).unwrap();
                for entry in fs::read_dir(root.path().join("sled")).unwrap() {
                    let path = entry.unwrap().path();
                    if path.file_name().unwrap().to_string_lossy().starts_with("snap.") {
                        fs::remove_file(path).unwrap();
                    }
                }
            }
        }
        for _ in 0..2 {
            let error = refusal(root.path());
            assert!(matches!(error, OpenError::Gone { .. }), "{damage}: {error}");
            assert!(error.to_string().contains("restore"));
        }
    }
}

#[tokio::test]
async fn a_damaged_database_is_refused_with_what_to_do() {
    let root = tempfile::tempdir().unwrap();
    made(root.path()).await;
    // Sled writes its first snapshot when it recovers.
    assert_made(root.path()).await;
    let sled = root.path().join("sled");
    for entry in fs::read_dir(&sled).unwrap() {
        let path = entry.unwrap().path();
        if path.file_name().unwrap().to_string_lossy().starts_with("snap.") {
            let mut bytes = fs::read(&path).unwrap();
            let middle = bytes.len() / 2;
            bytes[middle] ^= 0xff;
            fs::write(&path, bytes).unwrap();
        }
    }
    let error = refusal(root.path());
    assert!(matches!(error, OpenError::Damaged { .. }), "{error}");
    assert!(error.to_string().contains("restore it from a backup"));
}

/// Sled takes a flipped bit for the end of its log, and drops all that follows.
#[tokio::test(flavor = "multi_thread")]
async fn a_flipped_bit_never_drops_acknowledged_commits_silently() {
    let root = tempfile::tempdir().unwrap();
    let base = root.path().join("base");
    let store = open(&base);
    for number in 0..300 {
        store.commit(put(number)).await.unwrap();
    }
    drop(store);
    let whole = fs::read(base.join("sled/db")).unwrap();
    for at in (0..whole.len()).step_by(1_999) {
        let copy = root.path().join(format!("copy-{at}"));
        copy_directory(&base, &copy);
        let mut flipped = whole.clone();
        flipped[at] ^= 0x10;
        fs::write(copy.join("sled/db"), flipped).unwrap();
        for _ in 0..2 {
            match Sled::open(&Options::new(&copy)) {
                Ok(store) => {
                    let all = list(&store, keys::all(keys::Kind::Run)).await.unwrap();
                    assert_eq!(all.len(), 300, "byte {at}");
                }
                Err(error) => {
                    let told = matches!(
                        error,
                        OpenError::Lost { .. } | OpenError::Gone { .. } | OpenError::Damaged { .. }
                    );
                    assert!(told, "byte {at}: {error}");
                }
            }
        }
    }
}

#[tokio::test]
async fn an_older_copy_of_the_database_is_refused() {
    let root = tempfile::tempdir().unwrap();
    let (directory, old) = (root.path().join("store"), root.path().join("old"));
    made(&directory).await;
    copy_directory(&directory.join("sled"), &old);
    open(&directory).commit(put(2)).await.unwrap();
    fs::remove_dir_all(directory.join("sled")).unwrap();
    copy_directory(&old, &directory.join("sled"));
    let error = refusal(&directory);
    assert!(matches!(error, OpenError::Lost { acknowledged: 2, found: 1, .. }), "{error}");
    assert!(error.to_string().contains("restore it from a backup"));
}

#[tokio::test]
async fn a_newer_format_is_refused() {
    let root = tempfile::tempdir().unwrap();
    made(root.path()).await;
    fs::write(root.path().join("format"), "latchkey store 3\n").unwrap();
    let error = refusal(root.path());
    assert!(matches!(error, OpenError::Newer { found: 3, .. }), "{error}");
    fs::write(root.path().join("format"), "something else").unwrap();
    assert!(matches!(refusal(root.path()), OpenError::Damaged { .. }));
}

#[tokio::test]
async fn a_database_of_the_format_before_is_taken_over() {
    let root = tempfile::tempdir().unwrap();
    made(root.path()).await;
    let marker = root.path().join("format");
    let database = ::sled::open(root.path().join("sled")).unwrap();
    database.insert(b"\0format", &1_u32.to_be_bytes()).unwrap();
    database.flush().unwrap();
    drop(database);
    fs::write(&marker, "latchkey store 1\n").unwrap();
    assert_made(root.path()).await;
    assert_eq!(fs::read_to_string(&marker).unwrap(), "latchkey store 2\n");
    let database = ::sled::open(root.path().join("sled")).unwrap();
    assert_eq!(database.get(b"\0format").unwrap().unwrap(), &2_u32.to_be_bytes());
}

#[tokio::test]
async fn a_database_of_the_format_before_that_is_refused_stays_what_it_was() {
    let root = tempfile::tempdir().unwrap();
    made(root.path()).await;
    let database = ::sled::open(root.path().join("sled")).unwrap();
    database.insert(b"\0format", &1_u32.to_be_bytes()).unwrap();
    // It ends before what the note beside it says.
    database.insert(super::open::LAST, &0_u64.to_be_bytes()).unwrap();
    database.flush().unwrap();
    drop(database);
    fs::write(root.path().join("format"), "latchkey store 1\n").unwrap();
    let error = refusal(root.path());
    assert!(matches!(error, OpenError::Lost { .. }), "{error}");
    let database = ::sled::open(root.path().join("sled")).unwrap();
    assert_eq!(database.get(b"\0format").unwrap().unwrap(), &1_u32.to_be_bytes());
}

#[tokio::test]
async fn a_first_start_that_was_killed_before_its_marker_is_repaired() {
    let root = tempfile::tempdir().unwrap();
    made(root.path()).await;
    fs::remove_file(root.path().join("format")).unwrap();
    assert_made(root.path()).await;
    assert!(root.path().join("format").exists());

    let root = tempfile::tempdir().unwrap();
    drop(::sled::open(root.path().join("sled")).unwrap());
    made(root.path()).await;
    assert_made(root.path()).await;
}

#[tokio::test]
async fn another_programs_database_is_left_alone() {
    let root = tempfile::tempdir().unwrap();
    let other = ::sled::open(root.path().join("sled")).unwrap();
    other.insert(b"key", b"value").unwrap();
    other.flush().unwrap();
    drop(other);
    assert!(matches!(refusal(root.path()), OpenError::Foreign { .. }));
}

/// Fails once it has synced a number of times.
struct Failing {
    disk: RealDisk,
    left: u32,
}

impl Disk for Failing {
    fn sync(&mut self, last: u64) -> io::Result<()> {
        self.left = self.left.checked_sub(1).ok_or_else(|| io::Error::other("EIO"))?;
        self.disk.sync(last)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_sync_is_final() {
    let root = tempfile::tempdir().unwrap();
    let store = Sled::open_on(&Options::new(root.path()), |directory| {
        // One for opening, one for the first commit.
        Ok(Box::new(Failing { disk: RealDisk::open(directory)?, left: 2 }))
    })
    .unwrap();
    let mut feed = store.watch(keys::all(keys::Kind::Run));
    store.commit(put(1)).await.unwrap();
    assert!(matches!(feed.next().await, Seen::Change(_)));
    for number in 2..5 {
        match store.commit(put(number)).await {
            Err(CommitError::Store(StoreError::Failed { reason })) => {
                assert!(reason.contains("EIO"), "{reason}");
            }
            other => panic!("expected the failure, got {other:?}"),
        }
    }
    assert!(store.failed().await.contains("EIO"));
    assert!(matches!(store.fetch(&run(1)).await, Err(StoreError::Failed { .. })));
    assert!(matches!(store.fetch(&run(9)).await, Err(StoreError::Failed { .. })));
    drop(store);
    // Told to nobody, but the acknowledged record must be there.
    assert_eq!(feed.next().await, Seen::Closed);
    assert_made(root.path()).await;
}
