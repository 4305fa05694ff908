//! `RunnerService`: the runners' side of leases and of bulk data.
//!
//! A lease stream has two halves. This file reads the runner's frames one by one and answers
//! them; what dispatch has to say comes over a channel of its own, and both go out in one
//! stream.

use latchkey_domain::id::Generation;
use latchkey_domain::run::{Counts, FailureKind, PlanDigests};
use latchkey_proto::v1::finished::Result as WireResult;
use latchkey_proto::v1::lease_request::Frame as In;
use latchkey_proto::v1::lease_response::Frame as Out;
use latchkey_proto::v1::runner_service_server::RunnerService;
use latchkey_proto::v1::upload_artifact_request::Part;
use latchkey_proto::v1::{self, Reason};
use prost::Message;
use secrecy::ExposeSecret;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::revocable::{unless_revoked, until_revoked};
use super::{Answers, Service, convert, introduction, next_part};
use crate::app::artifacts::{ArtifactHeader, Destination, Made, Needed};
use crate::app::finish_job::JobResult;
use crate::app::history::Seen;
use crate::app::lease_job::Held;
use crate::app::parse_digest;
use crate::app::run_output::Piece;
use crate::app::start_job::{Go, Start};
use crate::auth::RunnerIdentity;
use crate::auth::revocation::Revocation;
use crate::dispatch::{ConnectionId, Introduction, RUNNER_QUEUE, ToRunner};
use crate::error::Error;
use crate::job::LeaseRef;
use crate::store::record::variable::Category;

/// The most that one runner may say it holds.
const MOST_HELD: usize = 256;

/// Two would do; three forgive a lost one.
const HEARTBEATS_PER_TERM: u32 = 3;

/// How many frames of one runner may be being answered.
const MOST_AT_ONCE: usize = 64;

/// How many appends of one stream may share a sync.
const MOST_IN_ONE_SYNC: usize = 16;

#[tonic::async_trait]
impl RunnerService for Service {
    type LeaseStream = Answers<v1::LeaseResponse>;
    type FetchArtifactStream = Answers<v1::FetchArtifactResponse>;
    type AppendLogStream = Answers<v1::AppendLogResponse>;

    async fn enroll(
        &self,
        request: Request<v1::EnrollRequest>,
    ) -> Result<Response<v1::EnrollResponse>, Status> {
        self.app.check_history()?;
        let v1::EnrollRequest { pool_token, certificate_request, name } = request.into_inner();
        let enrolled = self.app.enroll(&pool_token.into(), &certificate_request, &name).await?;
        Ok(Response::new(v1::EnrollResponse {
            runner_id: enrolled.runner.to_string(),
            certificate: enrolled.issued.certificate.to_vec(),
            ca_certificate: enrolled.issued.ca_certificate.to_vec(),
        }))
    }

    async fn lease(
        &self,
        request: Request<Streaming<v1::LeaseRequest>>,
    ) -> Result<Response<Self::LeaseStream>, Status> {
        let runner = identity(&request)?;
        let mut frames = request.into_inner();
        let hello = match next_part(&mut frames).await?.and_then(|first| first.frame) {
            Some(In::Hello(hello)) => hello,
            Some(_) | None => {
                return Err(Error::field("frame", "the first frame is Hello").into());
            }
        };
        let revocation = self.app.revocations.of(runner.id);
        let (answers, outgoing) = mpsc::channel(RUNNER_QUEUE);
        let (service, revoked) = (self.clone(), revocation.clone());
        tokio::spawn(async move {
            let sender = answers.clone();
            let held = service.hold_leases(runner, hello, frames, answers, revoked).await;
            if let Err(status) = held {
                let _ = sender.send(Err(status)).await;
            }
        });
        Ok(Response::new(until_revoked(revocation, ReceiverStream::new(outgoing))))
    }

    async fn fetch_artifact(
        &self,
        request: Request<v1::FetchArtifactRequest>,
    ) -> Result<Response<Self::FetchArtifactStream>, Status> {
        let runner = identity(&request)?;
        let revocation = self.app.revocations.of(runner.id);
        let v1::FetchArtifactRequest { lease, kind } = request.into_inner();
        let needed = match v1::ArtifactKind::try_from(kind) {
            Ok(v1::ArtifactKind::Configuration) => Needed::Configuration,
            Ok(v1::ArtifactKind::Workspace) => Needed::Workspace,
            Ok(v1::ArtifactKind::State) => Needed::State,
            Ok(
                v1::ArtifactKind::Unspecified
                | v1::ArtifactKind::Changes
                | v1::ArtifactKind::ErroredState
                | v1::ArtifactKind::StateDump
                | v1::ArtifactKind::Log
                | v1::ArtifactKind::Result,
            )
            | Err(_) => return Err(Error::field("kind", "it cannot be fetched").into()),
        };
        let mut reader = self.app.fetch_artifact(&runner, convert::lease(lease)?, needed).await?;
        let (sender, parts) = mpsc::channel(4);
        tokio::spawn(async move {
            loop {
                let part = match reader.next().await {
                    Ok(Some(data)) => Ok(v1::FetchArtifactResponse { data }),
                    Ok(None) => return,
                    Err(error) => Err(Error::internal(error).into()),
                };
                let failed = part.is_err();
                if sender.send(part).await.is_err() || failed {
                    return;
                }
            }
        });
        Ok(Response::new(until_revoked(revocation, ReceiverStream::new(parts))))
    }

    async fn upload_artifact(
        &self,
        request: Request<Streaming<v1::UploadArtifactRequest>>,
    ) -> Result<Response<v1::UploadArtifactResponse>, Status> {
        let runner = identity(&request)?;
        let revocation = self.app.revocations.of(runner.id);
        unless_revoked(revocation, self.take_upload(&runner, request.into_inner())).await
    }

    async fn append_log(
        &self,
        request: Request<Streaming<v1::AppendLogRequest>>,
    ) -> Result<Response<Self::AppendLogStream>, Status> {
        let runner = identity(&request)?;
        let revocation = self.app.revocations.of(runner.id);
        let revoked = revocation.clone();
        let mut chunks = request.into_inner();
        let app = std::sync::Arc::clone(&self.app);
        let (sender, answers) = mpsc::channel(16);
        tokio::spawn(async move {
            let append = async {
                let Some(mut chunk) = next_part(&mut chunks).await? else { return Ok(()) };
                let lease = convert::lease(chunk.lease.take())?;
                let appender = app.append_log(&runner, lease).await?;
                let (ahead, mut arrived) = mpsc::channel(16);
                let reading = async move {
                    let mut next = Some(chunk);
                    while let Some(chunk) = next {
                        if ahead.send(chunk).await.is_err() {
                            break;
                        }
                        next = chunks.message().await?;
                    }
                    Ok::<(), Status>(())
                };
                let appending = async {
                    let mut held = None;
                    loop {
                        let first = match held.take() {
                            Some(chunk) => Some(chunk),
                            None => arrived.recv().await,
                        };
                        let Some(first) = first else { return Ok::<(), Status>(()) };
                        let (run, after) = contiguous(first, &mut arrived);
                        held = after;
                        let count = run.len();
                        let durable_length = appender.append(run).await?;
                        latchkey_failpoint::reach("cp.log.durable");
                        for _ in 0..count {
                            let answer = v1::AppendLogResponse { durable_length };
                            if sender.send(Ok(answer)).await.is_err() {
                                return Ok(());
                            }
                        }
                    }
                };
                tokio::try_join!(reading, appending).map(drop)
            };
            if let Err(status) = unless_revoked(revoked, append).await {
                let _: Result<(), _> = sender.send(Err::<_, Status>(status)).await;
            }
        });
        Ok(Response::new(until_revoked(revocation, ReceiverStream::new(answers))))
    }
}

/// Whose stream it is, and which of them.
#[derive(Clone, Debug)]
struct Speaker {
    runner: RunnerIdentity,
    connection: ConnectionId,
}

/// Frames that are being answered. What is being committed is committed, whoever hears of it.
struct Answering(JoinSet<Result<(), Status>>);

impl Drop for Answering {
    fn drop(&mut self) {
        self.0.detach_all();
    }
}

type Outgoing = mpsc::Sender<Result<v1::LeaseResponse, Status>>;

impl Service {
    async fn take_upload(
        &self,
        runner: &RunnerIdentity,
        mut parts: Streaming<v1::UploadArtifactRequest>,
    ) -> Result<Response<v1::UploadArtifactResponse>, Status> {
        let header = match next_part(&mut parts).await?.and_then(|first| first.part) {
            Some(Part::Header(header)) => artifact_header(header)?,
            Some(Part::Data(_)) | None => {
                return Err(Error::field("header", "the first message carries the header").into());
            }
        };
        let mut upload = self.app.upload_artifact(runner, header).await?;
        let mut result = (header.kind == Made::Result).then(Vec::new);
        while let Some(message) = next_part(&mut parts).await? {
            match message.part {
                Some(Part::Data(data)) => {
                    upload.write(&data).await?;
                    if let Some(result) = &mut result {
                        result.extend_from_slice(&data);
                    }
                }
                Some(Part::Header(_)) | None => {
                    let message = "only the first message carries a header";
                    return Err(Error::field("data", message).into());
                }
            }
        }
        if let Some(result) = result {
            upload.says(&encoded_result(&result)?);
        }
        let quarantined = upload.finish().await? == Destination::Quarantine;
        Ok(Response::new(v1::UploadArtifactResponse { quarantined }))
    }

    /// Steps 1 and 2 of the protocol, then all others until the stream ends.
    async fn hold_leases(
        &self,
        runner: RunnerIdentity,
        hello: v1::Hello,
        mut frames: Streaming<v1::LeaseRequest>,
        answers: Outgoing,
        revocation: Revocation,
    ) -> Result<(), Status> {
        if hello.held.len() > MOST_HELD {
            return Err(Error::field("held", "a runner holds up to 256 jobs").into());
        }
        let said = introduction::said(&hello)?;
        let standing = self.app.introduce(&runner, &said).await?;
        let held = hello.held.into_iter().map(|held| convert::lease(Some(held)));
        let held = held.collect::<Result<Vec<_>, _>>()?;
        let seen = Seen {
            generation: Generation::new(hello.seen_generation),
            history: hello.seen_history,
        };
        self.app.greet(&runner, seen, &held).await?;
        let (mut keep, mut give_up, mut canceled) = (vec![], vec![], vec![]);
        for lease in held {
            match self.app.take_up(&runner, lease).await {
                Ok(Held::Keep) => keep.push(lease),
                Ok(Held::KeepCanceled { force }) => {
                    keep.push(lease);
                    canceled.push((lease, force));
                }
                Ok(Held::GiveUp) => give_up.push(lease),
                Err(error) if error.reason() == Reason::LeaseLost => give_up.push(lease),
                Err(error) => return Err(error.into()),
            }
        }
        let welcome = v1::Welcome {
            runner_id: runner.id.to_string(),
            generation: self.app.generation.get(),
            heartbeat_interval: prost_types::Duration::try_from(
                self.app.lease_term / HEARTBEATS_PER_TERM,
            )
            .ok(),
            keep: keep.iter().copied().map(convert::lease_out).collect(),
            give_up: give_up.into_iter().map(convert::lease_out).collect(),
            history: self.app.store.history().get(),
        };
        send(&answers, Out::Welcome(welcome)).await?;
        for (lease, force) in canceled {
            cancel(&answers, lease, force).await?;
        }
        let (to_runner, mut from_dispatch) = mpsc::channel(RUNNER_QUEUE);
        let introduction = Introduction {
            abilities: (&said).into(),
            held: keep,
            standing,
            draining: hello.draining,
        };
        let connected = self.app.dispatch.connect(runner.clone(), introduction, to_runner).await;
        let Some(connection) = connected else {
            return Err(Status::unavailable("the control plane is stopping"));
        };
        tracing::info!(runner_id = %runner.id, "a runner connected");
        let ended = unless_revoked(revocation, async {
            self.app.confirm_standing(runner.id).await?;
            let speaker = Speaker { runner: runner.clone(), connection };
            self.converse(&speaker, &mut frames, &mut from_dispatch, &answers).await
        })
        .await;
        self.app.dispatch.disconnect(runner.id, connection);
        tracing::info!(runner_id = %runner.id, "a runner disconnected");
        ended
    }

    /// Answers frames until the stream ends. Each is answered by a task of its own, so that one
    /// that waits for AWS holds up neither heartbeats nor other jobs.
    async fn converse(
        &self,
        speaker: &Speaker,
        frames: &mut Streaming<v1::LeaseRequest>,
        from_dispatch: &mut mpsc::Receiver<ToRunner>,
        answers: &Outgoing,
    ) -> Result<(), Status> {
        let mut answering = Answering(JoinSet::new());
        self.exchange(speaker, frames, from_dispatch, answers, &mut answering.0).await
    }

    async fn exchange(
        &self,
        speaker: &Speaker,
        frames: &mut Streaming<v1::LeaseRequest>,
        from_dispatch: &mut mpsc::Receiver<ToRunner>,
        answers: &Outgoing,
        answering: &mut JoinSet<Result<(), Status>>,
    ) -> Result<(), Status> {
        loop {
            tokio::select! {
                // The runner keeps all it has, and comes back.
                () = self.app.history.lost() => self.app.check_history()?,
                frame = frames.message(), if answering.len() < MOST_AT_ONCE => match frame {
                    Ok(Some(v1::LeaseRequest { frame: Some(frame) })) => {
                        let (service, speaker) = (self.clone(), speaker.clone());
                        let answers = answers.clone();
                        answering.spawn(async move {
                            service.answer(&speaker, frame, &answers).await
                        });
                    }
                    Ok(Some(v1::LeaseRequest { frame: None })) => {
                        return Err(Error::field("frame", "the frame is empty or unknown").into());
                    }
                    Ok(None) => return Ok(()),
                    Err(status) => {
                        tracing::info!(runner_id = %speaker.runner.id, code = %status.code(),
                            "a runner's stream broke");
                        return Ok(());
                    }
                },
                Some(answered) = answering.join_next() => {
                    answered.map_err(|error| Status::from(Error::internal(error)))??;
                }
                message = from_dispatch.recv() => {
                    let Some(message) = message else {
                        return Err(Status::aborted("the stream was not read; connect again"));
                    };
                    let Some(frame) = from_dispatch_out(message) else {
                        return Err(Status::aborted("another stream of this runner took over"));
                    };
                    send(answers, frame).await?;
                }
            }
        }
    }

    async fn answer(&self, speaker: &Speaker, frame: In, answers: &Outgoing) -> Result<(), Status> {
        let runner = &speaker.runner;
        match frame {
            In::Hello(_) => Err(Error::field("frame", "Hello is the first frame only").into()),
            In::Accept(accept) => {
                let lease = convert::lease(accept.lease)?;
                tracing::debug!(job = %lease.job, epoch = lease.epoch.get(), "accepted");
                Ok(())
            }
            In::Decline(decline) => {
                let lease = convert::lease(decline.lease)?;
                let reason: String = decline.reason.chars().take(256).collect();
                tracing::warn!(job = %lease.job, runner_id = %runner.id, reason, "declined");
                self.decline(runner, lease, reason).await
            }
            In::NeverStarted(never) => self.hand_back(runner, convert::lease(never.lease)?).await,
            In::Starting(starting) => {
                let lease = convert::lease(starting.lease)?;
                match self.app.start_job(runner, lease).await {
                    Ok(Start::Go(go)) => send(answers, go_out(lease, go)).await,
                    Ok(Start::Revoked { reason }) => revoke(answers, lease, reason).await,
                    Ok(Start::Forced) => cancel(answers, lease, true).await,
                    Err(error) => self.lost(runner, answers, lease, error).await,
                }
            }
            In::Again(again) => {
                let lease = convert::lease(again.lease)?;
                match self.app.start_again(runner, lease).await {
                    Ok(Start::Go(go)) => send(answers, go_out(lease, go)).await,
                    Ok(Start::Revoked { reason }) => revoke(answers, lease, reason).await,
                    Ok(Start::Forced) => cancel(answers, lease, true).await,
                    Err(error) => self.lost(runner, answers, lease, error).await,
                }
            }
            In::Heartbeat(heartbeat) => {
                if heartbeat.held.len() > MOST_HELD {
                    return Err(Error::field("held", "a runner holds up to 256 jobs").into());
                }
                let held = heartbeat.held.into_iter().map(|held| convert::lease(Some(held)));
                let held = held.collect::<Result<Vec<_>, _>>()?;
                let renewed = self.app.dispatch.heartbeat(runner.id, held).await;
                let lease = renewed.into_iter().map(convert::lease_out).collect();
                let history = self.app.store.history().get();
                send(answers, Out::Renewed(v1::Renewed { lease, history })).await
            }
            In::Draining(v1::Draining {}) => {
                self.app.dispatch.draining(runner.id, speaker.connection);
                Ok(())
            }
            In::Finished(finished) => {
                let lease = convert::lease(finished.lease)?;
                let result = job_result(finished.result)?;
                let recorded =
                    self.app.finish_job(runner, lease, finished.log_length, result).await;
                match recorded {
                    Ok(()) => {
                        self.app.dispatch.released(lease.job, lease.epoch);
                        let lease = Some(convert::lease_out(lease));
                        send(answers, Out::Recorded(v1::Recorded { lease })).await
                    }
                    Err(error) => self.lost(runner, answers, lease, error).await,
                }
            }
        }
    }

    async fn hand_back(&self, runner: &RunnerIdentity, lease: LeaseRef) -> Result<(), Status> {
        match self.app.hand_back(runner, lease).await {
            Ok(()) => {
                self.app.dispatch.released(lease.job, lease.epoch);
                Ok(())
            }
            // Ids of others are answered like any lease that is not theirs.
            Err(error) if matches!(error.reason(), Reason::LeaseLost | Reason::NotFound) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// A runner that cannot prepare a job ends it with its reason: the next would fail alike.
    async fn decline(
        &self,
        runner: &RunnerIdentity,
        lease: LeaseRef,
        reason: String,
    ) -> Result<(), Status> {
        match self.app.decline_job(runner, lease, reason).await {
            Ok(()) => {
                self.app.dispatch.released(lease.job, lease.epoch);
                Ok(())
            }
            Err(error) if error.reason() == Reason::LeaseLost => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

/// Takes what has arrived behind a chunk and continues it, so that all of it shares one sync.
/// Answers it with the first chunk that does not, if there is one.
fn contiguous(
    first: v1::AppendLogRequest,
    arrived: &mut mpsc::Receiver<v1::AppendLogRequest>,
) -> (Vec<Piece>, Option<v1::AppendLogRequest>) {
    let mut end = first.offset.saturating_add(first.data.len() as u64);
    let mut run = vec![Piece { offset: first.offset, data: first.data }];
    while run.len() < MOST_IN_ONE_SYNC {
        let Ok(next) = arrived.try_recv() else { break };
        if next.offset != end {
            return (run, Some(next));
        }
        end = end.saturating_add(next.data.len() as u64);
        run.push(Piece { offset: next.offset, data: next.data });
    }
    (run, None)
}

fn identity<T>(request: &Request<T>) -> Result<RunnerIdentity, Status> {
    let identity = request.extensions().get::<RunnerIdentity>().cloned();
    identity.ok_or_else(|| Error::internal("the layer let an unproved runner pass").into())
}

async fn send(answers: &Outgoing, frame: Out) -> Result<(), Status> {
    answers
        .send(Ok(v1::LeaseResponse { frame: Some(frame) }))
        .await
        .map_err(|_| Status::cancelled("the runner is gone"))
}

async fn cancel(answers: &Outgoing, lease: LeaseRef, force: bool) -> Result<(), Status> {
    let lease = Some(convert::lease_out(lease));
    send(answers, Out::Cancel(v1::CancelJob { lease, force })).await
}

async fn revoke(answers: &Outgoing, lease: LeaseRef, reason: String) -> Result<(), Status> {
    let lease = Some(convert::lease_out(lease));
    send(answers, Out::Revoke(v1::Revoke { lease, reason })).await
}

impl Service {
    /// A refused frame of one job ends that lease, not the stream that other jobs share. Only
    /// where asking again later can help does the stream end: the runner asks again then.
    async fn lost(
        &self,
        runner: &RunnerIdentity,
        answers: &Outgoing,
        lease: LeaseRef,
        error: Error,
    ) -> Result<(), Status> {
        match error.reason() {
            Reason::StoreUnavailable
            | Reason::Internal
            | Reason::ChangedMeanwhile
            | Reason::HistoryLost
            | Reason::Unspecified => Err(error.into()),
            Reason::LeaseLost => {
                self.app.dispatch.lost_by(runner.id, lease.job, lease.epoch);
                revoke(answers, lease, error.message().to_owned()).await
            }
            Reason::FieldInvalid
            | Reason::IdentityRequired
            | Reason::NotAllowed
            | Reason::NotFound
            | Reason::NameTaken
            | Reason::LimitReached
            | Reason::MfaRequired
            | Reason::NotAwaitingCode
            | Reason::WrongState
            | Reason::PlanChanged
            | Reason::PersonRequired
            | Reason::CancelGrace
            | Reason::TripleIncomplete
            | Reason::SerialUnusable
            | Reason::AccountNotListed
            | Reason::CodeUsed
            | Reason::DeviceBusy
            | Reason::CodeRejected
            | Reason::DeviceRejected
            | Reason::KeyRejected
            | Reason::SecretRejected
            | Reason::ClockSkew
            | Reason::RegionDisabled
            | Reason::Throttled
            | Reason::ExchangeUnknown
            | Reason::AwsUnreachable
            | Reason::ExchangeRefused
            | Reason::VariableReserved
            | Reason::ArchiveRefused
            | Reason::PoolTokenRejected
            | Reason::LogOffset
            | Reason::DigestMismatch => {
                tracing::warn!(job = %lease.job, epoch = lease.epoch.get(), error = %error,
                    "a runner's frame was refused");
                revoke(answers, lease, error.message().to_owned()).await
            }
        }
    }
}

/// `None` ends the stream.
fn from_dispatch_out(message: ToRunner) -> Option<Out> {
    match message {
        ToRunner::Offer { lease, spec } => Some(Out::Offer(v1::Offer {
            lease: Some(convert::lease_out(lease)),
            job: Some(convert::job_spec(*spec)),
        })),
        ToRunner::Cancel { lease, force } => {
            Some(Out::Cancel(v1::CancelJob { lease: Some(convert::lease_out(lease)), force }))
        }
        ToRunner::Revoke { lease, reason } => {
            Some(Out::Revoke(v1::Revoke { lease: Some(convert::lease_out(lease)), reason }))
        }
        ToRunner::Drain => Some(Out::Drain(v1::Drain {})),
        ToRunner::Resume => Some(Out::Resume(v1::Resume {})),
        ToRunner::Superseded => None,
    }
}

fn go_out(lease: LeaseRef, go: Go) -> Out {
    let credentials = go.session.map(|session| v1::SessionCredentials {
        access_key_id: session.access_key_id,
        secret_access_key: session.secret_access_key.expose_secret().to_owned(),
        session_token: session.session_token.expose_secret().to_owned(),
        expire_time: Some(convert::timestamp(session.expires_at)),
    });
    let variables = go
        .variables
        .into_iter()
        .map(|variable| v1::JobVariable {
            value: variable.value.expose_secret().to_owned(),
            environment: variable.category == Category::Environment,
            name: variable.name,
            hcl: variable.hcl,
            sensitive: variable.sensitive,
        })
        .collect();
    Out::Go(v1::Go { lease: Some(convert::lease_out(lease)), credentials, variables })
}

fn artifact_header(header: v1::ArtifactHeader) -> Result<ArtifactHeader, Error> {
    let kind = match v1::ArtifactKind::try_from(header.kind) {
        Ok(v1::ArtifactKind::Workspace) => Made::Workspace,
        Ok(v1::ArtifactKind::State) => Made::State,
        Ok(v1::ArtifactKind::Changes) => Made::Changes,
        Ok(v1::ArtifactKind::ErroredState) => Made::ErroredState,
        Ok(v1::ArtifactKind::StateDump) => Made::StateDump,
        Ok(v1::ArtifactKind::Log) => Made::Log,
        Ok(v1::ArtifactKind::Result) => Made::Result,
        Ok(v1::ArtifactKind::Unspecified | v1::ArtifactKind::Configuration) | Err(_) => {
            return Err(Error::field("kind", "a job makes nothing of this kind"));
        }
    };
    Ok(ArtifactHeader {
        lease: convert::lease(header.lease)?,
        kind,
        digest: parse_digest("digest", &header.digest)?,
        size: header.size,
        sequence: header.sequence,
    })
}

/// Reads the result that an old lease brings as an artifact.
fn encoded_result(frame: &[u8]) -> Result<JobResult, Error> {
    let finished = v1::Finished::decode(frame)
        .map_err(|_| Error::field("data", "it is not an encoded Finished frame"))?;
    job_result(finished.result)
}

fn job_result(result: Option<WireResult>) -> Result<JobResult, Error> {
    match result.ok_or_else(|| Error::field("result", "say how the job ended"))? {
        WireResult::Plan(plan) => {
            let digests = plan.digests.unwrap_or_default();
            let digests = PlanDigests {
                plan: parse_digest("plan_digest", &digests.plan_digest)?,
                workspace: parse_digest("workspace_digest", &digests.workspace_digest)?,
                lock_file: convert::optional_digest("lock_file_digest", &digests.lock_file_digest)?,
                changes: parse_digest("changes_digest", &digests.changes_digest)?,
            };
            let v1::PlanFinished { applyable, add, change, destroy, import, .. } = plan;
            let version: String = plan.terraform_version.chars().take(64).collect();
            Ok(JobResult::Planned {
                digests,
                applyable,
                counts: Counts { add, change, destroy, import },
                engine: plan.engine,
                terraform_version: version,
            })
        }
        WireResult::Apply(apply) => {
            let outputs = Some(apply.outputs_json).filter(|outputs| !outputs.is_empty());
            Ok(JobResult::Applied { outputs })
        }
        WireResult::Failed(failed) => {
            let kind = match v1::JobFailure::try_from(failed.kind) {
                Ok(v1::JobFailure::Errored | v1::JobFailure::PlanChanged) => FailureKind::Errored,
                Ok(v1::JobFailure::Canceled) => FailureKind::Canceled,
                Ok(v1::JobFailure::EndedUnknown) => FailureKind::EndedUnknown,
                Ok(v1::JobFailure::StateUndelivered) => FailureKind::StateUndelivered,
                Ok(v1::JobFailure::Unspecified) | Err(_) => {
                    return Err(Error::field("kind", "say how the job failed"));
                }
            };
            Ok(JobResult::Failed { kind, reason: failed.reason })
        }
    }
}

#[cfg(test)]
mod tests;
