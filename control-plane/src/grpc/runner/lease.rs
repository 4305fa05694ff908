//! The lease stream: what a runner says, frame by frame, and what it is answered.
//!
//! It has two halves. The runner's frames are read here one by one and answered, each by a task
//! of its own; what dispatch has to say comes over a channel of its own, and both go out in one
//! stream.
//!
//! An idle stream is a task that lives for days, and a heartbeat a task each: both are as large as
//! the largest future they may await. So what is awaited seldom is boxed.

use latchkey_proto::v1::lease_request::Frame as In;
use latchkey_proto::v1::lease_response::Frame as Out;
use latchkey_proto::v1::{self, Reason};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tonic::{Status, Streaming};

use super::wire::{cancel_out, from_dispatch_out, go_out, job_result, mark, mark_out};
use crate::app::lease_job::Held;
use crate::app::runners::Budget;
use crate::app::start_job::Start;
use crate::auth::RunnerIdentity;
use crate::auth::revocation::Revocation;
use crate::dispatch::{ConnectionId, Introduction, RUNNER_QUEUE, Stop, ToRunner};
use crate::error::Error;
use crate::grpc::revocable::unless_revoked;
use crate::grpc::{Service, convert, introduction};
use crate::job::LeaseRef;

/// The most that one runner may say it holds.
const MOST_HELD: usize = 256;

/// Two would do; three forgive a lost one.
const HEARTBEATS_PER_TERM: u32 = 3;

/// How many frames of one runner may be being answered.
const MOST_AT_ONCE: usize = 64;

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

/// Boxed: a channel keeps room for dozens, in each of thousands of streams.
type Outgoing = mpsc::Sender<Result<Box<v1::LeaseResponse>, Status>>;

impl Service {
    /// Steps 1 and 2 of the protocol, then all others until the stream ends.
    pub(super) async fn hold_leases(
        &self,
        runner: RunnerIdentity,
        hello: v1::Hello,
        mut frames: Streaming<v1::LeaseRequest>,
        answers: Outgoing,
        revocation: Revocation,
        budget: &Budget,
    ) -> Result<(), Status> {
        if hello.held.len() > MOST_HELD {
            return Err(Error::field("held", "a runner holds up to 256 jobs").into());
        }
        let said = introduction::said(&hello)?;
        let standing = Box::pin(self.app.introduce(&runner, &said, budget)).await?;
        let held = hello.held.into_iter().map(|held| convert::lease(Some(held)));
        let held = held.collect::<Result<Vec<_>, _>>()?;
        Box::pin(self.app.greet(&runner, hello.seen.map(mark).as_ref())).await?;
        let (mut keep, mut give_up) = (vec![], vec![]);
        for lease in held {
            match Box::pin(self.app.take_up(&runner, lease)).await {
                Ok(Held::Keep | Held::KeepCanceled { .. }) => keep.push(lease),
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
            history: self.app.mark().map(mark_out),
        };
        send(&answers, Out::Welcome(welcome)).await?;
        let (to_runner, mut from_dispatch) = mpsc::channel(RUNNER_QUEUE);
        let introduction = Introduction {
            abilities: (&said).into(),
            held: keep.clone(),
            standing,
            draining: hello.draining,
        };
        let connected = self.app.dispatch.connect(runner.clone(), introduction, to_runner).await;
        let Some(connection) = connected else {
            return Err(Status::unavailable("the control plane is stopping"));
        };
        tracing::info!(runner_id = %runner.id, "a runner connected");
        let ended = unless_revoked(revocation, async {
            Box::pin(self.app.confirm_standing(runner.id)).await?;
            Box::pin(self.app.confirm_held(&runner, &keep)).await?;
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
                    if let ToRunner::Renew { lease } = message {
                        let (service, speaker) = (self.clone(), speaker.clone());
                        let answers = answers.clone();
                        answering.spawn(async move {
                            service.renew(&speaker.runner, lease, &answers).await
                        });
                        continue;
                    }
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
                Box::pin(self.decline(runner, lease, reason)).await
            }
            In::NeverStarted(never) => {
                Box::pin(self.hand_back(runner, convert::lease(never.lease)?)).await
            }
            In::Starting(starting) => {
                let lease = convert::lease(starting.lease)?;
                match Box::pin(self.app.start_job(runner, lease)).await {
                    Ok(Start::Go(go)) => send(answers, go_out(lease, go, self.app.mark())).await,
                    Ok(Start::Revoked { reason }) => revoke(answers, lease, reason).await,
                    Ok(Start::Forced) => send(answers, cancel_out(lease, Stop::ByForce)).await,
                    Err(error) => self.lost(runner, answers, lease, error).await,
                }
            }
            In::Again(again) => {
                let lease = convert::lease(again.lease)?;
                match Box::pin(self.app.start_again(runner, lease)).await {
                    Ok(Start::Go(go)) => send(answers, go_out(lease, go, self.app.mark())).await,
                    Ok(Start::Revoked { reason }) => revoke(answers, lease, reason).await,
                    Ok(Start::Forced) => send(answers, cancel_out(lease, Stop::ByForce)).await,
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
                let history = self.app.mark().map(mark_out);
                send(answers, Out::Renewed(v1::Renewed { lease, history })).await
            }
            In::Draining(v1::Draining {}) => {
                self.app.dispatch.draining(runner.id, speaker.connection);
                Ok(())
            }
            In::Finished(finished) => {
                let lease = convert::lease(finished.lease)?;
                let result = job_result(finished.result)?;
                let recorded = self.app.finish_job(runner, lease, finished.log_length, result);
                match Box::pin(recorded).await {
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

    /// Gives the holder of a lease the credentials that its phase has now.
    async fn renew(
        &self,
        runner: &RunnerIdentity,
        lease: LeaseRef,
        answers: &Outgoing,
    ) -> Result<(), Status> {
        match Box::pin(self.app.start_again(runner, lease)).await {
            Ok(Start::Go(go)) => send(answers, go_out(lease, go, self.app.mark())).await,
            // What took them away told the runner itself.
            Ok(Start::Revoked { .. } | Start::Forced) => Ok(()),
            Err(error) if error.reason() == Reason::LeaseLost => Ok(()),
            Err(error) => Err(error.into()),
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

async fn send(answers: &Outgoing, frame: Out) -> Result<(), Status> {
    answers
        .send(Ok(Box::new(v1::LeaseResponse { frame: Some(frame) })))
        .await
        .map_err(|_| Status::cancelled("the runner is gone"))
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
            | Reason::SecondPersonRequired
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
            | Reason::DigestMismatch
            | Reason::SignInRejected
            | Reason::SignInThrottled
            | Reason::LastOwner
            | Reason::UserShared
            | Reason::MailUnavailable => {
                tracing::warn!(job = %lease.job, epoch = lease.epoch.get(), error = %error,
                    "a runner's frame was refused");
                revoke(answers, lease, error.message().to_owned()).await
            }
        }
    }
}
