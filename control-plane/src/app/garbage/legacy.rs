//! Records, once for a store, who needs the blobs that were stored before uses were recorded.
//!
//! They are derived from what names blobs: state versions, what open runs' jobs made, the changes
//! that are shown of plans, quarantine. Until it is done nothing is deleted. Doing it again
//! changes nothing.

use latchkey_domain::id::{Digest, EnvironmentId, OrganizationId, RunId};

use super::App;
use crate::error::Result;
use crate::store::keys::{BlobUser, Kind};
use crate::store::record::environment::StateVersion;
use crate::store::record::quarantine::Quarantined;
use crate::store::record::{Text, decode};
use crate::store::{Batch, Expect, Key, SCAN_LIMIT, Scan, Versioned, keys};

/// The setting that says that it was done.
const RECORDED: &str = "blob uses recorded";

/// What names blobs.
#[derive(Clone, Copy, Debug)]
enum Source {
    Environments,
    Runs,
    Quarantine,
    /// Of the first layout: beside the run, without a record of its own.
    OldQuarantine,
}

impl Source {
    const ALL: [Source; 4] =
        [Source::Environments, Source::Runs, Source::Quarantine, Source::OldQuarantine];

    const fn kind(self) -> Kind {
        match self {
            Source::Environments => Kind::Environment,
            Source::Runs => Kind::Run,
            Source::Quarantine => Kind::Quarantined,
            Source::OldQuarantine => Kind::Quarantine,
        }
    }
}

impl App {
    pub(super) async fn record_old_uses(&self) -> Result<()> {
        let done = keys::setting(RECORDED);
        if self.store.fetch(&done).await?.is_some() {
            return Ok(());
        }
        for source in Source::ALL {
            let mut after = None;
            loop {
                let scan =
                    Scan::ascending(keys::all(source.kind()), SCAN_LIMIT).after(after.take());
                let page = self.scan(scan).await?;
                for (key, found) in &page {
                    for (organization, digest, user) in self.uses_of(source, key, found).await? {
                        self.record_use(organization, &digest, user).await?;
                    }
                }
                match page.last() {
                    Some((key, _)) if page.len() == SCAN_LIMIT => after = Some(key.clone()),
                    Some(_) | None => break,
                }
            }
        }
        self.store.commit(Batch::new().put(done, Expect::Anything, [])).await?;
        Ok(())
    }

    async fn record_use(
        &self,
        organization: OrganizationId,
        digest: &Digest,
        user: BlobUser,
    ) -> Result<()> {
        let key = keys::blob_use(organization, digest, user);
        if self.store.fetch(&key).await?.is_none() {
            self.store.commit(Batch::new().put(key, Expect::Anything, [])).await?;
        }
        Ok(())
    }

    async fn uses_of(
        &self,
        source: Source,
        key: &Key,
        found: &Versioned,
    ) -> Result<Vec<(OrganizationId, Digest, BlobUser)>> {
        let mut uses = vec![];
        match source {
            Source::Environments => {
                let (Some(organization), Some(id)) = (key.first_id(), key.last_id()) else {
                    return Ok(uses);
                };
                let organization = OrganizationId::from_bytes(organization);
                let id = EnvironmentId::from_bytes(id);
                for (key, found) in self.list(keys::state_versions_of(id)).await? {
                    let version: StateVersion = decode(&key, &found)?;
                    uses.push((organization, version.digest.0, BlobUser::State(id)));
                }
            }
            Source::Runs => {
                let Some(id) = key.last_id().map(RunId::from_bytes) else { return Ok(uses) };
                let run = self.run(id).await?.value;
                let organization = run.request.organization;
                for (key, found) in self.list(keys::artifacts_of(id)).await? {
                    let made: Text<Digest> = decode(&key, &found)?;
                    uses.push((organization, made.0, BlobUser::Made(id)));
                }
                if let Some(planned) = run.planned {
                    for digest in [planned.digests.changes, planned.digests.workspace] {
                        uses.push((organization, digest, BlobUser::Made(id)));
                    }
                }
            }
            Source::Quarantine => {
                let record: Quarantined = decode(key, found)?;
                let user = BlobUser::Quarantined(record.id.0);
                uses.push((record.organization.0, record.digest.0, user));
            }
            // Nothing shows it any more, but it is kept with its environment's states.
            Source::OldQuarantine => {
                let old = serde_json::from_slice::<Old>(&found.value);
                let run = key.first_id().map(RunId::from_bytes);
                if let (Ok(old), Some(run)) = (old, run)
                    && let Ok(run) = self.run(run).await
                {
                    let request = run.value.request;
                    let user = BlobUser::State(request.environment);
                    uses.push((request.organization, old.digest.0, user));
                }
            }
        }
        Ok(uses)
    }
}

#[derive(serde::Deserialize)]
struct Old {
    digest: Text<Digest>,
}
