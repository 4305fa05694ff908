//! `webhook`: programs that are told when a run needs somebody or ends.

use std::time::Duration;

use clap::{Subcommand, ValueEnum};
use tokio::time::{Instant, sleep};
use uuid::Uuid;

use latchkey_proto::v1;

use crate::Done;
use crate::client::Client;
use crate::context::Context;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::view::notice::{DeliveryListView, DeliveryView, SubscriberListView, SubscriberView};

/// How long `test` waits for the first attempt.
const PATIENCE: Duration = Duration::from_secs(30);

#[derive(Debug, Subcommand)]
pub(crate) enum Webhook {
    /// Makes a webhook and shows its secret, once; owners only
    ///
    /// Each delivery is a POST of JSON with the header `X-Latchkey-Signature: t=SECONDS,v1=HEX`:
    /// the HMAC-SHA256 over SECONDS, a dot and the body, keyed with the secret. A delivery is
    /// repeated until it is answered with 2xx, for up to a day, with the same
    /// `X-Latchkey-Delivery`.
    Create {
        /// https://...
        url: String,
        #[command(flatten)]
        selection: Selection,
    },
    /// Lists the webhooks; owners only
    List,
    /// Deletes a webhook, and drops what is on its way to it; owners only
    Delete {
        /// As `list` shows it
        id: String,
    },
    /// Lists the last deliveries and what became of them, newest first; owners only
    Deliveries {
        /// Of the webhook, or of a recipient of mail
        id: String,
        /// How many
        #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=200))]
        last: u32,
    },
    /// Sends what a delivery that ended told once more; owners only
    Redeliver {
        /// Of the webhook, or of a recipient of mail
        id: String,
        /// As `deliveries` shows it
        delivery: String,
    },
    /// Sends a test, and waits for what becomes of it; owners only
    Test {
        /// Of the webhook, or of a recipient of mail
        id: String,
    },
}

/// Who is told what.
#[derive(Debug, clap::Args)]
pub(crate) struct Selection {
    /// What to tell; may be repeated; all if absent
    #[arg(long = "event", value_enum, value_name = "EVENT")]
    events: Vec<Event>,
    /// Only of this environment; may be repeated; all if absent
    #[arg(long = "env", value_name = "ENV")]
    environments: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Event {
    /// A run waits for a token code
    WaitingForCode,
    /// A plan waits for a confirmation
    NeedsConfirmation,
    Applied,
    Errored,
    /// The runner went silent during an apply
    RunnerLost,
    /// Nothing starts until somebody has dealt with the remains of a run
    EnvironmentFrozen,
    /// A policy was broken open on the control plane's host; always told
    BreakGlass,
}

impl From<Event> for v1::NoticeEvent {
    fn from(event: Event) -> v1::NoticeEvent {
        match event {
            Event::WaitingForCode => v1::NoticeEvent::WaitingForCode,
            Event::NeedsConfirmation => v1::NoticeEvent::NeedsConfirmation,
            Event::Applied => v1::NoticeEvent::Applied,
            Event::Errored => v1::NoticeEvent::Errored,
            Event::RunnerLost => v1::NoticeEvent::RunnerLost,
            Event::EnvironmentFrozen => v1::NoticeEvent::EnvironmentFrozen,
            Event::BreakGlass => v1::NoticeEvent::BreakGlass,
        }
    }
}

impl Selection {
    pub(crate) fn wire_events(&self) -> Vec<i32> {
        let wanted = match self.events.as_slice() {
            [] => Event::value_variants(),
            events => events,
        };
        wanted.iter().map(|event| v1::NoticeEvent::from(*event).into()).collect()
    }

    pub(crate) fn into_environments(self) -> Vec<String> {
        self.environments
    }
}

impl Webhook {
    pub(crate) async fn run(self, context: &mut Context) -> Done {
        let session = context.session()?;
        let (client, organization) = (&session.client, session.organization()?);
        match self {
            Webhook::Create { url, selection } => {
                let request = v1::CreateWebhookRequest {
                    organization,
                    url,
                    events: selection.wire_events(),
                    environments: selection.into_environments(),
                    request_id: Uuid::new_v4().to_string(),
                };
                let answer = client
                    .call(|| {
                        let (mut service, request) = (client.notices(), request.clone());
                        async move { service.create_webhook(request).await }
                    })
                    .await?;
                let view = SubscriberView::of_webhook(answer.webhook.unwrap_or_default())
                    .with_secret(answer.secret);
                context.output.data(&view, SubscriberView::human)?;
                if !context.output.is_json() {
                    context.output.hint("the secret is shown once; give it to the receiver");
                }
            }
            Webhook::List => {
                let request = v1::ListWebhooksRequest { organization };
                let answer = client
                    .call(|| {
                        let (mut service, request) = (client.notices(), request.clone());
                        async move { service.list_webhooks(request).await }
                    })
                    .await?;
                let webhooks = answer.webhooks.into_iter().map(SubscriberView::of_webhook);
                let view = SubscriberListView::new(webhooks, None);
                context.output.data(&view, SubscriberListView::human)?;
            }
            Webhook::Delete { id } => {
                let request = v1::DeleteWebhookRequest { organization, webhook_id: id };
                let answer = client.notices().delete_webhook(request).await;
                client.once(answer)?;
            }
            Webhook::Deliveries { id, last } => {
                let deliveries = deliveries(client, &organization, &id, last).await?;
                let view = DeliveryListView::new(deliveries);
                context.output.data(&view, DeliveryListView::human)?;
            }
            Webhook::Redeliver { id, delivery } => {
                let request = v1::RedeliverRequest {
                    organization: organization.clone(),
                    subscriber_id: id.clone(),
                    delivery_id: delivery,
                };
                let answer = client.notices().redeliver(request).await;
                let sent = client.once(answer)?.delivery_id;
                return follow(context, client, (&organization, &id, &sent)).await;
            }
            Webhook::Test { id } => {
                return test(context, client, organization, id).await;
            }
        }
        Ok(Exit::Ok)
    }
}

/// Sends a test and waits for its first attempt.
pub(crate) async fn test(
    context: &mut Context,
    client: &Client,
    organization: String,
    id: String,
) -> Done {
    let request =
        v1::SendTestRequest { organization: organization.clone(), subscriber_id: id.clone() };
    let answer = client.notices().send_test(request).await;
    let sent = client.once(answer)?.delivery_id;
    follow(context, client, (&organization, &id, &sent)).await
}

async fn follow(
    context: &mut Context,
    client: &Client,
    (organization, id, delivery): (&str, &str, &str),
) -> Done {
    let begun = Instant::now();
    loop {
        let listed = deliveries(client, organization, id, 50).await?;
        let found = listed.into_iter().find(|found| found.delivery_id == delivery);
        let waited = begun.elapsed() > PATIENCE;
        if let Some(found) = found.filter(|found| found.last_attempt_time.is_some() || waited) {
            let delivered = found.state() == v1::DeliveryState::Delivered;
            let view = DeliveryView::new(&found);
            context.output.data(&view, DeliveryView::human)?;
            return Ok(if delivered { Exit::Ok } else { Exit::Refused });
        }
        if waited {
            return Err(Failure::Usage {
                message: "the delivery is not among the last ones any more".into(),
                hint: "look with `latchkey webhook deliveries`".into(),
            });
        }
        sleep(Duration::from_millis(200)).await;
    }
}

async fn deliveries(
    client: &Client,
    organization: &str,
    id: &str,
    last: u32,
) -> Result<Vec<v1::Delivery>, Failure> {
    let request = v1::ListDeliveriesRequest {
        organization: organization.to_owned(),
        subscriber_id: id.to_owned(),
        page_size: last,
    };
    let answer = client
        .call(|| {
            let (mut service, request) = (client.notices(), request.clone());
            async move { service.list_deliveries(request).await }
        })
        .await?;
    Ok(answer.deliveries)
}
