//! What jobs and the agent tell each other.

use std::collections::VecDeque;
use std::mem::discriminant;
use std::sync::{Arc, Mutex, PoisonError};

use latchkey_proto::v1;
use latchkey_proto::v1::lease_request::Frame;
use tokio::sync::mpsc;
use tokio::time::Duration;

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
    Go(v1::Go),
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

/// What is told to a job, in order. While the job waits for something else, it is kept.
pub(super) struct Inbox {
    told: mpsc::Receiver<Told>,
    /// One of each kind at most.
    later: VecDeque<Told>,
}

impl Inbox {
    pub(super) fn new(told: mpsc::Receiver<Told>) -> Self {
        Self { told, later: VecDeque::new() }
    }

    /// Waits for what is told next. Safe to abandon and call again.
    pub(super) async fn next(&mut self) -> Told {
        if let Some(told) = self.later.pop_front() {
            return told;
        }
        match self.told.recv().await {
            Some(told) => told,
            // The agent is leaving, and this task with it.
            None => std::future::pending().await,
        }
    }

    pub(super) async fn pause(&mut self, wait: Duration) {
        let wait = tokio::time::sleep(wait);
        tokio::pin!(wait);
        loop {
            tokio::select! {
                () = &mut wait => return,
                Some(told) = self.told.recv() => {
                    self.later.retain(|earlier| !earlier.is_replaced_by(&told));
                    self.later.push_back(told);
                }
            }
        }
    }
}

impl Told {
    fn is_replaced_by(&self, later: &Self) -> bool {
        match (self, later) {
            (Self::Cancel { force }, Self::Cancel { force: later }) => force == later,
            (earlier, later) => discriminant(earlier) == discriminant(later),
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
