//! From a job directory to the control plane, by offset and epoch: as the agent's `ship.rs`, over
//! a disk in memory.
//!
//! `LEASE_LOST` alone is not believed; once the lease stream says so too, what the job has goes to
//! quarantine after its end.

use std::sync::Arc;
use std::time::Duration;

use latchkey_control_plane::auth::sha256;
use latchkey_proto::v1;
use latchkey_proto::v1::finished::Result as Ended;
use latchkey_proto::v1::runner_service_client::RunnerServiceClient;
use prost::Message;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status as Refusal;
use tonic::transport::Channel;
use tonic_types::StatusExt;

use crate::backoff::Backoff;
use crate::machine::{Lease, Machine, Run, Status};
use crate::supervisor::failed;

/// How long one answer may take before the attempt counts as failed.
const PATIENCE: Duration = Duration::from_secs(5);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Delivery {
    Acknowledged,
    Refused,
}

/// What is known of the lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Standing {
    Stands,
    InDoubt,
    Lost,
}

/// What became of everything a job made.
#[derive(Clone, Debug)]
pub(crate) struct Shipped {
    pub(crate) log_length: u64,
    pub(crate) instead: Option<Ended>,
    /// Whether the only copy of a state is on this host.
    pub(crate) remains: bool,
}

pub(crate) enum Fetched {
    Data(Vec<u8>),
    LeaseLost,
    Refused,
}

enum Failure {
    LeaseLost,
    Offset(u64),
    Again,
    Refused,
}

#[derive(Clone)]
pub(crate) struct Shipper {
    pub(crate) client: RunnerServiceClient<Channel>,
    pub(crate) lease: Lease,
    pub(crate) machine: Arc<Machine>,
    standing: watch::Sender<Standing>,
}

impl Shipper {
    pub(crate) fn new(
        client: RunnerServiceClient<Channel>,
        lease: Lease,
        machine: Arc<Machine>,
    ) -> Self {
        Self { client, lease, machine, standing: watch::channel(Standing::Stands).0 }
    }

    pub(crate) fn lease_stands(&self) {
        self.stand(|standing| standing == Standing::InDoubt, Standing::Stands);
    }

    pub(crate) fn lease_is_in_doubt(&self) {
        self.stand(|standing| standing == Standing::Stands, Standing::InDoubt);
    }

    pub(crate) fn lease_is_lost(&self) {
        self.stand(|_| true, Standing::Lost);
    }

    /// By an answer to what was sent: believed only of a lease that is in doubt already.
    fn lease_is_said_lost(&self) {
        self.stand(|standing| standing == Standing::InDoubt, Standing::Lost);
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

    pub(crate) async fn fetch(&self, kind: v1::ArtifactKind) -> Fetched {
        let mut backoff = backoff();
        loop {
            match self.fetch_once(kind).await {
                Ok(data) => return Fetched::Data(data),
                Err(Failure::LeaseLost) => return Fetched::LeaseLost,
                Err(Failure::Refused) => return Fetched::Refused,
                Err(Failure::Again | Failure::Offset(_)) => self.pause(&mut backoff).await,
            }
        }
    }

    async fn fetch_once(&self, kind: v1::ArtifactKind) -> Result<Vec<u8>, Failure> {
        let request =
            v1::FetchArtifactRequest { lease: Some(self.lease.to_wire()), kind: kind.into() };
        let mut client = self.client.clone();
        let mut pieces = in_time(client.fetch_artifact(request)).await?.into_inner();
        let mut data = vec![];
        while let Some(piece) = in_time(pieces.message()).await? {
            data.extend_from_slice(&piece.data);
        }
        Ok(data)
    }

    /// Follows a job to its end, and answers when all it made is acknowledged. Answers `None` at
    /// the end of a job whose lease is lost.
    pub(crate) async fn ship_all(&self, mut status: watch::Receiver<Status>) -> Option<Shipped> {
        let mut standing = self.standing.subscribe();
        tokio::select! {
            shipped = self.ship(status.clone()) => return Some(shipped),
            _ = standing.wait_for(|standing| *standing == Standing::Lost) => {}
        }
        if status.wait_for(|status| status.stage == Run::Ended).await.is_err() {
            std::future::pending::<()>().await;
        }
        None
    }

    /// Brings all that a job has left whose lease is lost. Answers whether all was taken.
    pub(crate) async fn quarantine(&self, finished: &v1::Finished) -> bool {
        use v1::ArtifactKind::{Log, Result, State};
        let directory = self.machine.directory(self.lease);
        let newest = directory.states.last().cloned().unwrap_or_default();
        let mut whole = true;
        for (kind, data, sequence) in [
            (State, newest, directory.states.len() as u64),
            (Result, finished.encode_to_vec(), 0),
            (Log, directory.log, 0),
        ] {
            if !data.is_empty() {
                whole &= self.bring(kind, &data, sequence).await;
            }
        }
        whole
    }

    async fn bring(&self, kind: v1::ArtifactKind, data: &[u8], sequence: u64) -> bool {
        let header = self.header(kind, data, sequence);
        let mut backoff = backoff();
        loop {
            match self.upload_once(&header, data).await {
                Ok(()) => return true,
                Err(Failure::LeaseLost | Failure::Refused) => return false,
                Err(Failure::Again | Failure::Offset(_)) => self.pause(&mut backoff).await,
            }
        }
    }

    async fn ship(&self, status: watch::Receiver<Status>) -> Shipped {
        use v1::ArtifactKind::{Changes, ErroredState, Workspace};
        let (log_length, states) =
            tokio::join!(self.follow_log(status.clone()), self.follow_states(status));
        let mut shipped = Shipped { log_length, instead: None, remains: false };
        for delivery in &states {
            if *delivery == Delivery::Refused {
                shipped.instead = Some(failed(v1::JobFailure::StateUndelivered));
            }
        }
        let directory = self.machine.directory(self.lease);
        if matches!(directory.result, Some(Ended::Plan(_))) {
            for (kind, data) in [(Workspace, &directory.workspace), (Changes, &directory.changes)] {
                let delivery = self.upload(kind, data, 0).await;
                if delivery == Delivery::Refused {
                    shipped.instead = Some(failed(v1::JobFailure::Errored));
                }
            }
        }
        if let (Some(Delivery::Refused), Some(left)) = (states.last(), directory.states.last()) {
            let delivery = self.upload(ErroredState, left, 0).await;
            shipped.remains = delivery != Delivery::Acknowledged;
        }
        shipped
    }

    async fn follow_states(&self, mut status: watch::Receiver<Status>) -> Vec<Delivery> {
        let mut taken = vec![];
        let mut sent = self.machine.directory(self.lease).shipped_states;
        loop {
            let now = *status.borrow_and_update();
            while sent < now.states {
                let directory = self.machine.directory(self.lease);
                let index = usize::try_from(sent).expect("a handful of states");
                let delivery =
                    self.upload(v1::ArtifactKind::State, &directory.states[index], sent + 1).await;
                sent += 1;
                if delivery == Delivery::Acknowledged {
                    self.machine
                        .record("shipped/states", self.lease, |directory| {
                            directory.shipped_states = sent;
                        })
                        .await;
                }
                taken.push(delivery);
            }
            if now.stage == Run::Ended {
                return taken;
            }
            if status.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    async fn upload(&self, kind: v1::ArtifactKind, data: &[u8], sequence: u64) -> Delivery {
        let header = self.header(kind, data, sequence);
        let mut backoff = backoff();
        loop {
            match self.upload_once(&header, data).await {
                Ok(()) => return Delivery::Acknowledged,
                Err(Failure::Refused) => return Delivery::Refused,
                Err(Failure::LeaseLost) => {
                    self.lease_is_said_lost();
                    self.pause(&mut backoff).await;
                }
                Err(Failure::Again | Failure::Offset(_)) => self.pause(&mut backoff).await,
            }
        }
    }

    fn header(&self, kind: v1::ArtifactKind, data: &[u8], sequence: u64) -> v1::ArtifactHeader {
        v1::ArtifactHeader {
            lease: Some(self.lease.to_wire()),
            kind: kind.into(),
            digest: sha256(data).to_string(),
            size: data.len() as u64,
            sequence,
        }
    }

    async fn upload_once(&self, header: &v1::ArtifactHeader, data: &[u8]) -> Result<(), Failure> {
        use v1::upload_artifact_request::Part;
        let part = |part| v1::UploadArtifactRequest { part: Some(part) };
        let (parts, inbox) = mpsc::channel(4);
        let _ = parts.try_send(part(Part::Header(header.clone())));
        let _ = parts.try_send(part(Part::Data(data.to_vec())));
        drop(parts);
        let mut client = self.client.clone();
        in_time(client.upload_artifact(ReceiverStream::new(inbox))).await.map(drop)
    }

    async fn follow_log(&self, mut status: watch::Receiver<Status>) -> u64 {
        let mut acknowledged = self.machine.directory(self.lease).shipped_log;
        let mut backoff = backoff();
        loop {
            let before = acknowledged;
            match self.log_stream(&mut status, &mut acknowledged).await {
                Ok(()) => return acknowledged,
                Err(Failure::Refused) => {
                    while status.borrow_and_update().stage != Run::Ended {
                        if status.changed().await.is_err() {
                            std::future::pending::<()>().await;
                        }
                    }
                    return acknowledged;
                }
                Err(Failure::Offset(expected)) => {
                    let endless = expected == acknowledged;
                    acknowledged = expected;
                    if endless {
                        self.pause(&mut backoff).await;
                    }
                }
                Err(Failure::LeaseLost) => {
                    self.lease_is_said_lost();
                    self.pause(&mut backoff).await;
                }
                Err(Failure::Again) => {
                    if acknowledged > before {
                        backoff.reset();
                    }
                    self.pause(&mut backoff).await;
                }
            }
        }
    }

    async fn log_stream(
        &self,
        status: &mut watch::Receiver<Status>,
        acknowledged: &mut u64,
    ) -> Result<(), Failure> {
        loop {
            let now = *status.borrow_and_update();
            if now.log > *acknowledged {
                break;
            }
            if now.stage == Run::Ended {
                return Ok(());
            }
            if status.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
        let (chunks, inbox) = mpsc::channel(8);
        let mut sent = *acknowledged;
        let opening = self.chunk(sent, Some(self.lease.to_wire()));
        sent += opening.data.len() as u64;
        let _ = chunks.try_send(opening);
        let mut client = self.client.clone();
        let mut answers =
            in_time(client.append_log(ReceiverStream::new(inbox))).await?.into_inner();
        loop {
            let now = *status.borrow_and_update();
            if now.stage == Run::Ended && *acknowledged >= now.log {
                return Ok(());
            }
            tokio::select! {
                permit = chunks.reserve(), if sent < now.log => {
                    let Ok(permit) = permit else {
                        in_time(answers.message()).await?;
                        return Err(Failure::Again);
                    };
                    let chunk = self.chunk(sent, None);
                    sent += chunk.data.len() as u64;
                    permit.send(chunk);
                }
                answer = in_time(answers.message()), if *acknowledged < sent => {
                    let Some(answer) = answer? else { return Err(Failure::Again) };
                    *acknowledged = answer.durable_length;
                    let length = *acknowledged;
                    self.machine.set_shipped(self.lease, |d| d.shipped_log = length);
                }
                changed = status.changed(), if sent >= now.log => {
                    if changed.is_err() {
                        std::future::pending::<()>().await;
                    }
                }
            }
        }
    }

    /// Reads a few whole lines.
    fn chunk(&self, offset: u64, lease: Option<v1::LeaseRef>) -> v1::AppendLogRequest {
        let log = self.machine.directory(self.lease).log;
        let rest = &log[usize::try_from(offset).expect("a short log").min(log.len())..];
        let lines = self.machine.world.chance.between(1, 4);
        let lines = usize::try_from(lines).expect("a few");
        let data = rest.split_inclusive(|byte| *byte == b'\n').take(lines).flatten();
        v1::AppendLogRequest { lease, offset, data: data.copied().collect() }
    }

    async fn pause(&self, backoff: &mut Backoff) {
        tokio::time::sleep(backoff.next(self.machine.world.chance.fraction())).await;
    }
}

fn backoff() -> Backoff {
    Backoff::new(Duration::from_millis(100), Duration::from_secs(2))
}

async fn in_time<T>(answer: impl Future<Output = Result<T, Refusal>>) -> Result<T, Failure> {
    match tokio::time::timeout(PATIENCE, answer).await {
        Ok(answer) => answer.map_err(|refusal| understand(&refusal)),
        Err(_) => Err(Failure::Again),
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
        return Failure::Refused;
    }
    let expected = info.and_then(|info| info.metadata.get("expected"));
    match expected.and_then(|expected| expected.parse().ok()) {
        Some(expected) if reason == v1::Reason::LogOffset.name() => Failure::Offset(expected),
        Some(_) | None => Failure::Again,
    }
}
