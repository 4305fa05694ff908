//! Configuration archives, workspaces, plans and states: sealed files, named by the SHA-256 of
//! their plaintext, apart for each organization.
//!
//! ```text
//! <directory>/temporary/<random>            an upload in progress; swept at open
//! <directory>/<organization>/<digest>       a finished blob, sealed (`seal::stream`)
//! ```
//!
//! A blob is written to a temporary file, synced, and only then named; so a name means whole
//! and durable. Equal content has one name: storing it again replaces the file by an equal one,
//! which also heals a damaged one. Nothing here holds a blob in memory but [`Blobs::put`] and
//! [`Blobs::get`], for callers that have small ones.
//!
//! The digest in the name is of the plaintext, so whoever can list the directory can tell
//! whether two blobs of one organization are equal. That is all it tells.

mod reader;
mod sweep;
mod upload;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use latchkey_domain::id::{Digest, OrganizationId};
use tokio::sync::{OwnedRwLockReadGuard, OwnedRwLockWriteGuard, RwLock};

pub use self::reader::BlobReader;
pub use self::sweep::Walk;
pub use self::upload::{Sealed, Upload};
use crate::durable;
use crate::seal::{MasterKey, OpenError, SecretBytes};

/// The sealed files of one control plane.
#[derive(Clone, Debug)]
pub struct Blobs {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    directory: PathBuf,
    master: Arc<MasterKey>,
    /// Held for reading by each deletion, for writing by a backup.
    deletions: Arc<RwLock<()>>,
}

/// While it is held, no blob goes away.
#[derive(Debug)]
#[must_use = "blobs are deleted again as soon as it is dropped"]
pub struct Held(#[expect(dead_code, reason = "held, not used")] OwnedRwLockWriteGuard<()>);

/// While it is held, blobs may be deleted, and no backup begins.
#[derive(Debug)]
pub struct Deleting {
    shared: Arc<Shared>,
    _guard: OwnedRwLockReadGuard<()>,
}

/// Why a blob was not stored or read.
#[derive(Debug, thiserror::Error)]
pub enum BlobError {
    #[error("store a blob above its limit of {limit} bytes")]
    TooLarge { limit: u64 },
    #[error("store a blob: its digest is {found}, not {expected} as announced")]
    WrongDigest { expected: Digest, found: Digest },
    #[error("find the blob {digest}")]
    Missing { digest: Digest },
    /// Restored from the newest backup that has it, or uploaded again.
    #[error("read the blob {digest}: it is damaged")]
    Damaged {
        digest: Digest,
        #[source]
        source: Option<OpenError>,
    },
    #[error("{attempt}")]
    Io {
        attempt: &'static str,
        #[source]
        source: io::Error,
    },
}

impl Blobs {
    /// Opens the directory, creating it if need be, and removes what broken uploads left.
    /// Blocks.
    pub fn open(directory: impl Into<PathBuf>, master: Arc<MasterKey>) -> io::Result<Self> {
        let directory = directory.into();
        durable::create_private_directory(&directory)?;
        let temporary = directory.join(TEMPORARY);
        durable::create_private_directory(&temporary)?;
        for entry in fs::read_dir(&temporary)? {
            fs::remove_file(entry?.path())?;
        }
        let deletions = Arc::default();
        Ok(Self { shared: Arc::new(Shared { directory, master, deletions }) })
    }

    /// Begins to store a blob of at most `limit` bytes. With `expected`, other content is
    /// refused at the end.
    pub async fn begin(
        &self,
        organization: OrganizationId,
        expected: Option<Digest>,
        limit: u64,
    ) -> Result<Upload, BlobError> {
        Upload::begin(Arc::clone(&self.shared), organization, expected, limit).await
    }

    /// Stores a small blob.
    pub async fn put(
        &self,
        organization: OrganizationId,
        bytes: &[u8],
    ) -> Result<Digest, BlobError> {
        let mut upload = self.begin(organization, None, bytes.len() as u64).await?;
        upload.write(bytes).await?;
        upload.finish().await
    }

    /// Begins to read a blob; [`BlobError::Missing`] if it isn't there.
    pub async fn read(
        &self,
        organization: OrganizationId,
        digest: Digest,
    ) -> Result<BlobReader, BlobError> {
        BlobReader::open(Arc::clone(&self.shared), organization, digest).await
    }

    /// Reads a small blob; [`BlobError::TooLarge`] if it is not.
    pub async fn get(
        &self,
        organization: OrganizationId,
        digest: Digest,
        limit: u64,
    ) -> Result<SecretBytes, BlobError> {
        self.get_with(organization, digest, limit, |bytes| bytes).await
    }

    /// Reads a small blob as [`Blobs::get`] does and hands it to `work`, which may take its time:
    /// all of it is one piece of work where it may block.
    pub async fn get_with<T: Send + 'static>(
        &self,
        organization: OrganizationId,
        digest: Digest,
        limit: u64,
        work: impl FnOnce(SecretBytes) -> T + Send + 'static,
    ) -> Result<T, BlobError> {
        reader::whole(Arc::clone(&self.shared), (organization, digest), limit, work).await
    }

    pub async fn exists(
        &self,
        organization: OrganizationId,
        digest: Digest,
    ) -> Result<bool, BlobError> {
        let path = self.shared.path(organization, digest);
        blocking("look for a blob", move || path.try_exists()).await
    }

    /// Keeps every blob until what is answered is dropped, so that those that the records of one
    /// moment name can be copied.
    pub async fn hold(&self) -> Held {
        Held(Arc::clone(&self.shared.deletions).write_owned().await)
    }

    /// Lets the caller delete, unless a backup holds all blobs or waits to: nobody waits for one.
    pub fn may_delete(&self) -> Option<Deleting> {
        let guard = Arc::clone(&self.shared.deletions).try_read_owned().ok()?;
        Some(Deleting { shared: Arc::clone(&self.shared), _guard: guard })
    }
}

impl Deleting {
    /// Removes a blob; absent ones are fine.
    pub async fn delete(
        &self,
        organization: OrganizationId,
        digest: Digest,
    ) -> Result<(), BlobError> {
        let path = self.shared.path(organization, digest);
        blocking("delete a blob", move || match fs::remove_file(&path) {
            Ok(()) => durable::sync_parent(&path),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
        })
        .await
    }
}

const TEMPORARY: &str = "temporary";

impl Shared {
    fn organization(&self, organization: OrganizationId) -> PathBuf {
        self.directory.join(hex::encode(organization.as_bytes()))
    }

    fn path(&self, organization: OrganizationId, digest: Digest) -> PathBuf {
        self.organization(organization).join(digest.to_string())
    }

    fn temporary(&self) -> PathBuf {
        self.directory.join(TEMPORARY).join(uuid::Uuid::new_v4().simple().to_string())
    }
}

/// Names the place that a blob is sealed for. The digest isn't known when sealing begins; it is
/// compared when the blob is read.
fn context(organization: OrganizationId) -> Vec<u8> {
    [b"blob".as_slice(), organization.as_bytes()].concat()
}

/// Runs file operations where they may block.
async fn blocking<T: Send + 'static>(
    attempt: &'static str,
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> Result<T, BlobError> {
    joined(crate::blocking::spawn(work).await).map_err(|source| BlobError::Io { attempt, source })
}

fn joined<T>(result: Result<io::Result<T>, tokio::task::JoinError>) -> io::Result<T> {
    result.unwrap_or_else(|error| Err(io::Error::other(error)))
}

/// Moves a finished file to its name, durably.
fn publish(temporary: &Path, path: &Path) -> io::Result<()> {
    if let Some(parent) = path.parent() {
        durable::create_private_directory(parent)?;
    }
    fs::rename(temporary, path)?;
    durable::sync_parent(path)
}

#[cfg(test)]
mod tests;
