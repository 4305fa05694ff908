//! One log: its file, what of it is written, what of it is durable.
//!
//! `state` is held while bytes are compared and written, `syncing` while they are synced, never
//! both by one append: so the next append is written while the last one is synced, and one sync
//! serves all that were written before it began.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use latchkey_domain::policy::Phase;
use tokio::sync::{Mutex, OwnedMutexGuard, watch};

use super::{AppendError, Progress, State};
use crate::durable;

/// How far back zero bytes are looked for when a log is opened: more than can be written but
/// not yet synced.
const DOUBTFUL: u64 = 16 * 1024 * 1024;

/// Bytes compared at a time.
const COMPARE: usize = 256 * 1024;

#[derive(Debug)]
pub(super) struct Log {
    directory: PathBuf,
    path: PathBuf,
    end_path: PathBuf,
    state: Arc<Mutex<Written>>,
    syncing: Arc<Mutex<()>>,
    /// Sent to by whoever synced or finished.
    progress: watch::Sender<Progress>,
    /// Set by a failed sync, never cleared.
    failed: AtomicBool,
    used: AtomicU64,
}

/// What is written, durable or not. Changed under the lock only.
#[derive(Debug, Default)]
struct Written {
    loaded: bool,
    /// Open between appends; closed when many other logs are in use.
    file: Option<Arc<File>>,
    length: u64,
    state: State,
}

impl Log {
    pub(super) fn new(directory: PathBuf, phase: Phase) -> Self {
        Self {
            path: directory.join(format!("{phase}.log")),
            end_path: directory.join(format!("{phase}.end")),
            directory,
            state: Arc::default(),
            syncing: Arc::default(),
            progress: watch::Sender::new(Progress::default()),
            failed: AtomicBool::new(false),
            used: AtomicU64::new(0),
        }
    }

    pub(super) fn touch(&self, now: u64) {
        self.used.store(now, Ordering::Relaxed);
    }

    pub(super) fn last_used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    pub(super) fn has_failed(&self) -> bool {
        self.failed.load(Ordering::SeqCst)
    }

    pub(super) fn is_followed(&self) -> bool {
        self.progress.receiver_count() > 0
    }

    /// Closes the file, if nothing in it waits for a sync through this very descriptor, which
    /// is what would learn of a failed write.
    pub(super) fn close(&self) {
        if let Ok(mut written) = self.state.try_lock()
            && written.length == self.progress.borrow().length
        {
            written.file = None;
        }
    }

    /// Writes what of the bytes is not there yet.
    pub(super) async fn write(
        self: &Arc<Self>,
        offset: u64,
        bytes: Vec<u8>,
        limit: u64,
    ) -> Result<(), AppendError> {
        let mut written = self.loaded().await.map_err(AppendError::Io)?;
        let log = Arc::clone(self);
        // With the lock in the task: a caller that goes away must not leave it half done.
        blocking(move || Ok(log.write_now(&mut written, offset, &bytes, limit)))
            .await
            .map_err(AppendError::Io)?
    }

    /// Waits until all up to `end` is durable; returns how much is.
    pub(super) async fn sync(self: &Arc<Self>, end: u64) -> io::Result<u64> {
        let durable = || self.progress.borrow().length;
        if durable() >= end && !self.has_failed() {
            return Ok(durable());
        }
        let turn = Arc::clone(&self.syncing).lock_owned().await;
        if durable() >= end && !self.has_failed() {
            return Ok(durable());
        }
        let (file, length) = {
            let written = self.loaded().await?;
            (written.file.clone(), written.length)
        };
        let log = Arc::clone(self);
        blocking(move || {
            let _turn = turn;
            log.sync_now(file, length)
        })
        .await
    }

    /// Makes durable what is written, also by a caller who went away before it was synced;
    /// returns how much that is.
    pub(super) async fn settle(self: &Arc<Self>) -> io::Result<u64> {
        let end = self.loaded().await?.length;
        self.sync(end).await
    }

    pub(super) async fn finish(self: &Arc<Self>) -> io::Result<u64> {
        let turn = Arc::clone(&self.syncing).lock_owned().await;
        let mut written = self.loaded().await?;
        let log = Arc::clone(self);
        blocking(move || {
            let _turn = turn;
            log.finish_now(&mut written)
        })
        .await
    }

    pub(super) async fn read(self: &Arc<Self>, offset: u64, max: usize) -> io::Result<Vec<u8>> {
        let length = self.follow().await?.borrow().length;
        let available = usize::try_from(length.saturating_sub(offset)).unwrap_or(usize::MAX);
        let wanted = available.min(max);
        if wanted == 0 {
            return Ok(Vec::new());
        }
        let path = self.path.clone();
        blocking(move || {
            let mut bytes = vec![0; wanted];
            File::open(path)?.read_exact_at(&mut bytes, offset)?;
            Ok(bytes)
        })
        .await
    }

    pub(super) async fn follow(self: &Arc<Self>) -> io::Result<watch::Receiver<Progress>> {
        // Subscribed first, so that the log is not forgotten meanwhile.
        let progress = self.progress.subscribe();
        drop(self.loaded().await?);
        Ok(progress)
    }

    async fn loaded(self: &Arc<Self>) -> io::Result<OwnedMutexGuard<Written>> {
        if self.has_failed() {
            return Err(failed());
        }
        let mut written = Arc::clone(&self.state).lock_owned().await;
        if written.loaded {
            return Ok(written);
        }
        let log = Arc::clone(self);
        blocking(move || {
            log.load_now(&mut written)?;
            Ok(written)
        })
        .await
    }

    fn load_now(&self, written: &mut Written) -> io::Result<()> {
        let file = match OpenOptions::new().read(true).write(true).open(&self.path) {
            Ok(file) => Some(file),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(error),
        };
        let end = match fs::read_to_string(&self.end_path) {
            Ok(text) => Some(text.trim_end().parse::<u64>().map_err(io::Error::other)?),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(error),
        };
        let length = match &file {
            None => 0,
            Some(file) => {
                let length = file.metadata()?.len();
                let whole = match end {
                    Some(_) => length,
                    None => sound_length(file, length)?,
                };
                if whole < length {
                    tracing::warn!(path = %self.path.display(), length, whole,
                        "cutting off what a lost write left");
                    file.set_len(whole)?;
                }
                if end.is_none() {
                    // What a killed process wrote may not be durable yet.
                    file.sync_all()?;
                    durable::sync_directory(&self.directory)?;
                    durable::sync_parent(&self.directory)?;
                }
                whole
            }
        };
        if end.is_some_and(|end| end != length) {
            let what = format!("the log has {length} bytes, and was finished with {end:?}");
            return Err(io::Error::new(io::ErrorKind::InvalidData, what));
        }
        written.file = file.map(Arc::new);
        written.length = length;
        written.state = if end.is_some() { State::Finished } else { State::Growing };
        written.loaded = true;
        self.progress.send_replace(Progress { length, state: written.state });
        Ok(())
    }

    fn write_now(
        &self,
        written: &mut Written,
        offset: u64,
        bytes: &[u8],
        limit: u64,
    ) -> Result<(), AppendError> {
        if offset > written.length {
            return Err(AppendError::Gap { expected: written.length });
        }
        let there = usize::try_from(written.length - offset).unwrap_or(usize::MAX);
        let (repeated, new) = bytes.split_at(bytes.len().min(there));
        if !repeated.is_empty() {
            let file = self.file(written).map_err(AppendError::Io)?;
            compare(&file, offset, repeated)?;
        }
        if new.is_empty() {
            return Ok(());
        }
        if written.state == State::Finished {
            return Err(AppendError::Finished { length: written.length });
        }
        if written.length.saturating_add(new.len() as u64) > limit {
            return Err(AppendError::TooLarge { limit });
        }
        if let Some(zero) = new.iter().position(|byte| *byte == 0) {
            return Err(AppendError::ZeroByte { at: written.length + zero as u64 });
        }
        let file = self.file(written).map_err(AppendError::Io)?;
        // If this fails midway (a full disk), the length stays and the next append overwrites.
        file.write_all_at(new, written.length).map_err(AppendError::Io)?;
        written.length += new.len() as u64;
        Ok(())
    }

    fn sync_now(&self, file: Option<Arc<File>>, length: u64) -> io::Result<u64> {
        if self.has_failed() {
            return Err(failed());
        }
        if let Some(file) = file
            && let Err(error) = file.sync_data()
        {
            self.failed.store(true, Ordering::SeqCst);
            return Err(error);
        }
        self.progress.send_if_modified(|progress| {
            let moved = progress.length < length;
            progress.length = progress.length.max(length);
            moved
        });
        Ok(self.progress.borrow().length)
    }

    fn finish_now(&self, written: &mut Written) -> io::Result<u64> {
        let length = self.sync_now(written.file.clone(), written.length)?;
        if written.state == State::Growing {
            durable::create_private_directory(&self.directory)?;
            durable::replace(&self.end_path, format!("{length}\n").as_bytes())?;
            written.state = State::Finished;
            self.progress.send_replace(Progress { length, state: State::Finished });
        }
        Ok(length)
    }

    /// Returns the file, opened or created.
    fn file(&self, written: &mut Written) -> io::Result<Arc<File>> {
        if let Some(file) = &written.file {
            return Ok(Arc::clone(file));
        }
        let open = || OpenOptions::new().read(true).write(true).open(&self.path);
        let file = match open() {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound && written.length == 0 => {
                durable::create_private_directory(&self.directory)?;
                let file = OpenOptions::new()
                    .read(true)
                    .write(true)
                    .create_new(true)
                    .mode(0o600)
                    .open(&self.path)?;
                durable::sync_directory(&self.directory)?;
                file
            }
            Err(error) => return Err(error),
        };
        let file = Arc::new(file);
        written.file = Some(Arc::clone(&file));
        Ok(file)
    }
}

/// Returns the length up to the first zero byte near the end.
fn sound_length(file: &File, length: u64) -> io::Result<u64> {
    let mut at = length.saturating_sub(DOUBTFUL);
    let mut buffer = vec![0; COMPARE];
    while at < length {
        let size = buffer.len().min(usize::try_from(length - at).unwrap_or(usize::MAX));
        let chunk = &mut buffer[..size];
        file.read_exact_at(chunk, at)?;
        if let Some(zero) = chunk.iter().position(|byte| *byte == 0) {
            return Ok(at + zero as u64);
        }
        at += size as u64;
    }
    Ok(length)
}

fn compare(file: &File, offset: u64, bytes: &[u8]) -> Result<(), AppendError> {
    let mut buffer = vec![0; bytes.len().min(COMPARE)];
    let mut at = offset;
    for expected in bytes.chunks(COMPARE) {
        let found = &mut buffer[..expected.len()];
        file.read_exact_at(found, at).map_err(AppendError::Io)?;
        if let Some(index) = found.iter().zip(expected).position(|(a, b)| a != b) {
            return Err(AppendError::Diverges { at: at + index as u64 });
        }
        at += expected.len() as u64;
    }
    Ok(())
}

fn failed() -> io::Error {
    io::Error::other("an earlier sync of this log failed; the process must be started again")
}

pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    match crate::blocking::spawn(work).await {
        Ok(result) => result,
        Err(error) => Err(io::Error::other(error)),
    }
}
