//! `quarantine`: what runners brought that is not current.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use clap::Subcommand;
use secrecy::ExposeSecret;
use secrecy::zeroize::Zeroizing;

use latchkey_proto::v1;

use crate::Done;
use crate::client::Client;
use crate::context::Context;
use crate::exit::Exit;
use crate::failure::{Failure, Refusal};
use crate::input::Question;
use crate::view::quarantine::{AcceptedView, QuarantinedListView, QuarantinedView};

#[derive(Debug, Subcommand)]
pub(crate) enum Quarantine {
    /// Lists what is kept, newest first
    List {
        /// Only what belongs to this run
        #[arg(long)]
        run: Option<String>,
    },
    /// Shows one, and what it is against what is current
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
    Accept {
        /// Its id, as `quarantine list` names it
        id: String,
        /// Take it although its serial is not above the current one, under the next serial
        #[arg(long)]
        older: bool,
    },
    /// Removes one for good; owners only
    Drop {
        /// Its id, as `quarantine list` names it
        id: String,
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
                let view = QuarantinedView::new(&find(client, organization, &id).await?);
                context.output.data(&view, QuarantinedView::human)?;
            }
            Quarantine::Download { id, file } => {
                download(client, organization, id, &file).await?;
                context.output.note(&format!("Wrote {}", file.display()));
            }
            Quarantine::Accept { id, older } => {
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
                    "if it is frozen: `latchkey env unfreeze {environment} --run {}`",
                    found.run_id
                ));
            }
            Quarantine::Drop { id } => {
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

/// Writes to a temporary file first: nothing is left of an answer that breaks off.
async fn download(
    client: &Client,
    organization: String,
    id: String,
    path: &Path,
) -> Result<(), Failure> {
    let there_already = || Failure::Usage {
        message: format!("{} is there already", path.display()),
        hint: "name a file that is not".into(),
    };
    if path.symlink_metadata().is_ok() {
        return Err(there_already());
    }
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        Some(_) | None => Path::new("."),
    };
    // A temporary file is born 0600, so the secrets of a state are never readable by others.
    let mut file = tempfile::NamedTempFile::new_in(directory).map_err(Failure::Output)?;
    let request = v1::ReadQuarantinedRequest { organization, quarantined_id: id };
    let mut parts = client
        .call(|| {
            let (mut service, request) = (client.quarantine(), request.clone());
            async move { service.read_quarantined(request).await }
        })
        .await?;
    while let Some(part) = parts.message().await.map_err(|status| client.failure(&status))? {
        let data = Zeroizing::new(part.data);
        file.write_all(&data).map_err(Failure::Output)?;
    }
    file.as_file().sync_all().map_err(Failure::Output)?;
    match file.persist_noclobber(path) {
        Ok(_) => Ok(()),
        Err(error) if error.error.kind() == io::ErrorKind::AlreadyExists => Err(there_already()),
        Err(error) => Err(Failure::Output(error.error)),
    }
}
