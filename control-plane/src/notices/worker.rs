//! The one task that sees notices on their way.
//!
//! The outbox in the store is the truth; [`super::schedule`] knows when each of its entries is
//! due, by the monotonic clock. At a start all is listed; then the store's feed tells what was
//! added. What is in the middle of an attempt when the process dies is due again when the attempt
//! would have ended: the claim says so.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};
use tracing::Instrument;

pub use super::schedule::QUEUE;
use super::schedule::{Ended, Place, Schedule};
use super::{Attempt, webhook};
use crate::app::App;
use crate::app::notices::{Claimed, Next, Target};
use crate::error::Result;
use crate::seal::random;
use crate::store::keys::{self, Kind};
use crate::store::{Key, Seen, What};

/// How soon something that failed here, in the store, is tried again.
const AGAIN: Duration = Duration::from_secs(30);

/// Delivers until the store is closed.
pub async fn run(app: Arc<App>) {
    let mut worker = Worker {
        schedule: Schedule::new(app.outbound.pace),
        app,
        running: HashMap::new(),
        attempts: JoinSet::new(),
        relist: None,
    };
    // Before the listing, so that nothing falls between.
    let mut feed = worker.app.store.watch(keys::all(Kind::Outbox));
    worker.list().await;
    loop {
        worker.start_due();
        let next = worker.schedule.next().into_iter().chain(worker.relist).min();
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
    schedule: Schedule,
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
                self.schedule.remove(&place);
            }
            What::Put if self.schedule.knows(&place) => {}
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

    fn add(&mut self, place: Place, wait: Duration) {
        if !self.schedule.knows(&place) {
            // A clock that was set must not keep anything back for longer than a retry would.
            let wait = wait.min(self.app.outbound.pace.longest.max(AGAIN * 2));
            self.schedule.add(place, Instant::now() + wait);
        }
    }

    /// Drops the oldest of each subscriber who has more on their way than they may.
    async fn keep_bounds(&mut self) {
        for (organization, places) in self.schedule.beyond_bounds() {
            match self.app.drop_notices(organization, &places).await {
                Ok(()) => places.iter().for_each(|place| self.schedule.remove(place)),
                Err(error) => tracing::warn!(error = %error, "notices could not be dropped"),
            }
        }
    }

    fn start_due(&mut self) {
        while let Some(place) = self.schedule.take(Instant::now()) {
            let span = tracing::info_span!("deliver", delivery = %place.2);
            let attempt = attempt(Arc::clone(&self.app), place).instrument(span);
            let id = self.attempts.spawn(attempt).id();
            self.running.insert(id, place);
        }
    }

    fn ended(&mut self, id: tokio::task::Id, next: Next) {
        let Some(place) = self.running.remove(&id) else { return };
        let ended = match next {
            Next::Delivered => Ended::Accepted,
            Next::GivenUp => Ended::Failed(None),
            Next::In(wait) => Ended::Failed(Some(wait)),
            Next::Over => Ended::Idle,
        };
        self.schedule.ended(place, ended, Instant::now(), u32::from_be_bytes(random()));
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
