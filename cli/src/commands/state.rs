//! `state`: versions of an environment's state, its lock, and how a workstation uses it.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use clap::Subcommand;
use secrecy::ExposeSecret;

use latchkey_proto::v1;
use latchkey_proto::v1::import_state_request::Part;

use crate::Done;
use crate::client::Client;
use crate::context::Context;
use crate::download;
use crate::exit::Exit;
use crate::failure::{Failure, Refusal};
use crate::input::Question;
use crate::view::state::{
    BackendView, StateDiffView, StateListView, StateLockView, StateVersionView, VersionsDiffView,
};
use crate::{config, log_view};

/// The wire takes 1 MiB; less keeps a slow line alive.
const CHUNK: usize = 256 << 10;

#[derive(Debug, Subcommand)]
pub(crate) enum State {
    /// Lists the versions of a state, newest first, and who has it locked
    List {
        /// Name of the environment
        #[arg(value_name = "ENV")]
        environment: String,
        /// At most so many versions
        #[arg(long, default_value_t = 50, value_name = "N")]
        limit: usize,
    },
    /// Shows one version
    Show {
        /// Name of the environment
        #[arg(value_name = "ENV")]
        environment: String,
        /// Number of the version, as `state list` names it; the newest if absent
        #[arg(default_value_t = 0, hide_default_value = true)]
        version: u64,
    },
    /// Writes a version to a new file; it has secrets in clear
    Download {
        /// Name of the environment
        #[arg(value_name = "ENV")]
        environment: String,
        /// File to make; only you can read it
        file: PathBuf,
        /// Number of the version; the newest if absent
        #[arg(long, default_value_t = 0, hide_default_value = true)]
        version: u64,
    },
    /// Tells how two versions differ; what they mark as sensitive is not shown
    Diff {
        /// Name of the environment
        #[arg(value_name = "ENV")]
        environment: String,
        /// The earlier version; the one before the later if absent
        #[arg(default_value_t = 0, hide_default_value = true)]
        before: u64,
        /// The later version; the newest if absent
        #[arg(default_value_t = 0, hide_default_value = true)]
        after: u64,
    },
    /// Makes the content of an old version the newest; asks for the environment's name
    ///
    /// Only the state goes back: what it describes stays as it is, and the next plan shows the
    /// difference.
    Rollback {
        /// Name of the environment
        #[arg(value_name = "ENV")]
        environment: String,
        /// Number of the version to go back to
        version: u64,
    },
    /// Brings in a state that was kept elsewhere
    ///
    /// Where there is none yet, or one of the same lineage and a lower serial.
    Import {
        /// Name of the environment
        #[arg(value_name = "ENV")]
        environment: String,
        /// File with the state, as `terraform state pull` writes it
        file: PathBuf,
    },
    /// Takes the lock away from a workstation that will not give it back; asks for its id
    Unlock {
        /// Name of the environment
        #[arg(value_name = "ENV")]
        environment: String,
    },
    /// Prints what a workstation's terraform needs to use the state
    ///
    /// For `eval "$(latchkey state backend-config ENV --with-token)"`. The configuration says
    /// `terraform { backend "http" {} }`.
    BackendConfig {
        /// Name of the environment
        #[arg(value_name = "ENV")]
        environment: String,
        /// Print your token, too, as TF_HTTP_PASSWORD
        #[arg(long)]
        with_token: bool,
    },
}

impl State {
    pub(crate) async fn run(self, context: &mut Context) -> Done {
        let session = context.session()?;
        let (client, organization) = (&session.client, session.organization()?);
        match self {
            State::List { environment, limit } => {
                let view = list(client, organization, environment, limit).await?;
                context.output.data(&view, StateListView::human)?;
            }
            State::Show { environment, version } => {
                let request = v1::GetStateVersionRequest { organization, environment, version };
                let answer = client
                    .call(|| {
                        let (mut service, request) = (client.states(), request.clone());
                        async move { service.get_state_version(request).await }
                    })
                    .await?;
                let view = StateVersionView::new(&answer.version.unwrap_or_default());
                context.output.data(&view, StateVersionView::human)?;
            }
            State::Download { environment, file, version } => {
                download::check_new(&file)?;
                let request = v1::ReadStateVersionRequest { organization, environment, version };
                let parts = client
                    .call(|| {
                        let (mut service, request) = (client.states(), request.clone());
                        async move { service.read_state_version(request).await }
                    })
                    .await?;
                download::to_new_file(client, parts, |part| part.data, &file).await?;
                context.output.note(&format!("Wrote {}", file.display()));
            }
            State::Diff { environment, before, after } => {
                let request =
                    v1::DiffStateVersionsRequest { organization, environment, before, after };
                let answer = client
                    .call(|| {
                        let (mut service, request) = (client.states(), request.clone());
                        async move { service.diff_state_versions(request).await }
                    })
                    .await?;
                let view = VersionsDiffView {
                    before: StateVersionView::new(&answer.before.unwrap_or_default()),
                    after: StateVersionView::new(&answer.after.unwrap_or_default()),
                    diff: StateDiffView::new(&answer.diff.unwrap_or_default()),
                };
                context.output.data(&view, VersionsDiffView::human)?;
            }
            State::Rollback { environment, version } => {
                let question =
                    format!("Environment's name, to make version {version} its state again: ");
                let typed = context.input.answer(Question::Visible(question)).await?;
                let request = v1::RollbackStateRequest {
                    organization,
                    environment,
                    version,
                    environment_confirmation: typed.expose_secret().trim().to_owned(),
                };
                // A repeat would make one more version.
                let answer = client.once(client.states().rollback_state(request).await)?;
                let view = StateVersionView::new(&answer.version.unwrap_or_default());
                context.output.data(&view, StateVersionView::human)?;
                context.output.hint("the next plan shows what is different from this state");
            }
            State::Import { environment, file } => {
                let answer = import(client, organization, environment, &file).await?;
                let view = StateVersionView::new(&answer.version.unwrap_or_default());
                context.output.data(&view, StateVersionView::human)?;
            }
            State::Unlock { environment } => {
                unlock(context, client, organization, environment).await?;
            }
            State::BackendConfig { environment, with_token } => {
                // Whether it is there is better said now than by terraform.
                let request = v1::GetEnvironmentRequest { organization, environment };
                client
                    .call(|| {
                        let (mut service, request) = (client.environments(), request.clone());
                        async move { service.get_environment(request).await }
                    })
                    .await?;
                let stored = config::load(&context.config_path()?)?;
                let v1::GetEnvironmentRequest { organization, environment } = request;
                let view = BackendView {
                    address: format!("{}/state/{organization}/{environment}", stored.address),
                    ca_certificate_pem: stored.ca_pem,
                    token: with_token.then(|| stored.token.expose_secret().to_owned()),
                };
                context.output.data(&view, BackendView::human)?;
                if !with_token {
                    context
                        .output
                        .hint("TF_HTTP_PASSWORD is your token; --with-token prints it, too");
                }
            }
        }
        Ok(Exit::Ok)
    }
}

async fn list(
    client: &Client,
    organization: String,
    environment: String,
    limit: usize,
) -> Result<StateListView, Failure> {
    let mut request = v1::ListStateVersionsRequest {
        organization,
        environment,
        page_size: u32::try_from(limit.clamp(1, 200)).unwrap_or(200),
        page_token: String::new(),
    };
    let mut view = StateListView { lock: None, versions: vec![] };
    loop {
        let page = client
            .call(|| {
                let (mut service, request) = (client.states(), request.clone());
                async move { service.list_state_versions(request).await }
            })
            .await?;
        view.lock = page.lock.as_ref().map(StateLockView::new);
        view.versions.extend(page.versions.iter().map(StateVersionView::new));
        request.page_token = page.next_page_token;
        if request.page_token.is_empty() || view.versions.len() >= limit {
            view.versions.truncate(limit);
            return Ok(view);
        }
    }
}

async fn unlock(
    context: &mut Context,
    client: &Client,
    organization: String,
    environment: String,
) -> Result<(), Failure> {
    let found = list(client, organization.clone(), environment.clone(), 1).await?;
    let Some(lock) = found.lock else {
        context.output.note("It is not locked");
        return Ok(());
    };
    context.output.note(lock.human().trim_end());
    let question = "Id of the lock, to take it away: ".to_owned();
    let typed = context.input.answer(Question::Visible(question)).await?;
    let lock_id = typed.expose_secret().trim().to_owned();
    if lock_id != lock.lock_id {
        return Err(Refusal::of_field("lock_id", "it is not the id of the lock").into());
    }
    let request = v1::ForceUnlockStateRequest { organization, environment, lock_id };
    client
        .call(|| {
            let (mut service, request) = (client.states(), request.clone());
            async move { service.force_unlock_state(request).await }
        })
        .await?;
    context.output.note("Unlocked");
    Ok(())
}

async fn import(
    client: &Client,
    organization: String,
    environment: String,
    path: &Path,
) -> Result<v1::ImportStateResponse, Failure> {
    let unreadable = |error: &io::Error| Failure::Usage {
        message: format!(
            "{} cannot be read: {error}",
            log_view::clean(&path.display().to_string())
        ),
        hint: "name a file that `terraform state pull` wrote".into(),
    };
    let file = File::open(path).map_err(|error| unreadable(&error))?;
    // The stream takes no errors: what went wrong is told here, and the answer is not waited for.
    let broken = Arc::new(Mutex::new(None));
    let header = v1::ImportStateHeader { organization, environment };
    let parts = Parts { header: Some(header), file, broken: Arc::clone(&broken) };
    let answer = client.states().import_state(tokio_stream::iter(parts)).await;
    let broken = broken.lock().unwrap_or_else(PoisonError::into_inner).take();
    match broken {
        Some(error) => Err(unreadable(&error)),
        None => client.once(answer),
    }
}

/// The header, then the file in parts.
struct Parts {
    header: Option<v1::ImportStateHeader>,
    file: File,
    broken: Arc<Mutex<Option<io::Error>>>,
}

impl Iterator for Parts {
    type Item = v1::ImportStateRequest;

    fn next(&mut self) -> Option<v1::ImportStateRequest> {
        if let Some(header) = self.header.take() {
            return Some(v1::ImportStateRequest { part: Some(Part::Header(header)) });
        }
        let mut data = Vec::with_capacity(CHUNK);
        match (&mut self.file).take(CHUNK as u64).read_to_end(&mut data) {
            Ok(0) => None,
            Ok(_) => Some(v1::ImportStateRequest { part: Some(Part::Data(data)) }),
            Err(error) => {
                *self.broken.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
                // A part that is refused: the file must not be taken in half.
                Some(v1::ImportStateRequest { part: None })
            }
        }
    }
}
