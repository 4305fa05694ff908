//! `password`: sets your own.

use clap::Args;
use secrecy::{ExposeSecret, SecretString};

use latchkey_proto::v1;

use super::login;
use crate::Done;
use crate::client::Client;
use crate::config::{self, Credentials};
use crate::context::Context;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::input::Question;
use crate::view::member::PasswordView;

/// Sets your password, and ends your other sessions and tokens
///
/// Whoever came with a token is signed in with the password from then on.
///
/// Passwords are asked for by hidden prompts, or read as lines of standard input: the current one,
/// if you signed in with it, then the new one. A password has 12 to 256 characters; no other rule.
#[derive(Debug, Args)]
pub(crate) struct Password {}

impl Password {
    pub(crate) async fn run(self, context: &mut Context) -> Done {
        let session = context.session()?;
        let mut ask =
            async |prompt: &str| context.input.answer(Question::Hidden(prompt.to_owned())).await;
        let current = match session.is_sign_in {
            true => ask("Current password: ").await?,
            false => SecretString::default(),
        };
        let new = ask("New password: ").await?;
        if context.input.is_terminal() {
            let question = Question::Hidden("The new password again: ".into());
            let again = context.input.answer(question).await?;
            if again.expose_secret() != new.expose_secret() {
                return Err(Failure::Usage {
                    message: "the two are not the same; nothing was changed".into(),
                    hint: "repeat".into(),
                });
            }
        }
        let request = v1::SetPasswordRequest {
            current_password: current.expose_secret().to_owned(),
            new_password: new.expose_secret().to_owned(),
        };
        let client = &session.client;
        let caller = match session.is_sign_in {
            true => None,
            false => Some(who_am_i(client).await?),
        };
        let answer = client.once(client.sessions().set_password(request).await)?;
        context.output.data(&PasswordView::new(&answer), PasswordView::human)?;
        // The token that was kept ended with it.
        if let Some(caller) = caller {
            let token = login::sign_in_with(context, client, caller.user, &new).await?;
            let path = context.config_path()?;
            let credentials = Credentials { token, ..config::load(&path)? };
            config::save(&path, &credentials)?;
        }
        Ok(Exit::Ok)
    }
}

async fn who_am_i(client: &Client) -> Result<v1::WhoAmIResponse, Failure> {
    let ask = || {
        let mut accounts = client.accounts();
        async move { accounts.who_am_i(v1::WhoAmIRequest {}).await }
    };
    client.call(ask).await
}
