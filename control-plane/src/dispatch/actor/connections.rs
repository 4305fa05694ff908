//! Who is connected: streams that come, take over and go, and who of them may have more.

use std::cmp::Reverse;
use std::sync::Arc;
use std::time::Duration;

use latchkey_domain::id::{JobId, RunnerId};
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::super::{Introduction, Seen, Standing, ToRunner};
use super::{Actor, Connection, ConnectionId};
use crate::auth::RunnerIdentity;

/// How often streams of one runner may end each other within [`FIGHT`] before it is an alarm: a
/// host that was copied keeps its original's identity, and both come back as long as they live.
pub(super) const MOST_TAKEOVERS: usize = 5;
const FIGHT: Duration = Duration::from_secs(60);

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

impl Actor {
    pub(super) fn connect(
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

    pub(super) fn stand(&mut self, runner: RunnerId, standing: Standing) {
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
    pub(super) fn drop_connection(&mut self, runner: RunnerId) -> Option<Connection> {
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
    pub(super) fn relist(&mut self, runner: RunnerId) {
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

    pub(super) fn wake_rested(&mut self) {
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

    pub(super) fn tell(&mut self, runner: RunnerId, frame: ToRunner) {
        let Some(connection) = self.runners.get(&runner) else { return };
        if connection.frames.try_send(frame).is_err() {
            tracing::warn!(runner_id = %runner, "a runner does not read its stream; dropped");
            self.drop_connection(runner);
        }
    }

    pub(super) fn see(&self, runner: RunnerId) -> Seen {
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
}
