//! The lease stream, as numbered in `runner.proto`.
//!
//! One connection at a time: `Hello` (1), `Welcome` (2), then frames both ways until it breaks.
//! Frames about jobs are passed to the jobs' tasks; what those want to say comes back as events.
//! A frame that could not be sent is never queued for the next connection: after every `Welcome`
//! each job says again what it waits for.

use std::time::Duration;

use latchkey_proto::v1::lease_request::Frame as Request;
use latchkey_proto::v1::lease_response::Frame as Response;
use latchkey_proto::v1::runner_service_client::RunnerServiceClient;
use latchkey_proto::v1::{self, Reason};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use tonic::transport::Channel;
use tonic_types::StatusExt;

/// For the first answer, and for `Welcome`.
const PATIENCE: Duration = Duration::from_secs(30);

const CLOSE: Duration = Duration::from_secs(2);

/// Missed answers to heartbeats after which the connection counts as dead.
const MISSED: u32 = 3;

#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("lease jobs: {0:?}: {1}")]
    Refused(tonic::Code, String),
    #[error("lease jobs: the control plane runs on an old copy of its data: {0}")]
    HistoryLost(String),
    #[error("lease jobs: the control plane did not answer in time")]
    Silent,
    #[error("lease jobs: the control plane closed the stream")]
    Closed,
    #[error("lease jobs: the first frame was no welcome")]
    NoWelcome,
    #[error("lease jobs: the connection takes no more frames")]
    Stuck,
}

/// A connection that was welcomed.
pub(crate) struct Connection {
    outbound: mpsc::Sender<v1::LeaseRequest>,
    inbound: Streaming<v1::LeaseResponse>,
    interval: Duration,
    next_heartbeat: Instant,
    last_renewed: Instant,
    /// Heartbeats sent, and answers to them.
    beats: u64,
    renewals: u64,
}

/// What a connection brings.
pub(crate) enum Incoming {
    Frame(Box<Response>),
    /// A heartbeat is due.
    Heartbeat,
}

impl Connection {
    /// Steps 1 and 2.
    pub(crate) async fn open(
        mut client: RunnerServiceClient<Channel>,
        hello: v1::Hello,
    ) -> Result<(Self, v1::Welcome), Error> {
        let (outbound, inbox) = mpsc::channel(64);
        outbound.try_send(frame(Request::Hello(hello))).map_err(|_| Error::Stuck)?;
        let opening = async {
            let mut inbound =
                client.lease(ReceiverStream::new(inbox)).await.map_err(refused)?.into_inner();
            match inbound.message().await.map_err(refused)?.and_then(|response| response.frame) {
                Some(Response::Welcome(welcome)) => Ok((inbound, welcome)),
                Some(_) => Err(Error::NoWelcome),
                None => Err(Error::Closed),
            }
        };
        let (inbound, welcome) =
            tokio::time::timeout(PATIENCE, opening).await.map_err(|_| Error::Silent)??;
        let interval = welcome
            .heartbeat_interval
            .and_then(|interval| Duration::try_from(interval).ok())
            .unwrap_or(Duration::from_secs(10))
            .clamp(Duration::from_millis(50), Duration::from_secs(300));
        let now = Instant::now();
        let next_heartbeat = now + interval;
        let connection = Self {
            outbound,
            inbound,
            interval,
            next_heartbeat,
            last_renewed: now,
            beats: 0,
            renewals: 0,
        };
        Ok((connection, welcome))
    }

    /// Answers how often heartbeats are sent: a lease stands for some of these.
    pub(crate) fn interval(&self) -> Duration {
        self.interval
    }

    /// Sends a frame without waiting: a connection that takes none is as good as dead.
    pub(crate) fn send(&self, request: Request) -> Result<(), Error> {
        self.outbound.try_send(frame(request)).map_err(|_| Error::Stuck)
    }

    /// Sends a heartbeat, and answers its number.
    pub(crate) fn beat(&mut self, held: Vec<v1::LeaseRef>) -> Result<u64, Error> {
        self.send(Request::Heartbeat(v1::Heartbeat { held }))?;
        self.beats += 1;
        Ok(self.beats)
    }

    /// Answers how many heartbeats were answered.
    pub(crate) fn renewals(&self) -> u64 {
        self.renewals
    }

    /// Ends the stream behind what was sent: waits, not for long, until the other side has ended
    /// it too.
    pub(crate) async fn close(self) {
        let Self { outbound, mut inbound, .. } = self;
        drop(outbound);
        let ended = async { while let Ok(Some(_)) = inbound.message().await {} };
        let _ = tokio::time::timeout(CLOSE, ended).await;
    }

    /// Waits for the next frame or heartbeat. Safe to abandon and call again.
    pub(crate) async fn next(&mut self) -> Result<Incoming, Error> {
        loop {
            tokio::select! {
                response = self.inbound.message() => {
                    match response.map_err(refused)?.ok_or(Error::Closed)?.frame {
                        Some(frame @ Response::Renewed(_)) => {
                            self.last_renewed = Instant::now();
                            self.renewals += 1;
                            return Ok(Incoming::Frame(Box::new(frame)));
                        }
                        Some(frame) => return Ok(Incoming::Frame(Box::new(frame))),
                        // A frame of a later version.
                        None => {}
                    }
                }
                () = tokio::time::sleep_until(self.next_heartbeat) => {
                    if self.last_renewed.elapsed() > self.interval * (MISSED + 1) {
                        return Err(Error::Silent);
                    }
                    self.next_heartbeat = Instant::now() + self.interval;
                    return Ok(Incoming::Heartbeat);
                }
            }
        }
    }
}

fn frame(frame: Request) -> v1::LeaseRequest {
    v1::LeaseRequest { frame: Some(frame) }
}

fn refused(status: tonic::Status) -> Error {
    let details = status.get_error_details();
    if details.error_info().is_some_and(|info| info.reason == Reason::HistoryLost.name()) {
        return Error::HistoryLost(status.message().to_owned());
    }
    Error::Refused(status.code(), status.message().to_owned())
}
