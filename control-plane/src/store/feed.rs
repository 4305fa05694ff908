//! The change feed: bounded, so a slow reader never holds up a commit, but is told that it lags.

use std::collections::VecDeque;
use std::sync::Arc;

use tokio::sync::broadcast;

use super::{Key, Prefix, Version};

/// Commits that a reader may be behind before it must list again.
const CAPACITY: usize = 4096;

/// One record that a commit changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    pub key: Key,
    pub version: Version,
    pub what: What,
}

/// What happened to the record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    Put,
    Deleted,
}

/// What a reader of the feed sees next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Seen {
    Change(Change),
    /// Changes were missed: list again, then read on.
    Lagged,
    /// The store is closed or has failed.
    Closed,
}

/// The changes under some prefixes, in the order of their commits.
#[derive(Debug)]
pub struct Feed {
    prefixes: Vec<Prefix>,
    commits: broadcast::Receiver<Arc<[Change]>>,
    /// Changes of the last commit that were not handed out yet.
    pending: VecDeque<Change>,
}

impl Feed {
    /// Watches what another prefix covers, too, as of the same moment.
    pub fn and(mut self, prefix: Prefix) -> Self {
        self.prefixes.push(prefix);
        self
    }

    /// Waits for the next change. Dropping the future loses nothing.
    pub async fn next(&mut self) -> Seen {
        loop {
            if let Some(change) = self.pending.pop_front() {
                return Seen::Change(change);
            }
            match self.commits.recv().await {
                Ok(changes) => {
                    let covered = |key: &Key| self.prefixes.iter().any(|prefix| prefix.covers(key));
                    let ours = changes.iter().filter(|change| covered(&change.key));
                    self.pending.extend(ours.cloned());
                }
                Err(broadcast::error::RecvError::Lagged(_)) => return Seen::Lagged,
                Err(broadcast::error::RecvError::Closed) => return Seen::Closed,
            }
        }
    }
}

/// The writing end, held by an adapter.
#[derive(Debug)]
pub(super) struct Publisher(broadcast::Sender<Arc<[Change]>>);

impl Publisher {
    pub(super) fn new() -> Self {
        Self(broadcast::Sender::new(CAPACITY))
    }

    pub(super) fn publish(&self, changes: Vec<Change>) {
        // Fails only when nobody watches.
        let _ = self.0.send(changes.into());
    }

    pub(super) fn watch(&self, prefix: Prefix) -> Feed {
        Feed { prefixes: vec![prefix], commits: self.0.subscribe(), pending: VecDeque::new() }
    }
}
