//! Which notice is attempted next: times and counts only.
//!
//! Each subscriber has a queue. When an attempt fails, all that waits for the same subscriber
//! waits with it; then one notice is tried, after longer and longer, until one is accepted. So
//! whoever cannot be reached costs an attempt now and then, however much waits for them. Who failed
//! least goes first, and half of all slots are kept from those who failed last.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

use latchkey_domain::id::{DeliveryId, OrganizationId, SubscriberId};
use tokio::time::Instant;

use super::Pace;

/// Notices of one subscriber that are on their way at a time; the oldest is dropped.
pub const QUEUE: usize = 1000;

/// Attempts at a time, of all and of one organization.
const ATTEMPTS: usize = 128;
const ATTEMPTS_EACH: usize = 8;

pub(super) type Place = (OrganizationId, SubscriberId, DeliveryId);

/// What became of an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ended {
    Accepted,
    /// The notice is tried again after this, where it is.
    Failed(Option<Duration>),
    /// Nothing was attempted.
    Idle,
}

/// All that waits, and what is being attempted.
#[derive(Debug)]
pub(super) struct Schedule {
    pace: Pace,
    queues: BTreeMap<(OrganizationId, SubscriberId), Queue>,
}

#[derive(Debug, Default)]
struct Queue {
    /// What waits, and until when each notice does, whatever becomes of the others.
    due: BTreeSet<(Instant, DeliveryId)>,
    running: Option<DeliveryId>,
    /// Attempts that failed since one was accepted.
    failures: u32,
    /// Until when all wait after a failure.
    rests: Option<Instant>,
}

/// Slots that are taken.
#[derive(Clone, Copy, Debug, Default)]
struct Taken {
    all: usize,
    by_failing: usize,
}

impl Schedule {
    pub(super) fn new(pace: Pace) -> Self {
        Self { pace, queues: BTreeMap::new() }
    }

    pub(super) fn knows(&self, (organization, subscriber, id): &Place) -> bool {
        let queue = self.queues.get(&(*organization, *subscriber));
        queue.is_some_and(|queue| {
            queue.running == Some(*id) || queue.due.iter().any(|(_, known)| known == id)
        })
    }

    /// Adds a notice that is not known.
    pub(super) fn add(&mut self, (organization, subscriber, id): Place, at: Instant) {
        self.queues.entry((organization, subscriber)).or_default().due.insert((at, id));
    }

    pub(super) fn remove(&mut self, (organization, subscriber, id): &Place) {
        let key = (*organization, *subscriber);
        let Some(queue) = self.queues.get_mut(&key) else { return };
        queue.due.retain(|(_, known)| known != id);
        self.forget_empty(key);
    }

    /// Takes what is to be attempted now.
    pub(super) fn take(&mut self, now: Instant) -> Option<Place> {
        let startable = self.startable().into_iter().filter(|(_, at, _)| *at <= now);
        let (_, _, key) = startable.min()?;
        let queue = self.queues.get_mut(&key)?;
        let (_, id) = queue.due.pop_first()?;
        queue.running = Some(id);
        Some((key.0, key.1, id))
    }

    /// Tells when there may be something to take; what waits for a slot is not counted.
    pub(super) fn next(&self) -> Option<Instant> {
        self.startable().into_iter().map(|(_, at, _)| at).min()
    }

    /// Takes note of how an attempt ended. `chance` is evenly spread.
    pub(super) fn ended(&mut self, place: Place, ended: Ended, now: Instant, chance: u32) {
        let (organization, subscriber, id) = place;
        let key = (organization, subscriber);
        let Some(queue) = self.queues.get_mut(&key) else { return };
        queue.running = None;
        match ended {
            Ended::Accepted => {
                queue.failures = 0;
                queue.rests = None;
            }
            Ended::Failed(again) => {
                queue.failures = queue.failures.saturating_add(1);
                queue.rests = Some(now + self.pace.wait(queue.failures, chance));
                queue.due.extend(again.map(|wait| (now + wait, id)));
            }
            Ended::Idle => {}
        }
        self.forget_empty(key);
    }

    /// Lists what is too much, oldest first, of each subscriber who has too much.
    pub(super) fn beyond_bounds(&self) -> Vec<(OrganizationId, Vec<Place>)> {
        let full = self.queues.iter().filter(|(_, queue)| queue.due.len() > QUEUE);
        let oldest = full.map(|((organization, subscriber), queue)| {
            let mut ids: Vec<DeliveryId> = queue.due.iter().map(|(_, id)| *id).collect();
            ids.sort_unstable();
            ids.truncate(queue.due.len() - QUEUE);
            (*organization, ids.into_iter().map(|id| (*organization, *subscriber, id)).collect())
        });
        oldest.collect()
    }

    /// Lists who has something waiting and a slot for it: by failures, and since when or until
    /// when it waits.
    fn startable(&self) -> Vec<(u32, Instant, (OrganizationId, SubscriberId))> {
        let mut all = Taken::default();
        let mut each: HashMap<OrganizationId, Taken> = HashMap::new();
        for ((organization, _), queue) in &self.queues {
            if queue.running.is_some() {
                all.count(queue);
                each.entry(*organization).or_default().count(queue);
            }
        }
        let startable = self.queues.iter().filter_map(|(key, queue)| {
            let (at, _) = queue.due.first().filter(|_| queue.running.is_none())?;
            let of = each.get(&key.0).copied().unwrap_or_default();
            let is_free = all.admits(queue, ATTEMPTS) && of.admits(queue, ATTEMPTS_EACH);
            let at = queue.rests.map_or(*at, |rests| rests.max(*at));
            is_free.then_some((queue.failures, at, *key))
        });
        startable.collect()
    }

    fn forget_empty(&mut self, key: (OrganizationId, SubscriberId)) {
        let is_empty = |queue: &Queue| queue.due.is_empty() && queue.running.is_none();
        if self.queues.get(&key).is_some_and(is_empty) {
            self.queues.remove(&key);
        }
    }
}

impl Taken {
    fn count(&mut self, queue: &Queue) {
        self.all += 1;
        self.by_failing += usize::from(queue.failures > 0);
    }

    fn admits(self, queue: &Queue, most: usize) -> bool {
        self.all < most && (queue.failures == 0 || self.by_failing < most / 2)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    fn place(organization: u8, subscriber: u8, delivery: u8) -> Place {
        (
            OrganizationId::from_bytes([organization; 16]),
            SubscriberId::from_bytes([subscriber; 16]),
            DeliveryId::from_bytes([delivery; 16]),
        )
    }

    fn taken(schedule: &mut Schedule, now: Instant) -> Vec<Place> {
        std::iter::from_fn(|| schedule.take(now)).collect()
    }

    #[test]
    fn a_subscriber_gets_one_at_a_time_and_the_rest_waits_after_a_failure() {
        let now = Instant::now();
        let mut schedule = Schedule::new(Pace::USUAL);
        for delivery in [2, 1, 3] {
            schedule.add(place(1, 1, delivery), now);
        }
        assert_eq!(taken(&mut schedule, now), [place(1, 1, 1)]);
        assert_eq!(schedule.next(), None);
        schedule.ended(place(1, 1, 1), Ended::Failed(Some(HOUR)), now, u32::MAX);
        assert_eq!(taken(&mut schedule, now), []);
        let later = now + Duration::from_secs(10);
        assert_eq!(schedule.next(), Some(later));
        // Not the one that failed.
        assert_eq!(taken(&mut schedule, later), [place(1, 1, 2)]);
        schedule.ended(place(1, 1, 2), Ended::Failed(Some(HOUR)), later, u32::MAX);
        assert_eq!(schedule.next(), Some(later + Duration::from_secs(20)));
        let later = later + Duration::from_secs(20);
        assert_eq!(taken(&mut schedule, later), [place(1, 1, 3)]);
        // Once one is accepted, each waits for its own time alone.
        schedule.ended(place(1, 1, 3), Ended::Accepted, later, u32::MAX);
        assert_eq!(schedule.next(), Some(now + HOUR));
        schedule.remove(&place(1, 1, 1));
        schedule.remove(&place(1, 1, 2));
        assert!(schedule.queues.is_empty());
    }

    #[test]
    fn who_failed_last_takes_half_of_the_slots_and_comes_after_the_others() {
        let now = Instant::now();
        let mut schedule = Schedule::new(Pace::USUAL);
        for subscriber in 1..=20 {
            schedule.add(place(1, subscriber, subscriber), now);
            schedule.add(place(1, subscriber, 100 + subscriber), now);
        }
        let first = taken(&mut schedule, now);
        assert_eq!(first.len(), ATTEMPTS_EACH);
        for place in first {
            schedule.ended(place, Ended::Failed(Some(HOUR)), now, 0);
        }
        // Of the eight that failed and the twelve others, the others.
        let others = taken(&mut schedule, now);
        assert_eq!(others, (9..=16).map(|other| place(1, other, other)).collect::<Vec<_>>());
        for place in others {
            schedule.ended(place, Ended::Accepted, now, 0);
        }
        for subscriber in 9..=20 {
            for delivery in [subscriber, 100 + subscriber] {
                schedule.remove(&place(1, subscriber, delivery));
            }
        }
        assert_eq!(taken(&mut schedule, now).len(), ATTEMPTS_EACH / 2);
        schedule.add(place(1, 99, 99), now);
        assert_eq!(taken(&mut schedule, now), [place(1, 99, 99)]);
    }

    #[test]
    fn the_bound_is_each_subscribers_own() {
        let now = Instant::now();
        let mut schedule = Schedule::new(Pace::USUAL);
        let (organization, subscriber, _) = place(1, 1, 1);
        let id = |number: usize| {
            let mut bytes = [0; 16];
            bytes[..8].copy_from_slice(&(number as u64).to_be_bytes());
            DeliveryId::from_bytes(bytes)
        };
        schedule.add(place(1, 2, 0), now);
        for number in 0..QUEUE + 2 {
            schedule.add((organization, subscriber, id(number)), now);
        }
        let oldest = [0, 1].map(|number| (organization, subscriber, id(number)));
        assert_eq!(schedule.beyond_bounds(), [(organization, oldest.to_vec())]);
    }
}
