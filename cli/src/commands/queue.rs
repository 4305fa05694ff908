//! `queue`: packs, uploads, queues, and with `--watch` follows to the end.

use std::path::PathBuf;

use clap::Args;
use uuid::Uuid;

use latchkey_proto::v1;
use latchkey_proto::v1::upload_configuration_request::Part;

use crate::Done;
use crate::archive::{self, CAPS};
use crate::client::Client;
use crate::context::Context;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::given::GivenArgs;
use crate::log_view::clean;
use crate::view::run as view;
use crate::view::run::RunView;
use crate::watch::{self, Asking, LogForm};
use crate::words::{Word, explain};

/// The wire takes 1 MiB; less keeps a slow line alive.
const CHUNK: usize = 256 << 10;

/// Queues a run of a directory of Terraform files
///
/// The directory is packed and uploaded: without `.git/`, without `.terraform/` but its modules,
/// and without what `.terraformignore` names. Links inside it are replaced by their content.
///
/// With --watch the run is followed to its end: the logs of plan and apply on standard output,
/// all else on standard error. Token codes are asked for by a hidden prompt; when standard input
/// is no terminal, each is its next line. With -o json, standard output is one event a line.
#[derive(Debug, Args)]
pub(crate) struct Queue {
    /// Environment to run in
    #[arg(value_name = "ENV")]
    environment: String,
    /// Directory to upload
    #[arg(default_value = ".")]
    dir: PathBuf,
    /// Plan, and never apply
    #[arg(long, conflicts_with_all = ["destroy", "refresh_only"])]
    plan_only: bool,
    /// Plan to destroy everything in the environment
    #[arg(long, conflicts_with = "refresh_only", requires = "confirm_destroy")]
    destroy: bool,
    /// The environment's name, typed again
    #[arg(long, value_name = "NAME", requires = "destroy")]
    confirm_destroy: Option<String>,
    /// Plan to take over what changed outside terraform, and change nothing
    #[arg(long)]
    refresh_only: bool,
    /// Only this resource and what it needs; may be given several times
    #[arg(long, value_name = "ADDRESS")]
    target: Vec<String>,
    /// Replace this resource; may be given several times
    #[arg(long, value_name = "ADDRESS")]
    replace: Vec<String>,
    /// What this run is for
    #[arg(short, long)]
    message: Option<String>,
    /// Apply without a confirmation; a code that the policy demands is demanded still
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    auto_apply: Option<bool>,
    /// Follow the run, and ask for codes when it needs them
    #[arg(long)]
    watch: bool,
    #[command(flatten)]
    given: GivenArgs,
}

impl Queue {
    pub(crate) fn follows(&self) -> bool {
        self.watch
    }

    pub(crate) async fn run(self, context: &mut Context) -> Done {
        let session = context.session()?;
        let organization = session.organization()?;
        if let Some(typed) = &self.confirm_destroy
            && *typed != self.environment
        {
            return Err(Failure::Usage {
                message: format!("--confirm-destroy {typed} does not name the environment"),
                hint: format!("to destroy it, type --confirm-destroy {}", self.environment),
            });
        }
        let variables = self.given.read(&mut context.input).await?;
        let dir = self.dir.clone();
        let packed = tokio::task::spawn_blocking(move || archive::pack(&dir, CAPS))
            .await
            .map_err(|error| Failure::Input(error.into()))??;
        context.output.note(&format!("Packed {}: {}", self.dir.display(), size(packed.len())));
        let client = &session.client;
        let digest = upload(client, &organization, &self.environment, &packed).await?;
        drop(packed);
        let request = self.request(organization, digest, variables);
        let answer = client
            .call(|| {
                let (mut runs, request) = (client.runs(), request.clone());
                async move { runs.queue_run(request).await }
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

    fn request(
        &self,
        organization: String,
        digest: String,
        variables: Vec<v1::RunVariable>,
    ) -> v1::QueueRunRequest {
        let kind = match (self.plan_only, self.destroy, self.refresh_only) {
            (true, _, _) => v1::RunKind::PlanOnly,
            (_, true, _) => v1::RunKind::Destroy,
            (_, _, true) => v1::RunKind::RefreshOnly,
            (false, false, false) => v1::RunKind::PlanAndApply,
        };
        v1::QueueRunRequest {
            organization,
            environment: self.environment.clone(),
            configuration_digest: digest,
            kind: kind.into(),
            message: self.message.clone().unwrap_or_default(),
            target: self.target.clone(),
            replace: self.replace.clone(),
            auto_apply: self.auto_apply,
            destroy_confirmation: self.confirm_destroy.clone().unwrap_or_default(),
            request_id: Uuid::new_v4().to_string(),
            variables,
        }
    }
}

async fn upload(
    client: &Client,
    organization: &str,
    environment: &str,
    packed: &[u8],
) -> Result<String, Failure> {
    let answer = client
        .call(|| {
            let header = v1::UploadConfigurationHeader {
                organization: organization.to_owned(),
                environment: environment.to_owned(),
            };
            let mut parts = vec![Part::Header(header)];
            parts.extend(packed.chunks(CHUNK).map(|chunk| Part::Data(chunk.to_vec())));
            let parts =
                parts.into_iter().map(|part| v1::UploadConfigurationRequest { part: Some(part) });
            let mut runs = client.runs();
            async move { runs.upload_configuration(tokio_stream::iter(parts)).await }
        })
        .await?;
    Ok(answer.configuration_digest)
}

fn size(bytes: usize) -> String {
    if bytes < 10 << 10 {
        return format!("{bytes} bytes");
    }
    if bytes < 10 << 20 {
        return format!("{} KiB", bytes >> 10);
    }
    format!("{} MiB", bytes >> 20)
}
