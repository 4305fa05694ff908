//! How often what one runner says of itself is recorded.
//!
//! Each record is a commit, and a runner could say something else with every stream that it opens.
//! An honest one says something new when it was set up or upgraded.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::seldom::Seldom;

/// How many times in a row, and how long until there is one more.
const MOST: u32 = 8;
const EACH: Duration = Duration::from_secs(30);

/// What is left of one runner's records.
#[derive(Debug)]
pub struct Budget {
    /// When all of it will be there again.
    whole: Mutex<Instant>,
    /// Tells of what was not recorded.
    pub(super) beyond: Seldom,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spending {
    Within,
    Beyond,
}

impl Default for Budget {
    fn default() -> Self {
        Self { whole: Mutex::new(Instant::now()), beyond: Seldom::default() }
    }
}

impl Budget {
    /// Takes one, if one is left.
    pub fn spend(&self) -> Spending {
        let now = Instant::now();
        // Nothing that holds it can panic halfway.
        let mut whole = self.whole.lock().unwrap_or_else(PoisonError::into_inner);
        let next = (*whole).max(now) + EACH;
        if next > now + EACH * MOST {
            return Spending::Beyond;
        }
        *whole = next;
        Spending::Within
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn eight_in_a_row_and_then_one_each_half_minute() {
        let budget = Budget::default();
        let within = || (0..100).filter(|_| budget.spend() == Spending::Within).count();
        assert_eq!(within(), 8);
        for _ in 0..3 {
            tokio::time::advance(EACH).await;
            assert_eq!(within(), 1);
        }
        tokio::time::advance(EACH * 100).await;
        assert_eq!(within(), 8);
    }
}
