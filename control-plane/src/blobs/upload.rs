//! Storing a blob: sealed while it arrives, named when it is whole.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use aws_lc_rs::digest;
use latchkey_domain::id::{Digest, OrganizationId};
use zeroize::Zeroize;

use super::{BlobError, Shared, blocking, context, publish};
use crate::seal::stream::{Place, SEGMENT, Sealer};

/// A blob that is being stored. Dropped before [`Upload::finish`], it leaves nothing.
#[derive(Debug)]
pub struct Upload {
    shared: Arc<Shared>,
    organization: OrganizationId,
    expected: Option<Digest>,
    limit: u64,
    length: u64,
    /// Away while a blocking task works on it; gone for good after an error.
    file: Option<Sealing>,
    /// Plaintext that fills no segment yet. A full segment stays here until more comes: it may
    /// be the last.
    pending: Vec<u8>,
}

/// A blob that is whole and durable, but has no name yet. Dropped before [`Sealed::name`], it
/// leaves nothing.
#[derive(Debug)]
pub struct Sealed {
    shared: Arc<Shared>,
    organization: OrganizationId,
    digest: Digest,
    file: Sealing,
}

/// The temporary file.
#[derive(Debug)]
struct Sealing {
    path: PathBuf,
    file: File,
    sealer: Sealer,
    digest: DigestContext,
    kept: Kept,
}

struct DigestContext(digest::Context);

impl std::fmt::Debug for DigestContext {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("DigestContext")
    }
}

/// Whether the temporary file has become a blob.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kept {
    Yes,
    No,
}

impl Upload {
    pub(super) async fn begin(
        shared: Arc<Shared>,
        organization: OrganizationId,
        expected: Option<Digest>,
        limit: u64,
    ) -> Result<Self, BlobError> {
        let for_file = Arc::clone(&shared);
        let file = blocking("create a blob's temporary file", move || {
            Sealing::create(&for_file, organization)
        })
        .await?;
        Ok(Self {
            shared,
            organization,
            expected,
            limit,
            length: 0,
            file: Some(file),
            pending: Vec::with_capacity(SEGMENT),
        })
    }

    /// Takes the next bytes. After an error the upload is over.
    pub async fn write(&mut self, mut bytes: &[u8]) -> Result<(), BlobError> {
        self.length = self.length.saturating_add(bytes.len() as u64);
        if self.length > self.limit {
            self.file = None;
            return Err(BlobError::TooLarge { limit: self.limit });
        }
        while !bytes.is_empty() {
            if self.pending.len() == SEGMENT {
                let segment =
                    std::mem::replace(&mut self.pending, Vec::with_capacity(SEGMENT + 16));
                self.work(move |file| file.write(segment, Place::Inner)).await?;
            }
            let (now, later) = bytes.split_at(bytes.len().min(SEGMENT - self.pending.len()));
            self.pending.extend_from_slice(now);
            bytes = later;
        }
        Ok(())
    }

    /// Names the blob and returns its digest, once it is durable.
    pub async fn finish(self) -> Result<Digest, BlobError> {
        let sealed = self.seal().await?;
        let digest = sealed.digest();
        sealed.name().await?;
        Ok(digest)
    }

    /// Makes the blob whole and durable. It is not to be found yet.
    pub async fn seal(mut self) -> Result<Sealed, BlobError> {
        let segment = std::mem::take(&mut self.pending);
        self.work(move |file| {
            file.write(segment, Place::Last)?;
            file.file.sync_all()
        })
        .await?;
        let file = self.file.take().ok_or_else(over)?;
        let digest = file.digest();
        if let Some(expected) = self.expected
            && expected != digest
        {
            return Err(BlobError::WrongDigest { expected, found: digest });
        }
        let shared = Arc::clone(&self.shared);
        Ok(Sealed { shared, organization: self.organization, digest, file })
    }

    async fn work(
        &mut self,
        work: impl FnOnce(&mut Sealing) -> io::Result<()> + Send + 'static,
    ) -> Result<(), BlobError> {
        let mut file = self.file.take().ok_or_else(over)?;
        let file = blocking("write a blob", move || {
            work(&mut file)?;
            Ok(file)
        })
        .await?;
        self.file = Some(file);
        Ok(())
    }
}

impl Sealed {
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// Names the blob, durably. Equal content that has the name already is replaced.
    pub async fn name(self) -> Result<(), BlobError> {
        let Self { shared, organization, digest, file } = self;
        let path = shared.path(organization, digest);
        blocking("name a blob", move || file.publish(&path)).await
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        self.pending.zeroize();
    }
}

impl Sealing {
    fn create(shared: &Shared, organization: OrganizationId) -> io::Result<Self> {
        let path = shared.temporary();
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path)?;
        let (sealer, header) = Sealer::new(&shared.master, &context(organization));
        let digest = DigestContext(digest::Context::new(&digest::SHA256));
        file.write_all(&header)?;
        Ok(Self { path, file, sealer, digest, kept: Kept::No })
    }

    fn write(&mut self, mut segment: Vec<u8>, place: Place) -> io::Result<()> {
        self.digest.0.update(&segment);
        self.sealer.seal(&mut segment, place);
        self.file.write_all(&segment)
    }

    fn publish(mut self, path: &Path) -> io::Result<()> {
        publish(&self.path, path)?;
        self.kept = Kept::Yes;
        Ok(())
    }

    fn digest(&self) -> Digest {
        let digest = self.digest.0.clone().finish();
        Digest::from_bytes(digest.as_ref().try_into().expect("SHA-256 has 32 bytes"))
    }
}

impl Drop for Sealing {
    fn drop(&mut self) {
        match self.kept {
            Kept::Yes => {}
            // What can't be removed now is swept at the next start.
            Kept::No => drop(fs::remove_file(&self.path)),
        }
    }
}

fn over() -> BlobError {
    let source = io::Error::other("an earlier write failed or was given up");
    BlobError::Io { attempt: "write a blob", source }
}
