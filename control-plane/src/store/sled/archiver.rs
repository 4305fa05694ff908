//! Moves audit records from the database to files.
//!
//! A thread of its own makes the files; what it changes in the database it has the writer change,
//! between two groups of batches, in steps that hold up no commit for long.
//!
//! 1. The writer tells how far an organization's audit is durable. Once two files' worth of it is
//!    in the database, the older half goes: what was told of lately is read most.
//! 2. The file is written, synced and named. (A kill: it is written over by the next attempt.)
//! 3. The database learns of the file, durably; from here on the records are read from it. (A
//!    kill: the records are still in the database, where nobody sees them; the next start removes
//!    them.)
//! 4. The records are removed from the database. That need not be durable.
//!
//! Nothing of this is a commit: no version is used, no watcher is told, and what a reader finds is
//! the same before and after.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Bound;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot};

use super::super::{Key, Order, Versioned, keys};
use super::archive::{Stretch, entry_key, key, place};
use super::segments::{Entry, NewSegment, Organization, Range, WriteError};
use super::writer::{Disk, Job};
use super::{Shared, split};
use crate::audit::Head;

/// Records that are removed at one stroke, or twice those of the group before.
const REMOVED: u64 = 256;
/// Files that share a sync of the database.
const FILES: usize = 8;

/// What waits to be moved.
pub(super) struct Due {
    state: Mutex<State>,
    changed: Condvar,
    /// How long after a failure to try again.
    retry: Duration,
}

#[derive(Default)]
struct State {
    /// How far the audit of these is durable: added to by the writer, taken by the archiver.
    heads: BTreeMap<Organization, u64>,
    /// When to come to those again whose file could not be written.
    rests: BTreeMap<Organization, Instant>,
    /// Whose turn it was last. They take turns, so that none is passed over for ever.
    last: Option<Organization>,
    /// Those whose records are not what can be moved. Nothing is tried before the next start.
    left: BTreeSet<Organization>,
    /// Set when the store is dropped.
    stopped: bool,
}

impl State {
    /// Takes the one whose turn it is; or tells how long until there may be one, if it is known.
    fn take(&mut self) -> Result<(Organization, u64), Option<Duration>> {
        let now = Instant::now();
        self.rests.retain(|_, until| *until > now);
        let ready =
            |(organization, _): &(&Organization, &u64)| !self.rests.contains_key(*organization);
        let behind = (self.last.map_or(Bound::Unbounded, Bound::Excluded), Bound::Unbounded);
        let next = self.heads.range(behind).find(ready);
        let Some((organization, head)) = next.or_else(|| self.heads.iter().find(ready)) else {
            return Err(self.rests.values().min().map(|until| *until - now));
        };
        let found = (*organization, *head);
        self.heads.remove(&found.0);
        self.last = Some(found.0);
        Ok(found)
    }
}

impl Due {
    pub(super) fn new(retry: Duration) -> Self {
        Self { state: Mutex::default(), changed: Condvar::new(), retry }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, organization: Organization, head: u64) {
        let mut state = self.state();
        if !state.left.contains(&organization) {
            let known = state.heads.entry(organization).or_default();
            *known = head.max(*known);
            self.changed.notify_all();
        }
    }

    /// Waits for the next that is due; none when the store is dropped.
    fn next(&self) -> Option<(Organization, u64)> {
        let mut state = self.state();
        while !state.stopped {
            state = match state.take() {
                Ok(found) => return Some(found),
                Err(Some(time)) => {
                    let waited = self.changed.wait_timeout(state, time);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
                Err(None) => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
            };
        }
        None
    }

    /// Puts one back whose file could not be written. It holds up none of the others.
    fn later(&self, organization: Organization, head: u64) {
        self.state().rests.insert(organization, Instant::now() + self.retry);
        self.add(organization, head);
    }

    fn is_stopped(&self) -> bool {
        self.state().stopped
    }

    fn leave(&self, organization: Organization) {
        let mut state = self.state();
        state.heads.remove(&organization);
        state.left.insert(organization);
    }

    fn stop(&self) {
        self.state().stopped = true;
        self.changed.notify_all();
    }
}

/// Step 1: called by the writer with what it has just made durable.
pub(super) fn notice(shared: &Shared, written: &BTreeMap<Key, Option<Versioned>>) {
    for (key, record) in written {
        if let Some(record) = record
            && key.kind() == Some(keys::Kind::AuditHead)
            && let (Some(organization), Some(head)) = (key.first_id(), Head::decode(&record.value))
        {
            notice_head(shared, organization, head.sequence);
        }
    }
}

fn notice_head(shared: &Shared, organization: Organization, head: u64) {
    if is_due(&shared.archive.next(organization), head) {
        shared.due.add(organization, head);
    }
}

fn is_due(next: &Range, head: u64) -> bool {
    head >= next.first - 1 + 2 * u64::from(next.count)
}

/// What the writer is to change for the archiver, between groups.
pub(super) struct Piece {
    change: Change,
    done: oneshot::Sender<()>,
}

enum Change {
    Seal(Vec<(Range, Entry)>),
    Remove(Stretch),
}

/// The writer's part.
#[derive(Default)]
pub(super) struct Moving {
    /// Few: who asks waits until it is done.
    pieces: VecDeque<Piece>,
}

impl Moving {
    pub(super) fn take(&mut self, piece: Piece) {
        self.pieces.push_back(piece);
    }

    /// Tells whether there is something to do though no batch comes.
    pub(super) fn is_under_way(&self) -> bool {
        !self.pieces.is_empty()
    }

    /// Makes a step that is small, or small beside the group before it: so no batch waits for long,
    /// and what is written without end is moved without end. Tells why the writer can't go on.
    pub(super) fn step(
        &mut self,
        shared: &Shared,
        disk: &mut dyn Disk,
        last: u64,
        written: usize,
    ) -> Result<(), String> {
        let Some(Piece { change, done }) = self.pieces.pop_front() else { return Ok(()) };
        let stretch = match change {
            Change::Remove(stretch) => stretch,
            Change::Seal(files) => {
                note(shared, disk, last, files)?;
                // The archiver may be gone, here and below.
                let _ = done.send(());
                return Ok(());
            }
        };
        let most = REMOVED.max(2 * u64::try_from(written).unwrap_or(0));
        let now = stretch.cut(Order::Ascending, most).unwrap_or(stretch);
        let mut batch = ::sled::Batch::default();
        for number in now.from..=now.to {
            batch.remove(key(now.organization, number).as_bytes());
        }
        let removed = shared.database.apply_batch(batch);
        removed.map_err(|error| format!("remove what is sealed: {error}"))?;
        if now.to < stretch.to {
            let left = Change::Remove(Stretch { from: now.to + 1, ..stretch });
            self.pieces.push_front(Piece { change: left, done });
        } else {
            let _ = done.send(());
        }
        Ok(())
    }
}

/// Step 3, in the writer.
fn note(
    shared: &Shared,
    disk: &mut dyn Disk,
    last: u64,
    files: Vec<(Range, Entry)>,
) -> Result<(), String> {
    let mut batch = ::sled::Batch::default();
    for (range, entry) in &files {
        batch.insert(entry_key(range.organization, range.first), entry.encode());
    }
    shared.database.apply_batch(batch).map_err(|error| format!("note what is sealed: {error}"))?;
    shared.database.flush().map_err(|error| format!("flush: {error}"))?;
    disk.sync(last).map_err(|error| format!("sync: {error}"))?;
    let _applied = shared.applied.write().unwrap_or_else(PoisonError::into_inner);
    for (range, entry) in files {
        shared.archive.add(range, entry);
    }
    Ok(())
}

/// The archiver's way to the writer.
#[derive(Clone)]
pub(super) struct Hands {
    /// Weak, so that the writer ends with the store whoever holds this.
    pub(super) jobs: mpsc::WeakSender<Job>,
}

impl Hands {
    /// Has the writer make a change, and waits for it.
    fn have(&self, change: Change) -> Result<(), Stop> {
        let (done, wait) = oneshot::channel();
        let jobs = self.jobs.upgrade().ok_or(Stop::Ended)?;
        jobs.blocking_send(Job::Move(Piece { change, done })).map_err(|_| Stop::Ended)?;
        drop(jobs);
        wait.blocking_recv().map_err(|_| Stop::Ended)
    }
}

/// Why the archiver does not go on.
#[derive(Debug)]
pub(super) enum Stop {
    /// The store has ended or failed.
    Ended,
    /// Nothing has changed, and it may go better another time.
    Later(WriteError),
    /// The records are not what they should be, which is for whoever verifies them to tell.
    Never(Key),
}

/// The thread, which ends with this.
pub(super) struct Archiver {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Archiver {
    pub(super) fn start(shared: &Arc<Shared>, hands: Hands) -> std::io::Result<Self> {
        let own = Arc::clone(shared);
        let thread = std::thread::Builder::new().name("store-archive".into()).spawn(move || {
            if catch_unwind(AssertUnwindSafe(|| run(&own, &hands))).is_err() {
                tracing::error!("the archiver of audit records panicked; the next start goes on");
            }
        })?;
        Ok(Self { shared: Arc::clone(shared), thread: Some(thread) })
    }
}

impl Drop for Archiver {
    /// Waits for the file that is being made.
    fn drop(&mut self) {
        self.shared.due.stop();
        if let Some(thread) = self.thread.take() {
            // A panic has been told.
            let _ = thread.join();
        }
    }
}

fn run(shared: &Shared, hands: &Hands) {
    if let Err(stop) = begin(shared, hands) {
        tracing::debug!(?stop, "the archiver ends");
        return;
    }
    while let Some((organization, head)) = shared.due.next() {
        match archive(shared, hands, organization, head) {
            Ok(()) => {}
            Err(Stop::Ended) => return,
            Err(Stop::Later(error)) => {
                tracing::error!(
                    organization = hex::encode(organization),
                    error = &error as &dyn std::error::Error,
                    "audit records stay in the database for now: their file can't be written"
                );
                shared.due.later(organization, head);
            }
            Err(Stop::Never(key)) => {
                tracing::error!(
                    organization = hex::encode(organization),
                    %key,
                    "audit records stay in the database: one of them is not there; verify \
                     the audit"
                );
                shared.due.leave(organization);
            }
        }
    }
}

/// Does what a kill left to do, and finds what became due while nobody looked.
fn begin(shared: &Shared, hands: &Hands) -> Result<(), Stop> {
    for stretch in shared.archive.stretches() {
        sweep(shared, hands, stretch)?;
    }
    for found in shared.database.scan_prefix([keys::Kind::AuditHead as u8]) {
        let (key, stored) = found.map_err(|error| ended(shared, &error))?;
        let key = Key::from_stored(key.as_ref());
        // A damaged one is told to whoever reads it.
        if let Some(organization) = key.first_id()
            && let Ok(found) = split(&key, &stored)
            && let Some(head) = Head::decode(&found.value)
        {
            notice_head(shared, organization, head.sequence);
        }
    }
    Ok(())
}

/// Removes what the database still has of sealed records.
fn sweep(shared: &Shared, hands: &Hands, stretch: Stretch) -> Result<(), Stop> {
    let bytes = |number| key(stretch.organization, number).as_bytes().to_vec();
    let mut left = shared.database.range(bytes(stretch.from)..=bytes(stretch.to));
    let number = |found: ::sled::Result<(::sled::IVec, ::sled::IVec)>| {
        let (key, _) = found.map_err(|error| ended(shared, &error))?;
        Ok(place(&key).map(|(_, number)| number))
    };
    let first = left.next().map(number).transpose()?.flatten();
    let Some(from) = first else { return Ok(()) };
    let last = left.next_back().map(number).transpose()?.flatten();
    remove(hands, Stretch { from, to: last.unwrap_or(from), ..stretch })
}

/// Moves an organization's records while two files' worth of them are in the database.
fn archive(
    shared: &Shared,
    hands: &Hands,
    organization: Organization,
    head: u64,
) -> Result<(), Stop> {
    loop {
        let mut next = shared.archive.next(organization);
        let from = next.first;
        let mut files = Vec::new();
        while files.len() < FILES && is_due(&next, head) {
            if shared.due.is_stopped() {
                return Err(Stop::Ended);
            }
            match write(shared, next) {
                Ok(entry) => files.push((next, entry)),
                // What is on the disk is unknown: nothing more is changed.
                Err(Stop::Ended) => return Err(Stop::Ended),
                Err(stop) if files.is_empty() => return Err(stop),
                // The next round comes to it again.
                Err(Stop::Later(_) | Stop::Never(_)) => break,
            }
            next.first += u64::from(next.count);
        }
        if files.is_empty() {
            return Ok(());
        }
        latchkey_failpoint::reach("cp.store.segment.named");
        seal(hands, files)?;
        latchkey_failpoint::reach("cp.store.segment.sealed");
        remove(hands, Stretch { organization, from, to: next.first - 1 })?;
    }
}

/// Step 2.
pub(super) fn write(shared: &Shared, range: Range) -> Result<Entry, Stop> {
    let failed = |error| match error {
        WriteError::Write { .. } => Stop::Later(error),
        WriteError::Sync { ref path, ref source } => {
            shared.fail(&format!("sync {}: {source}", path.display()));
            Stop::Ended
        }
    };
    let mut draft = NewSegment::create(shared.archive.directory(), range, shared.archive.sync())
        .map_err(failed)?;
    let end = range.first + u64::from(range.count);
    let bytes = |number| key(range.organization, number).as_bytes().to_vec();
    let mut found = shared.database.range(bytes(range.first)..bytes(end));
    for number in range.first..end {
        let expected = key(range.organization, number);
        match found.next() {
            Some(Ok((key, stored))) if key.as_ref() == expected.as_bytes() => {
                draft.push(&stored).map_err(failed)?;
            }
            Some(Err(error)) => return Err(ended(shared, &error)),
            Some(Ok(_)) | None => return Err(Stop::Never(expected)),
        }
    }
    draft.finish().map_err(failed)
}

/// Step 3.
pub(super) fn seal(hands: &Hands, files: Vec<(Range, Entry)>) -> Result<(), Stop> {
    hands.have(Change::Seal(files))
}

/// Step 4.
fn remove(hands: &Hands, stretch: Stretch) -> Result<(), Stop> {
    hands.have(Change::Remove(stretch))
}

fn ended(shared: &Shared, error: &::sled::Error) -> Stop {
    let _ = shared.broken(error);
    Stop::Ended
}
