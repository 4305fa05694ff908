//! One job from the agent's side, over any number of connections and restarts.
//!
//! ```text
//! accepted ─prepared─► starting ─Go─► executing ─► ended ─shipped─► Finished ─Recorded─► wiped
//!     │                    │
//!     ├─ refused ──────────┼─ ended, shipped ─► Decline ─────────────► wiped
//!     └─ canceled ─────────┴─ ended, shipped, or lost ─► NeverStarted ► wiped
//! ```
//!
//! A result is `Finished` only for a job that was given its `Go`: before that, a job that cannot
//! be prepared is declined with the reason, and one that was canceled is handed back. Neither is
//! acknowledged by a frame of its own; the next heartbeat that is answered without the lease, or
//! `Revoke`, says that it was heard.
//!
//! The task keeps what it waits for and says it again after every `Welcome`; the job directory
//! tells a restarted agent where to go on.

use latchkey_proto::v1;
use latchkey_proto::v1::lease_request::Frame;
use tokio::sync::{mpsc, watch};
use tokio::time::{Duration, Instant};

use super::link::{self, Link};
use super::prepare::{self, Prepared};
use crate::Program;
use crate::job::{Failure, JobResult, Lease, Spec};
use crate::job_directory::{self, JobDirectory, Stage};
use crate::ship::{self, Remains, Shipped, Shipper, Wanted};
use crate::supervisor::control::{self, Order, Status};

/// How long an unanswered `NeverStarted` is kept.
const UNANSWERED: Duration = Duration::from_secs(60);

#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    #[error(transparent)]
    Prepare(#[from] prepare::Error),
    #[error(transparent)]
    Link(#[from] link::Error),
    #[error(transparent)]
    Ship(#[from] ship::Error),
    #[error(transparent)]
    Directory(#[from] job_directory::Error),
}

/// What the lease stream tells a job.
#[derive(Debug)]
pub(super) enum Told {
    /// After `Welcome`: the lease stands.
    Keep,
    /// After `Welcome`: it does not.
    GiveUp,
    Go(v1::Go),
    Cancel {
        force: bool,
    },
    Revoke,
    Recorded,
    /// The answer to a heartbeat did not name the lease: the control plane is done with it.
    NotRenewed,
}

/// What a job tells the agent.
pub(super) enum Event {
    Send(Frame),
    Done(Lease),
}

/// How a job left this host.
enum End {
    /// The control plane has everything.
    Recorded,
    /// Nobody wants it any more.
    GivenUp,
    /// The control plane knows the end, but would not take the last state.
    Kept,
}

/// Why a job is taken up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Origin {
    Offered,
    /// Found on disk at start.
    Found,
}

pub(super) struct Job {
    pub(super) directory: JobDirectory,
    pub(super) lease: Lease,
    pub(super) spec: Spec,
    pub(super) origin: Origin,
    pub(super) shipper: Shipper,
    pub(super) program: Program,
    pub(super) told: mpsc::Receiver<Told>,
    pub(super) events: mpsc::Sender<Event>,
}

impl Job {
    /// Brings the job to its end, and removes what is left of it.
    pub(super) async fn run(mut self) {
        match self.work().await {
            Ok(end) => {
                match end {
                    End::Recorded => tracing::info!(lease = ?self.lease, "the job is recorded"),
                    End::GivenUp => tracing::info!(lease = ?self.lease, "the job is given up"),
                    End::Kept => tracing::error!(lease = ?self.lease, "a state stays on this host"),
                }
                let cleared = match end {
                    End::Recorded | End::GivenUp => self.directory.wipe(),
                    End::Kept => self.directory.set_aside(),
                };
                if let Err(error) = cleared {
                    let error = &error as &dyn std::error::Error;
                    tracing::error!(error, "failed to clear the job's directory");
                }
            }
            // The directory stays: the next start of the agent tries again.
            Err(error) => {
                let error = &error as &dyn std::error::Error;
                tracing::error!(error, lease = ?self.lease, "failed to work on the job");
            }
        }
        let _ = self.events.send(Event::Done(self.lease.clone())).await;
    }

    async fn work(&mut self) -> Result<End, Error> {
        let link = match (self.directory.stage(), self.origin) {
            (Stage::Accepted, Origin::Offered) => match self.prepare().await? {
                Some(link) => Some(link),
                None => return Ok(End::GivenUp),
            },
            (Stage::Accepted, Origin::Found) => {
                // It was never asked for `Go`: the control plane learns that it is not held.
                if let Ok(link) = link::attach(self.directory.path()).await {
                    dismiss(link).await;
                }
                return Ok(End::GivenUp);
            }
            (Stage::Starting, _) => match link::attach(self.directory.path()).await {
                Ok(link) => Some(link),
                // It may have got further in the meantime.
                Err(_) if self.directory.stage() == Stage::Starting => {
                    return self.never_started().await;
                }
                Err(_) => None,
            },
            (Stage::Executed, _) => link::attach(self.directory.path()).await.ok(),
            (Stage::Ended, _) => None,
        };
        match self.follow(link).await? {
            Followed::Shipped(Shipped { remains: Remains::State, wanted: Wanted::No, .. }) => {
                Ok(End::Kept)
            }
            Followed::Shipped(Shipped { wanted: Wanted::No, .. }) => Ok(End::GivenUp),
            Followed::Shipped(shipped) => self.finish(shipped).await,
            Followed::NeverStarted => self.never_started().await,
            Followed::GivenUp => Ok(End::GivenUp),
        }
    }

    /// Steps 3 and 4. Answers `None` when the lease was lost meanwhile.
    async fn prepare(&mut self) -> Result<Option<Link>, Error> {
        // It starts while the archive is fetched.
        let started = link::start(&self.program, &self.directory)?;
        let prepared = {
            let preparing =
                prepare::prepare(&self.shipper, &self.directory, &self.lease, &self.spec);
            tokio::pin!(preparing);
            loop {
                tokio::select! {
                    prepared = &mut preparing => break prepared,
                    told = self.told.recv() => match told {
                        Some(Told::GiveUp | Told::Revoke) => break Ok(Prepared::LeaseLost),
                        Some(Told::Cancel { .. }) => {
                            let reason = "canceled before terraform was started".into();
                            break Ok(Prepared::Refused(Failure::Canceled, reason));
                        }
                        Some(Told::Keep | Told::Recorded | Told::Go(_) | Told::NotRenewed) => {}
                        None => std::future::pending().await,
                    },
                }
            }
        };
        let link = started.attach(self.directory.path()).await?;
        match prepared? {
            Prepared::Ready => {
                // Durable before it is said: from now on only the directory knows that
                // terraform did not run.
                self.directory.record("starting", &self.lease)?;
                self.say(self.starting()).await;
                Ok(Some(link))
            }
            Prepared::Refused(kind, reason) => {
                let kind = kind.to_wire().into();
                let refused = v1::JobFailed { reason, kind, exit_code: None };
                link.send(Order::Refuse(refused)).await;
                Ok(Some(link))
            }
            Prepared::LeaseLost => {
                dismiss(link).await;
                Ok(None)
            }
        }
    }

    /// Follows the supervisor while everything is shipped; replaces it when it dies.
    async fn follow(&mut self, link: Option<Link>) -> Result<Followed, Error> {
        let mut link = link;
        let (status_to, status) = watch::channel(self.on_disk()?);
        let shipper = self.shipper.clone();
        let shipping = shipper.ship_all(status);
        tokio::pin!(shipping);
        if self.directory.stage() == Stage::Executed && link.is_none() {
            link = self.replace_supervisor().await?;
        }
        if let Some(link) = &link {
            status_to.send_replace(*link.status.borrow());
        }
        // Said by `prepare`; for a job found on disk, said with the first `Keep`.
        let mut asked = self.asks(*status_to.borrow()).is_some();
        let mut given_up = false;
        loop {
            tokio::select! {
                shipped = &mut shipping => return Ok(Followed::Shipped(shipped?)),
                changed = next_status(&mut link) => {
                    let status = match changed {
                        Some(status) => status,
                        None => {
                            link = None;
                            match self.directory.stage() {
                                Stage::Ended => self.on_disk()?,
                                Stage::Executed => {
                                    link = self.replace_supervisor().await?;
                                    match &link {
                                        Some(link) => *link.status.borrow(),
                                        None => self.on_disk()?,
                                    }
                                }
                                Stage::Starting if !given_up => return Ok(Followed::NeverStarted),
                                Stage::Starting | Stage::Accepted => return Ok(Followed::GivenUp),
                            }
                        }
                    };
                    status_to.send_replace(status);
                    let ask = self.asks(status);
                    match ask {
                        Some(ask) if !asked => self.say(ask).await,
                        Some(_) | None => {}
                    }
                    asked = self.asks(status).is_some();
                }
                told = self.told.recv() => {
                    let status = *status_to.borrow();
                    let executing = status.stage() >= control::Stage::Executing;
                    let order = match told {
                        Some(Told::Keep) => {
                            if let Some(ask) = self.asks(status) {
                                self.say(ask).await;
                            }
                            None
                        }
                        Some(Told::Go(go)) => Some(Order::Go(go)),
                        Some(Told::Cancel { force }) => Some(Order::Cancel(force)),
                        // Terraform goes on, and what it brings is shipped: it goes to
                        // quarantine. A replacement that waits for secrets need not any more.
                        Some(Told::GiveUp) if executing => {
                            status.wants_secrets.then_some(Order::GiveUp(true))
                        }
                        Some(Told::Revoke) if executing => Some(Order::Withdraw(true)),
                        // The supervisor leaves, unless it is executing by now; its end, or its
                        // next status, tells which.
                        Some(Told::GiveUp | Told::Revoke) => {
                            given_up = true;
                            Some(Order::GiveUp(true))
                        }
                        Some(Told::Recorded | Told::NotRenewed) => None,
                        None => std::future::pending().await,
                    };
                    if let (Some(order), Some(link)) = (order, &link) {
                        link.send(order).await;
                    }
                }
            }
        }
    }

    /// Answers what the job waits for the control plane to say.
    fn asks(&self, status: Status) -> Option<Frame> {
        let lease = Some(self.lease.to_wire());
        let waiting = status.stage() == control::Stage::Waiting;
        if waiting && self.directory.stage() == Stage::Starting {
            Some(Frame::Starting(v1::Starting { lease }))
        } else if status.wants_secrets {
            Some(Frame::Again(v1::Again { lease }))
        } else {
            None
        }
    }

    /// Starts a supervisor in place of a dead one. Answers `None` if the job has ended meanwhile.
    async fn replace_supervisor(&self) -> Result<Option<Link>, Error> {
        let mut tries = 0;
        loop {
            tracing::warn!(lease = ?self.lease, "the supervisor is gone; it is replaced");
            let attached = match link::start(&self.program, &self.directory) {
                Ok(started) => started.attach(self.directory.path()).await,
                Err(error) => Err(error),
            };
            tries += 1;
            match attached {
                Ok(link) => return Ok(Some(link)),
                Err(_) if self.directory.stage() == Stage::Ended => return Ok(None),
                Err(error) if tries >= 5 => return Err(error.into()),
                Err(_) => tokio::time::sleep(Duration::from_millis(200)).await,
            }
        }
    }

    async fn never_started(&mut self) -> Result<End, Error> {
        let lease = Some(self.lease.to_wire());
        self.leave_with(Frame::NeverStarted(v1::NeverStarted { lease })).await
    }

    /// Says that the job leaves without a result, until that was heard.
    async fn leave_with(&mut self, frame: Frame) -> Result<End, Error> {
        self.say(frame.clone()).await;
        let mut until = Instant::now() + UNANSWERED;
        loop {
            tokio::select! {
                told = self.told.recv() => match told {
                    Some(Told::Keep) => {
                        self.say(frame.clone()).await;
                        until = Instant::now() + UNANSWERED;
                    }
                    Some(Told::GiveUp | Told::Revoke | Told::Recorded | Told::NotRenewed) => {
                        return Ok(End::GivenUp);
                    }
                    Some(Told::Go(_) | Told::Cancel { .. }) => {}
                    None => std::future::pending().await,
                },
                () = tokio::time::sleep_until(until) => return Ok(End::GivenUp),
            }
        }
    }

    /// Step 6.
    async fn finish(&mut self, shipped: Shipped) -> Result<End, Error> {
        let result = match shipped.instead {
            Some(instead) => instead,
            None => self.directory.result()?,
        };
        let executed = self.directory.join("exec").exists();
        if let JobResult::Failed { kind, reason, .. } = &result {
            if *kind == Failure::Canceled && !executed {
                return self.never_started().await;
            }
            if !self.directory.join("starting").exists() {
                let (lease, reason) = (Some(self.lease.to_wire()), reason.clone());
                return self.leave_with(Frame::Decline(v1::Decline { lease, reason })).await;
            }
        }
        let finished = Frame::Finished(v1::Finished {
            lease: Some(self.lease.to_wire()),
            log_length: shipped.log_length,
            result: Some(result.to_wire()),
        });
        let end = match shipped.remains {
            Remains::Nothing => End::Recorded,
            Remains::State => End::Kept,
        };
        self.say(finished.clone()).await;
        loop {
            match self.told.recv().await {
                Some(Told::Recorded | Told::Revoke) => return Ok(end),
                Some(Told::Keep | Told::GiveUp) => self.say(finished.clone()).await,
                Some(Told::Go(_) | Told::Cancel { .. } | Told::NotRenewed) => {}
                None => std::future::pending().await,
            }
        }
    }

    fn starting(&self) -> Frame {
        Frame::Starting(v1::Starting { lease: Some(self.lease.to_wire()) })
    }

    async fn say(&self, frame: Frame) {
        // The agent is gone only when all of this ends.
        let _ = self.events.send(Event::Send(frame)).await;
    }

    /// Answers what the directory alone knows.
    fn on_disk(&self) -> Result<Status, Error> {
        let mut status = Status {
            states: self.directory.states()?.last().copied().unwrap_or(0),
            ..Status::default()
        };
        match self.directory.stage() {
            // Complete since the result was written.
            Stage::Ended => {
                let log = std::fs::metadata(self.directory.join("log"));
                status.log_length = log.map_or(0, |log| log.len());
                status.set_stage(control::Stage::Ended);
            }
            Stage::Executed => status.set_stage(control::Stage::Executing),
            Stage::Accepted | Stage::Starting => {}
        }
        Ok(status)
    }
}

enum Followed {
    Shipped(Shipped),
    NeverStarted,
    GivenUp,
}

/// Answers `None` when the supervisor or the connection to it has ended.
async fn next_status(link: &mut Option<Link>) -> Option<Status> {
    match link {
        Some(link) => match link.status.changed().await {
            Ok(()) => Some(*link.status.borrow_and_update()),
            Err(_) => None,
        },
        None => std::future::pending().await,
    }
}

/// Sends a supervisor away that has nothing to do yet, and waits until it is gone.
async fn dismiss(mut link: Link) {
    link.send(Order::GiveUp(true)).await;
    let gone = async { while link.status.changed().await.is_ok() {} };
    if tokio::time::timeout(Duration::from_secs(5), gone).await.is_err() {
        tracing::warn!("a supervisor that was sent away is still there");
    }
}
