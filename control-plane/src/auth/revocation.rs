//! Tells the open streams of a runner that its identity has ended.
//!
//! The layer in front of the services looks at the store on every call; a stream that is open
//! by then learns of it here. A stream asks after the layer let it pass, and who revokes tells
//! after the commit: so whichever comes first, no stream misses it.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use latchkey_domain::id::RunnerId;
use tokio::sync::watch;

/// The runners that have or had a stream here, and those that were revoked here.
#[derive(Debug, Default)]
pub struct Revocations(Mutex<HashMap<RunnerId, watch::Sender<bool>>>);

/// One stream's ear.
#[derive(Clone, Debug)]
pub struct Revocation(watch::Receiver<bool>);

impl Revocations {
    pub fn of(&self, runner: RunnerId) -> Revocation {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        Revocation(known.entry(runner).or_insert_with(|| watch::Sender::new(false)).subscribe())
    }

    /// Ends every stream of the runner, now and from now on.
    pub fn revoke(&self, runner: RunnerId) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.entry(runner).or_insert_with(|| watch::Sender::new(false)).send_replace(true);
    }
}

impl Revocation {
    /// Resolves when the runner is revoked, at once if it is already.
    pub async fn revoked(mut self) {
        if self.0.wait_for(|revoked| *revoked).await.is_err() {
            // The registry lives as long as the process.
            std::future::pending::<()>().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn who_listens_before_and_who_listens_after_learn_of_it() {
        let revocations = Revocations::default();
        let (one, other) = (RunnerId::from_bytes([1; 16]), RunnerId::from_bytes([2; 16]));
        let before = revocations.of(one);
        revocations.revoke(one);
        before.revoked().await;
        revocations.of(one).revoked().await;
        let waiting = revocations.of(other).revoked();
        tokio::select! {
            biased;
            () = waiting => panic!("another runner's revocation"),
            () = std::future::ready(()) => {}
        }
    }
}
