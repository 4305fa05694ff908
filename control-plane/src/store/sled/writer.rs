//! The one thread that writes.
//!
//! 1. Take a batch, and all others that wait, up to a bound.
//! 2. Judge each in turn, as if those before it were written; apply the good ones together, as
//!    one sled batch. So each is whole or absent, whatever happens.
//! 3. Flush and sync once.
//! 4. Only then move the durable mark, feed the watchers and answer the callers, those with a
//!    conflict too: what they conflict with must be durable before it is told.
//!
//! A failure in 2 or 3 is final. What the disk holds is then unknown (a second fsync may succeed
//! without having written anything), so nothing is answered but the failure, and the next start
//! recovers.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::PoisonError;

use tokio::sync::{mpsc, oneshot};

use super::super::feed::Change;
use super::super::plan::{Records, changes, plan};
use super::super::{Batch, CommitError, Key, StoreError, Version, Versioned};
use super::archiver::{self, Moving, Piece};
use super::open::{self, LAST, note};
use super::segments::{SyncFile, sync_file};
use super::{Applied, Shared, join};
use crate::durable;

/// Bounds of one group: enough to share a sync among all callers, little enough to answer soon.
const GROUP: usize = 512;
const GROUP_BYTES: usize = 4 * 1024 * 1024;

/// What the writer is asked for. In one queue, so that whoever waits is answered when it ends.
pub(super) enum Job {
    Commit(Commit),
    Move(Piece),
}

/// A batch and who waits for it.
pub(super) struct Commit {
    pub(super) batch: Batch,
    pub(super) answer: oneshot::Sender<Outcome>,
}

type Outcome = Result<Version, CommitError>;

/// What makes the database durable; replaced in tests to fail.
pub(super) trait Disk: Send {
    /// Makes all that was flushed durable, then notes the last version that is.
    fn sync(&mut self, last: u64) -> io::Result<()>;

    /// Returns what makes files beside the database durable.
    fn beside(&self) -> SyncFile {
        sync_file()
    }
}

/// The files of the database.
pub(super) struct RealDisk {
    log: File,
    note: File,
    overflow: PathBuf,
    /// Files of large nodes that are synced.
    synced: HashSet<OsString>,
}

impl RealDisk {
    pub(super) fn open(directory: &Path) -> io::Result<Self> {
        let database = open::database(directory);
        Ok(Self {
            note: note::open(directory)?,
            log: File::options().read(true).write(true).open(database.join("db"))?,
            overflow: database.join("blobs"),
            synced: HashSet::new(),
        })
    }

    /// Syncs the files of large nodes that came since the last time; usually there are none.
    fn sync_overflow(&mut self) -> io::Result<()> {
        let mut present = HashSet::new();
        let mut news = false;
        for entry in fs::read_dir(&self.overflow)? {
            let entry = entry?;
            let name = entry.file_name();
            if !self.synced.contains(&name) {
                match File::open(entry.path()) {
                    Ok(file) => file.sync_all()?,
                    // Sled removes those it no longer needs.
                    Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                    Err(error) => return Err(error),
                }
                news = true;
            }
            present.insert(name);
        }
        if news {
            durable::sync_directory(&self.overflow)?;
        }
        self.synced = present;
        Ok(())
    }
}

impl Drop for RealDisk {
    fn drop(&mut self) {
        // After a proper stop the note is exact; if this fails it is as after a power loss.
        let _ = self.note.sync_data();
    }
}

impl Disk for RealDisk {
    fn sync(&mut self, last: u64) -> io::Result<()> {
        latchkey_failpoint::check("cp.store.disk")?;
        // Before the log that points to them.
        self.sync_overflow()?;
        self.log.sync_data()?;
        // Not synced: after a power loss the note may be behind, never ahead.
        note::write(&self.note, last)
    }
}

/// Writes until the store is dropped or fails.
pub(super) fn run(shared: &Shared, mut disk: Box<dyn Disk>, mut queue: mpsc::Receiver<Job>) {
    let ended = catch_unwind(AssertUnwindSafe(|| {
        write(shared, disk.as_mut(), &mut queue);
    }));
    if ended.is_err() {
        shared.fail("the writer panicked");
    }
    queue.close();
    while let Some(job) = queue.blocking_recv() {
        match job {
            Job::Commit(commit) => answer(commit.answer, Err(shared.failure().into())),
            // Dropped, which is its answer.
            Job::Move(_) => {}
        }
    }
}

fn write(shared: &Shared, disk: &mut dyn Disk, queue: &mut mpsc::Receiver<Job>) {
    let mut moving = Moving::default();
    let mut last = shared.applied.read().unwrap_or_else(PoisonError::into_inner).version;
    loop {
        let first = match moving.is_under_way() {
            true => queue.try_recv().ok(),
            false => match queue.blocking_recv() {
                Some(first) => Some(first),
                None => return,
            },
        };
        // By another's sync, or a read: what is dropped here is answered with that.
        if shared.has_failed() {
            return;
        }
        let mut written = 0;
        if let Some(first) = first {
            let mut group = Group::new(last);
            let done = group
                .fill(shared, first, queue, &mut moving)
                .and_then(|()| group.apply(shared))
                .and_then(|()| group.make_durable(shared, disk));
            if let Err(reason) = done {
                // Before the group is dropped, so that its callers find the reason.
                shared.fail(&reason);
                return;
            }
            last = group.last;
            written = group.pending.len();
            latchkey_failpoint::reach("cp.store.synced");
            archiver::notice(shared, &group.pending);
            group.tell(shared);
        }
        if let Err(reason) = moving.step(shared, disk, last, written) {
            shared.fail(&reason);
            return;
        }
    }
}

/// Batches that share a sync. Dropped without [`Group::tell`], it answers with the failure: the
/// callers find their senders gone.
struct Group {
    /// The version of the last batch that was judged good.
    last: u64,
    bytes: usize,
    /// What the batches so far will have written; the next is judged by it.
    pending: BTreeMap<Key, Option<Versioned>>,
    changes: Vec<Vec<Change>>,
    outcomes: Vec<(oneshot::Sender<Outcome>, Outcome)>,
}

impl Group {
    fn new(last: u64) -> Self {
        Self { last, bytes: 0, pending: BTreeMap::new(), changes: Vec::new(), outcomes: Vec::new() }
    }

    fn fill(
        &mut self,
        shared: &Shared,
        first: Job,
        queue: &mut mpsc::Receiver<Job>,
        moving: &mut Moving,
    ) -> Result<(), String> {
        let mut next = Some(first);
        while let Some(job) = next {
            match job {
                Job::Commit(commit) => self.judge(shared, commit)?,
                Job::Move(piece) => moving.take(piece),
            }
            next = if self.has_room() { queue.try_recv().ok() } else { None };
        }
        Ok(())
    }

    fn has_room(&self) -> bool {
        self.outcomes.len() < GROUP && self.bytes < GROUP_BYTES
    }

    fn judge(&mut self, shared: &Shared, job: Commit) -> Result<(), String> {
        self.bytes += job.batch.size();
        let records = Judged { pending: &self.pending, shared };
        let outcome = match plan(job.batch, &records) {
            Err(CommitError::Store(StoreError::Failed { reason })) => {
                return Err(reason.to_string());
            }
            Err(error) => Err(error),
            Ok(writes) if writes.is_empty() => Ok(Version(self.last)),
            Ok(writes) => {
                self.last += 1;
                let version = Version(self.last);
                self.changes.push(changes(&writes, version));
                let own = |value| Versioned { version, value };
                self.pending.extend(writes.into_iter().map(|(key, value)| (key, value.map(own))));
                Ok(version)
            }
        };
        self.outcomes.push((job.answer, outcome));
        Ok(())
    }

    /// Applies the group as one sled batch: sled writes and syncs file ranges twice for each.
    fn apply(&mut self, shared: &Shared) -> Result<(), String> {
        if self.pending.is_empty() {
            return Ok(());
        }
        let mut batch = ::sled::Batch::default();
        let mut removed = BTreeSet::new();
        let mut stored = Vec::new();
        for (key, record) in &self.pending {
            match record {
                Some(record) => {
                    join(record.version.0, &record.value, &mut stored);
                    batch.insert(key.as_bytes(), stored.as_slice());
                }
                None => {
                    batch.remove(key.as_bytes());
                    removed.insert(key.clone());
                }
            }
        }
        batch.insert(LAST, self.last.to_be_bytes().as_slice());
        let mut applied = shared.applied.write().unwrap_or_else(PoisonError::into_inner);
        shared
            .snapshots
            .keep(shared, self.pending.keys())
            .map_err(|error| format!("keep what a snapshot needs: {error}"))?;
        shared.database.apply_batch(batch).map_err(|error| format!("apply a batch: {error}"))?;
        *applied = Applied { version: self.last, removed };
        Ok(())
    }

    fn make_durable(&self, shared: &Shared, disk: &mut dyn Disk) -> Result<(), String> {
        if self.changes.is_empty() {
            return Ok(());
        }
        latchkey_failpoint::reach("cp.store.applied");
        shared.database.flush().map_err(|error| format!("flush: {error}"))?;
        latchkey_failpoint::reach("cp.store.flushed");
        disk.sync(self.last).map_err(|error| format!("sync: {error}"))
    }

    fn tell(self, shared: &Shared) {
        shared.progress.send_if_modified(|progress| {
            let moved = progress.durable != self.last;
            progress.durable = self.last;
            moved
        });
        for changes in self.changes {
            shared.publisher.publish(changes);
        }
        for (to, outcome) in self.outcomes {
            answer(to, outcome);
        }
    }
}

/// What the next batch is judged by.
struct Judged<'a> {
    pending: &'a BTreeMap<Key, Option<Versioned>>,
    shared: &'a Shared,
}

impl Records for Judged<'_> {
    fn look<T>(
        &self,
        key: &Key,
        at: impl FnOnce(Version, &[u8]) -> T,
    ) -> Result<Option<T>, StoreError> {
        if let Some(pending) = self.pending.get(key) {
            return Ok(pending.as_ref().map(|found| at(found.version, &found.value)));
        }
        self.shared.look_applied(key, at)
    }
}

fn answer(to: oneshot::Sender<Outcome>, outcome: Outcome) {
    // A caller that stopped waiting has taken its chance: the batch stands.
    let _ = to.send(outcome);
}
