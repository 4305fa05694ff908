//! `cancel`: stops a run.

use clap::Args;

use latchkey_proto::v1;

use crate::Done;
use crate::context::Context;
use crate::exit::Exit;
use crate::view::run::RunView;
use crate::words::{Word, explain};

/// Stops a run: at once while it waits, gracefully while terraform runs
#[derive(Debug, Args)]
pub(crate) struct Cancel {
    /// Id of the run
    run: String,
}

impl Cancel {
    pub(crate) async fn run(self, context: &mut Context) -> Done {
        let session = context.session()?;
        let client = &session.client;
        let request = v1::CancelRequest { run_id: self.run, force: false };
        let answer = client
            .call(|| {
                let (mut runs, request) = (client.runs(), request.clone());
                async move { runs.cancel(request).await }
            })
            .await?;
        let run = answer.run.unwrap_or_default();
        context.output.data(&RunView::new(&run), |_| {
            let stopping = if run.cancel_requested { "Stopping\n" } else { "" };
            format!("{stopping}{}: {}\n", run.state().camel(), explain(run.state()))
        })?;
        Ok(Exit::Ok)
    }
}
