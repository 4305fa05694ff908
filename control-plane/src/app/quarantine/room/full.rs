//! What this process remembers of quarantines that are full, since runners try on and on: that it
//! was told, and that a look at all there is found too little that gives way.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use latchkey_domain::id::OrganizationId;
use tokio::time::Instant;

use super::Excess;

/// How often it is told that an organization's quarantine is full.
const TELL: Duration = Duration::from_secs(3600);

/// For how long what was found is taken to be all there is. More may have come; then somebody is
/// refused who would not have to be, and tries again.
const REMEMBER: Duration = Duration::from_secs(5);

#[derive(Debug, Default)]
pub(in crate::app) struct Full {
    told: Mutex<HashMap<OrganizationId, Instant>>,
    gives_way: Mutex<HashMap<OrganizationId, (Instant, Excess)>>,
}

/// Forgets that it was told, unless it was.
#[derive(Debug)]
#[must_use]
pub(super) struct Telling<'a> {
    told: Option<(&'a Full, OrganizationId)>,
}

impl Full {
    /// Answers whether it is to be told now; nobody else is told so meanwhile.
    pub(super) fn tell(&self, organization: OrganizationId) -> Option<Telling<'_>> {
        let now = Instant::now();
        let mut told = locked(&self.told);
        told.retain(|_, at| now.duration_since(*at) < TELL);
        if told.contains_key(&organization) {
            return None;
        }
        told.insert(organization, now);
        Some(Telling { told: Some((self, organization)) })
    }

    /// Remembers all that gives way.
    pub(super) fn remember(&self, organization: OrganizationId, all: Excess) {
        locked(&self.gives_way).insert(organization, (Instant::now(), all));
    }

    /// Tells whether it is known that too little gives way, if something new takes the place of
    /// what counts as `own`. Where something was dropped since, there is less of an excess too.
    pub(super) fn is_more_than_gives_way(
        &self,
        organization: OrganizationId,
        excess: Excess,
        own: Excess,
    ) -> bool {
        let now = Instant::now();
        let mut gives_way = locked(&self.gives_way);
        gives_way.retain(|_, (at, _)| now.duration_since(*at) < REMEMBER);
        gives_way.get(&organization).is_some_and(|(_, all)| {
            excess.bytes > all.bytes.saturating_sub(own.bytes)
                || excess.entries > all.entries.saturating_sub(own.entries)
        })
    }
}

impl Telling<'_> {
    pub(super) fn done(mut self) {
        self.told = None;
    }
}

impl Drop for Telling<'_> {
    fn drop(&mut self) {
        if let Some((full, organization)) = self.told {
            locked(&full.told).remove(&organization);
        }
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing that holds one can panic halfway.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ORGANIZATION: OrganizationId = OrganizationId::from_bytes([1; 16]);

    #[tokio::test(start_paused = true)]
    async fn what_could_not_be_told_is_told_the_next_time_and_then_once_an_hour() {
        let full = Full::default();
        let first = full.tell(ORGANIZATION);
        assert!(first.is_some() && full.tell(ORGANIZATION).is_none());
        // Its caller hung up, or the commit failed.
        drop(first);
        full.tell(ORGANIZATION).unwrap().done();
        assert!(full.tell(ORGANIZATION).is_none());
        tokio::time::advance(TELL).await;
        assert!(full.tell(ORGANIZATION).is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn what_gives_way_is_remembered_for_some_seconds() {
        let full = Full::default();
        let of = |entries, bytes| Excess { entries, bytes };
        let too_much = |excess, own| full.is_more_than_gives_way(ORGANIZATION, excess, own);
        assert!(!too_much(of(9, 9), of(0, 0)));
        full.remember(ORGANIZATION, of(2, 100));
        assert!(too_much(of(0, 101), of(0, 0)) && too_much(of(3, 0), of(0, 0)));
        assert!(!too_much(of(2, 100), of(0, 0)));
        // What is replaced does not give way beside that.
        assert!(too_much(of(0, 100), of(1, 1)) && too_much(of(2, 0), of(1, 0)));
        tokio::time::advance(REMEMBER).await;
        assert!(!too_much(of(0, 101), of(0, 0)));
    }
}
