//! What jobs fetch and make: configurations, workspaces, states, plans' changes.
//!
//! Only the holder of the current lease changes what is current. What any other brings, and
//! every state that terraform could not deliver itself, goes to [`super::quarantine`].

use std::sync::Arc;

use latchkey_domain::id::Digest;
use latchkey_domain::policy::Phase;
use latchkey_domain::run::Run;
use latchkey_proto::v1::Reason;

use super::App;
use super::claims::{Claim, Settled};
use super::configurations::blob_error;
use super::finish_job::JobResult;
use super::quarantine::{Learned, outcome};
use super::states::with_version;
use super::uploads::Place;
use crate::auth::RunnerIdentity;
use crate::blobs::{BlobReader, Upload};
use crate::error::{Error, Result};
use crate::job::LeaseRef;
use crate::store::keys::BlobUser;
use crate::store::record::environment::{StateOrigin, StateVersion};
use crate::store::record::quarantine::{Kind, StateFacts};
use crate::store::record::{Loaded, Text, encode};
use crate::store::{Batch, CommitError, Expect, keys};

pub(super) const LARGEST_CHANGES: u64 = 32 << 20;
pub(super) const LARGEST_STATE: u64 = 256 << 20;
const LARGEST_WORKSPACE: u64 = 1 << 30;
const LARGEST_LOG: u64 = 256 << 20;
pub const LARGEST_RESULT: u64 = 1 << 20;
const ATTEMPTS: usize = 16;

/// What may be fetched for a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Needed {
    Configuration,
    Workspace,
    State,
}

/// What a job makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Made {
    Workspace,
    State,
    Changes,
    ErroredState,
    /// What terraform printed because it could write its state nowhere.
    StateDump,
    /// The whole log of a lease that was lost.
    Log,
    /// How a lease that was lost ended.
    Result,
}

impl Made {
    const fn limit(self) -> u64 {
        match self {
            Made::Workspace => LARGEST_WORKSPACE,
            Made::State | Made::ErroredState | Made::StateDump => LARGEST_STATE,
            Made::Changes => LARGEST_CHANGES,
            Made::Log => LARGEST_LOG,
            Made::Result => LARGEST_RESULT,
        }
    }

    /// Stands for the kind in keys.
    pub(super) const fn number(self) -> u8 {
        match self {
            Made::State => 0,
            Made::ErroredState => 1,
            Made::Workspace => 2,
            Made::Changes => 3,
            Made::StateDump => 4,
            Made::Log => 5,
            Made::Result => 6,
        }
    }

    pub(super) const fn as_str(self) -> &'static str {
        match self {
            Made::Workspace => "workspace",
            Made::State => "state",
            Made::Changes => "changes",
            Made::ErroredState => "errored state",
            Made::StateDump => "state dump",
            Made::Log => "log",
            Made::Result => "result",
        }
    }
}

impl From<Made> for Kind {
    fn from(made: Made) -> Self {
        match made {
            Made::Workspace => Kind::Workspace,
            Made::State => Kind::State,
            Made::Changes => Kind::Changes,
            Made::ErroredState => Kind::ErroredState,
            Made::StateDump => Kind::StateDump,
            Made::Log => Kind::Log,
            Made::Result => Kind::Result,
        }
    }
}

impl From<Kind> for Made {
    fn from(kind: Kind) -> Self {
        match kind {
            Kind::Workspace => Made::Workspace,
            Kind::State => Made::State,
            Kind::Changes => Made::Changes,
            Kind::ErroredState => Made::ErroredState,
            Kind::StateDump => Made::StateDump,
            Kind::Log => Made::Log,
            Kind::Result => Made::Result,
        }
    }
}

/// The header of an upload.
#[derive(Clone, Copy, Debug)]
pub struct ArtifactHeader {
    pub lease: LeaseRef,
    pub kind: Made,
    pub digest: Digest,
    pub size: u64,
    /// Counts a lease's snapshots of its state; 0 for all else.
    pub sequence: u64,
}

/// Where an upload goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Destination {
    Current,
    Quarantine,
}

/// An artifact on its way in.
pub struct ArtifactUpload {
    app: Arc<App>,
    runner: RunnerIdentity,
    header: ArtifactHeader,
    destination: Destination,
    blob: Upload,
    received: u64,
    outcome: Option<String>,
    place: Place,
}

impl std::fmt::Debug for ArtifactUpload {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ArtifactUpload").field("header", &self.header).finish_non_exhaustive()
    }
}

impl App {
    pub async fn fetch_artifact(
        &self,
        runner: &RunnerIdentity,
        lease: LeaseRef,
        needed: Needed,
    ) -> Result<BlobReader> {
        let subject = self.leased(runner, lease).await?;
        let run = &subject.run.value;
        let digest = match (needed, lease.job.phase) {
            (Needed::Configuration, Phase::Plan) => Some(run.request.configuration),
            (Needed::Workspace, Phase::Apply) => {
                run.planned.as_ref().map(|planned| planned.digests.workspace)
            }
            (Needed::State, Phase::Plan) => self.leased_state(run).await?,
            (Needed::State, Phase::Apply) => {
                subject.environment.value.state.as_ref().map(|state| state.digest.0)
            }
            (Needed::Configuration, Phase::Apply) | (Needed::Workspace, Phase::Plan) => None,
        };
        let digest = digest.ok_or_else(|| Error::not_found("artifact of this kind for the job"))?;
        self.blobs.read(run.request.organization, digest).await.map_err(blob_error)
    }

    /// Returns the state that a plan's lease fixed: others may write newer ones beside it.
    async fn leased_state(&self, run: &Run) -> Result<Option<Digest>> {
        let Some(number) = run.plan.lease.as_ref().and_then(|lease| lease.state) else {
            return Ok(None);
        };
        let key = keys::state_version(run.request.environment, number);
        let version: Option<Loaded<StateVersion>> = self.fetch(key).await?;
        Ok(version.map(|version| version.value.digest.0))
    }

    pub async fn upload_artifact(
        self: &Arc<Self>,
        runner: &RunnerIdentity,
        header: ArtifactHeader,
    ) -> Result<ArtifactUpload> {
        let limit = header.kind.limit();
        if header.size > limit {
            let message = format!("a {} has up to {} MiB", header.kind.as_str(), limit >> 20);
            return Err(
                Error::refused(Reason::LimitReached, message).with("limit", limit.to_string())
            );
        }
        let destination = match self.leased(runner, header.lease).await {
            Ok(subject) if can_make(&subject.run.value, header) => match header.kind {
                Made::ErroredState | Made::StateDump => Destination::Quarantine,
                Made::Workspace | Made::State | Made::Changes | Made::Log | Made::Result => {
                    Destination::Current
                }
            },
            Ok(_) => return Err(Error::field("header", "this job makes nothing of this kind now")),
            Err(error) if error.reason() == Reason::LeaseLost => {
                self.check_quarantine(runner, header).await?;
                Destination::Quarantine
            }
            Err(error) => return Err(error),
        };
        let place = self.uploads.artifact(runner.id, header.size).await?;
        let organization = runner.organization;
        let blob = self
            .blobs
            .begin(organization, Some(header.digest), header.size)
            .await
            .map_err(blob_error)?;
        Ok(ArtifactUpload {
            app: Arc::clone(self),
            runner: runner.clone(),
            header,
            destination,
            blob,
            received: 0,
            outcome: None,
            place,
        })
    }

    /// Notes what a lease made, in place of what it made before.
    async fn record_made(
        &self,
        runner: &RunnerIdentity,
        header: ArtifactHeader,
        claim: &Claim,
    ) -> Result<Settled> {
        let organization = runner.organization;
        let key = made_key(header.lease, header.kind);
        for _ in 0..ATTEMPTS {
            let (identity, unrevoked) = self.identity_guard(runner.id).await?;
            // The lease may have been lost while the data came.
            self.leased(runner, header.lease).await?;
            let before: Option<Loaded<Text<Digest>>> = self.fetch(key.clone()).await?;
            let expect = before.as_ref().map_or(Expect::Absent, |known| Expect::At(known.version));
            let mut batch = Batch::new().put(key.clone(), expect, encode(&Text(header.digest)));
            if let Some(before) = before
                && before.value.0 != header.digest
            {
                let run = header.lease.job.run;
                batch = self.end_made(batch, organization, run, &before).await?;
            }
            let user = BlobUser::Made(header.lease.job.run);
            let batch = self.settle_claim(batch, claim, user).await?.check(identity, unrevoked);
            match self.store.commit(batch).await {
                Ok(_) => return Ok(Settled::Kept),
                Err(CommitError::Conflict { .. }) => {}
                Err(error @ CommitError::Store(_)) => return Err(error.into()),
            }
        }
        Err(changes_too_fast())
    }

    /// Tells whether a lease has uploaded this content as this kind.
    pub(super) async fn was_made(
        &self,
        lease: LeaseRef,
        kind: Made,
        digest: Digest,
    ) -> Result<bool> {
        let made: Option<Loaded<Text<Digest>>> = self.fetch(made_key(lease, kind)).await?;
        Ok(made.is_some_and(|made| made.value.0 == digest))
    }

    /// Makes a state the environment's newest, if it continues the one before.
    async fn record_state(
        &self,
        runner: &RunnerIdentity,
        header: ArtifactHeader,
        facts: StateFacts,
        claim: &Claim,
    ) -> Result<Settled> {
        for _ in 0..ATTEMPTS {
            let (identity, unrevoked) = self.identity_guard(runner.id).await?;
            let subject = self.leased(runner, header.lease).await?;
            let (run, environment) = (&subject.run.value, &subject.environment);
            let head = environment.value.state.as_ref();
            if head.is_some_and(|head| head.digest.0 == header.digest) {
                return Ok(Settled::NotNeeded);
            }
            if let Some(head) = head
                && (head.lineage != facts.lineage || head.serial >= facts.serial)
            {
                let message = format!(
                    "the state does not continue the environment's (lineage {}, serial {})",
                    head.lineage, head.serial
                );
                return Err(Error::refused(Reason::WrongState, message));
            }
            let version = StateVersion {
                digest: Text(header.digest),
                lineage: facts.lineage.clone(),
                serial: facts.serial,
                run: Some(Text(run.id)),
                at: self.now().into(),
                origin: StateOrigin::Run,
                user: String::new(),
                size: Some(header.size),
            };
            let draft = self
                .draft(
                    run.request.organization,
                    runner.audit_name(),
                    "write_state",
                    format!("run {}", run.id),
                )
                .with("environment", environment.value.name.as_str())
                .with("serial", facts.serial)
                .with("digest", header.digest.to_string());
            let user = BlobUser::State(environment.value.id);
            let batch = self
                .settle_claim(Batch::new(), claim, user)
                .await?
                .check(identity, unrevoked)
                .check(subject.run.key.clone(), Expect::At(subject.run.version))
                .audit(draft);
            let (batch, _) = with_version(batch, environment, &version);
            match self.store.commit(batch).await {
                Ok(_) => return Ok(Settled::Kept),
                Err(CommitError::Conflict { .. }) => {}
                Err(error @ CommitError::Store(_)) => return Err(error.into()),
            }
        }
        Err(changes_too_fast())
    }

    /// Gives what was uploaded its place.
    async fn settle_upload(
        &self,
        (runner, header): (&RunnerIdentity, ArtifactHeader),
        destination: Destination,
        outcome: Option<String>,
        claim: &Claim,
    ) -> Result<(Destination, Settled)> {
        let facts = match header.kind {
            Made::State | Made::ErroredState | Made::StateDump => {
                Some(self.state_facts(runner.organization, header.digest).await?)
            }
            Made::Workspace | Made::Changes | Made::Log | Made::Result => None,
        };
        let state = facts.as_ref().and_then(|facts| facts.as_ref().ok()).cloned();
        let learned = Learned { state, outcome };
        let recorded = match (destination, header.kind, facts) {
            (Destination::Quarantine, _, _) => {
                let settled = self.quarantine(runner, header, learned, claim).await?;
                return Ok((Destination::Quarantine, settled));
            }
            (Destination::Current, Made::State, Some(Ok(facts))) => {
                self.record_state(runner, header, facts, claim).await
            }
            (Destination::Current, Made::State, Some(Err(unfit))) => {
                let (field, message) = unfit.explained();
                return Err(Error::field(field, message));
            }
            (
                Destination::Current,
                Made::Workspace
                | Made::State
                | Made::Changes
                | Made::ErroredState
                | Made::StateDump
                | Made::Log
                | Made::Result,
                _,
            ) => self.record_made(runner, header, claim).await,
        };
        match recorded {
            Ok(settled) => Ok((Destination::Current, settled)),
            // The lease was lost on the way: what came is kept all the same.
            Err(error) if error.reason() == Reason::LeaseLost => {
                let settled = self.quarantine(runner, header, learned, claim).await?;
                Ok((Destination::Quarantine, settled))
            }
            Err(error) => Err(error),
        }
    }
}

fn changes_too_fast() -> Error {
    Error::refused(Reason::ChangedMeanwhile, "the run changes too fast; send it again")
}

fn made_key(lease: LeaseRef, kind: Made) -> crate::store::Key {
    keys::artifact(lease.job.run, lease.job.phase, lease.epoch, kind.number())
}

/// Tells whether the job of a current lease makes such a thing now.
fn can_make(run: &Run, header: ArtifactHeader) -> bool {
    let phase = header.lease.job.phase;
    let released = run.job(phase).lease.as_ref().is_some_and(|lease| lease.released.is_some());
    let kind_fits = match header.kind {
        Made::Workspace | Made::Changes => phase == Phase::Plan,
        Made::State | Made::ErroredState | Made::StateDump => phase == Phase::Apply,
        // A current lease appends its log and says how it ended.
        Made::Log | Made::Result => false,
    };
    released && kind_fits
}

impl ArtifactUpload {
    pub async fn write(&mut self, data: &[u8]) -> Result<()> {
        self.received += data.len() as u64;
        if self.received > self.header.size {
            return Err(Error::field("data", "there is more of it than the header says"));
        }
        self.blob.write(data).await.map_err(blob_error)
    }

    /// Says what a result, which is on its way in, says.
    pub fn says(&mut self, result: &JobResult) {
        self.outcome = Some(outcome(self.header.lease.job.phase, result));
    }

    /// Ends the upload, also if nobody waits for it any more; answers when what it changes is
    /// durable, and where it went.
    pub async fn finish(self) -> Result<Destination> {
        if self.received != self.header.size {
            return Err(Error::field("data", "it is shorter than the header says"));
        }
        tokio::spawn(self.record()).await.map_err(Error::internal)?
    }

    async fn record(self) -> Result<Destination> {
        let Self { app, runner, header, destination, blob, outcome, place, .. } = self;
        let claim = app.store_blob(runner.organization, blob).await?;
        latchkey_failpoint::reach("cp.artifact.stored");
        let settled = app.settle_upload((&runner, header), destination, outcome, &claim).await;
        latchkey_failpoint::reach("cp.artifact.recorded");
        if !matches!(settled, Ok((_, Settled::Kept))) {
            // It is nobody's, unless equal content is somebody's.
            app.release_claim(&claim).await?;
        }
        // What it replaced, too: whoever uploads without end must not fill the disk until the
        // reaper comes.
        app.collect_garbage_soon();
        drop(place);
        settled.map(|(destination, _)| destination)
    }
}
