//! The actor: one task that owns all of dispatch's state.
//!
//! Nothing here grows with runners times jobs: who is idle, and how much, is kept up to date as
//! jobs come and go, and open jobs with the same demands stand in one line, of which only the
//! oldest is ever tried.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use latchkey_domain::id::{Epoch, JobId, PoolId, RunnerId};
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::{Abilities, Introduction, Leases, Message, Place, Seen, Standing, ToRunner, Waiting};
use crate::auth::RunnerIdentity;
use crate::job::{JobSpec, LeaseRef};

/// How long before a grant that failed, other than by a lost race, is tried again.
const RETRY_PAUSE: Duration = Duration::from_secs(1);

/// How long a runner that gave a job back is offered nothing.
const REST: Duration = Duration::from_secs(5);

/// How often streams of one runner may end each other within [`FIGHT`] before it is an alarm: a
/// host that was copied keeps its original's identity, and both come back as long as they live.
const MOST_TAKEOVERS: usize = 5;
const FIGHT: Duration = Duration::from_secs(60);

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

impl Connection {
    /// How many more jobs it may have; `None` when it may have none.
    fn free(&self, taken: usize) -> Option<u32> {
        if self.standing.drained || self.draining || self.rests_until.is_some() {
            return None;
        }
        let taken = u32::try_from(taken).unwrap_or(u32::MAX);
        self.abilities.slots.checked_sub(taken).filter(|free| *free > 0)
    }
}

/// What is known of a runner whether or not it is connected.
#[derive(Default)]
struct Known {
    /// Jobs that it holds or is being granted.
    taken: BTreeSet<JobId>,
    last_seen: Option<latchkey_domain::time::Timestamp>,
    /// When one of its streams ended another, within [`FIGHT`].
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
            Message::Open { job, place, epoch } => {
                let pool = place.pool;
                let overtaken = self.leases.get(&job).is_some_and(|known| known.epoch > epoch);
                if overtaken {
                    return;
                }
                if let Some(granting) = self.granting.get_mut(&job) {
                    // Judged when it is known which lease the grant made.
                    granting.reopened = Some((place, epoch));
                    return;
                }
                self.forget_lease(job);
                self.withdraw(job);
                let place = Arc::new(place);
                self.place_of.insert(job, Arc::clone(&place));
                self.pools.entry(pool).or_default().open.entry(place).or_default().insert(job);
                self.match_pool(pool);
            }
            Message::Withdraw { job } => self.withdraw(job),
            Message::Cancel { job, epoch, force } => {
                let lease = self.lease_ref(job, epoch);
                self.tell_holder(job, epoch, ToRunner::Cancel { lease, force });
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
            Message::Expired { job, epoch, settled } => {
                if settled {
                    self.release(job, epoch);
                } else if let Some(watched) = self.leases.get_mut(&job) {
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

    fn withdraw(&mut self, job: JobId) {
        let Some(place) = self.place_of.remove(&job) else { return };
        if let Some(pool) = self.pools.get_mut(&place.pool)
            && let Some(line) = pool.open.get_mut(&place)
        {
            line.remove(&job);
            if line.is_empty() {
                pool.open.remove(&place);
            }
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
        let Introduction { abilities, held, standing, draining } = introduction;
        let connection = Connection {
            id,
            pool: runner.pool,
            abilities,
            frames,
            last_seen: self.decider.now(),
            standing,
            draining,
            rests_until: None,
            listed: None,
        };
        if let Some(earlier) = self.drop_connection(runner.id)
            && !earlier.frames.is_closed()
        {
            tracing::warn!(runner_id = %runner.id, "a second stream of one runner took over");
            let _ = earlier.frames.try_send(ToRunner::Superseded);
            self.taken_over(runner.id);
        }
        self.runners.insert(runner.id, connection);
        for lease in held {
            self.watch(lease.job, lease.epoch, runner.id);
        }
        self.relist(runner.id);
        if standing.drained {
            self.tell(runner.id, ToRunner::Drain);
        }
        id
    }

    /// Raises an alarm when streams of one runner keep ending each other.
    fn taken_over(&mut self, runner: RunnerId) {
        let now = Instant::now();
        let known = self.known.entry(runner).or_default();
        known.takeovers.push_back(now);
        known.takeovers.retain(|at| now.duration_since(*at) < FIGHT);
        let quiet = known.alarmed.is_none_or(|at| now.duration_since(at) >= FIGHT);
        if known.takeovers.len() <= MOST_TAKEOVERS || !quiet {
            return;
        }
        known.alarmed = Some(now);
        known.takeovers.clear();
        tracing::error!(runner_id = %runner,
            "two programs use this runner's identity and keep ending each other's streams: a \
             host was copied; revoke the runner and enroll each host by itself");
        let decider = Arc::clone(&self.decider);
        tokio::spawn(async move {
            if let Err(error) = decider.two_of_one(runner).await {
                tracing::error!(runner_id = %runner, error = %error, "the alarm is not recorded");
            }
        });
    }

    fn stand(&mut self, runner: RunnerId, standing: Standing) {
        let Some(connection) = self.runners.get_mut(&runner) else { return };
        if connection.standing.version > standing.version {
            return;
        }
        let before = std::mem::replace(&mut connection.standing, standing);
        let pool = connection.pool;
        match (before.drained, standing.drained) {
            (false, true) => self.tell(runner, ToRunner::Drain),
            (true, false) => self.tell(runner, ToRunner::Resume),
            (true, true) | (false, false) => return,
        }
        self.relist(runner);
        self.match_pool(pool);
    }

    /// Takes a runner's stream out of dispatch; what it holds stays held until its term is over.
    fn drop_connection(&mut self, runner: RunnerId) -> Option<Connection> {
        let connection = self.runners.remove(&runner)?;
        if let Some(free) = connection.listed
            && let Some(pool) = self.pools.get_mut(&connection.pool)
        {
            pool.idle.remove(&(free, Reverse(runner)));
        }
        self.known.entry(runner).or_default().last_seen = Some(connection.last_seen);
        Some(connection)
    }

    /// Puts a runner in its place among the idle, after something that decides it has changed.
    fn relist(&mut self, runner: RunnerId) {
        let Some(connection) = self.runners.get_mut(&runner) else { return };
        let taken = self.known.get(&runner).map_or(0, |known| known.taken.len());
        let free = connection.free(taken);
        if connection.listed == free {
            return;
        }
        let idle = &mut self.pools.entry(connection.pool).or_default().idle;
        if let Some(before) = connection.listed {
            idle.remove(&(before, Reverse(runner)));
        }
        if let Some(free) = free {
            idle.insert((free, Reverse(runner)));
        }
        connection.listed = free;
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

    fn wake_rested(&mut self) {
        let now = Instant::now();
        for runner in std::mem::take(&mut self.resting) {
            let Some(connection) = self.runners.get_mut(&runner) else { continue };
            match connection.rests_until {
                Some(until) if until > now => self.resting.push(runner),
                Some(_) => {
                    connection.rests_until = None;
                    self.relist(runner);
                }
                None => {}
            }
        }
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

    /// Looks at every pool again, for runners that have rested.
    fn match_all(&mut self) {
        let pools: Vec<_> = self.pools.keys().copied().collect();
        for pool in pools {
            self.match_pool(pool);
        }
    }

    /// Offers a pool's open jobs, oldest first, to its idlest runners that can run them.
    fn match_pool(&mut self, pool: PoolId) {
        while let Some((job, place, runner)) = self.next_match(pool) {
            self.withdraw(job);
            self.granting.insert(job, Granting { runner, reopened: None });
            self.take(runner, job);
            let (decider, own) = (Arc::clone(&self.decider), self.own.clone());
            tokio::spawn(async move {
                let granted = Arc::clone(&decider).grant(job, runner).await;
                let failed = granted.is_err();
                let lease = granted.unwrap_or_else(|error| {
                    tracing::warn!(%job, runner_id = %runner, error = %error, "not granted");
                    None
                });
                let lease = lease.map(|(lease, spec)| (lease, Box::new(spec)));
                let pool = place.pool;
                let _ = own.send(Message::Granted { job, pool, runner, lease }).await;
                if failed {
                    tokio::time::sleep(RETRY_PAUSE).await;
                    if let Err(error) = decider.offer_if_open(job).await {
                        tracing::warn!(%job, error = %error, "left to the reaper");
                    }
                }
            });
        }
    }

    fn next_match(&self, pool: PoolId) -> Option<(JobId, Arc<Place>, RunnerId)> {
        let pool = self.pools.get(&pool)?;
        if pool.idle.is_empty() {
            return None;
        }
        let oldest = |(place, line): (&'_ Arc<Place>, &BTreeSet<JobId>)| {
            line.first().map(|job| (*job, Arc::clone(place)))
        };
        let mut lines: Vec<_> = pool.open.iter().filter_map(oldest).collect();
        lines.sort_unstable_by_key(|(job, _)| *job);
        lines.into_iter().find_map(|(job, place)| {
            let runner = self.idlest(pool, &place)?;
            Some((job, place, runner))
        })
    }

    fn idlest(&self, pool: &Pool, place: &Place) -> Option<RunnerId> {
        let suits = |runner: &RunnerId| {
            self.runners.get(runner).is_some_and(|connection| {
                !connection.frames.is_closed()
                    && place.admits(connection.pool, &connection.abilities)
            })
        };
        pool.idle.iter().rev().map(|(_, Reverse(runner))| *runner).find(suits)
    }

    fn granted(
        &mut self,
        job: JobId,
        pool: PoolId,
        runner: RunnerId,
        lease: Option<(LeaseRef, Box<JobSpec>)>,
    ) {
        let granting = self.granting.remove(&job);
        let made = lease.as_ref().map(|(lease, _)| lease.epoch);
        // A lease of that epoch was over when the job was opened anew; a later one was not.
        let reopened = granting
            .and_then(|granting| granting.reopened)
            .filter(|(_, epoch)| made.is_none_or(|made| made <= *epoch));
        if let Some((place, epoch)) = reopened {
            self.forget_lease(job);
            self.give_back(runner, job);
            self.handle(Message::Open { job, place, epoch });
            return;
        }
        let Some((lease, spec)) = lease else {
            self.give_back(runner, job);
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
        self.tell(watched.runner, frame);
    }

    fn tell(&mut self, runner: RunnerId, frame: ToRunner) {
        let Some(connection) = self.runners.get(&runner) else { return };
        if connection.frames.try_send(frame).is_err() {
            tracing::warn!(runner_id = %runner, "a runner does not read its stream; dropped");
            self.drop_connection(runner);
        }
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

    fn see(&self, runner: RunnerId) -> Seen {
        let (connection, known) = (self.runners.get(&runner), self.known.get(&runner));
        let held = |job: &JobId| {
            let watched = self.leases.get(job).filter(|watched| watched.runner == runner)?;
            Some((*job, watched.epoch))
        };
        Seen {
            connected: connection.is_some(),
            draining: connection.is_some_and(|connection| connection.draining),
            last_seen: connection
                .map(|connection| connection.last_seen)
                .or_else(|| known.and_then(|known| known.last_seen)),
            held: known.map_or(vec![], |known| known.taken.iter().filter_map(held).collect()),
        }
    }

    fn why_waiting(&self, place: &Place) -> Waiting {
        let of_pool: Vec<&Connection> =
            self.runners.values().filter(|connection| connection.pool == place.pool).collect();
        if of_pool.is_empty() {
            return Waiting::NobodyThere;
        }
        let abilities: Vec<&Abilities> =
            of_pool.iter().map(|connection| &connection.abilities).collect();
        let mut suited =
            of_pool.iter().filter(|known| place.admits(place.pool, &known.abilities)).peekable();
        if suited.peek().is_none() {
            return Waiting::NobodySuits { lacking: place.lacking(&abilities) };
        }
        if suited.any(|connection| connection.listed.is_some()) {
            Waiting::Soon
        } else {
            Waiting::NobodyIdle
        }
    }
}

#[cfg(test)]
mod tests;
