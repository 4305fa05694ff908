//! Deletes what nothing needs any more: noted in the commit that ended the need, done after it,
//! and done again by the reaper should that have failed.
//!
//! Equal content is one blob, whoever brought it. So whoever comes to need a blob says so in the
//! commit that makes it theirs ([`App::claim_blob`]), and a noted blob is deleted only when
//! nobody has:
//!
//! 1. the note is marked as *deleting*, if it is still the one that was read; a claim that came
//!    before has removed it, and wins;
//! 2. the blob is deleted; a claim that comes now is refused, and its content is sent again;
//! 3. the note is removed.

use std::sync::Arc;

use latchkey_domain::id::{Digest, OrganizationId};
use latchkey_proto::v1::Reason;

use super::App;
use super::configurations::blob_error;
use crate::error::{Error, Result};
use crate::store::keys::BlobUser;
use crate::store::{Batch, CommitError, Expect, Key, Versioned, keys};

/// The value of a note whose blob is being deleted.
const DELETING: &[u8] = b"deleting";

/// Whether somebody needs a blob.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Need {
    None,
    /// A job of a run that goes on made it; it is asked again when that has ended.
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
        if self.blobs.is_held() {
            // A backup copies them; what is noted stays noted.
            return Ok(());
        }
        for (key, note) in self.list(keys::all(keys::Kind::Garbage)).await? {
            self.collect(key, note).await?;
        }
        for (key, _) in self.list(keys::variables_of_runs()).await? {
            let Some(run) = keys::run_of_variable(&key) else { continue };
            if self.run(run).await.is_ok_and(|run| run.value.state.is_end()) {
                self.store.commit(Batch::new().delete(key, Expect::Anything)).await?;
            }
        }
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
                    let mark =
                        Batch::new().put(key.clone(), Expect::At(version), DELETING.to_vec());
                    version = match self.store.commit(mark).await {
                        Ok(marked) => marked,
                        Err(CommitError::Conflict { .. }) => return Ok(()),
                        Err(error @ CommitError::Store(_)) => return Err(error.into()),
                    };
                    self.blobs.delete(organization, digest).await.map_err(blob_error)?;
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
        for (key, _) in self.list(keys::blob_uses(organization, &digest)).await? {
            let run = match keys::read_blob_user(&key) {
                Some(BlobUser::State(_) | BlobUser::Quarantined(_)) => return Ok(Need::Lasting),
                Some(BlobUser::Made(run)) => run,
                None => continue,
            };
            match self.run(run).await {
                Ok(run) if !run.value.state.is_end() => need = Need::ForNow,
                Ok(run) => {
                    // Shown with the run, as long as there is one.
                    let planned = run.value.planned.as_ref();
                    if planned.is_some_and(|planned| planned.digests.changes == digest) {
                        return Ok(Need::Lasting);
                    }
                    self.store.commit(Batch::new().delete(key, Expect::Anything)).await?;
                }
                Err(error) if error.reason() == Reason::NotFound => {
                    self.store.commit(Batch::new().delete(key, Expect::Anything)).await?;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(need)
    }

    /// Adds to a batch that a blob, which was stored just now, is needed. The batch is refused
    /// if the blob is deleted meanwhile.
    pub(super) async fn claim_blob(
        &self,
        batch: Batch,
        organization: OrganizationId,
        digest: &Digest,
        user: BlobUser,
    ) -> Result<Batch> {
        let note = keys::garbage(organization, digest);
        let batch = match self.store.fetch(&note).await? {
            None => batch.check(note, Expect::Absent),
            Some(found) if found.value == DELETING => {
                let message = "equal content is being deleted; send it again";
                return Err(Error::refused(Reason::StoreUnavailable, message));
            }
            Some(found) => batch.delete(note, Expect::At(found.version)),
        };
        Ok(batch.put(keys::blob_use(organization, digest, user), Expect::Anything, []))
    }

    /// Adds to a batch that a blob is not needed by `user` any more.
    pub(super) fn release_blob(
        batch: Batch,
        organization: OrganizationId,
        digest: &Digest,
        user: BlobUser,
    ) -> Batch {
        batch
            .delete(keys::blob_use(organization, digest, user), Expect::Anything)
            .put(keys::garbage(organization, digest), Expect::Anything, [])
    }
}
