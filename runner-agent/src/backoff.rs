//! How long to wait before the next attempt: exponential, with full jitter. Pure: the random
//! number is an argument.
//!
//! Full jitter spreads a thousand runners that lost the same control plane over the whole
//! interval; anything less lets them return in waves.

use std::time::Duration;

/// Counts failed attempts in a row.
#[derive(Debug, Clone)]
pub(crate) struct Backoff {
    first: Duration,
    cap: Duration,
    failures: u32,
}

impl Backoff {
    pub(crate) fn new(first: Duration, cap: Duration) -> Self {
        Self { first, cap, failures: 0 }
    }

    /// Answers the next wait; `random` lies in 0..=1.
    pub(crate) fn next(&mut self, random: f64) -> Duration {
        let factor = 2u32.saturating_pow(self.failures.min(31));
        let ceiling = self.first.saturating_mul(factor).min(self.cap);
        self.failures = self.failures.saturating_add(1);
        ceiling.mul_f64(random.clamp(0.0, 1.0))
    }

    /// Lets no wait be longer than this from now on.
    pub(crate) fn hold_to(&mut self, cap: Duration) {
        self.cap = cap;
    }

    /// Starts over after a success.
    pub(crate) fn reset(&mut self) {
        self.failures = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ceiling_doubles_up_to_the_cap() {
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(1));
        let waits: Vec<u128> = (0..6).map(|_| backoff.next(1.0).as_millis()).collect();
        assert_eq!(waits, [100, 200, 400, 800, 1000, 1000]);
        backoff.reset();
        assert_eq!(backoff.next(1.0).as_millis(), 100);
    }

    #[test]
    fn a_thousand_runners_come_back_spread_over_the_whole_interval() {
        let cap = Duration::from_secs(20);
        for failures in [0, 3, 10] {
            let mut spread = [0; 10];
            for runner in 0..1000 {
                let mut backoff = Backoff::new(Duration::from_millis(200), cap);
                for _ in 0..failures {
                    backoff.next(1.0);
                }
                let ceiling = backoff.clone().next(1.0);
                let wait = backoff.next(f64::from(runner) / 1000.0);
                assert!(wait <= ceiling && ceiling <= cap);
                let part = (wait.as_secs_f64() / ceiling.as_secs_f64() * 10.0) as usize;
                spread[part.min(9)] += 1;
            }
            // As evenly as the fractions that were drawn.
            assert!(spread.iter().all(|n| (99..=101).contains(n)), "{failures}: {spread:?}");
        }
    }

    #[test]
    fn failures_in_a_row_do_not_outgrow_a_later_cap() {
        let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(20));
        for _ in 0..10 {
            backoff.next(1.0);
        }
        backoff.hold_to(Duration::from_secs(2));
        assert_eq!(backoff.next(1.0), Duration::from_secs(2));
    }

    #[test]
    fn jitter_reaches_down_to_zero_and_never_above_the_ceiling() {
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(1));
        assert_eq!(backoff.next(0.0), Duration::ZERO);
        for _ in 0..200 {
            assert!(backoff.next(0.7) <= Duration::from_millis(700));
        }
    }
}
