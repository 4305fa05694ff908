//! The port to the records: versioned batches, once-only writes, ordered scans, a change feed.
//!
//! What an adapter promises, and `conformance.rs` tests for each:
//!
//! - A [`Batch`] is committed whole or not at all. Each write states the version it expects; a
//!   stale writer is told so by [`CommitError::Conflict`] and nothing of its batch remains.
//! - Once means one compare-and-swap whose result is the answer: a put that expects
//!   [`Expect::Absent`] succeeds for exactly one of any number of writers.
//! - `commit` answers only when the batch survives a power loss; `fetch` and `scan` answer only
//!   what does. So whoever has an answer may let it leave the process. A conflict, too, is told
//!   only when that which it conflicts with is durable.
//! - Audit drafts of a batch are stamped into their organization's chain by the committer, in
//!   the same batch ([`crate::audit`]).
//! - A snapshot shows all records as of one version, durable, while commits go on.
//! - The history of a store only grows, and tells nothing that is not durable.
//! - The feed reports commits in their order, after they are durable, without values: a reader
//!   fetches. A reader that lags is told to list again.
//!
//! Nothing here tells of trees or of a single process: with several control planes on one
//! database, a job is still granted by a compare-and-swap.

pub mod feed;
pub mod keys;
pub mod memory;
pub mod record;
pub mod sled;

#[cfg(test)]
mod conformance;
mod plan;

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

pub use self::feed::{Change, Feed, Seen, What};
pub use self::keys::{Key, Prefix};

use crate::audit;

/// The largest record: what is larger belongs into a blob.
pub const VALUE_LIMIT: usize = 64 * 1024;

/// The largest key.
pub const KEY_LIMIT: usize = 1024;

/// The most records that one scan returns, whatever is asked.
pub const SCAN_LIMIT: usize = 1000;

pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// The global sequence number of the commit that wrote a record. Rises from commit to commit,
/// with gaps; never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version(u64);

impl Version {
    pub const fn new(sequence: u64) -> Self {
        Self(sequence)
    }

    pub const fn get(self) -> u64 {
        self.0
    }
}

/// A record and the version it has.
#[derive(Clone, PartialEq, Eq)]
pub struct Versioned {
    pub version: Version,
    pub value: Vec<u8>,
}

impl std::fmt::Debug for Versioned {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Versioned({}, {} bytes)", self.version.0, self.value.len())
    }
}

/// What a writer believes about a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expect {
    Absent,
    At(Version),
    Anything,
}

impl Expect {
    fn holds(self, found: Option<Version>) -> bool {
        match self {
            Expect::Absent => found.is_none(),
            Expect::At(version) => found == Some(version),
            Expect::Anything => true,
        }
    }
}

/// Changes that happen together or not at all.
#[derive(Clone, Debug, Default)]
#[must_use = "a batch does nothing until it is committed"]
pub struct Batch {
    operations: BTreeMap<Key, (Expect, Operation)>,
    told: Vec<audit::Unplaced>,
    /// The first rule that the batch broke while it was built; told by the commit.
    invalid: Option<&'static str>,
}

#[derive(Clone)]
enum Operation {
    Check,
    Put(Vec<u8>),
    Delete,
}

impl std::fmt::Debug for Operation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Operation::Check => f.write_str("Check"),
            Operation::Put(value) => write!(f, "Put({} bytes)", value.len()),
            Operation::Delete => f.write_str("Delete"),
        }
    }
}

impl Batch {
    pub fn new() -> Self {
        Self::default()
    }

    /// Writes a record.
    pub fn put(self, key: Key, expect: Expect, value: impl Into<Vec<u8>>) -> Self {
        let value = value.into();
        let fits = value.len() <= VALUE_LIMIT;
        self.add(key, expect, Operation::Put(value))
            .require(fits, "writes a record above the limit of 64 KiB")
    }

    /// Removes a record. With [`Expect::Anything`] it may be absent.
    pub fn delete(self, key: Key, expect: Expect) -> Self {
        self.add(key, expect, Operation::Delete)
    }

    /// Tells whether the batch says something of a record already; it may do so once.
    pub fn names(&self, key: &Key) -> bool {
        self.operations.contains_key(key)
    }

    /// Makes the batch depend on a record that it doesn't write.
    pub fn check(self, key: Key, expect: Expect) -> Self {
        self.add(key, expect, Operation::Check)
    }

    /// Makes the batch depend on what was read of a record, also where it says something of it
    /// already. One that was made of another version of it has lost the race.
    pub fn rest_on(mut self, key: Key, expect: Expect) -> Result<Self, CommitError> {
        let Some((known, _)) = self.operations.get_mut(&key) else {
            return Ok(self.check(key, expect));
        };
        if *known == Expect::Anything {
            *known = expect;
        }
        if *known == expect { Ok(self) } else { Err(CommitError::Conflict { key }) }
    }

    /// Adds a record to its organization's audit chain.
    pub fn audit(mut self, draft: audit::Draft) -> Self {
        let told = audit::Unplaced::from(draft);
        let fits = told.size() <= VALUE_LIMIT / 2;
        self.told.push(told);
        self.require(fits, "holds an audit record above the limit of 32 KiB")
    }

    /// Refuses a batch that no store takes, before anything is done that cannot be undone.
    pub fn check_valid(&self) -> Result<(), StoreError> {
        self.invalid.map_or(Ok(()), |what| Err(StoreError::Invalid { what }))
    }

    fn add(mut self, key: Key, expect: Expect, operation: Operation) -> Self {
        let own = matches!(key.kind(), None | Some(keys::Kind::Audit | keys::Kind::AuditHead));
        let reads = matches!(operation, Operation::Check);
        let fits = key.as_bytes().len() <= KEY_LIMIT;
        let first = self.operations.insert(key, (expect, operation)).is_none();
        self.require(!own || reads, "writes an audit record itself")
            .require(fits, "names a key above the limit of 1 KiB")
            .require(first, "names a key twice")
    }

    fn require(mut self, holds: bool, otherwise: &'static str) -> Self {
        if !holds {
            self.invalid.get_or_insert(otherwise);
        }
        self
    }

    /// Returns about how many bytes the batch writes.
    fn size(&self) -> usize {
        let records: usize = self
            .operations
            .iter()
            .map(|(key, (_, operation))| {
                key.as_bytes().len()
                    + match operation {
                        Operation::Put(value) => value.len(),
                        Operation::Check | Operation::Delete => 0,
                    }
            })
            .sum();
        records + self.told.iter().map(audit::Unplaced::size).sum::<usize>()
    }
}

/// Why a batch left nothing behind.
#[derive(Clone, Debug, thiserror::Error)]
pub enum CommitError {
    /// The caller reads again and decides anew.
    #[error("commit: the record {key} changed meanwhile")]
    Conflict { key: Key },
    #[error("commit")]
    Store(#[source] StoreError),
}

impl From<StoreError> for CommitError {
    fn from(error: StoreError) -> Self {
        CommitError::Store(error)
    }
}

/// Why the store can't be used, or not in this way.
#[derive(Clone, Debug, thiserror::Error)]
pub enum StoreError {
    /// Final: whether the last batches are durable is unknown, and only a restart, which
    /// recovers from what is on disk, tells.
    #[error("use the store after it failed ({reason}); the process must be started again")]
    Failed { reason: Arc<str> },
    /// Something beside the store kept this call from its records, like too many open files.
    #[error("{reason}; it may go better another time")]
    Unreadable { reason: Arc<str> },
    #[error("read the record {key}: it is damaged")]
    Damaged { key: Key },
    /// A mistake in the calling code.
    #[error("accept a batch that {what}")]
    Invalid { what: &'static str },
}

/// The direction of a scan.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Order {
    #[default]
    Ascending,
    Descending,
}

/// Which records to list.
#[derive(Clone, Debug)]
pub struct Scan {
    pub prefix: Prefix,
    /// Where the last page ended: the scan goes on behind this key, in its order.
    pub after: Option<Key>,
    /// At most [`SCAN_LIMIT`].
    pub limit: usize,
    pub order: Order,
}

impl Scan {
    /// Lists from the first key.
    pub fn ascending(prefix: Prefix, limit: usize) -> Self {
        Self { prefix, after: None, limit, order: Order::Ascending }
    }

    /// Lists from the last key: for run ids, the newest run first.
    pub fn descending(prefix: Prefix, limit: usize) -> Self {
        Self { prefix, after: None, limit, order: Order::Descending }
    }

    /// Goes on behind a key.
    pub fn after(mut self, key: Option<Key>) -> Self {
        self.after = key;
        self
    }

    fn capped(&self) -> usize {
        self.limit.min(SCAN_LIMIT)
    }

    /// Returns the bounds that hold what the scan may return.
    fn bounds(&self) -> (std::ops::Bound<Vec<u8>>, std::ops::Bound<Vec<u8>>) {
        use std::ops::Bound::{Excluded, Included, Unbounded};
        let mut low = Included(self.prefix.as_bytes().to_vec());
        let mut high = self.prefix.end().map_or(Unbounded, Excluded);
        let after = self.after.as_ref().map(Key::as_bytes);
        match (self.order, after) {
            (Order::Ascending, Some(after)) if after >= self.prefix.as_bytes() => {
                low = Excluded(after.to_vec());
            }
            (Order::Descending, Some(after))
                if self.prefix.end().is_none_or(|end| after < end.as_slice()) =>
            {
                high = Excluded(after.to_vec());
            }
            (Order::Ascending | Order::Descending, _) => {}
        }
        (low, high)
    }

    /// Tells whether bounds enclose nothing; ordered maps panic on such.
    fn is_empty(low: &std::ops::Bound<Vec<u8>>, high: &std::ops::Bound<Vec<u8>>) -> bool {
        use std::ops::Bound::{Excluded, Included, Unbounded};
        match (low, high) {
            (Included(low), Included(high)) => low > high,
            (Included(low) | Excluded(low), Excluded(high)) | (Excluded(low), Included(high)) => {
                low >= high
            }
            (Unbounded, _) | (_, Unbounded) => false,
        }
    }
}

/// The records of the control plane.
pub trait Store: Send + Sync + 'static {
    /// Commits a batch, whole or not at all, and answers when it is durable. Once begun it may
    /// be committed even if the caller stops waiting.
    fn commit(&self, batch: Batch) -> BoxFuture<'_, Result<Version, CommitError>>;

    /// Returns a record, once what it says is durable.
    fn fetch<'a>(&'a self, key: &'a Key) -> BoxFuture<'a, Result<Option<Versioned>, StoreError>>;

    /// Returns one page of records, all of one moment, once they are durable.
    fn scan(&self, scan: Scan) -> BoxFuture<'_, Result<Vec<(Key, Versioned)>, StoreError>>;

    /// Begins to read all records as of one version, without holding up commits: for a backup.
    fn snapshot(&self) -> BoxFuture<'_, Result<Box<dyn Snapshot>, StoreError>>;

    /// Returns a version that is known to be durable, without asking anybody: what this process
    /// last learned. It never falls, and is for telling others how far history has come.
    fn history(&self) -> Version;

    /// Returns the version of the last durable commit, whoever made it. For the rare question
    /// whether somebody knows of more than the store does; where several processes share a
    /// database, [`Store::history`] may be behind.
    fn newest(&self) -> BoxFuture<'_, Result<Version, StoreError>>;

    /// Reports every commit from now on that touches the prefix. A reader that must miss
    /// nothing watches first and lists then.
    fn watch(&self, prefix: Prefix) -> Feed;

    /// Resolves when the store has failed for good, so that the process can stop.
    fn failed(&self) -> BoxFuture<'_, Arc<str>>;
}

/// All records of one version, page by page, in the order of their keys.
pub trait Snapshot: Send {
    fn version(&self) -> Version;

    /// Returns the next records, a bounded number; none at the end.
    fn next(&mut self) -> BoxFuture<'_, Result<Vec<(Key, Versioned)>, StoreError>>;
}

/// Lists all that a prefix covers, page by page; for sets known to be small.
pub async fn list(store: &dyn Store, prefix: Prefix) -> Result<Vec<(Key, Versioned)>, StoreError> {
    let mut all: Vec<(Key, Versioned)> = Vec::new();
    loop {
        let after = all.last().map(|(key, _)| key.clone());
        let page = store.scan(Scan::ascending(prefix.clone(), SCAN_LIMIT).after(after)).await?;
        let last = page.len() < SCAN_LIMIT;
        all.extend(page);
        if last {
            return Ok(all);
        }
    }
}
