//! `RunService`.

use latchkey_domain::run::Run;
use latchkey_proto::v1;
use latchkey_proto::v1::run_service_server::RunService;
use latchkey_proto::v1::upload_configuration_request::Part;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::revocable::until_lost;
use super::variable::read_category;
use super::{Answers, Service, caller, convert, next_part, proof};
use crate::app::authenticate_run::Submission;
use crate::app::open_streams::{Ground, unless_lost};
use crate::app::queue_run::NewRun;
use crate::app::retry_run::Retry;
use crate::app::variables::NewVariable;
use crate::app::{parse_digest, parse_run_id};
use crate::error::Error;
use crate::store::record::authentication::Purpose;

impl Service {
    async fn shown(&self, run: Run) -> Result<Option<v1::Run>, Status> {
        Ok(Some(convert::run(self.app.view_of(run).await?)))
    }
}

#[tonic::async_trait]
impl RunService for Service {
    type WatchRunStream = Answers<v1::WatchRunResponse>;
    type ReadLogStream = Answers<v1::ReadLogResponse>;

    async fn upload_configuration(
        &self,
        request: Request<Streaming<v1::UploadConfigurationRequest>>,
    ) -> Result<Response<v1::UploadConfigurationResponse>, Status> {
        let proof = proof(&request)?;
        let mut parts = request.into_inner();
        let header = match next_part(&mut parts).await?.and_then(|first| first.part) {
            Some(Part::Header(header)) => header,
            Some(Part::Data(_)) | None => {
                return Err(Error::field("header", "the first message carries the header").into());
            }
        };
        let v1::UploadConfigurationHeader { organization, environment } = header;
        let mut upload =
            self.app.upload_configuration(&proof.caller, &organization, &environment).await?;
        let ground = Ground::Environment { organization, environment };
        let lost = self.app.hold(&proof, ground).await?;
        let taken = async {
            while let Some(message) = next_part(&mut parts).await? {
                match message.part {
                    Some(Part::Data(data)) => upload.write(&data).await?,
                    Some(Part::Header(_)) | None => {
                        let message = "only the first message carries a header";
                        return Err(Error::field("data", message).into());
                    }
                }
            }
            Ok::<_, Status>(upload.finish().await?)
        };
        let configuration_digest = unless_lost(lost, taken).await?.to_string();
        Ok(Response::new(v1::UploadConfigurationResponse { configuration_digest }))
    }

    async fn queue_run(
        &self,
        request: Request<v1::QueueRunRequest>,
    ) -> Result<Response<v1::QueueRunResponse>, Status> {
        let caller = caller(&request)?;
        let request = request.into_inner();
        let new = NewRun {
            organization: request.organization,
            environment: request.environment,
            configuration: parse_digest("configuration_digest", &request.configuration_digest)?,
            kind: convert::kind(request.kind)?,
            message: request.message,
            target: request.target,
            replace: request.replace,
            auto_apply: request.auto_apply,
            destroy_confirmation: request.destroy_confirmation,
            variables: given(request.variables)?,
            request_id: request.request_id,
        };
        let run = self.app.queue_run(&caller, new).await?;
        Ok(Response::new(v1::QueueRunResponse { run: self.shown(run).await? }))
    }

    async fn retry_run(
        &self,
        request: Request<v1::RetryRunRequest>,
    ) -> Result<Response<v1::RetryRunResponse>, Status> {
        let caller = caller(&request)?;
        let v1::RetryRunRequest { run_id, request_id, variables, destroy_confirmation } =
            request.into_inner();
        let retry = Retry {
            run: parse_run_id(&run_id)?,
            variables: given(variables)?,
            destroy_confirmation,
            request_id,
        };
        let run = self.app.retry_run(&caller, retry).await?;
        Ok(Response::new(v1::RetryRunResponse { run: self.shown(run).await? }))
    }

    async fn get_run(
        &self,
        request: Request<v1::GetRunRequest>,
    ) -> Result<Response<v1::GetRunResponse>, Status> {
        let caller = caller(&request)?;
        let id = parse_run_id(&request.into_inner().run_id)?;
        let view = self.app.show_run(&caller, id).await?;
        Ok(Response::new(v1::GetRunResponse { run: Some(convert::run(view)) }))
    }

    async fn list_runs(
        &self,
        request: Request<v1::ListRunsRequest>,
    ) -> Result<Response<v1::ListRunsResponse>, Status> {
        let caller = caller(&request)?;
        let v1::ListRunsRequest { organization, environment, page_size, page_token } =
            request.into_inner();
        let page = convert::page(page_size, page_token);
        let page = self.app.list_runs(&caller, &organization, &environment, page).await?;
        Ok(Response::new(v1::ListRunsResponse {
            runs: page.items.into_iter().map(convert::run).collect(),
            next_page_token: page.next.unwrap_or_default(),
        }))
    }

    async fn watch_run(
        &self,
        request: Request<v1::WatchRunRequest>,
    ) -> Result<Response<Self::WatchRunStream>, Status> {
        let proof = proof(&request)?;
        let id = parse_run_id(&request.into_inner().run_id)?;
        let views = self.app.watch_run(&proof.caller, id).await?;
        let lost = self.app.hold(&proof, Ground::Run(id)).await?;
        let answers = ReceiverStream::new(views).map(|view| {
            let run = Some(convert::run(view?));
            Ok(v1::WatchRunResponse { run })
        });
        Ok(Response::new(until_lost(lost, answers)))
    }

    async fn authenticate(
        &self,
        request: Request<v1::AuthenticateRequest>,
    ) -> Result<Response<v1::AuthenticateResponse>, Status> {
        let caller = caller(&request)?;
        let v1::AuthenticateRequest { run_id, phase, token_code, plan_digest, request_id } =
            request.into_inner();
        let submission = Submission {
            code: token_code.into(),
            run: parse_run_id(&run_id)?,
            phase: convert::phase(phase)?,
            seen: convert::optional_digest("plan_digest", &plan_digest)?,
            request_id,
            purpose: Purpose::Phase,
        };
        let (run, authentication) = self.app.authenticate_run(&caller, submission).await?;
        Ok(Response::new(v1::AuthenticateResponse {
            run: self.shown(run).await?,
            authentication_id: authentication.to_string(),
        }))
    }

    async fn top_up(
        &self,
        request: Request<v1::TopUpRequest>,
    ) -> Result<Response<v1::TopUpResponse>, Status> {
        let caller = caller(&request)?;
        let v1::TopUpRequest { run_id, token_code, request_id } = request.into_inner();
        let (code, id) = (token_code.into(), parse_run_id(&run_id)?);
        let (run, authentication) = self.app.top_up(&caller, id, code, request_id).await?;
        Ok(Response::new(v1::TopUpResponse {
            run: self.shown(run).await?,
            authentication_id: authentication.to_string(),
        }))
    }

    async fn confirm(
        &self,
        request: Request<v1::ConfirmRequest>,
    ) -> Result<Response<v1::ConfirmResponse>, Status> {
        let caller = caller(&request)?;
        let v1::ConfirmRequest { run_id, plan_digest } = request.into_inner();
        let seen = parse_digest("plan_digest", &plan_digest)?;
        let run = self.app.confirm_run(&caller, parse_run_id(&run_id)?, seen).await?;
        Ok(Response::new(v1::ConfirmResponse { run: self.shown(run).await? }))
    }

    async fn discard(
        &self,
        request: Request<v1::DiscardRequest>,
    ) -> Result<Response<v1::DiscardResponse>, Status> {
        let caller = caller(&request)?;
        let id = parse_run_id(&request.into_inner().run_id)?;
        let run = self.app.discard_run(&caller, id).await?;
        Ok(Response::new(v1::DiscardResponse { run: self.shown(run).await? }))
    }

    async fn cancel(
        &self,
        request: Request<v1::CancelRequest>,
    ) -> Result<Response<v1::CancelResponse>, Status> {
        let caller = caller(&request)?;
        let v1::CancelRequest { run_id, force } = request.into_inner();
        let id = parse_run_id(&run_id)?;
        let run = match force {
            true => self.app.force_cancel_run(&caller, id).await?,
            false => self.app.cancel_run(&caller, id).await?,
        };
        Ok(Response::new(v1::CancelResponse { run: self.shown(run).await? }))
    }

    async fn read_log(
        &self,
        request: Request<v1::ReadLogRequest>,
    ) -> Result<Response<Self::ReadLogStream>, Status> {
        let proof = proof(&request)?;
        let v1::ReadLogRequest { run_id, phase, offset, follow } = request.into_inner();
        let (id, phase) = (parse_run_id(&run_id)?, convert::phase(phase)?);
        let parts = self.app.read_log(&proof.caller, id, phase, offset, follow).await?;
        let lost = self.app.hold(&proof, Ground::Run(id)).await?;
        let answers = ReceiverStream::new(parts).map(|part| {
            let part = part?;
            Ok(v1::ReadLogResponse { offset: part.offset, data: part.data })
        });
        Ok(Response::new(until_lost(lost, answers)))
    }
}

fn given(variables: Vec<v1::RunVariable>) -> Result<Vec<NewVariable>, Error> {
    let given = variables.into_iter().map(|variable| {
        let v1::RunVariable { name, category, value, hcl, sensitive } = variable;
        let value = value.into();
        Ok(NewVariable { category: read_category(category)?, name, value, sensitive, hcl })
    });
    given.collect()
}
