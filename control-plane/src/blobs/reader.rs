//! Reading a blob: each segment is authenticated before it is handed out, and the last one only
//! after the digest of the whole was found to be the name's.

use std::fs::File;
use std::io::{self, Cursor, Read};
use std::sync::Arc;

use aws_lc_rs::digest;
use latchkey_domain::id::{Digest, OrganizationId};

use super::{BlobError, Shared, context, joined};
use crate::blocking;
use crate::seal::stream::{HEADER, Opener, Place, SEGMENT, TAG};
use crate::seal::{OpenError, SecretBytes};

/// The chunks of one blob. A file that was opened can be read to its end even if the blob is
/// deleted meanwhile.
pub struct BlobReader {
    digest: Digest,
    length: u64,
    /// Away while a blocking task works on it; gone at the end and after an error.
    file: Option<Opening>,
}

struct Opening {
    file: File,
    /// Sealed bytes that were not read yet.
    left: u64,
    opener: Opener,
    digest: digest::Context,
}

/// Why reading failed, before the blob is named in it.
enum Failure {
    Missing,
    TooLarge { limit: u64 },
    Io(io::Error),
    Damaged(Option<OpenError>),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        // The file was there in full when it was opened.
        if error.kind() == io::ErrorKind::UnexpectedEof {
            Failure::Damaged(None)
        } else {
            Failure::Io(error)
        }
    }
}

impl From<OpenError> for Failure {
    fn from(error: OpenError) -> Self {
        Failure::Damaged(Some(error))
    }
}

/// Reads a blob of at most `limit` bytes and has it worked on, without waiting in between.
pub(super) async fn whole<T: Send + 'static>(
    shared: Arc<Shared>,
    (organization, digest): (OrganizationId, Digest),
    limit: u64,
    work: impl FnOnce(SecretBytes) -> T + Send + 'static,
) -> Result<T, BlobError> {
    let read = blocking::spawn(move || {
        let (mut file, length) = match Opening::new(&shared, organization, digest) {
            Ok((_, length)) if length > limit => return Ok(Err(Failure::TooLarge { limit })),
            Ok(opened) => opened,
            Err(failure) => return Ok(Err(failure)),
        };
        Ok(file.rest(digest, length).map(work))
    });
    match joined(read.await) {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(failure)) => Err(named(failure, digest)),
        Err(error) => Err(named(Failure::Io(error), digest)),
    }
}

impl BlobReader {
    pub(super) async fn open(
        shared: Arc<Shared>,
        organization: OrganizationId,
        digest: Digest,
    ) -> Result<Self, BlobError> {
        let opened = blocking::spawn(move || Ok(Opening::new(&shared, organization, digest))).await;
        match joined(opened) {
            Ok(Ok((file, length))) => Ok(Self { digest, length, file: Some(file) }),
            Ok(Err(failure)) => Err(named(failure, digest)),
            Err(error) => Err(named(Failure::Io(error), digest)),
        }
    }

    /// Returns how many bytes the blob has.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Returns the next bytes, at most 64 KiB; `None` at the end.
    pub async fn next(&mut self) -> Result<Option<Vec<u8>>, BlobError> {
        let Some(mut file) = self.file.take() else { return Ok(None) };
        let expected = self.digest;
        let read =
            blocking::spawn(move || Ok(file.next(expected).map(|segment| (file, segment)))).await;
        match joined(read) {
            Ok(Ok((file, segment))) => {
                if file.left > 0 {
                    self.file = Some(file);
                }
                // Only a blob without bytes has an empty segment.
                Ok(Some(segment).filter(|segment| !segment.is_empty()))
            }
            Ok(Err(failure)) => Err(named(failure, self.digest)),
            Err(error) => Err(named(Failure::Io(error), self.digest)),
        }
    }
}

impl BlobReader {
    /// Has all that is left read by `work`, in one piece of work that may block: it waits for no
    /// other. What `work` answers counts only if all that it read was authentic.
    pub async fn read_with<T: Send + 'static>(
        self,
        work: impl FnOnce(&mut dyn Read) -> T + Send + 'static,
    ) -> Result<T, BlobError> {
        let Self { digest, file, .. } = self;
        let read = blocking::spawn(move || {
            let mut plain = Plain { digest, file, segment: Cursor::default(), failure: None };
            let answer = work(&mut plain);
            Ok(plain.failure.map_or(Ok(answer), Err))
        })
        .await;
        match joined(read) {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(failure)) => Err(named(failure, digest)),
            Err(error) => Err(named(Failure::Io(error), digest)),
        }
    }
}

/// A blob's plaintext for a reader that blocks.
struct Plain {
    digest: Digest,
    /// Gone at the end and after an error.
    file: Option<Opening>,
    segment: Cursor<Vec<u8>>,
    failure: Option<Failure>,
}

impl Read for Plain {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let read = self.segment.read(buffer)?;
            if read > 0 || buffer.is_empty() {
                return Ok(read);
            }
            let Some(mut file) = self.file.take() else { return Ok(0) };
            match file.next(self.digest) {
                Ok(segment) => self.segment = Cursor::new(segment),
                Err(failure) => {
                    self.failure = Some(failure);
                    return Err(io::Error::other("the blob cannot be read"));
                }
            }
            if file.left > 0 {
                self.file = Some(file);
            }
        }
    }
}

impl std::fmt::Debug for BlobReader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "BlobReader({}, {} bytes)", self.digest, self.length)
    }
}

impl Opening {
    fn new(
        shared: &Shared,
        organization: OrganizationId,
        digest: Digest,
    ) -> Result<(Self, u64), Failure> {
        let mut file = match File::open(shared.path(organization, digest)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(Failure::Missing),
            opened => opened?,
        };
        let size = file.metadata()?.len();
        let left = size.checked_sub(HEADER as u64).ok_or(Failure::Damaged(None))?;
        let segments = left.div_ceil((SEGMENT + TAG) as u64);
        let length = left.checked_sub(segments * TAG as u64).ok_or(Failure::Damaged(None))?;
        if segments == 0 {
            return Err(Failure::Damaged(None));
        }
        let mut header = [0; HEADER];
        file.read_exact(&mut header)?;
        let opener = Opener::new(&shared.master, &context(organization), &header)?;
        let digest = digest::Context::new(&digest::SHA256);
        Ok((Self { file, left, opener, digest }, length))
    }

    fn rest(&mut self, expected: Digest, length: u64) -> Result<SecretBytes, Failure> {
        // Of the final size at once: growing would leave copies behind.
        let capacity = usize::try_from(length).map_err(io::Error::other)?;
        let mut bytes = Vec::with_capacity(capacity);
        while self.left > 0 {
            bytes.extend_from_slice(&self.next(expected)?);
        }
        Ok(SecretBytes::new(bytes))
    }

    fn next(&mut self, expected: Digest) -> Result<Vec<u8>, Failure> {
        let whole = (SEGMENT + TAG) as u64;
        let place = if self.left <= whole { Place::Last } else { Place::Inner };
        let size = self.left.min(whole);
        let mut segment = vec![0; usize::try_from(size).expect("at most a segment")];
        self.file.read_exact(&mut segment)?;
        self.left -= size;
        self.opener.open(&mut segment, place)?;
        self.digest.update(&segment);
        match place {
            Place::Inner => Ok(segment),
            Place::Last if self.digest.clone().finish().as_ref() == expected.as_bytes() => {
                Ok(segment)
            }
            Place::Last => Err(Failure::Damaged(None)),
        }
    }
}

fn named(failure: Failure, digest: Digest) -> BlobError {
    match failure {
        Failure::Missing => BlobError::Missing { digest },
        Failure::TooLarge { limit } => BlobError::TooLarge { limit },
        Failure::Io(source) => BlobError::Io { attempt: "read a blob", source },
        Failure::Damaged(source) => BlobError::Damaged { digest, source },
    }
}
