//! The one task that sees notices on their way.
//!
//! The outbox in the store is the truth; here is when each of its entries is due, by the
//! monotonic clock. At a start all is listed; then the store's feed tells what was added. A
//! subscriber gets one notice at a time and an organization two, so that a slow one holds up
//! nobody else. What is in the middle of an attempt when the process dies is due again when the
//! attempt would have ended: the claim says so.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use latchkey_domain::id::{DeliveryId, OrganizationId, SubscriberId};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};
use tracing::Instrument;

use super::{Attempt, webhook};
use crate::app::App;
use crate::app::notices::{Claimed, Next, Target};
use crate::error::Result;
use crate::store::keys::{self, Kind};
use crate::store::{Key, Seen, What};

/// Notices of one organization that are on their way at a time; the oldest is dropped.
pub const QUEUE: usize = 1000;

/// Attempts at a time, of all and of one organization.
const ATTEMPTS: usize = 32;
const ATTEMPTS_EACH: usize = 2;

/// How soon something that failed here, in the store, is tried again.
const AGAIN: Duration = Duration::from_secs(30);

type Place = (OrganizationId, SubscriberId, DeliveryId);

/// Delivers until the store is closed.
pub async fn run(app: Arc<App>) {
    let mut worker = Worker {
        app,
        due: BTreeMap::new(),
        running: HashMap::new(),
        attempts: JoinSet::new(),
        relist: None,
    };
    // Before the listing, so that nothing falls between.
    let mut feed = worker.app.store.watch(keys::all(Kind::Outbox));
    worker.list().await;
    loop {
        worker.start_due();
        let next = worker.next_due();
        let wake = async {
            match next {
                Some(at) => sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            seen = feed.next() => match seen {
                Seen::Change(change) => worker.learn(change.key, change.what).await,
                Seen::Lagged => worker.list().await,
                Seen::Closed => return,
            },
            Some(ended) = worker.attempts.join_next_with_id() => match ended {
                Ok((id, next)) => worker.ended(id, next),
                Err(error) => {
                    tracing::error!(error = %error, "an attempt to deliver a notice panicked");
                    worker.ended(error.id(), Next::In(AGAIN));
                }
            },
            () = wake => {
                if worker.relist.is_some_and(|at| at <= Instant::now()) {
                    worker.list().await;
                }
            }
        }
    }
}

struct Worker {
    app: Arc<App>,
    /// What waits, and until when.
    due: BTreeMap<Place, Instant>,
    /// What is being attempted.
    running: HashMap<tokio::task::Id, Place>,
    attempts: JoinSet<Next>,
    /// Set when the store could not be read.
    relist: Option<Instant>,
}

impl Worker {
    async fn list(&mut self) {
        self.relist = None;
        match self.app.outbox().await {
            Ok(waiting) => {
                for (place, wait) in waiting {
                    self.add(place, wait);
                }
            }
            Err(error) => {
                tracing::warn!(error = %error, "notices cannot be listed");
                self.relist = Some(Instant::now() + AGAIN);
            }
        }
        self.keep_bounds().await;
    }

    /// Takes note of a change of the outbox. Our own are known already.
    async fn learn(&mut self, key: Key, what: What) {
        let Some(place) = keys::read_outbox(&key) else { return };
        match what {
            What::Deleted => {
                self.due.remove(&place);
            }
            What::Put if self.knows(&place) => {}
            What::Put => {
                match self.app.outbox_wait(&key).await {
                    Ok(Some(wait)) => self.add(place, wait),
                    Ok(None) => return,
                    Err(_) => self.add(place, AGAIN),
                }
                self.keep_bounds().await;
            }
        }
    }

    fn knows(&self, place: &Place) -> bool {
        self.due.contains_key(place) || self.running.values().any(|running| running == place)
    }

    fn add(&mut self, place: Place, wait: Duration) {
        if !self.knows(&place) {
            // A clock that was set must not keep anything back for longer than a retry would.
            let wait = wait.min(self.app.outbound.pace.longest.max(AGAIN * 2));
            self.due.insert(place, Instant::now() + wait);
        }
    }

    /// Drops the oldest of each organization that has more on their way than it may.
    async fn keep_bounds(&mut self) {
        let mut counts: BTreeMap<OrganizationId, usize> = BTreeMap::new();
        for (organization, _, _) in self.due.keys() {
            *counts.entry(*organization).or_default() += 1;
        }
        for (organization, count) in counts.into_iter().filter(|(_, count)| *count > QUEUE) {
            let mut places: Vec<Place> =
                self.due.keys().filter(|(owner, _, _)| *owner == organization).copied().collect();
            places.sort_by_key(|(_, _, delivery)| *delivery);
            places.truncate(count - QUEUE);
            match self.app.drop_notices(organization, &places).await {
                Ok(()) => places.iter().for_each(|place| {
                    self.due.remove(place);
                }),
                Err(error) => tracing::warn!(error = %error, "notices could not be dropped"),
            }
        }
    }

    fn next_due(&self) -> Option<Instant> {
        let free = self.attempts.len() < ATTEMPTS;
        let startable = |(place, at): (&Place, &Instant)| self.is_free(place).then_some(*at);
        let next = self.due.iter().filter_map(startable).min().filter(|_| free);
        next.into_iter().chain(self.relist).min()
    }

    /// Tells whether nothing is in a notice's way but its time.
    fn is_free(&self, (organization, subscriber, _): &Place) -> bool {
        let mut of_organization = 0;
        for (owner, other, _) in self.running.values() {
            if other == subscriber {
                return false;
            }
            of_organization += usize::from(owner == organization);
        }
        of_organization < ATTEMPTS_EACH
    }

    fn start_due(&mut self) {
        let now = Instant::now();
        let mut ready: Vec<(Instant, Place)> = self
            .due
            .iter()
            .filter(|(_, at)| **at <= now)
            .map(|(place, at)| (*at, *place))
            .collect();
        ready.sort_unstable_by_key(|(at, (_, _, delivery))| (*at, *delivery));
        for (_, place) in ready {
            if self.attempts.len() >= ATTEMPTS {
                return;
            }
            if !self.is_free(&place) {
                continue;
            }
            self.due.remove(&place);
            let span = tracing::info_span!("deliver", delivery = %place.2);
            let attempt = attempt(Arc::clone(&self.app), place).instrument(span);
            let id = self.attempts.spawn(attempt).id();
            self.running.insert(id, place);
        }
    }

    fn ended(&mut self, id: tokio::task::Id, next: Next) {
        let Some(place) = self.running.remove(&id) else { return };
        match next {
            Next::Over => {}
            Next::In(wait) => self.add(place, wait),
        }
    }
}

/// Claims, sends and settles one delivery.
async fn attempt(app: Arc<App>, place: Place) -> Next {
    let done: Result<Next> = async {
        let Some(claimed) = app.claim_delivery(place).await? else { return Ok(Next::Over) };
        let sent = send(&app, &claimed).await;
        app.settle_delivery(claimed, sent).await
    }
    .await;
    done.unwrap_or_else(|error| {
        tracing::warn!(error = %error, "a delivery could not be settled; it is tried again");
        Next::In(AGAIN)
    })
}

async fn send(app: &App, claimed: &Claimed) -> Attempt {
    let outbound = &app.outbound;
    let told = (claimed.delivery.id.0, &claimed.delivery.notice);
    match &claimed.target {
        Target::Webhook { url, secret } => {
            webhook::deliver(outbound, url, secret, told, app.now()).await
        }
        Target::Mail { address } => match &outbound.mailer {
            Some(mailer) => mailer.deliver(address, told, outbound.public_url.as_deref()).await,
            None => Attempt::failed("the operator configured no mail server"),
        },
    }
}
