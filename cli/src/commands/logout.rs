//! `logout`: forgets the token.

use clap::Args;
use serde::Serialize;

use crate::Done;
use crate::config;
use crate::context::Context;
use crate::exit::Exit;

/// Forgets the stored token
///
/// The token itself stays valid on the control plane.
#[derive(Debug, Args)]
pub(crate) struct Logout {}

#[derive(Serialize)]
struct LogoutView {
    was_signed_in: bool,
}

impl Logout {
    pub(crate) fn run(self, context: &mut Context) -> Done {
        let was_signed_in = config::remove(&context.config_path()?)?;
        context.output.data(&LogoutView { was_signed_in }, |view| match view.was_signed_in {
            true => "Signed out\n".to_owned(),
            false => "Nobody was signed in\n".to_owned(),
        })?;
        Ok(Exit::Ok)
    }
}
