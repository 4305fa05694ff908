//! `logs`: shows what terraform said.

use clap::{Args, ValueEnum};

use latchkey_proto::v1;
use latchkey_proto::v1::Phase;

use crate::Done;
use crate::client::Client;
use crate::context::Context;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::follow::{self, Until, Update};
use crate::log_view::LogView;
use crate::watch::{self, Asking, LogForm};

/// Shows the log of a run
#[derive(Debug, Args)]
pub(crate) struct Logs {
    /// Id of the run
    run: String,
    /// Only this phase; both if absent
    #[arg(long, value_enum)]
    phase: Option<PhaseName>,
    /// Go on until the log, or without --phase the run, has ended
    #[arg(short, long)]
    follow: bool,
    /// The canonical log as it is: lines of JSON in terraform's UI format. -o json does the same
    #[arg(long)]
    raw: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum PhaseName {
    Plan,
    Apply,
}

impl Logs {
    /// With a phase there is nothing to detach from but the log itself.
    pub(crate) fn follows(&self) -> bool {
        self.follow && self.phase.is_none()
    }

    pub(crate) async fn run(self, context: &mut Context) -> Done {
        let session = context.session()?;
        let client = &session.client;
        let form = match self.raw || context.output.is_json() {
            true => LogForm::Raw,
            false => LogForm::Text,
        };
        let phases = match self.phase {
            Some(PhaseName::Plan) => vec![Phase::Plan],
            Some(PhaseName::Apply) => vec![Phase::Apply],
            None => {
                let run = watch::fetch(client, &self.run).await?;
                if self.follow {
                    let exit = watch::follow(context, client, run, Asking::No, form).await?;
                    // How the run ended is not how reading its log ended.
                    return Ok(if exit == Exit::Detached { exit } else { Exit::Ok });
                }
                let begun = |facts: &Option<v1::JobFacts>| {
                    facts.as_ref().is_some_and(|facts| facts.log_length > 0)
                };
                [(Phase::Plan, begun(&run.plan)), (Phase::Apply, begun(&run.apply))]
                    .into_iter()
                    .filter_map(|(phase, begun)| begun.then_some(phase))
                    .collect()
            }
        };
        if phases.is_empty() {
            context.output.note("Nothing was logged yet.");
        }
        let until = if self.follow { Until::Finished } else { Until::Now };
        for phase in phases {
            copy(context, client, &self.run, phase, until, form).await?;
        }
        Ok(Exit::Ok)
    }
}

async fn copy(
    context: &mut Context,
    client: &Client,
    run_id: &str,
    phase: Phase,
    until: Until,
    form: LogForm,
) -> Result<(), Failure> {
    let mut view = LogView::new(context.output.colour());
    let mut pieces = follow::read_log(client, run_id, phase, until);
    while let Some(piece) = pieces.recv().await {
        match piece {
            Update::Item(bytes) => match form {
                LogForm::Text => {
                    let text = view.push(&bytes);
                    context.output.text(&text)?;
                }
                LogForm::Raw | LogForm::Events => context.output.bytes(&bytes)?,
            },
            Update::Trouble(problem) => {
                context.output.note(&format!("Connection lost, trying again: {problem}"));
            }
            Update::Failed(failure) => return Err(failure),
        }
    }
    context.output.text(&view.finish())
}
