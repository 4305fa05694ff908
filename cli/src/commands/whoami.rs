//! `whoami`: who is signed in, where, as what.

use clap::Args;

use latchkey_proto::v1;

use crate::Done;
use crate::context::Context;
use crate::exit::Exit;
use crate::view::account::CallerView;

/// Tells who you are to the control plane
#[derive(Debug, Args)]
pub(crate) struct WhoAmI {}

impl WhoAmI {
    pub(crate) async fn run(self, context: &mut Context) -> Done {
        let session = context.session()?;
        let client = &session.client;
        let caller = client
            .call(|| {
                let mut accounts = client.accounts();
                async move { accounts.who_am_i(v1::WhoAmIRequest {}).await }
            })
            .await?;
        let view = CallerView::new(&session.address, session.default_organization(), &caller);
        context.output.data(&view, CallerView::human)?;
        Ok(Exit::Ok)
    }
}
