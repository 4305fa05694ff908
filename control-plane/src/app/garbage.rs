//! Deletes what nothing needs any more: noted in the commit that ended the need, done after it,
//! and done again by the reaper should that have failed.
//!
//! Who needs a blob says so before it can be found ([`super::claims`]), and a noted blob is
//! deleted only when nobody has:
//!
//! 1. the note is marked as *deleting*, if it is still the one that was read; a claim that came
//!    before has written it again, and wins;
//! 2. the blob is deleted; a claim that comes now is refused, and its content is sent again;
//! 3. the note is removed.
//!
//! No backup begins between 1 and 2, and none is waited for. A mark that is found was left by a
//! process that ended: a process collects one at a time, and no two have one directory of blobs.
//!
//! What nobody noted is found by a slow walk through all blobs: what a crash or a restore left.

mod legacy;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use latchkey_domain::id::{Digest, OrganizationId, QuarantinedId, RunId};
use latchkey_proto::v1::Reason;

use super::App;
use super::claims::TERM;
use super::configurations::blob_error;
use crate::blobs::Walk;
use crate::error::Result;
use crate::store::keys::BlobUser;
use crate::store::record::{Millis, decode};
use crate::store::{Batch, CommitError, Expect, Key, Versioned, keys};

/// The value of a note whose blob is being deleted.
pub(super) const DELETING: &[u8] = b"deleting";

/// How many blobs one sweep looks at, and how old one is that can't be on its way any more.
const SWEPT: usize = 256;
const AGE: Duration = Duration::from_secs(24 * 3600);

/// What one collection leaves to the next.
#[derive(Debug, Default)]
pub(super) struct Collection {
    walk: Option<Walk>,
}

/// Whether somebody needs a blob.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Need {
    None,
    /// A job of a run that goes on made it, or an upload is not settled; it is asked again when
    /// that has ended.
    ForNow,
    Lasting,
}

impl App {
    pub(super) fn collect_garbage_soon(self: &Arc<Self>) {
        let app = Arc::clone(self);
        tokio::spawn(async move {
            if let Err(error) = app.collect_garbage().await {
                tracing::warn!(error = %error, "content was left behind; the reaper will delete it");
            }
        });
    }

    /// Deletes noted blobs, and the variables of runs that have ended. Idempotent.
    pub async fn collect_garbage(&self) -> Result<()> {
        let _collection = self.uploads.collection.lock().await;
        self.record_old_uses().await?;
        self.delete_variables_of_ended_runs().await?;
        for (key, note) in self.list(keys::all(keys::Kind::Garbage)).await? {
            self.collect(key, note).await?;
        }
        Ok(())
    }

    /// Those of runs that ended before the end of a run deleted them, or by a restore.
    async fn delete_variables_of_ended_runs(&self) -> Result<()> {
        let variables = self.list(keys::variables_of_runs()).await?;
        let runs: BTreeSet<RunId> =
            variables.iter().filter_map(|(key, _)| keys::run_of_variable(key)).collect();
        for id in runs {
            let Ok(run) = self.run(id).await else { continue };
            if run.value.state.is_end() {
                let organization = run.value.request.organization;
                let batch = self.end_variables(Batch::new(), organization, id).await?;
                match self.store.commit(batch).await {
                    // A note was written meanwhile: the next time, then.
                    Ok(_) | Err(CommitError::Conflict { .. }) => {}
                    Err(error @ CommitError::Store(_)) => return Err(error.into()),
                }
            }
        }
        Ok(())
    }

    /// Goes on with the walk through all blobs, and notes those that nobody needs.
    pub async fn sweep_blobs(&self) -> Result<()> {
        let mut collection = self.uploads.collection.lock().await;
        self.record_old_uses().await?;
        let age = i64::try_from(AGE.as_millis()).expect("a day is small");
        let before = self.now().as_millis().saturating_sub(age);
        let walk = collection.walk.take();
        let (found, walk) = self.blobs.walk(walk, SWEPT, before).await.map_err(blob_error)?;
        for (organization, digest) in found {
            if self.need(organization, digest).await? != Need::None {
                continue;
            }
            let note = keys::garbage(organization, &digest);
            match self.store.commit(Batch::new().put(note, Expect::Absent, [])).await {
                // Noted already.
                Ok(_) | Err(CommitError::Conflict { .. }) => {}
                Err(error @ CommitError::Store(_)) => return Err(error.into()),
            }
        }
        collection.walk = walk;
        Ok(())
    }

    async fn collect(&self, key: Key, note: Versioned) -> Result<()> {
        let mut version = note.version;
        if let Some((organization, digest)) = keys::read_garbage(&key) {
            let need = match note.value.as_slice() {
                DELETING => Need::None,
                _ => self.need(organization, digest).await?,
            };
            match need {
                Need::None => {
                    // A backup copies them: what is noted stays noted.
                    let Some(deleting) = self.blobs.may_delete() else { return Ok(()) };
                    let mark =
                        Batch::new().put(key.clone(), Expect::At(version), DELETING.to_vec());
                    version = match self.store.commit(mark).await {
                        Ok(marked) => marked,
                        Err(CommitError::Conflict { .. }) => return Ok(()),
                        Err(error @ CommitError::Store(_)) => return Err(error.into()),
                    };
                    deleting.delete(organization, digest).await.map_err(blob_error)?;
                }
                Need::ForNow => return Ok(()),
                Need::Lasting => {}
            }
        }
        match self.store.commit(Batch::new().delete(key, Expect::At(version))).await {
            // Noted again meanwhile: the next time, then.
            Ok(_) | Err(CommitError::Conflict { .. }) => Ok(()),
            Err(error @ CommitError::Store(_)) => Err(error.into()),
        }
    }

    async fn need(&self, organization: OrganizationId, digest: Digest) -> Result<Need> {
        if self.store.fetch(&keys::configuration(organization, &digest)).await?.is_some() {
            return Ok(Need::Lasting);
        }
        let mut need = Need::None;
        for (key, found) in self.list(keys::blob_uses(organization, &digest)).await? {
            let use_need = match keys::read_blob_user(&key) {
                // The change that ends it removes it.
                Some(BlobUser::State(_) | BlobUser::Value(_)) => Need::Lasting,
                Some(BlobUser::Quarantined(id)) => self.quarantine_needs(organization, id).await?,
                Some(BlobUser::Made(run)) => self.run_needs(run, digest).await?,
                Some(BlobUser::Upload(_)) => {
                    let since: Millis = decode(&key, &found)?;
                    let over = latchkey_domain::time::Timestamp::from(since) + TERM <= self.now();
                    if over { Need::None } else { Need::ForNow }
                }
                None => continue,
            };
            match use_need {
                Need::Lasting => return Ok(Need::Lasting),
                Need::ForNow => need = Need::ForNow,
                Need::None => {
                    // Whoever would still rely on it expects it to be there.
                    let ended = Batch::new().delete(key, Expect::At(found.version));
                    match self.store.commit(ended).await {
                        Ok(_) => {}
                        Err(CommitError::Conflict { .. }) => need = Need::ForNow,
                        Err(error @ CommitError::Store(_)) => return Err(error.into()),
                    }
                }
            }
        }
        Ok(need)
    }

    async fn quarantine_needs(
        &self,
        organization: OrganizationId,
        id: QuarantinedId,
    ) -> Result<Need> {
        let found = self.store.fetch(&keys::quarantined(organization, id)).await?;
        Ok(if found.is_some() { Need::Lasting } else { Need::None })
    }

    async fn run_needs(&self, run: RunId, digest: Digest) -> Result<Need> {
        let run = match self.run(run).await {
            Ok(run) => run.value,
            Err(error) if error.reason() == Reason::NotFound => return Ok(Need::None),
            Err(error) => return Err(error),
        };
        if !run.state.is_end() {
            return Ok(Need::ForNow);
        }
        // Shown with the run, as long as there is one.
        let shown = run.planned.is_some_and(|planned| planned.digests.changes == digest);
        Ok(if shown { Need::Lasting } else { Need::None })
    }
}

#[cfg(test)]
mod tests;
