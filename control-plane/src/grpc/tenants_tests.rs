//! Two organizations with everything alike but the ids: nobody of one reaches into the other, by
//! any rpc of the descriptor set, over real gRPC.
//!
//! Requests are made from the descriptors: each field that names something is filled from a table,
//! and an rpc with a field that the table does not know fails, so none is forgotten. What cannot
//! be told apart from what does not exist is not reached.

use std::collections::BTreeMap;
use std::time::Duration;

use latchkey_domain::policy::{MfaPolicy, Phase};
use latchkey_domain::run::RunKind;
use prost::Message;
use prost::bytes::{Buf, BufMut};
use prost_reflect::{
    DescriptorPool, DynamicMessage, FieldDescriptor, Kind, MessageDescriptor, MethodDescriptor,
    Value,
};
use secrecy::{ExposeSecret, SecretString};
use tokio::net::TcpListener;
use tonic::client::Grpc;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::codegen::http::uri::PathAndQuery;
use tonic::metadata::MetadataValue;
use tonic::transport::server::TcpIncoming;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status};
use uuid::Uuid;

use crate::app::PageRequest;
use crate::app::artifacts::Made;
use crate::app::fixture::{ENVIRONMENT, Fixture, ORGANIZATION};
use crate::app::notices::Wish;
use crate::app::service_tokens::TokenScope;
use crate::app::settings::SettingsChange;
use crate::app::variables::{NewVariable, Scope};
use crate::auth::Caller;
use crate::store::record::notice::Event;
use crate::store::record::people::{Access, Role};
use crate::store::record::variable::Category;
use crate::store::{Batch, Expect, Version, keys};

/// In all that is the other organization's to know.
const CANARY: &str = "canary";

/// The rpcs about nothing that an organization has: a person's own sign-ins are theirs alone, as
/// the tests of sessions show.
const ABOUT_NOTHING: [&str; 6] = [
    "AccountService/WhoAmI",
    "SessionService/SignIn",
    "SessionService/SignOut",
    "SessionService/ListSessions",
    "SessionService/RevokeSession",
    "SessionService/SetPassword",
];

/// What carries its proof in the request, and tells nothing without it.
const WITH_SECRET: [&str; 1] = ["AccountService/Bootstrap"];

/// What a request is to reach.
#[derive(Clone, Debug)]
struct Aim {
    organization: String,
    environment: String,
    pool: String,
    run: String,
    runner: String,
    quarantined: String,
    configuration: String,
    plan: String,
    lock: String,
    variable: String,
    user: String,
    token: String,
    /// A webhook.
    subscriber: String,
    delivery: String,
}

/// The other organization, and two of its own kind that have nothing of it.
struct Tenants {
    fixture: Fixture,
    /// All that the other organization has.
    theirs: Aim,
    own: SecretString,
    member: SecretString,
    program: SecretString,
    channel: Channel,
}

const OWN: &str = "umbra";

impl Tenants {
    async fn new() -> Self {
        let fixture = Fixture::new(MfaPolicy::Never).await;
        let theirs = fill(&fixture).await;
        let (own, bob) = another_organization(&fixture).await;
        let app = &fixture.app;
        let (role, access) = (Role::Member, Access::Admin);
        let member = app.create_user(&bob, OWN, "carol", role, access, "carol").await.unwrap();
        let scope = TokenScope { access: Access::Write, environments: vec![] };
        let program = app.create_service_token(&bob, OWN, "ci", None, scope, "ci").await;
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let serving = super::server()
            .layer(super::PeopleLayer { app: app.clone() })
            .add_routes(super::people(app.clone()).await);
        tokio::spawn(serving.serve_with_incoming(TcpIncoming::from(listener)));
        let endpoint = Endpoint::from_shared(format!("http://{address}")).unwrap();
        let channel = endpoint.connect().await.unwrap();
        let program = program.unwrap().0;
        Self { fixture, theirs, own, member, program, channel }
    }

    /// Calls any rpc, of whichever kind, with one message; answers all that came.
    async fn call(
        &self,
        method: &MethodDescriptor,
        token: &SecretString,
        message: &DynamicMessage,
    ) -> Result<Vec<u8>, Status> {
        let mut client = Grpc::new(self.channel.clone());
        client.ready().await.unwrap();
        let mut request = Request::new(tokio_stream::once(message.encode_to_vec()));
        let bearer = format!("Bearer {}", token.expose_secret());
        let bearer = MetadataValue::try_from(bearer).unwrap();
        request.metadata_mut().insert("authorization", bearer);
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
        tokio::time::timeout(Duration::from_secs(20), answered).await.expect("an answer in time")
    }

    /// Every record with its version.
    async fn records(&self) -> BTreeMap<Vec<u8>, Version> {
        let mut records = BTreeMap::new();
        for kind in keys::Kind::ALL {
            for (key, found) in self.fixture.app.list(keys::all(*kind)).await.unwrap() {
                records.insert(key.as_bytes().to_vec(), found.version);
            }
        }
        records
    }

    /// What nobody else may be told, beyond the words that a request used itself.
    fn assert_untold(&self, what: &str, told: &[u8], asked: &Aim) {
        let Aim { run, runner, quarantined, lock, subscriber, delivery, .. } = &self.theirs;
        let mut secrets = vec![CANARY, run, runner, quarantined, lock, subscriber, delivery];
        if asked.organization != ORGANIZATION {
            secrets.push(ORGANIZATION);
        }
        let told = String::from_utf8_lossy(told);
        for secret in secrets {
            assert!(!told.contains(secret), "{what} told {secret}: {told}");
        }
    }
}

/// Gives the fixture's organization one of each thing, and names them.
async fn fill(fixture: &Fixture) -> Aim {
    let (app, owner) = (&fixture.app, &fixture.owner);
    for (scope, category) in [
        (Scope::Organization, Category::Terraform),
        (Scope::Environment(ENVIRONMENT.into()), Category::Environment),
        (Scope::Personal, Category::Terraform),
    ] {
        let variable = NewVariable {
            name: "canary-variable".into(),
            category,
            value: "canary-value".into(),
            sensitive: false,
            hcl: false,
        };
        app.set_variable(owner, ORGANIZATION, &scope, variable, None).await.unwrap();
    }
    app.create_pool(owner, ORGANIZATION, "only-theirs", "pool").await.unwrap();
    let settings = SettingsChange::default();
    app.create_environment(owner, ORGANIZATION, "only-theirs", settings, "env", None)
        .await
        .unwrap();
    let run = fixture.queue("canary").await;
    let run = fixture.plan(&run).await;
    let plan = run.planned.as_ref().unwrap().digest;
    let run = app.confirm_run(owner, run.id, plan).await.unwrap();
    let (runner, lease, _) = fixture.start(&run, Phase::Apply).await;
    let state = br#"{"version":4,"serial":1,"lineage":"canary-lineage"}"#;
    fixture.upload(&runner, lease, Made::State, state).await.unwrap();
    fixture.upload(&runner, lease, Made::ErroredState, state).await.unwrap();
    fixture.queue_kind(RunKind::Destroy, "ended").await;
    fixture.service_token("canary-token").await;
    fixture.member("canary-user", Access::Read).await;
    let wish = Wish { events: [Event::Applied].into(), environments: vec![] };
    let url = "https://canary.example.org/hook";
    let (webhook, _) = app.create_webhook(owner, ORGANIZATION, url, wish, "hook").await.unwrap();
    let delivery = app.send_test(owner, ORGANIZATION, webhook.id).await.unwrap();
    let page = PageRequest::default();
    let kept = app.list_quarantined(owner, ORGANIZATION, None, page).await.unwrap();
    Aim {
        organization: ORGANIZATION.into(),
        environment: ENVIRONMENT.into(),
        pool: "only-theirs".into(),
        run: run.id.to_string(),
        runner: runner.id.to_string(),
        quarantined: kept.items[0].record.id.0.to_string(),
        configuration: run.request.configuration.to_string(),
        plan: plan.to_string(),
        lock: "canary-lock".into(),
        variable: "canary-variable".into(),
        user: "canary-user".into(),
        token: "canary-token".into(),
        subscriber: webhook.id.to_string(),
        delivery: delivery.to_string(),
    }
}

/// Makes an organization beside the first, with an environment and a pool of the same names.
async fn another_organization(fixture: &Fixture) -> (SecretString, Caller) {
    let app = &fixture.app;
    // As at a first start.
    let spent = keys::setting("bootstrap");
    app.store.commit(Batch::new().delete(spent, Expect::Anything)).await.unwrap();
    let secret = app.prepare_bootstrap().await.unwrap().unwrap();
    let token = app.bootstrap(&secret, OWN, "bob").await.unwrap();
    let bob = app.caller(&token).await.unwrap();
    app.create_pool(&bob, OWN, "build", "pool").await.unwrap();
    let settings = SettingsChange::default();
    app.create_environment(&bob, OWN, ENVIRONMENT, settings, "env", None).await.unwrap();
    (token, bob)
}

/// The rpcs of people, those that make names last: what they make must not be found before.
fn methods() -> Vec<MethodDescriptor> {
    let pool = DescriptorPool::decode(latchkey_proto::DESCRIPTOR_SET).unwrap();
    let mut methods: Vec<_> = pool
        .services()
        .filter(|service| service.package_name() == "latchkey.v1")
        .filter(|service| service.name() != "RunnerService")
        .flat_map(|service| service.methods().collect::<Vec<_>>())
        .collect();
    methods.sort_by_key(|method| method.name().starts_with("Create"));
    assert!(methods.len() > 40, "{methods:?}");
    methods
}

fn name(method: &MethodDescriptor) -> String {
    format!("{}/{}", method.parent_service().name(), method.name())
}

/// One request for each arm of the oneofs in it; only those that name something of the aim's.
fn requests(method: &MethodDescriptor, aim: &Aim) -> Vec<DynamicMessage> {
    let mut requests: Vec<DynamicMessage> = vec![];
    for arm in 0..3 {
        let mut filling = Filling { rpc: name(method), aim, arm, aimed: false };
        let request = filling.message(&method.input());
        if filling.aimed && !requests.contains(&request) {
            requests.push(request);
        }
    }
    requests
}

struct Filling<'a> {
    rpc: String,
    aim: &'a Aim,
    arm: usize,
    /// Whether it names something of the aim's.
    aimed: bool,
}

impl Filling<'_> {
    fn message(&mut self, descriptor: &MessageDescriptor) -> DynamicMessage {
        let mut message = DynamicMessage::new(descriptor.clone());
        for field in descriptor.fields() {
            let oneof = field.containing_oneof().filter(|oneof| !oneof.is_synthetic());
            if let Some(oneof) = &oneof {
                let arms = oneof.fields().count();
                if oneof.fields().nth(self.arm % arms).as_ref() != Some(&field) {
                    continue;
                }
            }
            if let Some(value) = self.value(&field, oneof.is_some()) {
                message.set_field(&field, value);
            }
        }
        message
    }

    fn value(&mut self, field: &FieldDescriptor, in_oneof: bool) -> Option<Value> {
        if field.is_map() {
            return None;
        }
        let value = match field.kind() {
            Kind::String => Value::String(self.text(field.name())?),
            Kind::Message(message) if message.package_name() == "google.protobuf" => return None,
            Kind::Message(message) => match field.name() {
                // They name nothing that somebody has.
                "roles" | "limits" | "plan_rule" | "runner_labels" => return None,
                _ => Value::Message(self.message(&message)),
            },
            Kind::Enum(kinds) => Value::EnumNumber(kinds.values().nth(1)?.number()),
            Kind::Bytes => Value::Bytes(b"x".to_vec().into()),
            // Which of a state's versions; the others are sizes and offsets.
            Kind::Uint64 if matches!(field.name(), "version" | "before" | "after") => Value::U64(1),
            Kind::Bool if in_oneof => Value::Bool(true),
            _ => return None,
        };
        Some(if field.is_list() { Value::List(vec![value]) } else { value })
    }

    fn text(&mut self, field: &str) -> Option<String> {
        let aim = self.aim;
        let aimed = match field {
            "organization" => {
                self.aimed |= aim.organization != OWN;
                return Some(aim.organization.clone());
            }
            "environment" | "environments" => &aim.environment,
            "environment_confirmation" | "destroy_confirmation" => &aim.environment,
            "pool" => &aim.pool,
            "run_id" => &aim.run,
            "runner_id" => &aim.runner,
            "quarantined_id" => &aim.quarantined,
            "configuration_digest" => &aim.configuration,
            "plan_digest" => &aim.plan,
            "lock_id" => &aim.lock,
            "webhook_id" | "recipient_id" | "subscriber_id" => &aim.subscriber,
            "delivery_id" => &aim.delivery,
            "name" if self.rpc.starts_with("VariableService") => &aim.variable,
            "name" if self.rpc == "AccountService/RevokeServiceToken" => &aim.token,
            // To add one is to name who is in no organization of the caller's.
            "user" if self.rpc == "AccountService/ResetUser" => &aim.user,
            "user" if self.rpc == "MemberService/UpdateMember" => &aim.user,
            "user" if self.rpc == "MemberService/RemoveMember" => &aim.user,
            // Names of all organizations in one room, or that are made: nobody's.
            "name" | "user" => {
                return Some(format!("n{}", &Uuid::new_v4().simple().to_string()[..8]));
            }
            "secret" => return Some("none".into()),
            "token_code" => return Some("123456".into()),
            "request_id" => return Some(Uuid::new_v4().to_string()),
            "value" | "reason" => return Some("1".into()),
            "url" => return Some("https://example.org/hook".into()),
            "address" => return Some("ada@example.org".into()),
            "session_id" => return Some(Uuid::new_v4().to_string()),
            "password" | "current_password" | "new_password" | "client" | "actor" | "action"
            | "subject_prefix" => return None,
            "region" => return Some("us-east-1".into()),
            "page_token" | "message" | "target" | "replace" | "aws_accounts"
            | "working_directory" | "engine" | "engine_version" => return None,
            unknown => panic!(
                "{} has a field {unknown:?} that this test does not know: say here what it names",
                self.rpc
            ),
        };
        self.aimed = true;
        Some(aimed.clone())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_reaches_into_another_organization_by_any_rpc() {
    let tenants = Tenants::new().await;
    let before = tenants.records().await;
    for method in methods() {
        let rpc = name(&method);
        let requests = requests(&method, &tenants.theirs);
        assert_eq!(requests.is_empty(), ABOUT_NOTHING.contains(&rpc.as_str()), "{rpc}");
        let expect = if WITH_SECRET.contains(&rpc.as_str()) {
            Code::Unauthenticated
        } else {
            Code::NotFound
        };
        for request in requests {
            for token in [&tenants.own, &tenants.member, &tenants.program] {
                let answer = tenants.call(&method, token, &request).await;
                let status = answer.expect_err(&rpc);
                assert_eq!(status.code(), expect, "{rpc} {request}: {status}");
                let told = format!("{} {:?}", status.message(), status.details());
                tenants.assert_untold(&rpc, told.as_bytes(), &tenants.theirs);
            }
        }
    }
    assert!(before == tenants.records().await, "a refusal wrote something");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_another_organization_has_is_answered_as_what_nobody_has() {
    let tenants = Tenants::new().await;
    let before = tenants.records().await;
    // Within the own organization, what only the other has, and what nobody has.
    let theirs = Aim {
        organization: OWN.into(),
        environment: "only-theirs".into(),
        ..tenants.theirs.clone()
    };
    let id = || Uuid::now_v7().to_string();
    let nobodys = Aim {
        organization: OWN.into(),
        environment: "only-nobodys".into(),
        pool: "only-nobodys".into(),
        run: id(),
        runner: id(),
        quarantined: id(),
        configuration: "ab".repeat(32),
        plan: "cd".repeat(32),
        lock: "no-lock".into(),
        variable: "no-variable".into(),
        user: "no-user".into(),
        token: "no-token".into(),
        subscriber: id(),
        delivery: id(),
    };
    for method in methods() {
        let rpc = name(&method);
        let pairs = requests(&method, &theirs).into_iter().zip(requests(&method, &nobodys));
        for (of_theirs, of_nobodys) in pairs {
            for token in [&tenants.own, &tenants.member, &tenants.program] {
                let mut answers = vec![];
                for (aim, request) in [(&theirs, &of_theirs), (&nobodys, &of_nobodys)] {
                    let answer = tenants.call(&method, token, request).await;
                    answers.push(match answer {
                        Ok(told) => {
                            // A name that was asked for may be said again.
                            if !format!("{request}").contains(CANARY) {
                                tenants.assert_untold(&rpc, &told, aim);
                            }
                            (Code::Ok, String::new())
                        }
                        Err(status) => (status.code(), neutral(status.message(), aim)),
                    });
                }
                assert_eq!(answers[0], answers[1], "{rpc} {of_theirs}");
            }
        }
    }
    let organization = tenants.fixture.organization().await;
    let after = tenants.records().await;
    for (key, version) in
        before.iter().filter(|(key, _)| key.windows(16).any(|part| part == organization.as_bytes()))
    {
        assert_eq!(after.get(key), Some(version), "{}", hex::encode(key));
    }
}

/// A message without the words that the request brought.
fn neutral(message: &str, aim: &Aim) -> String {
    let Aim { environment, pool, run, runner, quarantined, configuration, variable, .. } = aim;
    let Aim { user, token, subscriber, delivery, .. } = aim;
    let words = [environment, pool, run, runner, quarantined, configuration, variable];
    let words = words.into_iter().chain([user, token, subscriber, delivery]);
    words.fold(message.to_owned(), |message, word| message.replace(word.as_str(), "_"))
}

/// Passes messages on as bytes.
#[derive(Clone, Copy, Debug, Default)]
struct Raw;

impl Codec for Raw {
    type Encode = Vec<u8>;
    type Decode = Vec<u8>;
    type Encoder = Raw;
    type Decoder = Raw;

    fn encoder(&mut self) -> Raw {
        Raw
    }

    fn decoder(&mut self) -> Raw {
        Raw
    }
}

impl Encoder for Raw {
    type Item = Vec<u8>;
    type Error = Status;

    fn encode(&mut self, item: Vec<u8>, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        buffer.put_slice(&item);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Vec<u8>;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<Vec<u8>>, Status> {
        let mut item = vec![0; buffer.remaining()];
        buffer.copy_to_slice(&mut item);
        Ok(Some(item))
    }
}
