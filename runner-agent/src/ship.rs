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

mod attempts;
mod quarantine;

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use latchkey_proto::v1;
use latchkey_proto::v1::runner_service_client::RunnerServiceClient;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status as Refusal;
use tonic::transport::Channel;
use tonic_types::StatusExt;

use self::attempts::Attempts;
pub(crate) use self::quarantine::Quarantined;
use crate::digest::{self, Digester};
use crate::job::{Failure as JobFailure, JobResult, Lease};
use crate::job_directory::{
    self, ERRORED_STATE, JobDirectory, STATE_DUMP, UNTAKEN, create_private,
};
use crate::supervisor::control::{Stage, Status};
use crate::supervisor::log::LONGEST_LINE;

const UPLOAD_PIECE: usize = 256 * 1024;

/// How long one answer may take before the attempt counts as failed.
const PATIENCE: Duration = Duration::from_secs(60);

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

pub(crate) enum Fetched {
    Digest(String),
    LeaseLost,
    Refused(String),
}

#[derive(Debug, Clone)]
pub(crate) struct Shipper {
    client: RunnerServiceClient<Channel>,
    lease: Lease,
    directory: JobDirectory,
    standing: watch::Sender<Standing>,
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
        Self { client, lease, directory, standing: watch::channel(Standing::Stands).0 }
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

    /// Fetches what the job needs into a file.
    pub(crate) async fn fetch(&self, kind: v1::ArtifactKind, to: &Path) -> Result<Fetched, Error> {
        let mut attempts = Attempts::at("fetch an artifact");
        loop {
            match self.fetch_once(kind, to).await {
                Ok(digest) => return Ok(Fetched::Digest(digest)),
                Err(Failure::LeaseLost) => return Ok(Fetched::LeaseLost),
                Err(Failure::Refused(reason)) => return Ok(Fetched::Refused(reason)),
                Err(Failure::Local(error)) => return Err(error),
                Err(failure @ (Failure::Again(_) | Failure::Offset(_))) => {
                    self.pause(&mut attempts, &failure).await;
                }
            }
        }
    }

    async fn fetch_once(&self, kind: v1::ArtifactKind, to: &Path) -> Result<String, Failure> {
        let keep = |error| Failure::Local(Error::Keep(error));
        let request =
            v1::FetchArtifactRequest { lease: Some(self.lease.to_wire()), kind: kind.into() };
        let mut client = self.client.clone();
        let mut pieces = in_time(client.fetch_artifact(request)).await?.into_inner();
        let mut file = tokio::fs::File::from_std(create_private(to).map_err(keep)?);
        let mut digester = Digester::new();
        while let Some(piece) = in_time(pieces.message()).await? {
            digester.update(&piece.data);
            file.write_all(&piece.data).await.map_err(keep)?;
        }
        file.flush().await.map_err(keep)?;
        Ok(digester.finish())
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

    async fn header(
        &self,
        kind: v1::ArtifactKind,
        path: &Path,
        sequence: u64,
    ) -> Result<v1::ArtifactHeader, Error> {
        let of = path.to_owned();
        let digest = tokio::task::spawn_blocking(move || digest::of_file(&of))
            .await
            .map_err(|error| Error::Read(io::Error::other(error)))?
            .map_err(Error::Read)?;
        let size = std::fs::metadata(path).map_err(Error::Read)?.len();
        let lease = Some(self.lease.to_wire());
        Ok(v1::ArtifactHeader { lease, kind: kind.into(), digest, size, sequence })
    }

    async fn upload(
        &self,
        kind: v1::ArtifactKind,
        path: &Path,
        sequence: u64,
    ) -> Result<Delivery, Error> {
        let header = self.header(kind, path, sequence).await?;
        let mut attempts = Attempts::at("upload an artifact");
        loop {
            match self.upload_once(&header, path).await {
                Ok(()) => return Ok(Delivery::Acknowledged),
                Err(Failure::Refused(reason)) => return Ok(Delivery::Refused(reason)),
                Err(Failure::Local(error)) => return Err(error),
                Err(failure @ (Failure::Again(_) | Failure::Offset(_) | Failure::LeaseLost)) => {
                    self.pause(&mut attempts, &failure).await;
                }
            }
        }
    }

    async fn upload_once(&self, header: &v1::ArtifactHeader, path: &Path) -> Result<(), Failure> {
        use v1::upload_artifact_request::Part;
        let read = |error| Failure::Local(Error::Read(error));
        let mut file = tokio::fs::File::open(path).await.map_err(read)?;
        let (parts, inbox) = mpsc::channel(4);
        let part = |part| v1::UploadArtifactRequest { part: Some(part) };
        let header = part(Part::Header(header.clone()));
        let feed = async move {
            // A closed channel means that the answer is there already.
            if parts.send(header).await.is_err() {
                return Ok(());
            }
            loop {
                let mut piece = Vec::with_capacity(UPLOAD_PIECE);
                (&mut file)
                    .take(UPLOAD_PIECE as u64)
                    .read_to_end(&mut piece)
                    .await
                    .map_err(read)?;
                if piece.is_empty() || parts.send(part(Part::Data(piece))).await.is_err() {
                    return Ok(());
                }
            }
        };
        let mut client = self.client.clone();
        let call = async {
            let answer = client.upload_artifact(ReceiverStream::new(inbox)).await;
            answer.map(drop).map_err(|refusal| understand(&refusal))
        };
        let (fed, answered) = tokio::join!(feed, call);
        fed.and(answered)
    }

    /// Answers how much of the log was taken, too.
    async fn follow_log(
        &self,
        mut status: watch::Receiver<Status>,
    ) -> Result<(Delivery, u64), Error> {
        let mut acknowledged = self.directory.shipped("log");
        let mut attempts = Attempts::at("append to the log");
        loop {
            let before = acknowledged;
            match self.log_stream(&mut status, &mut acknowledged).await {
                Ok(()) => return Ok((Delivery::Acknowledged, acknowledged)),
                Err(Failure::Refused(reason)) => {
                    return self.without_log(status, reason, acknowledged).await;
                }
                Err(Failure::Local(error)) => return Err(error),
                Err(Failure::Offset(expected)) => {
                    let endless = expected == acknowledged;
                    if endless {
                        let failure = Failure::Offset(expected);
                        self.pause(&mut attempts, &failure).await;
                    } else {
                        tracing::warn!(expected, acknowledged, "the log goes on elsewhere");
                    }
                    acknowledged = expected;
                }
                Err(failure @ (Failure::Again(_) | Failure::LeaseLost)) => {
                    if acknowledged > before {
                        attempts.reset();
                    }
                    self.pause(&mut attempts, &failure).await;
                }
            }
        }
    }

    /// Waits for the end of a job whose log is not taken any more.
    async fn without_log(
        &self,
        mut status: watch::Receiver<Status>,
        reason: String,
        acknowledged: u64,
    ) -> Result<(Delivery, u64), Error> {
        if status.wait_for(|status| status.stage() == Stage::Ended).await.is_err() {
            std::future::pending::<()>().await;
        }
        Ok((Delivery::Refused(reason), acknowledged))
    }

    async fn log_stream(
        &self,
        status: &mut watch::Receiver<Status>,
        acknowledged: &mut u64,
    ) -> Result<(), Failure> {
        let from = *acknowledged;
        let something = status
            .wait_for(|status| status.log_length > from || status.stage() == Stage::Ended)
            .await
            .map(|status| status.log_length > from);
        match something {
            Ok(true) => {}
            Ok(false) => return Ok(()),
            // The job is being left behind with the agent.
            Err(_) => std::future::pending().await,
        }
        let read = |error| Failure::Local(Error::Read(error));
        let log = File::open(self.directory.join("log")).map_err(read)?;
        let mut sent = from;
        let (chunks, inbox) = mpsc::channel(8);
        let mut first = Some(self.lease.to_wire());
        let mut chunk = |offset: u64, until: u64| -> Result<v1::AppendLogRequest, Failure> {
            let data = lines_at(&log, offset, until).map_err(read)?;
            Ok(v1::AppendLogRequest { lease: first.take(), offset, data })
        };
        // The first chunk goes before the answer is waited for: it names the lease.
        let opening = chunk(sent, status.borrow().log_length)?;
        sent += opening.data.len() as u64;
        let _ = chunks.try_send(opening);
        let mut client = self.client.clone();
        let mut answers =
            in_time(client.append_log(ReceiverStream::new(inbox))).await?.into_inner();
        loop {
            let now = *status.borrow_and_update();
            if now.stage() == Stage::Ended && *acknowledged >= now.log_length {
                return Ok(());
            }
            tokio::select! {
                permit = chunks.reserve(), if sent < now.log_length => {
                    let Ok(permit) = permit else {
                        // The call has ended: its answer says why.
                        match in_time(answers.message()).await? {
                            Some(_) => continue,
                            None => return Err(Failure::Again("the stream ended".into())),
                        }
                    };
                    let next = chunk(sent, now.log_length)?;
                    sent += next.data.len() as u64;
                    permit.send(next);
                }
                answer = answers.message() => match answer {
                    Ok(Some(answer)) => {
                        *acknowledged = answer.durable_length.min(now.log_length);
                        // More than was sent is there when an earlier connection sent it.
                        sent = sent.max(*acknowledged);
                        self.directory.set_shipped("log", *acknowledged);
                    }
                    Ok(None) => return Err(Failure::Again("the stream ended".into())),
                    Err(refusal) => return Err(understand(&refusal)),
                },
                changed = status.changed() => if changed.is_err() {
                    std::future::pending::<()>().await;
                },
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

/// Reads whole lines, as many as one message holds.
fn lines_at(log: &File, offset: u64, until: u64) -> io::Result<Vec<u8>> {
    let length = usize::try_from(until.saturating_sub(offset)).unwrap_or(usize::MAX);
    let mut data = vec![0u8; length.min(LONGEST_LINE)];
    log.read_exact_at(&mut data, offset)?;
    // Lines are shorter than a message, so there is an end in it.
    let end = data.iter().rposition(|byte| *byte == b'\n').map_or(data.len(), |at| at + 1);
    data.truncate(end);
    Ok(data)
}
