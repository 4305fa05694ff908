//! All records as of one version, read while commits go on.
//!
//! A reader goes through the keys in order, page by page. What a commit is about to change ahead
//! of it, the writer keeps for it as it was; each page is what is applied now, with what was kept
//! put back. So a commit waits for one page at most, and memory is bounded by what changes ahead
//! of the reader, not by what there is.
//!
//! A page may hold records that are no longer in the database ([`archive`](super::archive)). Which
//! those are is known under the lock, they are read after it. What was sealed since the snapshot
//! began, though it came after it, was kept as absent, like anything else.
//!
//! Locks are taken in one order: `applied`, the list of snapshots, a snapshot's own.

use std::collections::BTreeMap;
use std::ops::Bound::{Excluded, Included, Unbounded};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::super::{BoxFuture, Key, Order, Snapshot, StoreError, Version, Versioned};
use super::Shared;
use super::found::{Found, Limit};

/// Bounds of a page: how long a commit may have to wait for it.
const PAGE: usize = 256;
const PAGE_BYTES: usize = 1024 * 1024;

/// The first byte that is not of the adapter's own records.
const FIRST: [u8; 1] = [1];

/// The snapshots under way. Added to under `applied`, so that none begins within a group.
#[derive(Default)]
pub(super) struct Snapshots(Mutex<Vec<Weak<Mutex<Position>>>>);

/// How far one snapshot has come.
#[derive(Default)]
struct Position {
    /// The last key that was handed out, or passed over; changed by the reader.
    passed: Option<Key>,
    /// What has changed behind it since, as it was; added to by the writer.
    kept: Kept,
}

type Kept = BTreeMap<Key, Option<Versioned>>;

impl Snapshots {
    /// Keeps the records of these keys for whoever has not read them yet. Called with `applied`
    /// held for writing, before they change.
    pub(super) fn keep<'a>(
        &self,
        shared: &Shared,
        keys: impl Iterator<Item = &'a Key> + Clone,
    ) -> Result<(), StoreError> {
        let mut snapshots = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if snapshots.is_empty() {
            return Ok(());
        }
        snapshots.retain(|position| position.strong_count() > 0);
        for position in snapshots.iter().filter_map(Weak::upgrade) {
            let mut position = lock(&position);
            for key in keys.clone() {
                let passed = position.passed.as_ref().is_some_and(|passed| key <= passed);
                if !passed && !position.kept.contains_key(key) {
                    let found = shared.fetch_applied(key)?;
                    position.kept.insert(key.clone(), found);
                }
            }
        }
        Ok(())
    }
}

/// The reader of one snapshot.
pub(super) struct Reading {
    shared: Arc<Shared>,
    version: Version,
    position: Arc<Mutex<Position>>,
    ended: bool,
    /// Why a page could not be read: those behind it would hide that it is missing.
    failed: Option<StoreError>,
}

impl Reading {
    pub(super) fn begin(shared: Arc<Shared>) -> Self {
        let position = Arc::new(Mutex::new(Position::default()));
        let version = {
            let applied = shared.applied.read().unwrap_or_else(PoisonError::into_inner);
            let mut snapshots = shared.snapshots.0.lock().unwrap_or_else(PoisonError::into_inner);
            snapshots.push(Arc::downgrade(&position));
            applied.version
        };
        Self { shared, version: Version(version), position, ended: false, failed: None }
    }

    fn page(&mut self) -> Result<Vec<(Key, Versioned)>, StoreError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        while !self.ended {
            let page = self.read().inspect_err(|error| self.failed = Some(error.clone()))?;
            if !page.is_empty() {
                return Ok(page);
            }
        }
        Ok(Vec::new())
    }

    fn read(&mut self) -> Result<Vec<(Key, Versioned)>, StoreError> {
        let (found, kept) = self.find()?;
        let found = self.shared.read_found(found, Order::Ascending)?;
        let mut page: BTreeMap<Key, Versioned> = found.into_iter().collect();
        for (key, was) in kept {
            match was {
                Some(record) => page.insert(key, record),
                None => page.remove(&key),
            };
        }
        Ok(page.into_iter().collect())
    }

    /// Finds the next page, and takes what was kept for it.
    fn find(&mut self) -> Result<(Vec<Found>, Kept), StoreError> {
        let shared = &self.shared;
        let _applied = shared.applied.read().unwrap_or_else(PoisonError::into_inner);
        let mut position = lock(&self.position);
        let low = match &position.passed {
            Some(passed) => Excluded(passed.as_bytes().to_vec()),
            None => Included(FIRST.to_vec()),
        };
        let limit = Limit { records: PAGE, bytes: PAGE_BYTES };
        let page = shared.find_all((low, Unbounded), Order::Ascending, limit)?;
        let last = page.found.last().filter(|_| page.is_full).map(Found::last_key);
        let kept = match &last {
            Some(last) => {
                let mut ahead = position.kept.split_off(last);
                let own = ahead.remove_entry(last);
                let mut kept = std::mem::replace(&mut position.kept, ahead);
                kept.extend(own);
                kept
            }
            None => std::mem::take(&mut position.kept),
        };
        self.ended = last.is_none();
        position.passed = last;
        Ok((page.found, kept))
    }
}

impl Snapshot for Reading {
    fn version(&self) -> Version {
        self.version
    }

    fn next(&mut self) -> BoxFuture<'_, Result<Vec<(Key, Versioned)>, StoreError>> {
        Box::pin(async move { self.page() })
    }
}

fn lock(position: &Mutex<Position>) -> MutexGuard<'_, Position> {
    position.lock().unwrap_or_else(PoisonError::into_inner)
}
