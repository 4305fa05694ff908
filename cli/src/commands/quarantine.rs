//! `quarantine`: what runners brought that is not current.

use std::collections::VecDeque;
use std::path::PathBuf;

use clap::Subcommand;
use secrecy::ExposeSecret;
use tonic::Streaming;

use latchkey_proto::v1;
use latchkey_proto::v1::QuarantinedKind;

use crate::Done;
use crate::client::Client;
use crate::context::Context;
use crate::download;
use crate::exit::Exit;
use crate::failure::{Failure, Refusal};
use crate::input::Question;
use crate::log_view::{Colour, LogView};
use crate::view::quarantine::{
    AcceptedView, Content, QuarantinedListView, QuarantinedView, SettledView,
};
use crate::view::state::StateDiffView;

/// How much of a log's end is shown.
const LOG_LINES: usize = 200;

#[derive(Debug, Subcommand)]
pub(crate) enum Quarantine {
    /// Lists what is kept, newest first
    List {
        /// Only what belongs to this run
        #[arg(long)]
        run: Option<String>,
    },
    /// Shows one: how a state differs from the current one, the end of a log; owners see content
    Show {
        /// Its id, as `quarantine list` names it
        id: String,
    },
    /// Writes the bytes of one to a new file; a state has secrets in clear. Owners only
    Download {
        /// Its id, as `quarantine list` names it
        id: String,
        /// File to make; only you can read it
        file: PathBuf,
    },
    /// Makes a state the environment's newest; asks for the environment's name. Owners only
    ///
    /// With --run all that a run left is settled in one go: the newest state that was kept is
    /// accepted, the rest is dropped, and the freeze of the environment is lifted.
    Accept {
        /// Its id, as `quarantine list` names it
        #[arg(required_unless_present = "run")]
        id: Option<String>,
        /// Settle all that this run left
        #[arg(long, conflicts_with = "id")]
        run: Option<String>,
        /// Take it although its serial is not above the current one, under the next serial
        #[arg(long)]
        older: bool,
    },
    /// Removes one for good; owners only
    ///
    /// With --run all that a run left is dropped in one go, and the freeze of the environment is
    /// lifted; asks for the environment's name.
    Drop {
        /// Its id, as `quarantine list` names it
        #[arg(required_unless_present = "run")]
        id: Option<String>,
        /// Settle all that this run left
        #[arg(long, conflicts_with = "id")]
        run: Option<String>,
    },
}

impl Quarantine {
    pub(crate) async fn run(self, context: &mut Context) -> Done {
        let session = context.session()?;
        let (client, organization) = (&session.client, session.organization()?);
        match self {
            Quarantine::List { run } => {
                let mut quarantined = Vec::new();
                let run = run.unwrap_or_default();
                each(client, organization, run, |found| {
                    quarantined.push(QuarantinedView::new(found));
                    Search::GoOn
                })
                .await?;
                let view = QuarantinedListView { quarantined };
                context.output.data(&view, QuarantinedListView::human)?;
            }
            Quarantine::Show { id } => {
                let found = find(client, organization.clone(), &id).await?;
                let mut view = QuarantinedView::new(&found);
                match content(client, organization, &found).await {
                    Ok(content) => view.content = content,
                    // It is shown all the same, as far as the caller may see it.
                    Err(Failure::Refused(refusal)) => {
                        context.output.data(&view, QuarantinedView::human)?;
                        context.output.note(&format!("Its content: {}", refusal.message));
                        return Ok(Exit::Ok);
                    }
                    Err(failure) => return Err(failure),
                }
                context.output.data(&view, QuarantinedView::human)?;
            }
            Quarantine::Download { id, file } => {
                download::check_new(&file)?;
                let parts = read(client, organization, id).await?;
                download::to_new_file(client, parts, |part| part.data, &file).await?;
                context.output.note(&format!("Wrote {}", file.display()));
            }
            Quarantine::Accept { run: Some(run_id), older, .. } => {
                let settlement = v1::Settlement::Accept.into();
                let request = v1::SettleQuarantineRequest {
                    organization,
                    run_id,
                    settlement,
                    older,
                    ..Default::default()
                };
                settle(context, request).await?;
            }
            Quarantine::Drop { run: Some(run_id), .. } => {
                let settlement = v1::Settlement::Drop.into();
                let request = v1::SettleQuarantineRequest {
                    organization,
                    run_id,
                    settlement,
                    ..Default::default()
                };
                settle(context, request).await?;
            }
            Quarantine::Accept { id, run: None, older } => {
                let id = id.unwrap_or_default();
                let found = find(client, organization.clone(), &id).await?;
                context.output.note(&QuarantinedView::new(&found).human());
                let question = "Environment's name, to make this its state: ".to_owned();
                let typed = context.input.answer(Question::Visible(question)).await?;
                let request = v1::AcceptStateRequest {
                    organization,
                    quarantined_id: id,
                    environment_confirmation: typed.expose_secret().trim().to_owned(),
                    older,
                };
                let answer = client
                    .call(|| {
                        let (mut service, request) = (client.quarantine(), request.clone());
                        async move { service.accept_state(request).await }
                    })
                    .await?;
                let environment = request.environment_confirmation;
                context.output.data(&AcceptedView::new(&answer), AcceptedView::human)?;
                context.output.hint(&format!(
                    "if {environment} is frozen: `latchkey quarantine accept --run {}` drops the \
                     rest and lifts the freeze",
                    found.run_id
                ));
            }
            Quarantine::Drop { id, run: None } => {
                let id = id.unwrap_or_default();
                let request = v1::DropQuarantinedRequest { organization, quarantined_id: id };
                client
                    .call(|| {
                        let (mut service, request) = (client.quarantine(), request.clone());
                        async move { service.drop_quarantined(request).await }
                    })
                    .await?;
                context.output.note("Dropped");
            }
        }
        Ok(Exit::Ok)
    }
}

/// Shows all that a run left, asks for its environment's name, and settles it.
async fn settle(
    context: &mut Context,
    mut request: v1::SettleQuarantineRequest,
) -> Result<(), Failure> {
    let session = context.session()?;
    let client = &session.client;
    let mut quarantined = Vec::new();
    each(client, request.organization.clone(), request.run_id.clone(), |found| {
        quarantined.push(QuarantinedView::new(found));
        Search::GoOn
    })
    .await?;
    context.output.note(&QuarantinedListView { quarantined }.human());
    let what = match request.settlement() {
        v1::Settlement::Accept => "to accept the newest state and drop the rest",
        v1::Settlement::Drop | v1::Settlement::Unspecified => "to drop all of it",
    };
    let question = format!("Environment's name, {what}: ");
    let typed = context.input.answer(Question::Visible(question)).await?;
    request.environment_confirmation = typed.expose_secret().trim().to_owned();
    let answer = client
        .call(|| {
            let (mut service, request) = (client.quarantine(), request.clone());
            async move { service.settle_quarantine(request).await }
        })
        .await?;
    context.output.data(&SettledView::new(&answer), SettledView::human)?;
    if !answer.unfrozen {
        let environment = request.environment_confirmation;
        context.output.hint(&format!(
            "this run does not freeze {environment}, or brought more meanwhile: `latchkey env show \
             {environment}` tells"
        ));
    }
    Ok(())
}

/// Whether a walk has seen enough.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Search {
    GoOn,
    Found,
}

/// Walks what is kept, newest first.
async fn each(
    client: &Client,
    organization: String,
    run_id: String,
    mut see: impl FnMut(&v1::Quarantined) -> Search,
) -> Result<(), Failure> {
    let mut request = v1::ListQuarantinedRequest {
        organization,
        run_id,
        page_size: 200,
        page_token: String::new(),
    };
    loop {
        let page = client
            .call(|| {
                let (mut service, request) = (client.quarantine(), request.clone());
                async move { service.list_quarantined(request).await }
            })
            .await?;
        for found in &page.quarantined {
            if see(found) == Search::Found {
                return Ok(());
            }
        }
        request.page_token = page.next_page_token;
        if request.page_token.is_empty() {
            return Ok(());
        }
    }
}

async fn find(client: &Client, organization: String, id: &str) -> Result<v1::Quarantined, Failure> {
    let mut wanted = None;
    each(client, organization, String::new(), |found| {
        if found.quarantined_id != id {
            return Search::GoOn;
        }
        wanted = Some(found.clone());
        Search::Found
    })
    .await?;
    let message = "nothing of this id is in quarantine";
    wanted.ok_or_else(|| Refusal::of_field("quarantined_id", message).into())
}

async fn read(
    client: &Client,
    organization: String,
    quarantined_id: String,
) -> Result<Streaming<v1::ReadQuarantinedResponse>, Failure> {
    let request = v1::ReadQuarantinedRequest { organization, quarantined_id };
    client
        .call(|| {
            let (mut service, request) = (client.quarantine(), request.clone());
            async move { service.read_quarantined(request).await }
        })
        .await
}

/// Fetches what can be shown of the content itself.
async fn content(
    client: &Client,
    organization: String,
    found: &v1::Quarantined,
) -> Result<Content, Failure> {
    let id = found.quarantined_id.clone();
    match found.kind() {
        QuarantinedKind::State | QuarantinedKind::ErroredState | QuarantinedKind::StateDump => {
            if found.lineage.is_empty() {
                return Ok(Content::default());
            }
            let request = v1::CompareQuarantinedRequest { organization, quarantined_id: id };
            let answer = client
                .call(|| {
                    let (mut service, request) = (client.quarantine(), request.clone());
                    async move { service.compare_quarantined(request).await }
                })
                .await?;
            let diff = StateDiffView::new(&answer.diff.unwrap_or_default());
            Ok(Content { diff: Some(diff), ..Content::default() })
        }
        QuarantinedKind::Log => {
            let mut parts = read(client, organization, id).await?;
            let (mut log, mut last) = (LogView::new(Colour::Drop), VecDeque::new());
            let mut take = |text: &str| {
                for line in text.lines() {
                    if last.len() == LOG_LINES {
                        last.pop_front();
                    }
                    last.push_back(line.to_owned());
                }
            };
            while let Some(part) =
                parts.message().await.map_err(|status| client.failure(&status))?
            {
                take(&log.push(&part.data));
            }
            take(&log.finish());
            Ok(Content { log: Some(last.into()), ..Content::default() })
        }
        QuarantinedKind::Unspecified
        | QuarantinedKind::Workspace
        | QuarantinedKind::Changes
        | QuarantinedKind::Result => Ok(Content::default()),
    }
}
