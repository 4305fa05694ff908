//! Quarantine: what runners brought that is not current, kept for a person.
//!
//! An old lease changes nothing, but what it brings may be all that is left of what it did. So
//! it is kept beside the run: of each lease the newest of each kind. A person looks at it, makes
//! a state the environment's newest, or drops it.
//!
//! Taken is only what comes from who held the job at that epoch; and, since a restore forgets
//! runs and epochs, what a runner of the organization says of an older generation, within bounds.

mod review;
mod serial;

use latchkey_domain::id::{EnvironmentId, QuarantinedId, RunId};
use latchkey_domain::policy::Phase;
use latchkey_domain::run::Run;
use latchkey_proto::v1::Reason;

use super::App;
use super::artifacts::{ArtifactHeader, Made};
use super::finish_job::{JobResult, LONGEST_REASON, printable};
use super::lease_job::lease_lost;
use crate::auth::RunnerIdentity;
use crate::error::{Error, Result};
use crate::job::LeaseRef;
use crate::store::keys::{BlobUser, QuarantineSlot};
use crate::store::record::quarantine::{Quarantined, StateFacts, Tally};
use crate::store::record::{Loaded, Text, encode};
use crate::store::{Batch, CommitError, Expect, Version, keys};

pub use self::review::{QuarantinedView, next_steps};

const ATTEMPTS: usize = 16;

/// The most that is kept of one run that the control plane has seen leased. Small things, which
/// states are next to workspaces, are taken above it: each lease brings one of a kind.
const MOST_BYTES: u64 = 4 << 30;

/// The most that is kept of what runners say of an older generation.
const FOREIGN_ENTRIES: u64 = 16;
const FOREIGN_BYTES: u64 = 1 << 30;
const FOREIGN_RUNS: usize = 64;

/// What is read of a thing before it goes to quarantine.
#[derive(Clone, Debug, Default)]
pub(super) struct Learned {
    pub(super) state: Option<StateFacts>,
    pub(super) outcome: Option<String>,
}

/// What is known of the lease that brings something.
#[derive(Debug)]
enum Origin {
    /// The runner held the job at that epoch.
    Held(Box<Run>),
    /// An older generation's word alone; the run may be known or not.
    Foreign(Option<Box<Run>>),
}

impl Origin {
    fn environment(&self) -> Option<EnvironmentId> {
        match self {
            Origin::Held(run) | Origin::Foreign(Some(run)) => Some(run.request.environment),
            Origin::Foreign(None) => None,
        }
    }
}

impl App {
    /// Refuses what may not even go to quarantine, before a byte of it is taken.
    pub(super) async fn check_quarantine(
        &self,
        runner: &RunnerIdentity,
        header: ArtifactHeader,
    ) -> Result<()> {
        self.identity_guard(runner.id).await?;
        let origin = self.origin(runner, header.lease).await?;
        let slot = slot_of(runner, header);
        let key = keys::quarantine_tally(runner.organization, slot.run);
        let tally = self.fetch::<Tally>(key).await?.map_or(Tally::default(), |tally| tally.value);
        let before = self.in_slot(slot).await?;
        let before = before.as_ref().map(|(_, before)| &before.value);
        check_bounds(&origin, header, tally_with(tally, before, header.size))?;
        if let Origin::Foreign(_) = origin {
            self.quota(runner, slot.run).await?;
        }
        Ok(())
    }

    /// Keeps the newest of each kind that a lease brings back.
    pub(super) async fn quarantine(
        &self,
        runner: &RunnerIdentity,
        header: ArtifactHeader,
        learned: Learned,
    ) -> Result<()> {
        let organization = runner.organization;
        for _ in 0..ATTEMPTS {
            let (identity, unrevoked) = self.identity_guard(runner.id).await?;
            let origin = self.origin(runner, header.lease).await?;
            let slot = slot_of(runner, header);
            let tally_key = keys::quarantine_tally(organization, slot.run);
            let tally: Option<Loaded<Tally>> = self.fetch(tally_key.clone()).await?;
            let before = self.in_slot(slot).await?;
            let known = before.as_ref().map(|(_, before)| &before.value);
            if known.is_some_and(|known| known.digest.0 == header.digest) {
                return Ok(());
            }
            if known.is_some_and(|known| known.sequence > header.sequence) {
                // An older snapshot that was on its way while a newer one was kept.
                let note = keys::garbage(organization, &header.digest);
                self.store.commit(Batch::new().put(note, Expect::Anything, [])).await?;
                return Ok(());
            }
            let total = tally.as_ref().map_or(Tally::default(), |tally| tally.value);
            let total = tally_with(total, known, header.size);
            check_bounds(&origin, header, total)?;

            let id = QuarantinedId::from_uuid(self.new_id());
            let record = Quarantined {
                id: Text(id),
                organization: Text(organization),
                environment: origin.environment().map(Text),
                run: Text(slot.run),
                phase: slot.phase,
                epoch: slot.epoch.get(),
                generation: slot.generation.get(),
                kind: header.kind.into(),
                digest: Text(header.digest),
                size: header.size,
                runner: Text(runner.id),
                at: self.now().into(),
                sequence: header.sequence,
                state: learned.state.clone(),
                outcome: learned.outcome.clone(),
                accepted: None,
            };
            let draft = self
                .draft(organization, runner.audit_name(), "quarantine", format!("run {}", slot.run))
                .with("id", id.to_string())
                .with("kind", header.kind.as_str())
                .with("phase", slot.phase.to_string())
                .with("epoch", slot.epoch.get())
                .with("generation", slot.generation.get())
                .with("digest", header.digest.to_string());
            let expect = tally.map_or(Expect::Absent, |tally| Expect::At(tally.version));
            let mut batch = Batch::new()
                .check(identity, unrevoked)
                .put(tally_key, expect, encode(&total))
                .put(keys::quarantined(organization, id), Expect::Absent, encode(&record))
                .audit(draft);
            if let Origin::Foreign(_) = origin {
                let (mut runs, expect) = self.quota(runner, slot.run).await?;
                if !runs.contains(&Text(slot.run)) {
                    runs.push(Text(slot.run));
                }
                batch = batch.put(keys::quarantine_quota(runner.id), expect, encode(&runs));
            }
            let expect = match before {
                None => Expect::Absent,
                Some((version, before)) => {
                    let user = BlobUser::Quarantined(before.value.id.0);
                    batch = batch.delete(before.key, Expect::At(before.version));
                    batch = Self::release_blob(batch, organization, &before.value.digest.0, user);
                    Expect::At(version)
                }
            };
            batch = batch.put(keys::quarantine(slot), expect, encode(&Text(id)));
            let user = BlobUser::Quarantined(id);
            let batch = self.claim_blob(batch, organization, &header.digest, user).await?;
            match self.store.commit(batch).await {
                Ok(_) => {
                    tracing::warn!(run_id = %slot.run, runner_id = %runner.id, epoch = slot.epoch.get(),
                        kind = header.kind.as_str(), "kept in quarantine");
                    return Ok(());
                }
                Err(CommitError::Conflict { .. }) => {}
                Err(error @ CommitError::Store(_)) => return Err(error.into()),
            }
        }
        Err(Error::refused(Reason::ChangedMeanwhile, "it changes too fast; send it again"))
    }

    /// Takes nothing but from who held the job at that epoch, or from before a restore: what
    /// others say of a run is not worth a byte of disk.
    async fn origin(&self, runner: &RunnerIdentity, lease: LeaseRef) -> Result<Origin> {
        if lease.generation > self.generation {
            return Err(lease_lost());
        }
        let run = match self.run(lease.job.run).await {
            Ok(run) if run.value.request.organization == runner.organization => {
                Some(Box::new(run.value))
            }
            // Of another tenant: answered like any lease that is not theirs.
            Ok(_) => return Err(lease_lost()),
            Err(error) if error.reason() == Reason::NotFound => None,
            Err(error) => return Err(error),
        };
        match run {
            Some(run) if run.job(lease.job.phase).was_held_by(runner.id, lease.epoch) => {
                Ok(Origin::Held(run))
            }
            run if lease.generation < self.generation => Ok(Origin::Foreign(run)),
            Some(_) | None => Err(lease_lost()),
        }
    }

    async fn in_slot(
        &self,
        slot: QuarantineSlot,
    ) -> Result<Option<(Version, Loaded<Quarantined>)>> {
        let id: Option<Loaded<Text<QuarantinedId>>> = self.fetch(keys::quarantine(slot)).await?;
        let Some(id) = id else { return Ok(None) };
        let found = self.fetch(keys::quarantined(slot.organization, id.value.0)).await?;
        Ok(found.map(|found| (id.version, found)))
    }

    /// Fetches of which runs a runner has brought things on its word alone, if this one may be
    /// among them.
    async fn quota(
        &self,
        runner: &RunnerIdentity,
        run: RunId,
    ) -> Result<(Vec<Text<RunId>>, Expect)> {
        let found: Option<Loaded<Vec<Text<RunId>>>> =
            self.fetch(keys::quarantine_quota(runner.id)).await?;
        let (runs, expect) = match found {
            Some(found) => (found.value, Expect::At(found.version)),
            None => (vec![], Expect::Absent),
        };
        if runs.len() >= FOREIGN_RUNS && !runs.contains(&Text(run)) {
            return Err(limit(format!(
                "this runner has {FOREIGN_RUNS} runs of before the restore in quarantine; drop some"
            )));
        }
        Ok((runs, expect))
    }

    /// Tells whether a lease left a state that terraform could not deliver.
    pub(super) async fn left_a_state(
        &self,
        runner: &RunnerIdentity,
        lease: LeaseRef,
    ) -> Result<bool> {
        for kind in [Made::ErroredState, Made::StateDump] {
            let slot = slot(runner, lease, kind);
            if self.store.fetch(&keys::quarantine(slot)).await?.is_some() {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Counts what is in quarantine beside a phase.
    pub(super) async fn count_quarantined(&self, run: &Run, phase: Phase) -> Result<u32> {
        let prefix = keys::quarantine_of_phase(run.request.organization, run.id, phase);
        Ok(u32::try_from(self.list(prefix).await?.len()).unwrap_or(u32::MAX))
    }
}

fn slot_of(runner: &RunnerIdentity, header: ArtifactHeader) -> QuarantineSlot {
    slot(runner, header.lease, header.kind)
}

fn slot(runner: &RunnerIdentity, lease: LeaseRef, kind: Made) -> QuarantineSlot {
    QuarantineSlot {
        organization: runner.organization,
        run: lease.job.run,
        phase: lease.job.phase,
        epoch: lease.epoch,
        generation: lease.generation,
        runner: runner.id,
        kind: kind.number(),
    }
}

fn tally_with(tally: Tally, before: Option<&Quarantined>, size: u64) -> Tally {
    Tally {
        entries: tally.entries + u64::from(before.is_none()),
        bytes: tally.bytes.saturating_sub(before.map_or(0, |before| before.size)) + size,
    }
}

fn check_bounds(origin: &Origin, header: ArtifactHeader, total: Tally) -> Result<()> {
    let fits = match (origin, header.kind) {
        (Origin::Foreign(_), _) => total.entries <= FOREIGN_ENTRIES && total.bytes <= FOREIGN_BYTES,
        (Origin::Held(_), Made::Workspace | Made::Changes | Made::Log) => total.bytes <= MOST_BYTES,
        // At most one of each for each of the holders that are remembered.
        (Origin::Held(_), Made::State | Made::ErroredState | Made::StateDump | Made::Result) => {
            true
        }
    };
    if fits {
        Ok(())
    } else {
        Err(limit("too much of this run is in quarantine; drop some".into()))
    }
}

fn limit(message: String) -> Error {
    Error::refused(Reason::LimitReached, message)
}

/// Says in a sentence how a job ended, as its runner told it.
pub(super) fn outcome(phase: Phase, result: &JobResult) -> String {
    match result {
        JobResult::Planned { applyable: true, .. } => "says that the plan ended well".to_owned(),
        JobResult::Planned { applyable: false, .. } => {
            "says that the plan ended well, with nothing to change".to_owned()
        }
        JobResult::Applied { .. } => "says that the apply ended well".to_owned(),
        JobResult::Failed { reason, .. } => {
            let reason = printable(reason, LONGEST_REASON);
            format!("says that the {phase} did not end well: {reason}")
        }
    }
}

#[cfg(test)]
mod tests;
