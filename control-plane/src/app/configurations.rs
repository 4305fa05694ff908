//! Configuration archives: uploaded once, named by their digest, checked on the way.

use std::sync::Arc;

use latchkey_domain::id::Digest;
use latchkey_proto::v1::Reason;
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio::task::JoinHandle;

use super::App;
use super::archive_check::{LARGEST_PACKED, inspect};
use super::chunks::Chunks;
use crate::auth::{Caller, Right, Standing};
use crate::blobs::{BlobError, Upload};
use crate::error::{Error, Result};
use crate::store::record::encode;
use crate::store::record::environment::Configuration;
use crate::store::{Batch, Expect, keys};

/// How many archives may be on their way in.
pub const MOST_UPLOADS: usize = 32;

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
        let standing = self.standing(caller, organization, Right::Operate).await?;
        self.environment_named(standing.organization, environment).await?;
        let place = Arc::clone(&self.uploads).try_acquire_owned().map_err(|_| {
            let message = "too many uploads at once; try again in a moment";
            Error::refused(Reason::LimitReached, message).with("limit", MOST_UPLOADS.to_string())
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

    /// Ends the upload. A bad archive leaves nothing behind.
    pub async fn finish(mut self) -> Result<Digest> {
        drop(self.to_check.take());
        self.check.await.map_err(Error::internal)??;
        let digest = self.blob.finish().await.map_err(blob_error)?;
        let Standing { caller, organization, .. } = &self.standing;
        let key = keys::configuration(*organization, &digest);
        if self.app.store.fetch(&key).await?.is_some() {
            return Ok(digest);
        }
        let record =
            Configuration { uploaded_by: caller.name().to_owned(), at: self.app.now().into() };
        let draft = self.app.draft(
            *organization,
            caller.audit_name(),
            "upload_configuration",
            format!("configuration {digest}"),
        );
        let batch = Batch::new().put(key, Expect::Anything, encode(&record)).audit(draft);
        self.app.store.commit(batch).await?;
        Ok(digest)
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
