//! `org`: the organization's settings.

use clap::Subcommand;

use latchkey_proto::v1;

use crate::Done;
use crate::change::{self, Ask};
use crate::context::Context;
use crate::exit::Exit;
use crate::view::account::OrganizationView;

#[derive(Debug, Subcommand)]
pub(crate) enum Org {
    /// Shows the organization
    Show,
    /// Replaces the list of AWS accounts whose keys may be used with codes; owners only
    ///
    /// Another list than before takes a token code, which is asked for.
    Set {
        /// Twelve digits; may be given several times
        #[arg(long = "aws-account", value_name = "ID", required_unless_present = "no_aws_account")]
        aws_accounts: Vec<String>,
        /// Empty the list: no code is used at all
        #[arg(long, conflicts_with = "aws_accounts")]
        no_aws_account: bool,
    },
}

impl Org {
    pub(crate) async fn run(self, context: &mut Context) -> Done {
        let session = context.session()?;
        let (client, organization) = (&session.client, session.organization()?);
        let organization = match self {
            Org::Show => {
                let request = v1::GetOrganizationRequest { organization };
                client
                    .call(|| {
                        let (mut service, request) = (client.organizations(), request.clone());
                        async move { service.get_organization(request).await }
                    })
                    .await?
                    .organization
            }
            Org::Set { aws_accounts, no_aws_account: _ } => {
                change::make(context, client, Ask::WhenNeeded, |token_code, request_id| {
                    let request = v1::UpdateOrganizationRequest {
                        organization: organization.clone(),
                        aws_accounts: aws_accounts.clone(),
                        token_code,
                        request_id,
                    };
                    let mut service = client.organizations();
                    async move { service.update_organization(request).await }
                })
                .await?
                .organization
            }
        };
        let view = OrganizationView::new(&organization.unwrap_or_default());
        context.output.data(&view, OrganizationView::human)?;
        Ok(Exit::Ok)
    }
}
