//! `cancel`: stops a run.

use clap::Args;

use latchkey_proto::v1;

use crate::Done;
use crate::context::Context;
use crate::exit::Exit;
use crate::view::run::{RunView, force_hint};
use crate::words::{Word, explain};

/// Stops a run: at once while it waits, gracefully while terraform runs. The runner of a lost run
/// is told when it comes back; to give such a run up is `discard`
#[derive(Debug, Args)]
pub(crate) struct Cancel {
    /// Id of the run
    run: String,
    /// Kill terraform and all that it started, which can lose state: after a cancel without this,
    /// and some time to end well. Owners only
    #[arg(long)]
    force: bool,
}

impl Cancel {
    pub(crate) async fn run(self, context: &mut Context) -> Done {
        let session = context.session()?;
        let client = &session.client;
        let request = v1::CancelRequest { run_id: self.run, force: self.force };
        let answer = client
            .call(|| {
                let (mut runs, request) = (client.runs(), request.clone());
                async move { runs.cancel(request).await }
            })
            .await?;
        let run = answer.run.unwrap_or_default();
        context.output.data(&RunView::new(&run), |_| {
            let stopping = match (run.cancel_requested, request.force) {
                (true, true) => "Killing\n",
                (true, false) => "Stopping\n",
                (false, _) => "",
            };
            format!("{stopping}{}: {}\n", run.state().camel(), explain(run.state()))
        })?;
        if let Some(next) = force_hint(&run).filter(|_| !request.force) {
            context.output.hint(&next);
        }
        Ok(Exit::Ok)
    }
}
