//! From the job directory to the control plane, by offset and epoch.
//!
//! Everything here can be repeated: log bytes carry their offset, states their number, artifacts
//! their digest. So a failure is answered by trying again, with jitter, but for what is malformed,
//! too large or does not fit: that stays so. A state that is refused is brought as what terraform
//! could not deliver.
//!
//! `LEASE_LOST` alone is no reason to stop: a control plane on an old copy of its data would say
//! it of everything. It is believed once the lease stream says so too (`Standing`). Then all that
//! the job has is brought to quarantine, after its end.

mod artifacts;
mod attempts;
mod log;
mod quarantine;

use std::io;
use std::time::Duration;

use latchkey_proto::v1;
use latchkey_proto::v1::runner_service_client::RunnerServiceClient;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tonic::Status as Refusal;
use tonic::transport::Channel;
use tonic_types::StatusExt;

pub(crate) use self::artifacts::Fetched;
pub(crate) use self::quarantine::Quarantined;
use crate::job::{Failure as JobFailure, JobResult, Lease};
use crate::job_directory::{self, ERRORED_STATE, JobDirectory, STATE_DUMP, UNTAKEN};
use crate::supervisor::control::{Stage, Status};

/// How long one answer may take before the attempt counts as failed.
const PATIENCE: Duration = Duration::from_secs(60);

/// How long a log may bring nothing new before its stream is closed: less than a control plane's
/// patience for such a stream.
const QUIET: Duration = Duration::from_secs(20);

#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("read what is to be sent")]
    Read(#[source] io::Error),
    #[error("keep what was fetched")]
    Keep(#[source] io::Error),
    #[error("list what is to be sent")]
    Directory(#[from] job_directory::Error),
}

/// Whether the control plane has something.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Delivery {
    Acknowledged,
    /// For good, with the control plane's sentence.
    Refused(String),
}

/// What became of everything a job made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Shipped {
    /// What the control plane has of the log.
    pub(crate) log_length: u64,
    /// Set when something of weight was refused: then the job did not end as it says.
    pub(crate) instead: Option<JobResult>,
    pub(crate) remains: Remains,
}

/// Whether the only copy of a state is on this host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Remains {
    Nothing,
    State,
}

/// What is known of the lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Standing {
    Stands,
    /// A heartbeat was answered without it.
    InDoubt,
    /// For good.
    Lost,
}

#[derive(Debug, Clone)]
pub(crate) struct Shipper {
    client: RunnerServiceClient<Channel>,
    lease: Lease,
    directory: JobDirectory,
    standing: watch::Sender<Standing>,
    quiet: Duration,
}

enum Failure {
    LeaseLost,
    /// The log must go on from here.
    Offset(u64),
    Again(String),
    Refused(String),
    Local(Error),
}

impl Shipper {
    pub(crate) fn new(
        client: RunnerServiceClient<Channel>,
        lease: Lease,
        directory: JobDirectory,
    ) -> Self {
        let standing = watch::channel(Standing::Stands).0;
        Self { client, lease, directory, standing, quiet: QUIET }
    }

    #[cfg(test)]
    pub(crate) fn with_quiet(self, quiet: Duration) -> Self {
        Self { quiet, ..self }
    }

    /// By `Welcome`.
    pub(crate) fn lease_stands(&self) {
        self.stand(|standing| standing == Standing::InDoubt, Standing::Stands);
    }

    /// By the answer to a heartbeat.
    pub(crate) fn lease_is_in_doubt(&self) {
        self.stand(|standing| standing == Standing::Stands, Standing::InDoubt);
    }

    /// By `Welcome` or `Revoke`.
    pub(crate) fn lease_is_lost(&self) {
        self.stand(|_| true, Standing::Lost);
    }

    fn stand(&self, from: impl Fn(Standing) -> bool, to: Standing) {
        self.standing.send_if_modified(|standing| {
            let moves = *standing != to && from(*standing);
            if moves {
                *standing = to;
            }
            moves
        });
    }

    /// Follows a job to its end, and answers when all it made is acknowledged: log and states as
    /// they grow, then the artifacts. Answers `None` at the end of a job whose lease is lost.
    pub(crate) async fn ship_all(
        &self,
        mut status: watch::Receiver<Status>,
    ) -> Result<Option<Shipped>, Error> {
        let mut standing = self.standing.subscribe();
        tokio::select! {
            shipped = self.ship(&status) => return shipped.map(Some),
            // Its sender is here.
            _ = standing.wait_for(|standing| *standing == Standing::Lost) => {}
        }
        if status.wait_for(|status| status.stage() == Stage::Ended).await.is_err() {
            // The job is being left behind with the agent.
            std::future::pending::<()>().await;
        }
        Ok(None)
    }

    async fn ship(&self, status: &watch::Receiver<Status>) -> Result<Shipped, Error> {
        use v1::ArtifactKind::{Changes, ErroredState, Workspace};
        let ((log, length), states) =
            tokio::try_join!(self.follow_log(status.clone()), self.follow_states(status.clone()))?;
        let mut shipped = Shipped { log_length: length, instead: None, remains: Remains::Nothing };
        if let Delivery::Refused(reason) = &log {
            tracing::error!(%reason, length, "the log is refused from here on");
        }
        if let Some((sequence, reason)) = states.iter().find_map(refused) {
            tracing::error!(%reason, sequence, "a state is refused");
            let reason = format!("terraform's state was not accepted: {reason}");
            shipped.instead = Some(JobResult::failed(JobFailure::StateUndelivered, reason));
        }
        if matches!(self.directory.result(), Ok(JobResult::Plan { .. })) {
            for (kind, name) in [(Workspace, "workspace.tar.gz"), (Changes, "changes.json")] {
                if let Delivery::Refused(reason) =
                    self.upload(kind, &self.directory.join(name), 0).await?
                {
                    let reason = format!("{name} was not accepted: {reason}");
                    shipped.instead = Some(JobResult::failed(JobFailure::Errored, reason));
                }
            }
        }
        if self.has_untaken() {
            shipped.remains = Remains::State;
        }
        let errored = self.directory.join(ERRORED_STATE);
        let mut left = Vec::new();
        match (errored.exists(), states.last()) {
            (true, _) => left.push((ErroredState, errored)),
            // The newest stands for all: it is what the others became.
            (false, Some((sequence, Delivery::Refused(_)))) => {
                left.push((
                    ErroredState,
                    self.directory.join(&JobDirectory::state_name(*sequence)),
                ));
            }
            (false, Some((_, Delivery::Acknowledged)) | None) => {}
        }
        let dump = self.directory.join(STATE_DUMP);
        if dump.exists() {
            left.push((v1::ArtifactKind::StateDump, dump));
        }
        for (kind, path) in left {
            if let Delivery::Refused(reason) = self.upload(kind, &path, 0).await? {
                tracing::error!(%reason, kind = kind.as_str_name(), "a state is refused");
                shipped.remains = Remains::State;
            }
        }
        Ok(shipped)
    }

    fn has_untaken(&self) -> bool {
        std::fs::symlink_metadata(self.directory.join(UNTAKEN)).is_ok()
    }

    async fn follow_states(
        &self,
        mut status: watch::Receiver<Status>,
    ) -> Result<Vec<(u64, Delivery)>, Error> {
        let mut taken = Vec::new();
        let mut sent = self.directory.shipped("states");
        loop {
            let now = *status.borrow_and_update();
            for sequence in sent + 1..=now.states {
                let path = self.directory.join(&JobDirectory::state_name(sequence));
                let delivery = self.upload(v1::ArtifactKind::State, &path, sequence).await?;
                if delivery == Delivery::Acknowledged {
                    // Synced: an older state that is sent again would be refused as a step back.
                    self.directory
                        .record_bytes("shipped/states", sequence.to_string().as_bytes())?;
                }
                taken.push((sequence, delivery));
                sent = sequence;
            }
            if now.stage() == Stage::Ended {
                return Ok(taken);
            }
            if status.changed().await.is_err() {
                // The job is being left behind with the agent.
                std::future::pending::<()>().await;
            }
        }
    }
}

fn refused((sequence, delivery): &(u64, Delivery)) -> Option<(u64, String)> {
    match delivery {
        Delivery::Refused(reason) => Some((*sequence, reason.clone())),
        Delivery::Acknowledged => None,
    }
}

async fn in_time<T>(answer: impl Future<Output = Result<T, Refusal>>) -> Result<T, Failure> {
    match tokio::time::timeout(PATIENCE, answer).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(refusal)) => Err(understand(&refusal)),
        Err(_) => Err(Failure::Again("no answer in time".into())),
    }
}

fn understand(refusal: &Refusal) -> Failure {
    let details = refusal.get_error_details();
    let info = details.error_info();
    let reason = info.map(|info| info.reason.as_str()).unwrap_or_default();
    if reason == v1::Reason::LeaseLost.name() {
        return Failure::LeaseLost;
    }
    use v1::Reason::{FieldInvalid, LimitReached, NotFound, WrongState};
    if [FieldInvalid, LimitReached, NotFound, WrongState].iter().any(|r| r.name() == reason) {
        return Failure::Refused(refusal.message().to_owned());
    }
    let expected = info.and_then(|info| info.metadata.get("expected"));
    match expected.and_then(|expected| expected.parse().ok()) {
        Some(expected) if reason == v1::Reason::LogOffset.name() => Failure::Offset(expected),
        Some(_) | None => Failure::Again(format!("{:?}: {}", refusal.code(), refusal.message())),
    }
}
