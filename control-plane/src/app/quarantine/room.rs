//! Makes room in a full quarantine: what can be missed gives way to what is new.
//!
//! Workspaces, plans' changes and logs of old leases help a person to understand; of them the
//! oldest goes first, when an organization's bound is reached; to something of their own sort as
//! much as it takes itself, and no more, since what is refused stays on its runner while what gave
//! way is gone. A state may be all that is left of
//! an apply, and a result all that tells how it ended: neither is ever dropped but by a person. So
//! when nothing else is left, a state is refused, which its runner keeps and brings again until
//! there is room, and which the audit trail tells. Nothing gives way to what rests on a runner's
//! word alone.

use std::sync::PoisonError;
use std::time::Duration;

use latchkey_domain::id::{OrganizationId, QuarantinedId};
use latchkey_proto::v1::Reason;
use tokio::time::Instant;

use super::bounds::Excess;
use crate::app::App;
use crate::app::artifacts::{ArtifactHeader, Made};
use crate::auth::RunnerIdentity;
use crate::error::{Error, Result};
use crate::store::record::decode;
use crate::store::record::quarantine::{Quarantined, Witness};
use crate::store::{Batch, Scan, keys};

/// How many records are looked at together.
const PAGE: usize = 256;

/// How often it is told that an organization's quarantine is full: runners try on and on.
const TELL: Duration = Duration::from_secs(3600);

impl App {
    /// Lists what would give way, oldest first; `None` when all of it would not be enough.
    pub(super) async fn what_gives_way(
        &self,
        organization: OrganizationId,
        excess: Excess,
        replaced: Option<QuarantinedId>,
    ) -> Result<Option<Vec<QuarantinedId>>> {
        let (mut bytes, mut gone, mut after) = (0, vec![], None);
        loop {
            let scan = Scan::ascending(keys::quarantined_of(organization), PAGE);
            let page = self.scan(scan.after(after.take())).await?;
            for (key, found) in &page {
                let record: Quarantined = decode(key, found)?;
                let is_its_own = replaced == Some(record.id.0);
                if is_its_own || record.witness != Witness::Record || is_kept(record.kind.into()) {
                    continue;
                }
                bytes += record.size;
                gone.push(record.id.0);
                if bytes >= excess.bytes && gone.len() as u64 >= excess.entries {
                    return Ok(Some(gone));
                }
            }
            match page.into_iter().next_back() {
                Some((key, _)) => after = Some(key),
                None => return Ok(None),
            }
        }
    }

    /// Tells of a refusal for want of room, where it is of something that must not be lost.
    pub(super) async fn refuse_for_room(
        &self,
        runner: &RunnerIdentity,
        header: ArtifactHeader,
        error: Error,
    ) -> Result<Error> {
        if error.reason() != Reason::StoreUnavailable || !self.is_news(runner.organization) {
            return Ok(error);
        }
        let run = header.lease.job.run;
        let draft = self
            .draft(
                runner.organization,
                runner.audit_name(),
                "quarantine_full",
                format!("run {run}"),
            )
            .with("kind", header.kind.as_str())
            .with("digest", header.digest.to_string())
            .with("why", error.message());
        self.store.commit(Batch::new().audit(draft)).await?;
        tracing::error!(run_id = %run, runner_id = %runner.id, kind = header.kind.as_str(),
            "quarantine is full; its runner keeps what it has until somebody has made room");
        Ok(error)
    }

    fn is_news(&self, organization: OrganizationId) -> bool {
        let now = Instant::now();
        // Nothing that holds it can panic halfway.
        let told = self.uploads.told_full.lock();
        let mut told = told.unwrap_or_else(PoisonError::into_inner);
        told.retain(|_, at| now.duration_since(*at) < TELL);
        let is_news = !told.contains_key(&organization);
        told.entry(organization).or_insert(now);
        is_news
    }
}

/// Which kinds are never dropped but by a person.
pub(super) const fn is_kept(kind: Made) -> bool {
    match kind {
        Made::State | Made::ErroredState | Made::StateDump | Made::Result => true,
        Made::Workspace | Made::Changes | Made::Log => false,
    }
}
