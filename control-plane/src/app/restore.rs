//! Ends, at the first start after a restore, what the backup shows as going on.
//!
//! What the backup says of it was true when it was taken. Since then terraform may have run, a
//! code may have been spent, a plan may have been discarded: nothing of it may go on.
//!
//! 1. No code is spent for three minutes: those that were spent since the backup are not
//!    remembered, neither are the attempts.
//! 2. Attempts without an outcome are closed, with the sessions that they may hold.
//! 3. Every run that has not ended is ended, and its environment frozen in its name; approval,
//!    evidence, lease and session go with it. Of several runs of one environment, the one that
//!    held it comes first, and the environment names that.
//! 4. AWS sessions, pool tokens and service tokens that are left are deleted: an owner makes new
//!    ones. So are the sessions of people, who sign in again.
//! 5. Every runner is drained: it may have been revoked since, and nothing of the backup says so.
//!    An owner who knows that it was not resumes it, so that nothing is granted, and no
//!    credentials leave, before somebody has looked.
//! 6. One commit removes the note and tells each organization's audit trail.
//!
//! The logins and memberships of people stay, or nobody could look. Who they are is what the
//! restore prints.
//!
//! Each step can be done again, and the note stays until all are done; so a kill midway is mended
//! by the next start. No listener is open before.

use std::cmp::Reverse;
use std::sync::Arc;

use latchkey_domain::device::CODE_MEMORY;
use latchkey_domain::id::{AuthenticationId, OrganizationId};
use latchkey_domain::run::{Event, Run};
use latchkey_domain::time::Timestamp;
use latchkey_proto::v1::Reason;
use serde::{Deserialize, Serialize};

use super::App;
use super::authenticate_run::rfc3339;
use crate::error::{Error, Result};
use crate::store::keys::Kind;
use crate::store::record::authentication::{Authentication, OpenAuthentication};
use crate::store::record::people::{Bearer, Token};
use crate::store::record::runner::Runner;
use crate::store::record::{Loaded, Millis, decode, encode};
use crate::store::{Batch, Expect, keys};
use crate::sts::errors::clock_time;

/// The setting that a restore leaves for the first start.
pub(crate) const RESTORED: &str = "restored";

/// The setting that says until when no code is spent.
const CODES_CLOSED: &str = "codes closed until";

/// Where the data come from.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct RestoredRecord {
    pub(crate) from_generation: u64,
    /// When the backup was taken, as its manifest says.
    pub(crate) taken_at: String,
    pub(crate) restored_at: Millis,
}

impl App {
    /// Does what a restore left to do, if it left any.
    pub async fn settle_restore(self: &Arc<Self>) -> Result<()> {
        let key = keys::setting(RESTORED);
        let Some(note) = self.fetch::<RestoredRecord>(key).await? else { return Ok(()) };
        tracing::warn!(
            generation = self.generation.get(),
            taken_at = note.value.taken_at,
            "first start after a restore: what had not ended is ended, its environments are frozen"
        );
        let until = self.now() + CODE_MEMORY;
        let closed = encode(&Millis::from(until));
        let batch = Batch::new().put(keys::setting(CODES_CLOSED), Expect::Anything, closed);
        self.store.commit(batch).await?;
        self.close_attempts().await?;
        let interrupted = self.end_runs().await?;
        for kind in [Kind::Session, Kind::PoolToken] {
            for (key, _) in self.list(keys::all(kind)).await? {
                self.store.commit(Batch::new().delete(key, Expect::Anything)).await?;
            }
        }
        self.void_service_tokens().await?;
        self.void_sessions().await?;
        self.drain_all_runners(&note.value).await?;
        self.tell(&note, interrupted).await
    }

    /// The rest of step 4.
    async fn void_service_tokens(&self) -> Result<()> {
        for (key, found) in self.list(keys::all(Kind::Token)).await? {
            let token: Token = decode(&key, &found)?;
            match token.bearer {
                Bearer::Service { .. } => {
                    let batch = Batch::new().delete(key, Expect::At(found.version));
                    self.store.commit(batch).await?;
                }
                Bearer::User { .. } => {}
            }
        }
        // Last: their names are free again once the tokens are void.
        for (key, found) in self.list(keys::all(Kind::ServiceToken)).await? {
            self.store.commit(Batch::new().delete(key, Expect::At(found.version))).await?;
        }
        Ok(())
    }

    /// Step 5.
    async fn drain_all_runners(&self, note: &RestoredRecord) -> Result<()> {
        for (key, found) in self.list(keys::all(Kind::Runner)).await? {
            let runner: Runner = decode(&key, &found)?;
            if runner.revoked_at.is_some() || runner.drained_at.is_some() {
                continue;
            }
            let reason = format!(
                "restored: resume it once you know it was not revoked since {}",
                note.taken_at
            );
            let organization = runner.organization.0;
            let subject = format!("runner {}", runner.id.0);
            let draft = self
                .draft(organization, "system", "drain_runner", subject)
                .with("reason", reason.as_str());
            let drained = Runner { drained_at: Some(self.now().into()), ..runner };
            let batch = Batch::new().put(key, Expect::At(found.version), encode(&drained));
            self.store.commit(batch.audit(draft)).await?;
        }
        Ok(())
    }

    async fn close_attempts(&self) -> Result<()> {
        for (key, found) in self.list(keys::authentications_open()).await? {
            let Some(id) = key.last_id().map(AuthenticationId::from_bytes) else { continue };
            let open: OpenAuthentication = decode(&key, &found)?;
            let record = keys::authentication(open.run.0, id);
            let message = "the control plane was restored from a backup while this code was being \
                           used; use a new one"
                .to_owned();
            match self.fetch::<Authentication>(record).await? {
                Some(record) if record.value.outcome.is_open() => {
                    let refusal = (Reason::ExchangeUnknown, message, None);
                    self.record_refusal(record.value, &refusal, "system").await?;
                }
                Some(_) | None => {
                    self.store.commit(Batch::new().delete(key, Expect::Anything)).await?;
                }
            }
        }
        Ok(())
    }

    async fn end_runs(self: &Arc<Self>) -> Result<usize> {
        let mut runs = self.open_runs().await?;
        runs.sort_by_key(|run| Reverse(precedence(run)));
        for run in &runs {
            let ended = self.advance(run.id, "system", "interrupt_run", |_| Ok(Event::Restored));
            match ended.await {
                Ok(_) => {}
                Err(error) if error.reason() == Reason::WrongState => {}
                Err(error) => return Err(error),
            }
        }
        Ok(runs.len())
    }

    /// Step 6.
    async fn tell(&self, note: &Loaded<RestoredRecord>, interrupted: usize) -> Result<()> {
        let mut batch = Batch::new().delete(note.key.clone(), Expect::At(note.version));
        for (key, _) in self.list(keys::all(Kind::Organization)).await? {
            let Some(organization) = key.last_id().map(OrganizationId::from_bytes) else {
                continue;
            };
            let subject = format!("generation {}", self.generation.get());
            let draft = self
                .draft(organization, "system", "restore", subject)
                .with("from_generation", note.value.from_generation)
                .with("backup_taken_at", note.value.taken_at.as_str())
                .with("restored_at", rfc3339(note.value.restored_at.into()));
            batch = batch.audit(draft);
        }
        self.store.commit(batch).await?;
        tracing::info!(interrupted, "the restore is complete");
        Ok(())
    }

    /// Refuses to spend a code in the first minutes after a restore: of none is it known whether
    /// it was spent since the backup.
    pub(super) async fn check_codes_open(&self) -> Result<()> {
        let closed: Option<Loaded<Millis>> = self.fetch(keys::setting(CODES_CLOSED)).await?;
        let until = closed.map(|closed| Timestamp::from(closed.value));
        let Some(until) = until.filter(|until| *until > self.now()) else { return Ok(()) };
        let message = format!(
            "the control plane was just restored from a backup, and codes that were used before \
             are not remembered; nothing was spent. Use a new code from {} on",
            clock_time(until)
        );
        Err(Error::refused(Reason::DeviceBusy, message).with("retry_at", rfc3339(until)))
    }
}

/// The highest of an environment's runs is the one that an owner has to look at first.
fn precedence(run: &Run) -> (bool, bool) {
    let released = |lease: &latchkey_domain::lease::Lease| lease.released.is_some();
    (run.state.holds_environment(), run.apply.lease.as_ref().is_some_and(released))
}

#[cfg(test)]
mod tests;
