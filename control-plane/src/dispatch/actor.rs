//! The actor: one task that owns all of dispatch's state.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use latchkey_domain::id::{Epoch, JobId, PoolId, RunnerId};
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::{Connected, Introduction, Leases, Message, Place, ToRunner};
use crate::auth::RunnerIdentity;
use crate::job::{JobSpec, LeaseRef};

/// How long before a grant that failed, other than by a lost race, is tried again.
const RETRY_PAUSE: Duration = Duration::from_secs(1);

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
    /// Jobs that wait, by pool; job ids sort by the age of their run.
    open: HashMap<PoolId, BTreeMap<JobId, Place>>,
    /// Where each open job is listed.
    pool_of: HashMap<JobId, PoolId>,
    runners: HashMap<RunnerId, Connection>,
    leases: HashMap<JobId, Watched>,
    /// Jobs whose grant is being committed.
    granting: HashMap<JobId, RunnerId>,
    connections: u64,
}

struct Connection {
    id: ConnectionId,
    pool: PoolId,
    slots: u32,
    engines: Vec<(String, String)>,
    frames: mpsc::Sender<ToRunner>,
    last_seen: latchkey_domain::time::Timestamp,
    /// Set when it gave a job back: it is offered nothing until then.
    rests_until: Instant,
}

impl Connection {
    fn suits(&self, place: &Place) -> bool {
        !self.frames.is_closed()
            && self.rests_until <= Instant::now()
            && place.admits(self.pool, &self.engines)
    }
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
            open: HashMap::new(),
            pool_of: HashMap::new(),
            runners: HashMap::new(),
            leases: HashMap::new(),
            granting: HashMap::new(),
            connections: 0,
        }
    }

    pub(super) async fn run(mut self, mut messages: mpsc::Receiver<Message>) {
        let mut tick = tokio::time::interval(self.term / 10);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                message = messages.recv() => match message {
                    Some(message) => self.handle(message),
                    None => return,
                },
                _ = tick.tick() => {
                    self.expire();
                    self.match_all();
                }
            }
        }
    }

    fn handle(&mut self, message: Message) {
        match message {
            Message::Open { job, place, epoch } => {
                let pool = place.pool;
                let overtaken = self.leases.get(&job).is_some_and(|known| known.epoch > epoch);
                if overtaken || self.granting.contains_key(&job) {
                    return;
                }
                self.leases.remove(&job);
                self.withdraw(job);
                self.pool_of.insert(job, pool);
                self.open.entry(pool).or_default().insert(job, place);
                self.match_pool(pool);
            }
            Message::Withdraw { job } => self.withdraw(job),
            Message::Cancel { job, epoch } => {
                let lease = self.lease_ref(job, epoch);
                self.tell_holder(job, epoch, ToRunner::Cancel { lease, force: false });
            }
            Message::Revoke { job, epoch, reason } => {
                let lease = self.lease_ref(job, epoch);
                self.tell_holder(job, epoch, ToRunner::Revoke { lease, reason });
                self.release(job, epoch);
            }
            Message::Connect { runner, introduction, frames, reply } => {
                let id = self.connect(&runner, introduction, frames);
                let _ = reply.send(id);
                self.match_pool(runner.pool);
            }
            Message::Disconnect { runner, connection } => {
                if self.runners.get(&runner).is_some_and(|known| known.id == connection) {
                    self.runners.remove(&runner);
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
                    connection.rests_until = Instant::now() + REST;
                }
            }
            Message::WatchUnknown { job, epoch, runner } => {
                if !self.leases.contains_key(&job) {
                    self.watch(job, epoch, runner);
                }
            }
            Message::Watch { job, epoch, runner } => self.watch(job, epoch, runner),
            Message::Granted { job, place, runner, lease } => {
                self.granted(job, place.pool, runner, lease);
            }
            Message::Expired { job, epoch, settled } => {
                if settled {
                    self.release(job, epoch);
                } else if let Some(watched) = self.leases.get_mut(&job) {
                    watched.deadline = Instant::now() + self.term;
                }
            }
            Message::List { reply } => {
                let _ = reply.send(self.list());
            }
        }
    }

    fn lease_ref(&self, job: JobId, epoch: Epoch) -> LeaseRef {
        LeaseRef { job, epoch, generation: self.decider.generation() }
    }

    fn withdraw(&mut self, job: JobId) {
        if let Some(pool) = self.pool_of.remove(&job)
            && let Some(open) = self.open.get_mut(&pool)
        {
            open.remove(&job);
        }
    }

    fn connect(
        &mut self,
        runner: &RunnerIdentity,
        introduction: Introduction,
        frames: mpsc::Sender<ToRunner>,
    ) -> ConnectionId {
        self.connections += 1;
        let id = ConnectionId(self.connections);
        let connection = Connection {
            id,
            pool: runner.pool,
            slots: introduction.slots,
            engines: introduction.engines,
            frames,
            last_seen: self.decider.now(),
            rests_until: Instant::now(),
        };
        if let Some(earlier) = self.runners.insert(runner.id, connection) {
            tracing::warn!(runner_id = %runner.id, "a second stream of one runner took over");
            let _ = earlier.frames.try_send(ToRunner::Superseded);
        }
        for lease in introduction.held {
            self.watch(lease.job, lease.epoch, runner.id);
        }
        id
    }

    fn watch(&mut self, job: JobId, epoch: Epoch, runner: RunnerId) {
        if self.leases.get(&job).is_some_and(|known| known.epoch > epoch) {
            return;
        }
        let deadline = Instant::now() + self.term;
        self.leases.insert(job, Watched { epoch, runner, deadline });
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
        let runner = watched.runner;
        self.leases.remove(&job);
        if let Some(pool) = self.runners.get(&runner).map(|connection| connection.pool) {
            self.match_pool(pool);
        }
    }

    /// Looks at every pool again, for runners that have rested.
    fn match_all(&mut self) {
        let pools: Vec<_> = self.open.keys().copied().collect();
        for pool in pools {
            self.match_pool(pool);
        }
    }

    /// Offers a pool's open jobs, oldest first, to its idlest runners that can run them.
    fn match_pool(&mut self, pool: PoolId) {
        loop {
            let next = self.open.get(&pool).and_then(|open| {
                open.iter()
                    .filter(|(job, _)| !self.granting.contains_key(job))
                    .find_map(|(job, place)| Some((*job, place.clone(), self.idlest(place)?)))
            });
            let Some((job, place, runner)) = next else { return };
            self.withdraw(job);
            self.granting.insert(job, runner);
            let (decider, own) = (Arc::clone(&self.decider), self.own.clone());
            tokio::spawn(async move {
                let granted = Arc::clone(&decider).grant(job, runner).await;
                let failed = granted.is_err();
                let lease = granted.unwrap_or_else(|error| {
                    tracing::warn!(%job, runner_id = %runner, error = %error, "not granted");
                    None
                });
                let lease = lease.map(|(lease, spec)| (lease, Box::new(spec)));
                let _ = own.send(Message::Granted { job, place, runner, lease }).await;
                if failed {
                    tokio::time::sleep(RETRY_PAUSE).await;
                    if let Err(error) = decider.offer_if_open(job).await {
                        tracing::warn!(%job, error = %error, "left to the reaper");
                    }
                }
            });
        }
    }

    fn idlest(&self, place: &Place) -> Option<RunnerId> {
        self.runners
            .iter()
            .filter(|(_, connection)| connection.suits(place))
            .filter_map(|(id, connection)| {
                let busy = self.busy(*id);
                (busy < connection.slots).then(|| (connection.slots - busy, *id))
            })
            .max_by_key(|(idle, id)| (*idle, std::cmp::Reverse(*id)))
            .map(|(_, id)| id)
    }

    fn busy(&self, runner: RunnerId) -> u32 {
        let leased = self.leases.values().filter(|watched| watched.runner == runner).count();
        let granting = self.granting.values().filter(|granting| **granting == runner).count();
        u32::try_from(leased + granting).unwrap_or(u32::MAX)
    }

    fn granted(
        &mut self,
        job: JobId,
        pool: PoolId,
        runner: RunnerId,
        lease: Option<(LeaseRef, Box<JobSpec>)>,
    ) {
        self.granting.remove(&job);
        let Some((lease, spec)) = lease else {
            self.match_pool(pool);
            return;
        };
        self.watch(job, lease.epoch, runner);
        self.tell_holder(job, lease.epoch, ToRunner::Offer { lease, spec });
    }

    /// Sends a frame to whoever holds a lease. One that cannot take it is disconnected: it will
    /// be told what is so when it comes back.
    fn tell_holder(&mut self, job: JobId, epoch: Epoch, frame: ToRunner) {
        let Some(watched) = self.leases.get(&job).filter(|watched| watched.epoch == epoch) else {
            return;
        };
        let runner = watched.runner;
        let Some(connection) = self.runners.get(&runner) else { return };
        if connection.frames.try_send(frame).is_err() {
            tracing::warn!(runner_id = %runner, "a runner does not read its stream; dropped");
            self.runners.remove(&runner);
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
                let settled = match decider.expire(job, epoch).await {
                    Ok(()) => true,
                    Err(error) => {
                        tracing::error!(%job, error = %error, "a lease did not expire");
                        false
                    }
                };
                let _ = own.send(Message::Expired { job, epoch, settled }).await;
            });
        }
    }

    fn list(&self) -> HashMap<RunnerId, Connected> {
        let held = |runner: RunnerId| {
            let mine = self.leases.iter().filter(move |(_, watched)| watched.runner == runner);
            mine.map(|(job, _)| *job).collect()
        };
        self.runners
            .iter()
            .map(|(id, connection)| {
                let connected = Connected {
                    pool: connection.pool,
                    slots: connection.slots,
                    engines: connection.engines.clone(),
                    held: held(*id),
                    last_seen: connection.last_seen,
                };
                (*id, connected)
            })
            .collect()
    }
}
