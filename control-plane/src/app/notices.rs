//! Whom an organization tells what, and the outbox: notices wait in the store from the commit of
//! what they tell of until somebody has accepted them.
//!
//! A notice is made by [`App::announce`], into the batch of the change itself: no change without its
//! notices, no notice of what did not happen. It holds what was true then, so all attempts say
//! the same. From there it is the worker's ([`crate::notices::worker`]): claim, send, settle.

mod outbox;

use std::collections::BTreeSet;

use latchkey_domain::id::{DeliveryId, EnvironmentId, OrganizationId, SubscriberId};
use latchkey_domain::run::{Run, RunKind, RunState};
use latchkey_proto::v1::Reason;
use secrecy::{ExposeSecret, SecretString};
use uuid::Uuid;

use super::{App, check_request_id};
use crate::auth::{Caller, NewToken, Standing};
use crate::error::{Error, Result};
use crate::notices::{mail, webhook};
use crate::seal;
use crate::store::record::environment::Environment;
use crate::store::record::notice::{
    Delivery, DeliveryState, Event, Notice, Recipient, RunFacts, Selection, Subscriptions, Webhook,
};
use crate::store::record::{Loaded, SealedBytes, Text, decode, encode};
use crate::store::{Batch, Expect, Scan, keys};

pub use self::outbox::{Claimed, Next, Target};

const MOST_WEBHOOKS: usize = 16;
const MOST_RECIPIENTS: usize = 16;
const MOST_ENVIRONMENTS: usize = 20;

/// The most of a reason that leaves the house.
const LONGEST_REASON: usize = 1000;

/// Deliveries that ended and are remembered, of each subscriber.
const REMEMBERED: usize = 50;

/// Something to tell.
#[derive(Debug)]
pub(crate) struct News<'a> {
    pub(crate) event: Event,
    pub(crate) environment: Option<(EnvironmentId, &'a str)>,
    pub(crate) run: Option<&'a Run>,
    pub(crate) reason: Option<&'a str>,
}

/// A webhook or recipient, for its owners.
#[derive(Debug)]
pub struct SubscriberView {
    pub id: SubscriberId,
    /// The URL or the address.
    pub target: String,
    pub events: BTreeSet<Event>,
    /// Names; empty for all.
    pub environments: Vec<String>,
    pub created_by: String,
    pub created_at: latchkey_domain::time::Timestamp,
}

/// What somebody is to be told of.
#[derive(Clone, Debug, Default)]
pub struct Wish {
    pub events: BTreeSet<Event>,
    /// Names; empty for all.
    pub environments: Vec<String>,
}

// What runs do

impl App {
    /// Adds the notices about a run's move to its batch. `before` is absent for a run that is
    /// made, `frozen` is why the move froze the environment, where it did.
    pub(super) async fn tell_of_run(
        &self,
        mut batch: Batch,
        before: Option<RunState>,
        next: &Run,
        environment: &Environment,
        frozen: Option<&str>,
    ) -> Result<Batch> {
        let place = Some((environment.id, environment.name.as_str()));
        let news = |event, reason| News { event, environment: place, run: Some(next), reason };
        let organization = next.request.organization;
        if before != Some(next.state)
            && let Some(event) = event_of(next, environment)
        {
            batch = self.announce(batch, organization, news(event, next.reason.as_deref())).await?;
        }
        if let Some(reason) = frozen {
            let news = news(Event::EnvironmentFrozen, Some(reason));
            batch = self.announce(batch, organization, news).await?;
        }
        Ok(batch)
    }

    /// Adds a notice to the batch of what it tells of, for each who wants it.
    pub(crate) async fn announce(
        &self,
        mut batch: Batch,
        organization: OrganizationId,
        news: News<'_>,
    ) -> Result<Batch> {
        let Some(subscriptions) =
            self.fetch::<Subscriptions>(keys::subscriptions(organization)).await?
        else {
            return Ok(batch);
        };
        let environment = news.environment.map(|(id, _)| id);
        let wanted: Vec<SubscriberId> = subscriptions
            .value
            .selections()
            .filter(|(_, selection)| selection.wants(news.event, environment))
            .map(|(id, _)| id)
            .collect();
        if wanted.is_empty() {
            return Ok(batch);
        }
        let notice = Notice {
            event: news.event,
            at: self.now().into(),
            organization: self.organization(organization).await?.value.name,
            environment: news.environment.map(|(_, name)| name.to_owned()),
            run: news.run.map(facts),
            reason: news.reason.map(|reason| reason.chars().take(LONGEST_REASON).collect()),
        };
        for subscriber in wanted {
            batch = self.enqueue(batch, organization, subscriber, notice.clone()).0;
        }
        Ok(batch)
    }

    /// Puts a notice into the outbox.
    fn enqueue(
        &self,
        batch: Batch,
        organization: OrganizationId,
        subscriber: SubscriberId,
        notice: Notice,
    ) -> (Batch, DeliveryId) {
        let id = DeliveryId::from_uuid(self.new_id());
        let delivery = Delivery {
            id: Text(id),
            subscriber: Text(subscriber),
            notice,
            created_at: self.now().into(),
            attempts: 0,
            next_at: self.now().into(),
            last: None,
            state: DeliveryState::Pending,
        };
        let key = keys::outbox(organization, subscriber, id);
        (batch.put(key, Expect::Absent, encode(&delivery)), id)
    }
}

fn event_of(run: &Run, environment: &Environment) -> Option<Event> {
    match run.state {
        RunState::AwaitingPlanMfa | RunState::AwaitingApplyMfa => Some(Event::WaitingForCode),
        RunState::AwaitingConfirmation => {
            // The policy may have become stricter since the run was queued.
            let code = run.awaits_code(&environment.settings.demands()).is_some();
            Some(if code { Event::WaitingForCode } else { Event::NeedsConfirmation })
        }
        RunState::Applied => Some(Event::Applied),
        RunState::Errored => Some(Event::Errored),
        RunState::Lost => Some(Event::RunnerLost),
        RunState::Pending
        | RunState::PlanQueued
        | RunState::Planning
        | RunState::ApplyQueued
        | RunState::Applying
        | RunState::Planned
        | RunState::Canceled
        | RunState::Discarded => None,
    }
}

/// Takes of a run what may be told: nothing that terraform read or wrote.
fn facts(run: &Run) -> RunFacts {
    RunFacts {
        id: Text(run.id),
        kind: kind_name(run.request.kind).to_owned(),
        state: run.state.as_str().to_owned(),
        message: run.request.message.clone(),
        queued_by: run.request.queued_by.name().to_owned(),
    }
}

const fn kind_name(kind: RunKind) -> &'static str {
    match kind {
        RunKind::PlanAndApply => "plan_and_apply",
        RunKind::PlanOnly => "plan_only",
        RunKind::Destroy => "destroy",
        RunKind::RefreshOnly => "refresh_only",
    }
}

// What owners do

impl App {
    /// Makes a webhook. Its secret is answered here and never again.
    pub async fn create_webhook(
        &self,
        caller: &Caller,
        organization: &str,
        url: &str,
        wish: Wish,
        request_id: &str,
    ) -> Result<(SubscriberView, SecretString)> {
        let standing = self.owner(caller, organization).await?;
        check_request_id(request_id)?;
        let target = webhook::Target::parse(url).map_err(|problem| Error::field("url", problem))?;
        target.check(&self.outbound).map_err(|problem| Error::field("url", problem))?;
        let selection = self.selection(standing.organization, wish).await?;
        let organization = standing.organization;
        let intent = format!("{}:{organization}:{request_id}", caller.audit_name());
        let secret = self.master.digest(b"secret of a webhook", intent.as_bytes());
        let secret = NewToken::of("lkw_", &secret).secret;
        let id = self.master.digest(b"id of a webhook", intent.as_bytes());
        let (id, _) = id.split_first_chunk::<16>().expect("a digest has 32 bytes");
        let id = SubscriberId::from_uuid(Uuid::new_v8(*id));

        let mut found = self.subscriptions(organization).await?;
        if let Some(made) = found.value.webhooks.iter().find(|webhook| webhook.id.0 == id) {
            return Ok((self.webhook_view(organization, made).await?, secret));
        }
        if found.value.webhooks.len() >= MOST_WEBHOOKS {
            return Err(limit("an organization has up to 16 webhooks; delete one"));
        }
        let webhook = Webhook {
            id: Text(id),
            url: self.seal_part(organization, id, "url", &SecretString::from(url)),
            selection,
            secret: self.seal_part(organization, id, "secret", &secret),
            created_by: caller.name().to_owned(),
            created_at: self.now().into(),
        };
        let view = self.webhook_view(organization, &webhook).await?;
        // Only where it goes: paths of webhooks are often secrets.
        let draft = self
            .draft(organization, caller.audit_name(), "create_webhook", format!("webhook {id}"))
            .with("to", target.origin());
        let draft = with_selection(draft, &view);
        found.value.webhooks.push(webhook);
        self.commit_subscriptions(organization, found, Batch::new().audit(draft)).await?;
        Ok((view, secret))
    }

    pub async fn list_webhooks(
        &self,
        caller: &Caller,
        organization: &str,
    ) -> Result<Vec<SubscriberView>> {
        let organization = self.owner(caller, organization).await?.organization;
        let mut views = vec![];
        for webhook in &self.subscriptions(organization).await?.value.webhooks {
            views.push(self.webhook_view(organization, webhook).await?);
        }
        Ok(views)
    }

    pub async fn delete_webhook(
        &self,
        caller: &Caller,
        organization: &str,
        id: SubscriberId,
    ) -> Result<()> {
        let standing = self.owner(caller, organization).await?;
        let mut found = self.subscriptions(standing.organization).await?;
        let before = found.value.webhooks.len();
        found.value.webhooks.retain(|webhook| webhook.id.0 != id);
        if found.value.webhooks.len() == before {
            return Err(Error::not_found("webhook"));
        }
        self.forget(&standing, found, id, ("delete_webhook", format!("webhook {id}"))).await
    }

    /// Adds a recipient, or replaces what it is told of.
    pub async fn set_mail_recipient(
        &self,
        caller: &Caller,
        organization: &str,
        address: &str,
        wish: Wish,
    ) -> Result<SubscriberView> {
        let standing = self.owner(caller, organization).await?;
        let organization = standing.organization;
        if mail::address(address).is_none() {
            let message = "give one plain address, such as ops@example.com";
            return Err(Error::field("address", message));
        }
        if self.outbound.mailer.is_none() {
            let message = "no mail can be sent: the operator of the control plane configured no \
                           server (--smtp-server)";
            return Err(Error::refused(Reason::MailUnavailable, message));
        }
        let selection = self.selection(organization, wish).await?;
        let mut found = self.subscriptions(organization).await?;
        let recipients = &mut found.value.recipients;
        let at = recipients.iter().position(|recipient| recipient.address == address);
        let recipient = match at {
            Some(at) => {
                recipients[at].selection = selection;
                recipients[at].clone()
            }
            None if recipients.len() >= MOST_RECIPIENTS => {
                return Err(limit("an organization has up to 16 recipients; delete one"));
            }
            None => {
                recipients.push(Recipient {
                    id: Text(SubscriberId::from_uuid(self.new_id())),
                    address: address.to_owned(),
                    selection,
                    created_by: caller.name().to_owned(),
                    created_at: self.now().into(),
                });
                recipients[recipients.len() - 1].clone()
            }
        };
        let view = self.recipient_view(organization, &recipient).await?;
        let subject = format!("mail-recipient {}", view.id);
        let draft = self
            .draft(organization, caller.audit_name(), "set_mail_recipient", subject)
            .with("address", address);
        let draft = with_selection(draft, &view);
        self.commit_subscriptions(organization, found, Batch::new().audit(draft)).await?;
        Ok(view)
    }

    pub async fn list_mail_recipients(
        &self,
        caller: &Caller,
        organization: &str,
    ) -> Result<Vec<SubscriberView>> {
        let organization = self.owner(caller, organization).await?.organization;
        let mut views = vec![];
        for recipient in &self.subscriptions(organization).await?.value.recipients {
            views.push(self.recipient_view(organization, recipient).await?);
        }
        Ok(views)
    }

    pub async fn delete_mail_recipient(
        &self,
        caller: &Caller,
        organization: &str,
        id: SubscriberId,
    ) -> Result<()> {
        let standing = self.owner(caller, organization).await?;
        let mut found = self.subscriptions(standing.organization).await?;
        let before = found.value.recipients.len();
        found.value.recipients.retain(|recipient| recipient.id.0 != id);
        if found.value.recipients.len() == before {
            return Err(Error::not_found("mail recipient"));
        }
        let what = ("delete_mail_recipient", format!("mail-recipient {id}"));
        self.forget(&standing, found, id, what).await
    }

    /// Lists the newest deliveries to one subscriber, newest first.
    pub async fn list_deliveries(
        &self,
        caller: &Caller,
        organization: &str,
        subscriber: SubscriberId,
        size: usize,
    ) -> Result<Vec<Delivery>> {
        let organization = self.owner(caller, organization).await?.organization;
        self.known_subscriber(organization, subscriber).await?;
        let mut all: Vec<Delivery> = vec![];
        for prefix in [
            keys::outbox_of(organization, subscriber),
            keys::delivered_of(organization, subscriber),
        ] {
            for (key, found) in self.scan(Scan::descending(prefix, size)).await? {
                all.push(decode(&key, &found)?);
            }
        }
        all.sort_unstable_by_key(|delivery| std::cmp::Reverse(delivery.id));
        all.dedup_by_key(|delivery| delivery.id);
        all.truncate(size);
        Ok(all)
    }

    /// Sends what a delivery told once more.
    pub async fn redeliver(
        &self,
        caller: &Caller,
        organization: &str,
        subscriber: SubscriberId,
        delivery: DeliveryId,
    ) -> Result<DeliveryId> {
        let standing = self.owner(caller, organization).await?;
        let organization = standing.organization;
        self.known_subscriber(organization, subscriber).await?;
        let found: Loaded<Delivery> = self
            .fetch(keys::delivered(organization, subscriber, delivery))
            .await?
            .ok_or_else(|| Error::not_found("delivery that ended"))?;
        let draft = self
            .draft(organization, caller.audit_name(), "redeliver_notice", subscribed(subscriber))
            .with("delivery", delivery.to_string());
        let batch = Batch::new().audit(draft);
        let (batch, id) = self.enqueue(batch, organization, subscriber, found.value.notice);
        self.store.commit(batch).await?;
        Ok(id)
    }

    pub async fn send_test(
        &self,
        caller: &Caller,
        organization: &str,
        subscriber: SubscriberId,
    ) -> Result<DeliveryId> {
        let standing = self.owner(caller, organization).await?;
        let organization = standing.organization;
        self.known_subscriber(organization, subscriber).await?;
        let notice = Notice {
            event: Event::Test,
            at: self.now().into(),
            organization: standing.organization_name,
            environment: None,
            run: None,
            reason: Some(format!("{} asked for a test", caller.name())),
        };
        let draft =
            self.draft(organization, caller.audit_name(), "test_notice", subscribed(subscriber));
        let batch = Batch::new().audit(draft);
        let (batch, id) = self.enqueue(batch, organization, subscriber, notice);
        self.store.commit(batch).await?;
        Ok(id)
    }

    /// Removes a subscriber with all that is on its way to it or remembered of it.
    async fn forget(
        &self,
        standing: &Standing,
        found: Loaded<Subscriptions>,
        id: SubscriberId,
        (action, subject): (&str, String),
    ) -> Result<()> {
        let organization = standing.organization;
        let draft = self.draft(organization, standing.caller.audit_name(), action, subject);
        let mut batch = Batch::new().audit(draft);
        for prefix in [keys::outbox_of(organization, id), keys::delivered_of(organization, id)] {
            for (key, _) in self.list(prefix).await? {
                batch = batch.delete(key, Expect::Anything);
            }
        }
        self.commit_subscriptions(organization, found, batch).await
    }

    async fn selection(&self, organization: OrganizationId, wish: Wish) -> Result<Selection> {
        if wish.events.is_empty() || wish.events.contains(&Event::Test) {
            let message = "name at least one event, none of them TEST";
            return Err(Error::field("events", message));
        }
        if wish.environments.len() > MOST_ENVIRONMENTS {
            return Err(Error::field("environments", "name up to 20, or none for all"));
        }
        let mut environments = BTreeSet::new();
        for name in &wish.environments {
            let missing = |_| Error::field("environments", format!("there is no `{name}`"));
            let found = self.environment_named(organization, name).await.map_err(missing)?;
            environments.insert(Text(found.value.id));
        }
        Ok(Selection { events: wish.events, environments })
    }

    /// Reads whom an organization tells what; nobody where nothing was said.
    pub(super) async fn subscriptions(
        &self,
        organization: OrganizationId,
    ) -> Result<Loaded<Subscriptions>> {
        let key = keys::subscriptions(organization);
        let found = self.fetch(key.clone()).await?;
        let none = || Loaded {
            key,
            version: crate::store::Version::new(0),
            value: Subscriptions::default(),
        };
        Ok(found.unwrap_or_else(none))
    }

    async fn commit_subscriptions(
        &self,
        organization: OrganizationId,
        Loaded { key, version, value }: Loaded<Subscriptions>,
        batch: Batch,
    ) -> Result<()> {
        debug_assert_eq!(key, keys::subscriptions(organization));
        let expect = match version.get() {
            0 => Expect::Absent,
            _ => Expect::At(version),
        };
        self.store.commit(batch.put(key, expect, encode(&value))).await?;
        Ok(())
    }

    async fn known_subscriber(
        &self,
        organization: OrganizationId,
        subscriber: SubscriberId,
    ) -> Result<()> {
        let found = self.subscriptions(organization).await?.value;
        let known = found.selections().any(|(id, _)| id == subscriber);
        known.then_some(()).ok_or_else(|| Error::not_found("webhook or mail recipient"))
    }

    async fn webhook_view(
        &self,
        organization: OrganizationId,
        webhook: &Webhook,
    ) -> Result<SubscriberView> {
        let url = self.open_part(organization, webhook.id.0, "url", &webhook.url)?;
        Ok(SubscriberView {
            id: webhook.id.0,
            target: url.expose_secret().to_owned(),
            events: webhook.selection.events.clone(),
            environments: self.names_of(organization, &webhook.selection).await?,
            created_by: webhook.created_by.clone(),
            created_at: webhook.created_at.into(),
        })
    }

    async fn recipient_view(
        &self,
        organization: OrganizationId,
        recipient: &Recipient,
    ) -> Result<SubscriberView> {
        Ok(SubscriberView {
            id: recipient.id.0,
            target: recipient.address.clone(),
            events: recipient.selection.events.clone(),
            environments: self.names_of(organization, &recipient.selection).await?,
            created_by: recipient.created_by.clone(),
            created_at: recipient.created_at.into(),
        })
    }

    async fn names_of(
        &self,
        organization: OrganizationId,
        selection: &Selection,
    ) -> Result<Vec<String>> {
        let mut names = vec![];
        for Text(id) in &selection.environments {
            match self.environment(organization, *id).await {
                Ok(found) => names.push(found.value.name),
                Err(error) if error.reason() == Reason::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        names.sort_unstable();
        Ok(names)
    }

    fn seal_part(
        &self,
        organization: OrganizationId,
        id: SubscriberId,
        part: &str,
        value: &SecretString,
    ) -> SealedBytes {
        SealedBytes(
            self.master
                .seal(&part_context(organization, id, part), value.expose_secret().as_bytes()),
        )
    }

    fn open_part(
        &self,
        organization: OrganizationId,
        id: SubscriberId,
        part: &str,
        sealed: &SealedBytes,
    ) -> Result<SecretString> {
        let context = part_context(organization, id, part);
        let opened = self.master.open_sealed(&context, &sealed.0).map_err(Error::internal)?;
        opened.into_text().ok_or_else(|| Error::internal("a sealed value is not text"))
    }
}

impl Subscriptions {
    pub(super) fn selections(&self) -> impl Iterator<Item = (SubscriberId, &Selection)> {
        let webhooks = self.webhooks.iter().map(|webhook| (webhook.id.0, &webhook.selection));
        webhooks.chain(self.recipients.iter().map(|found| (found.id.0, &found.selection)))
    }
}

/// Names the one webhook that a sealed part belongs to: all of them share a record.
fn part_context(organization: OrganizationId, id: SubscriberId, part: &str) -> Vec<u8> {
    seal::context(&format!("webhook {id} {part}"), &keys::subscriptions(organization))
}

fn subscribed(subscriber: SubscriberId) -> String {
    format!("subscriber {subscriber}")
}

fn with_selection(draft: crate::audit::Draft, view: &SubscriberView) -> crate::audit::Draft {
    let events: Vec<&str> = view.events.iter().map(|event| event.as_str()).collect();
    draft.with("events", events).with("environments", view.environments.clone())
}

fn limit(message: &str) -> Error {
    Error::refused(Reason::LimitReached, message)
}

#[cfg(test)]
mod tests;
