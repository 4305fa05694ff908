//! `user`: people.

use clap::{Subcommand, ValueEnum};
use uuid::Uuid;

use latchkey_proto::v1;

use super::member::{show_all, type_again};
use crate::Done;
use crate::context::Context;
use crate::exit::Exit;
use crate::view::account::TokenView;

#[derive(Debug, Subcommand)]
pub(crate) enum User {
    /// Lists the users of the organization, which are its members
    List,
    /// Makes a user and shows their token, once; owners only
    Create {
        /// Lower-case letters, digits and `-`
        name: String,
        /// What they may do in the organization
        #[arg(long, value_enum)]
        role: Role,
        /// What a member may do in each environment; `write` if absent
        #[arg(long, value_enum)]
        access: Option<Access>,
    },
    /// Gives a user a new token and shows it, once; owners only
    ///
    /// For who has lost theirs. All their old tokens, their sessions and their password end. Not for
    /// a user who belongs to other organizations, too.
    Reset {
        /// Name of the user
        name: String,
        /// Reset without asking for the name again
        #[arg(long)]
        yes: bool,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Role {
    /// May do in each environment what the access there says
    Member,
    /// Everything everywhere, and alone: policy, organization variables, people, pools, accounts
    Owner,
}

impl From<Role> for v1::Role {
    fn from(role: Role) -> v1::Role {
        match role {
            Role::Member => v1::Role::Member,
            Role::Owner => v1::Role::Owner,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Access {
    /// The environment is hidden
    None,
    /// See runs, logs, settings, non-sensitive values
    Read,
    /// Upload, queue, cancel; persons also submit codes, confirm and discard
    Write,
    /// Settings but for the owners', variables, locks, states; persons only
    Admin,
}

impl From<Access> for v1::Access {
    fn from(access: Access) -> v1::Access {
        match access {
            Access::None => v1::Access::None,
            Access::Read => v1::Access::Read,
            Access::Write => v1::Access::Write,
            Access::Admin => v1::Access::Admin,
        }
    }
}

impl User {
    pub(crate) async fn run(self, context: &mut Context) -> Done {
        let session = context.session()?;
        let organization = session.organization()?;
        match self {
            User::List => {
                show_all(context, &session.client, organization).await?;
                Ok(Exit::Ok)
            }
            User::Reset { name, yes } => {
                if !yes {
                    let what = "end their tokens, sessions and password";
                    type_again(context, &name, what).await?;
                }
                let request = v1::ResetUserRequest {
                    organization,
                    user: name.clone(),
                    request_id: Uuid::new_v4().to_string(),
                };
                let client = &session.client;
                let answer = client
                    .call(|| {
                        let (mut service, request) = (client.accounts(), request.clone());
                        async move { service.reset_user(request).await }
                    })
                    .await?;
                show_token(context, TokenView { name, token: answer.token, expire_time: None })
            }
            User::Create { name, role, access } => {
                let request = v1::CreateUserRequest {
                    organization,
                    user: name.clone(),
                    role: v1::Role::from(role).into(),
                    request_id: Uuid::new_v4().to_string(),
                    access: access.map_or(v1::Access::Unspecified, v1::Access::from).into(),
                };
                let client = &session.client;
                let answer = client
                    .call(|| {
                        let (mut service, request) = (client.accounts(), request.clone());
                        async move { service.create_user(request).await }
                    })
                    .await?;
                let view = TokenView { name, token: answer.token, expire_time: None };
                show_token(context, view)
            }
        }
    }
}

fn show_token(context: &mut Context, view: TokenView) -> Done {
    context.output.data(&view, |view| format!("{}\n", view.token))?;
    if !context.output.is_json() {
        context.output.hint(
            "this token is shown once; its owner signs in with it by `latchkey login`, and may \
             then set a password by `latchkey password`",
        );
    }
    Ok(Exit::Ok)
}
