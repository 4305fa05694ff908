//! The people of the simulated world: they queue runs, submit codes, confirm, change their minds,
//! and repeat what was not answered. Once all is calm they deal with whatever waits for them.

use std::sync::Arc;
use std::time::Duration;

use latchkey_domain::policy::Phase;
use latchkey_proto::v1;
use latchkey_proto::v1::environment_service_client::EnvironmentServiceClient;
use latchkey_proto::v1::pool_service_client::PoolServiceClient;
use latchkey_proto::v1::run_service_client::RunServiceClient;
use secrecy::{ExposeSecret, SecretString};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};

use crate::net;
use crate::plane::{ENVIRONMENTS, ORGANIZATION};
use crate::sts::WRONG;
use crate::world::World;

const PATIENCE: Duration = Duration::from_secs(3);

/// Adds the person's token.
#[derive(Clone)]
struct Bearer(SecretString);

impl Interceptor for Bearer {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        let value = format!("Bearer {}", self.0.expose_secret()).parse();
        let value = value.map_err(|_| Status::internal("a token is ASCII"))?;
        request.metadata_mut().insert("authorization", value);
        Ok(request)
    }
}

type Authorized = InterceptedService<Channel, Bearer>;

#[derive(Clone)]
struct Person {
    world: Arc<World>,
    name: &'static str,
    runs: RunServiceClient<Authorized>,
    environments: EnvironmentServiceClient<Authorized>,
    pools: PoolServiceClient<Authorized>,
}

/// The software of the people's host.
pub(crate) async fn host(world: Arc<World>) -> turmoil::Result {
    let token = loop {
        match world.furniture.get() {
            Some(furniture) => break furniture.token.clone(),
            None => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    };
    let person = |name: &'static str| {
        let channel = net::channel("people", net::PEOPLE_PORT);
        let bearer = Bearer(token.clone());
        Person {
            world: Arc::clone(&world),
            name,
            runs: RunServiceClient::with_interceptor(channel.clone(), bearer.clone()),
            environments: EnvironmentServiceClient::with_interceptor(
                channel.clone(),
                bearer.clone(),
            ),
            pools: PoolServiceClient::with_interceptor(channel, bearer),
        }
    };
    let (queuer, first, second) = (person("ada"), person("ada"), person("ben"));
    tokio::join!(queuer.queue(), first.decide(), second.decide());
    Ok(())
}

impl Person {
    async fn queue(mut self) {
        let chance = self.world.chance.clone();
        for number in 0..self.world.wanted {
            tokio::time::sleep(chance.millis(0, 2500)).await;
            let (environment, _) = ENVIRONMENTS[chance.index(ENVIRONMENTS.len())];
            let kind = match chance.between(0, 7) {
                0 => v1::RunKind::PlanOnly,
                1 => v1::RunKind::RefreshOnly,
                _ => v1::RunKind::PlanAndApply,
            };
            let configuration = self.world.furniture.get().map(|f| f.configuration.clone());
            let request = v1::QueueRunRequest {
                organization: ORGANIZATION.into(),
                environment: environment.into(),
                configuration_digest: configuration.unwrap_or_default(),
                kind: kind.into(),
                auto_apply: Some(chance.happens(0.3)),
                request_id: format!("run-{number}"),
                ..Default::default()
            };
            while let Err(status) = in_time(self.runs.queue_run(request.clone())).await {
                self.refused("queue", &status);
                tokio::time::sleep(chance.millis(50, 500)).await;
            }
        }
        self.world.queued();
    }

    async fn decide(mut self) {
        let chance = self.world.chance.clone();
        loop {
            tokio::time::sleep(chance.millis(40, 700)).await;
            self.steer().await;
            let (environment, _) = ENVIRONMENTS[chance.index(ENVIRONMENTS.len())];
            if self.world.is_calm() || chance.happens(0.05) {
                self.thaw(environment).await;
            }
            if self.world.is_troubled() && chance.happens(0.03) {
                self.change_policy(environment).await;
            }
            let request = v1::ListRunsRequest {
                organization: ORGANIZATION.into(),
                environment: environment.into(),
                ..Default::default()
            };
            let Ok(listed) = in_time(self.runs.list_runs(request)).await else { continue };
            for run in listed.runs {
                self.look_at(run).await;
            }
        }
    }

    async fn look_at(&mut self, run: v1::Run) {
        use v1::RunState::{
            ApplyQueued, Applying, AwaitingApplyMfa, AwaitingConfirmation, AwaitingPlanMfa, Lost,
            Pending, PlanQueued, Planning,
        };
        let (chance, calm) = (self.world.chance.clone(), self.world.is_calm());
        if !calm && chance.happens(0.3) {
            // Not yet.
            return;
        }
        match run.state() {
            AwaitingPlanMfa => self.submit(&run, Phase::Plan).await,
            AwaitingApplyMfa if !calm && chance.happens(0.08) => self.discard(&run).await,
            AwaitingApplyMfa => self.submit(&run, Phase::Apply).await,
            AwaitingConfirmation => self.confirm(&run).await,
            Lost if calm => self.discard(&run).await,
            Planning | Applying if run.cancel_requested && chance.happens(0.1) => {
                self.cancel(&run, true).await;
            }
            Pending | PlanQueued | Planning | ApplyQueued | Applying
                if !calm && chance.happens(0.02) =>
            {
                self.cancel(&run, false).await;
            }
            _ => {}
        }
    }

    async fn submit(&mut self, run: &v1::Run, phase: Phase) {
        let chance = self.world.chance.clone();
        let Ok(id) = run.run_id.parse() else { return };
        let troubled = self.world.is_troubled();
        let code = self.world.next_code(troubled && chance.happens(0.1));
        if !code.ends_with(WRONG) {
            self.world.model.submits(&code, id, phase);
        }
        let wire = match phase {
            Phase::Plan => v1::Phase::Plan,
            Phase::Apply => v1::Phase::Apply,
        };
        let mut request = v1::AuthenticateRequest {
            run_id: run.run_id.clone(),
            phase: wire.into(),
            token_code: code.clone(),
            plan_digest: run.plan_result.as_ref().map(|p| p.digest.clone()).unwrap_or_default(),
            request_id: format!("code-{code}"),
        };
        // A repeat names the same intent. Once in a while somebody types the same code anew.
        for attempt in 0..4 {
            match in_time(self.runs.authenticate(request.clone())).await {
                Ok(_) => break,
                Err(status)
                    if matches!(
                        status.code(),
                        Code::Unavailable
                            | Code::Cancelled
                            | Code::DeadlineExceeded
                            | Code::Unknown
                    ) =>
                {
                    self.refused("submit", &status);
                    if troubled && chance.happens(0.2) {
                        request.request_id = format!("code-{code}-{}-{attempt}", self.name);
                    }
                    tokio::time::sleep(chance.millis(20, 400)).await;
                }
                Err(status) => {
                    self.refused("submit", &status);
                    break;
                }
            }
        }
    }

    async fn confirm(&mut self, run: &v1::Run) {
        let plan_digest = run.plan_result.as_ref().map(|plan| plan.digest.clone());
        let request = v1::ConfirmRequest {
            run_id: run.run_id.clone(),
            plan_digest: plan_digest.unwrap_or_default(),
        };
        match in_time(self.runs.confirm(request)).await {
            Ok(_) => {}
            // The policy has become stricter.
            Err(status) if status.code() == Code::FailedPrecondition => {
                self.submit(run, Phase::Apply).await;
            }
            Err(status) => self.refused("confirm", &status),
        }
    }

    async fn cancel(&mut self, run: &v1::Run, force: bool) {
        let request = v1::CancelRequest { run_id: run.run_id.clone(), force };
        if let Err(status) = in_time(self.runs.cancel(request)).await {
            self.refused("cancel", &status);
        }
    }

    async fn discard(&mut self, run: &v1::Run) {
        let request = v1::DiscardRequest { run_id: run.run_id.clone() };
        if let Err(status) = in_time(self.runs.discard(request)).await {
            self.refused("discard", &status);
        }
    }

    async fn thaw(&mut self, environment: &str) {
        let request = v1::GetEnvironmentRequest {
            organization: ORGANIZATION.into(),
            environment: environment.into(),
        };
        let found = in_time(self.environments.get_environment(request)).await.ok();
        let frozen = found.and_then(|f| f.environment).and_then(|e| e.frozen);
        if let Some(frozen) = frozen {
            let request = v1::UnfreezeEnvironmentRequest {
                organization: ORGANIZATION.into(),
                environment: environment.into(),
                run_id: frozen.run_id,
            };
            if let Err(status) = in_time(self.environments.unfreeze_environment(request)).await {
                self.refused("unfreeze", &status);
            }
        }
    }

    /// Drains, resumes and revokes runners; when all is calm, the drained ones are resumed.
    async fn steer(&mut self) {
        let (world, chance) = (Arc::clone(&self.world), self.world.chance.clone());
        let machine = &world.machines()[chance.index(world.machines().len())];
        let runner_id = machine.runner.to_string();
        let answer = if world.is_calm() {
            if !world.is_drained(machine.runner) {
                return;
            }
            let request = v1::ResumeRunnerRequest { runner_id };
            in_time(self.pools.resume_runner(request)).await.map(|_| world.drained(machine, false))
        } else if chance.happens(0.02) {
            world.drained(machine, true);
            world.model.note(format!("{} is drained", machine.name));
            let request = v1::DrainRunnerRequest { runner_id };
            let drained = in_time(self.pools.drain_runner(request)).await.map(drop);
            // Somebody may have resumed it while this was on its way.
            world.drained(machine, true);
            drained
        } else if chance.happens(0.02) {
            world.model.note(format!("{} is resumed", machine.name));
            in_time(self.pools.resume_runner(v1::ResumeRunnerRequest { runner_id })).await.map(drop)
        } else if chance.happens(0.004) && world.may_revoke(machine) {
            world.model.fault(format!("{} is revoked", machine.name));
            in_time(self.pools.revoke_runner(v1::RevokeRunnerRequest { runner_id })).await.map(drop)
        } else {
            return;
        };
        if let Err(status) = answer {
            self.refused("steer a runner", &status);
        }
    }

    async fn change_policy(&mut self, environment: &str) {
        let policies =
            [v1::MfaPolicy::Never, v1::MfaPolicy::AppliesOnly, v1::MfaPolicy::PlansAndApplies];
        let policy = policies[self.world.chance.index(policies.len())];
        // For when the level becomes lower. Nothing may ever be given the session that it buys.
        let token_code = self.world.next_code(false);
        let request = v1::UpdateEnvironmentRequest {
            organization: ORGANIZATION.into(),
            environment: environment.into(),
            mfa_policy: Some(policy.into()),
            request_id: format!("change-{token_code}"),
            token_code,
            ..Default::default()
        };
        self.world.model.note(format!("{environment} gets the policy {}", policy.as_str_name()));
        if let Err(status) = in_time(self.environments.update_environment(request)).await {
            self.refused("change the policy", &status);
        }
    }

    fn refused(&self, what: &str, status: &Status) {
        let text =
            format!("{} could not {what}: {:?} {}", self.name, status.code(), status.message());
        self.world.model.note(text);
    }
}

async fn in_time<T>(
    answer: impl Future<Output = Result<tonic::Response<T>, Status>>,
) -> Result<T, Status> {
    match tokio::time::timeout(PATIENCE, answer).await {
        Ok(answer) => answer.map(tonic::Response::into_inner),
        Err(_) => Err(Status::deadline_exceeded("no answer in time")),
    }
}
