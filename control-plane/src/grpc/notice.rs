//! `NoticeService`.

use std::collections::BTreeSet;

use latchkey_domain::id::{DeliveryId, SubscriberId};
use latchkey_proto::v1;
use latchkey_proto::v1::notice_service_server::NoticeService;
use secrecy::ExposeSecret;
use tonic::{Request, Response, Status};

use super::{Service, caller, convert};
use crate::app::notices::{SubscriberView, Wish};
use crate::error::{Error, Result};
use crate::store::record::notice::{Delivery, DeliveryState, Event};

#[tonic::async_trait]
impl NoticeService for Service {
    async fn create_webhook(
        &self,
        request: Request<v1::CreateWebhookRequest>,
    ) -> Result<Response<v1::CreateWebhookResponse>, Status> {
        let caller = caller(&request)?;
        let v1::CreateWebhookRequest { organization, url, events, environments, request_id } =
            request.into_inner();
        let wish = wish(&events, environments)?;
        let made = self.app.create_webhook(&caller, &organization, &url, wish, &request_id);
        let (view, secret) = made.await?;
        Ok(Response::new(v1::CreateWebhookResponse {
            webhook: Some(webhook(view)),
            secret: secret.expose_secret().to_owned(),
        }))
    }

    async fn list_webhooks(
        &self,
        request: Request<v1::ListWebhooksRequest>,
    ) -> Result<Response<v1::ListWebhooksResponse>, Status> {
        let caller = caller(&request)?;
        let found = self.app.list_webhooks(&caller, &request.into_inner().organization).await?;
        let webhooks = found.into_iter().map(webhook).collect();
        Ok(Response::new(v1::ListWebhooksResponse { webhooks }))
    }

    async fn delete_webhook(
        &self,
        request: Request<v1::DeleteWebhookRequest>,
    ) -> Result<Response<v1::DeleteWebhookResponse>, Status> {
        let caller = caller(&request)?;
        let v1::DeleteWebhookRequest { organization, webhook_id } = request.into_inner();
        let id = subscriber("webhook_id", &webhook_id)?;
        self.app.delete_webhook(&caller, &organization, id).await?;
        Ok(Response::new(v1::DeleteWebhookResponse {}))
    }

    async fn set_mail_recipient(
        &self,
        request: Request<v1::SetMailRecipientRequest>,
    ) -> Result<Response<v1::SetMailRecipientResponse>, Status> {
        let caller = caller(&request)?;
        let v1::SetMailRecipientRequest { organization, address, events, environments } =
            request.into_inner();
        let wish = wish(&events, environments)?;
        let view = self.app.set_mail_recipient(&caller, &organization, &address, wish).await?;
        Ok(Response::new(v1::SetMailRecipientResponse { recipient: Some(recipient(view)) }))
    }

    async fn list_mail_recipients(
        &self,
        request: Request<v1::ListMailRecipientsRequest>,
    ) -> Result<Response<v1::ListMailRecipientsResponse>, Status> {
        let caller = caller(&request)?;
        let organization = request.into_inner().organization;
        let found = self.app.list_mail_recipients(&caller, &organization).await?;
        Ok(Response::new(v1::ListMailRecipientsResponse {
            recipients: found.into_iter().map(recipient).collect(),
            mail_available: self.app.outbound.mailer.is_some(),
        }))
    }

    async fn delete_mail_recipient(
        &self,
        request: Request<v1::DeleteMailRecipientRequest>,
    ) -> Result<Response<v1::DeleteMailRecipientResponse>, Status> {
        let caller = caller(&request)?;
        let v1::DeleteMailRecipientRequest { organization, recipient_id } = request.into_inner();
        let id = subscriber("recipient_id", &recipient_id)?;
        self.app.delete_mail_recipient(&caller, &organization, id).await?;
        Ok(Response::new(v1::DeleteMailRecipientResponse {}))
    }

    async fn list_deliveries(
        &self,
        request: Request<v1::ListDeliveriesRequest>,
    ) -> Result<Response<v1::ListDeliveriesResponse>, Status> {
        let caller = caller(&request)?;
        let v1::ListDeliveriesRequest { organization, subscriber_id, page_size } =
            request.into_inner();
        let id = subscriber("subscriber_id", &subscriber_id)?;
        let size = convert::page(page_size, String::new()).size()?;
        let found = self.app.list_deliveries(&caller, &organization, id, size).await?;
        let deliveries = found.into_iter().map(delivery).collect();
        Ok(Response::new(v1::ListDeliveriesResponse { deliveries }))
    }

    async fn redeliver(
        &self,
        request: Request<v1::RedeliverRequest>,
    ) -> Result<Response<v1::RedeliverResponse>, Status> {
        let caller = caller(&request)?;
        let v1::RedeliverRequest { organization, subscriber_id, delivery_id } =
            request.into_inner();
        let id = subscriber("subscriber_id", &subscriber_id)?;
        let malformed = |_| Error::field("delivery_id", "it is not an id (a UUID)");
        let delivery: DeliveryId = delivery_id.parse().map_err(malformed)?;
        let sent = self.app.redeliver(&caller, &organization, id, delivery).await?;
        Ok(Response::new(v1::RedeliverResponse { delivery_id: sent.to_string() }))
    }

    async fn send_test(
        &self,
        request: Request<v1::SendTestRequest>,
    ) -> Result<Response<v1::SendTestResponse>, Status> {
        let caller = caller(&request)?;
        let v1::SendTestRequest { organization, subscriber_id } = request.into_inner();
        let id = subscriber("subscriber_id", &subscriber_id)?;
        let sent = self.app.send_test(&caller, &organization, id).await?;
        Ok(Response::new(v1::SendTestResponse { delivery_id: sent.to_string() }))
    }
}

fn subscriber(field: &'static str, text: &str) -> Result<SubscriberId> {
    text.parse().map_err(|_| Error::field(field, "it is not an id (a UUID)"))
}

fn wish(events: &[i32], environments: Vec<String>) -> Result<Wish> {
    let mut wanted = BTreeSet::new();
    for event in events {
        wanted.insert(match v1::NoticeEvent::try_from(*event) {
            Ok(v1::NoticeEvent::WaitingForCode) => Event::WaitingForCode,
            Ok(v1::NoticeEvent::NeedsConfirmation) => Event::NeedsConfirmation,
            Ok(v1::NoticeEvent::Applied) => Event::Applied,
            Ok(v1::NoticeEvent::Errored) => Event::Errored,
            Ok(v1::NoticeEvent::RunnerLost) => Event::RunnerLost,
            Ok(v1::NoticeEvent::EnvironmentFrozen) => Event::EnvironmentFrozen,
            Ok(v1::NoticeEvent::BreakGlass) => Event::BreakGlass,
            Ok(v1::NoticeEvent::Test) => Event::Test,
            Ok(v1::NoticeEvent::Unspecified) | Err(_) => {
                return Err(Error::field("events", "it is none of the events"));
            }
        });
    }
    Ok(Wish { events: wanted, environments })
}

const fn event_out(event: Event) -> v1::NoticeEvent {
    match event {
        Event::WaitingForCode => v1::NoticeEvent::WaitingForCode,
        Event::NeedsConfirmation => v1::NoticeEvent::NeedsConfirmation,
        Event::Applied => v1::NoticeEvent::Applied,
        Event::Errored => v1::NoticeEvent::Errored,
        Event::RunnerLost => v1::NoticeEvent::RunnerLost,
        Event::EnvironmentFrozen => v1::NoticeEvent::EnvironmentFrozen,
        Event::BreakGlass => v1::NoticeEvent::BreakGlass,
        Event::Test => v1::NoticeEvent::Test,
    }
}

fn events_out(events: &BTreeSet<Event>) -> Vec<i32> {
    events.iter().map(|event| event_out(*event).into()).collect()
}

fn webhook(view: SubscriberView) -> v1::Webhook {
    v1::Webhook {
        webhook_id: view.id.to_string(),
        url: view.target,
        events: events_out(&view.events),
        environments: view.environments,
        created_by: view.created_by,
        create_time: Some(convert::timestamp(view.created_at)),
    }
}

fn recipient(view: SubscriberView) -> v1::MailRecipient {
    v1::MailRecipient {
        recipient_id: view.id.to_string(),
        address: view.target,
        events: events_out(&view.events),
        environments: view.environments,
        created_by: view.created_by,
        create_time: Some(convert::timestamp(view.created_at)),
    }
}

fn delivery(delivery: Delivery) -> v1::Delivery {
    let pending = delivery.state == DeliveryState::Pending;
    let last = delivery.last.as_ref();
    v1::Delivery {
        delivery_id: delivery.id.0.to_string(),
        event: event_out(delivery.notice.event).into(),
        state: match delivery.state {
            DeliveryState::Pending => v1::DeliveryState::Pending,
            DeliveryState::Delivered => v1::DeliveryState::Delivered,
            DeliveryState::GivenUp => v1::DeliveryState::GivenUp,
        }
        .into(),
        run_id: delivery.notice.run.map(|run| run.id.0.to_string()).unwrap_or_default(),
        environment: delivery.notice.environment.unwrap_or_default(),
        create_time: Some(convert::timestamp(delivery.created_at.into())),
        attempts: delivery.attempts,
        last_attempt_time: last.map(|last| convert::timestamp(last.at.into())),
        last_status: last.and_then(|last| last.status).map_or(0, u32::from),
        last_detail: last.map(|last| last.detail.clone()).unwrap_or_default(),
        next_attempt_time: pending.then(|| convert::timestamp(delivery.next_at.into())),
    }
}
