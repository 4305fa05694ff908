//! What time it is. The only file that asks the system, so that a test can hold time still.
//!
//! This is wall-clock time, for records and for windows aligned to UTC. Deadlines of leases are
//! measured on a monotonic clock instead, so that a jump of the wall clock ends none.

use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use latchkey_domain::time::Timestamp;

/// Tells the time of day.
pub trait Clock: Send + Sync {
    fn now(&self) -> Timestamp;
}

/// The system's clock.
#[derive(Clone, Copy, Debug, Default)]
pub struct Wall;

impl Clock for Wall {
    #[expect(clippy::disallowed_methods, reason = "this is the one place that asks the system")]
    fn now(&self) -> Timestamp {
        Timestamp::from_millis(
            jiff::Timestamp::now().as_millisecond() + latchkey_failpoint::clock_offset(),
        )
    }
}

/// A clock that stands still until it is told to move.
#[derive(Debug)]
pub struct Manual {
    /// Milliseconds since the Unix epoch; changed by [`Manual::set`] and [`Manual::advance`].
    millis: AtomicI64,
}

impl Manual {
    pub fn new(now: Timestamp) -> Self {
        Self { millis: AtomicI64::new(now.as_millis()) }
    }

    /// Moves to a point in time, which may lie in the past.
    pub fn set(&self, now: Timestamp) {
        self.millis.store(now.as_millis(), Ordering::SeqCst);
    }

    /// Moves forward and returns the new time.
    pub fn advance(&self, by: Duration) -> Timestamp {
        let now = self.now() + by;
        self.set(now);
        now
    }
}

impl Clock for Manual {
    fn now(&self) -> Timestamp {
        Timestamp::from_millis(self.millis.load(Ordering::SeqCst))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manual_clock_moves_only_when_told() {
        let clock = Manual::new(Timestamp::from_millis(1_000));
        assert_eq!(clock.now().as_millis(), 1_000);
        clock.advance(Duration::from_secs(3));
        assert_eq!(clock.now().as_millis(), 4_000);
        clock.set(Timestamp::from_millis(5));
        assert_eq!(clock.now().as_millis(), 5);
    }

    #[test]
    fn the_wall_clock_is_past_the_day_this_was_written() {
        assert!(Wall.now().as_millis() > 1_700_000_000_000);
    }
}
