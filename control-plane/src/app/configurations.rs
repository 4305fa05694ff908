//! Configuration archives: uploaded once, named by their digest, checked on the way.

use std::sync::Arc;

use latchkey_domain::id::{Digest, OrganizationId};
use latchkey_proto::v1::Reason;
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio::task::JoinHandle;

use super::App;
use super::archive_check::{LARGEST_PACKED, inspect};
use super::chunks::Chunks;
use super::claims::{Claim, Settled};
use super::uploads::MOST_ARCHIVES;
use crate::auth::{Caller, Right, Standing};
use crate::blobs::{BlobError, Upload};
use crate::error::{Error, Result};
use crate::store::record::encode;
use crate::store::record::environment::Configuration;
use crate::store::{Batch, CommitError, Expect, keys};

const ATTEMPTS: usize = 16;

/// An archive on its way in.
pub struct ConfigurationUpload {
    app: Arc<App>,
    standing: Standing,
    blob: Upload,
    /// Feeds the check that runs beside the write; gone once the check has seen enough.
    to_check: Option<mpsc::Sender<Vec<u8>>>,
    check: JoinHandle<Result<()>>,
    /// A check holds a thread until its upload ends.
    _place: OwnedSemaphorePermit,
}

impl std::fmt::Debug for ConfigurationUpload {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ConfigurationUpload").finish_non_exhaustive()
    }
}

impl App {
    pub async fn upload_configuration(
        self: &Arc<Self>,
        caller: &Caller,
        organization: &str,
        environment: &str,
    ) -> Result<ConfigurationUpload> {
        let (standing, _) = self.on(caller, organization, environment, Right::Operate).await?;
        let place = self.uploads.archive().ok_or_else(|| {
            let message = "too many uploads at once; try again in a moment";
            Error::refused(Reason::LimitReached, message).with("limit", MOST_ARCHIVES.to_string())
        })?;
        let blob = self
            .blobs
            .begin(standing.organization, None, LARGEST_PACKED)
            .await
            .map_err(blob_error)?;
        let (to_check, chunks) = mpsc::channel(8);
        let check = tokio::task::spawn_blocking(move || inspect(Chunks::new(chunks)));
        Ok(ConfigurationUpload {
            app: Arc::clone(self),
            standing,
            blob,
            to_check: Some(to_check),
            check,
            _place: place,
        })
    }
}

impl ConfigurationUpload {
    pub async fn write(&mut self, data: &[u8]) -> Result<()> {
        self.blob.write(data).await.map_err(blob_error)?;
        if let Some(to_check) = &self.to_check
            && to_check.send(data.to_vec()).await.is_err()
        {
            self.to_check = None;
        }
        Ok(())
    }

    /// Ends the upload, also if nobody waits for it any more. A bad archive leaves nothing behind.
    pub async fn finish(mut self) -> Result<Digest> {
        drop(self.to_check.take());
        (&mut self.check).await.map_err(Error::internal)??;
        tokio::spawn(self.record()).await.map_err(Error::internal)?
    }

    async fn record(self) -> Result<Digest> {
        let Self { app, standing, blob, _place: place, .. } = self;
        let Standing { caller, organization, .. } = &standing;
        let claim = app.store_blob(*organization, blob).await?;
        let digest = claim.digest;
        let recorded = app.record_configuration(caller, *organization, &claim).await;
        if !matches!(recorded, Ok(Settled::Kept)) {
            app.release_claim(&claim).await?;
            app.collect_garbage_soon();
        }
        drop(place);
        recorded.map(|_| digest)
    }
}

impl App {
    async fn record_configuration(
        &self,
        caller: &Caller,
        organization: OrganizationId,
        claim: &Claim,
    ) -> Result<Settled> {
        let key = keys::configuration(organization, &claim.digest);
        for _ in 0..ATTEMPTS {
            if self.store.fetch(&key).await?.is_some() {
                return Ok(Settled::NotNeeded);
            }
            let record =
                Configuration { uploaded_by: caller.name().to_owned(), at: self.now().into() };
            let draft = self.draft(
                organization,
                caller.audit_name(),
                "upload_configuration",
                format!("configuration {}", claim.digest),
            );
            let batch = Batch::new().put(key.clone(), Expect::Absent, encode(&record));
            let batch = self.settle_claim_by_record(batch, claim).await?.audit(draft);
            match self.store.commit(batch).await {
                Ok(_) => return Ok(Settled::Kept),
                Err(CommitError::Conflict { .. }) => {}
                Err(error @ CommitError::Store(_)) => return Err(error.into()),
            }
        }
        Err(Error::refused(Reason::ChangedMeanwhile, "it took too long; send it again"))
    }
}

pub(super) fn blob_error(error: BlobError) -> Error {
    match error {
        BlobError::TooLarge { limit } => {
            let limit = limit >> 20;
            let message = format!("it is larger than {limit} MiB; leave out what is not needed");
            Error::refused(Reason::LimitReached, message).with("limit", format!("{limit} MiB"))
        }
        BlobError::WrongDigest { .. } => Error::refused(
            Reason::DigestMismatch,
            "the bytes have not the digest that was announced; send them again",
        ),
        BlobError::Missing { .. } => Error::not_found("stored content"),
        error @ (BlobError::Damaged { .. } | BlobError::Io { .. }) => Error::internal(error),
    }
}
