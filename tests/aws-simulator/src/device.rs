//! What a device remembers, and whether it takes a code.
//!
//! AWS promises none of these rules; they are what was observed of it:
//!
//! - a code is good for its own step and two to either side;
//! - it is good once, whichever operation it was given to, and codes may come out of order;
//! - nine verifications per device in each UTC-aligned window of three minutes, whether they
//!   succeeded, failed or were repeats; then every code is answered as if the device were unknown;
//! - replacing the device does not give the attempts back.

use std::collections::{BTreeSet, HashMap};
use std::ops::RangeInclusive;

use subtle::ConstantTimeEq;

use crate::totp;

/// How many steps before and after the current one are accepted.
pub const WINDOW_STEPS: i64 = 2;
/// How many verifications one window allows.
pub const ATTEMPTS_PER_WINDOW: u32 = 9;
/// The length of the window, in seconds, aligned to the Unix epoch.
pub const ATTEMPT_WINDOW_SECONDS: i64 = 180;

/// How long a code that is handed out for use must still be good.
const MARGIN_SECONDS: i64 = 8;

/// What came of showing a code to a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    Accepted,
    /// Wrong, too old, too new, or used before: AWS does not say which.
    Rejected,
    /// The attempts of this window are spent.
    Exhausted,
}

/// The memory of all devices, by serial. It outlives the devices themselves.
#[derive(Debug, Default)]
pub(crate) struct Devices {
    by_serial: HashMap<String, Memory>,
}

#[derive(Debug, Default)]
struct Memory {
    /// Steps whose code was accepted; forgotten once no code of theirs could be accepted.
    used: BTreeSet<i64>,
    /// The attempt window that `attempts` counts.
    window: i64,
    attempts: u32,
}

impl Devices {
    /// Shows `code` to the device: spends an attempt, and on success the code.
    pub(crate) fn verify(&mut self, serial: &str, seed: &[u8], code: &str, now: i64) -> Verdict {
        let memory = self.by_serial.entry(serial.to_owned()).or_default();
        memory.enter_window(now);
        if memory.attempts >= ATTEMPTS_PER_WINDOW {
            return Verdict::Exhausted;
        }
        memory.attempts += 1;
        for step in acceptable(now) {
            let right: bool = totp::code(seed, step).as_bytes().ct_eq(code.as_bytes()).into();
            if right && memory.used.insert(step) {
                return Verdict::Accepted;
            }
        }
        Verdict::Rejected
    }

    /// Finds the step, oldest first, whose code would be accepted now and for some seconds more:
    /// one about to run out would be refused when it arrives.
    pub(crate) fn unused_step(&self, serial: &str, now: i64) -> Option<i64> {
        let memory = self.by_serial.get(serial);
        let unused = |step: &i64| memory.is_none_or(|memory| !memory.used.contains(step));
        let lasting = acceptable(now + MARGIN_SECONDS);
        acceptable(now).filter(|step| lasting.contains(step)).chain(acceptable(now)).find(unused)
    }

    /// Says how many attempts are left in the current window.
    pub(crate) fn attempts_left(&self, serial: &str, now: i64) -> u32 {
        match self.by_serial.get(serial) {
            Some(memory) if memory.window == window_at(now) => {
                ATTEMPTS_PER_WINDOW - memory.attempts
            }
            Some(_) | None => ATTEMPTS_PER_WINDOW,
        }
    }

    /// Forgets which codes were used, for a device with a new seed; its attempts stay spent.
    pub(crate) fn replaced(&mut self, serial: &str) {
        if let Some(memory) = self.by_serial.get_mut(serial) {
            memory.used.clear();
        }
    }
}

impl Memory {
    fn enter_window(&mut self, now: i64) {
        let window = window_at(now);
        if self.window != window {
            self.window = window;
            self.attempts = 0;
        }
        let oldest = totp::step_at(now) - WINDOW_STEPS;
        // A clock that is moved back must not bring used codes to life: keep a generous tail.
        self.used.retain(|step| *step >= oldest - 100);
    }
}

fn acceptable(now: i64) -> RangeInclusive<i64> {
    let current = totp::step_at(now);
    current - WINDOW_STEPS..=current + WINDOW_STEPS
}

fn window_at(now: i64) -> i64 {
    now.div_euclid(ATTEMPT_WINDOW_SECONDS)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEED: &[u8] = b"12345678901234567890";
    const SERIAL: &str = "arn:aws:iam::123456789012:mfa/alice";
    /// The start of an attempt window, so that a test fits into it.
    const START: i64 = 1_800_000_000;

    fn code(offset: i64) -> String {
        totp::code(SEED, totp::step_at(START) + offset)
    }

    #[test]
    fn a_code_is_good_for_two_steps_to_either_side() {
        for (offset, expected) in [
            (-3, Verdict::Rejected),
            (-2, Verdict::Accepted),
            (0, Verdict::Accepted),
            (2, Verdict::Accepted),
            (3, Verdict::Rejected),
        ] {
            let verdict = Devices::default().verify(SERIAL, SEED, &code(offset), START);
            assert_eq!(verdict, expected, "offset {offset}");
        }
    }

    #[test]
    fn a_code_about_to_run_out_is_handed_out_last() {
        let (devices, last_second) = (Devices::default(), START + 29);
        let first = totp::step_at(START) - WINDOW_STEPS;
        assert_eq!(devices.unused_step(SERIAL, START), Some(first));
        assert_eq!(devices.unused_step(SERIAL, last_second), Some(first + 1));
    }

    #[test]
    fn a_code_is_good_once_even_after_another_was_used() {
        let mut devices = Devices::default();
        assert_eq!(devices.verify(SERIAL, SEED, &code(1), START), Verdict::Accepted);
        assert_eq!(devices.verify(SERIAL, SEED, &code(0), START), Verdict::Accepted);
        assert_eq!(devices.verify(SERIAL, SEED, &code(1), START), Verdict::Rejected);
        assert_eq!(devices.verify(SERIAL, SEED, &code(0), START + 60), Verdict::Rejected);
    }

    #[test]
    fn right_wrong_and_used_codes_all_spend_an_attempt() {
        let mut devices = Devices::default();
        assert_eq!(devices.verify(SERIAL, SEED, &code(0), START), Verdict::Accepted);
        for _ in 0..4 {
            assert_eq!(devices.verify(SERIAL, SEED, &code(0), START), Verdict::Rejected);
            assert_eq!(devices.verify(SERIAL, SEED, &code(-50), START), Verdict::Rejected);
        }
        assert_eq!(devices.attempts_left(SERIAL, START), 0);
        assert_eq!(devices.verify(SERIAL, SEED, &code(1), START), Verdict::Exhausted);
        assert_eq!(devices.verify(SERIAL, SEED, &code(2), START + 179), Verdict::Exhausted);
        let later = totp::code(SEED, totp::step_at(START + 180));
        assert_eq!(devices.verify(SERIAL, SEED, &later, START + 180), Verdict::Accepted);
    }

    #[test]
    fn other_devices_keep_their_attempts() {
        let mut devices = Devices::default();
        for _ in 0..ATTEMPTS_PER_WINDOW {
            devices.verify(SERIAL, SEED, "000000", START);
        }
        assert_eq!(devices.verify("GAHT12345678", SEED, &code(0), START), Verdict::Accepted);
    }

    #[test]
    fn replacing_a_device_does_not_give_attempts_back() {
        let mut devices = Devices::default();
        for _ in 0..ATTEMPTS_PER_WINDOW {
            devices.verify(SERIAL, SEED, &code(0), START);
        }
        devices.replaced(SERIAL);
        assert_eq!(devices.verify(SERIAL, SEED, &code(0), START), Verdict::Exhausted);
    }

    #[test]
    fn the_oldest_unused_code_is_found() {
        let mut devices = Devices::default();
        let current = totp::step_at(START);
        assert_eq!(devices.unused_step(SERIAL, START), Some(current - 2));
        devices.verify(SERIAL, SEED, &code(-2), START);
        assert_eq!(devices.unused_step(SERIAL, START), Some(current - 1));
    }
}
