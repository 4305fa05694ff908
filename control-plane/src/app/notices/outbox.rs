//! The outbox as the worker sees it: what is on its way, claims, outcomes.
//!
//! A claim counts the attempt and says until when it may take, before anything is sent: should
//! the process die in between, somebody tries again after that.

use std::time::Duration;

use latchkey_domain::id::{DeliveryId, OrganizationId, SubscriberId};
use latchkey_domain::time::Timestamp;
use secrecy::SecretString;

use super::{App, REMEMBERED};
use crate::error::Result;
use crate::notices::{Attempt, DETAIL, mail, webhook};
use crate::seal::random;
use crate::store::keys::Kind;
use crate::store::record::notice::{Delivery, DeliveryState, Outcome, Subscriptions};
use crate::store::record::{Loaded, decode, encode};
use crate::store::{Batch, CommitError, Expect, Key, Scan, Version, keys};

/// How much longer than an attempt its claim stands.
const MARGIN: Duration = Duration::from_secs(10);

/// Remembered deliveries that one settlement prunes.
const PRUNED: usize = 20;

type Place = (OrganizationId, SubscriberId, DeliveryId);

/// A delivery that is this process's to attempt.
#[derive(Debug)]
pub struct Claimed {
    place: Place,
    version: Version,
    pub delivery: Delivery,
    pub target: Target,
}

/// Where a notice goes.
#[derive(Debug)]
pub enum Target {
    Webhook { url: String, secret: SecretString },
    Mail { address: String },
}

impl Target {
    const fn longest_attempt(&self) -> Duration {
        match self {
            Target::Webhook { .. } => webhook::TOTAL,
            Target::Mail { .. } => mail::TOTAL,
        }
    }
}

/// What follows an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    Delivered,
    GivenUp,
    /// It failed, and is tried again.
    In(Duration),
    /// It is nothing to this process any more.
    Over,
}

impl App {
    /// Lists all that is on its way, and how long each still waits.
    pub async fn outbox(&self) -> Result<Vec<(Place, Duration)>> {
        let mut waiting = vec![];
        let mut after = None;
        loop {
            let scan = Scan::ascending(keys::all(Kind::Outbox), crate::store::SCAN_LIMIT);
            let page = self.scan(scan.after(after)).await?;
            for (key, found) in &page {
                let Some(place) = keys::read_outbox(key) else { continue };
                let delivery: Delivery = decode(key, found)?;
                waiting.push((place, self.still(delivery.next_at.into())));
            }
            match page.into_iter().last() {
                Some((key, _)) => after = Some(key),
                None => return Ok(waiting),
            }
        }
    }

    /// Finds how long one still waits; nothing when it is gone.
    pub async fn outbox_wait(&self, key: &Key) -> Result<Option<Duration>> {
        let found: Option<Loaded<Delivery>> = self.fetch(key.clone()).await?;
        Ok(found.map(|found| self.still(found.value.next_at.into())))
    }

    fn still(&self, at: Timestamp) -> Duration {
        let millis = at.as_millis().saturating_sub(self.now().as_millis());
        Duration::from_millis(u64::try_from(millis).unwrap_or(0))
    }

    /// Claims a delivery; nothing when it is over or another process has it.
    pub async fn claim_delivery(&self, place: Place) -> Result<Option<Claimed>> {
        let (organization, subscriber, id) = place;
        let key = keys::outbox(organization, subscriber, id);
        let Some(found) = self.fetch::<Delivery>(key.clone()).await? else { return Ok(None) };
        let Some(target) = self.target(organization, subscriber).await? else {
            // Its subscriber was deleted while it was being made.
            self.try_commit(Batch::new().delete(key, Expect::At(found.version))).await?;
            return Ok(None);
        };
        let mut delivery = found.value;
        let now = self.now();
        if self.is_too_old(&delivery) {
            // It has waited where nobody looked: in a backup, or while the process was down.
            let detail = "it was not sent in time".to_owned();
            delivery.last.get_or_insert(Outcome { at: now.into(), status: None, detail });
            self.end_delivery(place, found.version, delivery, DeliveryState::GivenUp).await?;
            return Ok(None);
        }
        delivery.attempts = delivery.attempts.saturating_add(1);
        delivery.next_at = (now + target.longest_attempt() + MARGIN).into();
        let batch = Batch::new().put(key, Expect::At(found.version), encode(&delivery));
        let version = self.try_commit(batch).await?;
        Ok(version.map(|version| Claimed { place, version, delivery, target }))
    }

    /// Writes down what became of an attempt.
    pub async fn settle_delivery(&self, claimed: Claimed, attempt: Attempt) -> Result<Next> {
        let Claimed { place, version, mut delivery, .. } = claimed;
        debug_assert!(attempt.detail.len() <= DETAIL);
        let now = self.now();
        let pace = &self.outbound.pace;
        delivery.last =
            Some(Outcome { at: now.into(), status: attempt.status, detail: attempt.detail });
        let (state, next) = match (attempt.accepted, self.is_too_old(&delivery)) {
            (true, _) => (DeliveryState::Delivered, Next::Delivered),
            (false, true) => (DeliveryState::GivenUp, Next::GivenUp),
            (false, false) => {
                let (organization, subscriber, id) = place;
                let key = keys::outbox(organization, subscriber, id);
                let wait = pace.wait(delivery.attempts, u32::from_be_bytes(random()));
                delivery.next_at = (now + wait).into();
                let batch = Batch::new().put(key, Expect::At(version), encode(&delivery));
                let stands = self.try_commit(batch).await?;
                return Ok(stands.map_or(Next::Over, |_| Next::In(wait)));
            }
        };
        let stands = self.end_delivery(place, version, delivery, state).await?;
        Ok(stands.map_or(Next::Over, |_| next))
    }

    fn is_too_old(&self, delivery: &Delivery) -> bool {
        Timestamp::from(delivery.created_at) + self.outbound.pace.life <= self.now()
    }

    /// Takes a delivery out of the outbox and remembers how it ended.
    async fn end_delivery(
        &self,
        (organization, subscriber, id): Place,
        version: Version,
        mut delivery: Delivery,
        state: DeliveryState,
    ) -> Result<Option<Version>> {
        delivery.state = state;
        if state == DeliveryState::GivenUp {
            tracing::warn!(delivery = %id, attempts = delivery.attempts, "a notice was given up");
        }
        let key = keys::outbox(organization, subscriber, id);
        let log = keys::delivered(organization, subscriber, id);
        let mut batch = Batch::new().delete(key, Expect::At(version)).put(
            log,
            Expect::Absent,
            encode(&delivery),
        );
        let remembered =
            Scan::descending(keys::delivered_of(organization, subscriber), REMEMBERED - 1 + PRUNED);
        for (key, _) in self.scan(remembered).await?.into_iter().skip(REMEMBERED - 1) {
            batch = batch.delete(key, Expect::Anything);
        }
        self.try_commit(batch).await
    }

    /// Drops notices that a subscriber has too many of.
    pub async fn drop_notices(&self, organization: OrganizationId, places: &[Place]) -> Result<()> {
        let mut batch = Batch::new();
        for (_, subscriber, id) in places {
            let key = keys::outbox(organization, *subscriber, *id);
            batch = batch.delete(key, Expect::Anything);
        }
        let Some((_, subscriber, oldest)) = places.first() else { return Ok(()) };
        let draft = self
            .draft(organization, "system", "drop_notices", "notices")
            .with("subscriber", subscriber.to_string())
            .with("count", places.len())
            .with("oldest", oldest.to_string())
            .with("reason", "more than 1,000 notices to one subscriber were on their way");
        self.store.commit(batch.audit(draft)).await?;
        tracing::warn!(%organization, count = places.len(), "notices were dropped: too many wait");
        Ok(())
    }

    async fn target(
        &self,
        organization: OrganizationId,
        subscriber: SubscriberId,
    ) -> Result<Option<Target>> {
        let Subscriptions { webhooks, recipients } = self.subscriptions(organization).await?.value;
        if let Some(found) = recipients.into_iter().find(|found| found.id.0 == subscriber) {
            return Ok(Some(Target::Mail { address: found.address }));
        }
        let Some(found) = webhooks.into_iter().find(|found| found.id.0 == subscriber) else {
            return Ok(None);
        };
        use secrecy::ExposeSecret;
        let open = |part, sealed| self.open_part(organization, subscriber, part, sealed);
        let url = open("url", &found.url)?.expose_secret().to_owned();
        Ok(Some(Target::Webhook { url, secret: open("secret", &found.secret)? }))
    }

    /// Commits; nothing when somebody else was faster.
    async fn try_commit(&self, batch: Batch) -> Result<Option<Version>> {
        match self.store.commit(batch).await {
            Ok(version) => Ok(Some(version)),
            Err(CommitError::Conflict { .. }) => Ok(None),
            Err(error @ CommitError::Store(_)) => Err(error.into()),
        }
    }
}
