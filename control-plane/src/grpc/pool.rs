//! `PoolService`.

use latchkey_domain::id::RunnerId;
use latchkey_proto::v1;
use latchkey_proto::v1::pool_service_server::PoolService;
use secrecy::ExposeSecret;
use tonic::{Request, Response, Status};

use super::{Service, caller, convert};
use crate::app::runners::RunnerView;
use crate::error::Error;
use crate::store::record::Millis;
use crate::store::record::runner::Host;

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
        request: Request<v1::GetRunnerRequest>,
    ) -> Result<Response<v1::GetRunnerResponse>, Status> {
        let caller = caller(&request)?;
        let id = runner_id(&request.into_inner().runner_id)?;
        let runner = Some(out(self.app.show_runner(&caller, id).await?));
        Ok(Response::new(v1::GetRunnerResponse { runner }))
    }

    async fn drain_runner(
        &self,
        request: Request<v1::DrainRunnerRequest>,
    ) -> Result<Response<v1::DrainRunnerResponse>, Status> {
        let caller = caller(&request)?;
        let id = runner_id(&request.into_inner().runner_id)?;
        let runner = Some(out(self.app.drain_runner(&caller, id).await?));
        Ok(Response::new(v1::DrainRunnerResponse { runner }))
    }

    async fn resume_runner(
        &self,
        request: Request<v1::ResumeRunnerRequest>,
    ) -> Result<Response<v1::ResumeRunnerResponse>, Status> {
        let caller = caller(&request)?;
        let id = runner_id(&request.into_inner().runner_id)?;
        let runner = Some(out(self.app.resume_runner(&caller, id).await?));
        Ok(Response::new(v1::ResumeRunnerResponse { runner }))
    }

    async fn revoke_runner(
        &self,
        request: Request<v1::RevokeRunnerRequest>,
    ) -> Result<Response<v1::RevokeRunnerResponse>, Status> {
        let caller = caller(&request)?;
        let id = runner_id(&request.into_inner().runner_id)?;
        let runner = Some(out(self.app.revoke_runner(&caller, id).await?));
        Ok(Response::new(v1::RevokeRunnerResponse { runner }))
    }
}

fn runner_id(text: &str) -> Result<RunnerId, Error> {
    text.parse().map_err(|_| Error::field("runner_id", "it is not a runner's id (a UUID)"))
}

fn out(view: RunnerView) -> v1::Runner {
    let RunnerView { runner, pool, seen, holds } = view;
    let said = runner.said.unwrap_or_default();
    let time = |at: Millis| convert::timestamp(at.into());
    v1::Runner {
        runner_id: runner.id.0.to_string(),
        name: runner.name,
        pool,
        enroll_time: Some(time(runner.enrolled_at)),
        connected: seen.connected,
        last_seen_time: seen.last_seen.map(convert::timestamp),
        slots: said.slots,
        holds: holds
            .into_iter()
            .map(|held| v1::HeldJob {
                run_id: held.job.run.to_string(),
                phase: convert::phase_out(held.job.phase).into(),
                epoch: held.epoch.get(),
                grant_time: Some(convert::timestamp(held.granted_at)),
                start_time: held.started_at.map(convert::timestamp),
            })
            .collect(),
        engines: said
            .engines
            .into_iter()
            .map(|(name, version)| v1::Engine { name, version })
            .collect(),
        labels: said.labels.into_iter().collect(),
        accepts: said
            .accepts
            .into_iter()
            .map(|accepted| convert::phase_out(accepted.into()).into())
            .collect(),
        host: said.host.map(host_out),
        version: said.version,
        drain_time: runner.drained_at.map(time),
        draining: seen.draining,
        revoke_time: runner.revoked_at.map(time),
        fight_time: runner.fought_at.map(time),
    }
}

fn host_out(host: Host) -> v1::HostFacts {
    let Host { kernel, architecture, cpus, memory_bytes, isolation, isolation_missing } = host;
    v1::HostFacts { kernel, architecture, cpus, memory_bytes, isolation, isolation_missing }
}
