//! What a service manager is told: ready, alive, what is going on, ending. Says nothing when none
//! listens.
//!
//! The watchdog is fed by the agent's own loop, so that a loop that is stuck starves it.

use std::time::Duration;

use sd_notify::NotifyState;

/// How often the loop turns when nothing else happens.
const PULSE: Duration = Duration::from_secs(1);

#[derive(Debug, Default)]
pub(super) struct Service {
    watched: bool,
    ready: bool,
    /// Said last.
    status: String,
}

impl Service {
    pub(super) fn new() -> Self {
        Self { watched: sd_notify::watchdog_enabled().is_some(), ..Self::default() }
    }

    /// Answers how often `alive` is to be said.
    pub(super) fn pulse() -> Duration {
        // A third: one that comes late is no reason to be killed.
        sd_notify::watchdog_enabled().map_or(PULSE, |limit| PULSE.min(limit / 3))
    }

    /// Says once that the control plane has welcomed this runner.
    pub(super) fn ready(&mut self) {
        if !std::mem::replace(&mut self.ready, true) {
            say(&[NotifyState::Ready]);
        }
    }

    pub(super) fn alive(&self) {
        if self.watched {
            say(&[NotifyState::Watchdog]);
        }
    }

    pub(super) fn status(&mut self, status: &str) {
        if self.status != status {
            say(&[NotifyState::Status(status)]);
            status.clone_into(&mut self.status);
        }
    }

    pub(super) fn stopping(&mut self, status: &str) {
        say(&[NotifyState::Stopping, NotifyState::Status(status)]);
    }
}

fn say(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::debug!(%error, "failed to tell the service manager");
    }
}
