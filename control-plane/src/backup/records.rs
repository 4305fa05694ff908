//! The records of a backup: one file, written and read from front to end.
//!
//! Each record: length of the key (2 bytes), key, version (8), length of the value (4), value;
//! numbers are big-endian. The manifest has the file's digest, so none of it is trusted before
//! all of it was read once.

use std::fs::{File, OpenOptions};
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use latchkey_domain::id::Generation;

use super::files::Digesting;
use super::{BackupError, Sum, failed, sync_file};
use crate::store::{KEY_LIMIT, Key, Snapshot, VALUE_LIMIT, Version, Versioned, keys};

pub(super) const NAME: &str = "records";

const BUFFER: usize = 256 * 1024;

/// Writes what a snapshot shows; returns its sum, and the generation that is among it.
pub(super) async fn write(
    mut snapshot: Box<dyn Snapshot>,
    path: &Path,
) -> Result<(Sum, Generation), BackupError> {
    let open = || OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
    let file = open().map_err(failed("create", path))?;
    let mut to = Digesting::new(BufWriter::with_capacity(BUFFER, file));
    let (mut count, mut generation) = (0, None);
    loop {
        let page = snapshot.next().await?;
        if page.is_empty() {
            break;
        }
        for (key, record) in &page {
            if *key == keys::generation() {
                generation = serde_json::from_slice(&record.value).ok().map(Generation::new);
            }
            put(&mut to, key, record).map_err(failed("write", path))?;
            count += 1;
        }
    }
    let (bytes, sha256, buffered) = to.finish();
    let file = buffered.into_inner().map_err(io::IntoInnerError::into_error);
    file.and_then(|file| sync_file(&file)).map_err(failed("sync", path))?;
    let generation = generation.ok_or(BackupError::NoGeneration)?;
    Ok((Sum { count, bytes, sha256 }, generation))
}

fn put(to: &mut impl Write, key: &Key, record: &Versioned) -> io::Result<()> {
    let too_large = |_| io::Error::other("a record is larger than any may be");
    let key = key.as_bytes();
    to.write_all(&u16::try_from(key.len()).map_err(too_large)?.to_be_bytes())?;
    to.write_all(key)?;
    to.write_all(&record.version.get().to_be_bytes())?;
    to.write_all(&u32::try_from(record.value.len()).map_err(too_large)?.to_be_bytes())?;
    to.write_all(&record.value)
}

/// The records of a file, which was found whole.
#[derive(Debug)]
pub(super) struct Records(BufReader<File>);

impl Records {
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        Ok(Self(BufReader::with_capacity(BUFFER, File::open(path)?)))
    }

    fn read(&mut self) -> io::Result<Option<(Key, Versioned)>> {
        let mut length = [0; 2];
        match self.0.read(&mut length[..1])? {
            0 => return Ok(None),
            _ => self.0.read_exact(&mut length[1..])?,
        }
        let key = self.part(u16::from_be_bytes(length).into(), KEY_LIMIT)?;
        // Those are the database's own, and would tell it lies about itself.
        if key.first().is_none_or(|kind| *kind == 0) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a record has no kind"));
        }
        let version = Version::new(u64::from_be_bytes(self.number()?));
        let length = u32::from_be_bytes(self.number()?);
        let value = self.part(length as usize, VALUE_LIMIT)?;
        Ok(Some((Key::from_stored(key), Versioned { version, value })))
    }

    fn number<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut number = [0; N];
        self.0.read_exact(&mut number)?;
        Ok(number)
    }

    fn part(&mut self, length: usize, limit: usize) -> io::Result<Vec<u8>> {
        if length > limit {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a record is too large"));
        }
        let mut part = vec![0; length];
        self.0.read_exact(&mut part)?;
        Ok(part)
    }
}

impl Iterator for Records {
    type Item = io::Result<(Key, Versioned)>;

    fn next(&mut self) -> Option<Self::Item> {
        self.read().transpose()
    }
}
