//! Audit records that have left the database, for files of their own.
//!
//! Sled keeps a table of all its pages in memory and reads it at each start, so it is for few
//! records; an organization's audit has no end. So its oldest records, which never change again,
//! are sealed: each full [`SEGMENT`] of them goes to one file ([`segments`](super::segments)).
//!
//! ```text
//! <directory>/audit/<organization>/<first number>
//! ```
//!
//! For each file the database has a record of the adapter's own: how long it is, and its digest.
//! Those of an organization follow each other without a gap, so their number says how far its
//! audit is sealed. Up to there records are read from the files and from nowhere else, whatever
//! the database still has of them; behind it, from the database and from nowhere else, whatever
//! files there are. So a kill at any moment leaves nothing to decide.
//!
//! How far an organization is sealed changes under [`Shared::applied`](super::Shared), held for
//! writing: so a reader, who holds it, sees records in one place while it finds out which those
//! are. It reads the files afterwards, without holding up anybody: they never change.
//!
//! [`archiver`](super::archiver) moves the records.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::num::NonZeroU32;
use std::ops::Bound::{self, Excluded, Included, Unbounded};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};

use latchkey_domain::id::OrganizationId;

use super::segments::{self, Entry, Organization, Range, Segment, SyncFile};
use super::{OpenError, split};
use crate::store::{Key, Order, StoreError, Versioned, keys};

/// Records of one file.
pub(super) const SEGMENT: NonZeroU32 = NonZeroU32::new(4096).expect("it is not zero");

/// Records of one file where faults are laid.
pub(super) const ARMED: NonZeroU32 = NonZeroU32::new(4).expect("it is not zero");

/// Files that are kept open: each has a table of 12 bytes for each of its records.
const OPEN: usize = 16;

/// The adapter's own records about the files.
const ENTRIES: &[u8] = b"\0audit";

const AUDIT: u8 = keys::Kind::Audit as u8;

/// Bounds of keys, as bytes.
pub(super) type Bounds = (Bound<Vec<u8>>, Bound<Vec<u8>>);

/// A stretch of keys, which lies in one place.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Part {
    Live(Bounds),
    Sealed(Stretch),
}

/// Sealed records of one organization, both ends included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stretch {
    pub(super) organization: Organization,
    pub(super) from: u64,
    pub(super) to: u64,
}

impl Stretch {
    pub(super) fn count(&self) -> usize {
        usize::try_from(self.to - self.from + 1).unwrap_or(usize::MAX)
    }

    /// Returns the first records in an order, at most as many; none of none.
    pub(super) fn cut(self, order: Order, most: u64) -> Option<Self> {
        let further = most.checked_sub(1)?;
        Some(match order {
            Order::Ascending => Self { to: self.to.min(self.from.saturating_add(further)), ..self },
            Order::Descending => {
                Self { from: self.from.max(self.to.saturating_sub(further)), ..self }
            }
        })
    }

    pub(super) fn last_key(&self) -> Key {
        key(self.organization, self.to)
    }
}

/// All sealed records.
pub(super) struct Archive {
    directory: PathBuf,
    sync: SyncFile,
    /// Records of a file of an organization that has none yet. Those that have keep theirs.
    size: u32,
    sealed: RwLock<BTreeMap<Organization, Sealed>>,
    /// The files that were read last, the newest at the front.
    open: Mutex<VecDeque<(Organization, u64, Arc<Segment>)>>,
}

/// How far one organization is sealed.
struct Sealed {
    size: u32,
    /// Of each file, from the first on.
    files: Vec<Entry>,
}

impl Sealed {
    fn through(&self) -> u64 {
        self.files.len() as u64 * u64::from(self.size)
    }
}

impl Archive {
    /// Reads from the database what is sealed, and demands that each file is there, whole.
    pub(super) fn open(
        store: &Path,
        database: &::sled::Db,
        size: NonZeroU32,
        sync: SyncFile,
    ) -> Result<Self, OpenError> {
        let size = size.get();
        let directory = directory(store);
        let damaged = |source| OpenError::Damaged { path: store.to_path_buf(), source };
        let mut sealed = BTreeMap::new();
        for found in database.scan_prefix(ENTRIES) {
            let (key, value) = found.map_err(|error| damaged(Some(error)))?;
            let (organization, first) =
                split_place(&key[ENTRIES.len()..]).ok_or_else(|| damaged(None))?;
            let entry = Entry::decode(&value).filter(|entry| entry.count > 0);
            let entry = entry.ok_or_else(|| damaged(None))?;
            let of = sealed
                .entry(organization)
                .or_insert_with(|| Sealed { size: entry.count, files: Vec::new() });
            if first != of.through() + 1 || entry.count != of.size {
                return Err(damaged(None));
            }
            let path = segments::path(&directory, organization, first);
            segments::stat(&path, &entry).map_err(|source| OpenError::Audit { path, source })?;
            of.files.push(entry);
        }
        let (sealed, open) = (RwLock::new(sealed), Mutex::default());
        Ok(Self { directory, sync, size, sealed, open })
    }

    pub(super) fn directory(&self) -> &Path {
        &self.directory
    }

    /// Returns what makes its files durable.
    pub(super) fn sync(&self) -> SyncFile {
        Arc::clone(&self.sync)
    }

    /// Returns the records that the organization's next file would hold.
    pub(super) fn next(&self, organization: Organization) -> Range {
        let sealed = self.sealed();
        let of = sealed.get(&organization);
        let count = of.map_or(self.size, |of| of.size);
        Range { organization, first: of.map_or(0, Sealed::through) + 1, count }
    }

    /// Lists what is sealed, organization by organization.
    pub(super) fn stretches(&self) -> Vec<Stretch> {
        let sealed = self.sealed();
        let whole = |(organization, of): (&Organization, &Sealed)| Stretch {
            organization: *organization,
            from: 1,
            to: of.through(),
        };
        sealed.iter().map(whole).collect()
    }

    /// Goes on to read these records from their file. Called with `applied` held for writing, once
    /// the file and what the database knows of it are durable.
    pub(super) fn add(&self, range: Range, entry: Entry) {
        let mut sealed = self.sealed.write().unwrap_or_else(PoisonError::into_inner);
        let of = sealed
            .entry(range.organization)
            .or_insert_with(|| Sealed { size: range.count, files: Vec::new() });
        of.files.push(entry);
    }

    /// Returns the place of a record that is sealed.
    pub(super) fn place(&self, key: &Key) -> Option<Stretch> {
        let (organization, number) = place(key.as_bytes())?;
        let sealed = self.sealed();
        let through = sealed.get(&organization)?.through();
        let covered = (1..=through).contains(&number);
        covered.then_some(Stretch { organization, from: number, to: number })
    }

    /// Divides what lies within bounds into stretches that lie in one place each, in order. Where
    /// `limit` sealed ones are before it, what follows is wrong: a page ends before.
    pub(super) fn parts(&self, (low, high): Bounds, order: Order, limit: usize) -> Vec<Part> {
        let sealed = self.sealed();
        let organizations = match (least(&low), most(&high)) {
            (Some(least), Some(most)) if least <= most => sealed.range(least..=most),
            _ => return vec![Part::Live((low, high))],
        };
        let stretches = organizations
            .filter_map(|(organization, of)| within(*organization, of.through(), &low, &high));
        let stretches: Vec<Stretch> = match order {
            Order::Ascending => stretches.take(limit).collect(),
            Order::Descending => stretches.rev().take(limit).collect(),
        };
        let mut parts = Vec::new();
        let (mut low, mut high) = (low, high);
        for stretch in stretches {
            let bytes = |number| key(stretch.organization, number).as_bytes().to_vec();
            let (before, behind) = (Excluded(bytes(stretch.from)), Excluded(bytes(stretch.to)));
            match order {
                Order::Ascending => {
                    parts.push(Part::Live((std::mem::replace(&mut low, behind), before)));
                }
                Order::Descending => {
                    parts.push(Part::Live((behind, std::mem::replace(&mut high, before))));
                }
            }
            parts.push(Part::Sealed(stretch));
        }
        parts.push(Part::Live((low, high)));
        parts
    }

    /// Reads sealed records, in ascending order.
    pub(super) fn read(&self, stretch: Stretch) -> Result<Vec<(Key, Versioned)>, StoreError> {
        let Stretch { organization, mut from, to } = stretch;
        let mut records = Vec::new();
        while from <= to {
            let (range, segment) = self.segment(organization, from)?;
            let end = to.min(range.first + u64::from(range.count) - 1);
            let index = |number: u64| u32::try_from(number - range.first);
            let (Ok(low), Ok(high)) = (index(from), index(end)) else {
                return Err(StoreError::Damaged { key: key(organization, from) });
            };
            let found = segment.read(low, high).map_err(|unreadable| {
                let at = range.first + u64::from(unreadable.index);
                self.unreadable(organization, range.first, at, &unreadable.source)
            })?;
            for (number, stored) in (from..).zip(found) {
                let key = key(organization, number);
                let record = split(&key, &stored)?;
                records.push((key, record));
            }
            from = end + 1;
        }
        Ok(records)
    }

    /// Returns the file that holds a sealed record.
    fn segment(
        &self,
        organization: Organization,
        number: u64,
    ) -> Result<(Range, Arc<Segment>), StoreError> {
        let (range, entry) = self
            .find(organization, number)
            .ok_or_else(|| StoreError::Damaged { key: key(organization, number) })?;
        let known = |open: &(Organization, u64, Arc<Segment>)| {
            (open.0, open.1) == (organization, range.first)
        };
        {
            let mut open = self.open_files();
            if let Some(at) = open.iter().position(known)
                && let Some(found) = open.remove(at)
            {
                let segment = Arc::clone(&found.2);
                open.push_front(found);
                return Ok((range, segment));
            }
        }
        let path = segments::path(&self.directory, organization, range.first);
        let segment = Segment::open(&path, range, &entry)
            .map_err(|error| self.unreadable(organization, range.first, number, &error))?;
        let segment = Arc::new(segment);
        let mut open = self.open_files();
        open.retain(|other| !known(other));
        open.push_front((organization, range.first, Arc::clone(&segment)));
        open.truncate(OPEN);
        Ok((range, segment))
    }

    fn find(&self, organization: Organization, number: u64) -> Option<(Range, Entry)> {
        let sealed = self.sealed();
        let of = sealed.get(&organization)?;
        let index = number.checked_sub(1)? / u64::from(of.size);
        let entry = of.files.get(usize::try_from(index).ok()?)?;
        let first = index * u64::from(of.size) + 1;
        Some((Range { organization, first, count: of.size }, *entry))
    }

    /// Tells damage from what keeps this process from reading what may be whole. Neither is final
    /// for the store: nothing else depends on what the file holds.
    fn unreadable(
        &self,
        organization: Organization,
        first: u64,
        number: u64,
        error: &io::Error,
    ) -> StoreError {
        let path = segments::path(&self.directory, organization, first);
        tracing::error!(
            path = %path.display(),
            record = number,
            error = error as &dyn std::error::Error,
            "sealed audit records can't be read"
        );
        let damaged = || StoreError::Damaged { key: key(organization, number) };
        match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::UnexpectedEof | io::ErrorKind::InvalidData => {
                damaged()
            }
            _ if error.raw_os_error() == Some(EIO) => damaged(),
            _ => StoreError::Unreadable {
                reason: format!("read sealed audit records in {}: {error}", path.display()).into(),
            },
        }
    }

    fn sealed(&self) -> RwLockReadGuard<'_, BTreeMap<Organization, Sealed>> {
        self.sealed.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn open_files(&self) -> MutexGuard<'_, VecDeque<(Organization, u64, Arc<Segment>)>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What is said of a sector that can't be read.
const EIO: i32 = 5;

/// Where a store keeps its sealed records.
pub(super) fn directory(store: &Path) -> PathBuf {
    store.join("audit")
}

/// The key under which the database knows of a file.
pub(super) fn entry_key(organization: Organization, first: u64) -> Vec<u8> {
    [ENTRIES, &organization[..], &first.to_be_bytes()].concat()
}

/// The key of an audit record.
pub(super) fn key(organization: Organization, number: u64) -> Key {
    keys::audit(OrganizationId::from_bytes(organization), number)
}

/// Returns whose audit record this is, and its number.
pub(super) fn place(key: &[u8]) -> Option<(Organization, u64)> {
    split_place(key.strip_prefix(&[AUDIT])?)
}

fn split_place(bytes: &[u8]) -> Option<(Organization, u64)> {
    let (organization, number) = bytes.split_first_chunk()?;
    Some((*organization, u64::from_be_bytes(number.try_into().ok()?)))
}

/// Returns the first organization that may have audit records above a bound.
fn least(low: &Bound<Vec<u8>>) -> Option<Organization> {
    match low {
        Unbounded => Some([0; 16]),
        Included(low) | Excluded(low) => match low.split_first() {
            Some((&AUDIT, rest)) => Some(padded(rest)),
            Some((kind, _)) if *kind > AUDIT => None,
            Some(_) | None => Some([0; 16]),
        },
    }
}

/// Returns the last organization that may have audit records below a bound.
fn most(high: &Bound<Vec<u8>>) -> Option<Organization> {
    match high {
        Unbounded => Some([0xff; 16]),
        Included(high) | Excluded(high) => match high.split_first() {
            Some((&AUDIT, rest)) => Some(padded(rest)),
            Some((kind, _)) if *kind > AUDIT => Some([0xff; 16]),
            Some(_) | None => None,
        },
    }
}

/// Returns the smallest array that is not below the bytes, of as many as fit.
fn padded<const N: usize>(bytes: &[u8]) -> [u8; N] {
    let mut array = [0; N];
    let length = bytes.len().min(N);
    array[..length].copy_from_slice(&bytes[..length]);
    array
}

/// Returns what of an organization's first records lies within bounds.
fn within(
    organization: Organization,
    through: u64,
    low: &Bound<Vec<u8>>,
    high: &Bound<Vec<u8>>,
) -> Option<Stretch> {
    let is = |number: u64, bound: &[u8]| key(organization, number).as_bytes() == bound;
    let from = match low {
        Unbounded => 0,
        Included(bound) => first_from(organization, bound)?,
        Excluded(bound) => match first_from(organization, bound)? {
            first if is(first, bound) => first.checked_add(1)?,
            first => first,
        },
    };
    let to = match high {
        Unbounded => through,
        Included(bound) | Excluded(bound) => match first_from(organization, bound) {
            Some(first) if matches!(high, Included(_)) && is(first, bound) => first,
            Some(first) => first.checked_sub(1)?,
            None => through,
        },
    };
    let (from, to) = (from.max(1), to.min(through));
    (from <= to).then_some(Stretch { organization, from, to })
}

/// Returns the first number of an organization's whose key is not below the bytes.
fn first_from(organization: Organization, bytes: &[u8]) -> Option<u64> {
    let prefix = [&[AUDIT][..], &organization].concat();
    match bytes.strip_prefix(prefix.as_slice()) {
        Some(rest) => {
            let number = u64::from_be_bytes(padded(rest));
            if rest.len() > 8 { number.checked_add(1) } else { Some(number) }
        }
        None => (bytes < prefix.as_slice()).then_some(0),
    }
}

#[cfg(test)]
mod tests;
