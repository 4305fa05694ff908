//! `retry`: queues an ended run once more.

use clap::Args;
use uuid::Uuid;

use latchkey_proto::v1;

use crate::Done;
use crate::context::Context;
use crate::exit::Exit;
use crate::given::GivenArgs;
use crate::log_view::clean;
use crate::view::run as view;
use crate::view::run::RunView;
use crate::watch::{self, Asking, LogForm};
use crate::words::{Word, explain};

/// Queues a run that has ended once more: the same configuration, kind, targets and replacements,
/// under the policy and settings of now
///
/// Variables that were given for the first run alone ended with it, and have to be given again.
#[derive(Debug, Args)]
pub(crate) struct Retry {
    /// Id of the run
    run: String,
    /// The environment's name, typed again; for a run that destroys
    #[arg(long, value_name = "NAME")]
    confirm_destroy: Option<String>,
    /// Follow the new run, and ask for codes when it needs them
    #[arg(long)]
    watch: bool,
    #[command(flatten)]
    given: GivenArgs,
}

impl Retry {
    pub(crate) fn follows(&self) -> bool {
        self.watch
    }

    pub(crate) async fn run(self, context: &mut Context) -> Done {
        let session = context.session()?;
        let client = &session.client;
        let request = v1::RetryRunRequest {
            run_id: self.run,
            request_id: Uuid::new_v4().to_string(),
            variables: self.given.read(&mut context.input).await?,
            destroy_confirmation: self.confirm_destroy.unwrap_or_default(),
        };
        let answer = client
            .call(|| {
                let (mut runs, request) = (client.runs(), request.clone());
                async move { runs.retry_run(request).await }
            })
            .await?;
        let run = answer.run.unwrap_or_default();
        let id = clean(&run.run_id);
        if !self.watch {
            context.output.data(&RunView::new(&run), |_| {
                format!("Queued run {id}\n  {}: {}\n", run.state().camel(), explain(run.state()))
            })?;
            if let Some(next) = view::next_step(&run) {
                context.output.hint(&next);
            }
            return Ok(Exit::Ok);
        }
        context.output.note(&format!("Queued run {id}"));
        let form = if context.output.is_json() { LogForm::Events } else { LogForm::Text };
        watch::follow(context, client, run, Asking::Yes, form).await
    }
}
