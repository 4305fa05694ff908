//! Somebody with a token: typed clients over TLS, and the usual calls in one line each.
//!
//! Calls whose refusal a test may want to see answer `tonic::Status`; see [`reason`].

mod steering;

use std::fmt;
use std::net::IpAddr;
use std::time::Duration;

use anyhow::Context;
use latchkey_aws_simulator::Facts;
use latchkey_proto::v1;
use latchkey_proto::v1::account_service_client::AccountServiceClient;
use latchkey_proto::v1::audit_service_client::AuditServiceClient;
use latchkey_proto::v1::environment_service_client::EnvironmentServiceClient;
use latchkey_proto::v1::member_service_client::MemberServiceClient;
use latchkey_proto::v1::notice_service_client::NoticeServiceClient;
use latchkey_proto::v1::organization_service_client::OrganizationServiceClient;
use latchkey_proto::v1::pool_service_client::PoolServiceClient;
use latchkey_proto::v1::quarantine_service_client::QuarantineServiceClient;
use latchkey_proto::v1::run_service_client::RunServiceClient;
use latchkey_proto::v1::session_service_client::SessionServiceClient;
use latchkey_proto::v1::state_service_client::StateServiceClient;
use latchkey_proto::v1::upload_configuration_request::Part;
use latchkey_proto::v1::variable_scope::Scope;
use latchkey_proto::v1::variable_service_client::VariableServiceClient;
use latchkey_proto::v1::{MfaPolicy, Phase, RunState, VariableCategory};
use serde_json::Value;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};
use tonic::{Request, Status};
use tonic_types::StatusExt;
use uuid::Uuid;

use crate::configuration::Configuration;
use crate::plane::TestPlane;
use crate::wait::{LIMIT, wait_for};

/// A channel that sends a token along.
pub type Authorized = InterceptedService<Channel, Bearer>;

/// Returns the name of the refusal, without `REASON_`; empty when the status carries none.
pub fn reason(status: &Status) -> String {
    status.get_details_error_info().map(|info| info.reason).unwrap_or_default()
}

/// Says whether a run has come to an end.
pub fn is_ended(run: &v1::Run) -> bool {
    match run.state() {
        RunState::Planned
        | RunState::Applied
        | RunState::Errored
        | RunState::Canceled
        | RunState::Discarded
        | RunState::Lost => true,
        RunState::Unspecified
        | RunState::AwaitingPlanMfa
        | RunState::Pending
        | RunState::PlanQueued
        | RunState::Planning
        | RunState::AwaitingConfirmation
        | RunState::AwaitingApplyMfa
        | RunState::ApplyQueued
        | RunState::Applying => false,
    }
}

/// Says whether a run waits for a person after its plan, or has ended.
pub fn after_plan(run: &v1::Run) -> bool {
    let waits = matches!(run.state(), RunState::AwaitingConfirmation | RunState::AwaitingApplyMfa);
    waits || is_ended(run)
}

/// A user of an organization, or a service token.
#[derive(Clone)]
pub struct Person {
    pub organization: String,
    pub name: String,
    token: String,
    channel: Channel,
    bearer: Bearer,
}

impl fmt::Debug for Person {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Person").field("name", &self.name).finish_non_exhaustive()
    }
}

macro_rules! services {
    ($($method:ident: $client:ident),* $(,)?) => {$(
        pub fn $method(&self) -> $client<Authorized> {
            $client::with_interceptor(self.channel.clone(), self.bearer.clone())
                .max_decoding_message_size(64 << 20)
        }
    )*};
}

/// Getting a token.
impl Person {
    /// Makes the organization and its owner with the one-time secret.
    pub async fn bootstrap(
        plane: &TestPlane,
        organization: &str,
        user: &str,
    ) -> anyhow::Result<Self> {
        let stranger = Self::with_token(plane, organization, user, "none")?;
        let request = v1::BootstrapRequest {
            secret: plane.bootstrap_secret()?,
            organization: organization.to_owned(),
            user: user.to_owned(),
        };
        let answer = AccountServiceClient::new(stranger.channel).bootstrap(request).await;
        let token = answer.context("failed to make the owner")?.into_inner().token;
        Self::with_token(plane, organization, user, &token)
    }

    /// Takes a token that was made before. The connection is made by the first call, and made
    /// again whenever it breaks.
    pub fn with_token(
        plane: &TestPlane,
        organization: &str,
        name: &str,
        token: &str,
    ) -> anyhow::Result<Self> {
        Self::from_address(plane, organization, name, token, None)
    }

    /// Does the same from an address of loopback, as another host would.
    pub fn from_address(
        plane: &TestPlane,
        organization: &str,
        name: &str,
        token: &str,
        address: Option<IpAddr>,
    ) -> anyhow::Result<Self> {
        // Whoever came first has installed the same one.
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(plane.ca_pem()?));
        let endpoint = Endpoint::from_shared(plane.people_url())?
            .connect_timeout(Duration::from_secs(10))
            .local_address(address)
            .tls_config(tls)?;
        Ok(Self {
            organization: organization.to_owned(),
            name: name.to_owned(),
            token: token.to_owned(),
            channel: endpoint.connect_lazy(),
            bearer: Bearer::new(token)?,
        })
    }

    /// Makes another user of the organization and returns it.
    pub async fn create_user(
        &self,
        plane: &TestPlane,
        user: &str,
        role: v1::Role,
    ) -> anyhow::Result<Self> {
        let request = v1::CreateUserRequest {
            organization: self.organization.clone(),
            user: user.to_owned(),
            role: role.into(),
            request_id: unique(),
            ..Default::default()
        };
        let token = self.accounts().create_user(request).await?.into_inner().token;
        Self::with_token(plane, &self.organization, user, &token)
    }

    /// Makes a service token and returns who holds it.
    pub async fn create_service_token(
        &self,
        plane: &TestPlane,
        name: &str,
    ) -> anyhow::Result<Self> {
        let request = v1::CreateServiceTokenRequest {
            organization: self.organization.clone(),
            name: name.to_owned(),
            request_id: unique(),
            ..Default::default()
        };
        let token = self.accounts().create_service_token(request).await?.into_inner().token;
        Self::with_token(plane, &self.organization, name, &token)
    }

    /// The token, for `latchkey login`.
    pub fn token(&self) -> &str {
        &self.token
    }

    services! {
        accounts: AccountServiceClient,
        audit: AuditServiceClient,
        environments: EnvironmentServiceClient,
        members: MemberServiceClient,
        notices: NoticeServiceClient,
        organizations: OrganizationServiceClient,
        pools: PoolServiceClient,
        quarantine: QuarantineServiceClient,
        runs: RunServiceClient,
        sessions: SessionServiceClient,
        states: StateServiceClient,
        variables: VariableServiceClient,
    }
}

/// Settings.
impl Person {
    pub async fn create_pool(&self, pool: &str) -> anyhow::Result<()> {
        let request = v1::CreatePoolRequest {
            organization: self.organization.clone(),
            pool: pool.to_owned(),
            request_id: unique(),
        };
        self.pools().create_pool(request).await.context("failed to make the pool")?;
        Ok(())
    }

    /// Makes a token that lets one runner in.
    pub async fn pool_token(&self, pool: &str) -> anyhow::Result<String> {
        let request = v1::CreatePoolTokenRequest {
            organization: self.organization.clone(),
            pool: pool.to_owned(),
            lifetime: None,
            uses: 1,
            request_id: unique(),
        };
        let answer = self.pools().create_pool_token(request).await;
        Ok(answer.context("failed to make a pool token")?.into_inner().token)
    }

    /// Waits until a runner of this name is connected.
    pub async fn wait_for_runner(&self, name: &str) -> anyhow::Result<v1::Runner> {
        wait_for(&format!("runner {name} to connect"), LIMIT, async || {
            let request = v1::ListRunnersRequest {
                organization: self.organization.clone(),
                page_size: 200,
                page_token: String::new(),
            };
            let answer = self.pools().list_runners(request).await;
            let runners = answer.map_err(|status| status.to_string())?.into_inner().runners;
            let found = runners.iter().find(|runner| runner.name == name && runner.connected);
            found.cloned().ok_or_else(|| format!("{runners:?}"))
        })
        .await
    }

    /// Sets one variable.
    pub async fn set_variable(
        &self,
        scope: Scope,
        category: VariableCategory,
        name: &str,
        value: &str,
        sensitive: bool,
    ) -> Result<v1::Variable, Status> {
        let scope =
            v1::VariableScope { organization: self.organization.clone(), scope: Some(scope) };
        let request = v1::SetVariableRequest {
            scope: Some(scope),
            name: name.to_owned(),
            category: category.into(),
            value: value.to_owned(),
            sensitive,
            hcl: false,
            ..Default::default()
        };
        let answer = self.variables().set_variable(request).await?;
        Ok(answer.into_inner().variable.unwrap_or_default())
    }

    /// Sets the triple for the organization, or for this person.
    pub async fn set_triple(&self, scope: Scope, facts: &Facts) -> anyhow::Result<()> {
        for (name, value) in [
            ("AWS_ACCESS_KEY_ID", facts.access_key_id.as_str()),
            ("AWS_SECRET_ACCESS_KEY", facts.secret_access_key.expose()),
            ("AWS_MFA_SERIAL_NUMBER", facts.mfa_serial.as_str()),
        ] {
            self.set_variable(scope.clone(), VariableCategory::Environment, name, value, true)
                .await
                .with_context(|| format!("failed to set {name}"))?;
        }
        Ok(())
    }

    /// Replaces the organization's triple, by a code of the device that it has.
    pub async fn replace_triple(&self, facts: &Facts, code: &str) -> anyhow::Result<()> {
        let scope = Scope::WholeOrganization(true);
        let of = v1::VariableScope {
            organization: self.organization.clone(),
            scope: Some(scope.clone()),
        };
        let request = v1::DeleteVariableRequest {
            scope: Some(of),
            name: "AWS_MFA_SERIAL_NUMBER".into(),
            category: VariableCategory::Environment.into(),
            token_code: code.to_owned(),
            request_id: format!("replace-{code}"),
        };
        self.variables().delete_variable(request).await.context("failed to delete the device")?;
        self.set_triple(scope, facts).await
    }

    /// Replaces the list of accounts that triples may belong to.
    pub async fn list_accounts(&self, accounts: &[&str]) -> anyhow::Result<()> {
        let request = v1::UpdateOrganizationRequest {
            organization: self.organization.clone(),
            aws_accounts: accounts.iter().map(|account| (*account).to_owned()).collect(),
            ..Default::default()
        };
        let answer = self.organizations().update_organization(request).await;
        answer.context("failed to list the AWS accounts")?;
        Ok(())
    }

    /// Makes an environment in pool [`Stage::POOL`](crate::Stage::POOL).
    pub async fn create_environment(
        &self,
        environment: &str,
        policy: MfaPolicy,
    ) -> anyhow::Result<v1::Environment> {
        let settings = v1::EnvironmentSettings {
            mfa_policy: policy.into(),
            pool: crate::Stage::POOL.to_owned(),
            ..Default::default()
        };
        let answer = self.create_environment_with(environment, settings).await;
        answer.context("failed to make the environment")
    }

    pub async fn create_environment_with(
        &self,
        environment: &str,
        settings: v1::EnvironmentSettings,
    ) -> Result<v1::Environment, Status> {
        self.create_environment_by(environment, settings, "").await
    }

    /// As [`Person::create_environment_with`], by a code where the settings take one.
    pub async fn create_environment_by(
        &self,
        environment: &str,
        settings: v1::EnvironmentSettings,
        code: &str,
    ) -> Result<v1::Environment, Status> {
        let request = v1::CreateEnvironmentRequest {
            organization: self.organization.clone(),
            environment: environment.to_owned(),
            settings: Some(settings),
            request_id: unique(),
            token_code: code.to_owned(),
        };
        let answer = self.environments().create_environment(request).await?;
        Ok(answer.into_inner().environment.unwrap_or_default())
    }

    pub async fn environment(&self, environment: &str) -> Result<v1::Environment, Status> {
        let request = v1::GetEnvironmentRequest {
            organization: self.organization.clone(),
            environment: environment.to_owned(),
        };
        let answer = self.environments().get_environment(request).await?;
        Ok(answer.into_inner().environment.unwrap_or_default())
    }
}

/// Runs.
impl Person {
    /// Uploads an archive and returns its digest.
    pub async fn upload(
        &self,
        environment: &str,
        configuration: &Configuration,
    ) -> Result<String, Status> {
        let header = v1::UploadConfigurationHeader {
            organization: self.organization.clone(),
            environment: environment.to_owned(),
        };
        let mut parts = vec![Part::Header(header)];
        let chunks = configuration.bytes().chunks(256 << 10);
        parts.extend(chunks.map(|chunk| Part::Data(chunk.to_vec())));
        let parts =
            parts.into_iter().map(|part| v1::UploadConfigurationRequest { part: Some(part) });
        let answer = self.runs().upload_configuration(tokio_stream::iter(parts)).await?;
        Ok(answer.into_inner().configuration_digest)
    }

    /// Uploads and queues a plan and apply.
    pub async fn queue(
        &self,
        environment: &str,
        configuration: &Configuration,
    ) -> Result<v1::Run, Status> {
        self.queue_with(environment, configuration, v1::QueueRunRequest::default()).await
    }

    /// Uploads and queues, with more said in the request; names, digest and, if it is empty, the
    /// request id are filled in.
    pub async fn queue_with(
        &self,
        environment: &str,
        configuration: &Configuration,
        mut request: v1::QueueRunRequest,
    ) -> Result<v1::Run, Status> {
        request.configuration_digest = self.upload(environment, configuration).await?;
        request.organization = self.organization.clone();
        request.environment = environment.to_owned();
        if request.request_id.is_empty() {
            request.request_id = unique();
        }
        Ok(self.runs().queue_run(request).await?.into_inner().run.unwrap_or_default())
    }

    pub async fn run(&self, run_id: &str) -> Result<v1::Run, Status> {
        let answer = self.runs().get_run(v1::GetRunRequest { run_id: run_id.to_owned() }).await?;
        Ok(answer.into_inner().run.unwrap_or_default())
    }

    /// Submits a code for the phase that the run waits for; for an apply, approving the plan as
    /// it is now.
    pub async fn authenticate(&self, run_id: &str, code: &str) -> Result<v1::Run, Status> {
        let run = self.run(run_id).await?;
        let after_plan = run.plan_result.is_some();
        let request = v1::AuthenticateRequest {
            run_id: run_id.to_owned(),
            phase: if after_plan { Phase::Apply } else { Phase::Plan }.into(),
            token_code: code.to_owned(),
            plan_digest: run.plan_result.map(|plan| plan.digest).unwrap_or_default(),
            request_id: unique(),
        };
        Ok(self.runs().authenticate(request).await?.into_inner().run.unwrap_or_default())
    }

    /// Confirms the plan as it is now.
    pub async fn confirm(&self, run_id: &str) -> Result<v1::Run, Status> {
        let plan = self.run(run_id).await?.plan_result.unwrap_or_default();
        let request = v1::ConfirmRequest { run_id: run_id.to_owned(), plan_digest: plan.digest };
        Ok(self.runs().confirm(request).await?.into_inner().run.unwrap_or_default())
    }

    /// Waits until a run is as wanted. Broken connections are made again.
    pub async fn wait_for_run(
        &self,
        run_id: &str,
        what: &str,
        wanted: impl Fn(&v1::Run) -> bool,
    ) -> anyhow::Result<v1::Run> {
        wait_for(&format!("{what} of run {run_id}"), LIMIT, async || {
            let run = self.run(run_id).await.map_err(|status| status.to_string())?;
            if wanted(&run) { Ok(run) } else { Err(describe(&run)) }
        })
        .await
    }

    /// Waits until a run is in a state. Ends early, as a failure, when the run ends in another.
    pub async fn wait_for_state(&self, run_id: &str, state: RunState) -> anyhow::Result<v1::Run> {
        let what = state.as_str_name();
        let reached = |run: &v1::Run| run.state() == state || is_ended(run);
        let run = self.wait_for_run(run_id, what, reached).await?;
        anyhow::ensure!(run.state() == state, "waited for {what}; it ended: {}", describe(&run));
        Ok(run)
    }

    /// Follows a run's own stream until it is as wanted, and returns all that the stream told.
    /// States may be skipped: the stream tells the newest.
    pub async fn watch_until(
        &self,
        run_id: &str,
        wanted: impl Fn(&v1::Run) -> bool,
    ) -> anyhow::Result<Vec<v1::Run>> {
        let mut seen = Vec::new();
        let follow = async {
            loop {
                let request = v1::WatchRunRequest { run_id: run_id.to_owned() };
                // A broken stream is opened again; the limit ends what cannot be opened.
                let Ok(stream) = self.runs().watch_run(request).await else {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                };
                let mut stream = stream.into_inner();
                while let Ok(Some(update)) = stream.message().await {
                    let run = update.run.unwrap_or_default();
                    let done = wanted(&run);
                    seen.push(run);
                    if done {
                        return;
                    }
                }
            }
        };
        let in_time = tokio::time::timeout(LIMIT, follow).await.is_ok();
        let last = seen.last().map(describe).unwrap_or_default();
        anyhow::ensure!(in_time, "watched run {run_id} for {LIMIT:?}; last seen: {last}");
        Ok(seen)
    }
}

/// Logs and audit.
impl Person {
    /// Reads a phase's canonical log as it is now.
    pub async fn read_log(&self, run_id: &str, phase: Phase) -> Result<Vec<u8>, Status> {
        let request = v1::ReadLogRequest {
            run_id: run_id.to_owned(),
            phase: phase.into(),
            offset: 0,
            follow: false,
        };
        let mut stream = self.runs().read_log(request).await?.into_inner();
        let mut log = Vec::new();
        while let Some(piece) = stream.message().await? {
            if piece.offset != log.len() as u64 {
                return Err(Status::data_loss("the pieces of the log do not fit together"));
            }
            log.extend(piece.data);
        }
        Ok(log)
    }

    /// Reads a phase's log as lines of JSON.
    pub async fn log_lines(&self, run_id: &str, phase: Phase) -> anyhow::Result<Vec<Value>> {
        let log = self.read_log(run_id, phase).await?;
        let lines = log.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
        lines
            .map(|line| {
                let text = String::from_utf8_lossy(line);
                serde_json::from_str(&text).with_context(|| format!("a line is no JSON: {text}"))
            })
            .collect()
    }

    /// Reads the messages of a phase's log, a line each.
    pub async fn log_text(&self, run_id: &str, phase: Phase) -> anyhow::Result<String> {
        let mut text = String::new();
        for line in self.log_lines(run_id, phase).await? {
            text.push_str(line["@message"].as_str().unwrap_or_default());
            text.push('\n');
        }
        Ok(text)
    }

    /// Lists the audit records about a run, or all when `run_id` is empty.
    pub async fn audit_records(&self, run_id: &str) -> anyhow::Result<Vec<v1::AuditRecord>> {
        let mut request = v1::ListAuditRecordsRequest {
            organization: self.organization.clone(),
            page_size: 200,
            run_id: run_id.to_owned(),
            ..Default::default()
        };
        let mut records = Vec::new();
        loop {
            let page = self.audit().list_audit_records(request.clone()).await?.into_inner();
            records.extend(page.records);
            if page.next_page_token.is_empty() {
                return Ok(records);
            }
            request.page_token = page.next_page_token;
        }
    }

    pub async fn verify_audit(&self) -> anyhow::Result<v1::VerifyAuditResponse> {
        let request = v1::VerifyAuditRequest { organization: self.organization.clone() };
        Ok(self.audit().verify_audit(request).await?.into_inner())
    }
}

/// Adds the token to every request.
#[derive(Clone)]
pub struct Bearer(MetadataValue<Ascii>);

impl Bearer {
    fn new(token: &str) -> anyhow::Result<Self> {
        let mut value = MetadataValue::try_from(format!("Bearer {token}"))
            .context("the token has characters that no token has")?;
        value.set_sensitive(true);
        Ok(Self(value))
    }
}

impl fmt::Debug for Bearer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Bearer([hidden])")
    }
}

impl Interceptor for Bearer {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        request.metadata_mut().insert("authorization", self.0.clone());
        Ok(request)
    }
}

fn describe(run: &v1::Run) -> String {
    let refusal = run.last_refusal.as_ref().map(|refusal| refusal.message.as_str());
    format!("{} {} {}", run.state().as_str_name(), run.reason, refusal.unwrap_or_default())
}

fn unique() -> String {
    Uuid::new_v4().to_string()
}
