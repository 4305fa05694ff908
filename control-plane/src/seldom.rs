//! How often something is told that others can cause without bound: once a minute, with how often
//! it was.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

const EACH: Duration = Duration::from_secs(60);

#[derive(Debug, Default)]
pub(crate) struct Seldom(Mutex<Untold>);

#[derive(Debug, Default)]
struct Untold {
    told: Option<Instant>,
    times: u64,
}

impl Seldom {
    /// Counts it, and answers how often it was since it was last told, if it is to be told now.
    pub(crate) fn count(&self) -> Option<u64> {
        let now = Instant::now();
        // Nothing that holds it can panic halfway.
        let mut untold = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        untold.times += 1;
        if untold.told.is_some_and(|told| now.duration_since(told) < EACH) {
            return None;
        }
        untold.told = Some(now);
        Some(std::mem::take(&mut untold.times))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn it_is_told_at_once_and_then_once_a_minute_with_how_often_it_was() {
        let seldom = Seldom::default();
        let told = || (0..1000).filter_map(|_| seldom.count()).collect::<Vec<_>>();
        assert_eq!(told(), [1]);
        tokio::time::advance(EACH / 2).await;
        assert!(told().is_empty());
        tokio::time::advance(EACH / 2).await;
        assert_eq!(told(), [2000]);
    }
}
