//! What jobs fetch and make: configurations, workspaces, states, plans' changes.
//!
//! Only the holder of the current lease changes what is current. What any other brings, and
//! every `errored.tfstate`, is kept in quarantine beside the run, for a person to look at.

use std::sync::Arc;

use latchkey_domain::id::{Digest, OrganizationId};
use latchkey_domain::policy::Phase;
use latchkey_domain::run::Run;
use latchkey_proto::v1::Reason;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use super::App;
use super::chunks::Chunks;
use super::configurations::blob_error;
use super::lease_job::lease_lost;
use crate::auth::RunnerIdentity;
use crate::blobs::{BlobReader, Upload};
use crate::blocking;
use crate::error::{Error, Result};
use crate::job::LeaseRef;
use crate::store::record::environment::{EnvironmentRecord, StateHead, StateVersion};
use crate::store::record::{Loaded, Millis, Text, encode};
use crate::store::{Batch, CommitError, Expect, keys};

pub(super) const LARGEST_CHANGES: u64 = 32 << 20;
const LARGEST_STATE: u64 = 256 << 20;
const LARGEST_WORKSPACE: u64 = 1 << 30;
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
}

impl Made {
    const fn limit(self) -> u64 {
        match self {
            Made::Workspace => LARGEST_WORKSPACE,
            Made::State | Made::ErroredState => LARGEST_STATE,
            Made::Changes => LARGEST_CHANGES,
        }
    }

    /// Stands for the kind in keys.
    const fn number(self) -> u8 {
        match self {
            Made::State => 0,
            Made::ErroredState => 1,
            Made::Workspace => 2,
            Made::Changes => 3,
        }
    }

    const fn as_str(self) -> &'static str {
        match self {
            Made::Workspace => "workspace",
            Made::State => "state",
            Made::Changes => "changes",
            Made::ErroredState => "errored state",
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
}

/// What is kept for a person: something a runner brought that is not, or not yet, current.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Quarantined {
    pub kind: String,
    pub digest: Text<Digest>,
    pub runner: String,
    pub at: Millis,
}

/// Where an upload will go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Destination {
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
            (Needed::State, Phase::Plan | Phase::Apply) => {
                subject.environment.value.state.as_ref().map(|state| state.digest.0)
            }
            (Needed::Configuration, Phase::Apply) | (Needed::Workspace, Phase::Plan) => None,
        };
        let digest = digest.ok_or_else(|| Error::not_found("artifact of this kind for the job"))?;
        self.blobs.read(run.request.organization, digest).await.map_err(blob_error)
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
                Made::ErroredState => Destination::Quarantine,
                Made::Workspace | Made::State | Made::Changes => Destination::Current,
            },
            Ok(_) => return Err(Error::field("header", "this job makes nothing of this kind now")),
            Err(error) if error.reason() == Reason::LeaseLost => {
                self.check_once_held(runner, header.lease).await?;
                Destination::Quarantine
            }
            Err(error) => return Err(error),
        };
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
        })
    }

    /// Takes nothing into quarantine but from who held the job at that epoch: what others say of
    /// a run is not worth a byte of disk.
    async fn check_once_held(&self, runner: &RunnerIdentity, lease: LeaseRef) -> Result<()> {
        let run = match self.run(lease.job.run).await {
            Ok(run) => run.value,
            Err(_) => return Err(lease_lost()),
        };
        let held = run.job(lease.job.phase).was_held_by(runner.id, lease.epoch);
        if held { Ok(()) } else { Err(lease_lost()) }
    }

    /// Keeps the newest of each kind that a lease brings back.
    async fn record_quarantined(
        &self,
        runner: &RunnerIdentity,
        header: ArtifactHeader,
    ) -> Result<()> {
        let LeaseRef { job, epoch, .. } = header.lease;
        let key = keys::quarantine(job.run, job.phase, epoch, header.kind.number().into());
        let record = Quarantined {
            kind: header.kind.as_str().to_owned(),
            digest: Text(header.digest),
            runner: runner.id.to_string(),
            at: self.now().into(),
        };
        let draft = self
            .draft(
                runner.organization,
                runner.audit_name(),
                "quarantine",
                format!("run {}", job.run),
            )
            .with("kind", header.kind.as_str())
            .with("epoch", epoch.get());
        let before: Option<Loaded<Quarantined>> = self.fetch(key.clone()).await?;
        let mut batch = Batch::new().put(key, Expect::Anything, encode(&record)).audit(draft);
        if let Some(before) = before
            && before.value.digest != record.digest
        {
            let garbage = keys::garbage(runner.organization, &before.value.digest.0);
            batch = batch.put(garbage, Expect::Anything, []);
        }
        self.store.commit(batch).await?;
        Ok(())
    }

    /// Notes what a lease made, in place of what it made before.
    async fn record_made(&self, runner: &RunnerIdentity, header: ArtifactHeader) -> Result<()> {
        let key = made_key(header.lease, header.kind);
        let before: Option<Loaded<Text<Digest>>> = self.fetch(key.clone()).await?;
        let mut batch = Batch::new().put(key, Expect::Anything, encode(&Text(header.digest)));
        if let Some(before) = before
            && before.value.0 != header.digest
        {
            let garbage = keys::garbage(runner.organization, &before.value.0);
            batch = batch.put(garbage, Expect::Anything, []);
        }
        self.store.commit(batch).await?;
        Ok(())
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

    /// Reads lineage and serial out of a stored state, part by part.
    async fn state_facts(
        &self,
        organization: OrganizationId,
        digest: Digest,
    ) -> Result<StateFacts> {
        let mut reader = self.blobs.read(organization, digest).await.map_err(blob_error)?;
        let (sender, chunks) = mpsc::channel(4);
        let parsed = blocking::spawn(move || serde_json::from_reader(Chunks::new(chunks)));
        while let Some(chunk) = reader.next().await.map_err(blob_error)? {
            if sender.send(chunk).await.is_err() {
                break;
            }
        }
        drop(sender);
        let facts = parsed.await.map_err(Error::internal)?;
        facts.map_err(|_| Error::field("data", "it is not a Terraform state"))
    }

    /// Makes a state the environment's newest, if it continues the one before.
    async fn record_state(
        &self,
        runner: &RunnerIdentity,
        header: ArtifactHeader,
        facts: StateFacts,
    ) -> Result<()> {
        for _ in 0..ATTEMPTS {
            let subject = self.leased(runner, header.lease).await?;
            let (run, environment) = (&subject.run.value, &subject.environment);
            let head = environment.value.state.as_ref();
            if head.is_some_and(|head| head.digest.0 == header.digest) {
                return Ok(());
            }
            if let Some(head) = head
                && (head.lineage != facts.lineage || head.serial > facts.serial)
            {
                let message = format!(
                    "the state does not continue the environment's (lineage {}, serial {})",
                    head.lineage, head.serial
                );
                return Err(Error::refused(Reason::WrongState, message));
            }
            let number = head.map_or(0, |head| head.number) + 1;
            let mut next = environment.value.clone();
            next.state = Some(StateHead {
                number,
                digest: Text(header.digest),
                lineage: facts.lineage.clone(),
                serial: facts.serial,
            });
            let version = StateVersion {
                digest: Text(header.digest),
                lineage: facts.lineage.clone(),
                serial: facts.serial,
                run: Text(run.id),
                at: self.now().into(),
            };
            let draft = self
                .draft(
                    run.request.organization,
                    runner.audit_name(),
                    "write_state",
                    format!("run {}", run.id),
                )
                .with("serial", facts.serial)
                .with("digest", header.digest.to_string());
            let record = encode(&EnvironmentRecord::from(&next));
            let batch = Batch::new()
                .check(subject.run.key.clone(), Expect::At(subject.run.version))
                .put(environment.key.clone(), Expect::At(environment.version), record)
                .put(keys::state_version(next.id, number), Expect::Absent, encode(&version))
                .audit(draft);
            match self.store.commit(batch).await {
                Ok(_) => return Ok(()),
                Err(CommitError::Conflict { .. }) => {}
                Err(error @ CommitError::Store(_)) => return Err(error.into()),
            }
        }
        Err(Error::refused(Reason::ChangedMeanwhile, "the run changes too fast; send it again"))
    }
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
        Made::State | Made::ErroredState => phase == Phase::Apply,
    };
    released && kind_fits
}

#[derive(Debug, Deserialize)]
struct StateFacts {
    lineage: String,
    serial: u64,
}

impl ArtifactUpload {
    pub async fn write(&mut self, data: &[u8]) -> Result<()> {
        self.received += data.len() as u64;
        if self.received > self.header.size {
            return Err(Error::field("data", "there is more of it than the header says"));
        }
        self.blob.write(data).await.map_err(blob_error)
    }

    /// Ends the upload; answers when what it changes is durable.
    pub async fn finish(self) -> Result<()> {
        let Self { app, runner, header, destination, blob, received } = self;
        if received != header.size {
            return Err(Error::field("data", "it is shorter than the header says"));
        }
        blob.finish().await.map_err(blob_error)?;
        latchkey_failpoint::reach("cp.artifact.stored");
        let recorded = match (destination, header.kind) {
            (Destination::Current, Made::State) => {
                let facts = app.state_facts(runner.organization, header.digest).await?;
                app.record_state(&runner, header, facts).await
            }
            (Destination::Current, Made::Workspace | Made::Changes | Made::ErroredState) => {
                app.record_made(&runner, header).await
            }
            (Destination::Quarantine, _) => return app.record_quarantined(&runner, header).await,
        };
        latchkey_failpoint::reach("cp.artifact.recorded");
        match recorded {
            // The lease was lost on the way: what came is kept all the same.
            Err(error) if error.reason() == Reason::LeaseLost => {
                app.check_once_held(&runner, header.lease).await?;
                app.record_quarantined(&runner, header).await
            }
            recorded => recorded,
        }
    }
}
