//! Whether the data are the newest there are: an old copy put in place looks whole from inside.
//!
//! Runners remember how far they were told that history has come, and hold leases that it
//! granted. A runner that knows of more than the store does proves that the data are an old copy,
//! by which an apply could be started a second time. From then on nothing is granted, no
//! credentials leave, no code is spent, and no runner's word changes anything: their streams end
//! with `HISTORY_LOST`, and they keep what they have. People can still look.
//!
//! The proof is kept in the store, for the old copy's own commits take its history on, and a later
//! start might look as new as what the runners know. A restore, which starts a new generation,
//! takes the alarm back; so does a start after an owner has revoked the runner that gave the proof,
//! for a runner can lie.

use std::cmp::Ordering;
use std::sync::Arc;

use latchkey_domain::id::{Generation, RunnerId};
use latchkey_proto::v1::Reason;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::App;
use super::lease_job::lease_lost;
use crate::auth::RunnerIdentity;
use crate::error::{Error, Result};
use crate::job::LeaseRef;
use crate::store::record::runner::Runner;
use crate::store::record::{Text, encode};
use crate::store::{Batch, Expect, keys};

/// What whoever runs the control plane has to do.
const REMEDY: &str = "this control plane runs on an old copy of its data: it grants nothing any \
                      more. Stop it, and bring the newest backup back with \
                      `latchkey-control-plane restore`, which starts a new generation. Should the \
                      runner have lied, revoke it and start again";

/// The alarm. Raised once, by the first runner that proves it, and never taken back.
#[derive(Clone, Debug)]
pub struct History(Arc<watch::Sender<bool>>);

impl Default for History {
    fn default() -> Self {
        Self(Arc::new(watch::Sender::new(false)))
    }
}

impl History {
    pub(crate) fn is_lost(&self) -> bool {
        *self.0.borrow()
    }

    /// Waits until the history is known to be lost.
    pub(crate) async fn lost(&self) {
        let mut lost = self.0.subscribe();
        // The sender lives as long as self.
        let _ = lost.wait_for(|lost| *lost).await;
    }

    /// Answers whether this was the first alarm.
    fn raise(&self) -> bool {
        self.0.send_if_modified(|lost| !std::mem::replace(lost, true))
    }
}

/// The setting that keeps the proof.
pub(crate) const LOST: &str = "history lost";

/// Who proved what.
#[derive(Debug, Serialize, Deserialize)]
struct Proof {
    runner: Text<RunnerId>,
    proof: String,
}

/// The furthest that a runner was ever told of; zeros when nothing.
#[derive(Clone, Copy, Debug)]
pub struct Seen {
    pub generation: Generation,
    pub history: u64,
}

impl App {
    /// Refuses what an old copy of the data must not decide.
    pub fn check_history(&self) -> Result<()> {
        if self.history.is_lost() {
            return Err(history_lost());
        }
        Ok(())
    }

    /// Hears what a runner knows of history when it connects. If that is more than the store
    /// knows, the alarm is raised, and the runner keeps all it has.
    pub async fn greet(
        &self,
        runner: &RunnerIdentity,
        seen: Seen,
        held: &[LeaseRef],
    ) -> Result<()> {
        self.check_history()?;
        match self.proof(seen, held).await? {
            None => Ok(()),
            Some(proof) => {
                self.raise_alarm(runner, &proof).await;
                Err(history_lost())
            }
        }
    }

    /// Returns how the runner knows more than the store, if it does.
    async fn proof(&self, seen: Seen, held: &[LeaseRef]) -> Result<Option<String>> {
        let own = self.generation;
        let highest = held.iter().map(|lease| lease.generation).max();
        let told = highest.map_or(seen.generation, |highest| highest.max(seen.generation));
        if told > own {
            return Ok(Some(format!(
                "it has seen generation {}, this is {}",
                told.get(),
                own.get()
            )));
        }
        // What this process knows may be behind the database, so that is asked only now.
        if seen.generation == own && seen.history > self.store.history().get() {
            let newest = self.store.newest().await?.get();
            if seen.history > newest {
                return Ok(Some(format!(
                    "it has seen commit {} of this generation, the last one here is {newest}",
                    seen.history
                )));
            }
        }
        for lease in held.iter().filter(|lease| lease.generation == own) {
            let granted = match self.run(lease.job.run).await {
                Ok(run) => run.value.job(lease.job.phase).epoch >= lease.epoch,
                Err(error) if error.reason() == Reason::NotFound => false,
                Err(error) => return Err(error),
            };
            if !granted {
                return Ok(Some(format!(
                    "it holds epoch {} of the job {}, which was never granted here",
                    lease.epoch.get(),
                    lease.job
                )));
            }
        }
        Ok(None)
    }

    async fn raise_alarm(&self, runner: &RunnerIdentity, proof: &str) {
        if !self.history.raise() {
            return;
        }
        tracing::error!(
            runner_id = %runner.id,
            proof,
            "{REMEDY}"
        );
        let kept = Proof { runner: Text(runner.id), proof: proof.to_owned() };
        let draft = self
            .draft(runner.organization, runner.audit_name(), "prove_old_copy", "control plane")
            .with("proof", proof)
            .with("generation", self.generation.get());
        let batch = Batch::new().put(keys::setting(LOST), Expect::Anything, encode(&kept));
        if let Err(error) = self.store.commit(batch.audit(draft)).await {
            tracing::error!(error = %error, "the alarm is not kept, and not in the audit trail");
        }
    }

    /// At a start: raises the alarm again that an earlier process heard.
    pub async fn recall_alarm(&self) -> Result<()> {
        let Some(kept) = self.fetch::<Proof>(keys::setting(LOST)).await? else { return Ok(()) };
        let id = kept.value.runner.0;
        let runner = self.fetch::<Runner>(keys::runner(id)).await?;
        if runner.is_some_and(|runner| runner.value.revoked_at.is_some()) {
            tracing::warn!(runner_id = %id, "the runner that proved an old copy was revoked since: \
                its word is not taken any more");
            self.store.commit(Batch::new().delete(kept.key, Expect::At(kept.version))).await?;
            return Ok(());
        }
        self.history.raise();
        tracing::error!(runner_id = %id, proof = kept.value.proof, "{REMEDY}");
        Ok(())
    }

    /// Refuses a lease of another generation: one before ours is gone, one after ours is not here.
    pub(super) fn check_generation(&self, lease: LeaseRef) -> Result<()> {
        self.check_history()?;
        match lease.generation.cmp(&self.generation) {
            Ordering::Equal => Ok(()),
            Ordering::Less => Err(lease_lost()),
            // Its runner must keep what it has, also before its greeting raises the alarm.
            Ordering::Greater => Err(history_lost()),
        }
    }
}

fn history_lost() -> Error {
    Error::refused(
        Reason::HistoryLost,
        "a runner has seen a later history than this control plane has: it runs on an old copy of \
         its data and grants nothing until it is restored from a backup",
    )
}

#[cfg(test)]
mod tests;
