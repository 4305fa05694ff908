//! A store that forgets: for tests, and as the second adapter that keeps the port honest.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::feed::{Feed, Publisher};
use super::plan::{self, changes, plan};
use super::{
    Batch, BoxFuture, CommitError, Key, Order, Prefix, SCAN_LIMIT, Scan, Snapshot, Store,
    StoreError, Version, Versioned,
};

/// Records in a map.
#[derive(Debug)]
pub struct Memory {
    records: Mutex<Records>,
    publisher: Publisher,
}

#[derive(Debug, Default)]
struct Records {
    /// The version of the last commit; changed by commits only.
    last: u64,
    by_key: BTreeMap<Vec<u8>, Versioned>,
}

impl plan::Records for Records {
    fn look<T>(
        &self,
        key: &Key,
        at: impl FnOnce(Version, &[u8]) -> T,
    ) -> Result<Option<T>, StoreError> {
        let found = self.by_key.get(key.as_bytes());
        Ok(found.map(|found| at(found.version, &found.value)))
    }
}

impl Memory {
    pub fn new() -> Self {
        Self { records: Mutex::default(), publisher: Publisher::new() }
    }

    fn records(&self) -> MutexGuard<'_, Records> {
        self.records.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn commit_now(&self, batch: Batch) -> Result<Version, CommitError> {
        let mut records = self.records();
        let writes = plan(batch, &*records)?;
        records.last += 1;
        let version = Version(records.last);
        let changed = changes(&writes, version);
        for (key, value) in writes {
            match value {
                Some(value) => {
                    let record = Versioned { version, value };
                    records.by_key.insert(key.as_bytes().to_vec(), record);
                }
                None => {
                    records.by_key.remove(key.as_bytes());
                }
            }
        }
        // Under the lock, so that the feed has the order of the commits.
        self.publisher.publish(changed);
        Ok(version)
    }

    fn scan_now(&self, scan: &Scan) -> Vec<(Key, Versioned)> {
        let records = self.records();
        let (low, high) = scan.bounds();
        if Scan::is_empty(&low, &high) {
            return Vec::new();
        }
        let found = records.by_key.range((low, high));
        let own = |(key, record): (&Vec<u8>, &Versioned)| {
            (Key::from_stored(key.as_slice()), record.clone())
        };
        match scan.order {
            Order::Ascending => found.take(scan.capped()).map(own).collect(),
            Order::Descending => found.rev().take(scan.capped()).map(own).collect(),
        }
    }
}

impl Default for Memory {
    fn default() -> Self {
        Self::new()
    }
}

impl Store for Memory {
    fn commit(&self, batch: Batch) -> BoxFuture<'_, Result<Version, CommitError>> {
        Box::pin(async move { self.commit_now(batch) })
    }

    fn fetch<'a>(&'a self, key: &'a Key) -> BoxFuture<'a, Result<Option<Versioned>, StoreError>> {
        Box::pin(async move { Ok(self.records().by_key.get(key.as_bytes()).cloned()) })
    }

    fn scan(&self, scan: Scan) -> BoxFuture<'_, Result<Vec<(Key, Versioned)>, StoreError>> {
        Box::pin(async move { Ok(self.scan_now(&scan)) })
    }

    fn snapshot(&self) -> BoxFuture<'_, Result<Box<dyn Snapshot>, StoreError>> {
        Box::pin(async move {
            let records = self.records();
            let left = records.by_key.clone().into_iter();
            Ok(Box::new(Taken { version: Version(records.last), left }) as Box<dyn Snapshot>)
        })
    }

    fn history(&self) -> Version {
        Version(self.records().last)
    }

    fn newest(&self) -> BoxFuture<'_, Result<Version, StoreError>> {
        Box::pin(async move { Ok(self.history()) })
    }

    fn watch(&self, prefix: Prefix) -> Feed {
        self.publisher.watch(prefix)
    }

    fn failed(&self) -> BoxFuture<'_, Arc<str>> {
        Box::pin(std::future::pending())
    }
}

/// A snapshot: the records as they were, copied.
struct Taken {
    version: Version,
    left: std::collections::btree_map::IntoIter<Vec<u8>, Versioned>,
}

impl Snapshot for Taken {
    fn version(&self) -> Version {
        self.version
    }

    fn next(&mut self) -> BoxFuture<'_, Result<Vec<(Key, Versioned)>, StoreError>> {
        Box::pin(async move {
            let page = self.left.by_ref().take(SCAN_LIMIT);
            Ok(page.map(|(key, record)| (Key::from_stored(key), record)).collect())
        })
    }
}
