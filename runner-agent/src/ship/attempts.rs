//! Trying again, for as long as it takes: how long to wait, and how often to say why.
//!
//! A control plane may refuse everything for days, until it is restored. Then the same is said
//! again only at growing distances.

use std::time::{Duration, Instant};

use super::{Failure, Shipper, Standing};
use crate::backoff::Backoff;
use crate::random;

/// How long a reason is not said again after the first time; twice as long after each next.
const FIRST_SILENCE: Duration = Duration::from_secs(60);

const LONGEST_SILENCE: Duration = Duration::from_secs(4 * 3600);

/// Reasons that are remembered.
const MOST: usize = 8;

/// The attempts at one thing.
#[derive(Debug)]
pub(super) struct Attempts {
    /// Reads after "failed to".
    what: &'static str,
    backoff: Backoff,
    complaints: Complaints,
}

impl Attempts {
    pub(super) fn at(what: &'static str) -> Self {
        let backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(30));
        Self { what, backoff, complaints: Complaints::default() }
    }

    /// Something was taken meanwhile. What was said need not be said again for that.
    pub(super) fn reset(&mut self) {
        self.backoff.reset();
    }
}

impl Shipper {
    /// Waits until the next attempt.
    pub(super) async fn pause(&self, attempts: &mut Attempts, failure: &Failure) {
        if matches!(failure, Failure::LeaseLost) {
            self.stand(|standing| standing == Standing::InDoubt, Standing::Lost);
        }
        let reason = match failure {
            Failure::Again(reason) => reason.clone(),
            Failure::Offset(expected) => format!("offset {expected} is expected"),
            Failure::LeaseLost => "the lease is lost".into(),
            Failure::Refused(reason) => reason.clone(),
            Failure::Local(error) => error.to_string(),
        };
        let wait = attempts.backoff.next(random::fraction());
        let (run_id, epoch, what) = (&self.lease.run_id, self.lease.epoch, attempts.what);
        match attempts.complaints.about(&reason, Instant::now()) {
            Some(0) => tracing::warn!(%run_id, epoch, %reason, ?wait, "failed to {what}"),
            Some(unsaid) => {
                tracing::warn!(%run_id, epoch, %reason, ?wait, unsaid, "failed to {what}, still");
            }
            None => tracing::debug!(%run_id, epoch, %reason, ?wait, "failed to {what}, still"),
        }
        tokio::time::sleep(wait).await;
    }
}

/// What was said, and when it is to be said again. Pure: the time is an argument.
#[derive(Debug, Default)]
struct Complaints(Vec<Complaint>);

#[derive(Debug)]
struct Complaint {
    about: String,
    silent_until: Instant,
    silence: Duration,
    unsaid: u32,
}

impl Complaints {
    /// Answers whether the reason is to be said now, and how often it was not since the last time.
    fn about(&mut self, reason: &str, now: Instant) -> Option<u32> {
        // Ports, offsets and times make no other reason.
        let about: String = reason.chars().filter(|c| !c.is_ascii_digit()).collect();
        let Some(known) = self.0.iter_mut().find(|known| known.about == about) else {
            if self.0.len() == MOST {
                self.0.remove(0);
            }
            let (silence, silent_until) = (FIRST_SILENCE, now + FIRST_SILENCE);
            self.0.push(Complaint { about, silent_until, silence, unsaid: 0 });
            return Some(0);
        };
        if now < known.silent_until {
            known.unsaid = known.unsaid.saturating_add(1);
            return None;
        }
        known.silence = (known.silence * 2).min(LONGEST_SILENCE);
        known.silent_until = now + known.silence;
        Some(std::mem::take(&mut known.unsaid))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const REFUSED: &str = "FailedPrecondition: this control plane has lost a part of its history";

    #[test]
    fn a_refusal_that_stands_for_a_day_is_said_a_few_times() {
        let (mut complaints, begin) = (Complaints::default(), Instant::now());
        let tries = (0..24 * 3600).step_by(15);
        let said: Vec<_> = tries
            .filter_map(|second| {
                let now = begin + Duration::from_secs(second);
                complaints.about(REFUSED, now).map(|unsaid| (second, unsaid))
            })
            .collect();
        assert_eq!(said[..4], [(0, 0), (60, 3), (180, 7), (420, 15)]);
        assert!(said.len() <= 14, "{said:?}");
    }

    #[test]
    fn another_reason_is_said_at_once_and_two_that_take_turns_are_not_said_each_time() {
        let (mut complaints, now) = (Complaints::default(), Instant::now());
        assert_eq!(complaints.about(REFUSED, now), Some(0));
        assert_eq!(complaints.about("Unavailable: connect to port 4711", now), Some(0));
        for _ in 0..10 {
            assert_eq!(complaints.about(REFUSED, now), None);
            assert_eq!(complaints.about("Unavailable: connect to port 4712", now), None);
        }
        assert_eq!(complaints.about(REFUSED, now + FIRST_SILENCE), Some(10));
    }

    #[test]
    fn reasons_do_not_pile_up() {
        let mut complaints = Complaints::default();
        for letters in 1..100 {
            complaints.about(&"x".repeat(letters), Instant::now());
        }
        assert_eq!(complaints.0.len(), MOST);
    }
}
