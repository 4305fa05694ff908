//! `service-token`: tokens for programs, which queue runs and never submit codes.

use clap::{Subcommand, ValueEnum};
use uuid::Uuid;

use latchkey_proto::v1;

use crate::Done;
use crate::client::Client;
use crate::context::Context;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::view::account::TokenView;
use crate::view::member::{EndedView, ServiceTokenListView, ServiceTokenView};
use crate::words::{human_time, parse_duration, time};

#[derive(Debug, Subcommand)]
pub(crate) enum ServiceToken {
    /// Lists service tokens, also expired ones; owners only
    List,
    /// Ends a service token at once, with what it has open; owners only
    Revoke {
        /// Name of the token
        name: String,
    },
    /// Makes a service token and shows it, once; owners only
    Create {
        /// Lower-case letters, digits and `-`
        name: String,
        /// How long it is good for, such as 720h; 90 days if absent
        #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
        lifetime: Option<prost_types::Duration>,
        /// What it may do
        #[arg(long, value_enum, default_value = "write")]
        access: TokenAccess,
        /// Where; may be repeated; everywhere if absent
        #[arg(long = "env", value_name = "ENV")]
        environments: Vec<String>,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum TokenAccess {
    /// See runs, logs, settings, non-sensitive values
    Read,
    /// Upload, queue, cancel
    Write,
}

impl From<TokenAccess> for v1::Access {
    fn from(access: TokenAccess) -> v1::Access {
        match access {
            TokenAccess::Read => v1::Access::Read,
            TokenAccess::Write => v1::Access::Write,
        }
    }
}

impl ServiceToken {
    pub(crate) async fn run(self, context: &mut Context) -> Done {
        let session = context.session()?;
        let organization = session.organization()?;
        match self {
            ServiceToken::List => {
                let service_tokens = list(&session.client, organization).await?;
                let view = ServiceTokenListView { service_tokens };
                context.output.data(&view, ServiceTokenListView::human)?;
                Ok(Exit::Ok)
            }
            ServiceToken::Revoke { name } => {
                let request = v1::RevokeServiceTokenRequest { organization, name: name.clone() };
                let client = &session.client;
                client.once(client.accounts().revoke_service_token(request).await)?;
                let human = |view: &EndedView| format!("Revoked the token {}\n", view.name);
                context.output.data(&EndedView { name }, human)?;
                Ok(Exit::Ok)
            }
            ServiceToken::Create { name, lifetime, access, environments } => {
                let request = v1::CreateServiceTokenRequest {
                    organization,
                    name: name.clone(),
                    lifetime,
                    request_id: Uuid::new_v4().to_string(),
                    access: v1::Access::from(access).into(),
                    environments,
                };
                let client = &session.client;
                let answer = client
                    .call(|| {
                        let (mut service, request) = (client.accounts(), request.clone());
                        async move { service.create_service_token(request).await }
                    })
                    .await?;
                let expires = answer.expire_time;
                let expire_time = time(expires.as_ref());
                let view = TokenView { name, token: answer.token, expire_time };
                context.output.data(&view, |view| format!("{}\n", view.token))?;
                if !context.output.is_json() {
                    let until = human_time(expires.as_ref());
                    context.output.hint(&format!("shown once; good until {until}"));
                }
                Ok(Exit::Ok)
            }
        }
    }
}

async fn list(client: &Client, organization: String) -> Result<Vec<ServiceTokenView>, Failure> {
    let mut request = v1::ListServiceTokensRequest { organization, ..Default::default() };
    let mut tokens = vec![];
    loop {
        let page = client
            .call(|| {
                let (mut service, request) = (client.accounts(), request.clone());
                async move { service.list_service_tokens(request).await }
            })
            .await?;
        tokens.extend(page.service_tokens.iter().map(ServiceTokenView::new));
        request.page_token = page.next_page_token;
        if request.page_token.is_empty() {
            return Ok(tokens);
        }
    }
}
