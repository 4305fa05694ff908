//! Places for what is on its way in, so that nobody fills the disk or the threads of the process
//! with what is not recorded yet.
//!
//! A runner has few places, and waits for one a while: an honest one never does. What is refused
//! for want of a place is refused with a reason that its sender tries again.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use latchkey_domain::id::RunnerId;
use latchkey_proto::v1::Reason;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, SemaphorePermit};

use super::garbage::Collection;
use super::quarantine::Full;
use crate::error::{Error, Result};

/// How many archives may be on their way in.
pub const MOST_ARCHIVES: usize = 32;

/// How many artifacts may be on their way in, of all runners and of one.
const MOST: usize = 512;
const MOST_OF_RUNNER: usize = 16;

/// How many MiB of artifacts of one runner may be on their way in, as their headers announce.
const MEBIBYTES_OF_RUNNER: usize = 4096;

/// How many states of people may be on their way in.
const MOST_STATES: usize = 8;

/// How many states are parsed at once: each keeps a thread busy.
const MOST_PARSED: usize = 32;

/// How long an upload waits for a place.
const PATIENCE: Duration = Duration::from_secs(20);

/// What is on its way into this process.
#[derive(Debug)]
pub struct Uploads {
    archives: Arc<Semaphore>,
    artifacts: Arc<Semaphore>,
    runners: Mutex<HashMap<RunnerId, Weak<OfRunner>>>,
    parsing: Semaphore,
    states: Arc<Semaphore>,
    /// One comparison of states at a time: both are in memory.
    pub(super) comparing: tokio::sync::Mutex<()>,
    /// Orders what changes the totals of quarantine, so that many that come at once don't run
    /// each other's races over and over. The store decides all the same.
    pub(super) quarantine: tokio::sync::Mutex<()>,
    /// What was told and found of quarantines that are full.
    pub(super) full: Full,
    /// One collection of garbage at a time.
    pub(super) collection: tokio::sync::Mutex<Collection>,
}

#[derive(Debug)]
struct OfRunner {
    count: Arc<Semaphore>,
    mebibytes: Arc<Semaphore>,
}

/// An upload's place, until it is dropped.
#[derive(Debug)]
pub(super) struct Place {
    _runner: Arc<OfRunner>,
    _permits: [OwnedSemaphorePermit; 3],
}

impl Default for Uploads {
    fn default() -> Self {
        Self {
            archives: Arc::new(Semaphore::new(MOST_ARCHIVES)),
            artifacts: Arc::new(Semaphore::new(MOST)),
            runners: Mutex::default(),
            parsing: Semaphore::new(MOST_PARSED),
            states: Arc::new(Semaphore::new(MOST_STATES)),
            comparing: tokio::sync::Mutex::default(),
            quarantine: tokio::sync::Mutex::default(),
            full: Full::default(),
            collection: tokio::sync::Mutex::default(),
        }
    }
}

impl Uploads {
    /// Takes a place for an archive; `None` when all are taken.
    pub(super) fn archive(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.archives).try_acquire_owned().ok()
    }

    /// Waits for a place for an artifact.
    pub(super) async fn artifact(&self, runner: RunnerId, size: u64) -> Result<Place> {
        let of_runner = self.of_runner(runner);
        let mebibytes = u32::try_from(size.div_ceil(1 << 20)).unwrap_or(u32::MAX);
        let permits = async {
            // The runner's own first: whoever waits for them takes no place from others.
            let count = Arc::clone(&of_runner.count).acquire_owned().await?;
            let bytes = Arc::clone(&of_runner.mebibytes).acquire_many_owned(mebibytes).await?;
            let place = Arc::clone(&self.artifacts).acquire_owned().await?;
            Ok::<_, tokio::sync::AcquireError>([count, bytes, place])
        };
        match tokio::time::timeout(PATIENCE, permits).await {
            Ok(permits) => {
                let permits = permits.map_err(Error::internal)?;
                Ok(Place { _runner: of_runner, _permits: permits })
            }
            Err(_) => Err(Error::refused(
                Reason::StoreUnavailable,
                "too many uploads are on their way in; send it again when others have ended",
            )
            .with("limit", MOST_OF_RUNNER.to_string())),
        }
    }

    /// Waits for a place for a state that a person sends.
    pub(super) async fn state(&self) -> Result<OwnedSemaphorePermit> {
        match tokio::time::timeout(PATIENCE, Arc::clone(&self.states).acquire_owned()).await {
            Ok(permit) => permit.map_err(Error::internal),
            Err(_) => Err(Error::refused(
                Reason::StoreUnavailable,
                "too many states are on their way in; send it again in a moment",
            )),
        }
    }

    pub(super) async fn parse(&self) -> Result<SemaphorePermit<'_>> {
        self.parsing.acquire().await.map_err(Error::internal)
    }

    fn of_runner(&self, runner: RunnerId) -> Arc<OfRunner> {
        let mut runners = self.runners();
        if let Some(known) = runners.get(&runner).and_then(Weak::upgrade) {
            return known;
        }
        runners.retain(|_, known| known.strong_count() > 0);
        let new = Arc::new(OfRunner {
            count: Arc::new(Semaphore::new(MOST_OF_RUNNER)),
            mebibytes: Arc::new(Semaphore::new(MEBIBYTES_OF_RUNNER)),
        });
        runners.insert(runner, Arc::downgrade(&new));
        new
    }

    fn runners(&self) -> MutexGuard<'_, HashMap<RunnerId, Weak<OfRunner>>> {
        // Nothing that holds it can panic halfway.
        self.runners.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_runner_has_sixteen_uploads_and_four_gibibytes_under_way_and_takes_nothing_from_others()
     {
        let uploads = Uploads::default();
        let (one, other) = (RunnerId::from_bytes([1; 16]), RunnerId::from_bytes([2; 16]));
        let mut places = vec![];
        for _ in 0..16 {
            places.push(uploads.artifact(one, 1).await.unwrap());
        }
        let refused = uploads.artifact(one, 1).await.unwrap_err();
        // Not one that the runner takes as final.
        assert_eq!(refused.reason(), Reason::StoreUnavailable);
        places.truncate(15);
        drop(uploads.artifact(one, 1).await.unwrap());

        let large =
            [uploads.artifact(other, 2 << 30).await, uploads.artifact(other, 2 << 30).await];
        assert!(large.iter().all(Result::is_ok));
        assert!(uploads.artifact(other, 1).await.is_err());
        drop(large);
        uploads.artifact(other, 4 << 30).await.unwrap();
    }
}
