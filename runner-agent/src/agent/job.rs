//! One job from the agent's side, over any number of connections and restarts.
//!
//! ```text
//! accepted ─prepared─► starting ─Go─► executing ─► ended ─shipped─► Finished ─Recorded─► wiped
//!     │                    │              │          │                 │
//!     │                    │              └ given up ┴───── revoked ───┴► quarantine ──► wiped
//!     ├─ refused ──────────┼─ ended, shipped ─► Decline ─────────────► wiped   or set aside
//!     └─ canceled ─────────┴─ ended, shipped, or lost ─► NeverStarted ► wiped
//! ```
//!
//! A job whose lease is given up when terraform may have run goes on to its end: a plan is asked
//! to stop, an apply is not. What it has then goes to quarantine under its old lease. That a lease
//! is lost, only the lease stream says: an answer to an upload alone is not believed.
//!
//! A result is `Finished` only for a job that was given its `Go`: before that, a job that cannot
//! be prepared is declined with the reason, and one that was canceled is handed back. Neither is
//! acknowledged by a frame of its own; the next heartbeat that is answered without the lease, or
//! `Revoke`, says that it was heard.
//!
//! That terraform was never started is said only while the supervisor's lock is held: then none
//! lives that could still start it. A supervisor that cannot be reached but holds its lock is
//! tried again for as long as that takes; a dead one behind `exec` is replaced, as often as it
//! takes. What fails on this host is tried again too: a task ends only with its job.
//!
//! The task keeps what it waits for and says it again after every `Welcome`; the job directory
//! tells a restarted agent where to go on.

use std::fs::File;
use std::sync::Arc;

use latchkey_proto::v1;
use latchkey_proto::v1::lease_request::Frame;
use tokio::sync::{mpsc, watch};
use tokio::time::{Duration, Instant, sleep_until};

use super::link::{self, Link};
use super::prepare::{self, Prepared};
use super::told::{Event, Inbox, Rest, Told};
use crate::Program;
use crate::backoff::Backoff;
use crate::engine::Engines;
use crate::job::{Failure, JobResult, Lease, Phase, Spec};
use crate::job_directory::{self, JobDirectory, Stage};
use crate::random;
use crate::ship::{self, Remains, Shipped, Shipper};
use crate::supervisor::control::{self, Order, Status};
use crate::supervisor::orphans;

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

/// How long a plan that nobody wants may take to stop.
const GRACE_OF_A_PLAN: Duration = Duration::from_secs(30);

const SHUTTING_DOWN: &str = "canceled: the runner is shutting down";

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
    pub(super) told: Inbox,
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
                    self.told.pause(wait).await;
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
        let cleared = match end {
            End::Recorded | End::GivenUp | End::Quarantined => self.directory.wipe(),
            End::Kept => self.directory.set_aside(self.most_kept).map(|kept| {
                let kept = kept.display();
                tracing::error!(lease = ?self.lease, %kept, "what nobody takes stays on this host");
            }),
        };
        if let Err(error) = cleared {
            let error = &error as &dyn std::error::Error;
            tracing::error!(error, "failed to clear the job's directory");
        }
        let _ = self.events.send(Event::Done(self.lease.clone())).await;
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
                    dismiss(link).await;
                }
                return Ok(End::GivenUp);
            }
            (Stage::Accepted, Origin::Failed) => {
                // Another host may do better. Nobody was asked for `Go`, so none can start.
                if let Ok(link) = link::attach(self.directory.path()).await {
                    dismiss(link).await;
                }
                let rest = self.rest.after_a_failure();
                self.told.pause(rest).await;
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
            Followed::GivenUp => Ok(End::GivenUp),
        }
    }

    /// Steps 3 and 4. Answers `None` when the lease was lost meanwhile.
    async fn prepare(&mut self) -> Result<Option<Link>, Error> {
        // It starts while the archive is fetched.
        let started = link::start(&self.program, &self.directory)?;
        let unpacking = prepare::Unpacking::default();
        let prepared = {
            let preparing = prepare::prepare(
                &self.shipper,
                &self.directory,
                &self.engines,
                (&self.lease, &self.spec),
                &unpacking,
            );
            tokio::pin!(preparing);
            loop {
                tokio::select! {
                    prepared = &mut preparing => break prepared,
                    told = self.told.next() => match told {
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
        let link = started.attach(self.directory.path()).await?;
        match prepared? {
            Prepared::Ready => {
                // Durable before it is said: from now on only the directory knows that
                // terraform did not run.
                latchkey_failpoint::reach("run.prepared");
                self.directory.record("starting", &self.lease)?;
                latchkey_failpoint::reach("run.starting.synced");
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
        if let Some(link) = &link {
            publish(&status_to, *link.status.borrow());
        }
        let shipper = self.shipper.clone();
        let shipping = shipper.ship_all(status);
        tokio::pin!(shipping);
        // Said by `prepare`.
        let mut asked = link.is_some() && self.asks(*status_to.borrow()).is_some();
        // For a job found on disk, it is said with the first `Keep`.
        let mut says_at_once = self.origin != Origin::Found;
        let mut given_up = false;
        // What a supervisor is told again when it was replaced.
        let mut stopping = false;
        let mut force_at = None;
        loop {
            if link.is_none() && status_to.borrow().stage() != control::Stage::Ended {
                let reached = tokio::select! {
                    shipped = &mut shipping => return Ok(Followed::Shipped(shipped?)),
                    reached = self.reach() => reached,
                };
                match reached {
                    Reached::Attached(attached) => {
                        let now = *attached.status.borrow();
                        publish(&status_to, now);
                        if stopping {
                            attached.send(Order::Cancel(false)).await;
                        }
                        link = Some(attached);
                        // What was answered meanwhile may not have reached the supervisor.
                        let ask = self.asks(now);
                        asked = ask.is_some();
                        if let (Some(ask), true) = (ask, says_at_once) {
                            self.say(ask).await;
                        }
                    }
                    Reached::Ended => publish(&status_to, self.on_disk()?),
                    Reached::Nobody if given_up => return Ok(Followed::GivenUp),
                    Reached::Nobody => return Ok(Followed::NeverStarted),
                }
                says_at_once = true;
            }
            tokio::select! {
                shipped = &mut shipping => return Ok(Followed::Shipped(shipped?)),
                changed = next_status(&mut link) => {
                    let Some(status) = changed else {
                        link = None;
                        continue;
                    };
                    publish(&status_to, status);
                    let executing = status.stage() == control::Stage::Executing;
                    let is_plan = self.lease.phase == Phase::Plan;
                    if given_up && executing && is_plan && !stopping {
                        stopping = true;
                        force_at = Some(Instant::now() + GRACE_OF_A_PLAN);
                        if let Some(link) = &link {
                            link.send(Order::Cancel(false)).await;
                        }
                    }
                    let ask = self.asks(status);
                    let newly = ask.is_some() && !asked;
                    asked = ask.is_some();
                    if let (Some(ask), true) = (ask, newly) {
                        self.say(ask).await;
                    }
                }
                () = at(force_at) => {
                    force_at = None;
                    if let Some(link) = &link {
                        link.send(Order::Cancel(true)).await;
                    }
                }
                told = self.told.next() => {
                    let status = *status_to.borrow();
                    latchkey_failpoint::reach("run.told");
                    let executing = status.stage() >= control::Stage::Executing;
                    let is_plan = self.lease.phase == Phase::Plan;
                    let orders = match told {
                        Told::Keep => {
                            self.shipper.lease_stands();
                            if let Some(ask) = self.asks(status) {
                                self.say(ask).await;
                            }
                            vec![]
                        }
                        Told::Go(go) => vec![Order::Go(go)],
                        Told::Cancel { force } => {
                            stopping = true;
                            vec![Order::Cancel(force)]
                        }
                        Told::ShutDown if stopping => vec![],
                        Told::ShutDown if status.stage() == control::Stage::Waiting => {
                            stopping = true;
                            vec![Order::Cancel(false)]
                        }
                        Told::ShutDown => {
                            stopping = true;
                            vec![Order::Note(SHUTTING_DOWN.into()), Order::Cancel(false)]
                        }
                        // An apply goes on; a plan changes nothing that would be missed. Secrets
                        // that a replacement waits for do not come any more.
                        Told::GiveUp | Told::Revoke if executing => {
                            self.shipper.lease_is_lost();
                            let withdrawn = matches!(told, Told::Revoke);
                            let mut orders = vec![];
                            if withdrawn {
                                orders.push(Order::Withdraw(true));
                            }
                            if status.wants_secrets {
                                orders.push(Order::GiveUp(true));
                            }
                            if is_plan && !stopping {
                                stopping = true;
                                force_at = Some(Instant::now() + GRACE_OF_A_PLAN);
                                orders.push(Order::Cancel(false));
                            }
                            orders
                        }
                        // The supervisor leaves, unless it is executing by now; its end, or its
                        // next status, tells which.
                        Told::GiveUp => {
                            given_up = true;
                            self.shipper.lease_is_lost();
                            vec![Order::GiveUp(true)]
                        }
                        Told::Revoke => {
                            given_up = true;
                            self.shipper.lease_is_lost();
                            vec![Order::GiveUp(true), Order::Withdraw(true)]
                        }
                        Told::NotRenewed => {
                            self.shipper.lease_is_in_doubt();
                            vec![]
                        }
                        Told::Recorded => vec![],
                    };
                    if let Some(link) = &link {
                        for order in orders {
                            link.send(order).await;
                        }
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

    /// Attaches to the job's supervisor, or to a new one in place of a dead one, for as long as
    /// that takes. Safe to abandon.
    async fn reach(&mut self) -> Reached {
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(10));
        loop {
            match self.try_to_reach().await {
                Ok(Some(reached)) => return reached,
                Ok(None) => {}
                Err(error) => tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    lease = ?self.lease,
                    "failed to reach the supervisor"
                ),
            }
            self.told.pause(backoff.next(random::fraction())).await;
        }
    }

    /// Answers `None` while a supervisor may live that does not answer.
    async fn try_to_reach(&mut self) -> Result<Option<Reached>, Error> {
        match link::attach(self.directory.path()).await {
            Ok(link) => return Ok(Some(Reached::Attached(link))),
            Err(error @ link::Error::Protocol(_)) => return Err(error.into()),
            // Dead, perhaps: its lock tells.
            Err(
                link::Error::Start(_)
                | link::Error::Attach(_)
                | link::Error::Directory(_)
                | link::Error::Silent,
            ) => {}
        }
        if self.directory.stage() == Stage::Ended {
            return Ok(Some(Reached::Ended));
        }
        let Some(lock) = self.directory.claim()? else { return Ok(None) };
        // Read again: with the lock held nobody changes it.
        Ok(Some(match self.directory.stage() {
            Stage::Ended => Reached::Ended,
            Stage::Executed => {
                drop(lock);
                tracing::warn!(lease = ?self.lease, "the supervisor is gone; it is replaced");
                let started = link::start(&self.program, &self.directory)?;
                Reached::Attached(started.attach(self.directory.path()).await?)
            }
            Stage::Accepted | Stage::Starting => {
                // What reads only, and hooks: nothing of it may meet the next attempt.
                let ended = orphans::end_all_of(&self.directory);
                if !ended.is_empty() {
                    tracing::warn!(lease = ?self.lease, ?ended, "a dead supervisor left processes");
                }
                self.lock = Some(lock);
                Reached::Nobody
            }
        }))
    }

    async fn never_started(&mut self) -> Result<End, Error> {
        let lease = Some(self.lease.to_wire());
        self.leave_with(Frame::NeverStarted(v1::NeverStarted { lease })).await
    }

    /// Says that the job leaves without a result, until that was heard, however long that takes.
    async fn leave_with(&mut self, frame: Frame) -> Result<End, Error> {
        self.say(frame.clone()).await;
        loop {
            match self.told.next().await {
                Told::Keep => self.say(frame.clone()).await,
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
            if !self.directory.join("starting").exists() {
                let (lease, reason) = (Some(self.lease.to_wire()), reason.clone());
                return self.leave_with(Frame::Decline(v1::Decline { lease, reason })).await;
            }
        }
        let finished = Frame::Finished(self.finished(&result, shipped.log_length));
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
            return Ok(End::GivenUp);
        }
        let log = std::fs::metadata(self.directory.join("log")).map_or(0, |log| log.len());
        let finished = self.finished(&self.directory.result()?, log);
        Ok(match self.shipper.quarantine(&finished).await? {
            ship::Quarantined::Whole => End::Quarantined,
            // A plan can be repeated: nothing of it is worth a person's time.
            ship::Quarantined::Refused if self.lease.phase == Phase::Plan => End::GivenUp,
            ship::Quarantined::Refused => End::Kept,
        })
    }

    fn has_executed(&self) -> bool {
        self.directory.join("exec").exists()
    }

    fn finished(&self, result: &JobResult, log_length: u64) -> v1::Finished {
        v1::Finished {
            lease: Some(self.lease.to_wire()),
            log_length,
            result: Some(result.to_wire()),
        }
    }

    fn starting(&self) -> Frame {
        Frame::Starting(v1::Starting { lease: Some(self.lease.to_wire()) })
    }

    async fn say(&self, frame: Frame) {
        // The agent is gone only when all of this ends.
        let _ = self.events.send(Event::Send(Box::new(frame))).await;
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

/// Who answers for the job on this host.
enum Reached {
    Attached(Link),
    /// The result is on disk.
    Ended,
    /// No supervisor lives, none can start, and terraform did not run.
    Nobody,
}

enum Followed {
    /// `None`: it has ended, and the lease is lost.
    Shipped(Option<Shipped>),
    NeverStarted,
    GivenUp,
}

/// Tells the shipper. What is durable stays so, whatever a new supervisor knows of it yet.
fn publish(to: &watch::Sender<Status>, status: Status) {
    to.send_modify(|known| {
        *known = Status {
            states: status.states.max(known.states),
            log_length: status.log_length.max(known.log_length),
            ..status
        };
    });
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

async fn at(moment: Option<Instant>) {
    match moment {
        Some(moment) => sleep_until(moment).await,
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
