//! A runner's numbered right to a job.
//!
//! The store holds who and which epoch; deadlines live in the control plane that holds the
//! runner's stream, on a monotonic clock, and reach the domain as an event.

use crate::id::{Epoch, RunnerId};
use crate::policy::Permit;
use crate::time::Timestamp;

/// The engine that a job is to be run by; an empty part is any.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Engine {
    pub name: String,
    pub version: String,
}

impl Engine {
    /// Tells whether a plan made by this engine is what was asked for.
    pub fn admits(&self, name: &str, version: &str) -> bool {
        (self.name.is_empty() || self.name == name)
            && (self.version.is_empty() || self.version == version)
    }
}

/// Where a plan is made. No digest of the plan covers it, and its apply has to be made there too.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Site {
    pub region: String,
    /// Within the archive.
    pub working_directory: String,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lease {
    pub runner: RunnerId,
    pub epoch: Epoch,
    pub granted_at: Timestamp,
    /// Length of the phase's log when the lease was granted: where this lease's offset 0 lies.
    pub log_base: u64,
    /// Number of the environment's newest state version when the lease was granted; absent when
    /// it had none. A plan reads this one, whatever is written meanwhile.
    pub state: Option<u64>,
    /// What the environment asked for when the lease was granted. What the job made is held to this,
    /// whatever the environment asks for by then.
    pub engine: Engine,
    /// Set by the commit that answers `Starting`. From then on the runner may execute terraform.
    pub released: Option<Released>,
}

/// What was released with `Go`. A re-delivery repeats it and is not judged again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Released {
    pub at: Timestamp,
    pub permit: Permit,
}

impl Lease {
    /// Starts the lease that follows `last` for the same job, for any engine.
    pub fn after(
        last: Epoch,
        runner: RunnerId,
        log_base: u64,
        state: Option<u64>,
        now: Timestamp,
    ) -> Self {
        Self {
            runner,
            epoch: last.next(),
            granted_at: now,
            log_base,
            state,
            engine: Engine::default(),
            released: None,
        }
    }

    /// Tells whether a message of `runner` at `epoch` speaks for this lease.
    pub fn is(&self, runner: RunnerId, epoch: Epoch) -> bool {
        self.runner == runner && self.epoch == epoch
    }
}
