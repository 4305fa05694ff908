//! Who gets what: open jobs in their lines, the oldest first, and the idlest runner that suits.

use std::cmp::Reverse;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use latchkey_domain::id::{Epoch, JobId, PoolId, RunnerId};

use super::super::{Abilities, Message, Place, ToRunner, Waiting};
use super::{Actor, Connection, Granting, Pool};
use crate::job::{JobSpec, LeaseRef};

/// How long before a grant that failed, other than by a lost race, is tried again.
const RETRY_PAUSE: Duration = Duration::from_secs(1);

impl Actor {
    /// Lists a job, unless a newer grant has overtaken the message.
    pub(super) fn open(&mut self, job: JobId, place: Place, epoch: Epoch) {
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

    pub(super) fn withdraw(&mut self, job: JobId) {
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

    /// Looks at every pool again, for runners that have rested.
    pub(super) fn match_all(&mut self) {
        let pools: Vec<_> = self.pools.keys().copied().collect();
        for pool in pools {
            self.match_pool(pool);
        }
    }

    /// Offers a pool's open jobs, oldest first, to its idlest runners that can run them.
    pub(super) fn match_pool(&mut self, pool: PoolId) {
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

    pub(super) fn granted(
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
            self.open(job, place, epoch);
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

    pub(super) fn why_waiting(&self, place: &Place) -> Waiting {
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
