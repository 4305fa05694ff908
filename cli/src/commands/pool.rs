//! `pool`: pools of build hosts, and the tokens that let a host in.

use clap::Subcommand;
use uuid::Uuid;

use latchkey_proto::v1;

use crate::Done;
use crate::context::Context;
use crate::exit::Exit;
use crate::view::account::TokenView;
use crate::view::pool::PoolView;
use crate::words::{human_time, parse_duration, time};

#[derive(Debug, Subcommand)]
pub(crate) enum Pool {
    /// Makes a pool; owners only
    Create {
        /// Lower-case letters, digits and `-`
        name: String,
    },
    /// Makes a token that lets runners into a pool and shows it, once; owners only
    Token {
        /// Name of the pool
        name: String,
        /// Runners that it lets in; 1 if absent
        #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
        uses: Option<u32>,
        /// How long it is good for, such as 1h; 15 minutes if absent
        #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
        lifetime: Option<prost_types::Duration>,
    },
}

impl Pool {
    pub(crate) async fn run(self, context: &mut Context) -> Done {
        let session = context.session()?;
        let (client, organization) = (&session.client, session.organization()?);
        match self {
            Pool::Create { name } => {
                let request = v1::CreatePoolRequest {
                    organization,
                    pool: name,
                    request_id: Uuid::new_v4().to_string(),
                };
                let answer = client
                    .call(|| {
                        let (mut service, request) = (client.pools(), request.clone());
                        async move { service.create_pool(request).await }
                    })
                    .await?;
                let view = PoolView::new(&answer.pool.unwrap_or_default());
                context.output.data(&view, PoolView::human)?;
            }
            Pool::Token { name, uses, lifetime } => {
                let request = v1::CreatePoolTokenRequest {
                    organization,
                    pool: name.clone(),
                    lifetime,
                    uses: uses.unwrap_or(0),
                    request_id: Uuid::new_v4().to_string(),
                };
                let answer = client
                    .call(|| {
                        let (mut service, request) = (client.pools(), request.clone());
                        async move { service.create_pool_token(request).await }
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
            }
        }
        Ok(Exit::Ok)
    }
}
