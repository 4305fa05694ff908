//! `EnvironmentService`.

use latchkey_proto::v1;
use latchkey_proto::v1::environment_service_server::EnvironmentService;
use tonic::{Request, Response, Status};

use super::{Service, caller, convert, given_code, settings};
use crate::app::check_environment::Check;
use crate::app::parse_run_id;
use crate::app::settings::SettingsChange;
use crate::error::Error;
use crate::store::record::check::{CheckOutcome, CheckStep};

#[tonic::async_trait]
impl EnvironmentService for Service {
    async fn create_environment(
        &self,
        request: Request<v1::CreateEnvironmentRequest>,
    ) -> Result<Response<v1::CreateEnvironmentResponse>, Status> {
        let caller = caller(&request)?;
        let mut request = request.into_inner();
        let code = std::mem::take(&mut request.token_code);
        let code = (!code.is_empty()).then(|| code.into());
        let settings = request.settings.map(given).transpose()?.unwrap_or_default();
        let view = self
            .app
            .create_environment(
                &caller,
                &request.organization,
                &request.environment,
                settings,
                &request.request_id,
                code,
            )
            .await?;
        let environment = Some(convert::environment(view));
        Ok(Response::new(v1::CreateEnvironmentResponse { environment }))
    }

    async fn get_environment(
        &self,
        request: Request<v1::GetEnvironmentRequest>,
    ) -> Result<Response<v1::GetEnvironmentResponse>, Status> {
        let caller = caller(&request)?;
        let v1::GetEnvironmentRequest { organization, environment } = request.into_inner();
        let view = self.app.show_environment(&caller, &organization, &environment).await?;
        let environment = Some(convert::environment(view));
        Ok(Response::new(v1::GetEnvironmentResponse { environment }))
    }

    async fn list_environments(
        &self,
        request: Request<v1::ListEnvironmentsRequest>,
    ) -> Result<Response<v1::ListEnvironmentsResponse>, Status> {
        let caller = caller(&request)?;
        let v1::ListEnvironmentsRequest { organization, page_size, page_token } =
            request.into_inner();
        let page = convert::page(page_size, page_token);
        let page = self.app.list_environments(&caller, &organization, page).await?;
        Ok(Response::new(v1::ListEnvironmentsResponse {
            environments: page.items.into_iter().map(convert::environment).collect(),
            next_page_token: page.next.unwrap_or_default(),
        }))
    }

    async fn update_environment(
        &self,
        request: Request<v1::UpdateEnvironmentRequest>,
    ) -> Result<Response<v1::UpdateEnvironmentResponse>, Status> {
        let caller = caller(&request)?;
        let mut request = request.into_inner();
        let proof = given_code(&mut request.token_code, &mut request.request_id);
        let change = SettingsChange {
            policy: specified("mfa_policy", request.mfa_policy, convert::policy)?,
            auto_apply: request.auto_apply,
            working_directory: request.working_directory,
            pool: request.pool,
            session_duration: convert::duration("session_duration", request.session_duration)?,
            plain_credentials: specified(
                "plain_credentials",
                request.plain_credentials,
                settings::plain_credentials,
            )?,
            region: request.region,
            runner_labels: request.runner_labels.map(|given| given.labels.into_iter().collect()),
            engine: request.engine,
            engine_version: request.engine_version,
            second_person: request.second_person,
            plan_rule: request.plan_rule.map(settings::plan_rule),
            code_credentials: specified(
                "code_credentials",
                request.code_credentials,
                settings::code_credentials,
            )?,
            roles: request.roles.map(settings::roles),
            session_floor: convert::duration("session_floor", request.session_floor)?,
            limits: request.limits.map(settings::limits).transpose()?,
        };
        let view = self
            .app
            .update_environment(&caller, &request.organization, &request.environment, change, proof)
            .await?;
        let environment = Some(convert::environment(view));
        Ok(Response::new(v1::UpdateEnvironmentResponse { environment }))
    }

    async fn check_environment(
        &self,
        request: Request<v1::CheckEnvironmentRequest>,
    ) -> Result<Response<v1::CheckEnvironmentResponse>, Status> {
        let caller = caller(&request)?;
        let v1::CheckEnvironmentRequest { organization, environment, token_code, request_id } =
            request.into_inner();
        let code = (!token_code.is_empty()).then(|| token_code.into());
        let check = Check { organization, environment, code, request_id };
        let steps = self.app.check_environment(&caller, check).await?;
        let steps = steps.into_iter().map(step_out).collect();
        Ok(Response::new(v1::CheckEnvironmentResponse { steps }))
    }

    async fn lock_environment(
        &self,
        request: Request<v1::LockEnvironmentRequest>,
    ) -> Result<Response<v1::LockEnvironmentResponse>, Status> {
        let caller = caller(&request)?;
        let v1::LockEnvironmentRequest { organization, environment, reason } = request.into_inner();
        let view = self.app.lock_environment(&caller, &organization, &environment, &reason).await?;
        let environment = Some(convert::environment(view));
        Ok(Response::new(v1::LockEnvironmentResponse { environment }))
    }

    async fn unlock_environment(
        &self,
        request: Request<v1::UnlockEnvironmentRequest>,
    ) -> Result<Response<v1::UnlockEnvironmentResponse>, Status> {
        let caller = caller(&request)?;
        let v1::UnlockEnvironmentRequest { organization, environment } = request.into_inner();
        let view = self.app.unlock_environment(&caller, &organization, &environment).await?;
        let environment = Some(convert::environment(view));
        Ok(Response::new(v1::UnlockEnvironmentResponse { environment }))
    }

    async fn unfreeze_environment(
        &self,
        request: Request<v1::UnfreezeEnvironmentRequest>,
    ) -> Result<Response<v1::UnfreezeEnvironmentResponse>, Status> {
        let caller = caller(&request)?;
        let v1::UnfreezeEnvironmentRequest { organization, environment, run_id } =
            request.into_inner();
        let run = parse_run_id(&run_id)?;
        let view = self.app.unfreeze_environment(&caller, &organization, &environment, run).await?;
        let environment = Some(convert::environment(view));
        Ok(Response::new(v1::UnfreezeEnvironmentResponse { environment }))
    }
}

fn step_out(step: CheckStep) -> v1::CheckStep {
    let CheckStep { name, outcome, sentence, remedy } = step;
    let outcome = match outcome {
        CheckOutcome::Ok => v1::CheckOutcome::Ok,
        CheckOutcome::Failed => v1::CheckOutcome::Failed,
        CheckOutcome::Skipped => v1::CheckOutcome::Skipped,
    };
    v1::CheckStep { name, outcome: outcome.into(), sentence, remedy }
}

/// Reads a field that, when it is set, must say something.
fn specified<T>(
    field: &'static str,
    value: Option<i32>,
    read: fn(i32) -> Result<Option<T>, Error>,
) -> Result<Option<T>, Error> {
    match value.map(read).transpose()? {
        Some(None) => Err(Error::field(field, "leave it out, or say a value")),
        Some(Some(value)) => Ok(Some(value)),
        None => Ok(None),
    }
}

/// Settings of a new environment: what is empty or unspecified takes its default.
fn given(given: v1::EnvironmentSettings) -> Result<SettingsChange, Error> {
    Ok(SettingsChange {
        policy: convert::policy(given.mfa_policy)?,
        auto_apply: Some(given.auto_apply),
        working_directory: Some(given.working_directory),
        pool: Some(given.pool),
        session_duration: convert::duration("session_duration", given.session_duration)?,
        plain_credentials: settings::plain_credentials(given.plain_credentials)?,
        region: Some(given.region).filter(|region| !region.is_empty()),
        runner_labels: Some(given.runner_labels.into_iter().collect()),
        engine: Some(given.engine),
        engine_version: Some(given.engine_version),
        second_person: Some(given.second_person),
        plan_rule: given.plan_rule.map(settings::plan_rule),
        code_credentials: settings::code_credentials(given.code_credentials)?,
        roles: given.roles.map(settings::roles),
        session_floor: convert::duration("session_floor", given.session_floor)?,
        limits: given.limits.map(settings::limits).transpose()?,
    })
}
