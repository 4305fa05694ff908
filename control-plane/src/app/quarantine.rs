//! Quarantine: what runners brought that is not current, kept for a person.
//!
//! An old lease changes nothing, but what it brings may be all that is left of what it did. So
//! it is kept beside the run: of each lease the newest of each kind. A person looks at it, makes
//! a state the environment's newest, or drops it.
//!
//! What is kept is bounded, for a run, a runner and an organization ([`bounds`]); a full one drops
//! the oldest of what is neither a state nor a result ([`room`]).
//!
//! Taken is only what comes from who held the job at that epoch; and, since a restore forgets
//! runs and epochs, what a runner of the organization says of an older generation, within bounds of
//! its own, and told as what it is. Where nothing was ever restored, there is no such time.

mod bounds;
mod review;
mod room;
mod serial;
mod settle;

use latchkey_domain::id::{EnvironmentId, Generation, QuarantinedId};
use latchkey_domain::policy::Phase;
use latchkey_domain::run::Run;
use latchkey_proto::v1::Reason;

use self::bounds::Tallies;
use self::room::is_kept;
use super::App;
use super::artifacts::{ArtifactHeader, Made};
use super::claims::{Claim, Settled};
use super::finish_job::{JobResult, LONGEST_REASON, printable};
use super::lease_job::lease_lost;
use crate::auth::RunnerIdentity;
use crate::error::{Error, Result};
use crate::job::LeaseRef;
use crate::store::keys::{BlobUser, QuarantineSlot};
use crate::store::record::quarantine::{Quarantined, StateFacts, Witness};
use crate::store::record::{Loaded, Text, encode};
use crate::store::{Batch, CommitError, Expect, Version, keys};

pub use self::review::{QuarantinedView, next_steps};
pub(super) use self::room::Full;
pub use self::settle::Settlement;

const ATTEMPTS: usize = 16;

/// How many things give way in one turn, each by a commit of its own; and to something bulky, at
/// all.
const MOST_IN_A_TURN: usize = 64;

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

    const fn witness(&self) -> Witness {
        match self {
            Origin::Held(_) => Witness::Record,
            Origin::Foreign(_) => Witness::Word,
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
        let before = self.in_slot(slot).await?;
        let before = before.as_ref().map(|(_, before)| &before.value);
        let tallies = self.tallies(slot, origin.witness()).await?.with(before, header.size);
        self.find_room(runner, header, &tallies, before).await?;
        self.check_replaced(slot, before)?;
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
        claim: &Claim,
    ) -> Result<Settled> {
        let organization = runner.organization;
        let mut turn = self.uploads.quarantine.lock().await;
        for _ in 0..ATTEMPTS {
            // What an old copy acknowledges is thrown away with it.
            self.check_history()?;
            let (identity, unrevoked) = self.identity_guard(runner.id).await?;
            let origin = self.origin(runner, header.lease).await?;
            let slot = slot_of(runner, header);
            let tallies = self.tallies(slot, origin.witness()).await?;
            let before = self.in_slot(slot).await?;
            let known = before.as_ref().map(|(_, before)| &before.value);
            if known.is_some_and(|known| known.digest.0 == header.digest) {
                return Ok(Settled::NotNeeded);
            }
            if known.is_some_and(|known| known.sequence > header.sequence) {
                // An older snapshot that was on its way while a newer one was kept.
                return Ok(Settled::NotNeeded);
            }
            let tallies = tallies.with(known, header.size);
            let gives_way = self.find_room(runner, header, &tallies, known).await?;
            if !gives_way.is_empty() {
                for id in gives_way.into_iter().take(MOST_IN_A_TURN) {
                    self.take_out(organization, id, ("system", "quarantine_gave_way")).await?;
                }
                // Counted anew, and others have their turn before.
                drop(turn);
                turn = self.uploads.quarantine.lock().await;
                continue;
            }
            let replaced = self.check_replaced(slot, known)?;

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
                witness: origin.witness(),
                at: self.now().into(),
                sequence: header.sequence,
                replaced,
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
            let mut batch = tallies
                .write(Batch::new())
                .check(identity, unrevoked)
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
                    let digest = before.value.digest.0;
                    batch = self.end_use(batch, organization, &digest, user).await?;
                    Expect::At(version)
                }
            };
            batch = batch.put(keys::quarantine(slot), expect, encode(&Text(id)));
            let user = BlobUser::Quarantined(id);
            let batch = self.settle_claim(batch, claim, user).await?;
            match self.store.commit(batch).await {
                Ok(_) => {
                    tracing::warn!(run_id = %slot.run, runner_id = %runner.id, epoch = slot.epoch.get(),
                        kind = header.kind.as_str(), "kept in quarantine");
                    return Ok(Settled::Kept);
                }
                Err(CommitError::Conflict { .. }) => {}
                Err(error @ CommitError::Store(_)) => return Err(error.into()),
            }
        }
        Err(Error::refused(Reason::ChangedMeanwhile, "it changes too fast; send it again"))
    }

    /// Lists what has to give way for something new, or refuses it.
    async fn find_room(
        &self,
        runner: &RunnerIdentity,
        header: ArtifactHeader,
        tallies: &Tallies,
        before: Option<&Quarantined>,
    ) -> Result<Vec<QuarantinedId>> {
        let Err(error) = tallies.check(header.kind) else { return Ok(vec![]) };
        if let Some(excess) = tallies.excess(header.kind, header.size) {
            let found = self.what_gives_way(runner.organization, excess, before).await?;
            if let Some(gives_way) = found
                && (is_kept(header.kind) || gives_way.len() <= MOST_IN_A_TURN)
            {
                return Ok(gives_way);
            }
        }
        Err(self.refuse_for_room(runner, header, error).await?)
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
            // A plane that was never restored is of the first generation: there is none before.
            run if (Generation::FIRST..self.generation).contains(&lease.generation) => {
                Ok(Origin::Foreign(run))
            }
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
