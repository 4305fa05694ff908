//! Opening the database: in use, gone, newer, damaged and half made are different answers, and
//! none of them is an empty store.
//!
//! ```text
//! <directory>/lock           locked as long as the store is open
//! <directory>/format         the marker: a database was made here, in this format
//! <directory>/acknowledged   the note: the last version that was known to be durable
//! <directory>/sled/          sled's own
//! <directory>/audit/         audit records that have left the database: [`archive`](super::archive)
//! ```
//!
//! 1. Lock. Only then is it safe to touch what a living process might be writing.
//! 2. If there is a marker, read its version and demand that sled's file is there.
//! 3. Remove leftovers of a kill during open.
//! 4. Open sled. If there is a marker, demand that the database holds the format record that
//!    was made durable before the marker was: a truncated file opens as an empty database.
//! 5. Demand that the database goes as far as the note says. (A copy of the files made while
//!    the store was open may not; a backup and its restore copy no files of sled's.)
//! 6. If there is no marker and the database is empty, write the format record, sync, then write
//!    the marker. A kill between the two is repaired by the next open.

use std::cell::Cell;
use std::fs::{self, File, TryLockError};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Once;
use std::time::Duration;

use super::Options;
use super::writer::Disk;
use crate::durable;

/// The format written here. A larger number in a marker is from a newer Latchkey.
///
/// 1. All records are in the database.
/// 2. Sealed audit records are in files: who doesn't know of them would take the chain for broken.
///    A database of format 1 is one without any, and becomes one of format 2 as it is opened.
const FORMAT: u32 = 2;
/// How long to wait for a store of this process that is closing.
const RELEASE: Duration = Duration::from_secs(10);
const MARKER: &str = "format";
const MARKER_TEXT: &str = "latchkey store ";

/// The adapter's own records, under the kind byte that `keys.rs` leaves to adapters.
const FORMAT_RECORD: &[u8] = b"\0format";
/// The version of the last batch, written by each.
pub(super) const LAST: &[u8] = b"\0last";

/// Why the store was not opened. Nothing was changed in any of these cases.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error(
        "open the database in {path}: another process has it open; stop that one, or use another \
         data directory"
    )]
    InUse { path: PathBuf },
    #[error(
        "find the database that the marker in {path} speaks of; an empty one is never started in \
         its place: restore the data directory from a backup"
    )]
    Gone { path: PathBuf },
    #[error(
        "open the database in {path}: it has format {found}, and this version knows formats up \
         to {FORMAT}; start the version of Latchkey that wrote it, or a later one"
    )]
    Newer { path: PathBuf, found: u32 },
    #[error(
        "open the database in {path}: it is damaged; keep a copy of the directory and restore it \
         from a backup"
    )]
    Damaged {
        path: PathBuf,
        #[source]
        source: Option<::sled::Error>,
    },
    #[error(
        "open the database in {path}: it ends at commit {found}, but {acknowledged} were \
         acknowledged: it is damaged, or an older copy; restore it from a backup"
    )]
    Lost { path: PathBuf, acknowledged: u64, found: u64 },
    #[error(
        "open the audit records in {path}: the file is not there or not whole; put it back as it \
         was, or restore the data directory from a backup"
    )]
    Audit {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("open the database in {path}: it is not Latchkey's; use another data directory")]
    Foreign { path: PathBuf },
    #[error("open the database in {path}")]
    Io {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// Tells whether a store was ever made in this directory, without touching it.
pub fn exists(directory: &Path) -> bool {
    directory.join(MARKER).exists() || directory.join("sled/db").exists()
}

/// A database that is locked and open, but not yet checked for its format record.
pub(super) struct Opened {
    pub(super) database: ::sled::Db,
    pub(super) path: PathBuf,
    pub(super) lock: File,
    /// The format that the marker says, if there is one.
    marked: Option<u32>,
}

impl Opened {
    /// Tells whether nothing was here before.
    pub(super) fn is_new(&self) -> bool {
        self.marked.is_none() && self.database.is_empty()
    }
}

/// Takes steps 1 to 4 up to the opening of sled.
pub(super) fn open(options: &Options) -> Result<Opened, OpenError> {
    let directory = options.directory.as_path();
    let path = database(directory);
    let failed = |source| OpenError::Io { path: directory.to_path_buf(), source };

    durable::create_private_directory(directory).map_err(failed)?;
    let lock = lock(directory)?;
    let marked = read_marker(directory)?;
    let size = match fs::metadata(path.join("db")) {
        Ok(metadata) => metadata.len(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
        Err(error) => return Err(failed(error)),
    };
    if marked.is_some() && size == 0 {
        return Err(OpenError::Gone { path: directory.to_path_buf() });
    }
    durable::create_private_directory(&path).map_err(failed)?;
    if size > 0 && !released(&path.join("db")).map_err(failed)? {
        return Err(OpenError::InUse { path: directory.to_path_buf() });
    }
    sweep(&path).map_err(failed)?;

    let config =
        ::sled::Config::new().path(&path).cache_capacity(options.cache).flush_every_ms(None);
    let damaged = |source| OpenError::Damaged { path: directory.to_path_buf(), source };
    // Sled answers some damage with a panic.
    let database = match quietly(|| catch_unwind(AssertUnwindSafe(|| config.open()))) {
        Ok(Ok(database)) => database,
        Ok(Err(::sled::Error::Io(error))) if is_lock_failure(&error) => {
            return Err(OpenError::InUse { path: directory.to_path_buf() });
        }
        Ok(Err(::sled::Error::Io(error))) => return Err(failed(error)),
        Ok(Err(error)) => return Err(damaged(Some(error))),
        Err(_) => return Err(damaged(None)),
    };
    Ok(Opened { database, path, lock, marked })
}

/// Takes the rest of step 4, and steps 5 and 6; returns the last version.
pub(super) fn prepare(
    opened: &Opened,
    disk: &mut dyn Disk,
    directory: &Path,
) -> Result<u64, OpenError> {
    let path = || directory.to_path_buf();
    let damaged = |source| OpenError::Damaged { path: path(), source };
    let database = &opened.database;
    let read = |key| database.get(key).map_err(|error| damaged(Some(error)));

    let mut is_older = false;
    match read(FORMAT_RECORD)? {
        Some(format) => {
            let format = format.as_ref().try_into().map_err(|_| damaged(None))?;
            let found = u32::from_be_bytes(format);
            if found > FORMAT {
                return Err(OpenError::Newer { path: path(), found });
            }
            is_older = found < FORMAT;
        }
        None if opened.marked.is_some() => return Err(OpenError::Gone { path: path() }),
        None if !database.is_empty() => return Err(OpenError::Foreign { path: path() }),
        None => {
            let mut batch = ::sled::Batch::default();
            put_format(&mut batch);
            batch.insert(LAST, 0_u64.to_be_bytes().as_slice());
            database.apply_batch(batch).map_err(|error| damaged(Some(error)))?;
        }
    }
    let last = read(LAST)?.ok_or_else(|| damaged(None))?;
    let last = u64::from_be_bytes(last.as_ref().try_into().map_err(|_| damaged(None))?);
    let failed = |source| OpenError::Io { path: path(), source };
    let acknowledged = note::read(directory).map_err(failed)?;
    if last < acknowledged {
        return Err(OpenError::Lost { path: path(), acknowledged, found: last });
    }

    // Not before all that refuses: what is refused stays what it was.
    if is_older {
        let mut batch = ::sled::Batch::default();
        put_format(&mut batch);
        database.apply_batch(batch).map_err(|error| damaged(Some(error)))?;
    }
    // What a killed process wrote, and recovery kept, may not be durable yet; it is read now.
    database.flush().map_err(|error| damaged(Some(error)))?;
    disk.sync(last).map_err(failed)?;
    if opened.marked != Some(FORMAT) {
        durable::sync_directory(&opened.path).map_err(failed)?;
        let marker = format!("{MARKER_TEXT}{FORMAT}\n");
        durable::replace(&directory.join(MARKER), marker.as_bytes()).map_err(failed)?;
    }
    Ok(last)
}

pub(super) fn put_format(batch: &mut ::sled::Batch) {
    batch.insert(FORMAT_RECORD, FORMAT.to_be_bytes().as_slice());
}

/// Where sled keeps its files.
pub(super) fn database(directory: &Path) -> PathBuf {
    directory.join("sled")
}

fn lock(directory: &Path) -> Result<File, OpenError> {
    let failed = |source| OpenError::Io { path: directory.to_path_buf(), source };
    let lock = File::options()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(directory.join("lock"))
        .map_err(failed)?;
    match lock.try_lock() {
        Ok(()) => Ok(lock),
        Err(TryLockError::WouldBlock) => Err(OpenError::InUse { path: directory.to_path_buf() }),
        Err(TryLockError::Error(error)) => Err(failed(error)),
    }
}

/// Waits, for a time, until nobody has sled's file locked. A store of this process that was just
/// closed may still have it: sled's threads end after its last handle, and may even write.
fn released(file: &Path) -> io::Result<bool> {
    let file = File::open(file)?;
    let (locked, wait) = std::sync::mpsc::sync_channel(1);
    // In a thread of its own, since waiting for a lock has no limit.
    std::thread::Builder::new()
        .name("store-release".into())
        .spawn(move || locked.send(file.lock().and_then(|()| file.unlock())))?;
    match wait.recv_timeout(RELEASE) {
        Ok(result) => result.map(|()| true),
        Err(_) => Ok(false),
    }
}

/// Returns the format that the marker says, if there is one, and refuses one that is not
/// understood.
fn read_marker(directory: &Path) -> Result<Option<u32>, OpenError> {
    let path = || directory.to_path_buf();
    let text = match fs::read_to_string(directory.join(MARKER)) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(OpenError::Io { path: path(), source }),
    };
    let version = text.strip_prefix(MARKER_TEXT).and_then(|rest| rest.trim_end().parse().ok());
    match version {
        Some(found) if found > FORMAT => Err(OpenError::Newer { path: path(), found }),
        Some(found) => Ok(Some(found)),
        None => Err(OpenError::Damaged { path: path(), source: None }),
    }
}

/// Removes snapshots that a kill left unfinished: complete ones are renamed.
fn sweep(database: &Path) -> io::Result<()> {
    for entry in fs::read_dir(database)? {
        let entry = entry?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.starts_with("snap.") && name.ends_with(".generating") {
            tracing::warn!(file = %name, "removing an unfinished snapshot left by a kill");
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

thread_local! {
    /// Whether this thread's panics are told by an error of ours.
    static QUIET: Cell<bool> = const { Cell::new(false) };
}

/// Runs `work`, whose panic is caught and told in a sentence of our own, without the trace that
/// would hide the sentence. Panics of other threads are printed as ever.
fn quietly<T>(work: impl FnOnce() -> T) -> T {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let printing = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            if !QUIET.get() {
                printing(panic);
            }
        }));
    });
    QUIET.set(true);
    let done = work();
    QUIET.set(false);
    done
}

/// Sled has no error of its own for this.
fn is_lock_failure(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::Other && error.to_string().contains("could not acquire lock")
}

/// The note of how far the database was durable: one number, twice, so that a torn one is known.
pub(super) mod note {
    use std::fs::{self, File};
    use std::io;
    use std::os::unix::fs::{FileExt, OpenOptionsExt};
    use std::path::Path;

    const NAME: &str = "acknowledged";

    pub(in super::super) fn open(directory: &Path) -> io::Result<File> {
        File::options()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(directory.join(NAME))
    }

    pub(in super::super) fn write(note: &File, last: u64) -> io::Result<()> {
        let number = last.to_be_bytes();
        note.write_all_at([number, number].as_flattened(), 0)
    }

    /// Returns the number; zero if there is none, or only a torn one.
    pub(super) fn read(directory: &Path) -> io::Result<u64> {
        let bytes = match fs::read(directory.join(NAME)) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
            Err(error) => return Err(error),
        };
        let number = match bytes.as_chunks::<8>() {
            ([one, two], []) if one == two => u64::from_be_bytes(*one),
            _ => 0,
        };
        Ok(number)
    }
}
