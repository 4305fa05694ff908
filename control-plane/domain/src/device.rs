//! How often one MFA device may be tried, and that no code is tried twice.
//!
//! AWS blocks a device after nine verifications in a three-minute window aligned to UTC, right
//! codes included, and answers from then on as if the serial were wrong (observed by public
//! projects in 2026, promised by nobody). We stop at five and keep the rest for a person in
//! need. A code lives at most 150 s at AWS. Its digest is remembered for an hour all the same, so
//! that a clock which jumps ahead by minutes lets none be sent again.

use std::time::Duration;

use crate::time::Timestamp;

pub const WINDOW: Duration = Duration::from_secs(180);
pub const ATTEMPTS_PER_WINDOW: u32 = 5;
/// The least time after which a code is of no use to anybody.
pub const CODE_MEMORY: Duration = Duration::from_secs(180);
/// How long digests are kept; at most twenty windows of attempts.
const REMEMBERED: Duration = Duration::from_secs(3600);

/// A keyed digest of a code; the code itself is never kept.
pub type CodeDigest = [u8; 32];

/// Counter and memory of one device, taken by compare-and-swap before every attempt.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Device {
    /// Start of the window that `attempts` counts, in milliseconds since the epoch.
    pub window_start: i64,
    pub attempts: u32,
    /// Codes submitted within the last hour.
    pub recent: Vec<(CodeDigest, Timestamp)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    CodeUsed,
    Busy { retry_at: Timestamp },
}

fn window_start(now: Timestamp) -> i64 {
    let length = WINDOW.as_millis() as i64;
    now.as_millis().div_euclid(length) * length
}

impl Device {
    /// Counts one attempt with the code of `digest`, or refuses it unchanged.
    ///
    /// A clock that steps back stays in the later window, so that stepping it cannot buy
    /// attempts.
    pub fn attempt(&self, digest: CodeDigest, now: Timestamp) -> Result<Device, Refused> {
        let mut next = self.clone();
        next.recent.retain(|(_, at)| now.since(*at) < REMEMBERED);
        if next.recent.iter().any(|(known, _)| *known == digest) {
            return Err(Refused::CodeUsed);
        }
        let window = window_start(now).max(self.window_start);
        if window != next.window_start {
            next.window_start = window;
            next.attempts = 0;
        }
        if next.attempts >= ATTEMPTS_PER_WINDOW {
            return Err(Refused::Busy { retry_at: Timestamp::from_millis(window) + WINDOW });
        }
        next.attempts += 1;
        next.recent.push((digest, now));
        Ok(next)
    }

    /// Gives a code back that provably never left this host. The attempt stays counted.
    pub fn forget(&self, digest: CodeDigest) -> Device {
        let mut next = self.clone();
        next.recent.retain(|(known, _)| *known != digest);
        next
    }

    /// When the current window ends.
    pub fn next_window(now: Timestamp) -> Timestamp {
        Timestamp::from_millis(window_start(now)) + WINDOW
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::{prop_assert, proptest};

    use super::*;

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_millis(seconds * 1000)
    }

    #[test]
    fn the_sixth_attempt_waits_for_the_next_window() {
        let mut device = Device::default();
        for n in 0..5 {
            device = device.attempt([n; 32], at(10)).unwrap();
        }
        assert_eq!(device.attempt([9; 32], at(179)), Err(Refused::Busy { retry_at: at(180) }));
        assert!(device.attempt([9; 32], at(180)).is_ok());
    }

    #[test]
    fn a_code_is_refused_for_its_whole_life_and_costs_nothing() {
        let device = Device::default().attempt([1; 32], at(10)).unwrap();
        // The clock may have jumped by twenty minutes since.
        assert_eq!(device.attempt([1; 32], at(10 + 20 * 60)), Err(Refused::CodeUsed));
        assert_eq!(device.attempt([1; 32], at(3609)), Err(Refused::CodeUsed));
        assert!(device.attempt([1; 32], at(3610)).is_ok());
        assert!(device.forget([1; 32]).attempt([1; 32], at(11)).is_ok());
    }

    proptest! {
        #[test]
        fn no_window_sees_more_than_its_budget_and_no_code_twice(
            steps in vec((0..40_i64, 0..12_u8), 1..200)
        ) {
            let mut device = Device::default();
            let mut now = 0;
            let mut admitted = Vec::<(i64, u8)>::new();
            for (pause, code) in steps {
                now += pause;
                if let Ok(next) = device.attempt([code; 32], at(now)) {
                    device = next;
                    prop_assert!(!admitted.iter().any(|(t, c)| *c == code && now - t < 3600));
                    admitted.push((now, code));
                    let window = now / 180;
                    prop_assert!(admitted.iter().filter(|(t, _)| t / 180 == window).count() <= 5);
                }
            }
        }
    }
}
