//! Files that are damaged, can't be written, read or synced.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::{
    Then, all, audit, draft, failed, file, live, move_one, open, open_idle, options, organization,
    sealed, until_moved,
};
use crate::audit::{VerifyError, verify_stored};
use crate::store::sled::segments::SyncFile;
use crate::store::sled::writer::{Disk, RealDisk};
use crate::store::sled::{OpenError, Options, Sled};
use crate::store::{Batch, CommitError, Expect, Scan, Store, StoreError, keys, list};

#[tokio::test(flavor = "multi_thread")]
async fn any_flipped_bit_is_told_and_never_taken_for_absence() {
    let root = tempfile::tempdir().unwrap();
    let (store, hands) = open_idle(root.path());
    audit(&store, 1, 8).await;
    let before = list(&store, keys::audit_of(organization(1))).await.unwrap();
    move_one(&store, &hands, Then::Seal).await;
    drop((store, hands));
    let path = file(root.path(), 1);
    let whole = fs::read(&path).unwrap();
    let head = 36 + 12 * 4 + 32;
    for at in (0..whole.len()).step_by(7) {
        let mut flipped = whole.clone();
        flipped[at] ^= 4;
        fs::write(&path, flipped).unwrap();
        let (store, _hands) = open_idle(root.path());
        let mut damaged = 0;
        for (key, record) in &before {
            match store.fetch(key).await {
                Ok(found) => assert_eq!(found.as_ref(), Some(record)),
                Err(StoreError::Damaged { key: told }) => {
                    assert_eq!(told, *key);
                    damaged += 1;
                }
                Err(other) => panic!("{other}"),
            }
        }
        // The head is every record's, a record is only its own.
        assert_eq!(damaged, if at < head { 4 } else { 1 }, "byte {at}");
        let scanned = store.scan(Scan::ascending(keys::audit_of(organization(1)), 100)).await;
        assert!(matches!(scanned, Err(StoreError::Damaged { .. })), "{scanned:?}");
        let mut snapshot = store.snapshot().await.unwrap();
        for _ in 0..2 {
            assert!(matches!(snapshot.next().await, Err(StoreError::Damaged { .. })));
        }
    }
    fs::write(&path, whole).unwrap();
    let (store, _hands) = open_idle(root.path());
    assert!(list(&store, keys::audit_of(organization(1))).await.unwrap() == before);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_is_missing_or_cut_is_found_at_the_start() {
    let root = tempfile::tempdir().unwrap();
    let store = open(root.path());
    audit(&store, 1, 16).await;
    until_moved(&store, 1, 12, 4).await;
    drop(store);
    let path = file(root.path(), 5);
    let whole = fs::read(&path).unwrap();
    let damages: [&dyn Fn(); 3] = [
        &|| fs::remove_file(&path).unwrap(),
        &|| fs::write(&path, &whole[..whole.len() - 1]).unwrap(),
        &|| fs::write(&path, b"").unwrap(),
    ];
    for damage in damages {
        damage();
        for _ in 0..2 {
            match Sled::open(&options(root.path())) {
                Err(error @ OpenError::Audit { .. }) => {
                    assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
                }
                other => panic!("expected a refusal, got {other:?}"),
            }
        }
    }
    fs::write(&path, whole).unwrap();
    let store = open(root.path());
    assert_eq!(verify_stored(&store, organization(1)).await.unwrap().count, 16);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_goes_or_is_another_is_damage_to_its_readers() {
    let root = tempfile::tempdir().unwrap();
    let store = open(root.path());
    audit(&store, 1, 16).await;
    until_moved(&store, 1, 12, 4).await;
    fs::copy(file(root.path(), 1), file(root.path(), 5)).unwrap();
    fs::remove_file(file(root.path(), 9)).unwrap();
    for number in 5..=12 {
        let key = keys::audit(organization(1), number);
        let found = store.fetch(&key).await;
        assert!(matches!(found, Err(StoreError::Damaged { key: told }) if told == key));
    }
    for number in [1, 4, 13] {
        let key = keys::audit(organization(1), number);
        assert!(store.fetch(&key).await.unwrap().is_some());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_cannot_be_written_holds_up_nothing() {
    let root = tempfile::tempdir().unwrap();
    let blocked = root.path().join("audit");
    fs::write(&blocked, b"in the way").unwrap();
    let store = open(root.path());
    audit(&store, 1, 20).await;
    assert_eq!(verify_stored(&store, organization(1)).await.unwrap().count, 20);
    drop(store);
    fs::remove_file(&blocked).unwrap();
    let store = open(root.path());
    until_moved(&store, 1, 16, 4).await;
    assert_eq!(verify_stored(&store, organization(1)).await.unwrap().count, 20);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chain_with_a_gap_stays_where_it_is() {
    let root = tempfile::tempdir().unwrap();
    let (store, hands) = open_idle(root.path());
    audit(&store, 1, 8).await;
    audit(&store, 2, 8).await;
    store.shared.database.remove(keys::audit(organization(1), 2).as_bytes()).unwrap();
    drop((store, hands));
    let store = open(root.path());
    audit(&store, 1, 8).await;
    until_moved(&store, 2, 4, 4).await;
    assert_eq!((sealed(&store, 1), live(&store, 1)), (0, 15));
    assert!(verify_stored(&store, organization(1)).await.is_err());
}

/// Fails from a certain sync on.
struct Failing {
    disk: RealDisk,
    left: u32,
}

impl Disk for Failing {
    fn sync(&mut self, last: u64) -> std::io::Result<()> {
        self.left = self.left.checked_sub(1).ok_or_else(|| std::io::Error::other("EIO"))?;
        self.disk.sync(last)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_sync_while_moving_is_final_and_loses_nothing() {
    let root = tempfile::tempdir().unwrap();
    let (store, hands) = open_idle(root.path());
    audit(&store, 1, 8).await;
    let before = all(&store).await;
    drop((store, hands));
    let store = Sled::open_on(&options(root.path()), |path| {
        Ok(Box::new(Failing { disk: RealDisk::open(path)?, left: 1 }))
    })
    .unwrap();
    assert!(failed(&store).await.contains("EIO"));
    drop(store);
    let store = open(root.path());
    until_moved(&store, 1, 4, 4).await;
    assert!(all(&store).await == before);
}

/// Syncs files beside the database in a way of its own.
struct Beside {
    disk: RealDisk,
    sync: SyncFile,
}

impl Beside {
    fn open(
        directory: &Path,
        sync: impl Fn(&Path, &File) -> io::Result<()> + Send + Sync + 'static,
    ) -> io::Result<Box<dyn Disk>> {
        Ok(Box::new(Self { disk: RealDisk::open(directory)?, sync: Arc::new(sync) }))
    }
}

impl Disk for Beside {
    fn sync(&mut self, last: u64) -> io::Result<()> {
        self.disk.sync(last)
    }

    fn beside(&self) -> SyncFile {
        Arc::clone(&self.sync)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_file_syncs_all_directories_that_lead_to_it_whoever_made_them() {
    let root = tempfile::tempdir().unwrap();
    // As a process leaves them that was killed before it synced them.
    fs::create_dir_all(file(root.path(), 1).parent().unwrap()).unwrap();
    let synced: Arc<Mutex<Vec<PathBuf>>> = Arc::default();
    let (store, hands) = Sled::open_idle(&options(root.path()), |directory| {
        let synced = Arc::clone(&synced);
        Beside::open(directory, move |path, file| {
            synced.lock().unwrap().push(path.to_path_buf());
            file.sync_all()
        })
    })
    .unwrap();
    audit(&store, 1, 8).await;
    for first in [1, 5] {
        move_one(&store, &hands, Then::Seal).await;
        let path = file(root.path(), first);
        let organization = path.parent().unwrap();
        let mut expected = vec![path.with_extension("new")];
        expected.extend([organization, &root.path().join("audit"), root.path()].map(PathBuf::from));
        assert_eq!(std::mem::take(&mut *synced.lock().unwrap()), expected);
    }
}

/// Opens a store in which one sync fails, and only the first time: a second seems to succeed.
fn open_failing(directory: &Path, at: PathBuf) -> Sled {
    let at = Mutex::new(Some(at));
    Sled::open_on(&options(directory), |directory| {
        Beside::open(directory, move |path, file| {
            match at.lock().unwrap().take_if(|at| at.as_path() == path) {
                Some(_) => Err(io::Error::other("EIO")),
                None => file.sync_all(),
            }
        })
    })
    .unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_failed_sync_of_a_file_nothing_more_is_changed() {
    let ends: [&dyn Fn(&Path) -> PathBuf; 4] = [
        // Of the second file: the first is whole, but is left alone too.
        &|root| file(root, 5).with_extension("new"),
        &|root| file(root, 5).parent().unwrap().to_path_buf(),
        &|root| root.join("audit"),
        &Path::to_path_buf,
    ];
    for at in ends {
        let root = tempfile::tempdir().unwrap();
        let (store, hands) = open_idle(root.path());
        audit(&store, 1, 12).await;
        let before = all(&store).await;
        drop((store, hands));
        let store = open_failing(root.path(), at(root.path()));
        assert!(failed(&store).await.contains("EIO"));
        for _ in 0..2 {
            let refused = store.commit(Batch::new().audit(draft(1, "tell"))).await;
            assert!(
                matches!(&refused, Err(CommitError::Store(StoreError::Failed { reason }))
                    if reason.contains("EIO")),
                "{refused:?}"
            );
        }
        assert_eq!((sealed(&store, 1), live(&store, 1)), (0, 12));
        drop(store);
        let store = open(root.path());
        until_moved(&store, 1, 8, 4).await;
        assert!(all(&store).await == before);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_organization_that_cannot_be_written_starves_no_other_and_is_tried_again() {
    let root = tempfile::tempdir().unwrap();
    let blocked = file(root.path(), 1).parent().unwrap().to_path_buf();
    fs::create_dir(root.path().join("audit")).unwrap();
    fs::write(&blocked, b"in the way").unwrap();
    let often = Options { retry: Duration::from_millis(20), ..options(root.path()) };
    for options in [options(root.path()), often] {
        let store = Sled::open(&options).unwrap();
        audit(&store, 1, 8).await;
        let through = sealed(&store, 2);
        audit(&store, 2, 8).await;
        until_moved(&store, 2, through + if through == 0 { 4 } else { 8 }, 4).await;
        assert_eq!(sealed(&store, 1), 0);
        if options.retry < Duration::from_secs(1) {
            fs::remove_file(&blocked).unwrap();
            until_moved(&store, 1, 12, 4).await;
            assert_eq!(verify_stored(&store, organization(1)).await.unwrap().count, 16);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_verification_names_the_record_that_is_damaged() {
    let root = tempfile::tempdir().unwrap();
    let (store, hands) = open_idle(root.path());
    audit(&store, 1, 16).await;
    for _ in 0..2 {
        move_one(&store, &hands, Then::Seal).await;
    }
    // The later one first: what is told is where the chain breaks first.
    for (first, damaged) in [(5, 8), (1, 4)] {
        let path = file(root.path(), first);
        let mut bytes = fs::read(&path).unwrap();
        *bytes.last_mut().unwrap() ^= 4;
        fs::write(&path, bytes).unwrap();
        match verify_stored(&store, organization(1)).await {
            Err(VerifyError::Broken(broken)) => assert_eq!(broken.sequence, damaged),
            other => panic!("expected a broken chain, got {other:?}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_keeps_a_call_from_a_file_is_not_the_end_of_the_store() {
    let root = tempfile::tempdir().unwrap();
    let (store, hands) = open_idle(root.path());
    audit(&store, 1, 8).await;
    move_one(&store, &hands, Then::Seal).await;
    let path = file(root.path(), 1);
    let aside = root.path().join("aside");
    fs::rename(&path, &aside).unwrap();
    // A loop, since whoever runs tests may be one that no permission stops.
    symlink(&path, &path).unwrap();
    let key = keys::audit(organization(1), 1);
    let found = store.fetch(&key).await;
    assert!(matches!(found, Err(StoreError::Unreadable { .. })), "{found:?}");
    let checked = store.commit(Batch::new().check(key.clone(), Expect::Absent)).await;
    assert!(
        matches!(checked, Err(CommitError::Store(StoreError::Unreadable { .. }))),
        "{checked:?}"
    );
    audit(&store, 1, 1).await;
    fs::rename(&aside, &path).unwrap();
    assert!(store.fetch(&key).await.unwrap().is_some());
}
