//! A build host: a disk that survives it, supervisors that outlive the agent, and terraform,
//! which outlives its supervisor.
//!
//! The order of what is recorded and what is told is that of `runner-agent`: `starting` is on
//! disk before `Starting` is sent, `exec` before terraform is executed, log and states before
//! they are shipped, the result before `Finished`. At each record the host may lose power, just
//! before it is durable or just after.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use latchkey_control_plane::auth::sha256;
use latchkey_domain::id::{Digest, RunId, RunnerId};
use latchkey_domain::policy::Phase;
use latchkey_proto::v1;
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::AbortHandle;

use crate::ship::Shipped;
use crate::supervisor;
use crate::terraform::Terraform;
use crate::world::World;

/// A numbered right to a job, as frames name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Lease {
    pub(crate) run: RunId,
    pub(crate) phase: Phase,
    pub(crate) epoch: u64,
    pub(crate) generation: u64,
}

impl Lease {
    pub(crate) fn from_wire(lease: Option<&v1::LeaseRef>) -> Option<Self> {
        let lease = lease?;
        let phase = match lease.phase() {
            v1::Phase::Plan => Phase::Plan,
            v1::Phase::Apply => Phase::Apply,
            v1::Phase::Unspecified => return None,
        };
        let run = lease.run_id.parse().ok()?;
        Some(Self { run, phase, epoch: lease.epoch, generation: lease.generation })
    }

    pub(crate) fn to_wire(self) -> v1::LeaseRef {
        let phase = match self.phase {
            Phase::Plan => v1::Phase::Plan,
            Phase::Apply => v1::Phase::Apply,
        };
        v1::LeaseRef {
            run_id: self.run.to_string(),
            phase: phase.into(),
            epoch: self.epoch,
            generation: self.generation,
        }
    }
}

/// How far a job has come, by what is on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Stage {
    Accepted,
    Starting,
    Executed,
    Ended,
}

/// A job directory. What is in it is durable.
#[derive(Clone, Debug, Default)]
pub(crate) struct Directory {
    pub(crate) spec: v1::JobSpec,
    pub(crate) starting: bool,
    pub(crate) exec: bool,
    pub(crate) base_serial: u64,
    pub(crate) log: Vec<u8>,
    pub(crate) log_lines: u64,
    pub(crate) states: Vec<Vec<u8>>,
    pub(crate) workspace: Vec<u8>,
    pub(crate) changes: Vec<u8>,
    pub(crate) result: Option<v1::finished::Result>,
    /// Hints: how much was acknowledged.
    pub(crate) shipped_log: u64,
    pub(crate) shipped_states: u64,
    /// A hint: all was acknowledged.
    pub(crate) shipped: Option<Shipped>,
}

impl Directory {
    pub(crate) fn stage(&self) -> Stage {
        match (self.starting, self.exec, &self.result) {
            (_, _, Some(_)) => Stage::Ended,
            (_, true, None) => Stage::Executed,
            (true, false, None) => Stage::Starting,
            (false, false, None) => Stage::Accepted,
        }
    }
}

/// What a supervisor tells the agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Status {
    pub(crate) stage: Run,
    pub(crate) log: u64,
    pub(crate) states: u64,
    pub(crate) wants_secrets: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Run {
    Waiting,
    Executing,
    Ended,
}

/// What the agent tells a supervisor.
#[derive(Debug)]
pub(crate) enum Order {
    Go,
    Refuse(v1::JobFailed),
    Cancel,
    GiveUp,
    Withdraw,
}

/// The agent's connection to a supervisor.
#[derive(Clone, Debug)]
pub(crate) struct Link {
    pub(crate) orders: mpsc::Sender<Order>,
    pub(crate) status: watch::Receiver<Status>,
}

pub(crate) struct Machine {
    pub(crate) name: String,
    /// What its certificate would prove, as an authority's host.
    pub(crate) key: Digest,
    pub(crate) runner: RunnerId,
    pub(crate) world: Arc<World>,
    /// Told to kill the agent.
    pub(crate) kill: Notify,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    disk: BTreeMap<Lease, Directory>,
    supervisors: BTreeMap<Lease, (Link, AbortHandle)>,
    terraforms: BTreeMap<Lease, Arc<Terraform>>,
    seen: Option<v1::HistoryMark>,
}

impl Machine {
    /// Makes the build host with this number; a clone has the identity of another.
    pub(crate) fn new(world: &Arc<World>, name: String, identity: u8) -> Self {
        Self {
            name,
            key: sha256(&[identity]),
            runner: RunnerId::from_bytes([identity + 1; 16]),
            world: Arc::clone(world),
            kill: Notify::new(),
            inner: Mutex::default(),
        }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The host comes up: of what ran, nothing is left.
    pub(crate) fn boot(&self) {
        let mut inner = self.inner();
        inner.supervisors.clear();
        inner.terraforms.clear();
    }

    /// The furthest mark of history that this host was told.
    pub(crate) fn seen(&self) -> Option<v1::HistoryMark> {
        self.inner().seen.clone()
    }

    pub(crate) fn saw(&self, mark: Option<v1::HistoryMark>) {
        let reach = |mark: &v1::HistoryMark| (mark.generation, mark.history);
        let mut inner = self.inner();
        if mark.as_ref().map(reach) > inner.seen.as_ref().map(reach) {
            inner.seen = mark;
        }
    }

    pub(crate) fn leases(&self) -> Vec<Lease> {
        self.inner().disk.keys().copied().collect()
    }

    pub(crate) fn directory(&self, lease: Lease) -> Directory {
        self.inner().disk.get(&lease).cloned().unwrap_or_default()
    }

    /// Changes a directory for good. The host may lose power before or after.
    pub(crate) async fn record(
        &self,
        what: &'static str,
        lease: Lease,
        change: impl FnOnce(&mut Directory),
    ) {
        let chance = &self.world.chance;
        tokio::time::sleep(chance.millis(0, 3)).await;
        self.world.builder_may_crash(&self.name, "before", what).await;
        if let Some(directory) = self.inner().disk.get_mut(&lease) {
            change(directory);
        }
        self.world.builder_may_crash(&self.name, "after", what).await;
    }

    pub(crate) async fn create(&self, lease: Lease, spec: v1::JobSpec) {
        tokio::time::sleep(self.world.chance.millis(0, 3)).await;
        self.world.builder_may_crash(&self.name, "before", "lease.json").await;
        self.inner().disk.insert(lease, Directory { spec, ..Directory::default() });
        self.world.builder_may_crash(&self.name, "after", "lease.json").await;
    }

    pub(crate) async fn wipe(&self, lease: Lease) {
        self.world.builder_may_crash(&self.name, "before", "wipe").await;
        let mut inner = self.inner();
        inner.disk.remove(&lease);
        inner.terraforms.remove(&lease);
    }

    /// Writes a hint, which need not survive: here it does.
    pub(crate) fn set_shipped(&self, lease: Lease, change: impl FnOnce(&mut Directory)) {
        if let Some(directory) = self.inner().disk.get_mut(&lease) {
            change(directory);
        }
    }

    /// The supervisor of a job, if it lives.
    pub(crate) fn link(&self, lease: Lease) -> Option<Link> {
        self.inner().supervisors.get(&lease).map(|(link, _)| link.clone())
    }

    /// Starts a supervisor. The caller knows that none lives.
    pub(crate) fn supervise(self: &Arc<Self>, lease: Lease) -> Link {
        let (orders, inbox) = mpsc::channel(16);
        let directory = self.directory(lease);
        let (status_to, status) = watch::channel(on_disk(&directory));
        let link = Link { orders, status };
        let machine = Arc::clone(self);
        let task = tokio::spawn(async move {
            supervisor::run(&machine, lease, inbox, &status_to).await;
            machine.inner().supervisors.remove(&lease);
        });
        let entry = (link.clone(), task.abort_handle());
        self.inner().supervisors.insert(lease, entry);
        link
    }

    /// Kills a supervisor, if one lives.
    pub(crate) fn kill_supervisor(&self) -> bool {
        match self.inner().supervisors.pop_first() {
            Some((_, (_, task))) => {
                task.abort();
                true
            }
            None => false,
        }
    }

    pub(crate) fn terraform(&self, lease: Lease) -> Option<Arc<Terraform>> {
        self.inner().terraforms.get(&lease).cloned()
    }

    pub(crate) fn keep_terraform(&self, lease: Lease, terraform: &Arc<Terraform>) {
        self.inner().terraforms.insert(lease, Arc::clone(terraform));
    }
}

/// What the directory alone tells.
pub(crate) fn on_disk(directory: &Directory) -> Status {
    let stage = match directory.stage() {
        Stage::Ended => Run::Ended,
        Stage::Executed => Run::Executing,
        Stage::Accepted | Stage::Starting => Run::Waiting,
    };
    Status {
        stage,
        log: directory.log.len() as u64,
        states: directory.states.len() as u64,
        wants_secrets: false,
    }
}
