//! A store whose first commit is durable long before its caller hears of it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::Notify;

use crate::store::{
    Batch, BoxFuture, CommitError, Feed, Key, Prefix, Scan, Snapshot, Store, StoreError, Version,
    Versioned,
};

pub(super) struct Slow {
    within: Arc<dyn Store>,
    slow: AtomicBool,
    pub(super) committed: Arc<Notify>,
    pub(super) go_on: Arc<Notify>,
}

impl Slow {
    pub(super) fn new(within: &Arc<dyn Store>) -> Self {
        let (committed, go_on) = (Arc::default(), Arc::default());
        Self { within: Arc::clone(within), slow: false.into(), committed, go_on }
    }

    /// Makes the next commit the slow one.
    pub(super) fn arm(&self) {
        self.slow.store(true, Ordering::SeqCst);
    }
}

impl Store for Slow {
    fn commit(&self, batch: Batch) -> BoxFuture<'_, Result<Version, CommitError>> {
        Box::pin(async move {
            let committed = self.within.commit(batch).await;
            if self.slow.swap(false, Ordering::SeqCst) {
                self.committed.notify_one();
                self.go_on.notified().await;
            }
            committed
        })
    }

    fn fetch<'a>(&'a self, key: &'a Key) -> BoxFuture<'a, Result<Option<Versioned>, StoreError>> {
        self.within.fetch(key)
    }

    fn scan(&self, scan: Scan) -> BoxFuture<'_, Result<Vec<(Key, Versioned)>, StoreError>> {
        self.within.scan(scan)
    }

    fn snapshot(&self) -> BoxFuture<'_, Result<Box<dyn Snapshot>, StoreError>> {
        self.within.snapshot()
    }

    fn history(&self) -> Version {
        self.within.history()
    }

    fn newest(&self) -> BoxFuture<'_, Result<Version, StoreError>> {
        self.within.newest()
    }

    fn watch(&self, prefix: Prefix) -> Feed {
        self.within.watch(prefix)
    }

    fn failed(&self) -> BoxFuture<'_, Arc<str>> {
        self.within.failed()
    }
}
