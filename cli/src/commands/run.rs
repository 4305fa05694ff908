//! `run`: lists, shows and follows runs.

use clap::Subcommand;

use latchkey_proto::v1;

use crate::Done;
use crate::client::Client;
use crate::context::Context;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::follow::{self, Until, Update};
use crate::log_view::{Colour, LogView};
use crate::progress::Progress;
use crate::view::progress::ProgressView;
use crate::view::run as view;
use crate::view::run::{RunListView, RunView};
use crate::watch::{self, Asking, LogForm};

#[derive(Debug, Subcommand)]
pub(crate) enum Run {
    /// Lists the runs of an environment, newest first
    List {
        /// Name of the environment
        #[arg(value_name = "ENV")]
        environment: String,
        /// At most this many
        #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
        limit: u32,
    },
    /// Shows a run: its lock, its plan, who authenticated, its outputs
    Show {
        /// Id of the run
        run: String,
    },
    /// Shows how far a run's apply has come: each resource, and how long it has taken
    Progress {
        /// Id of the run
        run: String,
    },
    /// Follows a run to its end, as `queue --watch` does
    Watch {
        /// Id of the run
        run: String,
    },
}

impl Run {
    pub(crate) fn follows(&self) -> bool {
        match self {
            Run::Watch { .. } => true,
            Run::List { .. } | Run::Show { .. } | Run::Progress { .. } => false,
        }
    }

    pub(crate) async fn run(self, context: &mut Context) -> Done {
        let session = context.session()?;
        let client = &session.client;
        match self {
            Run::List { environment, limit } => {
                let mut request = v1::ListRunsRequest {
                    organization: session.organization()?,
                    environment,
                    ..Default::default()
                };
                let mut runs = Vec::new();
                loop {
                    request.page_size = (limit - runs.len() as u32).min(200);
                    let page = client
                        .call(|| {
                            let (mut service, request) = (client.runs(), request.clone());
                            async move { service.list_runs(request).await }
                        })
                        .await?;
                    runs.extend(page.runs.iter().map(RunView::new));
                    request.page_token = page.next_page_token;
                    if request.page_token.is_empty() || runs.len() >= limit as usize {
                        break;
                    }
                }
                runs.truncate(limit as usize);
                context.output.data(&RunListView { runs }, view::list)?;
                Ok(Exit::Ok)
            }
            Run::Show { run } => {
                let run = watch::fetch(client, &run).await?;
                context.output.data(&RunView::new(&run), |_| view::show(&run))?;
                Ok(Exit::Ok)
            }
            Run::Progress { run } => {
                let run = watch::fetch(client, &run).await?;
                let progress = ProgressView::new(&progress_of(client, &run).await?);
                context.output.data(&progress, ProgressView::human)?;
                Ok(Exit::Ok)
            }
            Run::Watch { run } => {
                let run = watch::fetch(client, &run).await?;
                let form = if context.output.is_json() { LogForm::Events } else { LogForm::Text };
                watch::follow(context, client, run, Asking::Yes, form).await
            }
        }
    }
}

/// Folds the apply's log, as far as it goes, over what the plan changes.
async fn progress_of(client: &Client, run: &v1::Run) -> Result<Progress, Failure> {
    let mut progress = Progress::default();
    let changes = run.plan_result.iter().flat_map(|plan| &plan.change_list);
    for change in changes.filter(|change| is_applied(&change.action)) {
        progress.expect(&change.address, &change.action);
    }
    if run.apply.as_ref().is_none_or(|apply| apply.log_length == 0) {
        return Ok(progress);
    }
    let mut lines = LogView::new(Colour::Drop);
    let mut pieces = follow::read_log(client, &run.run_id, v1::Phase::Apply, Until::Now);
    while let Some(piece) = pieces.recv().await {
        match piece {
            Update::Item(bytes) => {
                lines.lines(&bytes).iter().for_each(|line| progress.take(line));
            }
            // The reader tries again; what matters is said in the end.
            Update::Trouble(_) => {}
            Update::Failed(failure) => return Err(failure),
        }
    }
    Ok(progress)
}

/// Tells what terraform begins and ends in an apply from what a plan lists besides.
fn is_applied(action: &str) -> bool {
    ["create", "update", "delete", "replace"].contains(&action)
}
