//! Places for what is on its way in, so that nobody fills the disk, the memory or the threads of
//! the process with what is not recorded yet.
//!
//! A runner has few places, and waits for one a while: an honest one never does. So has an
//! environment for the states of people, and an organization for all of its own. What is refused
//! for want of a place is refused with a reason that its sender tries again.
//!
//! Who waits does so for their own places first, and meanwhile takes none from others.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use latchkey_domain::id::{EnvironmentId, OrganizationId, RunnerId};
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

/// How many states of people may be on their way in: of all, of one organization and to one
/// environment.
const MOST_STATES: usize = 32;
const MOST_STATES_OF_ORGANIZATION: usize = 8;
const MOST_STATES_TO_ENVIRONMENT: usize = 2;

/// How many states are parsed at once: each keeps a thread busy.
const MOST_PARSED: usize = 32;

/// How long an upload waits for a place.
const PATIENCE: Duration = Duration::from_secs(20);

/// What is on its way into this process.
#[derive(Debug)]
pub struct Uploads {
    archives: Arc<Semaphore>,
    artifacts: Arc<Semaphore>,
    artifacts_of: Shares<RunnerId>,
    mebibytes_of: Shares<RunnerId>,
    parsing: Semaphore,
    states: Arc<Semaphore>,
    states_of: Shares<OrganizationId>,
    states_to: Shares<EnvironmentId>,
    /// One piece of work at a time has whole states in memory, and one of each organization waits
    /// to be it.
    whole: Arc<Semaphore>,
    whole_of: Shares<OrganizationId>,
    /// Orders what changes the totals of quarantine, so that many that come at once don't run
    /// each other's races over and over. The store decides all the same.
    pub(super) quarantine: tokio::sync::Mutex<()>,
    /// What was told and found of quarantines that are full.
    pub(super) full: Full,
    /// One collection of garbage at a time.
    pub(super) collection: tokio::sync::Mutex<Collection>,
}

/// An artifact's place, until it is dropped: its runner's, its bytes' and one of all.
pub(super) type Place = [OwnedSemaphorePermit; 3];

/// A state's place: its environment's, its organization's and one of all.
pub(super) type StatePlace = [OwnedSemaphorePermit; 3];

/// The turn to have whole states in memory: its organization's and that of all.
pub(super) type Turn = [OwnedSemaphorePermit; 2];

/// So much for each of those who come and go.
#[derive(Debug)]
struct Shares<K> {
    each: usize,
    /// Kept alive by their permits and by who waits for one.
    known: Mutex<HashMap<K, Weak<Semaphore>>>,
}

impl<K: Eq + Hash> Shares<K> {
    fn new(each: usize) -> Self {
        Self { each, known: Mutex::default() }
    }

    fn of(&self, who: K) -> Arc<Semaphore> {
        // Nothing that holds it can panic halfway.
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(share) = known.get(&who).and_then(Weak::upgrade) {
            return share;
        }
        known.retain(|_, share| share.strong_count() > 0);
        let share = Arc::new(Semaphore::new(self.each));
        known.insert(who, Arc::downgrade(&share));
        share
    }
}

impl Default for Uploads {
    fn default() -> Self {
        Self {
            archives: Arc::new(Semaphore::new(MOST_ARCHIVES)),
            artifacts: Arc::new(Semaphore::new(MOST)),
            artifacts_of: Shares::new(MOST_OF_RUNNER),
            mebibytes_of: Shares::new(MEBIBYTES_OF_RUNNER),
            parsing: Semaphore::new(MOST_PARSED),
            states: Arc::new(Semaphore::new(MOST_STATES)),
            states_of: Shares::new(MOST_STATES_OF_ORGANIZATION),
            states_to: Shares::new(MOST_STATES_TO_ENVIRONMENT),
            whole: Arc::new(Semaphore::new(1)),
            whole_of: Shares::new(1),
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
        let mebibytes = u32::try_from(size.div_ceil(1 << 20)).unwrap_or(u32::MAX);
        let permits = async {
            let count = self.artifacts_of.of(runner).acquire_owned().await?;
            let bytes = self.mebibytes_of.of(runner).acquire_many_owned(mebibytes).await?;
            let place = Arc::clone(&self.artifacts).acquire_owned().await?;
            Ok::<_, tokio::sync::AcquireError>([count, bytes, place])
        };
        match tokio::time::timeout(PATIENCE, permits).await {
            Ok(permits) => permits.map_err(Error::internal),
            Err(_) => Err(Error::refused(
                Reason::StoreUnavailable,
                "too many uploads are on their way in; send it again when others have ended",
            )
            .with("limit", MOST_OF_RUNNER.to_string())),
        }
    }

    /// Waits for a place for a state that a person sends.
    pub(super) async fn state(
        &self,
        organization: OrganizationId,
        environment: EnvironmentId,
    ) -> Result<StatePlace> {
        let permits = async {
            let to = self.states_to.of(environment).acquire_owned().await?;
            let of = self.states_of.of(organization).acquire_owned().await?;
            let place = Arc::clone(&self.states).acquire_owned().await?;
            Ok::<_, tokio::sync::AcquireError>([to, of, place])
        };
        match tokio::time::timeout(PATIENCE, permits).await {
            Ok(permits) => permits.map_err(Error::internal),
            Err(_) => Err(Error::refused(
                Reason::StoreUnavailable,
                "too many states are on their way in; send it again in a moment",
            )),
        }
    }

    /// Waits for the turn to have whole states in memory. It goes with the work, whoever waits.
    pub(super) async fn whole(&self, organization: OrganizationId) -> Result<Turn> {
        let of = self.whole_of.of(organization).acquire_owned().await.map_err(Error::internal)?;
        let all = Arc::clone(&self.whole).acquire_owned().await.map_err(Error::internal)?;
        Ok([of, all])
    }

    pub(super) async fn parse(&self) -> Result<SemaphorePermit<'_>> {
        self.parsing.acquire().await.map_err(Error::internal)
    }
}

#[cfg(test)]
mod tests {
    use std::task::Poll;

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
        drop(uploads.artifact(other, 4 << 30).await.unwrap());
    }

    #[tokio::test]
    async fn of_each_organization_one_waits_for_the_turn_of_all() {
        let uploads = Uploads::default();
        let (one, other) =
            (OrganizationId::from_bytes([1; 16]), OrganizationId::from_bytes([2; 16]));
        let turn = uploads.whole(one).await.unwrap();
        let mut before: Vec<_> = (0..9).map(|_| Box::pin(uploads.whole(one))).collect();
        let mut other = Box::pin(uploads.whole(other));
        let all_wait = std::future::poll_fn(|context| {
            let mut waits = before.iter_mut().map(|one| one.as_mut().poll(context).is_pending());
            Poll::Ready(waits.all(|waits| waits) && other.as_mut().poll(context).is_pending())
        });
        assert!(all_wait.await);
        drop(turn);
        // Though the others came before.
        drop(other.await.unwrap());
    }
}
