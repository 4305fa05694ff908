//! `mail`: people who are told by mail when a run needs somebody or ends.

use clap::Subcommand;

use latchkey_proto::v1;

use super::webhook::{self, Selection};
use crate::Done;
use crate::context::Context;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::view::notice::{SubscriberListView, SubscriberView};

#[derive(Debug, Subcommand)]
pub(crate) enum Mail {
    /// Adds a recipient, or replaces what one is told of; owners only
    Set {
        /// One plain address, such as ops@example.com
        address: String,
        #[command(flatten)]
        selection: Selection,
    },
    /// Lists the recipients; owners only
    List,
    /// Removes a recipient, and drops what is on its way there; owners only
    Delete {
        /// The address, or the id that `list` shows
        recipient: String,
    },
    /// Sends a test, and waits for what becomes of it; owners only
    Test {
        /// The address, or the id that `list` shows
        recipient: String,
    },
}

impl Mail {
    pub(crate) async fn run(self, context: &mut Context) -> Done {
        let session = context.session()?;
        let (client, organization) = (&session.client, session.organization()?);
        let list = async || {
            let request = v1::ListMailRecipientsRequest { organization: organization.clone() };
            client
                .call(|| {
                    let (mut service, request) = (client.notices(), request.clone());
                    async move { service.list_mail_recipients(request).await }
                })
                .await
        };
        let id_of = async |recipient: String| -> Result<String, Failure> {
            let mut listed = list().await?.recipients.into_iter();
            let found = listed.find(|found| found.address == recipient);
            Ok(found.map_or(recipient, |found| found.recipient_id))
        };
        match self {
            Mail::Set { address, selection } => {
                let request = v1::SetMailRecipientRequest {
                    organization: organization.clone(),
                    address,
                    events: selection.wire_events(),
                    environments: selection.into_environments(),
                };
                let answer = client
                    .call(|| {
                        let (mut service, request) = (client.notices(), request.clone());
                        async move { service.set_mail_recipient(request).await }
                    })
                    .await?;
                let view = SubscriberView::of_recipient(answer.recipient.unwrap_or_default());
                context.output.data(&view, SubscriberView::human)?;
            }
            Mail::List => {
                let answer = list().await?;
                let recipients = answer.recipients.into_iter().map(SubscriberView::of_recipient);
                let view = SubscriberListView::new(recipients, Some(answer.mail_available));
                context.output.data(&view, SubscriberListView::human)?;
                if !answer.mail_available && !context.output.is_json() {
                    context.output.hint("the operator configured no mail server: nothing is sent");
                }
            }
            Mail::Delete { recipient } => {
                let recipient_id = id_of(recipient).await?;
                let request = v1::DeleteMailRecipientRequest {
                    organization: organization.clone(),
                    recipient_id,
                };
                let answer = client.notices().delete_mail_recipient(request).await;
                client.once(answer)?;
            }
            Mail::Test { recipient } => {
                let id = id_of(recipient).await?;
                return webhook::test(context, client, organization.clone(), id).await;
            }
        }
        Ok(Exit::Ok)
    }
}
