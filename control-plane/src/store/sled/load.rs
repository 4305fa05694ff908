//! Makes a database from records that already have their versions: for a restore.
//!
//! Whoever calls it works in a directory that is given its name only when all is done, so what a
//! kill leaves here is thrown away, not repaired.
//!
//! Audit records come in the order of their numbers. Each full file of them is written at once
//! ([`archive`](super::archive)), so that the database never has what would have to leave it; the
//! rest goes into the database, and so does all that follows a gap.

use std::path::Path;

use super::archive::{self, entry_key, place};
use super::open::{self, LAST};
use super::segments::{NewSegment, Range, WriteError, sync_file};
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
    #[error(transparent)]
    Seal(#[from] SealError),
    /// The records themselves failed.
    #[error(transparent)]
    Records(E),
}

/// Why audit records did not get their file.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub struct SealError(WriteError);

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
    let archive = archive::directory(directory);
    let mut pending = Pending::new(&opened.database);
    let mut sealing = Sealing::new(&archive, options.segment.get());
    for record in records {
        let (key, record) = record.map_err(LoadError::Records)?;
        let mut stored = Vec::new();
        join(record.version.get(), &record.value, &mut stored);
        if !sealing.takes(&key) {
            for (key, stored) in sealing.leave() {
                pending.insert(key.as_bytes(), stored).map_err(LoadError::Write)?;
            }
        }
        match sealing.add(key, stored)? {
            Added::Kept => {}
            Added::NotOurs(key, stored) => {
                pending.insert(key.as_bytes(), stored).map_err(LoadError::Write)?;
            }
            Added::Sealed(key, entry) => {
                pending.insert(&key, entry).map_err(LoadError::Write)?;
            }
        }
    }
    for (key, stored) in sealing.leave() {
        pending.insert(key.as_bytes(), stored).map_err(LoadError::Write)?;
    }
    let mut batch = pending.batch;
    open::put_format(&mut batch);
    batch.insert(LAST, last.get().to_be_bytes().as_slice());
    opened.database.apply_batch(batch).map_err(LoadError::Write)?;
    open::prepare(&opened, &mut disk, directory).map_err(LoadError::Open)?;
    Ok(())
}

/// What is not in the database yet.
struct Pending<'a> {
    database: &'a ::sled::Db,
    batch: ::sled::Batch,
    count: usize,
    bytes: usize,
}

impl<'a> Pending<'a> {
    fn new(database: &'a ::sled::Db) -> Self {
        Self { database, batch: ::sled::Batch::default(), count: 0, bytes: 0 }
    }

    fn insert(&mut self, key: &[u8], stored: Vec<u8>) -> ::sled::Result<()> {
        self.bytes += stored.len();
        self.count += 1;
        self.batch.insert(key, stored);
        if self.count < GROUP && self.bytes < GROUP_BYTES {
            return Ok(());
        }
        (self.count, self.bytes) = (0, 0);
        self.database.apply_batch(std::mem::take(&mut self.batch))
    }
}

/// Collects an organization's audit until it fills a file.
struct Sealing<'a> {
    archive: &'a Path,
    size: u32,
    /// The records that the file would hold which is being filled. None if those of this
    /// organization are no longer sealed, or none was seen yet.
    range: Option<Range>,
    collected: Vec<(Key, Vec<u8>)>,
}

/// What became of a record.
enum Added {
    Kept,
    NotOurs(Key, Vec<u8>),
    /// It filled a file: what the database has to know of that.
    Sealed(Vec<u8>, Vec<u8>),
}

impl<'a> Sealing<'a> {
    fn new(archive: &'a Path, size: u32) -> Self {
        Self { archive, size, range: None, collected: Vec::new() }
    }

    /// Tells whether the record follows those that are collected.
    fn takes(&self, key: &Key) -> bool {
        let next = |range: &Range| (range.organization, range.first + self.collected.len() as u64);
        place(key.as_bytes()).is_some_and(|place| self.range.as_ref().map(next) == Some(place))
    }

    /// Gives back what was collected: it fills no file.
    fn leave(&mut self) -> Vec<(Key, Vec<u8>)> {
        self.range = None;
        std::mem::take(&mut self.collected)
    }

    fn add(&mut self, key: Key, stored: Vec<u8>) -> Result<Added, SealError> {
        if let Some((organization, 1)) = place(key.as_bytes()) {
            self.range = Some(Range { organization, first: 1, count: self.size });
        }
        let Some(range) = self.range.filter(|_| self.takes(&key)) else {
            return Ok(Added::NotOurs(key, stored));
        };
        self.collected.push((key, stored));
        if self.collected.len() < range.count as usize {
            return Ok(Added::Kept);
        }
        let mut draft = NewSegment::create(self.archive, range, sync_file()).map_err(SealError)?;
        for (_, stored) in self.collected.drain(..) {
            draft.push(&stored).map_err(SealError)?;
        }
        let entry = draft.finish().map_err(SealError)?;
        self.range = Some(Range { first: range.first + u64::from(range.count), ..range });
        Ok(Added::Sealed(entry_key(range.organization, range.first), entry.encode()))
    }
}
