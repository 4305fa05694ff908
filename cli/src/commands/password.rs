//! `password`: sets your own.

use clap::Args;
use secrecy::{ExposeSecret, SecretString};

use latchkey_proto::v1;

use crate::Done;
use crate::context::Context;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::input::Question;
use crate::view::member::PasswordView;

/// Sets your password, and ends your other sessions
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
        let answer = client.once(client.sessions().set_password(request).await)?;
        context.output.data(&PasswordView::new(&answer), PasswordView::human)?;
        Ok(Exit::Ok)
    }
}
