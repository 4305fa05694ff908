//! A data directory out of a backup.
//!
//! 1. The data directory must be empty or not there yet; the backup must be whole.
//! 2. The files are copied to a hidden directory in it ([`place`]), each held against its digest,
//!    and the CA's key among them must open under the master key that is here.
//! 3. The records go into a new database, with the versions they had.
//! 4. One commit gives it a new generation, and notes what the first start has to end.
//! 5. Everything is synced and moved to its place.
//!
//! A kill leaves what no control plane starts on and the next restore throws away.
//!
//! The new generation is above the backup's and, being the time in milliseconds, above that of
//! every restore before: also of those that are remembered nowhere but by runners. Should the
//! clock have been ahead at one of them, a person names the number that it made.

mod place;
mod returned;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use latchkey_domain::id::Generation;
use latchkey_domain::time::Timestamp;

pub(crate) use self::place::refuse_in_part;
use self::place::{Place, STORE};
pub use self::returned::{Named, Person, Returned};
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
use crate::store::{Batch, CommitError, Expect, Store, StoreError, Version, keys};

/// What became of a backup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Restored {
    pub manifest: Manifest,
    pub generation: Generation,
    pub returned: Returned,
}

/// What to restore, and where to.
#[derive(Clone, Copy, Debug)]
pub struct Plan<'a> {
    pub from: &'a Path,
    pub data_dir: &'a Path,
    pub key_file: &'a Path,
    /// A generation that runners have seen; the new one is above it.
    pub above: Option<Generation>,
}

/// Why nothing was restored. The data directory is as it was.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    #[error(
        "restore into {path}: it is not empty; move it away or name another directory. Stop the \
         control plane first"
    )]
    NotEmpty { path: PathBuf },
    #[error(
        "restore into {path}: it belongs to the user {owner}, who could not use what another one \
         makes in it; run this as that user"
    )]
    Owner { path: PathBuf, owner: u32 },
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
    #[error(
        "trust the backup {path}: it was not written with the master key {key}, or was changed \
         since by somebody without it; give the key file that belonged to it (--key-file), or use \
         another backup"
    )]
    Foreign { path: PathBuf, key: PathBuf },
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
    #[error("read who may do what again")]
    Store(#[from] StoreError),
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

/// Makes a data directory out of a backup, in a new generation. Does its file work where it is
/// called.
pub async fn restore(plan: Plan<'_>, clock: Arc<dyn Clock>) -> Result<Restored, RestoreError> {
    let master = MasterKey::open(plan.key_file, IfMissing::Refuse).map_err(RestoreError::Key)?;
    let place = Place::claim(plan.data_dir)?;
    match fill(plan, &master, place.work(), clock).await {
        Ok(restored) => place.move_up().map(|()| restored),
        Err(error) => {
            place.give_up();
            Err(error)
        }
    }
}

/// Steps 2 to 4.
async fn fill(
    plan: Plan<'_>,
    master: &MasterKey,
    work: &Path,
    clock: Arc<dyn Clock>,
) -> Result<Restored, RestoreError> {
    let from = plan.from;
    let manifest = read_manifest(plan, master)?;
    check_sum(from, files::NAME, &manifest.files.sha256)?;
    check_sum(from, records::NAME, &manifest.records.sha256)?;
    copy_files(from, work, manifest.files.count)?;
    let authority = work.join(AUTHORITY);
    Authority::open(&authority, master, Arc::clone(&clock)).map_err(|error| match error {
        AuthorityError::OtherMasterKey => {
            RestoreError::OtherMasterKey { key: plan.key_file.to_path_buf() }
        }
        error @ (AuthorityError::Io { .. } | AuthorityError::Unusable(_)) => {
            RestoreError::Authority(error)
        }
    })?;
    let options = Options::new(work.join(STORE));
    load(from, &options, &manifest)?;
    let (generation, returned) = begin(&options, &manifest, plan.above, clock.now()).await?;
    Ok(Restored { manifest, generation, returned })
}

fn read_manifest(plan: Plan<'_>, master: &MasterKey) -> Result<Manifest, RestoreError> {
    let from = plan.from;
    let path = from.to_path_buf();
    Manifest::read(from, master).map_err(|error| match error {
        Unusable::Io(error) if error.kind() == io::ErrorKind::NotFound => {
            damaged(from, manifest::NAME, "or a digest of it is not there")
        }
        Unusable::Io(source) => RestoreError::Io { attempt: "read", path, source },
        Unusable::Damaged(part, reason) => damaged(from, part, reason),
        Unusable::Newer(found) => RestoreError::Newer { path, found },
        Unusable::Foreign => RestoreError::Foreign { path, key: plan.key_file.to_path_buf() },
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
    above: Option<Generation>,
    now: Timestamp,
) -> Result<(Generation, Returned), RestoreError> {
    let store = Sled::open(options).map_err(RestoreError::Open)?;
    let now_number = u64::try_from(now.as_millis()).unwrap_or(0);
    let known = manifest.generation.max(above.map_or(0, Generation::get));
    let generation = Generation::new(now_number.max(known.saturating_add(1)));
    let returned = returned::read(&store).await?;
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
    Ok((generation, returned))
}
