//! A control plane without processes: use cases over the memory store and the simulated AWS.

pub(crate) mod between;
pub(crate) mod together;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use latchkey_aws_simulator::{Clock as SimulatedClock, Simulator, World};
use latchkey_domain::device::WINDOW;
use latchkey_domain::id::{Digest, OrganizationId, PoolId, RunnerId, UserId};
use latchkey_domain::policy::{MfaPolicy, Phase};
use latchkey_domain::run::{Counts, PlanDigests, Run, RunKind};
use latchkey_domain::time::Timestamp;
use secrecy::SecretString;

use super::artifacts::{ArtifactHeader, Made};
use super::authenticate_run::Submission;
use super::environments::EnvironmentView;
use super::finish_job::JobResult;
use super::guarded_change::GivenCode;
use super::history::Mark;
use super::lease_job::SESSION_FLOOR;
use super::queue_run::NewRun;
use super::service_tokens::TokenScope;
use super::settings::SettingsChange;
use super::start_job::Start;
use super::variables::{NewVariable, Scope};
use super::{App, PageRequest};
use crate::app::audit_trail::AuditFilter;
use crate::auth::{Caller, NewToken, Proof, RunnerIdentity, sha256};
use crate::authority::Authority;
use crate::blobs::Blobs;
use crate::clock::{Clock, Manual, Wall};
use crate::dispatch;
use crate::error::Result;
use crate::job::LeaseRef;
use crate::notices::Outbound;
use crate::run_log::{self, RunLogs};
use crate::seal::{IfMissing, MasterKey};
use crate::store::keys::VariableScope;
use crate::store::memory::Memory;
use crate::store::record::authentication::Purpose;
use crate::store::record::environment::RoleSettings;
use crate::store::record::people::{Access, Bearer, Organization, Role, Token};
use crate::store::record::runner::Runner;
use crate::store::record::variable::{Category, stored_name};
use crate::store::record::{Text, encode};
use crate::store::{Batch, CommitError, Expect, Store, keys};
use crate::sts::aws::AwsSts;

pub(crate) const ORGANIZATION: &str = "acme";
pub(crate) const ENVIRONMENT: &str = "web";

pub(crate) struct Fixture {
    pub(crate) app: Arc<App>,
    pub(crate) aws: Simulator,
    pub(crate) owner: Caller,
    pub(crate) clock: Arc<Manual>,
    pub(crate) store: Arc<dyn Store>,
    master: Arc<MasterKey>,
    endpoint: String,
    directory: tempfile::TempDir,
    /// Kept, so that messages to dispatch are not refused.
    inbox: std::sync::Mutex<Option<dispatch::Inbox>>,
}

impl Fixture {
    /// An organization with a listed account, a triple and one environment.
    pub(crate) async fn new(policy: MfaPolicy) -> Self {
        let settings = SettingsChange { policy: Some(policy), ..SettingsChange::default() };
        Self::in_environment(settings).await
    }

    /// The same with more settings.
    pub(crate) async fn in_environment(settings: SettingsChange) -> Self {
        let aws = Simulator::start(World::example(), SimulatedClock::wall()).await.unwrap();
        let endpoint = aws.url();
        let fixture = Self::bare(aws, endpoint).await;
        let facts = fixture.aws.facts();
        let accounts = vec![facts.account_id];
        fixture
            .app
            .update_organization(&fixture.owner, ORGANIZATION, accounts, None)
            .await
            .unwrap();
        // While nothing guards it: no settings take a code.
        fixture.create_environment(settings).await;
        let secret = facts.secret_access_key.expose().to_owned();
        fixture.set("AWS_ACCESS_KEY_ID", &facts.access_key_id).await;
        fixture.set("AWS_SECRET_ACCESS_KEY", &secret).await;
        fixture.set("AWS_MFA_SERIAL_NUMBER", &facts.mfa_serial).await;
        fixture
    }

    async fn bare(aws: Simulator, endpoint: String) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let key_file = directory.path().join("key");
        let master = Arc::new(MasterKey::open(&key_file, IfMissing::Create).unwrap());
        let store: Arc<dyn Store> = Arc::new(Memory::new());
        // Well within a window, so that no test straddles two.
        let window = i64::try_from(WINDOW.as_millis()).unwrap();
        let now = Wall.now().as_millis().div_euclid(window) * window + 10_000;
        let clock = Arc::new(Manual::new(Timestamp::from_millis(now)));
        let (app, inbox) = app(directory.path(), &master, &store, &clock, &endpoint).await;
        let secret = app.prepare_bootstrap().await.unwrap().unwrap();
        let token = app.bootstrap(&secret, ORGANIZATION, "ada").await.unwrap();
        let owner = app.caller(&token).await.unwrap();
        let inbox = Some(inbox).into();
        let fixture = Self { app, aws, owner, clock, store, master, endpoint, directory, inbox };
        fixture.dispatch();
        fixture
    }

    /// The same data in a new process, as after a crash. STS is where `endpoint` says.
    pub(crate) async fn restarted(&self, endpoint: Option<&str>) -> Arc<App> {
        let endpoint = endpoint.unwrap_or(&self.endpoint);
        app(self.directory(), &self.master, &self.store, &self.clock, endpoint).await.0
    }

    /// Where its files are: all that a data directory has, but the records.
    pub(crate) fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Counts the blobs that this process has open.
    pub(crate) fn open_blobs(&self) -> usize {
        let blobs = self.directory().join("blobs");
        let open = std::fs::read_dir("/proc/self/fd").unwrap();
        let open = open.filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok());
        open.filter(|path| path.starts_with(&blobs)).count()
    }

    pub(crate) fn key_file(&self) -> PathBuf {
        self.directory().join("key")
    }

    /// What a runner was told by a control plane of a later generation, under the same key.
    pub(crate) async fn told_later(&self) -> Mark {
        let store: Arc<dyn Store> = Arc::new(Memory::new());
        let generation = encode(&(self.app.generation.get() + 1));
        let batch = Batch::new().put(keys::generation(), Expect::Absent, generation);
        store.commit(batch).await.unwrap();
        let directory = tempfile::tempdir().unwrap();
        self.on(directory.path(), &store).await.mark().unwrap()
    }

    /// A control plane on other data, under the same master key and clock.
    pub(crate) async fn on(&self, data: &Path, store: &Arc<dyn Store>) -> Arc<App> {
        app(data, &self.master, store, &self.clock, &self.endpoint).await.0
    }

    /// A control plane of the same process, so to speak, that commits through another store.
    pub(crate) async fn committing_through(&self, store: Arc<dyn Store>) -> Arc<App> {
        let app = self.on(self.directory(), &store).await;
        let app = Arc::into_inner(app).expect("nobody else has it yet");
        Arc::new(App { dispatch: self.app.dispatch.clone(), ..app })
    }

    /// One whose commits come in twos.
    pub(crate) async fn in_twos(&self) -> Arc<App> {
        let app = self.committing_through(Arc::clone(&self.store)).await;
        let app = Arc::into_inner(app).expect("nobody else has it yet");
        Arc::new(App { store: together::Together::over(&self.store), ..app })
    }

    /// One in which something happens before the nth request that it makes of the store.
    pub(crate) async fn with_between(
        &self,
        nth: usize,
        deed: impl Future<Output = ()> + Send + 'static,
    ) -> (Arc<App>, Arc<between::BetweenRequests>) {
        let app = self.committing_through(Arc::clone(&self.store)).await;
        let app = Arc::into_inner(app).expect("nobody else has it yet");
        let store = between::BetweenRequests::over(&self.store, nth, deed);
        (Arc::new(App { store: Arc::clone(&store) as Arc<dyn Store>, ..app }), store)
    }

    /// One in which something happens after AWS has taken a code.
    pub(crate) async fn with_late_answers(
        &self,
        deed: impl Future<Output = ()> + Send + 'static,
    ) -> Arc<App> {
        let app = self.committing_through(Arc::clone(&self.store)).await;
        let app = Arc::into_inner(app).expect("nobody else has it yet");
        let sts = between::BeforeIdentity::over(&app.sts, deed);
        Arc::new(App { sts, ..app })
    }

    /// The same data in another process that tells others through `outbound`.
    pub(crate) async fn telling_through(&self, outbound: Outbound) -> Arc<App> {
        let app = self.on(self.directory(), &self.store).await;
        let app = Arc::into_inner(app).expect("nobody else has it yet");
        Arc::new(App { dispatch: self.app.dispatch.clone(), outbound: Arc::new(outbound), ..app })
    }

    /// Makes the organization's record one of before it was noted that something guards it.
    pub(crate) async fn forget_guard(&self) {
        let found = self.app.organization(self.organization().await).await.unwrap();
        let next = Organization { guarded: false, ..found.value };
        let batch = Batch::new().put(found.key, Expect::At(found.version), encode(&next));
        self.store.commit(batch).await.unwrap();
    }

    /// Lets dispatch run, for tests of what it does and knows.
    pub(crate) fn dispatch(&self) {
        let Some(inbox) = self.inbox.lock().unwrap().take() else { return };
        let leases: Arc<dyn dispatch::Leases> = Arc::clone(&self.app) as Arc<dyn dispatch::Leases>;
        tokio::spawn(inbox.run(leases, self.app.lease_term));
    }

    pub(crate) async fn set(&self, name: &str, value: &str) {
        // Of a whole triple it would take a code.
        self.unset(name).await;
        let variable = NewVariable {
            name: name.into(),
            category: Category::Environment,
            value: value.into(),
            sensitive: true,
            hcl: false,
        };
        let scope = Scope::Organization;
        self.app.set_variable(&self.owner, ORGANIZATION, &scope, variable, None).await.unwrap();
    }

    async fn create_environment(&self, settings: SettingsChange) {
        self.app
            .create_environment(&self.owner, ORGANIZATION, ENVIRONMENT, settings, "make", None)
            .await
            .unwrap();
    }

    /// Makes a user and returns their token.
    pub(crate) async fn create_user(&self, name: &str, role: Role, access: Access) -> SecretString {
        let request = format!("make-{name}");
        let made =
            self.app.create_user(&self.owner, ORGANIZATION, name, role, access, &request).await;
        made.unwrap()
    }

    /// Makes a member.
    pub(crate) async fn member(&self, name: &str, access: Access) -> Caller {
        let token = self.create_user(name, Role::Member, access).await;
        self.app.caller(&token).await.unwrap()
    }

    /// Proves a caller by a token made for that.
    pub(crate) async fn prove(&self, caller: &Caller) -> Proof {
        let bearer = match caller.clone() {
            Caller::User { id, name } => Bearer::User { id: Text(id), name },
            Caller::Service { id, organization, name } => {
                Bearer::Service { id: Text(id), organization: Text(organization), name }
            }
        };
        let token = NewToken::generate("lk_").unwrap().digest;
        let record = Token { bearer, expires_at: None, sign_in: None, used_at: None };
        let key = keys::token(token.as_bytes());
        let batch = Batch::new().put(key, Expect::Absent, encode(&record));
        self.store.commit(batch).await.unwrap();
        Proof { caller: caller.clone(), token, sign_in: None, expires_at: None }
    }

    /// Queues a run of some configuration.
    pub(crate) async fn queue(&self, request_id: &str) -> Run {
        self.try_queue(&self.owner, request_id).await.unwrap()
    }

    pub(crate) async fn try_queue(&self, caller: &Caller, request_id: &str) -> Result<Run> {
        self.queue_with(&self.app, caller, request_id, None).await
    }

    pub(crate) async fn queue_kind(&self, kind: RunKind, request_id: &str) -> Run {
        let new = NewRun { kind, ..self.new_run(&self.app, request_id).await };
        self.app.queue_run(&self.owner, new).await.unwrap()
    }

    /// Queues a run that asks to be applied without a confirmation.
    pub(crate) async fn queue_automatic(&self, caller: &Caller, request_id: &str) -> Result<Run> {
        self.queue_with(&self.app, caller, request_id, Some(true)).await
    }

    /// Queues a run at another control plane, on a copy of these data.
    pub(crate) async fn queue_at(&self, app: &Arc<App>, request_id: &str) -> Run {
        self.queue_with(app, &self.owner, request_id, None).await.unwrap()
    }

    async fn queue_with(
        &self,
        app: &Arc<App>,
        caller: &Caller,
        request_id: &str,
        auto_apply: Option<bool>,
    ) -> Result<Run> {
        let new = NewRun { auto_apply, ..self.new_run(app, request_id).await };
        app.queue_run(caller, new).await
    }

    /// Queues a run with variables of its own.
    pub(crate) async fn queue_giving(
        &self,
        request_id: &str,
        variables: Vec<NewVariable>,
    ) -> Result<Run> {
        self.queue_giving_as(&self.owner, request_id, variables).await
    }

    pub(crate) async fn queue_giving_as(
        &self,
        caller: &Caller,
        request_id: &str,
        variables: Vec<NewVariable>,
    ) -> Result<Run> {
        let new = NewRun { variables, ..self.new_run(&self.app, request_id).await };
        self.app.queue_run(caller, new).await
    }

    /// Asks for a run of some configuration, which is uploaded.
    pub(crate) async fn new_run(&self, app: &App, request_id: &str) -> NewRun {
        let organization = self.organization().await;
        let configuration = Digest::from_bytes([1; 32]);
        let key = keys::configuration(organization, &configuration);
        app.store.commit(Batch::new().put(key, Expect::Anything, b"{}".as_slice())).await.unwrap();
        NewRun {
            organization: ORGANIZATION.into(),
            environment: ENVIRONMENT.into(),
            configuration,
            kind: RunKind::PlanAndApply,
            message: String::new(),
            target: vec![],
            replace: vec![],
            auto_apply: None,
            destroy_confirmation: ENVIRONMENT.into(),
            variables: vec![],
            request_id: request_id.into(),
        }
    }

    /// A service token with the access of a writer.
    pub(crate) async fn service_token(&self, name: &str) -> Caller {
        let (app, scope) = (&self.app, TokenScope::default());
        let made =
            app.create_service_token(&self.owner, ORGANIZATION, name, None, scope, name).await;
        app.caller(&made.unwrap().0).await.unwrap()
    }

    /// Another user of the organization.
    pub(crate) async fn user(&self, name: &str, role: Role) -> Caller {
        let app = &self.app;
        let made =
            app.create_user(&self.owner, ORGANIZATION, name, role, Access::Write, name).await;
        app.caller(&made.unwrap()).await.unwrap()
    }

    /// A person who is in no organization.
    pub(crate) fn stranger(&self) -> Caller {
        Caller::User { id: UserId::from_bytes([99; 16]), name: "eve".into() }
    }

    pub(crate) async fn organization(&self) -> OrganizationId {
        self.app.show_organization(&self.owner, ORGANIZATION).await.unwrap().id.0
    }

    /// A right code that was not used yet.
    pub(crate) fn code(&self) -> String {
        self.aws.unused_code(&self.aws.facts().mfa_serial).unwrap()
    }

    pub(crate) async fn submit(&self, run: &Run, code: &str, request_id: &str) -> Result<Run> {
        self.submit_as(&self.owner, run, code, request_id).await
    }

    pub(crate) async fn submit_as(
        &self,
        caller: &Caller,
        run: &Run,
        code: &str,
        request_id: &str,
    ) -> Result<Run> {
        let submission = Submission {
            run: run.id,
            phase: if run.planned.is_some() { Phase::Apply } else { Phase::Plan },
            code: SecretString::from(code),
            seen: run.planned.as_ref().map(|planned| planned.digest),
            request_id: request_id.into(),
            purpose: Purpose::Phase,
        };
        self.app.authenticate_run(caller, submission).await.map(|(run, _)| run)
    }

    pub(crate) async fn run(&self, run: &Run) -> Run {
        self.app.show_run(&self.owner, run.id).await.unwrap().run
    }

    pub(crate) async fn runner(&self) -> RunnerIdentity {
        self.enrolled(7).await
    }

    /// A runner with a record, as all that are enrolled have. Repeatable.
    pub(crate) async fn enrolled(&self, number: u8) -> RunnerIdentity {
        let (organization, pool) = (self.organization().await, PoolId::from_bytes([8; 16]));
        let id = RunnerId::from_bytes([number; 16]);
        let record = Runner {
            id: Text(id),
            name: "builder".into(),
            pool: Text(pool),
            organization: Text(organization),
            key: Text(Digest::from_bytes([number; 32])),
            enrolled_at: self.app.now().into(),
            said: None,
            drained_at: None,
            revoked_at: None,
            fought_at: None,
        };
        let batch = Batch::new().put(keys::runner(id), Expect::Absent, encode(&record));
        match self.store.commit(batch).await {
            Ok(_) | Err(CommitError::Conflict { .. }) => {}
            Err(CommitError::Store(error)) => panic!("{error}"),
        }
        RunnerIdentity { id, name: record.name, organization, pool }
    }

    /// Grants a run's job and releases its credentials.
    pub(crate) async fn start(&self, run: &Run, phase: Phase) -> (RunnerIdentity, LeaseRef, Start) {
        let runner = self.runner().await;
        let (lease, _) = self.app.grant(run.job_id(phase), runner.id).await.unwrap();
        let start = self.app.start_job(&runner, lease).await.unwrap();
        (runner, lease, start)
    }

    pub(crate) async fn upload(
        &self,
        runner: &RunnerIdentity,
        lease: LeaseRef,
        kind: Made,
        data: &[u8],
    ) -> Result<Digest> {
        let header = ArtifactHeader {
            lease,
            kind,
            digest: sha256(data),
            size: data.len() as u64,
            sequence: 0,
        };
        let mut upload = self.app.upload_artifact(runner, header).await?;
        upload.write(data).await?;
        upload.finish().await?;
        Ok(header.digest)
    }

    /// Plans a run whose plan is queued, with changes to apply.
    pub(crate) async fn plan(&self, run: &Run) -> Run {
        self.plan_with(run, b"{}").await
    }

    /// Plans a run with these changes. Whatever they are, the runner says that it adds one thing.
    pub(crate) async fn plan_with(&self, run: &Run, changes: &[u8]) -> Run {
        let (runner, lease, _) = self.start(run, Phase::Plan).await;
        self.planned_with(&runner, lease, changes).await
    }

    /// Ends a plan that goes on, with changes to apply, by terraform 1.11.4.
    pub(crate) async fn planned(&self, runner: &RunnerIdentity, lease: LeaseRef) -> Run {
        self.planned_with(runner, lease, b"{}").await
    }

    async fn planned_with(&self, runner: &RunnerIdentity, lease: LeaseRef, changes: &[u8]) -> Run {
        self.end_plan(runner, lease, changes).await;
        self.app.run(lease.job.run).await.unwrap().value
    }

    /// Brings what a plan makes, for a job that was started.
    pub(crate) async fn end_plan(&self, runner: &RunnerIdentity, lease: LeaseRef, changes: &[u8]) {
        let changes = self.upload(runner, lease, Made::Changes, changes).await.unwrap();
        let workspace = self.upload(runner, lease, Made::Workspace, b"made").await.unwrap();
        let result = JobResult::Planned {
            digests: PlanDigests { plan: changes, workspace, lock_file: None, changes },
            applyable: true,
            counts: Counts { add: 1, ..Counts::default() },
            engine: "terraform".into(),
            terraform_version: "1.11.4".into(),
        };
        self.app.finish_job(runner, lease, 0, result).await.unwrap();
    }

    /// Changes settings without a code.
    pub(crate) async fn settings(&self, change: SettingsChange) {
        self.try_settings(change, None).await.unwrap();
    }

    pub(crate) async fn try_settings(
        &self,
        change: SettingsChange,
        proof: Option<GivenCode>,
    ) -> Result<EnvironmentView> {
        self.app.update_environment(&self.owner, ORGANIZATION, ENVIRONMENT, change, proof).await
    }

    pub(crate) async fn environment(&self) -> EnvironmentView {
        self.app.show_environment(&self.owner, ORGANIZATION, ENVIRONMENT).await.unwrap()
    }

    /// A right code that was not used yet, for a change.
    pub(crate) fn proof(&self, request_id: &str) -> Option<GivenCode> {
        Some(GivenCode { code: self.code().into(), request_id: request_id.into() })
    }

    /// Actions of the audit trail, oldest first, with their actors.
    pub(crate) async fn audited(&self) -> Vec<(String, String)> {
        let page = PageRequest { size: 200, ..PageRequest::default() };
        let page = self
            .app
            .list_audit(&self.owner, ORGANIZATION, AuditFilter::default(), page)
            .await
            .unwrap();
        let drafts = page.items.into_iter().map(|record| record.draft);
        drafts.map(|draft| (draft.action, draft.actor)).collect()
    }

    /// Lists accounts behind the use cases' back.
    pub(crate) async fn list_accounts(&self, accounts: Vec<String>) {
        let found = self.app.organization(self.organization().await).await.unwrap();
        let next = Organization { aws_accounts: accounts, ..found.value };
        let batch = Batch::new().put(found.key, Expect::Anything, encode(&next));
        self.store.commit(batch).await.unwrap();
    }

    /// Deletes an organization variable behind the use cases' back.
    pub(crate) async fn unset(&self, name: &str) {
        let scope = VariableScope::Organization(self.organization().await);
        let key = keys::variable(scope, &stored_name(Category::Environment, name));
        self.store.commit(Batch::new().delete(key, Expect::Anything)).await.unwrap();
    }
}

/// The simulated role `read` with a session policy of so many characters.
pub(crate) fn narrowed_by(characters: usize) -> RoleSettings {
    let frame = r#"{"Version":"2012-10-17","Statement":[],"Id":""}"#;
    let filling = "x".repeat(characters - frame.len());
    RoleSettings {
        arn: "arn:aws:iam::123456789012:role/read".into(),
        policy: frame.replace(r#""Id":"""#, &format!(r#""Id":"{filling}""#)),
        ..RoleSettings::default()
    }
}

async fn app(
    path: &Path,
    master: &Arc<MasterKey>,
    store: &Arc<dyn Store>,
    clock: &Arc<Manual>,
    endpoint: &str,
) -> (Arc<App>, dispatch::Inbox) {
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let clock: Arc<dyn Clock> = Arc::clone(clock) as Arc<dyn Clock>;
    let authority = Authority::open(&path.join("authority"), master, Arc::clone(&clock)).unwrap();
    let (handle, inbox) = dispatch::channel();
    let app = App {
        store: Arc::clone(store),
        blobs: Blobs::open(path.join("blobs"), Arc::clone(master)).unwrap(),
        logs: RunLogs::open(run_log::Options::new(path.join("logs"))).unwrap(),
        sts: Arc::new(AwsSts::new(Some(endpoint.to_owned()), false).await),
        clock,
        master: Arc::clone(master),
        authority: Arc::new(authority),
        dispatch: handle,
        generation: crate::runtime::generation(&**store).await.unwrap(),
        session_floor: SESSION_FLOOR,
        lease_term: Duration::from_secs(30),
        force_cancel_grace: Duration::from_secs(30),
        gates: super::run_output::Gates::default(),
        history: super::history::History::default(),
        revocations: crate::auth::revocation::Revocations::default(),
        sign_ins: crate::app::sessions::Gate::default(),
        uploads: super::uploads::Uploads::default(),
        limits: crate::app::limits::Timer::default(),
        outbound: Arc::new(Outbound::closed()),
    };
    app.begin_incarnation().await.unwrap();
    (Arc::new(app), inbox)
}
