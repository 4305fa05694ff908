//! `discard`: gives a plan up, or a lost apply.

use clap::Args;

use latchkey_proto::v1;

use crate::Done;
use crate::context::Context;
use crate::exit::Exit;
use crate::view::run::RunView;
use crate::words::{Word, explain};

/// Gives the plan of a run up. Of a lost run it ends the waiting: the apply is given up for good,
/// whatever it did, and its environment stays frozen. That is for owners
#[derive(Debug, Args)]
pub(crate) struct Discard {
    /// Id of the run
    run: String,
}

impl Discard {
    pub(crate) async fn run(self, context: &mut Context) -> Done {
        let session = context.session()?;
        let client = &session.client;
        let request = v1::DiscardRequest { run_id: self.run };
        let answer = client
            .call(|| {
                let (mut runs, request) = (client.runs(), request.clone());
                async move { runs.discard(request).await }
            })
            .await?;
        let run = answer.run.unwrap_or_default();
        context.output.data(&RunView::new(&run), |_| {
            format!("{}: {}\n", run.state().camel(), explain(run.state()))
        })?;
        Ok(Exit::Ok)
    }
}
