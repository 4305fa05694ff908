//! What jobs and the agent tell each other.

use std::mem::discriminant;
use std::sync::{Arc, Mutex, PoisonError};

use latchkey_proto::v1;
use latchkey_proto::v1::lease_request::Frame;
use tokio::time::Duration;

use super::mailbox::Kinds;
use crate::backoff::Backoff;
use crate::job::Lease;
use crate::random;

/// What a job is told: by the lease stream, but for `ShutDown`.
#[derive(Debug)]
pub(super) enum Told {
    /// After `Welcome`: the lease stands.
    Keep,
    /// After `Welcome`: it does not.
    GiveUp,
    Go(Box<v1::Go>),
    Cancel {
        force: bool,
    },
    Revoke,
    Recorded,
    /// The answer to a heartbeat did not name the lease: the control plane is done with it.
    NotRenewed,
    /// By a signal to this runner: stop gracefully. May be said again.
    ShutDown,
}

/// What a job tells the agent.
pub(super) enum Event {
    Send(Box<Frame>),
    Done(Lease),
}

impl Kinds for Told {
    fn replaces(&self, earlier: &Self) -> bool {
        match (self, earlier) {
            (Self::Cancel { force }, Self::Cancel { force: earlier }) => force == earlier,
            (told, earlier) => discriminant(told) == discriminant(earlier),
        }
    }
}

/// How long a host that could not prepare a job keeps it before it hands it back: it may be
/// offered again at once. Shared by all jobs.
#[derive(Clone)]
pub(super) struct Rest(Arc<Mutex<Backoff>>);

impl Default for Rest {
    fn default() -> Self {
        let backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(60));
        Self(Arc::new(Mutex::new(backoff)))
    }
}

impl Rest {
    pub(super) fn after_a_failure(&self) -> Duration {
        let mut backoff = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        backoff.next(0.5 + random::fraction() / 2.0)
    }

    pub(super) fn is_over(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).reset();
    }
}
