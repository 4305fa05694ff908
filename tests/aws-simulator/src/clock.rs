//! What time it is inside the simulation.
//!
//! Codes, sessions and signatures all expire, so a test must be able to hold time still and to
//! move it. A wall clock can be moved as well: the offset is kept, and time goes on from there.
//! Clients that sign with the host's own clock stay within AWS's fifteen minutes only as long as
//! the offset does.

use std::sync::{Arc, Mutex, PoisonError};

use jiff::{SignedDuration, Timestamp};

/// A handle on the simulation's time; clones share it.
#[derive(Debug, Clone)]
pub struct Clock {
    time: Arc<Mutex<Time>>,
}

#[derive(Debug, Clone, Copy)]
enum Time {
    /// The host's clock, moved by this much.
    Wall { offset: SignedDuration },
    /// Stands still until someone moves it.
    Manual { now: Timestamp },
}

impl Clock {
    /// Follows the host's clock.
    pub fn wall() -> Self {
        Self::of(Time::Wall { offset: SignedDuration::ZERO })
    }

    /// Stands still at `now` until it is moved.
    pub fn manual(now: Timestamp) -> Self {
        Self::of(Time::Manual { now })
    }

    /// Says what time it is.
    pub fn now(&self) -> Timestamp {
        match self.read() {
            Time::Wall { offset } => saturating_add(wall(), offset),
            Time::Manual { now } => now,
        }
    }

    /// Moves time by `by`, which may be negative.
    pub fn advance(&self, by: SignedDuration) {
        let mut time = self.time.lock().unwrap_or_else(PoisonError::into_inner);
        match &mut *time {
            Time::Wall { offset } => *offset = offset.saturating_add(by),
            Time::Manual { now } => *now = saturating_add(*now, by),
        }
    }

    /// Moves time to `to`.
    pub fn set(&self, to: Timestamp) {
        let mut time = self.time.lock().unwrap_or_else(PoisonError::into_inner);
        match &mut *time {
            Time::Wall { offset } => *offset = to.duration_since(wall()),
            Time::Manual { now } => *now = to,
        }
    }

    fn of(time: Time) -> Self {
        Self { time: Arc::new(Mutex::new(time)) }
    }

    fn read(&self) -> Time {
        *self.time.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for Clock {
    fn default() -> Self {
        Self::wall()
    }
}

fn saturating_add(time: Timestamp, by: SignedDuration) -> Timestamp {
    time.checked_add(by).unwrap_or(if by.is_negative() { Timestamp::MIN } else { Timestamp::MAX })
}

#[expect(clippy::disallowed_methods, reason = "the one place that reads the host's clock")]
fn wall() -> Timestamp {
    Timestamp::now()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manual_clock_stands_still_until_it_is_moved() {
        let start: Timestamp = "2026-01-01T00:00:00Z".parse().unwrap();
        let clock = Clock::manual(start);
        assert_eq!(clock.now(), start);
        let shared = clock.clone();
        shared.advance(SignedDuration::from_secs(30));
        assert_eq!(clock.now(), "2026-01-01T00:00:30Z".parse().unwrap());
    }

    #[test]
    fn a_wall_clock_can_be_moved_and_goes_on() {
        let clock = Clock::wall();
        let before = clock.now();
        clock.advance(SignedDuration::from_hours(2));
        assert!(clock.now() >= before + SignedDuration::from_hours(2));
    }
}
