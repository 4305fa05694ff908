//! Deletes what nothing needs any more: noted in the commit that ended the need, done after it,
//! and done again by the reaper should that have failed.

use std::sync::Arc;

use super::App;
use super::configurations::blob_error;
use crate::error::Result;
use crate::store::{Batch, Expect, keys};

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
        for (key, _) in self.list(keys::all(keys::Kind::Garbage)).await? {
            if let Some((organization, digest)) = keys::read_garbage(&key) {
                self.blobs.delete(organization, digest).await.map_err(blob_error)?;
            }
            self.store.commit(Batch::new().delete(key, Expect::Anything)).await?;
        }
        for (key, _) in self.list(keys::variables_of_runs()).await? {
            let Some(run) = keys::run_of_variable(&key) else { continue };
            if self.run(run).await.is_ok_and(|run| run.value.state.is_end()) {
                self.store.commit(Batch::new().delete(key, Expect::Anything)).await?;
            }
        }
        Ok(())
    }
}
