//! What a reader finds, before the sealed part of it is read.
//!
//! 1. While no batch is half applied, and nothing moves: find out what lies in the database, and
//!    take it; note which sealed records belong to the answer. Their numbers have no gaps, so none
//!    has to be read for that.
//! 2. Afterwards, without holding up a commit: read the sealed ones.

use super::archive::{Bounds, Part, Stretch};
use super::{Shared, parts, split};
use crate::store::{Key, Order, Scan, StoreError, Version, Versioned};

/// One record of the database, or several sealed ones.
#[derive(Debug)]
pub(super) enum Found {
    Live(Key, Versioned),
    Sealed(Stretch),
}

impl Found {
    /// The version that must be durable before it may be told.
    pub(super) fn newest(&self) -> u64 {
        match self {
            Found::Live(_, record) => record.version.get(),
            // It was durable before it was sealed.
            Found::Sealed(_) => 0,
        }
    }

    pub(super) fn last_key(&self) -> Key {
        match self {
            Found::Live(key, _) => key.clone(),
            Found::Sealed(stretch) => stretch.last_key(),
        }
    }
}

/// How much to find.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limit {
    pub(super) records: usize,
    /// Of what lies in the database.
    pub(super) bytes: usize,
}

/// What was found, in order.
#[derive(Debug, Default)]
pub(super) struct Page {
    pub(super) found: Vec<Found>,
    /// Whether the limit ended it.
    pub(super) is_full: bool,
}

impl Shared {
    /// Step 1 for one key. Called with `applied` held.
    pub(super) fn find(&self, key: &Key) -> Result<Option<Found>, StoreError> {
        if let Some(stretch) = self.archive.place(key) {
            return Ok(Some(Found::Sealed(stretch)));
        }
        let found = self.database.get(key.as_bytes()).map_err(|error| self.broken(&error))?;
        let live = |stored: ::sled::IVec| Ok(Found::Live(key.clone(), split(key, &stored)?));
        found.map(live).transpose()
    }

    /// Step 1 for a scan. Called with `applied` held.
    pub(super) fn find_all(
        &self,
        bounds: Bounds,
        order: Order,
        limit: Limit,
    ) -> Result<Page, StoreError> {
        let mut page = Page::default();
        let (mut records, mut bytes) = (limit.records, limit.bytes);
        for part in self.archive.parts(bounds, order, limit.records) {
            match part {
                Part::Live((low, high)) if Scan::is_empty(&low, &high) => {}
                Part::Live(bounds) => {
                    let mut live = self.database.range(bounds);
                    while records > 0 && bytes > 0 {
                        let next = match order {
                            Order::Ascending => live.next(),
                            Order::Descending => live.next_back(),
                        };
                        let Some(next) = next else { break };
                        let (key, stored) = next.map_err(|error| self.broken(&error))?;
                        let key = Key::from_stored(key.as_ref());
                        let record = split(&key, &stored)?;
                        records -= 1;
                        bytes = bytes.saturating_sub(stored.len());
                        page.found.push(Found::Live(key, record));
                    }
                }
                Part::Sealed(stretch) => {
                    let most = u64::try_from(records).unwrap_or(u64::MAX);
                    if let Some(stretch) = stretch.cut(order, most) {
                        records = records.saturating_sub(stretch.count());
                        page.found.push(Found::Sealed(stretch));
                    }
                }
            }
            page.is_full = records == 0 || bytes == 0;
            if page.is_full {
                break;
            }
        }
        Ok(page)
    }

    /// Step 2.
    pub(super) fn read_found(
        &self,
        found: Vec<Found>,
        order: Order,
    ) -> Result<Vec<(Key, Versioned)>, StoreError> {
        let mut records = Vec::with_capacity(found.len());
        for found in found {
            match found {
                Found::Live(key, record) => records.push((key, record)),
                Found::Sealed(stretch) => {
                    let sealed = self.archive.read(stretch)?;
                    match order {
                        Order::Ascending => records.extend(sealed),
                        Order::Descending => records.extend(sealed.into_iter().rev()),
                    }
                }
            }
        }
        Ok(records)
    }

    /// Both steps for one key, for who holds `applied` anyway.
    pub(super) fn fetch_applied(&self, key: &Key) -> Result<Option<Versioned>, StoreError> {
        let found = self.find(key)?;
        self.read_one(found)
    }

    /// As [`Shared::fetch_applied`], for who needs no copy.
    pub(super) fn look_applied<T>(
        &self,
        key: &Key,
        at: impl FnOnce(Version, &[u8]) -> T,
    ) -> Result<Option<T>, StoreError> {
        if self.archive.place(key).is_some() {
            let found = self.fetch_applied(key)?;
            return Ok(found.map(|found| at(found.version, &found.value)));
        }
        let found = self.database.get(key.as_bytes()).map_err(|error| self.broken(&error))?;
        let Some(stored) = found else { return Ok(None) };
        let (version, value) = parts(key, &stored)?;
        Ok(Some(at(version, value)))
    }

    /// Step 2 for one key.
    pub(super) fn read_one(&self, found: Option<Found>) -> Result<Option<Versioned>, StoreError> {
        match found {
            Some(Found::Live(_, record)) => Ok(Some(record)),
            Some(Found::Sealed(stretch)) => {
                Ok(self.archive.read(stretch)?.pop().map(|(_, record)| record))
            }
            None => Ok(None),
        }
    }
}
