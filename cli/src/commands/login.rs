//! `login`: signs in with a password, checks a token, or buys the first one with the one-time
//! secret, and keeps what it gets.

use std::fs;
use std::path::PathBuf;

use clap::Args;
use secrecy::{ExposeSecret, SecretString};

use latchkey_proto::v1;

use crate::client::{Client, Target, full_address};
use crate::config::{self, Credentials};
use crate::context::Context;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::input::Question;
use crate::view::account::CallerView;
use crate::words::human_time;
use crate::{Done, log_view};

/// Signs in to a control plane
///
/// With --user, your password is asked for by a hidden prompt, or read as one line of standard
/// input; the session that it opens ends after 12 hours. Without, a token is asked for in the same
/// way. The token is kept in a file that only you can read, together with the CA to trust and the
/// default organization. `latchkey password` sets a password.
#[derive(Debug, Args)]
pub(crate) struct Login {
    /// Such as https://latchkey.example.com:7400
    address: String,
    /// CA certificate (PEM) to trust instead of the platform's
    #[arg(long, value_name = "FILE")]
    ca_file: Option<PathBuf>,
    /// Allow http:// to a loopback address
    #[arg(long)]
    insecure_plaintext: bool,
    /// Make the first organization and its owner, with the secret that the control plane printed
    /// at its first start; needs --organization and --user
    #[arg(long, requires = "user")]
    bootstrap: bool,
    /// Your name, to sign in with your password; with --bootstrap, the name of the owner to make
    #[arg(long, value_name = "NAME")]
    user: Option<String>,
}

impl Login {
    pub(crate) async fn run(self, context: &mut Context) -> Done {
        let path = context.config_path()?;
        let ca_pem = match &self.ca_file {
            Some(file) => Some(fs::read_to_string(file).map_err(|source| Failure::Usage {
                message: format!("{} cannot be read: {source}", file.display()),
                hint: "--ca-file names the control plane's CA certificate".into(),
            })?),
            None => None,
        };
        let target = Target {
            address: full_address(&self.address),
            ca_pem,
            insecure_plaintext: self.insecure_plaintext,
        };
        // Checked before anything is asked for.
        let stranger = Client::new(&target, None)?;
        let token = match (self.bootstrap, self.user) {
            (true, Some(user)) => bootstrap(context, &stranger, user).await?,
            (false, Some(user)) => sign_in(context, &stranger, user).await?,
            (_, None) => context.input.answer(Question::Hidden("Token: ".into())).await?,
        };
        let token = SecretString::from(token.expose_secret().trim());
        let mut credentials = Credentials {
            address: target.address.clone(),
            ca_pem: target.ca_pem.clone(),
            token,
            organization: context.organization.clone(),
            insecure_plaintext: target.insecure_plaintext,
        };
        if self.bootstrap {
            // Shown once: kept before anything else can fail.
            config::save(&path, &credentials)?;
        }
        let client = Client::new(&target, Some(&credentials.token))?;
        let caller = client
            .call(|| {
                let mut accounts = client.accounts();
                async move { accounts.who_am_i(v1::WhoAmIRequest {}).await }
            })
            .await?;
        credentials.organization = default_organization(context, &caller)?;
        config::save(&path, &credentials)?;
        let view =
            CallerView::new(&credentials.address, credentials.organization.as_deref(), &caller);
        context.output.data(&view, CallerView::human)?;
        Ok(Exit::Ok)
    }
}

async fn bootstrap(
    context: &mut Context,
    client: &Client,
    user: String,
) -> Result<SecretString, Failure> {
    let organization = context.organization.clone().ok_or_else(|| Failure::Usage {
        message: "--bootstrap needs a name for the organization".into(),
        hint: "add --organization NAME".into(),
    })?;
    let secret = context.input.answer(Question::Hidden("One-time secret: ".into())).await?;
    let request = v1::BootstrapRequest {
        secret: secret.expose_secret().trim().to_owned(),
        organization,
        user,
    };
    let answer = client.once(client.accounts().bootstrap(request).await)?;
    Ok(answer.token.into())
}

async fn sign_in(
    context: &mut Context,
    client: &Client,
    user: String,
) -> Result<SecretString, Failure> {
    let password = context.input.answer(Question::Hidden("Password: ".into())).await?;
    sign_in_with(context, client, user, &password).await
}

/// Opens a session and says when it ends.
pub(super) async fn sign_in_with(
    context: &mut Context,
    client: &Client,
    user: String,
    password: &SecretString,
) -> Result<SecretString, Failure> {
    let request = v1::SignInRequest {
        user,
        password: password.expose_secret().to_owned(),
        client: this_program(),
    };
    let answer = client.once(client.sessions().sign_in(request).await)?;
    if !context.output.is_json() {
        let session = answer.session.unwrap_or_default();
        let until = human_time(session.expire_time.as_ref());
        context.output.hint(&format!("this session ends at {until}, or by `latchkey logout`"));
    }
    Ok(answer.token.into())
}

/// What the list of sessions calls us: up to 64 characters.
fn this_program() -> String {
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let name = format!("latchkey {} on {}", env!("CARGO_PKG_VERSION"), log_view::clean(&host));
    name.chars().filter(|c| !c.is_control()).take(64).collect()
}

/// Takes the named organization if the caller belongs to it, else the only one there is.
fn default_organization(
    context: &Context,
    caller: &v1::WhoAmIResponse,
) -> Result<Option<String>, Failure> {
    let names: Vec<&str> =
        caller.memberships.iter().map(|membership| membership.organization.as_str()).collect();
    match (&context.organization, names.as_slice()) {
        (Some(named), names) if names.contains(&named.as_str()) => Ok(Some(named.clone())),
        (Some(named), names) => Err(Failure::Usage {
            message: format!("you do not belong to the organization {named}"),
            hint: format!("yours: {}", log_view::clean(&names.join(", "))),
        }),
        (None, [only]) => Ok(Some((*only).to_owned())),
        (None, _) => Ok(None),
    }
}
