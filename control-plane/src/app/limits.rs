//! The timer of limits: how long a run may wait for a person, plan and apply.
//!
//! When a run reaches its limit follows from what is stored, so the timer holds nothing that a
//! start cannot find again; and the domain believes no limit that is not reached. Each commit of
//! a run tells the timer what it waits for next; it sleeps until the earliest.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use latchkey_domain::id::RunId;
use latchkey_domain::run::{Event, Run, deadline};
use latchkey_domain::time::Timestamp;
use latchkey_proto::v1::Reason;
use tokio::sync::Notify;

use super::App;
use crate::error::Result;
use crate::store::record::environment::Environment;

/// The longest sleep: the wall clock may be set meanwhile.
const LONGEST_SLEEP: Duration = Duration::from_secs(300);
/// When what failed is tried again.
const RETRY: Duration = Duration::from_secs(10);

#[derive(Debug, Default)]
pub struct Timer {
    due: Mutex<Due>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct Due {
    by_time: BTreeSet<(Timestamp, RunId)>,
    of_run: HashMap<RunId, Timestamp>,
}

impl Timer {
    fn due(&self) -> MutexGuard<'_, Due> {
        self.due.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a run's limit, in place of what it had before.
    fn set(&self, run: RunId, at: Option<Timestamp>) {
        let is_first = {
            let mut due = self.due();
            if let Some(before) = due.of_run.remove(&run) {
                due.by_time.remove(&(before, run));
            }
            if let Some(at) = at {
                due.of_run.insert(run, at);
                due.by_time.insert((at, run));
            }
            at.is_some() && due.by_time.first().is_some_and(|(_, first)| *first == run)
        };
        if is_first {
            self.changed.notify_one();
        }
    }

    fn next(&self) -> Option<Timestamp> {
        self.due().by_time.first().map(|(at, _)| *at)
    }

    fn take_due(&self, now: Timestamp) -> Vec<RunId> {
        let mut due = self.due();
        let mut taken = vec![];
        while let Some((at, run)) = due.by_time.first().copied().filter(|(at, _)| *at <= now) {
            due.by_time.remove(&(at, run));
            due.of_run.remove(&run);
            taken.push(run);
        }
        taken
    }
}

impl App {
    pub(super) fn note_limit(&self, run: &Run, environment: &Environment) {
        let at = deadline(run, &environment.settings.limits.into());
        self.limits.set(run.id, at);
    }

    /// Finds the limits of all open runs: at a start, and again later, since commits that follow each
    /// other quickly may have told the timer in another order. Idempotent.
    pub async fn note_all_limits(&self) -> Result<()> {
        for run in self.open_runs().await? {
            let request = &run.request;
            let environment = self.environment(request.organization, request.environment).await?;
            self.note_limit(&run, &environment.value);
        }
        Ok(())
    }

    /// Finds them again for an environment that has other limits now.
    pub(super) async fn note_limits_of(&self, environment: &Environment) -> Result<()> {
        for run in self.open_runs().await? {
            if run.request.environment == environment.id {
                self.note_limit(&run, environment);
            }
        }
        Ok(())
    }

    /// Runs until the process ends.
    pub async fn keep_limits(self: Arc<Self>) {
        loop {
            let sleep = match self.limits.next() {
                Some(at) => at.since(self.now()).min(LONGEST_SLEEP),
                None => LONGEST_SLEEP,
            };
            tokio::select! {
                () = tokio::time::sleep(sleep) => self.enforce_limits().await,
                () = self.limits.changed.notified() => {}
            }
        }
    }

    /// Tells every run that has reached its limit.
    pub async fn enforce_limits(self: &Arc<Self>) {
        for run in self.limits.take_due(self.now()) {
            if let Err(error) = self.enforce_limit(run).await {
                tracing::warn!(run_id = %run, error = %error, "a limit was not enforced; again soon");
                self.limits.set(run, Some(self.now() + RETRY));
            }
        }
    }

    async fn enforce_limit(self: &Arc<Self>, id: RunId) -> Result<()> {
        let advance = self
            .advance(id, "system", "enforce_limit", |subject| {
                let limits = subject.environment.value.settings.limits.into();
                Ok(Event::LimitReached { limits })
            })
            .await;
        match advance {
            Ok(_) => Ok(()),
            // Moved on, or given more time: as things stand now.
            Err(error) if error.reason() == Reason::WrongState => {
                let subject = self.subject(id).await?;
                self.note_limit(&subject.run.value, &subject.environment.value);
                Ok(())
            }
            Err(error) if error.reason() == Reason::NotFound => Ok(()),
            Err(error) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests;
