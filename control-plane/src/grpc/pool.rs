//! `PoolService`.

use latchkey_domain::id::JobId;
use latchkey_proto::v1;
use latchkey_proto::v1::pool_service_server::PoolService;
use secrecy::ExposeSecret;
use tonic::{Request, Response, Status};

use super::{Service, caller, convert};
use crate::app::pools::RunnerView;

#[tonic::async_trait]
impl PoolService for Service {
    async fn create_pool(
        &self,
        request: Request<v1::CreatePoolRequest>,
    ) -> Result<Response<v1::CreatePoolResponse>, Status> {
        let caller = caller(&request)?;
        let v1::CreatePoolRequest { organization, pool, request_id } = request.into_inner();
        let made = self.app.create_pool(&caller, &organization, &pool, &request_id).await?;
        let pool = v1::Pool { pool_id: made.id.0.to_string(), organization, pool: made.name };
        Ok(Response::new(v1::CreatePoolResponse { pool: Some(pool) }))
    }

    async fn create_pool_token(
        &self,
        request: Request<v1::CreatePoolTokenRequest>,
    ) -> Result<Response<v1::CreatePoolTokenResponse>, Status> {
        let caller = caller(&request)?;
        let request = request.into_inner();
        let lifetime = convert::duration("lifetime", request.lifetime)?;
        let (token, expires_at) = self
            .app
            .create_pool_token(
                &caller,
                &request.organization,
                &request.pool,
                lifetime,
                request.uses,
                &request.request_id,
            )
            .await?;
        Ok(Response::new(v1::CreatePoolTokenResponse {
            token: token.expose_secret().to_owned(),
            expire_time: Some(convert::timestamp(expires_at)),
        }))
    }

    async fn list_runners(
        &self,
        request: Request<v1::ListRunnersRequest>,
    ) -> Result<Response<v1::ListRunnersResponse>, Status> {
        let caller = caller(&request)?;
        let v1::ListRunnersRequest { organization, page_size, page_token } = request.into_inner();
        let page = convert::page(page_size, page_token);
        let page = self.app.list_runners(&caller, &organization, page).await?;
        Ok(Response::new(v1::ListRunnersResponse {
            runners: page.items.into_iter().map(out).collect(),
            next_page_token: page.next.unwrap_or_default(),
        }))
    }

    async fn get_runner(
        &self,
        _: Request<v1::GetRunnerRequest>,
    ) -> Result<Response<v1::GetRunnerResponse>, Status> {
        Err(Status::unimplemented("not yet"))
    }

    async fn drain_runner(
        &self,
        _: Request<v1::DrainRunnerRequest>,
    ) -> Result<Response<v1::DrainRunnerResponse>, Status> {
        Err(Status::unimplemented("not yet"))
    }

    async fn resume_runner(
        &self,
        _: Request<v1::ResumeRunnerRequest>,
    ) -> Result<Response<v1::ResumeRunnerResponse>, Status> {
        Err(Status::unimplemented("not yet"))
    }

    async fn revoke_runner(
        &self,
        _: Request<v1::RevokeRunnerRequest>,
    ) -> Result<Response<v1::RevokeRunnerResponse>, Status> {
        Err(Status::unimplemented("not yet"))
    }
}

fn out(view: RunnerView) -> v1::Runner {
    let RunnerView { runner, pool, connected } = view;
    let facts = connected.as_ref();
    v1::Runner {
        runner_id: runner.id.0.to_string(),
        name: runner.name,
        pool,
        enroll_time: Some(convert::timestamp(runner.enrolled_at.into())),
        connected: connected.is_some(),
        last_seen_time: facts.map(|facts| convert::timestamp(facts.last_seen)),
        slots: facts.map_or(0, |facts| facts.slots),
        holds: facts
            .map(|facts| {
                let held =
                    |job: &JobId| v1::HeldJob { run_id: job.run.to_string(), ..Default::default() };
                facts.held.iter().map(held).collect()
            })
            .unwrap_or_default(),
        engines: connected
            .map(|facts| facts.engines)
            .unwrap_or_default()
            .into_iter()
            .map(|(name, version)| v1::Engine { name, version })
            .collect(),
        ..Default::default()
    }
}
