//! Where all that is random in a simulated world comes from: one generator per seed.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

/// Draws in the order it is asked, so that one seed gives one world.
#[derive(Clone, Debug)]
pub(crate) struct Chance(Arc<Mutex<StdRng>>);

impl Chance {
    pub(crate) fn of(seed: u64) -> Self {
        Self(Arc::new(Mutex::new(StdRng::seed_from_u64(seed))))
    }

    /// Tells whether something of this probability happens.
    pub(crate) fn happens(&self, probability: f64) -> bool {
        self.draw().random_bool(probability)
    }

    pub(crate) fn between(&self, low: u64, high: u64) -> u64 {
        self.draw().random_range(low..=high)
    }

    pub(crate) fn index(&self, length: usize) -> usize {
        self.draw().random_range(0..length)
    }

    pub(crate) fn millis(&self, low: u64, high: u64) -> Duration {
        Duration::from_millis(self.between(low, high))
    }

    pub(crate) fn fraction(&self) -> f64 {
        self.draw().random()
    }

    fn draw(&self) -> std::sync::MutexGuard<'_, StdRng> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
