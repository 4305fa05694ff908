//! The store of the simulated control plane: the memory adapter, which outlives crashes of its
//! host as a disk would, and shows every commit to the model.
//!
//! Before and behind each commit lies a moment of simulated time in which the host may crash; so
//! a crash falls between what was decided, what is durable and what was told.

use std::sync::Arc;

use latchkey_control_plane::store::keys::Kind;
use latchkey_control_plane::store::memory::Memory;
use latchkey_control_plane::store::record::environment::{Environment, EnvironmentRecord};
use latchkey_control_plane::store::record::run::RunRecord;
use latchkey_control_plane::store::record::runner::Runner;
use latchkey_control_plane::store::record::{self, Loaded};
use latchkey_control_plane::store::{
    Batch, BoxFuture, CommitError, Feed, Key, Prefix, Scan, Snapshot, Store, StoreError, Version,
    Versioned, keys, list,
};
use latchkey_domain::run::Run;

use crate::world::World;

pub(crate) struct Watched {
    memory: Memory,
    world: Arc<World>,
}

impl Watched {
    pub(crate) fn new(world: Arc<World>) -> Self {
        Self { memory: Memory::new(), world }
    }

    async fn show(&self) {
        let mut runs: Vec<Run> = vec![];
        for key in self.keys(Kind::Run).await {
            let run: Result<Option<Loaded<Run>>, _> =
                record::fetch::<RunRecord, _>(&self.memory, key).await;
            runs.extend(run.ok().flatten().map(|run| run.value));
        }
        let mut environments: Vec<Environment> = vec![];
        for key in self.keys(Kind::Environment).await {
            let found: Result<Option<Loaded<Environment>>, _> =
                record::fetch::<EnvironmentRecord, _>(&self.memory, key).await;
            environments.extend(found.ok().flatten().map(|found| found.value));
        }
        for key in self.keys(Kind::Runner).await {
            let found: Result<Option<Loaded<Runner>>, _> =
                record::fetch::<Runner, _>(&self.memory, key).await;
            let found = found.ok().flatten().map(|found| found.value);
            if let Some(revoked) = found.filter(|runner| runner.revoked_at.is_some()) {
                self.world.model.revoked(revoked.id.0);
            }
        }
        self.world.model.committed(&runs, &environments, self.world.now());
    }

    async fn keys(&self, kind: Kind) -> Vec<Key> {
        let found = list(&self.memory, keys::all(kind)).await;
        found.into_iter().flatten().map(|(key, _)| key).collect()
    }

    async fn moment(&self, named: &'static str) {
        if self.world.model.is_armed() {
            tokio::time::sleep(self.world.chance.millis(0, 3)).await;
            self.world.plane_may_crash(named).await;
        }
    }
}

impl Store for Watched {
    fn commit(&self, batch: Batch) -> BoxFuture<'_, Result<Version, CommitError>> {
        Box::pin(async move {
            self.moment("before a commit").await;
            let version = self.memory.commit(batch).await?;
            self.show().await;
            self.moment("after a commit").await;
            Ok(version)
        })
    }

    fn fetch<'a>(&'a self, key: &'a Key) -> BoxFuture<'a, Result<Option<Versioned>, StoreError>> {
        self.memory.fetch(key)
    }

    fn scan(&self, scan: Scan) -> BoxFuture<'_, Result<Vec<(Key, Versioned)>, StoreError>> {
        self.memory.scan(scan)
    }

    fn watch(&self, prefix: Prefix) -> Feed {
        self.memory.watch(prefix)
    }

    fn snapshot(&self) -> BoxFuture<'_, Result<Box<dyn Snapshot>, StoreError>> {
        self.memory.snapshot()
    }

    fn history(&self) -> Version {
        self.memory.history()
    }

    fn newest(&self) -> BoxFuture<'_, Result<Version, StoreError>> {
        self.memory.newest()
    }

    fn failed(&self) -> BoxFuture<'_, Arc<str>> {
        self.memory.failed()
    }
}
