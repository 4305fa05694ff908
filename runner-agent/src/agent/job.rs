//! One job from the agent's side, over any number of connections and restarts.
//!
//! ```text
//! accepted ─prepared─► starting ─Go─► executing ─► ended ─shipped─► Finished ─Recorded─► wiped
//!     │                    │              │          │                 │
//!     │                    │              └ given up ┴───── revoked ───┴► quarantine ──► wiped
//!     ├─ refused ──────────┼─ ended, shipped ─► Decline ─────────────► wiped   or set aside
//!     ├─ canceled ─────────┴─ ended, shipped, or lost ─► NeverStarted ► wiped
//!     └─ given up ► wiped
//! ```
//!
//! A job whose lease is given up when terraform may have run goes on to its end: a plan is asked
//! to stop, an apply is not. What it has then goes to quarantine under its old lease. That a lease
//! is lost, only the lease stream says: an answer to an upload alone is not believed.
//!
//! A result is `Finished` only for a job that was given its `Go`: before that, a job that cannot
//! be prepared is declined with the reason, and one that was canceled is handed back. Neither is
//! acknowledged by a frame of its own; the next heartbeat that is answered without the lease, or
//! `Revoke`, says that it was heard. A job that had asked for its `Go` says it of a lost lease
//! too: the control plane may take terraform for started.
//!
//! What fails on this host is tried again: a task ends only with its job.
//!
//! The task keeps what it waits for and says it again after every `Welcome`; the job directory
//! tells a restarted agent where to go on.

mod follow;

use std::fs::File;
use std::sync::Arc;

use latchkey_proto::v1;
use latchkey_proto::v1::lease_request::Frame;
use tokio::sync::mpsc;
use tokio::time::{Duration, sleep};

use self::follow::Followed;
use super::link::{self, Link, Started};
use super::mailbox;
use super::prepare::{self, Fetched, Prepared};
use super::told::{Event, Rest, Told};
use crate::Program;
use crate::backoff::Backoff;
use crate::engine::Engines;
use crate::job::{Failure, JobResult, Lease, Phase, Spec};
use crate::job_directory::{self, JobDirectory, Stage};
use crate::random;
use crate::ship::{self, Remains, Shipped, Shipper};
use crate::supervisor::control::Order;

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
    #[error("work in the background")]
    Task(#[source] tokio::task::JoinError),
}

/// How a job left this host.
enum End {
    /// The control plane has everything.
    Recorded,
    /// Nobody wants it any more, and nothing ran that could have left something.
    GivenUp,
    /// The control plane has everything beside the run, for a person.
    Quarantined,
    /// The only copy of something is here.
    Kept,
}

/// How often a directory is tried to be cleared that does not even lose its name.
const CLEARINGS: u32 = 5;

/// Why a job is taken up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Origin {
    Offered,
    /// Found on disk at start.
    Found,
    /// An earlier attempt of this process failed on this host.
    Failed,
}

pub(super) struct Job {
    pub(super) directory: JobDirectory,
    pub(super) lease: Lease,
    pub(super) spec: Spec,
    pub(super) origin: Origin,
    pub(super) shipper: Shipper,
    pub(super) program: Program,
    pub(super) told: mailbox::Receiver<Told>,
    pub(super) events: mpsc::Sender<Event>,
    pub(super) rest: Rest,
    pub(super) engines: Arc<Engines>,
    /// In bytes: how much of logs that nobody takes this host keeps.
    pub(super) most_kept: u64,
    /// The supervisor's, once it is known that none lives; held until the directory is gone.
    pub(super) lock: Option<File>,
}

impl Job {
    /// Brings the job to its end, and removes what is left of it.
    pub(super) async fn run(mut self) {
        let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(60));
        let end = loop {
            match self.work().await {
                Ok(end) => break end,
                // A full disk, perhaps. The lease is held meanwhile: heartbeats name it.
                Err(error) => {
                    let wait = backoff.next(random::fraction());
                    tracing::error!(
                        error = &error as &dyn std::error::Error,
                        lease = ?self.lease,
                        ?wait,
                        "failed to work on the job"
                    );
                    self.origin = Origin::Failed;
                    sleep(wait).await;
                }
            }
        };
        match end {
            End::Recorded => tracing::info!(lease = ?self.lease, "the job is recorded"),
            End::GivenUp => tracing::info!(lease = ?self.lease, "the job is given up"),
            End::Quarantined => {
                tracing::warn!(lease = ?self.lease, "the lease was lost: all is in quarantine");
            }
            End::Kept => {}
        }
        latchkey_failpoint::reach("run.wiping");
        self.clear(&end).await;
        let _ = self.events.send(Event::Done(self.lease.clone())).await;
    }

    /// Removes the job's directory, or sets it aside. Where it stays, the next start takes the job
    /// up again.
    async fn clear(&self, end: &End) {
        let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(60));
        for _ in 0..CLEARINGS {
            let (directory, most_kept) = (self.directory.clone(), self.most_kept);
            let clearing = match end {
                End::Recorded | End::GivenUp | End::Quarantined => {
                    tokio::task::spawn_blocking(move || directory.wipe())
                }
                End::Kept => tokio::task::spawn_blocking(move || {
                    let kept = directory.set_aside(most_kept)?;
                    let kept = kept.display();
                    tracing::error!(%kept, "what nobody takes stays on this host");
                    Ok(())
                }),
            };
            let error = match clearing.await {
                Ok(Ok(())) => return,
                Ok(Err(error)) => Error::Directory(error),
                Err(error) => Error::Task(error),
            };
            tracing::error!(
                error = &error as &dyn std::error::Error,
                lease = ?self.lease,
                "failed to clear the job's directory"
            );
            if !self.directory.path().exists() {
                // It has lost its name: the rest is swept later.
                return;
            }
            sleep(backoff.next(1.0)).await;
        }
    }

    async fn work(&mut self) -> Result<End, Error> {
        let link = match (self.directory.stage(), self.origin) {
            (Stage::Accepted, Origin::Offered) => match self.prepare().await? {
                Some(link) => {
                    self.rest.is_over();
                    Some(link)
                }
                None => return Ok(End::GivenUp),
            },
            (Stage::Accepted, Origin::Found) => {
                // It was never asked for `Go`: the control plane learns that it is not held.
                if let Ok(link) = link::attach(self.directory.path()).await {
                    link.dismiss().await;
                }
                return Ok(End::GivenUp);
            }
            (Stage::Accepted, Origin::Failed) => {
                // Another host may do better. Nobody was asked for `Go`, so none can start.
                if let Ok(link) = link::attach(self.directory.path()).await {
                    link.dismiss().await;
                }
                let rest = self.rest.after_a_failure();
                sleep(rest).await;
                return self.never_started().await;
            }
            (Stage::Starting | Stage::Executed | Stage::Ended, _) => None,
        };
        if let Some(shipped) = self.directory.shipped_whole() {
            // Nothing is left but to say so, whatever became of the lease since.
            return self.finish(shipped).await;
        }
        match self.follow(link).await? {
            Followed::Shipped(Some(shipped)) => {
                // A hint only: without it everything is sent again.
                let hint = serde_json::to_vec(&shipped).expect("its fields have a JSON form");
                self.directory.note(job_directory::SHIPPED, &hint)?;
                self.finish(shipped).await
            }
            Followed::Shipped(None) => self.quarantine().await,
            Followed::NeverStarted => self.never_started().await,
        }
    }

    /// Steps 3 and 4. Answers `None` when the lease was lost meanwhile.
    async fn prepare(&mut self) -> Result<Option<Link>, Error> {
        let unpacking = prepare::Unpacking::default();
        let mut started = None;
        let prepared = {
            let Self { shipper, directory, engines, lease, spec, program, told, .. } = self;
            let preparing = async {
                match prepare::fetch(shipper, directory, engines, lease, spec).await? {
                    Fetched::Archive(found) => {
                        // While the archive is unpacked, and not before: it does not wait for ever
                        // for its `Go`, and a download may take any time.
                        started = Some(link::start(program, directory)?);
                        Ok(prepare::unpack(directory, spec, found, &unpacking).await?)
                    }
                    Fetched::Ended(prepared) => Ok(prepared),
                }
            };
            tokio::pin!(preparing);
            loop {
                tokio::select! {
                    prepared = &mut preparing => break prepared,
                    told = told.next() => match told {
                        Told::GiveUp | Told::Revoke => break Ok(Prepared::LeaseLost),
                        Told::Cancel { .. } | Told::ShutDown => {
                            let reason = "canceled before terraform was started".into();
                            break Ok(Prepared::Refused(Failure::Canceled, reason));
                        }
                        Told::Keep | Told::Recorded | Told::Go(_) | Told::NotRenewed => {}
                    },
                }
            }
        };
        drop(unpacking.lock().await);
        match prepared {
            Ok(Prepared::Ready) => {
                let link = self.supervisor(started).await?;
                // Durable before it is said: from now on only the directory knows that
                // terraform did not run.
                latchkey_failpoint::reach("run.prepared");
                self.directory.record("starting", &self.lease)?;
                latchkey_failpoint::reach("run.starting.synced");
                self.say(self.starting()).await;
                Ok(Some(link))
            }
            Ok(Prepared::Refused(kind, reason)) => {
                let link = self.supervisor(started).await?;
                let kind = kind.to_wire().into();
                let refused = v1::JobFailed { reason, kind, exit_code: None };
                link.send(Order::Refuse(refused));
                Ok(Some(link))
            }
            ended @ (Ok(Prepared::LeaseLost) | Err(_)) => {
                if let Some(started) = started {
                    started.attach(self.directory.path()).await?.dismiss().await;
                }
                ended.map(|_| None)
            }
        }
    }

    /// Attaches to the supervisor that was started, or starts one.
    async fn supervisor(&self, started: Option<Started>) -> Result<Link, Error> {
        let started = match started {
            Some(started) => started,
            None => link::start(&self.program, &self.directory)?,
        };
        Ok(started.attach(self.directory.path()).await?)
    }

    async fn never_started(&mut self) -> Result<End, Error> {
        let lease = Some(self.lease.to_wire());
        self.leave_with(Frame::NeverStarted(v1::NeverStarted { lease })).await
    }

    /// Says that the job leaves without a result, until that was heard, however long that takes.
    async fn leave_with(&mut self, frame: Frame) -> Result<End, Error> {
        let had_asked = self.had_asked();
        if had_asked {
            // It answers nothing of this.
            self.told.forget();
        }
        self.say(frame.clone()).await;
        loop {
            match self.told.next().await {
                // The connection may have taken it along.
                Told::Keep => self.say(frame.clone()).await,
                Told::GiveUp if had_asked => self.say(frame.clone()).await,
                Told::GiveUp | Told::Revoke | Told::Recorded | Told::NotRenewed => {
                    return Ok(End::GivenUp);
                }
                Told::Go(_) | Told::Cancel { .. } | Told::ShutDown => {}
            }
        }
    }

    /// Step 6.
    async fn finish(&mut self, shipped: Shipped) -> Result<End, Error> {
        let result = match shipped.instead {
            Some(instead) => instead,
            None => self.directory.result()?,
        };
        let executed = self.has_executed();
        if let JobResult::Failed { kind, reason, .. } = &result {
            if *kind == Failure::Canceled && !executed {
                return self.never_started().await;
            }
            if !self.had_asked() {
                let (lease, reason) = (Some(self.lease.to_wire()), reason.clone());
                return self.leave_with(Frame::Decline(v1::Decline { lease, reason })).await;
            }
        }
        let finished = Frame::Finished(result.finished(&self.lease, shipped.log_length));
        latchkey_failpoint::reach("run.finished.sending");
        self.say(finished.clone()).await;
        latchkey_failpoint::reach("run.finished.sent");
        loop {
            match (self.told.next().await, shipped.remains) {
                (Told::Recorded, Remains::Nothing) => return Ok(End::Recorded),
                (Told::Recorded, Remains::State) => return Ok(End::Kept),
                (Told::Revoke, _) => return self.quarantine().await,
                // A given up lease may be one whose end was recorded: the answer was lost.
                (Told::Keep | Told::GiveUp, _) => self.say(finished.clone()).await,
                (
                    Told::Go(_) | Told::Cancel { .. } | Told::NotRenewed | Told::ShutDown,
                    Remains::Nothing | Remains::State,
                ) => {}
            }
        }
    }

    /// Brings what a lost lease left, beside the run.
    async fn quarantine(&mut self) -> Result<End, Error> {
        if !self.has_executed() {
            return if self.had_asked() { self.never_started().await } else { Ok(End::GivenUp) };
        }
        Ok(match self.shipper.quarantine().await? {
            ship::Quarantined::Whole => End::Quarantined,
            // A plan can be repeated: nothing of it is worth a person's time.
            ship::Quarantined::Refused if self.lease.phase == Phase::Plan => End::GivenUp,
            ship::Quarantined::Refused => End::Kept,
        })
    }

    /// Says whether the control plane may have been asked for `Go`.
    fn had_asked(&self) -> bool {
        self.directory.join("starting").exists()
    }

    fn has_executed(&self) -> bool {
        self.directory.join("exec").exists()
    }

    fn starting(&self) -> Frame {
        Frame::Starting(v1::Starting { lease: Some(self.lease.to_wire()) })
    }

    async fn say(&self, frame: Frame) {
        // The agent is gone only when all of this ends.
        let _ = self.events.send(Event::Send(Box::new(frame))).await;
    }
}
