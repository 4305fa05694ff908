//! Two organizations that are filled in the same way, and the two listeners that serve them.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use http::HeaderValue;
use latchkey_domain::id::Digest;
use latchkey_domain::policy::{MfaPolicy, Phase};
use latchkey_domain::run::RunKind;
use latchkey_proto::v1;
use latchkey_proto::v1::lease_request::Frame as In;
use latchkey_proto::v1::lease_response::Frame as Out;
use latchkey_proto::v1::runner_service_client::RunnerServiceClient;
use prost::Message;
use prost_reflect::{DynamicMessage, MethodDescriptor};
use rcgen::{CertificateParams, KeyPair};
use rustls_pki_types::CertificateDer;
use secrecy::{ExposeSecret, SecretString};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::body::Body;
use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::metadata::MetadataValue;
use tonic::transport::server::TcpIncoming;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status};

use super::filling::Aim;
use super::raw::Raw;
use crate::app::PageRequest;
use crate::app::artifacts::Made;
use crate::app::break_glass::Glass;
use crate::app::fixture::{ENVIRONMENT, Fixture, ORGANIZATION};
use crate::app::members::MemberChange;
use crate::app::notices::Wish;
use crate::app::queue_run::NewRun;
use crate::app::service_tokens::TokenScope;
use crate::app::settings::SettingsChange;
use crate::app::state_lock::LockRequest;
use crate::app::variables::{NewVariable, Scope};
use crate::auth::Caller;
use crate::authority::key_of;
use crate::grpc;
use crate::listener::Peer;
use crate::store::record::notice::Event;
use crate::store::record::people::{Access, Role};
use crate::store::record::variable::Category;
use crate::store::{Batch, Expect, Version, keys};

/// The organization of those who try.
pub(in crate::grpc) const OWN: &str = "umbra";

/// In all that is the other organization's to know.
pub(in crate::grpc) const CANARY: &str = "canary";

/// Stands in the tests for what a handshake has proved.
const CERTIFICATE: &str = "x-certificate";

const LIMIT: Duration = Duration::from_secs(20);

pub(in crate::grpc) struct Tenants {
    pub(in crate::grpc) fixture: Fixture,
    /// All that the other organization has.
    pub(in crate::grpc) theirs: Aim,
    /// The same of the own.
    pub(in crate::grpc) own: Aim,
    pub(in crate::grpc) owner: SecretString,
    pub(in crate::grpc) member: SecretString,
    pub(in crate::grpc) program: SecretString,
    /// A runner of the own organization.
    pub(in crate::grpc) runner: Host,
    /// One of the other.
    pub(in crate::grpc) their_runner: Host,
    people: Channel,
    runners: Channel,
}

/// A build host: its key, and what it bought for it.
pub(in crate::grpc) struct Host {
    pub(in crate::grpc) request: Vec<u8>,
    pub(in crate::grpc) certificate: CertificateDer<'static>,
}

struct Filled {
    aim: Aim,
    member: SecretString,
    program: SecretString,
    host: Host,
}

impl Tenants {
    pub(in crate::grpc) async fn new() -> Self {
        let fixture = Fixture::new(MfaPolicy::Never).await;
        let app = &fixture.app;
        // As at a first start.
        let spent = keys::setting("bootstrap");
        app.store.commit(Batch::new().delete(spent, Expect::Anything)).await.unwrap();
        let secret = app.prepare_bootstrap().await.unwrap().unwrap();
        let owner = app.bootstrap(&secret, OWN, "bob").await.unwrap();
        let bob = app.caller(&owner).await.unwrap();
        prepare(&fixture, &bob).await;
        let in_both = Access::Write;
        let both = fixture.create_user("both", Role::Member, in_both).await;
        // Of an account that is handed over nobody else takes a part.
        let both = app.prove(&both).await.unwrap();
        app.set_password(&both, "".into(), "a long enough word".into(), None).await.unwrap();
        let change = MemberChange { role: None, access: Some(in_both), environments: vec![] };
        app.add_member(&bob, OWN, "both", change).await.unwrap();

        let theirs = fill(&fixture, &fixture.owner, ORGANIZATION, CANARY).await;
        let own = fill(&fixture, &bob, OWN, "plain").await;
        // What they alone have, for whoever looks for it among their own.
        app.create_pool(&fixture.owner, ORGANIZATION, "only-theirs", "only").await.unwrap();
        let settings = SettingsChange::default();
        app.create_environment(&fixture.owner, ORGANIZATION, "only-theirs", settings, "only", None)
            .await
            .unwrap();
        let configuration = keys::configuration(fixture.organization().await, &only_theirs());
        let batch = Batch::new().put(configuration, Expect::Anything, b"{}".as_slice());
        app.store.commit(batch).await.unwrap();

        let people = grpc::server()
            .layer(grpc::PeopleLayer { app: Arc::clone(app) })
            .add_routes(grpc::people(Arc::clone(app)).await);
        let runners = grpc::runners_server()
            .layer(tower::layer::layer_fn(Handshake))
            .layer(grpc::RunnersLayer::new(Arc::clone(app), grpc::PART_TIMEOUT))
            .add_routes(grpc::runners(Arc::clone(app)));
        let (at_people, people_port) = incoming().await;
        let (at_runners, runners_port) = incoming().await;
        tokio::spawn(people.serve_with_incoming(at_people));
        tokio::spawn(runners.serve_with_incoming(at_runners));
        Self {
            people: connect(people_port).await,
            runners: connect(runners_port).await,
            theirs: theirs.aim,
            their_runner: theirs.host,
            own: own.aim,
            owner,
            member: own.member,
            program: own.program,
            runner: own.host,
            fixture,
        }
    }

    /// Calls any rpc of people, of whichever kind, with one message; answers all that came.
    pub(in crate::grpc) async fn call(
        &self,
        method: &MethodDescriptor,
        token: &SecretString,
        message: &DynamicMessage,
    ) -> Result<Vec<u8>, Status> {
        let mut request = Request::new(tokio_stream::once(message.encode_to_vec()));
        let bearer = format!("Bearer {}", token.expose_secret());
        let bearer = MetadataValue::try_from(bearer).unwrap();
        request.metadata_mut().insert("authorization", bearer);
        stream(&self.people, method, request).await
    }

    /// The same of a runner, with as many messages as it takes.
    pub(in crate::grpc) async fn call_as(
        &self,
        method: &MethodDescriptor,
        host: Option<&Host>,
        messages: Vec<Vec<u8>>,
    ) -> Result<Vec<u8>, Status> {
        let mut request = Request::new(tokio_stream::iter(messages));
        if let Some(host) = host {
            request.metadata_mut().insert(CERTIFICATE, shown(host));
        }
        stream(&self.runners, method, request).await
    }

    /// Says hello as a runner that holds a lease, then one frame more. Answers what it is told:
    /// all frames that come before the answer to a heartbeat, and a revocation where one is due.
    pub(in crate::grpc) async fn lease(
        &self,
        host: &Host,
        held: v1::LeaseRef,
        frame: In,
    ) -> Result<Vec<Out>, Status> {
        let (sender, frames) = mpsc::channel(8);
        let hello = v1::Hello { slots: 1, held: vec![held], ..v1::Hello::default() };
        let answered = matches!(frame, In::Starting(_) | In::Again(_) | In::Finished(_));
        for frame in [In::Hello(hello), frame, In::Heartbeat(v1::Heartbeat::default())] {
            sender.send(v1::LeaseRequest { frame: Some(frame) }).await.unwrap();
        }
        let mut request = Request::new(ReceiverStream::new(frames));
        request.metadata_mut().insert(CERTIFICATE, shown(host));
        let told = async {
            let mut client = RunnerServiceClient::new(self.runners.clone());
            let mut answers = client.lease(request).await?.into_inner();
            let mut told = vec![];
            let (mut renewed, mut revoked) = (false, !answered);
            while !(renewed && revoked) {
                let Some(answer) = answers.message().await? else { break };
                let frame = answer.frame.expect("a frame is never empty");
                renewed |= matches!(frame, Out::Renewed(_));
                revoked |= matches!(frame, Out::Revoke(_));
                told.push(frame);
            }
            Ok(told)
        };
        tokio::time::timeout(LIMIT, told).await.expect("an answer in time")
    }

    /// Every record with its version.
    pub(in crate::grpc) async fn records(&self) -> BTreeMap<Vec<u8>, Version> {
        let mut records = BTreeMap::new();
        for kind in keys::Kind::ALL {
            for (key, found) in self.fixture.app.list(keys::all(*kind)).await.unwrap() {
                records.insert(key.as_bytes().to_vec(), found.version);
            }
        }
        records
    }

    /// What nobody else may be told, beyond the words that a request used itself.
    pub(in crate::grpc) fn assert_untold(&self, what: &str, told: &[u8], asked: &Aim) {
        let mut secrets = vec![CANARY];
        for thing in ["run", "runner", "quarantined", "glass", "subscriber", "delivery"] {
            secrets.push(self.theirs.get(thing));
        }
        if asked.get("organization") != ORGANIZATION {
            secrets.push(ORGANIZATION);
        }
        let told = String::from_utf8_lossy(told);
        for secret in secrets {
            assert!(!told.contains(secret), "{what} told {secret}: {told}");
        }
    }
}

/// A configuration that the other organization alone has.
pub(in crate::grpc) fn only_theirs() -> Digest {
    Digest::from_bytes([2; 32])
}

async fn incoming() -> (TcpIncoming, u16) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    (TcpIncoming::from(listener), port)
}

async fn connect(port: u16) -> Channel {
    let endpoint = Endpoint::from_shared(format!("http://127.0.0.1:{port}")).unwrap();
    endpoint.connect().await.unwrap()
}

fn shown(host: &Host) -> MetadataValue<tonic::metadata::Ascii> {
    MetadataValue::try_from(hex::encode(&host.certificate)).unwrap()
}

async fn stream<S>(
    channel: &Channel,
    method: &MethodDescriptor,
    request: Request<S>,
) -> Result<Vec<u8>, Status>
where
    S: tokio_stream::Stream<Item = Vec<u8>> + Send + 'static,
{
    let mut client = Grpc::new(channel.clone());
    client.ready().await.unwrap();
    let path = format!("/{}/{}", method.parent_service().full_name(), method.name());
    let path = PathAndQuery::try_from(path).unwrap();
    let answered = async {
        let mut answers = client.streaming(request, path, Raw).await?.into_inner();
        let mut all = vec![];
        while let Some(answer) = answers.message().await? {
            all.extend(answer);
        }
        Ok(all)
    };
    tokio::time::timeout(LIMIT, answered).await.expect("an answer in time")
}

/// Tells the layer of runners that a handshake has proved what a header brings.
#[derive(Clone, Debug)]
struct Handshake<S>(S);

impl<S> tower::Service<http::Request<Body>> for Handshake<S>
where
    S: tower::Service<http::Request<Body>>,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.0.poll_ready(context)
    }

    fn call(&mut self, mut request: http::Request<Body>) -> S::Future {
        let brought = request.headers().get(CERTIFICATE).map(HeaderValue::as_bytes);
        let certificate = brought.map(|hex| CertificateDer::from(hex::decode(hex).unwrap()));
        request.extensions_mut().insert(Peer { address: ([127, 0, 0, 1], 0).into(), certificate });
        self.0.call(request)
    }
}

/// Gives an organization the accounts and keys that the fixture's has.
async fn prepare(fixture: &Fixture, owner: &Caller) {
    let facts = fixture.aws.facts();
    let accounts = vec![facts.account_id];
    let app = &fixture.app;
    app.update_organization(owner, OWN, accounts, None).await.unwrap();
    for (name, value) in [
        ("AWS_ACCESS_KEY_ID", facts.access_key_id.as_str()),
        ("AWS_SECRET_ACCESS_KEY", facts.secret_access_key.expose()),
        ("AWS_MFA_SERIAL_NUMBER", facts.mfa_serial.as_str()),
    ] {
        let variable = variable(name, Category::Environment, value);
        app.set_variable(owner, OWN, &Scope::Organization, variable, None).await.unwrap();
    }
    let settings = SettingsChange { policy: Some(MfaPolicy::Never), ..SettingsChange::default() };
    app.create_environment(owner, OWN, ENVIRONMENT, settings, "make", None).await.unwrap();
}

fn variable(name: &str, category: Category, value: &str) -> NewVariable {
    NewVariable { name: name.into(), category, value: value.into(), sensitive: false, hcl: false }
}

/// Gives an organization one of each thing, under the same names, and names them. `word` is in
/// all that only it may know.
async fn fill(fixture: &Fixture, owner: &Caller, organization: &str, word: &str) -> Filled {
    let app = &fixture.app;
    for (scope, category) in [
        (Scope::Organization, Category::Terraform),
        (Scope::Environment(ENVIRONMENT.into()), Category::Environment),
        (Scope::Personal, Category::Terraform),
    ] {
        let variable = variable("setting", category, word);
        app.set_variable(owner, organization, &scope, variable, None).await.unwrap();
    }
    app.create_pool(owner, organization, "build", "pool").await.unwrap();
    let (token, _) =
        app.create_pool_token(owner, organization, "build", None, 1, "pool-token").await.unwrap();
    let spent = token.expose_secret().split('.').next().unwrap().to_owned();
    let key = KeyPair::generate().unwrap();
    let request = CertificateParams::default().serialize_request(&key).unwrap().der().to_vec();
    let enrolled = app.enroll(&spent.clone().into(), &request, "builder").await.unwrap();
    let host = Host { request, certificate: enrolled.issued.certificate };
    let runner = app.runner_with_key(&key_of(&host.certificate).unwrap()).await.unwrap();

    let queue = async |kind, request_id: &str| {
        let configuration = Digest::from_bytes([1; 32]);
        let key = keys::configuration(runner.organization, &configuration);
        app.store.commit(Batch::new().put(key, Expect::Anything, b"{}".as_slice())).await.unwrap();
        let new = NewRun {
            organization: organization.into(),
            kind,
            message: word.into(),
            ..fixture.new_run(app, request_id).await
        };
        app.queue_run(owner, new).await.unwrap()
    };
    let run = queue(RunKind::PlanAndApply, "first").await;
    let (lease, _) = app.grant(run.job_id(Phase::Plan), runner.id).await.unwrap();
    app.start_job(&runner, lease).await.unwrap();
    fixture.end_plan(&runner, lease, b"{}").await;
    let run = app.run(run.id).await.unwrap().value;
    let plan = run.planned.as_ref().unwrap().digest;
    let run = app.confirm_run(owner, run.id, plan).await.unwrap();
    let (lease, _) = app.grant(run.job_id(Phase::Apply), runner.id).await.unwrap();
    app.start_job(&runner, lease).await.unwrap();
    let state = format!(r#"{{"version":4,"serial":1,"lineage":"lineage-{word}"}}"#);
    fixture.upload(&runner, lease, Made::State, state.as_bytes()).await.unwrap();
    fixture.upload(&runner, lease, Made::ErroredState, state.as_bytes()).await.unwrap();
    queue(RunKind::Destroy, "second").await;

    let settings = SettingsChange::default();
    app.create_environment(owner, organization, "spare", settings, "spare", None).await.unwrap();
    let lock = LockRequest { id: format!("lock-{word}"), ..LockRequest::default() };
    app.lock_state(owner, organization, "spare", lock).await.unwrap();

    let (role, access) = (Role::Member, Access::Admin);
    let user = format!("{word}-user");
    let member = app.create_user(owner, organization, &user, role, access, "user").await;
    let scope = TokenScope { access: Access::Write, environments: vec![] };
    let program = app.create_service_token(owner, organization, "ci", None, scope, "ci").await;
    // Of this name they alone have one.
    let token = format!("{word}-token");
    let scope = TokenScope::default();
    app.create_service_token(owner, organization, &token, None, scope, "token").await.unwrap();
    let wish = Wish { events: [Event::Applied].into(), environments: vec![] };
    let url = format!("https://{word}.example.org/hook");
    let hook = app.create_webhook(owner, organization, &url, wish, "hook").await.unwrap().0;
    let delivery = app.send_test(owner, organization, hook.id).await.unwrap();
    let page = PageRequest::default();
    let kept = app.list_quarantined(owner, organization, None, page).await.unwrap();
    app.break_glass(organization, &Glass::Triple { user: None }, word).await.unwrap();
    let glass = app.who_am_i(owner).await.unwrap().broken_glass.remove(0).1;
    let aim = Aim::of([
        ("organization", organization.into()),
        ("environment", ENVIRONMENT.into()),
        ("pool", "build".into()),
        ("run", run.id.to_string()),
        ("epoch", lease.epoch.get().to_string()),
        ("generation", lease.generation.get().to_string()),
        ("runner", runner.id.to_string()),
        ("quarantined", kept.items[0].record.id.0.to_string()),
        ("glass", glass.id.0.to_string()),
        ("configuration", run.request.configuration.to_string()),
        ("plan", plan.to_string()),
        ("lock", format!("lock-{word}")),
        ("variable", "setting".into()),
        ("user", user),
        ("token", token),
        ("subscriber", hook.id.to_string()),
        ("delivery", delivery.to_string()),
        ("pool_token", spent),
    ]);
    Filled { aim, member: member.unwrap(), program: program.unwrap().0, host }
}
