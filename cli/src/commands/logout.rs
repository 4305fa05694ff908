//! `logout`: ends the session and forgets the token.

use clap::Args;
use serde::Serialize;

use latchkey_proto::v1;

use crate::Done;
use crate::config;
use crate::context::Context;
use crate::exit::Exit;
use crate::failure::Failure;

/// Ends the session and forgets the stored token
///
/// A token that was not made by a sign-in with a password stays valid on the control plane.
#[derive(Debug, Args)]
pub(crate) struct Logout {}

#[derive(Serialize)]
struct LogoutView {
    was_signed_in: bool,
    ended_session: bool,
}

impl Logout {
    pub(crate) async fn run(self, context: &mut Context) -> Done {
        let ended_session = end_session(context).await;
        let was_signed_in = config::remove(&context.config_path()?)?;
        let view = LogoutView { was_signed_in, ended_session };
        context.output.data(&view, |view| match view.was_signed_in {
            true => "Signed out\n".to_owned(),
            false => "Nobody was signed in\n".to_owned(),
        })?;
        Ok(Exit::Ok)
    }
}

/// Ends the session at the control plane, if it is one; that this fails is no reason to keep it
/// here.
async fn end_session(context: &mut Context) -> bool {
    let session = match context.session() {
        Ok(session) if session.is_sign_in => session,
        Ok(_) | Err(_) => return false,
    };
    let client = &session.client;
    let ended = client.sessions().sign_out(v1::SignOutRequest {}).await;
    match client.once(ended) {
        Ok(_) => true,
        Err(Failure::Refused(_)) => false,
        Err(failure) => {
            context.output.note(&format!(
                "{}; the session ends by itself within 12 hours of its start",
                failure.headline()
            ));
            false
        }
    }
}
