//! What a person does with quarantine: lists it, reads it, makes a state current, drops it.

use std::collections::HashMap;
use std::sync::Arc;

use latchkey_domain::environment::Frozen;
use latchkey_domain::id::{
    Digest, Epoch, Generation, OrganizationId, QuarantinedId, RunId, RunnerId,
};
use latchkey_proto::v1::Reason;

use super::{ATTEMPTS, serial};
use crate::app::artifacts::{LARGEST_STATE, Made};
use crate::app::claims::Claim;
use crate::app::configurations::blob_error;
use crate::app::state_lock::locked;
use crate::app::states::with_version;
use crate::app::{App, Page, PageRequest};
use crate::auth::{self, Caller, Right};
use crate::blobs::BlobReader;
use crate::error::{Error, Result};
use crate::store::keys::{BlobUser, QuarantineSlot};
use crate::store::record::environment::{StateHead, StateOrigin, StateVersion};
use crate::store::record::quarantine::{Accepted, Kind, Quarantined, StateFacts, Witness};
use crate::store::record::{Loaded, Text, decode, encode};
use crate::store::{Batch, CommitError, Expect, Scan, keys};

/// Something in quarantine, and what it is against what is current.
#[derive(Clone, Debug)]
pub struct QuarantinedView {
    pub record: Quarantined,
    pub summary: String,
}

impl App {
    /// Lists what is in quarantine, newest first; of one run, or all.
    pub async fn list_quarantined(
        &self,
        caller: &Caller,
        organization: &str,
        run: Option<RunId>,
        page: PageRequest,
    ) -> Result<Page<QuarantinedView>> {
        let standing = self.member(caller, organization).await?;
        let organization = standing.organization;
        let environment = match run {
            Some(run) => match self.run(run).await {
                // A run of others is none.
                Ok(run) => Some(run.value.request)
                    .filter(|request| request.organization == organization)
                    .map(|request| request.environment),
                Err(error) if error.reason() == Reason::NotFound => None,
                Err(error) => return Err(error),
            },
            None => None,
        };
        // What is of no known environment, owners alone may see: a run that a restore forgot.
        let right = if environment.is_some() { Right::Read } else { Right::Own };
        auth::check(caller, Some(&standing.position), right, environment).map_err(|error| {
            match run {
                // Hidden, of others and unknown are told alike.
                Some(_) => Error::not_found("run"),
                None => error,
            }
        })?;
        let size = page.size()?;
        let after = page.after::<QuarantinedId>()?;
        let mut records: Vec<Quarantined> = match run {
            None => {
                let after = after.map(|id| keys::quarantined(organization, id));
                let scan = Scan::descending(keys::quarantined_of(organization), size + 1);
                let found = self.scan(scan.after(after)).await?;
                found.iter().map(|(key, found)| decode(key, found)).collect::<Result<_, _>>()?
            }
            Some(run) => {
                let mut records = vec![];
                for (key, found) in self.list(keys::quarantine_of(organization, run)).await? {
                    let id: Text<QuarantinedId> = decode(&key, &found)?;
                    let record = self.fetch(keys::quarantined(organization, id.0)).await?;
                    records.extend(record.map(|record: Loaded<Quarantined>| record.value));
                }
                records.sort_by_key(|record| std::cmp::Reverse(record.id.0));
                records.retain(|record| after.is_none_or(|after| record.id.0 < after));
                records
            }
        };
        let more = records.len() > size;
        records.truncate(size);
        let next = records.last().filter(|_| more).map(|record| record.id.0.to_string());
        let mut heads = HashMap::new();
        let mut items = vec![];
        for record in records {
            let head = match record.environment {
                None => None,
                Some(Text(id)) => match heads.get(&id) {
                    Some(head) => Option::clone(head),
                    None => {
                        let head = self.environment(organization, id).await?.value.state;
                        heads.insert(id, head.clone());
                        head
                    }
                },
            };
            let summary = summary(&record, head.as_ref());
            items.push(QuarantinedView { record, summary });
        }
        Ok(Page { items, next })
    }

    /// Begins to read one; the record of who did is durable before a byte of it leaves.
    pub async fn read_quarantined(
        &self,
        caller: &Caller,
        organization: &str,
        id: QuarantinedId,
    ) -> Result<BlobReader> {
        let organization = self.owner(caller, organization).await?.organization;
        let record = self.quarantined(organization, id).await?.value;
        let reader = self.blobs.read(organization, record.digest.0).await.map_err(blob_error)?;
        let draft = self
            .draft(
                organization,
                caller.audit_name(),
                "read_quarantined",
                format!("run {}", record.run.0),
            )
            .with("id", id.to_string())
            .with("kind", Made::from(record.kind).as_str())
            .with("digest", record.digest.0.to_string());
        self.store.commit(Batch::new().audit(draft)).await?;
        Ok(reader)
    }

    /// Makes a quarantined state the newest of the environment whose name was typed. With
    /// `older` a state that is not above the current one is taken too, under the next serial.
    pub async fn accept_state(
        self: &Arc<Self>,
        caller: &Caller,
        organization: &str,
        id: QuarantinedId,
        confirmation: &str,
        older: bool,
    ) -> Result<StateFacts> {
        let organization = self.owner(caller, organization).await?.organization;
        for _ in 0..ATTEMPTS {
            let found = self.quarantined(organization, id).await?;
            let record = &found.value;
            let Some(facts) = record.state.clone() else {
                let message = "it is no Terraform state that can be made current; read it, and \
                               push what is in it by hand";
                return Err(Error::refused(Reason::WrongState, message));
            };
            let mismatch = || {
                let message = "type the name of the environment that the state belongs to";
                Error::field("environment_confirmation", message)
            };
            let environment = match self.environment_named(organization, confirmation).await {
                Ok(environment) => environment,
                Err(error) if error.reason() == Reason::NotFound => return Err(mismatch()),
                Err(error) => return Err(error),
            };
            if record.environment.is_some_and(|Text(id)| id != environment.value.id) {
                return Err(mismatch());
            }
            let head = environment.value.state.as_ref();
            if let (Some(accepted), Some(head)) = (&record.accepted, head)
                && accepted.environment.0 == environment.value.id
                && accepted.number == head.number
            {
                return Ok(accepted.state.clone());
            }
            let hold = &environment.value.hold;
            if let Some(lock) = &hold.state_lock {
                return Err(locked(lock));
            }
            if let (None, Some(holder)) = (&hold.frozen, hold.holder) {
                let message = format!(
                    "run {holder} has the environment and may write its state; wait for its end"
                );
                return Err(Error::refused(Reason::WrongState, message));
            }
            if let Some(frozen) = &hold.frozen {
                self.check_given_up(frozen.run).await?;
            }
            let serial = next_serial(&facts, head, older)?;
            let state = StateFacts { serial, ..facts.clone() };
            let claim = if serial == facts.serial {
                None
            } else {
                Some(self.with_serial(organization, record.digest.0, serial).await?)
            };
            let digest = claim.as_ref().map_or(record.digest.0, |(claim, _)| claim.digest);
            let version = StateVersion {
                digest: Text(digest),
                lineage: state.lineage.clone(),
                serial,
                run: Some(record.run),
                at: self.now().into(),
                origin: StateOrigin::Accepted,
                user: caller.name().to_owned(),
                size: Some(claim.as_ref().map_or(record.size, |(_, size)| *size)),
            };
            let claim = claim.map(|(claim, _)| claim);
            let (batch, number) = with_version(Batch::new(), &environment, &version);
            let next = &environment.value;
            let mut accepted = record.clone();
            accepted.accepted =
                Some(Accepted { environment: Text(next.id), number, state: state.clone() });
            let draft = self
                .draft(
                    organization,
                    caller.audit_name(),
                    "accept_state",
                    format!("environment {}", next.name),
                )
                .with("id", id.to_string())
                .with("run", record.run.0.to_string())
                .with("serial", serial)
                .with("digest", digest.to_string());
            let batch = batch
                .put(found.key.clone(), Expect::At(found.version), encode(&accepted))
                .audit(draft);
            let user = BlobUser::State(next.id);
            let batch = match &claim {
                Some(claim) => self.settle_claim(batch, claim, user).await?,
                None => self.share(batch, organization, &digest, user).await?,
            };
            let committed = self.store.commit(batch).await;
            if let (Err(_), Some(claim)) = (&committed, &claim) {
                self.release_claim(claim).await?;
            }
            match committed {
                Ok(_) => return Ok(state),
                Err(CommitError::Conflict { .. }) => {}
                Err(error @ CommitError::Store(_)) => return Err(error.into()),
            }
        }
        Err(Error::refused(Reason::ChangedMeanwhile, "the environment changes too fast; repeat"))
    }

    /// Stores a state again with another serial, and nothing else changed; answers its length.
    pub(in crate::app) async fn with_serial(
        self: &Arc<Self>,
        organization: OrganizationId,
        digest: Digest,
        serial: u64,
    ) -> Result<(Claim, u64)> {
        let app = Arc::clone(self);
        self.with_whole_states(organization, async move {
            let found = app.blobs.get(organization, digest, LARGEST_STATE).await;
            let state = found.map_err(blob_error)?;
            let searched = crate::blocking::spawn(move || {
                let place = serial::place(state.expose_secret());
                (state, place)
            });
            let (state, place) = searched.await.map_err(Error::internal)?;
            let place = place
                .ok_or_else(|| Error::internal("a state was kept whose serial cannot be found"))?;
            let state = state.expose_secret();
            let number = serial.to_string();
            let length = (state.len() - place.len() + number.len()) as u64;
            let mut upload =
                app.blobs.begin(organization, None, length).await.map_err(blob_error)?;
            for part in [&state[..place.start], number.as_bytes(), &state[place.end..]] {
                upload.write(part).await.map_err(blob_error)?;
            }
            Ok((app.store_blob(organization, upload).await?, length))
        })
        .await
    }

    /// Removes one for good. One that is gone already stays so.
    pub async fn drop_quarantined(
        self: &Arc<Self>,
        caller: &Caller,
        organization: &str,
        id: QuarantinedId,
    ) -> Result<()> {
        let organization = self.owner(caller, organization).await?.organization;
        self.take_out(organization, id, (&caller.audit_name(), "drop_quarantined")).await?;
        self.collect_garbage_soon();
        Ok(())
    }

    /// Removes one, in the name of whoever wants it so.
    pub(super) async fn take_out(
        &self,
        organization: OrganizationId,
        id: QuarantinedId,
        (actor, action): (&str, &str),
    ) -> Result<()> {
        for _ in 0..ATTEMPTS {
            let found = match self.quarantined(organization, id).await {
                Ok(found) => found,
                Err(error) if error.reason() == Reason::NotFound => return Ok(()),
                Err(error) => return Err(error),
            };
            let Quarantined {
                run, phase, epoch, generation, kind, runner, digest, witness, ..
            } = found.value.clone();
            let gone = found.value;
            let slot = QuarantineSlot {
                organization,
                run: run.0,
                phase,
                epoch: Epoch::new(epoch),
                generation: Generation::new(generation),
                runner: runner.0,
                kind: Made::from(kind).number(),
            };
            let draft = self
                .draft(organization, actor, action, format!("run {}", run.0))
                .with("id", id.to_string())
                .with("kind", Made::from(kind).as_str())
                .with("digest", digest.0.to_string());
            let mut batch = Batch::new()
                .delete(found.key, Expect::At(found.version))
                .delete(keys::quarantine(slot), Expect::Anything)
                .audit(draft);
            let user = BlobUser::Quarantined(id);
            batch = self.end_use(batch, organization, &digest.0, user).await?;
            let tallies = self.tallies(slot, witness).await?.without(&gone);
            if witness == Witness::Word && tallies.nothing_of_run() {
                batch = self.leave_quota(batch, runner.0, run.0).await?;
            }
            batch = tallies.write(batch);
            match self.store.commit(batch).await {
                Ok(_) => return Ok(()),
                Err(CommitError::Conflict { .. }) => {}
                Err(error @ CommitError::Store(_)) => return Err(error.into()),
            }
        }
        Err(Error::refused(Reason::ChangedMeanwhile, "it changes too fast; repeat"))
    }

    async fn leave_quota(&self, batch: Batch, runner: RunnerId, run: RunId) -> Result<Batch> {
        let key = keys::quarantine_quota(runner);
        let Some(found) = self.fetch::<Vec<Text<RunId>>>(key).await? else { return Ok(batch) };
        let mut runs = found.value;
        runs.retain(|known| known.0 != run);
        Ok(batch.put(found.key, Expect::At(found.version), encode(&runs)))
    }

    pub(in crate::app) async fn quarantined(
        &self,
        organization: OrganizationId,
        id: QuarantinedId,
    ) -> Result<Loaded<Quarantined>> {
        self.fetch(keys::quarantined(organization, id))
            .await?
            .ok_or_else(|| Error::not_found("thing in quarantine"))
    }
}

/// Decides which serial a state gets when it is made current.
fn next_serial(facts: &StateFacts, head: Option<&StateHead>, older: bool) -> Result<u64> {
    let Some(head) = head else { return Ok(facts.serial) };
    if head.lineage != facts.lineage {
        let message = format!(
            "it is of another lineage than the environment's state ({}, not {})",
            facts.lineage, head.lineage
        );
        return Err(Error::refused(Reason::WrongState, message));
    }
    if facts.serial > head.serial {
        return Ok(facts.serial);
    }
    if !older {
        let message = format!(
            "its serial {} is not above the current {}; ask for an older state to be taken if that \
             is what you want",
            facts.serial, head.serial
        );
        return Err(Error::refused(Reason::WrongState, message));
    }
    head.serial
        .checked_add(1)
        .ok_or_else(|| Error::refused(Reason::WrongState, "there is no higher serial"))
}

/// Says what something is, against what is current.
fn summary(record: &Quarantined, head: Option<&StateHead>) -> String {
    let known = record.environment.is_some();
    let mut text = match (record.kind, &record.state) {
        (Kind::State | Kind::ErroredState | Kind::StateDump, Some(facts)) => {
            against(facts, record.digest.0, head)
        }
        (Kind::State | Kind::ErroredState | Kind::StateDump, None) => {
            "it cannot be read as a Terraform state".to_owned()
        }
        (Kind::Workspace, _) => "the working directory after that lease's plan".to_owned(),
        (Kind::Changes, _) => "what that lease's plan would change".to_owned(),
        (Kind::Log, _) => "the log of that lease, whole".to_owned(),
        (Kind::Result, _) => {
            record.outcome.clone().unwrap_or_else(|| "how that lease ended".to_owned())
        }
    };
    if record.accepted.is_some() {
        text.push_str("; it was accepted");
    }
    if !known {
        text.push_str("; its run is not known here");
    }
    match record.witness {
        Witness::Record => {}
        Witness::Word => text.push_str(
            "; on this runner's word alone: it was never seen here to hold the job, look at it \
             before you rely on it",
        ),
    }
    text
}

fn against(facts: &StateFacts, digest: Digest, head: Option<&StateHead>) -> String {
    let serial = facts.serial;
    let Some(head) = head else { return format!("serial {serial}, where there is no state yet") };
    if head.digest.0 == digest {
        return format!("equal to the current, serial {serial}");
    }
    let current = head.serial;
    if head.lineage != facts.lineage {
        return format!("serial {serial} of another lineage than the current {current}");
    }
    match serial.cmp(&current) {
        std::cmp::Ordering::Greater => {
            format!("serial {serial} continues the current {current} of the same lineage")
        }
        std::cmp::Ordering::Equal => {
            format!("serial {serial} is that of the current, of the same lineage, but it differs")
        }
        std::cmp::Ordering::Less => {
            format!("serial {serial} is older than the current {current} of the same lineage")
        }
    }
}

/// Says what a person does about a frozen environment.
pub fn next_steps(frozen: &Frozen) -> String {
    let Frozen { run, reason } = frozen;
    format!(
        "{reason}. Next: `latchkey run show {run}` and `latchkey quarantine list --run {run}` tell \
         what is known; if the run is lost and its runner will not be back, end it with `latchkey \
         discard {run}`; then `latchkey quarantine accept --run {run}` takes the newest state that \
         was kept, `latchkey quarantine drop --run {run}` none: both drop the rest and lift the \
         freeze"
    )
}
