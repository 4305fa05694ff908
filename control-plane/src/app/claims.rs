//! Who needs a blob: said in the store before the blob can be found, and until nobody does.
//!
//! Equal content is one blob, whoever brought it, so a blob may be wanted by one while another's
//! need of it ends. This is how the two are kept apart:
//!
//! 1. An upload *claims* its blob before the blob has its name: it records a use of its own, and
//!    with it a note that somebody has to look ([`super::garbage`]). A blob that is being deleted
//!    cannot be claimed; its content is sent again.
//! 2. The commit that makes it somebody's *settles* the claim: it removes the upload's use,
//!    which must still be there, puts the lasting one in its place, and takes the note away.
//! 3. What was not settled is *released*. Should even that not happen, the claim ends by itself,
//!    and the note is still there.
//!
//! Each reads the note first and expects it as it was: a collection that read it before is told
//! so. The mark of a deletion under way is never overwritten.

use std::time::Duration;

use latchkey_domain::id::{Digest, OrganizationId, RunId};
use latchkey_domain::run::{Effect, Run};
use latchkey_proto::v1::Reason;
use uuid::Uuid;

use super::App;
use super::configurations::blob_error;
use super::garbage::DELETING;
use crate::blobs::Upload;
use crate::error::{Error, Result};
use crate::store::keys::BlobUser;
use crate::store::record::{Loaded, Millis, Text, encode};
use crate::store::{Batch, CommitError, Expect, Key, Version, Versioned, keys};

/// How long an upload may take from its last byte to its record. Reading a large state takes
/// seconds.
pub(super) const TERM: Duration = Duration::from_secs(3600);

const ATTEMPTS: usize = 16;

/// A blob that was stored, and is kept for the upload that brought it until it is settled.
#[derive(Debug)]
#[must_use = "a claim is settled or released"]
pub(super) struct Claim {
    organization: OrganizationId,
    pub(super) digest: Digest,
    upload: Uuid,
    version: Version,
}

impl Claim {
    fn key(&self) -> Key {
        keys::blob_use(self.organization, &self.digest, BlobUser::Upload(self.upload))
    }
}

/// Whether an upload's claim became a lasting use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Settled {
    Kept,
    /// It was there already, or something newer is.
    NotNeeded,
}

impl App {
    /// Ends an upload: claims its content, then gives it its name.
    pub(super) async fn store_blob(
        &self,
        organization: OrganizationId,
        upload: Upload,
    ) -> Result<Claim> {
        let sealed = upload.seal().await.map_err(blob_error)?;
        let claim = self.claim(organization, sealed.digest()).await?;
        latchkey_failpoint::reach("cp.artifact.claimed");
        match sealed.name().await {
            Ok(()) => Ok(claim),
            Err(error) => {
                self.release_claim(&claim).await?;
                Err(blob_error(error))
            }
        }
    }

    pub(super) async fn claim(
        &self,
        organization: OrganizationId,
        digest: Digest,
    ) -> Result<Claim> {
        let upload = self.new_id();
        let user = keys::blob_use(organization, &digest, BlobUser::Upload(upload));
        let note = keys::garbage(organization, &digest);
        for _ in 0..ATTEMPTS {
            let expect = expected(self.unmarked(&note).await?.as_ref());
            let batch = Batch::new().put(note.clone(), expect, []).put(
                user.clone(),
                Expect::Absent,
                encode(&Millis::from(self.now())),
            );
            match self.store.commit(batch).await {
                Ok(version) => return Ok(Claim { organization, digest, upload, version }),
                Err(CommitError::Conflict { .. }) => {}
                Err(error @ CommitError::Store(_)) => return Err(error.into()),
            }
        }
        Err(too_fast())
    }

    /// Adds to a batch that what an upload claimed is needed by `user` from now on. The batch is
    /// refused if the claim has ended.
    pub(super) async fn settle_claim(
        &self,
        batch: Batch,
        claim: &Claim,
        user: BlobUser,
    ) -> Result<Batch> {
        let batch = batch.delete(claim.key(), Expect::At(claim.version));
        self.share(batch, claim.organization, &claim.digest, user).await
    }

    /// As [`App::settle_claim`], for content that a record of its own kind keeps.
    pub(super) async fn settle_claim_by_record(
        &self,
        batch: Batch,
        claim: &Claim,
    ) -> Result<Batch> {
        let batch = batch.delete(claim.key(), Expect::At(claim.version));
        self.take_note(batch, claim.organization, &claim.digest).await
    }

    /// Adds to a batch that `user`, too, needs a blob that is needed already. The batch has to
    /// depend on that other need.
    pub(super) async fn share(
        &self,
        batch: Batch,
        organization: OrganizationId,
        digest: &Digest,
        user: BlobUser,
    ) -> Result<Batch> {
        let batch = self.take_note(batch, organization, digest).await?;
        Ok(batch.put(keys::blob_use(organization, digest, user), Expect::Anything, []))
    }

    /// Takes the note away, so that a collection that has read it looks again.
    async fn take_note(
        &self,
        batch: Batch,
        organization: OrganizationId,
        digest: &Digest,
    ) -> Result<Batch> {
        let note = keys::garbage(organization, digest);
        Ok(match self.unmarked(&note).await? {
            None => batch.check(note, Expect::Absent),
            Some(found) => batch.delete(note, Expect::At(found.version)),
        })
    }

    /// Ends a claim that nothing came of. Idempotent.
    pub(super) async fn release_claim(&self, claim: &Claim) -> Result<()> {
        for _ in 0..ATTEMPTS {
            match self.store.fetch(&claim.key()).await? {
                Some(found) if found.version == claim.version => {}
                Some(_) | None => return Ok(()),
            }
            let batch = Batch::new().delete(claim.key(), Expect::At(claim.version));
            let batch = self.note(batch, claim.organization, &claim.digest).await?;
            match self.store.commit(batch).await {
                Ok(_) => return Ok(()),
                Err(CommitError::Conflict { .. }) => {}
                Err(error @ CommitError::Store(_)) => return Err(error.into()),
            }
        }
        // It ends by itself.
        Ok(())
    }

    /// Adds to a batch that a blob is not needed by `user` any more.
    pub(super) async fn end_use(
        &self,
        batch: Batch,
        organization: OrganizationId,
        digest: &Digest,
        user: BlobUser,
    ) -> Result<Batch> {
        let batch = batch.delete(keys::blob_use(organization, digest, user), Expect::Anything);
        self.note(batch, organization, digest).await
    }

    /// Adds to a batch that somebody has to look whether a blob is still needed.
    pub(super) async fn note(
        &self,
        batch: Batch,
        organization: OrganizationId,
        digest: &Digest,
    ) -> Result<Batch> {
        let note = keys::garbage(organization, digest);
        if batch.names(&note) {
            return Ok(batch);
        }
        match self.store.fetch(&note).await? {
            Some(found) if found.value == DELETING => Ok(batch),
            // Written again also where there is one: who has read it may have looked too early.
            found => Ok(batch.put(note, expected(found.as_ref()), [])),
        }
    }

    /// Adds to a batch that a job made something else in place of `before`.
    pub(super) async fn end_made(
        &self,
        batch: Batch,
        organization: OrganizationId,
        run: RunId,
        before: &Loaded<Text<Digest>>,
    ) -> Result<Batch> {
        let digest = &before.value.0;
        let user = keys::blob_use(organization, digest, BlobUser::Made(run));
        // Before the others are read: who makes the same meanwhile writes it again.
        let known = self.store.fetch(&user).await?;
        for (key, other) in self.list(keys::artifacts_of(run)).await? {
            let other: Text<Digest> = crate::store::record::decode(&key, &other)?;
            if key != before.key && other.0 == *digest {
                return Ok(batch);
            }
        }
        let batch = match known {
            Some(known) => batch.delete(user, Expect::At(known.version)),
            None => batch,
        };
        self.note(batch, organization, digest).await
    }

    /// Adds to a batch that moves a run what of its content may not be needed afterwards.
    pub(super) async fn note_what_ends(
        &self,
        mut batch: Batch,
        before: &Run,
        next: &Run,
        effects: &[Effect],
    ) -> Result<Batch> {
        let organization = next.request.organization;
        if let (true, Some(planned)) = (effects.contains(&Effect::DropPlan), &next.planned) {
            batch = self.note(batch, organization, &planned.digests.workspace).await?;
        }
        if next.state.is_end() && !before.state.is_end() {
            for (key, made) in self.list(keys::artifacts_of(next.id)).await? {
                let made: Text<Digest> = crate::store::record::decode(&key, &made)?;
                batch = self.note(batch, organization, &made.0).await?;
            }
            batch = self.end_variables(batch, organization, next.id).await?;
        }
        Ok(batch)
    }

    /// Reads a note; refuses one of a deletion under way.
    async fn unmarked(&self, note: &Key) -> Result<Option<Versioned>> {
        match self.store.fetch(note).await? {
            Some(found) if found.value == DELETING => {
                let message = "equal content is being deleted; send it again";
                Err(Error::refused(Reason::StoreUnavailable, message))
            }
            found => Ok(found),
        }
    }
}

fn expected(found: Option<&Versioned>) -> Expect {
    found.map_or(Expect::Absent, |found| Expect::At(found.version))
}

fn too_fast() -> Error {
    Error::refused(Reason::ChangedMeanwhile, "equal content comes and goes too fast; send it again")
}
