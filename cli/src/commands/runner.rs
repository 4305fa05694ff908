//! `runner`: the build hosts.

use clap::{Args, Subcommand};
use secrecy::ExposeSecret;
use uuid::Uuid;

use latchkey_proto::v1;

use crate::Done;
use crate::client::Client;
use crate::context::Context;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::input::Question;
use crate::log_view::clean;
use crate::view::pool::{RunnerListView, RunnerView};

#[derive(Debug, Subcommand)]
pub(crate) enum Runner {
    /// Lists the runners of all pools
    List,
    /// Shows a runner: what it holds and since when, its engines, labels and host
    Show(Named),
    /// Lets a runner finish what it holds and offers it nothing more; owners only
    Drain(Named),
    /// Takes a drain back; owners only
    Resume(Named),
    /// Ends a runner's identity for good; owners only
    ///
    /// Its certificate is refused and its streams are closed. Plans that it holds are granted to
    /// others; an apply that it has started is lost until a person decides.
    Revoke {
        #[command(flatten)]
        named: Named,
        /// Revoke without asking for the name again
        #[arg(long)]
        yes: bool,
    },
}

#[derive(Debug, Args)]
pub(crate) struct Named {
    /// Name or id of the runner, as `runner list` shows them
    runner: String,
}

impl Runner {
    pub(crate) async fn run(self, context: &mut Context) -> Done {
        let session = context.session()?;
        let (client, organization) = (&session.client, session.organization());
        let runner = match self {
            Runner::List => {
                let runners = list(client, organization?).await?;
                let runners = runners.iter().map(RunnerView::new).collect();
                context.output.data(&RunnerListView { runners }, RunnerListView::human)?;
                return Ok(Exit::Ok);
            }
            Runner::Show(named) => {
                let runner_id = named.id(client, organization).await?;
                show(client, runner_id).await?
            }
            Runner::Drain(named) => {
                let runner_id = named.id(client, organization).await?;
                let request = v1::DrainRunnerRequest { runner_id };
                client
                    .call(|| {
                        let (mut service, request) = (client.pools(), request.clone());
                        async move { service.drain_runner(request).await }
                    })
                    .await?
                    .runner
                    .unwrap_or_default()
            }
            Runner::Resume(named) => {
                let runner_id = named.id(client, organization).await?;
                let request = v1::ResumeRunnerRequest { runner_id };
                client
                    .call(|| {
                        let (mut service, request) = (client.pools(), request.clone());
                        async move { service.resume_runner(request).await }
                    })
                    .await?
                    .runner
                    .unwrap_or_default()
            }
            Runner::Revoke { named, yes } => {
                let runner_id = named.id(client, organization).await?;
                if !yes {
                    confirm(context, &show(client, runner_id.clone()).await?).await?;
                }
                let request = v1::RevokeRunnerRequest { runner_id };
                client
                    .call(|| {
                        let (mut service, request) = (client.pools(), request.clone());
                        async move { service.revoke_runner(request).await }
                    })
                    .await?
                    .runner
                    .unwrap_or_default()
            }
        };
        context.output.data(&RunnerView::new(&runner), RunnerView::human)?;
        Ok(Exit::Ok)
    }
}

impl Named {
    /// Finds the id of the runner that is meant. Of several with one name, those that were
    /// revoked are not meant.
    async fn id(
        &self,
        client: &Client,
        organization: Result<String, Failure>,
    ) -> Result<String, Failure> {
        if Uuid::try_parse(&self.runner).is_ok() {
            return Ok(self.runner.clone());
        }
        let runners = list(client, organization?).await?;
        let named: Vec<&v1::Runner> =
            runners.iter().filter(|runner| runner.name == self.runner).collect();
        let in_use: Vec<&v1::Runner> =
            named.iter().copied().filter(|runner| runner.revoke_time.is_none()).collect();
        match (named.as_slice(), in_use.as_slice()) {
            (_, [one]) | ([one], []) => Ok(one.runner_id.clone()),
            ([], _) => Err(Failure::Usage {
                message: format!("no runner is named {}", clean(&self.runner)),
                hint: "`latchkey runner list` shows names and ids".into(),
            }),
            (_, _) => Err(Failure::Usage {
                message: format!("several runners are named {}", clean(&self.runner)),
                hint: "name it by its id; `latchkey runner list` shows them".into(),
            }),
        }
    }
}

async fn list(client: &Client, organization: String) -> Result<Vec<v1::Runner>, Failure> {
    let mut request = v1::ListRunnersRequest { organization, ..Default::default() };
    let mut runners = Vec::new();
    loop {
        let page = client
            .call(|| {
                let (mut service, request) = (client.pools(), request.clone());
                async move { service.list_runners(request).await }
            })
            .await?;
        runners.extend(page.runners);
        request.page_token = page.next_page_token;
        if request.page_token.is_empty() {
            return Ok(runners);
        }
    }
}

async fn show(client: &Client, runner_id: String) -> Result<v1::Runner, Failure> {
    let request = v1::GetRunnerRequest { runner_id };
    let answer = client
        .call(|| {
            let (mut service, request) = (client.pools(), request.clone());
            async move { service.get_runner(request).await }
        })
        .await?;
    Ok(answer.runner.unwrap_or_default())
}

/// Asks for the runner's name, after saying what would be lost.
async fn confirm(context: &mut Context, runner: &v1::Runner) -> Result<(), Failure> {
    let name = clean(&runner.name);
    let holds = match runner.holds.len() {
        0 => "nothing".to_owned(),
        1 => "1 job".to_owned(),
        many => format!("{many} jobs"),
    };
    context.output.note(&format!("Runner {name} of pool {} holds {holds}", clean(&runner.pool)));
    let question = format!("Type {name} to revoke it for good: ");
    let typed = context.input.answer(Question::Visible(question)).await?;
    if typed.expose_secret().trim() == runner.name {
        return Ok(());
    }
    Err(Failure::Usage {
        message: "that is not the runner's name; nothing was done".into(),
        hint: "repeat and type its name, or add --yes".into(),
    })
}
