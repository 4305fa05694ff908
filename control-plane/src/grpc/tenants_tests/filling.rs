//! Requests made from the descriptors: each field that names something is filled from an aim, and
//! a field that this file does not know fails the test, so none is forgotten.

use std::collections::{BTreeMap, BTreeSet};

use prost_reflect::{
    DescriptorPool, DynamicMessage, FieldDescriptor, Kind, MessageDescriptor, MethodDescriptor,
    ReflectMessage, Value,
};
use uuid::Uuid;

/// What requests are to reach: by the word for each thing, what one names it by.
#[derive(Clone, Debug)]
pub(in crate::grpc) struct Aim(BTreeMap<&'static str, String>);

impl Aim {
    pub(in crate::grpc) fn of<const N: usize>(things: [(&'static str, String); N]) -> Self {
        Self(things.into())
    }

    pub(in crate::grpc) fn get(&self, thing: &str) -> &str {
        self.0.get(thing).unwrap_or_else(|| panic!("the aim names no {thing}"))
    }

    /// The same with some things of another aim.
    pub(in crate::grpc) fn with(&self, things: &[&'static str], other: &Aim) -> Self {
        let mut aim = self.clone();
        for thing in things {
            aim.0.insert(thing, other.get(thing).to_owned());
        }
        aim
    }

    pub(in crate::grpc) fn words(&self) -> impl Iterator<Item = &str> {
        self.0.values().map(String::as_str)
    }
}

/// Every rpc; those that make names last: what they make must not be found before.
pub(in crate::grpc) fn methods() -> Vec<MethodDescriptor> {
    let pool = DescriptorPool::decode(latchkey_proto::DESCRIPTOR_SET).unwrap();
    let mut methods: Vec<_> = pool
        .services()
        .filter(|service| service.package_name() == "latchkey.v1")
        .flat_map(|service| service.methods().collect::<Vec<_>>())
        .collect();
    methods.sort_by_key(|method| method.name().starts_with("Create"));
    assert!(methods.len() > 70, "{} rpcs", methods.len());
    methods
}

pub(in crate::grpc) fn name(method: &MethodDescriptor) -> String {
    format!("{}/{}", method.parent_service().name(), method.name())
}

pub(in crate::grpc) fn is_of_runners(method: &MethodDescriptor) -> bool {
    method.parent_service().name() == "RunnerService"
}

/// A request, and which things of the aim it names.
#[derive(Clone, Debug)]
pub(in crate::grpc) struct Aimed {
    pub(in crate::grpc) request: DynamicMessage,
    pub(in crate::grpc) names: BTreeSet<&'static str>,
}

/// As many arms as a oneof has at most, and as many kinds as an enum of the runners'.
const MOST_ARMS: usize = 9;

/// One request for each arm of the oneofs in it, and for runners each kind and phase; only those
/// that name something.
pub(in crate::grpc) fn requests(method: &MethodDescriptor, aim: &Aim) -> Vec<Aimed> {
    let choices = if is_of_runners(method) { 2 * MOST_ARMS } else { 1 };
    let mut requests: Vec<Aimed> = vec![];
    let mut shapes = BTreeSet::new();
    for arm in 0..MOST_ARMS {
        for choice in 0..choices {
            let mut filling = Filling {
                rpc: name(method),
                aim,
                arm,
                choice: (choices > 1).then_some(choice),
                depth: 0,
                made: 0,
                names: BTreeSet::new(),
            };
            let request = filling.message(&method.input());
            let names = filling.names;
            // A oneof without an arm of this number repeats itself.
            if !names.is_empty() && shapes.insert(request.to_string()) {
                requests.push(Aimed { request, names });
            }
        }
    }
    for aimed in &mut requests {
        renew_ids(&mut aimed.request);
    }
    requests
}

/// Gives a request an id of its own: a repeat would be answered as one.
fn renew_ids(request: &mut DynamicMessage) {
    let Some(field) = request.descriptor().get_field_by_name("request_id") else { return };
    request.set_field(&field, Value::String(Uuid::new_v4().to_string()));
}

struct Filling<'a> {
    rpc: String,
    aim: &'a Aim,
    arm: usize,
    /// Which value of an enum and which arm of an inner oneof; the first where absent.
    choice: Option<usize>,
    depth: usize,
    /// How many new names it made up.
    made: usize,
    names: BTreeSet<&'static str>,
}

impl Filling<'_> {
    fn message(&mut self, descriptor: &MessageDescriptor) -> DynamicMessage {
        let mut message = DynamicMessage::new(descriptor.clone());
        for field in descriptor.fields() {
            let oneof = field.containing_oneof().filter(|oneof| !oneof.is_synthetic());
            if let Some(oneof) = &oneof {
                let arms = oneof.fields().count();
                assert!(arms <= MOST_ARMS, "{} has more arms than are tried", oneof.full_name());
                let arm = if self.depth == 0 { self.arm } else { self.choice.unwrap_or(self.arm) };
                if oneof.fields().nth(arm % arms).as_ref() != Some(&field) {
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
                "roles" | "limits" | "plan_rule" | "runner_labels" | "engines" | "host"
                | "seen" => return None,
                _ => {
                    self.depth += 1;
                    let message = self.message(&message);
                    self.depth -= 1;
                    Value::Message(message)
                }
            },
            Kind::Enum(kinds) => {
                let count = kinds.values().len() - 1;
                let choice = match (self.choice, field.name()) {
                    (None, _) => 0,
                    (Some(choice), "phase") => choice / MOST_ARMS,
                    (Some(choice), _) => choice % MOST_ARMS,
                };
                Value::EnumNumber(kinds.values().nth(1 + choice % count)?.number())
            }
            Kind::Bytes => Value::Bytes(b"x".to_vec().into()),
            // Which of a state's versions.
            Kind::Uint64 if matches!(field.name(), "version" | "before" | "after") => Value::U64(1),
            // The lease that is held.
            Kind::Uint64 if matches!(field.name(), "epoch" | "generation") => {
                Value::U64(self.named(if field.name() == "epoch" { "epoch" } else { "generation" }))
            }
            // Of one byte, as above.
            Kind::Uint64 if field.name() == "size" => Value::U64(1),
            Kind::Uint32 if field.name() == "slots" => Value::U32(1),
            Kind::Bool if in_oneof => Value::Bool(true),
            _ => return None,
        };
        Some(if field.is_list() { Value::List(vec![value]) } else { value })
    }

    fn named(&self, thing: &str) -> u64 {
        self.aim.get(thing).parse().unwrap()
    }

    fn text(&mut self, field: &str) -> Option<String> {
        let thing = match field {
            "organization" => "organization",
            "environment" | "environments" => "environment",
            "environment_confirmation" | "destroy_confirmation" => "environment",
            "pool" => "pool",
            "run_id" => "run",
            "runner_id" => "runner",
            "quarantined_id" => "quarantined",
            "glass_id" => "glass",
            "configuration_digest" => "configuration",
            "plan_digest" => "plan",
            "lock_id" => "lock",
            "webhook_id" | "recipient_id" | "subscriber_id" => "subscriber",
            "delivery_id" => "delivery",
            "pool_token" => "pool_token",
            "name" if self.rpc.starts_with("VariableService") => "variable",
            "name" if self.rpc == "AccountService/RevokeServiceToken" => "token",
            // To add one is to name who is in no organization of the caller's.
            "user" if self.rpc == "AccountService/ResetUser" => "user",
            "user" if self.rpc == "MemberService/UpdateMember" => "user",
            "user" if self.rpc == "MemberService/RemoveMember" => "user",
            // Names of all organizations in one room, or that are made: nobody's.
            "name" | "user" => {
                self.made += 1;
                let rpc = self.rpc.to_lowercase().replace('/', "-");
                return Some(format!("n{}-{rpc}", self.made));
            }
            "digest" | "workspace_digest" | "lock_file_digest" | "changes_digest" => {
                // Of the byte that is sent.
                return Some(hex::encode(crate::auth::sha256(b"x").as_bytes()));
            }
            "secret" => return Some("none".into()),
            "token_code" => return Some("123456".into()),
            // Given once the request is known to be new.
            "request_id" => return Some("x".into()),
            "value" | "reason" => return Some("1".into()),
            "outputs_json" => return Some("{}".into()),
            "url" => return Some("https://example.org/hook".into()),
            "address" => return Some("ada@example.org".into()),
            "session_id" => return Some(Uuid::nil().to_string()),
            "password" | "current_password" | "new_password" | "client" | "actor" | "action"
            | "subject_prefix" | "incarnation" => return None,
            "region" => return Some("us-east-1".into()),
            "page_token" | "message" | "target" | "replace" | "aws_accounts"
            | "working_directory" | "engine" | "engine_version" | "version"
            | "terraform_version" => return None,
            unknown => panic!(
                "{} has a field {unknown:?} that this test does not know: say here what it names",
                self.rpc
            ),
        };
        self.names.insert(thing);
        Some(self.aim.get(thing).to_owned())
    }
}
