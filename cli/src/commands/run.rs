//! `run`: lists, shows and follows runs.

use clap::Subcommand;

use latchkey_proto::v1;

use crate::Done;
use crate::context::Context;
use crate::exit::Exit;
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
            Run::List { .. } | Run::Show { .. } => false,
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
            Run::Watch { run } => {
                let run = watch::fetch(client, &run).await?;
                let form = if context.output.is_json() { LogForm::Events } else { LogForm::Text };
                watch::follow(context, client, run, Asking::Yes, form).await
            }
        }
    }
}
