//! Who is connected, what is open, and who gets it: one actor and its handle.
//!
//! The actor owns open jobs by pool, connected runners with their idle slots, and the deadline
//! of every lease. It decides nothing for good: a grant is a commit in the store, which another
//! control plane may win, and an expiry is an event that the domain judges. So all it owns may
//! be lost and is rebuilt from the store at a start.
//!
//! Deadlines are of the monotonic clock. A lease found at a start gets a full term.

mod actor;
mod place;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use latchkey_domain::id::{Epoch, Generation, JobId, PoolId, RunnerId};
use latchkey_domain::time::Timestamp;
use tokio::sync::{mpsc, oneshot};

use crate::auth::RunnerIdentity;
use crate::error::Result;
use crate::job::{JobSpec, LeaseRef};
use crate::store::{BoxFuture, Version};

pub use self::actor::ConnectionId;
pub use self::place::{Abilities, Engine, Place, Waiting, Wanted};

/// What dispatch asks of the use cases: to decide for good.
pub trait Leases: Send + Sync + 'static {
    /// Grants an open job to a runner. `None` when somebody else was faster or the job is not
    /// open any more.
    fn grant(
        self: Arc<Self>,
        job: JobId,
        runner: RunnerId,
    ) -> BoxFuture<'static, Result<Option<(LeaseRef, JobSpec)>>>;

    /// Ends a lease whose runner was silent for a whole term.
    fn expire(self: Arc<Self>, job: JobId, epoch: Epoch) -> BoxFuture<'static, Result<()>>;

    /// Lists a job again, if it is still open.
    fn offer_if_open(self: Arc<Self>, job: JobId) -> BoxFuture<'static, Result<()>>;

    /// Records for people that two programs fight over one runner's identity.
    fn two_of_one(self: Arc<Self>, runner: RunnerId) -> BoxFuture<'static, Result<()>>;

    fn generation(&self) -> Generation;

    fn now(&self) -> Timestamp;
}

/// How many messages may wait for the actor before senders wait too.
const QUEUE: usize = 1024;

/// How many frames may wait for one runner. A runner that does not read is disconnected.
pub const RUNNER_QUEUE: usize = 64;

/// How a running phase is ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// terraform finishes what it is doing.
    Gracefully,
    /// It and all that it started is killed.
    ByForce,
}

/// Whether it was decided what an expired lease leaves.
#[derive(Clone, Copy, Debug)]
enum Expiry {
    Settled,
    /// The store did not answer.
    Undecided,
}

/// What a runner's stream is told to send.
#[derive(Debug)]
pub enum ToRunner {
    Offer {
        lease: LeaseRef,
        spec: Box<JobSpec>,
    },
    Cancel {
        lease: LeaseRef,
        stop: Stop,
    },
    Revoke {
        lease: LeaseRef,
        reason: String,
    },
    /// The phase has other credentials: they are fetched for whoever holds the lease.
    Renew {
        lease: LeaseRef,
    },
    /// Finish what runs, take nothing new.
    Drain,
    /// A drain was taken back.
    Resume,
    /// Another stream of the same runner took over.
    Superseded,
}

/// A runner as this process sees it.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    pub connected: bool,
    /// It takes nothing new by its own word; known while it is connected.
    pub draining: bool,
    pub last_seen: Option<Timestamp>,
    pub held: Vec<(JobId, Epoch)>,
}

/// Whether an owner lets a runner have jobs, as of a version of its record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Standing {
    pub drained: bool,
    pub version: Version,
}

/// What a runner says of itself when it connects, and what is known of it.
#[derive(Clone, Debug)]
pub struct Introduction {
    pub abilities: Abilities,
    /// Leases that were kept.
    pub held: Vec<LeaseRef>,
    pub standing: Standing,
    /// It takes nothing new.
    pub draining: bool,
}

enum Message {
    Open {
        job: JobId,
        place: Place,
        epoch: Epoch,
    },
    Withdraw {
        job: JobId,
    },
    Cancel {
        job: JobId,
        epoch: Epoch,
        stop: Stop,
    },
    Revoke {
        job: JobId,
        epoch: Epoch,
        reason: String,
    },
    Renew {
        job: JobId,
        epoch: Epoch,
    },
    Connect {
        runner: RunnerIdentity,
        introduction: Introduction,
        frames: mpsc::Sender<ToRunner>,
        reply: oneshot::Sender<ConnectionId>,
    },
    Disconnect {
        runner: RunnerId,
        connection: ConnectionId,
    },
    Heartbeat {
        runner: RunnerId,
        held: Vec<LeaseRef>,
        reply: oneshot::Sender<Vec<LeaseRef>>,
    },
    Released {
        job: JobId,
        epoch: Epoch,
    },
    LostBy {
        runner: RunnerId,
        job: JobId,
        epoch: Epoch,
    },
    Rest {
        runner: RunnerId,
    },
    WatchUnknown {
        job: JobId,
        epoch: Epoch,
        runner: RunnerId,
    },
    Watch {
        job: JobId,
        epoch: Epoch,
        runner: RunnerId,
    },
    Granted {
        job: JobId,
        pool: PoolId,
        runner: RunnerId,
        lease: Option<(LeaseRef, Box<JobSpec>)>,
    },
    Expired {
        job: JobId,
        epoch: Epoch,
        expiry: Expiry,
    },
    Standing {
        runner: RunnerId,
        standing: Standing,
    },
    Draining {
        runner: RunnerId,
        connection: ConnectionId,
    },
    Expel {
        runner: RunnerId,
    },
    Watched {
        reply: oneshot::Sender<Vec<(JobId, Epoch, RunnerId)>>,
    },
    See {
        runners: Vec<RunnerId>,
        reply: oneshot::Sender<HashMap<RunnerId, Seen>>,
    },
    WhyWaiting {
        place: Place,
        reply: oneshot::Sender<Waiting>,
    },
}

/// The cheap end that everyone else holds.
#[derive(Clone)]
pub struct Handle {
    messages: mpsc::Sender<Message>,
}

impl std::fmt::Debug for Handle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("dispatch::Handle")
    }
}

/// The end that becomes the actor once the use cases exist.
#[derive(Debug)]
pub struct Inbox {
    messages: mpsc::Receiver<Message>,
    own: mpsc::Sender<Message>,
}

impl std::fmt::Debug for Message {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("dispatch::Message")
    }
}

pub fn channel() -> (Handle, Inbox) {
    let (sender, messages) = mpsc::channel(QUEUE);
    (Handle { messages: sender.clone() }, Inbox { messages, own: sender })
}

impl Inbox {
    /// Runs the actor until the process ends. `term` is the life of a lease without a heartbeat.
    pub async fn run(self, leases: Arc<dyn Leases>, term: Duration) {
        actor::Actor::new(leases, self.own, term).run(self.messages).await;
    }
}

impl Handle {
    /// Queues without holding up the caller, who has committed and must not wait for others.
    fn send(&self, message: Message) {
        if let Err(mpsc::error::TrySendError::Full(message)) = self.messages.try_send(message) {
            let messages = self.messages.clone();
            tokio::spawn(async move {
                let _ = messages.send(message).await;
            });
        }
    }

    /// Lists a job that nobody holds. `epoch` is that of its last lease, so that a message that
    /// a newer grant has overtaken is told from one that follows it.
    pub fn open(&self, job: JobId, place: Place, epoch: Epoch) {
        self.send(Message::Open { job, place, epoch });
    }

    pub fn withdraw(&self, job: JobId) {
        self.send(Message::Withdraw { job });
    }

    /// Has the holder of a lease end terraform.
    pub fn cancel(&self, job: JobId, epoch: Epoch, stop: Stop) {
        self.send(Message::Cancel { job, epoch, stop });
    }

    pub fn revoke(&self, job: JobId, epoch: Epoch, reason: &str) {
        self.send(Message::Revoke { job, epoch, reason: reason.to_owned() });
    }

    /// Has the holder of a lease, if it is connected, given the phase's credentials once more.
    pub fn renew(&self, job: JobId, epoch: Epoch) {
        self.send(Message::Renew { job, epoch });
    }

    /// Frees the slot of a job that has ended or was given back.
    pub fn released(&self, job: JobId, epoch: Epoch) {
        self.send(Message::Released { job, epoch });
    }

    /// As [`Handle::released`], on the word of a runner: it speaks for its own leases only.
    pub fn lost_by(&self, runner: RunnerId, job: JobId, epoch: Epoch) {
        self.send(Message::LostBy { runner, job, epoch });
    }

    /// Spares a runner that gave a job back a moment: the next offer would likely come back too.
    pub fn rest(&self, runner: RunnerId) {
        self.send(Message::Rest { runner });
    }

    /// Gives a lease a full term from now, unless it is watched already.
    pub fn watch_unknown(&self, job: JobId, epoch: Epoch, runner: RunnerId) {
        self.send(Message::WatchUnknown { job, epoch, runner });
    }

    /// Gives a lease that the store knows a full term from now.
    pub fn watch(&self, job: JobId, epoch: Epoch, runner: RunnerId) {
        self.send(Message::Watch { job, epoch, runner });
    }

    /// Registers a runner's stream; an earlier stream of the same runner is ended.
    pub async fn connect(
        &self,
        runner: RunnerIdentity,
        introduction: Introduction,
        frames: mpsc::Sender<ToRunner>,
    ) -> Option<ConnectionId> {
        let (reply, answer) = oneshot::channel();
        let message = Message::Connect { runner, introduction, frames, reply };
        self.messages.send(message).await.ok()?;
        answer.await.ok()
    }

    pub fn disconnect(&self, runner: RunnerId, connection: ConnectionId) {
        self.send(Message::Disconnect { runner, connection });
    }

    /// Renews leases and answers those that are renewed.
    pub async fn heartbeat(&self, runner: RunnerId, held: Vec<LeaseRef>) -> Vec<LeaseRef> {
        let (reply, answer) = oneshot::channel();
        if self.messages.send(Message::Heartbeat { runner, held, reply }).await.is_err() {
            return vec![];
        }
        answer.await.unwrap_or_default()
    }

    /// Tells whether a runner may have jobs. The newest version counts, whatever comes last.
    pub fn stand(&self, runner: RunnerId, standing: Standing) {
        self.send(Message::Standing { runner, standing });
    }

    /// Offers nothing more over this stream: the runner takes nothing new.
    pub fn draining(&self, runner: RunnerId, connection: ConnectionId) {
        self.send(Message::Draining { runner, connection });
    }

    /// Forgets the stream of a runner whose identity has ended.
    pub fn expel(&self, runner: RunnerId) {
        self.send(Message::Expel { runner });
    }

    /// Lists every lease that is watched.
    pub async fn watched(&self) -> Vec<(JobId, Epoch, RunnerId)> {
        let (reply, answer) = oneshot::channel();
        if self.messages.send(Message::Watched { reply }).await.is_err() {
            return vec![];
        }
        answer.await.unwrap_or_default()
    }

    /// Answers what this process knows of runners.
    pub async fn see(&self, runners: Vec<RunnerId>) -> HashMap<RunnerId, Seen> {
        let (reply, answer) = oneshot::channel();
        if self.messages.send(Message::See { runners, reply }).await.is_err() {
            return HashMap::new();
        }
        answer.await.unwrap_or_default()
    }

    /// Says why a job that is open here has no runner. `None` while the process stops.
    pub async fn why_waiting(&self, place: Place) -> Option<Waiting> {
        let (reply, answer) = oneshot::channel();
        self.messages.send(Message::WhyWaiting { place, reply }).await.ok()?;
        answer.await.ok()
    }
}
