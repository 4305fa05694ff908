//! How many streams one runner has at a time, over all its connections, and how long one of them
//! may bring nothing.
//!
//! A place is taken before a byte of a request's body is read, since half a message is kept until
//! the other half comes. Whoever has none to take is told so with a code alone, and no reason: a
//! runner takes `LIMIT_REACHED` as final, and this is over as soon as another stream has ended.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use latchkey_domain::id::RunnerId;
use tonic::{Request, Status};

use super::PART_TIMEOUT;
use crate::app::App;
use crate::app::runners::Budget;
use crate::seldom::Seldom;

/// How many lease streams: an honest runner has one, and for a moment the one that it replaces.
const MOST_LEASES: usize = 16;

/// How many streams of bulk data any runner has.
const MOST_BULK: usize = 64;

/// A job has one stream for its log and up to two for what it makes. One that has many slots has
/// as much more.
const BULK_OF_SLOT: usize = 3;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Lease,
    Bulk,
}

/// The places of all runners. Like runners' records, what is counted of one stays.
#[derive(Clone, Debug, Default)]
pub(super) struct Places(Arc<Mutex<HashMap<RunnerId, Taken>>>);

#[derive(Debug, Default)]
struct Taken {
    leases: usize,
    bulk: usize,
    introductions: Arc<Budget>,
    refused: Seldom,
}

impl Taken {
    const fn of(&mut self, kind: Kind) -> &mut usize {
        match kind {
            Kind::Lease => &mut self.leases,
            Kind::Bulk => &mut self.bulk,
        }
    }
}

/// A stream's place, until the last clone is dropped.
#[derive(Clone, Debug)]
pub(super) struct Place {
    patience: Duration,
    introductions: Arc<Budget>,
    _held: Option<Arc<Held>>,
}

#[derive(Debug)]
struct Held {
    places: Places,
    runner: RunnerId,
    kind: Kind,
}

impl Places {
    /// Takes a place, or says how many there are.
    pub(super) async fn take(
        &self,
        app: &App,
        runner: RunnerId,
        kind: Kind,
        patience: Duration,
    ) -> Result<Place, Status> {
        let (mut most, what) = match kind {
            Kind::Lease => (MOST_LEASES, "lease streams"),
            Kind::Bulk => (MOST_BULK, "streams of bulk data"),
        };
        if let Some(place) = self.try_take(runner, kind, most, patience) {
            return Ok(place);
        }
        if kind == Kind::Bulk {
            most = most.max(bulk_of(app.slots_of(runner).await?));
            if let Some(place) = self.try_take(runner, kind, most, patience) {
                return Ok(place);
            }
        }
        let told = self.taken().entry(runner).or_default().refused.count();
        if let Some(times) = told {
            tracing::warn!(runner_id = %runner, most, what, times, "a runner has too many open");
        }
        Err(Status::resource_exhausted(format!(
            "this runner has {most} {what} open, and may have no more; try again when one has ended"
        )))
    }

    fn try_take(
        &self,
        runner: RunnerId,
        kind: Kind,
        most: usize,
        patience: Duration,
    ) -> Option<Place> {
        let mut taken = self.taken();
        let taken = taken.entry(runner).or_default();
        let introductions = Arc::clone(&taken.introductions);
        let count = taken.of(kind);
        if *count >= most {
            return None;
        }
        *count += 1;
        let held = Held { places: self.clone(), runner, kind };
        Some(Place { patience, introductions, _held: Some(Arc::new(held)) })
    }

    fn taken(&self) -> MutexGuard<'_, HashMap<RunnerId, Taken>> {
        // Nothing that holds it can panic halfway.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

const fn bulk_of(slots: u32) -> usize {
    MOST_LEASES + slots as usize * BULK_OF_SLOT
}

impl Place {
    /// Takes the place out of a request, so that it lives as long as the work does and not as long
    /// as the request. Where no layer gave one, nothing is counted.
    pub(super) fn of<T>(request: &mut Request<T>) -> Self {
        let given = request.extensions_mut().remove::<Self>();
        given.unwrap_or_else(|| {
            let introductions = Arc::default();
            Self { patience: PART_TIMEOUT, introductions, _held: None }
        })
    }

    /// How often the runner may have something new recorded, over all its streams.
    pub(super) fn introductions(&self) -> &Budget {
        &self.introductions
    }

    /// How long the stream may bring no whole message. Whoever asks has the place, too: a task
    /// that only knew the time would not keep it.
    pub(super) const fn patience(&self) -> Duration {
        self.patience
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if let Some(taken) = self.places.taken().get_mut(&self.runner) {
            let count = taken.of(self.kind);
            *count = count.saturating_sub(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_each_runners_own_and_free_again_when_their_work_has_ended() {
        let places = Places::default();
        let (one, other) = (RunnerId::from_bytes([1; 16]), RunnerId::from_bytes([2; 16]));
        let take = |runner, kind| places.try_take(runner, kind, 2, PART_TIMEOUT);
        let held = [take(one, Kind::Bulk).unwrap(), take(one, Kind::Bulk).unwrap()];
        assert!(take(one, Kind::Bulk).is_none());
        assert!(take(one, Kind::Lease).is_some());
        assert!(take(other, Kind::Bulk).is_some());
        let kept = held[0].clone();
        drop(held);
        assert!(take(one, Kind::Bulk).is_some());
        drop(kept);
        assert!([take(one, Kind::Bulk), take(one, Kind::Bulk)].iter().all(Option::is_some));
    }

    #[test]
    fn all_slots_of_a_runner_have_places() {
        for slots in 1..=256 {
            assert!(MOST_BULK.max(bulk_of(slots)) >= 3 * slots as usize, "{slots} slots");
        }
    }
}
