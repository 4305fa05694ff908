//! A data directory out of a backup.
//!
//! 1. The data directory must be empty or not there yet; the backup must be whole.
//! 2. The files are copied to a hidden directory beside it, each held against its digest, and the
//!    CA's key among them must open under the master key that is here.
//! 3. The records go into a new database, with the versions they had.
//! 4. One commit gives it a new generation, and notes what the first start has to end.
//! 5. Everything is synced; the directory gets its name.
//!
//! A kill before 5 leaves nothing but what the next restore throws away.
//!
//! The new generation is above the backup's and, being the time in milliseconds, above that of
//! every restore before: also of those that are remembered nowhere but by runners.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use latchkey_domain::id::Generation;
use latchkey_domain::time::Timestamp;

use super::manifest::{self, Manifest, Unusable};
use super::records::{self, Records};
use super::{AUTHORITY, BLOBS, LOGS, files};
use crate::app::history::LOST;
use crate::app::restore::{RESTORED, RestoredRecord};
use crate::authority::{Authority, AuthorityError};
use crate::clock::Clock;
use crate::durable;
use crate::seal::{IfMissing, KeyError, MasterKey};
use crate::store::record::encode;
use crate::store::sled::{self, LoadError, OpenError, Options, Sled};
use crate::store::{Batch, CommitError, Expect, Store, Version, keys};

/// What became of a backup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Restored {
    pub manifest: Manifest,
    pub generation: Generation,
}

/// Why nothing was restored. The data directory is as it was.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    #[error(
        "restore into {path}: it is not empty; move it away or name another directory. Stop the \
         control plane first"
    )]
    NotEmpty { path: PathBuf },
    #[error("restore into {path}: it has no name of its own; name a directory")]
    NoName { path: PathBuf },
    #[error("restore into {path}: another restore to there is under way")]
    UnderWay { path: PathBuf },
    #[error(
        "read the backup {path}: {part} {reason}; the backup is damaged or not whole: use another"
    )]
    Damaged { path: PathBuf, part: String, reason: String },
    #[error(
        "read the backup {path}: it has format {found}, and this version knows formats up to {}; \
         use the version of Latchkey that took it, or a later one",
        manifest::FORMAT
    )]
    Newer { path: PathBuf, found: u32 },
    #[error(
        "open the backup with the master key {key}: what it holds was sealed under another one; \
         give the key file that belonged to it (--key-file)"
    )]
    OtherMasterKey { key: PathBuf },
    #[error(transparent)]
    Key(KeyError),
    #[error("use the CA of the backup")]
    Authority(#[source] AuthorityError),
    #[error("make the database")]
    Load(#[source] LoadError<io::Error>),
    #[error("open the new database")]
    Open(#[source] OpenError),
    #[error("begin the new generation")]
    Commit(#[source] CommitError),
    #[error("{attempt} {path}")]
    Io {
        attempt: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

fn failed(attempt: &'static str, path: &Path) -> impl FnOnce(io::Error) -> RestoreError {
    let path = path.to_path_buf();
    move |source| RestoreError::Io { attempt, path, source }
}

/// Makes `data_dir` out of the backup `from`, in a new generation. Does its file work where it is
/// called.
pub async fn restore(
    from: &Path,
    data_dir: &Path,
    key_file: &Path,
    clock: Arc<dyn Clock>,
) -> Result<Restored, RestoreError> {
    if data_dir.symlink_metadata().is_ok() && !files::is_empty_directory(data_dir) {
        return Err(RestoreError::NotEmpty { path: data_dir.to_path_buf() });
    }
    let manifest = read_manifest(from)?;
    check_sum(from, files::NAME, &manifest.files.sha256)?;
    check_sum(from, records::NAME, &manifest.records.sha256)?;
    let master = MasterKey::open(key_file, IfMissing::Refuse).map_err(RestoreError::Key)?;

    let partial = files::beside(data_dir, "restoring")
        .ok_or_else(|| RestoreError::NoName { path: data_dir.to_path_buf() })?;
    let _locked = files::claim(&partial)
        .map_err(failed("prepare", &partial))?
        .ok_or_else(|| RestoreError::UnderWay { path: data_dir.to_path_buf() })?;
    copy_files(from, &partial, manifest.files.count)?;
    let authority = partial.join(AUTHORITY);
    Authority::open(&authority, &master, Arc::clone(&clock)).map_err(|error| match error {
        AuthorityError::OtherMasterKey => {
            RestoreError::OtherMasterKey { key: key_file.to_path_buf() }
        }
        error @ (AuthorityError::Io { .. } | AuthorityError::Unusable(_)) => {
            RestoreError::Authority(error)
        }
    })?;
    let options = Options::new(partial.join("store"));
    load(from, &options, &manifest)?;
    let generation = begin(&options, &manifest, clock.now()).await?;

    durable::sync_directory(&partial).map_err(failed("sync", &partial))?;
    fs::rename(&partial, data_dir).map_err(failed("give its name to", data_dir))?;
    durable::sync_parent(data_dir).map_err(failed("sync", data_dir))?;
    Ok(Restored { manifest, generation })
}

fn read_manifest(from: &Path) -> Result<Manifest, RestoreError> {
    let path = from.to_path_buf();
    Manifest::read(from).map_err(|error| match error {
        Unusable::Io(error) if error.kind() == io::ErrorKind::NotFound => {
            damaged(from, manifest::NAME, "or its digest is not there")
        }
        Unusable::Io(source) => RestoreError::Io { attempt: "read", path, source },
        Unusable::Damaged(part, reason) => damaged(from, part, reason),
        Unusable::Newer(found) => RestoreError::Newer { path, found },
    })
}

fn damaged(from: &Path, part: &str, reason: impl Into<String>) -> RestoreError {
    let (path, part) = (from.to_path_buf(), part.to_owned());
    RestoreError::Damaged { path, part, reason: reason.into() }
}

fn check_sum(from: &Path, name: &str, expected: &str) -> Result<(), RestoreError> {
    let path = from.join(name);
    let (_, found) = files::sum(&path).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => damaged(from, name, "is not there"),
        _ => failed("read", &path)(error),
    })?;
    if found == expected {
        return Ok(());
    }
    Err(damaged(from, name, "has not the digest that the manifest says"))
}

fn copy_files(from: &Path, to: &Path, count: u64) -> Result<(), RestoreError> {
    let places = [BLOBS, LOGS, AUTHORITY];
    for place in places {
        durable::create_private_directory(&to.join(place)).map_err(failed("create", to))?;
    }
    let list = from.join(files::NAME);
    let mut directory = None;
    let mut copied = 0;
    for entry in files::entries(from).map_err(failed("read", &list))? {
        let entry = entry.map_err(failed("read", &list))?;
        let part = entry.path.to_string_lossy();
        if !entry.is_within(&places) {
            return Err(damaged(from, &part, "lies where no file of a backup does"));
        }
        let (original, copy) = (from.join(&entry.path), to.join(&entry.path));
        let parent = copy.parent().map(Path::to_path_buf);
        if parent != directory {
            sync(directory.take())?;
            if let Some(parent) = &parent {
                files::create_directories(to, parent).map_err(failed("create", parent))?;
            }
            directory = parent;
        }
        let sum = files::copy(&original, &copy, None).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => damaged(from, &part, "is not there"),
            _ => failed("copy", &original)(error),
        })?;
        if sum != (entry.bytes, entry.sha256) {
            return Err(damaged(from, &part, "has not the digest that was listed"));
        }
        copied += 1;
    }
    sync(directory)?;
    if copied == count {
        return Ok(());
    }
    Err(damaged(from, files::NAME, "lists another number of files than the manifest says"))
}

fn sync(directory: Option<PathBuf>) -> Result<(), RestoreError> {
    let Some(directory) = directory else { return Ok(()) };
    durable::sync_directory(&directory).map_err(failed("sync", &directory))
}

fn load(from: &Path, options: &Options, manifest: &Manifest) -> Result<(), RestoreError> {
    let path = from.join(records::NAME);
    let mut count = 0;
    let records = Records::open(&path).map_err(failed("read", &path))?.inspect(|_| count += 1);
    sled::load(options, Version::new(manifest.version), records).map_err(RestoreError::Load)?;
    if count == manifest.records.count {
        return Ok(());
    }
    Err(damaged(from, records::NAME, "has another number of records than the manifest says"))
}

/// Step 4.
async fn begin(
    options: &Options,
    manifest: &Manifest,
    now: Timestamp,
) -> Result<Generation, RestoreError> {
    let store = Sled::open(options).map_err(RestoreError::Open)?;
    let now_number = u64::try_from(now.as_millis()).unwrap_or(0);
    let generation = Generation::new(now_number.max(manifest.generation.saturating_add(1)));
    let note = RestoredRecord {
        from_generation: manifest.generation,
        taken_at: manifest.time.clone(),
        restored_at: now.into(),
    };
    let batch = Batch::new()
        .put(keys::generation(), Expect::Anything, encode(&generation.get()))
        .put(keys::setting(RESTORED), Expect::Anything, encode(&note))
        .delete(keys::setting(LOST), Expect::Anything);
    store.commit(batch).await.map_err(RestoreError::Commit)?;
    Ok(generation)
}
