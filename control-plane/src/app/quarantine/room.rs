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

mod full;

use latchkey_domain::id::{OrganizationId, QuarantinedId};
use latchkey_proto::v1::Reason;

use super::bounds::Excess;
use crate::app::App;
use crate::app::artifacts::{ArtifactHeader, Made};
use crate::auth::RunnerIdentity;
use crate::error::{Error, Result};
use crate::store::record::decode;
use crate::store::record::quarantine::{Quarantined, Witness};
use crate::store::{Batch, Scan, keys};

pub(in crate::app) use self::full::Full;

/// How many records are looked at together.
const PAGE: usize = 256;

impl App {
    /// Lists what would give way, oldest first; `None` when all of it would not be enough, which
    /// costs a look at all there is and is remembered for a while.
    pub(super) async fn what_gives_way(
        &self,
        organization: OrganizationId,
        excess: Excess,
        replaced: Option<&Quarantined>,
    ) -> Result<Option<Vec<QuarantinedId>>> {
        let replaced = replaced.filter(|replaced| gives_way(replaced));
        let own = Excess {
            entries: u64::from(replaced.is_some()),
            bytes: replaced.map_or(0, |replaced| replaced.size),
        };
        if self.uploads.full.is_more_than_gives_way(organization, excess, own) {
            return Ok(None);
        }
        let (mut bytes, mut gone, mut after) = (0, vec![], None);
        loop {
            let scan = Scan::ascending(keys::quarantined_of(organization), PAGE);
            let page = self.scan(scan.after(after.take())).await?;
            for (key, found) in &page {
                let record: Quarantined = decode(key, found)?;
                let is_its_own = replaced.is_some_and(|replaced| replaced.id == record.id);
                if is_its_own || !gives_way(&record) {
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
                None => {
                    let entries = gone.len() as u64 + own.entries;
                    let all = Excess { entries, bytes: bytes + own.bytes };
                    self.uploads.full.remember(organization, all);
                    return Ok(None);
                }
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
        if error.reason() != Reason::StoreUnavailable {
            return Ok(error);
        }
        let Some(telling) = self.uploads.full.tell(runner.organization) else { return Ok(error) };
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
        telling.done();
        tracing::error!(run_id = %run, runner_id = %runner.id, kind = header.kind.as_str(),
            "quarantine is full; its runner keeps what it has until somebody has made room");
        Ok(error)
    }
}

fn gives_way(record: &Quarantined) -> bool {
    record.witness == Witness::Record && !is_kept(record.kind.into())
}

/// Which kinds are never dropped but by a person.
pub(super) const fn is_kept(kind: Made) -> bool {
    match kind {
        Made::State | Made::ErroredState | Made::StateDump | Made::Result => true,
        Made::Workspace | Made::Changes | Made::Log => false,
    }
}
