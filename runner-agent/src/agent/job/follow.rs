//! The supervisor of a job: followed while all it makes is shipped, and replaced when it dies.
//!
//! That terraform was never started is answered only while the supervisor's lock is held: then
//! none lives that could still start it. A supervisor that cannot be reached but holds its lock
//! is tried again for as long as that takes; a dead one behind `exec` is replaced, as often as it
//! takes.
//!
//! What a supervisor is to do is said to each that is attached: to the last one it may never have
//! come.

use latchkey_proto::v1;
use latchkey_proto::v1::lease_request::Frame;
use tokio::sync::watch;
use tokio::time::{Duration, Instant, sleep, sleep_until};

use super::{Error, Job, Origin};
use crate::agent::link::{self, Link};
use crate::agent::told::Told;
use crate::backoff::Backoff;
use crate::job::Phase;
use crate::job_directory::Stage;
use crate::random;
use crate::ship::Shipped;
use crate::supervisor::control::{self, Order, Status};
use crate::supervisor::orphans;

/// How long a plan that nobody wants may take to stop.
const GRACE_OF_A_PLAN: Duration = Duration::from_secs(30);

const SHUTTING_DOWN: &str = "canceled: the runner is shutting down";

pub(super) enum Followed {
    /// `None`: it has ended, and the lease is lost.
    Shipped(Option<Shipped>),
    NeverStarted,
}

/// Who answers for the job on this host.
enum Reached {
    Attached(Link),
    /// The result is on disk.
    Ended,
    /// No supervisor lives, none can start, and terraform did not run.
    Nobody,
}

/// What a supervisor is to do, whichever it is. Nothing of it is taken back.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Wanted {
    stop: Stop,
    /// The lease is lost: only what may have changed something goes on, without new secrets.
    given_up: bool,
    /// No more credentials are given out.
    withdrawn: bool,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Stop {
    #[default]
    No,
    Gracefully,
    ByForce,
}

impl Wanted {
    fn stop(&mut self, how: Stop) {
        self.stop = self.stop.max(how);
    }

    /// Each may be said again.
    fn say_to(self, link: &Link) {
        if self.given_up {
            link.send(Order::GiveUp(true));
        }
        if self.withdrawn {
            link.send(Order::Withdraw(true));
        }
        match self.stop {
            Stop::No => {}
            Stop::Gracefully => link.send(Order::Cancel(false)),
            Stop::ByForce => link.send(Order::Cancel(true)),
        }
    }
}

impl Job {
    /// Follows the supervisor while everything is shipped; replaces it when it dies.
    pub(super) async fn follow(&mut self, link: Option<Link>) -> Result<Followed, Error> {
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
        let mut wanted = Wanted::default();
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
                        wanted.say_to(&attached);
                        link = Some(attached);
                        // What was answered meanwhile may not have reached the supervisor.
                        let ask = self.asks(now);
                        asked = ask.is_some();
                        if let (Some(ask), true) = (ask, says_at_once) {
                            self.say(ask).await;
                        }
                    }
                    Reached::Ended => publish(&status_to, self.on_disk()?),
                    Reached::Nobody => return Ok(Followed::NeverStarted),
                }
                says_at_once = true;
            }
            let before = wanted;
            tokio::select! {
                shipped = &mut shipping => return Ok(Followed::Shipped(shipped?)),
                changed = next_status(&mut link) => {
                    let Some(status) = changed else {
                        link = None;
                        continue;
                    };
                    publish(&status_to, status);
                    let ask = self.asks(status);
                    let newly = ask.is_some() && !asked;
                    asked = ask.is_some();
                    if let (Some(ask), true) = (ask, newly) {
                        self.say(ask).await;
                    }
                }
                () = at(force_at) => {
                    force_at = None;
                    wanted.stop(Stop::ByForce);
                }
                told = self.told.next() => {
                    let status = *status_to.borrow();
                    latchkey_failpoint::reach("run.told");
                    match told {
                        Told::Keep => {
                            self.shipper.lease_stands();
                            if let Some(ask) = self.asks(status) {
                                self.say(ask).await;
                            }
                        }
                        Told::Go(go) => {
                            if let Some(link) = &link {
                                link.send(Order::Go(*go));
                            }
                        }
                        Told::Cancel { force: false } => wanted.stop(Stop::Gracefully),
                        Told::Cancel { force: true } => wanted.stop(Stop::ByForce),
                        Told::ShutDown => {
                            let is_news = wanted.stop == Stop::No;
                            if let (Some(link), true) = (&link, is_news) {
                                // One that waits has no log yet, and drops it.
                                link.send(Order::Note(SHUTTING_DOWN.into()));
                            }
                            wanted.stop(Stop::Gracefully);
                        }
                        // The supervisor leaves, unless it is executing by now; its end, or its
                        // next status, tells which. Secrets that a replacement waits for do not
                        // come any more.
                        Told::GiveUp => {
                            self.shipper.lease_is_lost();
                            wanted.given_up = true;
                        }
                        Told::Revoke => {
                            self.shipper.lease_is_lost();
                            (wanted.given_up, wanted.withdrawn) = (true, true);
                        }
                        Told::NotRenewed => self.shipper.lease_is_in_doubt(),
                        Told::Recorded => {}
                    }
                }
            }
            // An apply goes on; a plan changes nothing that would be missed.
            let executing = status_to.borrow().stage() == control::Stage::Executing;
            let is_plan = self.lease.phase == Phase::Plan;
            if wanted.given_up && executing && is_plan && wanted.stop == Stop::No {
                wanted.stop(Stop::Gracefully);
                force_at = Some(Instant::now() + GRACE_OF_A_PLAN);
            }
            if let (Some(link), true) = (&link, wanted != before) {
                wanted.say_to(link);
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
            sleep(backoff.next(random::fraction())).await;
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
                let of = self.directory.clone();
                let ending = tokio::task::spawn_blocking(move || orphans::end_all_of(&of));
                let ended = ending.await.map_err(Error::Task)?;
                if !ended.is_empty() {
                    tracing::warn!(lease = ?self.lease, ?ended, "a dead supervisor left processes");
                }
                self.lock = Some(lock);
                Reached::Nobody
            }
        }))
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
