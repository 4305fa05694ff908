//! Webhooks, recipients of mail and deliveries, as programs and people see them.

use serde::Serialize;

use latchkey_proto::v1;

use crate::output::{fields, table};
use crate::words::{Word, time};

#[derive(Serialize)]
pub(crate) struct SubscriberView {
    id: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    url: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    address: Option<String>,
    events: Vec<String>,
    /// Empty for all.
    environments: Vec<String>,
    created_by: String,
    create_time: Option<String>,
    /// Only in the answer that makes it.
    #[serde(skip_serializing_if = "Option::is_none")]
    secret: Option<String>,
}

impl SubscriberView {
    pub(crate) fn of_webhook(webhook: v1::Webhook) -> SubscriberView {
        SubscriberView {
            events: webhook.events().map(Word::snake).collect(),
            id: webhook.webhook_id,
            url: Some(webhook.url),
            address: None,
            environments: webhook.environments,
            created_by: webhook.created_by,
            create_time: time(webhook.create_time.as_ref()),
            secret: None,
        }
    }

    pub(crate) fn of_recipient(recipient: v1::MailRecipient) -> SubscriberView {
        SubscriberView {
            events: recipient.events().map(Word::snake).collect(),
            id: recipient.recipient_id,
            url: None,
            address: Some(recipient.address),
            environments: recipient.environments,
            created_by: recipient.created_by,
            create_time: time(recipient.create_time.as_ref()),
            secret: None,
        }
    }

    pub(crate) fn with_secret(self, secret: String) -> SubscriberView {
        SubscriberView { secret: Some(secret), ..self }
    }

    fn target(&self) -> String {
        self.url.clone().or_else(|| self.address.clone()).unwrap_or_default()
    }

    fn place(&self) -> String {
        match self.environments.join(", ") {
            all if all.is_empty() => "all".to_owned(),
            environments => environments,
        }
    }

    pub(crate) fn human(&self) -> String {
        let what = if self.url.is_some() { "Webhook" } else { "Recipient" };
        let mut text = format!("{what} {}\n", crate::log_view::clean(&self.id));
        text.push_str(&fields(&[
            ("to", self.target()),
            ("events", self.events.join(", ")),
            ("environments", self.place()),
            ("created by", self.created_by.clone()),
            ("secret", self.secret.clone().unwrap_or_default()),
        ]));
        text
    }
}

#[derive(Serialize)]
pub(crate) struct SubscriberListView {
    subscribers: Vec<SubscriberView>,
    #[serde(skip_serializing_if = "Option::is_none")]
    mail_available: Option<bool>,
}

impl SubscriberListView {
    pub(crate) fn new(
        subscribers: impl Iterator<Item = SubscriberView>,
        mail_available: Option<bool>,
    ) -> SubscriberListView {
        SubscriberListView { subscribers: subscribers.collect(), mail_available }
    }

    pub(crate) fn human(&self) -> String {
        let rows = self
            .subscribers
            .iter()
            .map(|found| {
                vec![found.id.clone(), found.target(), found.events.join(" "), found.place()]
            })
            .collect();
        table(&["ID", "TO", "EVENTS", "ENVIRONMENTS"], rows, "none")
    }
}

#[derive(Serialize)]
pub(crate) struct DeliveryView {
    delivery_id: String,
    event: String,
    state: String,
    run_id: Option<String>,
    environment: Option<String>,
    create_time: Option<String>,
    attempts: u32,
    last_attempt_time: Option<String>,
    /// Of HTTP or SMTP; absent when there was no answer.
    last_status: Option<u32>,
    last_detail: String,
    next_attempt_time: Option<String>,
}

impl DeliveryView {
    pub(crate) fn new(delivery: &v1::Delivery) -> DeliveryView {
        let some = |text: &str| Some(text.to_owned()).filter(|text| !text.is_empty());
        DeliveryView {
            delivery_id: delivery.delivery_id.clone(),
            event: delivery.event().snake(),
            state: delivery.state().snake(),
            run_id: some(&delivery.run_id),
            environment: some(&delivery.environment),
            create_time: time(delivery.create_time.as_ref()),
            attempts: delivery.attempts,
            last_attempt_time: time(delivery.last_attempt_time.as_ref()),
            last_status: Some(delivery.last_status).filter(|status| *status != 0),
            last_detail: delivery.last_detail.clone(),
            next_attempt_time: time(delivery.next_attempt_time.as_ref()),
        }
    }

    fn answer(&self) -> String {
        let status = self.last_status.map(|status| status.to_string()).unwrap_or_default();
        format!("{status} {}", self.last_detail).trim().to_owned()
    }

    pub(crate) fn human(&self) -> String {
        let mut text = format!("Delivery {}\n", crate::log_view::clean(&self.delivery_id));
        text.push_str(&fields(&[
            ("event", self.event.clone()),
            ("state", self.state.replace('_', " ")),
            ("attempts", self.attempts.to_string()),
            ("answer", self.answer()),
            ("next attempt", self.next_attempt_time.clone().unwrap_or_default()),
        ]));
        text
    }
}

#[derive(Serialize)]
pub(crate) struct DeliveryListView {
    deliveries: Vec<DeliveryView>,
}

impl DeliveryListView {
    pub(crate) fn new(deliveries: Vec<v1::Delivery>) -> DeliveryListView {
        DeliveryListView { deliveries: deliveries.iter().map(DeliveryView::new).collect() }
    }

    pub(crate) fn human(&self) -> String {
        let rows = self
            .deliveries
            .iter()
            .map(|found| {
                vec![
                    found.delivery_id.clone(),
                    found.create_time.clone().unwrap_or_default(),
                    found.event.clone(),
                    found.run_id.clone().unwrap_or_default(),
                    found.state.replace('_', " "),
                    found.attempts.to_string(),
                    found.answer(),
                ]
            })
            .collect();
        let names = ["ID", "TIME", "EVENT", "RUN", "STATE", "ATTEMPTS", "ANSWER"];
        table(&names, rows, "no deliveries")
    }
}
