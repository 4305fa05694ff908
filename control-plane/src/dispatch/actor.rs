//! The actor: one task that owns all of dispatch's state.
//!
//! Nothing here grows with runners times jobs: who is idle, and how much, is kept up to date as
//! jobs come and go, and open jobs with the same demands stand in one line, of which only the
//! oldest is ever tried.
//!
//! Leases and their terms are here; who is connected is in [`connections`], who gets what in
//! [`matching`].

mod connections;
mod matching;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use latchkey_domain::id::{Epoch, JobId, PoolId, RunnerId};
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::{Abilities, Expiry, Leases, Message, Place, Standing, ToRunner};
use crate::job::LeaseRef;

/// How long a runner that gave a job back is offered nothing.
const REST: Duration = Duration::from_secs(5);

/// Tells one stream of a runner from the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConnectionId(u64);

pub(super) struct Actor {
    decider: Arc<dyn Leases>,
    /// For the answers of tasks that the actor starts.
    own: mpsc::Sender<Message>,
    term: Duration,
    pools: HashMap<PoolId, Pool>,
    /// Where each open job is listed.
    place_of: HashMap<JobId, Arc<Place>>,
    runners: HashMap<RunnerId, Connection>,
    /// What outlives a connection.
    known: HashMap<RunnerId, Known>,
    leases: HashMap<JobId, Watched>,
    /// Jobs whose grant is being committed.
    granting: HashMap<JobId, Granting>,
    /// Runners that rest, to be looked at by the next tick.
    resting: Vec<RunnerId>,
    connections: u64,
}

/// The jobs and the idle runners of a pool.
#[derive(Default)]
struct Pool {
    /// Jobs that wait, by what they demand; job ids sort by the age of their run.
    open: BTreeMap<Arc<Place>, BTreeSet<JobId>>,
    /// Runners that may have another job, by how many; the last is the idlest.
    idle: BTreeSet<(u32, Reverse<RunnerId>)>,
}

struct Connection {
    id: ConnectionId,
    pool: PoolId,
    abilities: Abilities,
    frames: mpsc::Sender<ToRunner>,
    last_seen: latchkey_domain::time::Timestamp,
    standing: Standing,
    draining: bool,
    /// Set when it gave a job back: it is offered nothing until then.
    rests_until: Option<Instant>,
    /// With how many free slots it stands among its pool's idle.
    listed: Option<u32>,
}

/// What is known of a runner whether or not it is connected.
#[derive(Default)]
struct Known {
    /// Jobs that it holds or is being granted.
    taken: BTreeSet<JobId>,
    last_seen: Option<latchkey_domain::time::Timestamp>,
    /// When one of its streams ended another, within a minute.
    takeovers: VecDeque<Instant>,
    alarmed: Option<Instant>,
}

/// A grant that is being committed.
struct Granting {
    runner: RunnerId,
    /// The job was said to be open meanwhile, as of this epoch.
    reopened: Option<(Place, Epoch)>,
}

/// A lease and when it ends without a heartbeat.
struct Watched {
    epoch: Epoch,
    runner: RunnerId,
    deadline: Instant,
}

impl Actor {
    pub(super) fn new(
        decider: Arc<dyn Leases>,
        own: mpsc::Sender<Message>,
        term: Duration,
    ) -> Self {
        Self {
            decider,
            own,
            term,
            pools: HashMap::new(),
            place_of: HashMap::new(),
            runners: HashMap::new(),
            known: HashMap::new(),
            leases: HashMap::new(),
            granting: HashMap::new(),
            resting: vec![],
            connections: 0,
        }
    }

    pub(super) async fn run(mut self, mut messages: mpsc::Receiver<Message>) {
        let mut tick = tokio::time::interval(self.term / 10);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut last = Instant::now();
        loop {
            tokio::select! {
                message = messages.recv() => match message {
                    Some(message) => self.handle(message),
                    None => return,
                },
                _ = tick.tick() => {
                    let now = Instant::now();
                    self.forgive(now.saturating_duration_since(last));
                    last = now;
                    self.expire();
                    self.wake_rested();
                    self.match_all();
                }
            }
        }
    }

    fn handle(&mut self, message: Message) {
        match message {
            Message::Open { job, place, epoch } => self.open(job, place, epoch),
            Message::Withdraw { job } => self.withdraw(job),
            Message::Cancel { job, epoch, stop } => {
                let lease = self.lease_ref(job, epoch);
                self.tell_holder(job, epoch, ToRunner::Cancel { lease, stop });
            }
            Message::Revoke { job, epoch, reason } => {
                let lease = self.lease_ref(job, epoch);
                self.tell_holder(job, epoch, ToRunner::Revoke { lease, reason });
                self.release(job, epoch);
            }
            Message::Renew { job, epoch } => {
                let lease = self.lease_ref(job, epoch);
                self.tell_holder(job, epoch, ToRunner::Renew { lease });
            }
            Message::Connect { runner, introduction, frames, reply } => {
                let id = self.connect(&runner, introduction, frames);
                let _ = reply.send(id);
                self.match_pool(runner.pool);
            }
            Message::Disconnect { runner, connection } => {
                if self.runners.get(&runner).is_some_and(|known| known.id == connection) {
                    self.drop_connection(runner);
                }
            }
            Message::Heartbeat { runner, held, reply } => {
                let renewed = self.renew(runner, held);
                let _ = reply.send(renewed);
            }
            Message::Released { job, epoch } => self.release(job, epoch),
            Message::LostBy { runner, job, epoch } => {
                if self.leases.get(&job).is_some_and(|watched| watched.runner == runner) {
                    self.release(job, epoch);
                }
            }
            Message::Rest { runner } => {
                if let Some(connection) = self.runners.get_mut(&runner) {
                    connection.rests_until = Some(Instant::now() + REST);
                    self.resting.push(runner);
                    self.relist(runner);
                }
            }
            Message::WatchUnknown { job, epoch, runner } => {
                if !self.leases.contains_key(&job) {
                    self.watch(job, epoch, runner);
                }
            }
            Message::Watch { job, epoch, runner } => self.watch(job, epoch, runner),
            Message::Granted { job, pool, runner, lease } => {
                self.granted(job, pool, runner, lease);
            }
            Message::Expired { job, epoch, expiry: Expiry::Settled } => self.release(job, epoch),
            Message::Expired { job, expiry: Expiry::Undecided, .. } => {
                if let Some(watched) = self.leases.get_mut(&job) {
                    watched.deadline = Instant::now() + self.term;
                }
            }
            Message::Standing { runner, standing } => self.stand(runner, standing),
            Message::Draining { runner, connection } => {
                let known = self.runners.get_mut(&runner);
                if let Some(known) = known.filter(|known| known.id == connection) {
                    known.draining = true;
                    self.relist(runner);
                }
            }
            Message::Expel { runner } => {
                self.drop_connection(runner);
            }
            Message::Watched { reply } => {
                let watched = self.leases.iter().map(|(job, w)| (*job, w.epoch, w.runner));
                let _ = reply.send(watched.collect());
            }
            Message::See { runners, reply } => {
                let seen = runners.into_iter().map(|runner| (runner, self.see(runner))).collect();
                let _ = reply.send(seen);
            }
            Message::WhyWaiting { place, reply } => {
                let _ = reply.send(self.why_waiting(&place));
            }
        }
    }

    fn lease_ref(&self, job: JobId, epoch: Epoch) -> LeaseRef {
        LeaseRef { job, epoch, generation: self.decider.generation() }
    }

    /// Counts a job against a runner's slots.
    fn take(&mut self, runner: RunnerId, job: JobId) {
        self.known.entry(runner).or_default().taken.insert(job);
        self.relist(runner);
    }

    /// Gives a slot back, unless the runner has the job for another reason still.
    fn give_back(&mut self, runner: RunnerId, job: JobId) {
        let leased = self.leases.get(&job).is_some_and(|watched| watched.runner == runner);
        if leased || self.granting.get(&job).is_some_and(|granting| granting.runner == runner) {
            return;
        }
        if let Some(known) = self.known.get_mut(&runner) {
            known.taken.remove(&job);
        }
        self.relist(runner);
    }

    fn forget_lease(&mut self, job: JobId) -> Option<RunnerId> {
        let runner = self.leases.remove(&job)?.runner;
        self.give_back(runner, job);
        Some(runner)
    }

    fn watch(&mut self, job: JobId, epoch: Epoch, runner: RunnerId) {
        if self.leases.get(&job).is_some_and(|known| known.epoch > epoch) {
            return;
        }
        let deadline = Instant::now() + self.term;
        let before = self.leases.insert(job, Watched { epoch, runner, deadline });
        self.take(runner, job);
        if let Some(before) = before.filter(|before| before.runner != runner) {
            self.give_back(before.runner, job);
        }
    }

    fn renew(&mut self, runner: RunnerId, held: Vec<LeaseRef>) -> Vec<LeaseRef> {
        if let Some(connection) = self.runners.get_mut(&runner) {
            connection.last_seen = self.decider.now();
        }
        let deadline = Instant::now() + self.term;
        held.into_iter()
            .filter(|lease| match self.leases.get_mut(&lease.job) {
                Some(watched) if watched.runner == runner && watched.epoch == lease.epoch => {
                    watched.deadline = deadline;
                    true
                }
                Some(_) | None => false,
            })
            .collect()
    }

    fn release(&mut self, job: JobId, epoch: Epoch) {
        let Some(watched) = self.leases.get(&job) else { return };
        if watched.epoch != epoch {
            return;
        }
        let runner = self.forget_lease(job);
        let connection = runner.and_then(|runner| self.runners.get(&runner));
        if let Some(pool) = connection.map(|connection| connection.pool) {
            self.match_pool(pool);
        }
    }

    /// Sends a frame to whoever holds a lease. One that cannot take it is disconnected: it will
    /// be told what is so when it comes back.
    fn tell_holder(&mut self, job: JobId, epoch: Epoch, frame: ToRunner) {
        let Some(watched) = self.leases.get(&job).filter(|watched| watched.epoch == epoch) else {
            return;
        };
        self.tell(watched.runner, frame);
    }

    /// Moves all deadlines when this process itself stood still: nobody was heard meanwhile, and
    /// that is no runner's silence.
    fn forgive(&mut self, since_last_tick: Duration) {
        if since_last_tick > self.term / 4 {
            tracing::warn!(?since_last_tick, "this process stood still; leases get as much more");
            self.leases.values_mut().for_each(|watched| watched.deadline += since_last_tick);
        }
    }

    fn expire(&mut self) {
        let now = Instant::now();
        for (job, watched) in &mut self.leases {
            if watched.deadline > now {
                continue;
            }
            // Asked again after another term, should the store not answer.
            watched.deadline = now + self.term;
            let (decider, own) = (Arc::clone(&self.decider), self.own.clone());
            let (job, epoch) = (*job, watched.epoch);
            tracing::warn!(%job, epoch = epoch.get(), "a runner was silent for a whole term");
            tokio::spawn(async move {
                let expiry = match decider.expire(job, epoch).await {
                    Ok(()) => Expiry::Settled,
                    Err(error) => {
                        tracing::error!(%job, error = %error, "a lease did not expire");
                        Expiry::Undecided
                    }
                };
                let _ = own.send(Message::Expired { job, epoch, expiry }).await;
            });
        }
    }
}

#[cfg(test)]
mod tests;
