//! The store on sled 0.34.7, in one directory of one machine.
//!
//! ```text
//! callers ── bounded channel ──► writer thread ──► sled ──► flush, sync ──► feed, answers
//!    └────── fetch, scan: read what is applied, answer once it is durable
//! ```
//!
//! Sled's traps decide the shape; each was reproduced before it was guarded against:
//!
//! - Concurrent `flush_async` hangs for ever, and `flush` on Linux doesn't fsync. So one thread
//!   writes, and after each group of batches it flushes and syncs the file itself.
//! - One value or tree node above an eighth of a MiB goes to a file of its own, which sled never
//!   syncs. Records are limited to 64 KiB, and the writer syncs such files as they appear.
//! - A batch may be seen half applied by an iterator. So a lock of our own lies between applying
//!   a batch and reading a page.
//! - A kill during open can leave `snap.*.generating` behind, which the next open takes for
//!   damage. [`open`] removes it, under a lock of our own.
//!
//! - Recovery takes a flipped bit for the end of the log, drops all that follows, and reports
//!   nothing. So every batch writes its version to one record, the last durable one is noted in
//!   a file beside the database, and [`open`] refuses a database that ends before the note.
//!
//! - It keeps a table of all pages in memory and reads it at each start, so it is for few records.
//!   So audit records, which have no end and never change, move to files ([`archive`]): through
//!   this port nothing tells where one is.
//!
//! - It has no snapshots. So the writer keeps for a snapshot under way what it is about to change
//!   ([`snapshot`]).
//!
//! Sled's `Mode` is left alone: 0.34.7 stores it and never reads it.

mod archive;
mod archiver;
mod found;
mod load;
mod open;
mod segments;
mod snapshot;
mod writer;

use std::collections::BTreeSet;
use std::fmt;
use std::fs::File;
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};

use self::archive::{ARMED, Archive, SEGMENT};
use self::archiver::{Archiver, Due, Hands};
use self::found::{Found, Limit};
pub use self::load::{LoadError, load};
pub use self::open::{OpenError, exists};
use self::snapshot::{Reading, Snapshots};
use self::writer::{Commit, Disk, Job};
use super::feed::{Feed, Publisher};
use super::{
    Batch, BoxFuture, CommitError, Key, Prefix, Scan, Snapshot, Store, StoreError, Version,
    Versioned,
};

/// Batches that wait for the writer before a caller has to wait.
const QUEUE: usize = 1024;

/// How long after a file could not be written to try again.
const RETRY: Duration = Duration::from_secs(60);

/// How to open the store.
#[derive(Clone, Debug)]
pub struct Options {
    /// The directory that holds the database, its lock and its marker.
    pub directory: PathBuf,
    /// Bytes of pages that sled keeps in memory.
    pub cache: u64,
    /// Audit records of one file. Organizations that have one keep its size.
    pub segment: NonZeroU32,
    /// How long after a file of audit records could not be written to try again.
    pub retry: Duration,
}

impl Options {
    pub fn new(directory: impl Into<PathBuf>) -> Self {
        // So that a test with a few runs comes by the points of the archiver.
        let segment = if latchkey_failpoint::is_armed() { ARMED } else { SEGMENT };
        Self { directory: directory.into(), cache: 64 * 1024 * 1024, segment, retry: RETRY }
    }
}

/// Records in a sled database.
pub struct Sled {
    shared: Arc<Shared>,
    /// Taken when the store is dropped, which ends the writer.
    jobs: Option<mpsc::Sender<Job>>,
    writer: Option<JoinHandle<()>>,
    archiver: Option<Archiver>,
}

/// What readers and the writer share.
struct Shared {
    database: ::sled::Db,
    /// Written by the writer, around each group; whoever holds it for reading sees no batch in
    /// part.
    applied: RwLock<Applied>,
    progress: watch::Sender<Progress>,
    /// Snapshots that are being read.
    snapshots: Snapshots,
    publisher: Publisher,
    archive: Archive,
    /// What of the audit is to be moved to it.
    due: Due,
    /// Held, not used: it keeps other processes out. Last, so that sled closes first.
    _lock: File,
}

/// What has been applied, though it may not be durable yet.
#[derive(Debug)]
struct Applied {
    /// The version of the last batch.
    version: u64,
    /// The keys that the last group removed. Those of groups before it are gone durably.
    removed: BTreeSet<Key>,
}

/// What is known to survive a power loss. The mark is moved by the writer alone.
#[derive(Clone, Debug)]
struct Progress {
    /// All batches up to this version are durable.
    durable: u64,
    failed: Option<Arc<str>>,
}

impl Sled {
    /// Opens the store, or creates it where none was. Blocks.
    pub fn open(options: &Options) -> Result<Self, OpenError> {
        Self::open_on(options, |path| Ok(Box::new(writer::RealDisk::open(path)?)))
    }

    fn open_on(
        options: &Options,
        disk: impl FnOnce(&Path) -> std::io::Result<Box<dyn Disk>>,
    ) -> Result<Self, OpenError> {
        let (mut store, hands) = Self::open_idle(options, disk)?;
        let archiver = Archiver::start(&store.shared, hands)
            .map_err(|source| OpenError::Io { path: options.directory.clone(), source })?;
        store.archiver = Some(archiver);
        Ok(store)
    }

    /// Opens the store without anybody who moves audit records.
    fn open_idle(
        options: &Options,
        disk: impl FnOnce(&Path) -> std::io::Result<Box<dyn Disk>>,
    ) -> Result<(Self, Hands), OpenError> {
        let opened = open::open(options)?;
        let mut disk = disk(&options.directory)
            .map_err(|source| OpenError::Io { path: opened.path.clone(), source })?;
        let last = open::prepare(&opened, disk.as_mut(), &options.directory)?;
        let archive =
            Archive::open(&options.directory, &opened.database, options.segment, disk.beside())?;
        let shared = Arc::new(Shared {
            database: opened.database,
            applied: RwLock::new(Applied { version: last, removed: BTreeSet::new() }),
            progress: watch::Sender::new(Progress { durable: last, failed: None }),
            snapshots: Snapshots::default(),
            publisher: Publisher::new(),
            archive,
            due: Due::new(options.retry),
            _lock: opened.lock,
        });
        let (jobs, queue) = mpsc::channel(QUEUE);
        let hands = Hands { jobs: jobs.downgrade() };
        let writer = std::thread::Builder::new()
            .name("store-writer".into())
            .spawn({
                let shared = Arc::clone(&shared);
                move || writer::run(&shared, disk, queue)
            })
            .map_err(|source| OpenError::Io { path: opened.path, source })?;
        let store = Self { shared, jobs: Some(jobs), writer: Some(writer), archiver: None };
        Ok((store, hands))
    }
}

impl Drop for Sled {
    /// Waits for the batches that were handed over.
    fn drop(&mut self) {
        // First, since it waits for the writer.
        self.archiver = None;
        self.jobs = None;
        if let Some(writer) = self.writer.take() {
            // A panic in the writer has been told as a failure already.
            let _ = writer.join();
        }
    }
}

impl fmt::Debug for Sled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sled").field("progress", &*self.shared.progress.borrow()).finish()
    }
}

impl Shared {
    /// Reads while no batch is half applied; returns what was read with the version that must be
    /// durable before it may be told: that of the newest record in it, or of the last group, if
    /// that has removed what would have been in it.
    fn read<T>(
        &self,
        read: impl FnOnce() -> Result<T, StoreError>,
        newest: impl FnOnce(&T) -> u64,
        misses: impl FnOnce(&BTreeSet<Key>) -> bool,
    ) -> Result<(T, u64), StoreError> {
        let applied = self.applied.read().unwrap_or_else(PoisonError::into_inner);
        let found = read()?;
        let needed = if misses(&applied.removed) { applied.version } else { newest(&found) };
        Ok((found, needed))
    }

    /// Waits until all batches up to `version` are durable.
    async fn durable(&self, version: u64) -> Result<(), StoreError> {
        let mut progress = self.progress.subscribe();
        let reached = progress
            .wait_for(|progress| progress.failed.is_some() || progress.durable >= version)
            .await
            .expect("the sender lives as long as self");
        match &reached.failed {
            Some(reason) => Err(StoreError::Failed { reason: Arc::clone(reason) }),
            None => Ok(()),
        }
    }

    fn failure(&self) -> StoreError {
        let failed = self.progress.borrow().failed.clone();
        StoreError::Failed { reason: failed.unwrap_or_else(|| "the writer has stopped".into()) }
    }

    fn has_failed(&self) -> bool {
        self.progress.borrow().failed.is_some()
    }

    /// Records the first failure; all that come after follow from it.
    fn fail(&self, reason: &str) {
        self.progress.send_if_modified(|progress| {
            let first = progress.failed.is_none();
            if first {
                tracing::error!(reason, "the store has failed and must be started again");
                progress.failed = Some(reason.into());
            }
            first
        });
    }

    /// A failed read leaves the database in doubt as much as a failed write.
    fn broken(&self, error: &::sled::Error) -> StoreError {
        self.fail(&format!("read: {error}"));
        self.failure()
    }
}

impl Store for Sled {
    fn commit(&self, batch: Batch) -> BoxFuture<'_, Result<Version, CommitError>> {
        Box::pin(async move {
            let (answer, answered) = oneshot::channel();
            let jobs = self.jobs.as_ref().expect("taken only by drop");
            if jobs.send(Job::Commit(Commit { batch, answer })).await.is_err() {
                return Err(self.shared.failure().into());
            }
            answered.await.unwrap_or_else(|_| Err(self.shared.failure().into()))
        })
    }

    fn fetch<'a>(&'a self, key: &'a Key) -> BoxFuture<'a, Result<Option<Versioned>, StoreError>> {
        Box::pin(async move {
            let (found, needed) = self.shared.read(
                || self.shared.find(key),
                |found| found.as_ref().map_or(0, Found::newest),
                |removed| removed.contains(key),
            )?;
            self.shared.durable(needed).await?;
            self.shared.read_one(found)
        })
    }

    fn scan(&self, scan: Scan) -> BoxFuture<'_, Result<Vec<(Key, Versioned)>, StoreError>> {
        Box::pin(async move {
            let limit = Limit { records: scan.capped(), bytes: usize::MAX };
            let (page, needed) = self.shared.read(
                || self.shared.find_all(scan.bounds(), scan.order, limit),
                |page| page.found.iter().map(Found::newest).max().unwrap_or(0),
                |removed| removed.iter().any(|key| scan.prefix.covers(key)),
            )?;
            self.shared.durable(needed).await?;
            self.shared.read_found(page.found, scan.order)
        })
    }

    fn snapshot(&self) -> BoxFuture<'_, Result<Box<dyn Snapshot>, StoreError>> {
        Box::pin(async move {
            let reading = Reading::begin(Arc::clone(&self.shared));
            self.shared.durable(reading.version().get()).await?;
            Ok(Box::new(reading) as Box<dyn Snapshot>)
        })
    }

    fn history(&self) -> Version {
        Version(self.shared.progress.borrow().durable)
    }

    fn newest(&self) -> BoxFuture<'_, Result<Version, StoreError>> {
        // One process has the database open, and it is this one.
        Box::pin(async move { Ok(self.history()) })
    }

    fn watch(&self, prefix: Prefix) -> Feed {
        self.shared.publisher.watch(prefix)
    }

    fn failed(&self) -> BoxFuture<'_, Arc<str>> {
        Box::pin(async move {
            let mut progress = self.shared.progress.subscribe();
            let failed = progress
                .wait_for(|progress| progress.failed.is_some())
                .await
                .expect("the sender lives as long as self");
            failed.failed.clone().unwrap_or_else(|| "unknown".into())
        })
    }
}

/// Puts the version before the value, as it is stored, in place of what `stored` held.
fn join(version: u64, value: &[u8], stored: &mut Vec<u8>) {
    stored.clear();
    stored.extend_from_slice(&version.to_be_bytes());
    stored.extend_from_slice(value);
}

fn parts<'a>(key: &Key, stored: &'a [u8]) -> Result<(Version, &'a [u8]), StoreError> {
    let (version, value) =
        stored.split_first_chunk().ok_or_else(|| StoreError::Damaged { key: key.clone() })?;
    Ok((Version(u64::from_be_bytes(*version)), value))
}

fn split(key: &Key, stored: &[u8]) -> Result<Versioned, StoreError> {
    let (version, value) = parts(key, stored)?;
    Ok(Versioned { version, value: value.to_vec() })
}

#[cfg(test)]
mod tests;
