//! `whoami`: who is signed in, where, as what.

use clap::Args;

use latchkey_proto::v1;

use crate::Done;
use crate::context::Context;
use crate::exit::Exit;
use crate::view::account::CallerView;

/// Tells who you are to the control plane
///
/// Owners are also told what was done by break-glass in their organizations, until they acknowledge
/// it.
#[derive(Debug, Args)]
pub(crate) struct WhoAmI {
    /// Do not tell me again of what is told about break-glass
    #[arg(long)]
    acknowledge: bool,
}

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
        if self.acknowledge {
            // Oldest first: the last of an organization stands for those before it.
            for glass in caller.broken_glass {
                let request = v1::AcknowledgeBreakGlassRequest {
                    organization: glass.organization,
                    glass_id: glass.glass_id,
                };
                client
                    .call(|| {
                        let (mut accounts, request) = (client.accounts(), request.clone());
                        async move { accounts.acknowledge_break_glass(request).await }
                    })
                    .await?;
            }
        }
        Ok(Exit::Ok)
    }
}
