//! What time it is in the simulated world.
//!
//! Timers run on turmoil's time, which is monotonic. The wall clock runs sixty times as fast, so
//! that windows of minutes and sessions of a quarter of an hour come to their end within a
//! simulated minute; and it jumps when the plan of faults says so.

use std::sync::atomic::{AtomicI64, Ordering};

use latchkey_control_plane::clock::Clock;
use latchkey_domain::time::Timestamp;

/// Some day in 2027.
const START: i64 = 1_800_000_000_000;

/// How much faster than turmoil's time it runs.
pub(crate) const SPEED: u32 = 60;

/// The control plane's wall clock.
#[derive(Debug, Default)]
pub(crate) struct WallClock {
    /// Milliseconds that jumps have added; changed by [`WallClock::jump`].
    offset: AtomicI64,
}

impl WallClock {
    pub(crate) fn jump(&self, millis: i64) {
        self.offset.fetch_add(millis, Ordering::SeqCst);
    }
}

impl Clock for WallClock {
    fn now(&self) -> Timestamp {
        let elapsed = turmoil::sim_elapsed().unwrap_or_default().as_millis();
        let elapsed = i64::try_from(elapsed).expect("a simulation lasts minutes");
        Timestamp::from_millis(
            START + elapsed * i64::from(SPEED) + self.offset.load(Ordering::SeqCst),
        )
    }
}
