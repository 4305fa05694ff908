//! Makes a database from records that already have their versions: for a restore.
//!
//! Whoever calls it works in a directory that is given its name only when all is done, so what a
//! kill leaves here is thrown away, not repaired.

use super::open::{self, LAST};
use super::writer::RealDisk;
use super::{OpenError, Options, Version, Versioned, join};
use crate::store::Key;

/// Bounds of one sled batch.
const GROUP: usize = 512;
const GROUP_BYTES: usize = 4 * 1024 * 1024;

/// Why no database was made.
#[derive(Debug, thiserror::Error)]
pub enum LoadError<E: std::error::Error> {
    #[error(transparent)]
    Open(OpenError),
    #[error("write the records")]
    Write(#[source] ::sled::Error),
    /// The records themselves failed.
    #[error(transparent)]
    Records(E),
}

/// Makes a database of these records, whose last commit is `last`, and makes it durable. The note
/// beside it says so too. Blocks. Where a database is already, it is left alone.
pub fn load<E: std::error::Error>(
    options: &Options,
    last: Version,
    records: impl Iterator<Item = Result<(Key, Versioned), E>>,
) -> Result<(), LoadError<E>> {
    let directory = options.directory.as_path();
    let failed = |source| LoadError::Open(OpenError::Io { path: directory.to_path_buf(), source });
    let opened = open::open(options).map_err(LoadError::Open)?;
    if !opened.is_new() {
        return Err(LoadError::Open(OpenError::Foreign { path: directory.to_path_buf() }));
    }
    let mut disk = RealDisk::open(directory).map_err(failed)?;
    let mut batch = ::sled::Batch::default();
    let (mut count, mut bytes) = (0, 0);
    let mut stored = Vec::new();
    for record in records {
        let (key, record) = record.map_err(LoadError::Records)?;
        join(record.version.get(), &record.value, &mut stored);
        bytes += stored.len();
        count += 1;
        batch.insert(key.as_bytes(), stored.as_slice());
        if count == GROUP || bytes >= GROUP_BYTES {
            opened.database.apply_batch(std::mem::take(&mut batch)).map_err(LoadError::Write)?;
            (count, bytes) = (0, 0);
        }
    }
    open::put_format(&mut batch);
    batch.insert(LAST, last.get().to_be_bytes().as_slice());
    opened.database.apply_batch(batch).map_err(LoadError::Write)?;
    open::prepare(&opened, &mut disk, directory).map_err(LoadError::Open)?;
    Ok(())
}
