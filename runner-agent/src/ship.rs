//! From the job directory to the control plane, by offset and epoch.
//!
//! Everything here can be repeated: log bytes carry their offset, states their number, artifacts
//! their digest. So every failure but two is answered by trying again, with jitter: `LEASE_LOST`
//! and a run that is not found mean that nobody wants it any more.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use latchkey_proto::v1;
use latchkey_proto::v1::runner_service_client::RunnerServiceClient;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Code, Status as Refusal};
use tonic_types::StatusExt;

use crate::backoff::Backoff;
use crate::digest::{self, Digester};
use crate::job::Lease;
use crate::job_directory::{self, JobDirectory, create_private};
use crate::random;
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

/// Whether the control plane has something, in the run or in its quarantine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Delivery {
    Acknowledged,
    LeaseLost,
}

/// What became of everything a job made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Shipped {
    pub(crate) log_length: u64,
    /// Lost if nothing at all was taken.
    pub(crate) delivery: Delivery,
}

pub(crate) enum Fetched {
    Digest(String),
    LeaseLost,
}

#[derive(Debug, Clone)]
pub(crate) struct Shipper {
    client: RunnerServiceClient<Channel>,
    lease: Lease,
    directory: JobDirectory,
}

enum Failure {
    LeaseLost,
    /// The log must go on from here.
    Offset(u64),
    Again(String),
    Local(Error),
}

impl Shipper {
    pub(crate) fn new(
        client: RunnerServiceClient<Channel>,
        lease: Lease,
        directory: JobDirectory,
    ) -> Self {
        Self { client, lease, directory }
    }

    /// Fetches what the job needs into a file.
    pub(crate) async fn fetch(&self, kind: v1::ArtifactKind, to: &Path) -> Result<Fetched, Error> {
        let mut backoff = backoff();
        loop {
            match self.fetch_once(kind, to).await {
                Ok(digest) => return Ok(Fetched::Digest(digest)),
                Err(Failure::LeaseLost) => return Ok(Fetched::LeaseLost),
                Err(Failure::Local(error)) => return Err(error),
                Err(failure @ (Failure::Again(_) | Failure::Offset(_))) => {
                    self.pause(&mut backoff, "fetch an artifact", &failure).await;
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
    /// they grow, then the artifacts.
    pub(crate) async fn ship_all(&self, status: watch::Receiver<Status>) -> Result<Shipped, Error> {
        let (log, states) =
            tokio::try_join!(self.follow_log(status.clone()), self.follow_states(status.clone()))?;
        let mut taken = vec![log];
        taken.extend(states);
        use v1::ArtifactKind::{Changes, ErroredState, Workspace};
        for (kind, name) in [
            (Workspace, "workspace.tar.gz"),
            (Changes, "changes.json"),
            (ErroredState, "errored.tfstate"),
        ] {
            let path = self.directory.join(name);
            // A plan that failed halfway made things nobody will ask for.
            let wanted = kind == ErroredState || self.made_a_plan();
            if wanted && path.exists() {
                taken.push(self.upload(kind, &path, 0).await?);
            }
        }
        let lost = taken.iter().all(|delivery| *delivery == Delivery::LeaseLost);
        Ok(Shipped {
            log_length: status.borrow().log_length,
            delivery: if lost { Delivery::LeaseLost } else { Delivery::Acknowledged },
        })
    }

    fn made_a_plan(&self) -> bool {
        matches!(self.directory.result(), Ok(crate::job::JobResult::Plan { .. }))
    }

    async fn follow_states(
        &self,
        mut status: watch::Receiver<Status>,
    ) -> Result<Vec<Delivery>, Error> {
        let mut taken = Vec::new();
        let mut sent = self.directory.shipped("states");
        loop {
            let now = *status.borrow_and_update();
            for sequence in sent + 1..=now.states {
                let path = self.directory.join(&JobDirectory::state_name(sequence));
                taken.push(self.upload(v1::ArtifactKind::State, &path, sequence).await?);
                self.directory.set_shipped("states", sequence);
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

    async fn upload(
        &self,
        kind: v1::ArtifactKind,
        path: &Path,
        sequence: u64,
    ) -> Result<Delivery, Error> {
        let of = path.to_owned();
        let digest = tokio::task::spawn_blocking(move || digest::of_file(&of))
            .await
            .map_err(|error| Error::Read(io::Error::other(error)))?
            .map_err(Error::Read)?;
        let size = std::fs::metadata(path).map_err(Error::Read)?.len();
        let header = v1::ArtifactHeader {
            lease: Some(self.lease.to_wire()),
            kind: kind.into(),
            digest,
            size,
            sequence,
        };
        let mut backoff = backoff();
        loop {
            match self.upload_once(&header, path).await {
                Ok(()) => return Ok(Delivery::Acknowledged),
                Err(Failure::LeaseLost) => return Ok(Delivery::LeaseLost),
                Err(Failure::Local(error)) => return Err(error),
                Err(failure @ (Failure::Again(_) | Failure::Offset(_))) => {
                    self.pause(&mut backoff, "upload an artifact", &failure).await;
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

    async fn follow_log(&self, mut status: watch::Receiver<Status>) -> Result<Delivery, Error> {
        let mut acknowledged = self.directory.shipped("log");
        let mut backoff = backoff();
        loop {
            let before = acknowledged;
            match self.log_stream(&mut status, &mut acknowledged).await {
                Ok(()) => return Ok(Delivery::Acknowledged),
                Err(Failure::LeaseLost) => return Ok(Delivery::LeaseLost),
                Err(Failure::Local(error)) => return Err(error),
                Err(Failure::Offset(expected)) => {
                    tracing::warn!(expected, acknowledged, "the log goes on elsewhere");
                    let endless = expected == acknowledged;
                    acknowledged = expected;
                    if endless {
                        let failure = Failure::Offset(expected);
                        self.pause(&mut backoff, "append to the log", &failure).await;
                    }
                }
                Err(failure @ Failure::Again(_)) => {
                    if acknowledged > before {
                        backoff.reset();
                    }
                    self.pause(&mut backoff, "append to the log", &failure).await;
                }
            }
        }
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

    async fn pause(&self, backoff: &mut Backoff, what: &str, failure: &Failure) {
        let reason = match failure {
            Failure::Again(reason) => reason.clone(),
            Failure::Offset(expected) => format!("offset {expected} is expected"),
            Failure::LeaseLost => "the lease is lost".into(),
            Failure::Local(error) => error.to_string(),
        };
        let wait = backoff.next(random::fraction());
        let run_id = &self.lease.run_id;
        tracing::warn!(%run_id, epoch = self.lease.epoch, %reason, ?wait, "failed to {what}");
        tokio::time::sleep(wait).await;
    }
}

fn backoff() -> Backoff {
    Backoff::new(Duration::from_millis(200), Duration::from_secs(30))
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
    if reason == v1::Reason::LeaseLost.name() || refusal.code() == Code::NotFound {
        return Failure::LeaseLost;
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
