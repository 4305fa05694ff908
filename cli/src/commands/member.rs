//! `member`: who belongs to the organization, and what they may do in it.

use clap::Subcommand;
use secrecy::ExposeSecret;

use latchkey_proto::v1;

use super::user::{Access, Role};
use crate::Done;
use crate::client::Client;
use crate::context::Context;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::input::Question;
use crate::log_view::clean;
use crate::view::member::{EndedView, MemberListView, MemberView};

#[derive(Debug, Subcommand)]
pub(crate) enum Member {
    /// Lists the members; who is no owner sees themselves alone
    List,
    /// Makes an existing user a member; owners only
    Add {
        /// Name of the user
        name: String,
        /// What they may do in the organization
        #[arg(long, value_enum)]
        role: Role,
        /// What a member may do in each environment; `write` if absent
        #[arg(long, value_enum)]
        access: Option<Access>,
        /// What they may do in one environment, such as `prod=none`; may be repeated
        #[arg(long = "env", value_name = "ENV=ACCESS", value_parser = parse_environment)]
        environments: Vec<v1::EnvironmentAccess>,
    },
    /// Changes what a member may do; owners only
    #[command(arg_required_else_help = true)]
    Set {
        /// Name of the member
        name: String,
        #[arg(long, value_enum)]
        role: Option<Role>,
        /// In each environment that is not set apart
        #[arg(long, value_enum)]
        access: Option<Access>,
        /// In one environment, such as `prod=read`; `prod=default` sets it apart no more; may be
        /// repeated
        #[arg(long = "env", value_name = "ENV=ACCESS", value_parser = parse_environment)]
        environments: Vec<v1::EnvironmentAccess>,
    },
    /// Takes somebody out; owners only
    ///
    /// Their personal variables in this organization are deleted, and what they have open ends.
    Remove {
        /// Name of the member
        name: String,
        /// Remove without asking for the name again
        #[arg(long)]
        yes: bool,
    },
}

impl Member {
    pub(crate) async fn run(self, context: &mut Context) -> Done {
        let session = context.session()?;
        let (client, organization) = (&session.client, session.organization()?);
        match self {
            Member::List => show_all(context, client, organization).await?,
            Member::Add { name, role, access, environments } => {
                let request = v1::AddMemberRequest {
                    organization,
                    user: name,
                    role: v1::Role::from(role).into(),
                    access: access.map_or(v1::Access::Unspecified, v1::Access::from).into(),
                    environments,
                };
                let answer = client.once(client.members().add_member(request).await)?;
                let view = MemberView::new(&answer.member.unwrap_or_default());
                context.output.data(&view, MemberView::human)?;
            }
            Member::Set { name, role, access, environments } => {
                let request = v1::UpdateMemberRequest {
                    organization,
                    user: name,
                    role: role.map_or(v1::Role::Unspecified, v1::Role::from).into(),
                    access: access.map_or(v1::Access::Unspecified, v1::Access::from).into(),
                    environments,
                };
                let answer = client
                    .call(|| {
                        let (mut service, request) = (client.members(), request.clone());
                        async move { service.update_member(request).await }
                    })
                    .await?;
                let view = MemberView::new(&answer.member.unwrap_or_default());
                context.output.data(&view, MemberView::human)?;
            }
            Member::Remove { name, yes } => {
                if !yes {
                    let what = "remove them, with their personal variables";
                    type_again(context, &name, what).await?;
                }
                let request = v1::RemoveMemberRequest { organization, user: name.clone() };
                client.once(client.members().remove_member(request).await)?;
                let human = |view: &EndedView| format!("{} is no member any more\n", view.name);
                context.output.data(&EndedView { name }, human)?;
            }
        }
        Ok(Exit::Ok)
    }
}

/// Lists all members.
pub(super) async fn show_all(
    context: &mut Context,
    client: &Client,
    organization: String,
) -> Result<(), Failure> {
    let mut request = v1::ListMembersRequest { organization, ..Default::default() };
    let mut members = vec![];
    loop {
        let page = client
            .call(|| {
                let (mut service, request) = (client.members(), request.clone());
                async move { service.list_members(request).await }
            })
            .await?;
        members.extend(page.members.iter().map(MemberView::new));
        request.page_token = page.next_page_token;
        if request.page_token.is_empty() {
            break;
        }
    }
    context.output.data(&MemberListView { members }, MemberListView::human)
}

/// Asks for a name again, before what cannot be taken back.
pub(super) async fn type_again(
    context: &mut Context,
    name: &str,
    what: &str,
) -> Result<(), Failure> {
    let question = format!("Type {} to {what}: ", clean(name));
    let typed = context.input.answer(Question::Visible(question)).await?;
    if typed.expose_secret().trim() == name {
        return Ok(());
    }
    Err(Failure::Usage {
        message: "that is not the name; nothing was done".into(),
        hint: "repeat and type it, or add --yes".into(),
    })
}

fn parse_environment(text: &str) -> Result<v1::EnvironmentAccess, String> {
    let said = || "write it as ENV=ACCESS: none, read, write, admin or default".to_owned();
    let (environment, access) = text.split_once('=').ok_or_else(said)?;
    let access = match access {
        "none" => v1::Access::None,
        "read" => v1::Access::Read,
        "write" => v1::Access::Write,
        "admin" => v1::Access::Admin,
        "default" => v1::Access::Unspecified,
        _ => return Err(said()),
    };
    Ok(v1::EnvironmentAccess { environment: environment.to_owned(), access: access.into() })
}
