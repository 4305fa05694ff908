//! Backup and restore of all that a control plane keeps.
//!
//! ```text
//! <backup>/manifest.json       what this is: generation, version, time, counts, digests
//! <backup>/manifest.sha256     the manifest's digest, as `sha256sum -c` reads it
//! <backup>/manifest.mac        its digest under the master key: that we wrote it
//! <backup>/records             every record as of one version
//! <backup>/files               path, size and digest of each file below, a line each
//! <backup>/blobs/..., logs/..., authority/...     as in the data directory
//! ```
//!
//! [`take`] works while the control plane runs, and holds up nobody: the records are a snapshot
//! of the store ([`crate::store::Snapshot`]), blobs are kept from deletion until they are copied,
//! and a log is copied up to what of it is durable. What never changes again (blobs, finished
//! logs) is linked where the file system can; everything else is copied. A backup gets its name
//! when it is whole and synced.
//!
//! It holds what the data directory holds: secrets, sealed under the master key. The key itself
//! is no part of it, or whoever finds a backup could open it. Nor can whoever may write to where
//! backups are kept change one unseen: the manifest has a digest of everything, and is itself
//! digested under the master key.
//!
//! [`restore`] makes a data directory of a backup, in a new generation. What the restore ends is
//! ended by the first start ([`crate::app`]'s `restore`).

mod files;
mod manifest;
mod records;
mod restore;
pub mod socket;
#[cfg(test)]
mod tests;

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use latchkey_domain::id::RunId;
use latchkey_domain::policy::Phase;
use latchkey_domain::time::Timestamp;

use self::files::Listing;
pub use self::manifest::Manifest;
use self::manifest::Sum;
pub(crate) use self::restore::refuse_in_part;
pub use self::restore::{Named, Person, Plan, RestoreError, Restored, Returned, restore};
use crate::blobs::Blobs;
use crate::durable;
use crate::run_log::{RunLogs, State};
use crate::seal::MasterKey;
use crate::store::{Store, StoreError};

/// What of a data directory is copied file by file. The records are not.
const BLOBS: &str = "blobs";
const LOGS: &str = "logs";
const AUTHORITY: &str = "authority";

/// What a backup is taken of.
#[derive(Clone, Copy)]
pub struct Source<'a> {
    pub data_dir: &'a Path,
    pub store: &'a dyn Store,
    pub logs: &'a RunLogs,
    /// Absent when no control plane runs, so that nothing is deleted.
    pub blobs: Option<&'a Blobs>,
    pub master: &'a MasterKey,
}

impl std::fmt::Debug for Source<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Source").field("data_dir", &self.data_dir).finish_non_exhaustive()
    }
}

/// Why there is no backup. What was begun is thrown away by the next.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    #[error("write the backup to {path}: it exists; name a directory that does not")]
    Exists { path: PathBuf },
    #[error("write the backup to {path}: it lies within the data directory; name another place")]
    WithinData { path: PathBuf },
    #[error("write the backup to {path}: another backup to there is under way")]
    UnderWay { path: PathBuf },
    #[error("read the records")]
    Store(#[from] StoreError),
    #[error("find the number of the history among the records: the store is damaged")]
    NoGeneration,
    #[error("{attempt} {path}")]
    Io {
        attempt: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

fn failed(attempt: &'static str, path: &Path) -> impl FnOnce(io::Error) -> BackupError {
    let path = path.to_path_buf();
    move |source| BackupError::Io { attempt, path, source }
}

/// Takes a backup. Does its file work where it is called: on a thread of its own beside others.
pub async fn take(source: Source<'_>, to: &Path, now: Timestamp) -> Result<Manifest, BackupError> {
    let exists = || BackupError::Exists { path: to.to_path_buf() };
    if to.symlink_metadata().is_ok() && !files::is_empty_directory(to) {
        return Err(exists());
    }
    if to.starts_with(source.data_dir) {
        return Err(BackupError::WithinData { path: to.to_path_buf() });
    }
    let partial = files::beside(to, "partial").ok_or_else(exists)?;
    let _locked = files::claim(&partial)
        .map_err(failed("prepare", &partial))?
        .ok_or_else(|| BackupError::UnderWay { path: to.to_path_buf() })?;

    // From before the snapshot on, so that what its records name stays.
    let held = match source.blobs {
        Some(blobs) => Some(blobs.hold().await),
        None => None,
    };
    let snapshot = source.store.snapshot().await?;
    let version = snapshot.version();
    let (records, generation) = records::write(snapshot, &partial.join(records::NAME)).await?;
    let mut listing = Listing::create(&partial).map_err(failed("write", &partial))?;
    copy_blobs(source.data_dir, &mut listing)?;
    drop(held);
    copy_logs(source, &mut listing).await?;
    copy_authority(source.data_dir, &mut listing)?;
    let files = listing.finish().map_err(failed("write", &partial))?;

    let manifest = Manifest::new(generation, version, now, records, files);
    manifest.write(&partial, source.master).map_err(failed("write", &partial))?;
    fs::rename(&partial, to).map_err(failed("give its name to", to))?;
    durable::sync_parent(to).map_err(failed("sync", to))?;
    Ok(manifest)
}

fn copy_blobs(data_dir: &Path, listing: &mut Listing) -> Result<(), BackupError> {
    let directory = data_dir.join(BLOBS);
    for organization in entries(&directory)? {
        // Uploads on their way are not blobs yet.
        if organization == "temporary" {
            continue;
        }
        let within = Path::new(BLOBS).join(&organization);
        let names = entries(&directory.join(&organization))?;
        let blobs = names.iter().map(|name| within.join(name)).collect::<Vec<_>>();
        for path in &blobs {
            let from = data_dir.join(path);
            listing.link(&from, path).map_err(failed("copy", &from))?;
        }
    }
    Ok(())
}

async fn copy_logs(source: Source<'_>, listing: &mut Listing) -> Result<(), BackupError> {
    let directory = source.data_dir.join(LOGS);
    for name in entries(&directory)? {
        let Ok(run) = name.parse::<RunId>() else { continue };
        for phase in Phase::ALL {
            let file = |kind: &str| Path::new(LOGS).join(&name).join(format!("{phase}.{kind}"));
            let (log, end) = (file("log"), file("end"));
            let from = source.data_dir.join(&log);
            let finished = source.data_dir.join(&end);
            if finished.exists() {
                if from.exists() {
                    listing.link(&from, &log).map_err(failed("copy", &from))?;
                }
                listing.link(&finished, &end).map_err(failed("copy", &finished))?;
            } else if from.exists() {
                let progress = source.logs.progress(run, phase).await;
                let progress = progress.map_err(failed("read", &from))?;
                listing.copy(&from, &log, Some(progress.length)).map_err(failed("copy", &from))?;
                if progress.state == State::Finished {
                    listing.link(&finished, &end).map_err(failed("copy", &finished))?;
                }
            }
        }
    }
    Ok(())
}

fn copy_authority(data_dir: &Path, listing: &mut Listing) -> Result<(), BackupError> {
    for name in entries(&data_dir.join(AUTHORITY))? {
        let path = Path::new(AUTHORITY).join(name);
        let from = data_dir.join(&path);
        listing.copy(&from, &path, None).map_err(failed("copy", &from))?;
    }
    Ok(())
}

/// Returns the names in a directory, sorted.
fn entries(directory: &Path) -> Result<Vec<String>, BackupError> {
    let names = || {
        let mut names = Vec::new();
        for entry in fs::read_dir(directory)? {
            let name = entry?.file_name();
            let name = name.into_string().map_err(|_| io::Error::other("a name is not ours"))?;
            names.push(name);
        }
        names.sort_unstable();
        io::Result::Ok(names)
    };
    names().map_err(failed("list", directory))
}

fn sync_file(file: &File) -> io::Result<()> {
    file.sync_all()
}
