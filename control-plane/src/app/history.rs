//! Whether the data are the newest there are: an old copy put in place looks whole from inside.
//!
//! Runners remember the last [`Mark`] that they were told. One that the data cannot have said
//! proves that they are an old copy, by which an apply could be started a second time. From then
//! on nothing is granted, no credentials leave, no code is spent, and no runner's word changes
//! anything: their streams end with `HISTORY_LOST`, and they keep what they have. People can still
//! look.
//!
//! Only a mark counts, for only a mark is the control plane's own word: a runner that merely says
//! it holds what was never granted here stops nobody but itself. Whoever started terraform has a
//! mark, since `Go` carries one.
//!
//! The proof is kept in the store, so that the alarm stands at the next start, before any runner
//! comes. A restore, which starts a new generation, takes it back; so does a person on the host.

mod mark;

use std::cmp::Ordering;
use std::collections::HashSet;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use latchkey_domain::id::RunnerId;
use latchkey_proto::v1::Reason;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

pub use self::mark::Mark;
use self::mark::{Branch, Told, Verdict};
use super::App;
use super::lease_job::lease_lost;
use crate::auth::RunnerIdentity;
use crate::error::{Error, Result};
use crate::job::LeaseRef;
use crate::store::record::{Loaded, Text, encode};
use crate::store::{Batch, Expect, keys};

/// What whoever runs the control plane has to do.
const REMEDY: &str = "this control plane runs on an old copy of its data: it grants nothing any \
                      more. Stop it, and bring the newest backup back with \
                      `latchkey-control-plane restore`, which starts a new generation. Are these \
                      the newest data that are left, back them up and restore that";

/// How many runners' made up marks are told of in the audit trail, each once.
const MOST_LIARS: usize = 1000;

/// What this process knows of history, and whether an alarm was raised.
#[derive(Clone, Debug)]
pub struct History {
    is_lost: Arc<watch::Sender<bool>>,
    branch: Told,
    /// Who brought marks that nobody here made.
    liars: Arc<Mutex<HashSet<RunnerId>>>,
}

impl Default for History {
    fn default() -> Self {
        Self {
            is_lost: Arc::new(watch::Sender::new(false)),
            branch: Told::default(),
            liars: Arc::default(),
        }
    }
}

impl History {
    pub(crate) fn is_lost(&self) -> bool {
        *self.is_lost.borrow()
    }

    /// Waits until the history is known to be lost.
    pub(crate) async fn lost(&self) {
        let mut lost = self.is_lost.subscribe();
        // The sender lives as long as self.
        let _ = lost.wait_for(|lost| *lost).await;
    }

    /// Waits until the alarm is taken back.
    pub(crate) async fn found(&self) {
        let mut lost = self.is_lost.subscribe();
        let _ = lost.wait_for(|lost| !*lost).await;
    }

    /// Answers whether this was the first alarm.
    fn raise(&self) -> bool {
        self.is_lost.send_if_modified(|lost| !std::mem::replace(lost, true))
    }
}

/// The setting that keeps the proof.
pub(crate) const LOST: &str = "history lost";

/// Who proved what.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Proof {
    runner: Text<RunnerId>,
    proof: String,
}

impl fmt::Display for Proof {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "proved by the runner {}: {}", self.runner.0, self.proof)
    }
}

impl App {
    /// Refuses what an old copy of the data must not decide.
    pub fn check_history(&self) -> Result<()> {
        if self.history.is_lost() {
            return Err(history_lost());
        }
        Ok(())
    }

    /// Begins an incarnation of the data, at a start, before anybody is told anything.
    pub async fn begin_incarnation(&self) -> Result<()> {
        let branch = Branch::begin(&*self.store, self.generation).await?;
        self.history.branch.set(branch).map_err(|_| Error::internal("it began once already"))
    }

    /// Says how far history has come, for runners to keep. Without disk.
    pub fn mark(&self) -> Option<Mark> {
        let branch = self.history.branch.get()?;
        Some(branch.say(&self.master, self.store.history().get()))
    }

    /// Hears what a runner was last told when it connects. If these data cannot have said it, the
    /// alarm is raised, and the runner keeps all it has.
    pub async fn greet(&self, runner: &RunnerIdentity, told: Option<&Mark>) -> Result<()> {
        self.check_history()?;
        let (Some(told), Some(branch)) = (told, self.history.branch.get()) else { return Ok(()) };
        match branch.judge(&self.master, told) {
            Verdict::Fits => Ok(()),
            Verdict::MadeUp => {
                self.note_liar(runner).await;
                Ok(())
            }
            Verdict::Proof(proof) => {
                self.raise_alarm(runner, &proof).await;
                Err(history_lost())
            }
        }
    }

    /// A mark that nobody here made stops nobody. Its runner may be hostile, or another control
    /// plane's.
    async fn note_liar(&self, runner: &RunnerIdentity) {
        let is_new = {
            let mut liars = self.history.liars.lock().unwrap_or_else(PoisonError::into_inner);
            liars.len() < MOST_LIARS && liars.insert(runner.id)
        };
        if !is_new {
            return;
        }
        tracing::warn!(runner_id = %runner.id, "a runner says that it was told of a history by \
            this control plane that it was never told of: ignored");
        let draft = self.draft(
            runner.organization,
            runner.audit_name(),
            "bring_false_history",
            "control plane",
        );
        if let Err(error) = self.store.commit(Batch::new().audit(draft)).await {
            tracing::error!(error = %error, "a false history is not in the audit trail");
        }
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
        let Some(kept) = self.alarm().await? else { return Ok(()) };
        self.history.raise();
        tracing::error!(runner_id = %kept.value.runner.0, proof = kept.value.proof, "{REMEDY}");
        Ok(())
    }

    pub(crate) async fn alarm(&self) -> Result<Option<Loaded<Proof>>> {
        self.fetch(keys::setting(LOST)).await
    }

    /// Takes the alarm back, since a person on the host says so, and answers what it was. The next
    /// runner that proves it raises it again.
    pub(crate) async fn clear_alarm(&self) -> Result<Option<Proof>> {
        let kept = self.alarm().await?;
        if let Some(kept) = &kept {
            let batch = Batch::new().delete(kept.key.clone(), Expect::At(kept.version));
            self.store.commit(batch).await?;
        }
        if self.history.is_lost.send_replace(false) {
            tracing::warn!("the alarm was taken back on the host");
        }
        Ok(kept.map(|kept| kept.value))
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
