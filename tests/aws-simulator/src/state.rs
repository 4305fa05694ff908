//! All that changes in the simulation, behind one lock, and the handle that every part shares.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::clock::Clock;
use crate::credentials::Sessions;
use crate::device::Devices;
use crate::faults::Script;
use crate::journal::Journal;
use crate::s3::objects::Objects;
use crate::world::World;

/// What the simulation is made of. Each field is changed only by requests and by the control API.
#[derive(Default)]
pub(crate) struct State {
    pub(crate) world: World,
    pub(crate) sessions: Sessions,
    pub(crate) devices: Devices,
    pub(crate) journal: Journal,
    pub(crate) script: Script,
    pub(crate) objects: Objects,
}

/// A handle on the simulation. The lock is never held across a wait.
#[derive(Clone)]
pub(crate) struct Shared {
    state: Arc<Mutex<State>>,
    pub(crate) clock: Clock,
    /// Where the simulation listens.
    pub(crate) address: SocketAddr,
    /// Counts the changes of the journal, so that a test can wait for one.
    pub(crate) changes: watch::Sender<u64>,
    pub(crate) stop: CancellationToken,
}

impl Shared {
    pub(crate) fn new(world: World, clock: Clock, address: SocketAddr) -> Self {
        Self {
            state: Arc::new(Mutex::new(State { world, ..State::default() })),
            clock,
            address,
            changes: watch::Sender::new(0),
            stop: CancellationToken::new(),
        }
    }

    /// Locks the state. One test's panic must not fail all others, so poison is ignored.
    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells those who wait that the journal has changed.
    pub(crate) fn changed(&self) {
        self.changes.send_modify(|count| *count += 1);
    }
}
