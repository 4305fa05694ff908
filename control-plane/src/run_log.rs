//! The canonical log of each phase: one append-only file, addressed by byte offsets.
//!
//! ```text
//! <directory>/<run>/<phase>.log     the bytes
//! <directory>/<run>/<phase>.end     there once the log is finished: its length
//! ```
//!
//! - An append names its offset. What is there already is compared and acknowledged, so a
//!   repeat is harmless; a gap is refused with the offset expected; other bytes than those that
//!   are there are refused, for a log is never changed once written.
//! - An append is answered after fdatasync. Appends that arrive while one is under way share
//!   the next.
//! - Readers see what is durable, and no more: [`RunLogs::read`] from any offset, and
//!   [`RunLogs::follow`] to learn that there is more. They never hold up the writer.
//! - After a crash the length of the file is the truth, and a torn last line is fine. But a lost
//!   write can leave zero bytes where it should have been, so these end the log when it is
//!   opened, and may not be appended (they can't be in lines of JSON).
//! - A failed sync is final for the log: whether its bytes are on disk is unknown until the
//!   process starts again.

mod log;

use std::collections::HashMap;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use latchkey_domain::id::RunId;
use latchkey_domain::policy::Phase;
use tokio::sync::watch;

use self::log::Log;
use crate::durable;

/// Where logs are kept, and their bounds.
#[derive(Clone, Debug)]
pub struct Options {
    pub directory: PathBuf,
    /// The most bytes of one log.
    pub limit: u64,
    /// Files that are kept open between appends. Appends under way may exceed it.
    pub open_files: usize,
}

impl Options {
    pub fn new(directory: impl Into<PathBuf>) -> Self {
        Self { directory: directory.into(), limit: 256 * 1024 * 1024, open_files: 256 }
    }
}

/// How far a log has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Bytes that are durable.
    pub length: u64,
    pub state: State,
}

/// Whether more may come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum State {
    #[default]
    Growing,
    Finished,
}

/// Why bytes were not appended. None of them was.
#[derive(Debug, thiserror::Error)]
pub enum AppendError {
    #[error("append to the log: the next offset is {expected}")]
    Gap { expected: u64 },
    #[error("append to the log: other bytes are there at offset {at}")]
    Diverges { at: u64 },
    #[error("append to the log: it would exceed its limit of {limit} bytes")]
    TooLarge { limit: u64 },
    #[error("append to the log: it is finished at {length} bytes")]
    Finished { length: u64 },
    #[error("append to the log: there is a zero byte at offset {at}")]
    ZeroByte { at: u64 },
    #[error("append to the log")]
    Io(#[source] io::Error),
}

/// The logs of all runs.
#[derive(Clone, Debug)]
pub struct RunLogs {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    options: Options,
    /// Logs that are in use or were lately.
    logs: Mutex<HashMap<(RunId, Phase), Arc<Log>>>,
    /// Counts uses, to tell which log was used least lately.
    uses: AtomicU64,
}

impl RunLogs {
    /// Opens the directory, creating it if need be. Blocks.
    pub fn open(options: Options) -> io::Result<Self> {
        durable::create_private_directory(&options.directory)?;
        Ok(Self {
            shared: Arc::new(Shared { options, logs: Mutex::default(), uses: AtomicU64::new(0) }),
        })
    }

    /// Puts bytes at an offset and returns the durable length, once it covers them.
    pub async fn append(
        &self,
        run: RunId,
        phase: Phase,
        offset: u64,
        bytes: Vec<u8>,
    ) -> Result<u64, AppendError> {
        latchkey_failpoint::check("cp.log.disk").map_err(AppendError::Io)?;
        let end = offset.saturating_add(bytes.len() as u64);
        let log = self.log(run, phase);
        log.write(offset, bytes, self.shared.options.limit).await?;
        log.sync(end).await.map_err(AppendError::Io)
    }

    /// Makes durable all that is written and returns its length. Where the next writer begins:
    /// behind what is durable there may be bytes of one who went away in the middle.
    pub async fn settle(&self, run: RunId, phase: Phase) -> io::Result<u64> {
        self.log(run, phase).settle().await
    }

    /// Ends a log where it is and returns its length. May be repeated.
    pub async fn finish(&self, run: RunId, phase: Phase) -> io::Result<u64> {
        self.log(run, phase).finish().await
    }

    /// Returns at most `max` durable bytes from an offset; none at or behind the end.
    pub async fn read(
        &self,
        run: RunId,
        phase: Phase,
        offset: u64,
        max: usize,
    ) -> io::Result<Vec<u8>> {
        self.log(run, phase).read(offset, max).await
    }

    /// Returns how far a log has come; a log that was never written is empty and growing.
    pub async fn progress(&self, run: RunId, phase: Phase) -> io::Result<Progress> {
        Ok(*self.follow(run, phase).await?.borrow())
    }

    /// Returns a view of the log's progress that tells of every change.
    pub async fn follow(&self, run: RunId, phase: Phase) -> io::Result<watch::Receiver<Progress>> {
        self.log(run, phase).follow().await
    }

    /// Removes the logs of a run that nobody writes any more. Absent ones are fine.
    pub async fn delete(&self, run: RunId) -> io::Result<()> {
        {
            let mut logs = self.logs();
            Phase::ALL.iter().for_each(|phase| drop(logs.remove(&(run, *phase))));
        }
        let directory = self.directory(run);
        log::blocking(move || match std::fs::remove_dir_all(&directory) {
            Ok(()) => durable::sync_parent(&directory),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
        })
        .await
    }

    fn directory(&self, run: RunId) -> PathBuf {
        self.shared.options.directory.join(run.to_string())
    }

    fn logs(&self) -> MutexGuard<'_, HashMap<(RunId, Phase), Arc<Log>>> {
        self.shared.logs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn log(&self, run: RunId, phase: Phase) -> Arc<Log> {
        let now = self.shared.uses.fetch_add(1, Ordering::Relaxed);
        let mut logs = self.logs();
        if !logs.contains_key(&(run, phase)) && logs.len() >= self.shared.options.open_files {
            make_room(&mut logs, self.shared.options.open_files / 2);
        }
        let log = logs
            .entry((run, phase))
            .or_insert_with(|| Arc::new(Log::new(self.directory(run), phase)));
        log.touch(now);
        Arc::clone(log)
    }
}

/// Forgets the logs that were used least lately, down to `keep`; of those that are followed only
/// the files are closed.
fn make_room(logs: &mut HashMap<(RunId, Phase), Arc<Log>>, keep: usize) {
    let mut idle: Vec<_> = logs
        .iter()
        // Whoever works on a log holds it, and new holders need the lock that we have.
        .filter(|(_, log)| Arc::strong_count(log) == 1 && !log.has_failed())
        .map(|(id, log)| (log.last_used(), *id))
        .collect();
    idle.sort_unstable_by_key(|(used, _)| *used);
    let surplus = logs.len().saturating_sub(keep);
    for (_, id) in idle.into_iter().take(surplus) {
        let followed = logs.get(&id).is_some_and(|log| {
            log.close();
            log.is_followed()
        });
        if !followed {
            logs.remove(&id);
        }
    }
}

#[cfg(test)]
mod tests;
