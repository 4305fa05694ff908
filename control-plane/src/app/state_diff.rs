//! How two states differ, resource by resource, as far as a person can read it.
//!
//! What a state marks as sensitive is never told, whichever of the two marks it; nor is what
//! providers keep for themselves. Both states are in memory while they are compared, so they are
//! bounded, and one comparison goes on at a time; what is told is bounded, too.

use std::collections::{BTreeMap, BTreeSet};

use latchkey_domain::id::{Digest, OrganizationId, QuarantinedId};
use latchkey_proto::v1::Reason;
use serde::Deserialize;
use serde_json::Value;

use super::App;
use super::configurations::blob_error;
use super::states::StateVersionView;
use crate::auth::{Caller, Right};
use crate::blobs::BlobError;
use crate::error::{Error, Result};
use crate::store::Batch;

/// The largest state that is compared. Parsed, it takes many times as much.
const LARGEST_COMPARED: u64 = 8 << 20;

const MOST_CHANGES: usize = 500;
const MOST_ATTRIBUTES: usize = 100;
const LONGEST_VALUE: usize = 512;
const LONGEST_NAME: usize = 512;

/// Of all that is told together; an answer has a bound.
const LARGEST_DIFF: usize = 2 << 20;

/// What differs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StateDiff {
    pub changes: Vec<StateChange>,
    /// There are more; the counts are of all.
    pub truncated: bool,
    pub added: u32,
    pub changed: u32,
    pub removed: u32,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StateChange {
    /// Of a resource instance, or `output.NAME`.
    pub address: String,
    pub action: Action,
    pub attributes: Vec<AttributeChange>,
    pub truncated: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    Added,
    Changed,
    Removed,
}

/// One value within a resource or output. Neither side is told where it is sensitive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttributeChange {
    pub path: String,
    pub before: Option<String>,
    pub after: Option<String>,
    pub sensitive: bool,
}

impl App {
    /// Compares two versions; an `after` of 0 is the newest, a `before` of 0 the one before it.
    pub async fn diff_state_versions(
        &self,
        caller: &Caller,
        organization: &str,
        environment: &str,
        (before, after): (u64, u64),
    ) -> Result<(StateDiff, StateVersionView, StateVersionView)> {
        let (standing, found) =
            self.on(caller, organization, environment, Right::Administer).await?;
        let after = self.state_version(&found.value, after).await?;
        let before = match (before, after.number) {
            (0, 1) => {
                let message = "it is the first version; there is none before it";
                return Err(Error::field("before", message));
            }
            (0, after) => after - 1,
            (before, _) => before,
        };
        let before = self.state_version(&found.value, before).await?;
        let organization = standing.organization;
        let draft = self
            .state_draft(organization, caller, "diff_states", &found.value, &after)
            .with("before", before.number);
        self.store.commit(Batch::new().audit(draft)).await?;
        let digests = (Some(before.version.digest.0), after.version.digest.0);
        let diff = self.compare(organization, digests).await?;
        Ok((diff, before, after))
    }

    /// Compares a quarantined state with the current one of its environment.
    pub async fn compare_quarantined(
        &self,
        caller: &Caller,
        organization: &str,
        id: QuarantinedId,
    ) -> Result<StateDiff> {
        let organization = self.owner(caller, organization).await?.organization;
        let record = self.quarantined(organization, id).await?.value;
        let (Some(_), Some(environment)) = (&record.state, record.environment) else {
            let message = "it is no state of an environment that is known here; nothing can be \
                           compared with it";
            return Err(Error::refused(Reason::WrongState, message));
        };
        let head = self.environment(organization, environment.0).await?.value.state;
        let draft = self
            .draft(
                organization,
                caller.audit_name(),
                "compare_quarantined",
                format!("run {}", record.run.0),
            )
            .with("id", id.to_string())
            .with("digest", record.digest.0.to_string());
        self.store.commit(Batch::new().audit(draft)).await?;
        self.compare(organization, (head.map(|head| head.digest.0), record.digest.0)).await
    }

    async fn compare(
        &self,
        organization: OrganizationId,
        (before, after): (Option<Digest>, Digest),
    ) -> Result<StateDiff> {
        let _turn = self.uploads.comparing.lock().await;
        let before = match before {
            Some(before) => self.state_to_compare(organization, before).await?,
            None => State::default(),
        };
        let after = self.state_to_compare(organization, after).await?;
        let compared = crate::blocking::spawn(move || diff(&before, &after)).await;
        compared.map_err(Error::internal)
    }

    async fn state_to_compare(
        &self,
        organization: OrganizationId,
        digest: Digest,
    ) -> Result<State> {
        let state = match self.blobs.get(organization, digest, LARGEST_COMPARED).await {
            Ok(state) => state,
            Err(BlobError::TooLarge { limit }) => {
                let message = format!(
                    "a state above {} MiB is not compared here; download both and compare them",
                    limit >> 20
                );
                let error = Error::refused(Reason::LimitReached, message);
                return Err(error.with("limit", limit.to_string()));
            }
            Err(error) => return Err(blob_error(error)),
        };
        let parsed =
            crate::blocking::spawn(move || serde_json::from_slice(state.expose_secret())).await;
        parsed.map_err(Error::internal)?.map_err(|_| {
            let message = "one of them is no state of format version 4; download it to look at it";
            Error::refused(Reason::WrongState, message)
        })
    }
}

/// A state of format version 4, as far as it is compared.
#[derive(Default, Deserialize)]
struct State {
    #[serde(default)]
    outputs: BTreeMap<String, Output>,
    #[serde(default)]
    resources: Vec<Resource>,
}

#[derive(Deserialize)]
struct Output {
    value: Value,
    #[serde(default)]
    sensitive: bool,
}

#[derive(Deserialize)]
struct Resource {
    #[serde(default)]
    module: Option<String>,
    #[serde(default)]
    mode: String,
    #[serde(rename = "type")]
    kind: String,
    name: String,
    #[serde(default)]
    instances: Vec<Instance>,
}

#[derive(Deserialize)]
struct Instance {
    #[serde(default)]
    index_key: Option<Value>,
    #[serde(default)]
    deposed: Option<String>,
    #[serde(default)]
    status: Option<String>,
    #[serde(default, alias = "attributes_flat")]
    attributes: Value,
    #[serde(default)]
    sensitive_attributes: Vec<Vec<Value>>,
}

/// Something with an address: an instance of a resource, or an output.
struct Item<'a> {
    status: Option<&'a str>,
    value: &'a Value,
    marks: Vec<Vec<Step>>,
}

/// A step of a path into a value.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Step {
    Key(String),
    Index(u64),
}

fn diff(before: &State, after: &State) -> StateDiff {
    let (before, after) = (items(before), items(after));
    let addresses: BTreeSet<&String> = before.keys().chain(after.keys()).collect();
    let mut diff = StateDiff::default();
    let mut left = LARGEST_DIFF;
    for address in addresses {
        let (old, new) = (before.get(address), after.get(address));
        let action = match (old, new) {
            (None, _) => Action::Added,
            (Some(_), None) => Action::Removed,
            (Some(old), Some(new)) if old.status == new.status && old.value == new.value => {
                continue;
            }
            (Some(_), Some(_)) => Action::Changed,
        };
        match action {
            Action::Added => diff.added += 1,
            Action::Changed => diff.changed += 1,
            Action::Removed => diff.removed += 1,
        }
        if diff.truncated {
            continue;
        }
        let change = change(address, action, old, new);
        match left.checked_sub(size(&change)) {
            Some(rest) if diff.changes.len() < MOST_CHANGES => {
                left = rest;
                diff.changes.push(change);
            }
            Some(_) | None => diff.truncated = true,
        }
    }
    diff
}

fn items(state: &State) -> BTreeMap<String, Item<'_>> {
    let outputs = state.outputs.iter().map(|(name, Output { value, sensitive })| {
        // The whole of it, or nothing.
        let marks = if *sensitive { vec![vec![]] } else { vec![] };
        (format!("output.{name}"), Item { status: None, value, marks })
    });
    let resources = state.resources.iter().flat_map(|resource| {
        resource.instances.iter().map(|instance| {
            let marks = instance.sensitive_attributes.iter().map(|path| steps(path)).collect();
            let status = instance.status.as_deref();
            (address(resource, instance), Item { status, value: &instance.attributes, marks })
        })
    });
    outputs.chain(resources).collect()
}

fn address(resource: &Resource, instance: &Instance) -> String {
    let mut address = String::new();
    if let Some(module) = &resource.module {
        address = format!("{module}.");
    }
    if resource.mode == "data" {
        address.push_str("data.");
    }
    address.push_str(&format!("{}.{}", resource.kind, resource.name));
    if let Some(key) = &instance.index_key {
        address.push_str(&format!("[{key}]"));
    }
    if let Some(deposed) = &instance.deposed {
        address.push_str(&format!(" (deposed {deposed})"));
    }
    address
}

/// Reads a sensitive path as far as it is understood: what lies beneath is sensitive in any case.
fn steps(path: &[Value]) -> Vec<Step> {
    let step = |step: &Value| {
        let value = step.get("value")?;
        match step.get("type")?.as_str()? {
            "get_attr" => value.as_str().map(|key| Step::Key(key.to_owned())),
            "index" => {
                // Wrapped with its type.
                let value = value.get("value").unwrap_or(value);
                let index = value.as_u64().map(Step::Index);
                index.or_else(|| value.as_str().map(|key| Step::Key(key.to_owned())))
            }
            _ => None,
        }
    };
    path.iter().map_while(step).collect()
}

fn change(address: &str, action: Action, old: Option<&Item>, new: Option<&Item>) -> StateChange {
    let sides = [old, new];
    let marks = sides.iter().flatten().flat_map(|item| &item.marks).collect();
    let mut walk = Walk { marks, attributes: vec![], truncated: false };
    let status = |item: Option<&Item>| item.and_then(|item| item.status).map(str::to_owned);
    if status(old) != status(new) {
        walk.attributes.push(AttributeChange {
            path: "(status)".into(),
            before: status(old),
            after: status(new),
            sensitive: false,
        });
    }
    let value = |item: Option<&'_ Item<'_>>| item.map(|item| item.value).cloned();
    let (before, after) = (value(old), value(new));
    walk.compare(&mut vec![], before.as_ref(), after.as_ref());
    StateChange {
        address: shortened(address, LONGEST_NAME),
        action,
        attributes: walk.attributes,
        truncated: walk.truncated,
    }
}

struct Walk<'a> {
    marks: Vec<&'a Vec<Step>>,
    attributes: Vec<AttributeChange>,
    truncated: bool,
}

impl Walk<'_> {
    /// Tells of what differs from here on downwards.
    fn compare(&mut self, path: &mut Vec<Step>, before: Option<&Value>, after: Option<&Value>) {
        if before == after || self.truncated {
            return;
        }
        if self.is_sensitive(path) {
            return self.tell(path, None, None, true);
        }
        let keys = || {
            let of = |side: Option<&Value>| -> Vec<Step> {
                match side {
                    Some(Value::Object(map)) => map.keys().cloned().map(Step::Key).collect(),
                    Some(Value::Array(items)) => (0..items.len() as u64).map(Step::Index).collect(),
                    Some(Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_))
                    | None => vec![],
                }
            };
            let mut keys = of(before);
            for key in of(after) {
                // Objects of a state are small; arrays are alike in their beginnings.
                let is_new = match (&key, before) {
                    (Step::Key(key), Some(Value::Object(map))) => !map.contains_key(key),
                    (Step::Index(index), Some(Value::Array(items))) => *index >= items.len() as u64,
                    (Step::Key(_) | Step::Index(_), _) => true,
                };
                if is_new {
                    keys.push(key);
                }
            }
            keys
        };
        let is_leaf = |side: Option<&Value>| match side {
            Some(Value::Object(map)) => map.is_empty(),
            Some(Value::Array(items)) => items.is_empty(),
            Some(Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_)) | None => true,
        };
        match (is_leaf(before), is_leaf(after)) {
            (true, true) => self.tell(path, before, after, false),
            (leaf_before, leaf_after) => {
                // What stood here before it had parts, or stands here now that it has none.
                let stands = |side: Option<&Value>, is_leaf: bool| {
                    is_leaf && side.is_some_and(|value| !value.is_null())
                };
                if stands(before, leaf_before) {
                    self.tell(path, before, None, false);
                }
                for step in keys() {
                    let (before, after) = (part(before, &step), part(after, &step));
                    path.push(step);
                    self.compare(path, before, after);
                    path.pop();
                }
                if stands(after, leaf_after) {
                    self.tell(path, None, after, false);
                }
            }
        }
    }

    /// Tells whether a value is marked, or lies within one that is.
    fn is_sensitive(&self, path: &[Step]) -> bool {
        self.marks.iter().any(|mark| path.len() >= mark.len() && path.starts_with(mark))
    }

    fn has_sensitive_parts(&self, path: &[Step]) -> bool {
        self.marks.iter().any(|mark| mark.starts_with(path))
    }

    fn tell(
        &mut self,
        path: &[Step],
        before: Option<&Value>,
        after: Option<&Value>,
        sensitive: bool,
    ) {
        if self.attributes.len() >= MOST_ATTRIBUTES {
            self.truncated = true;
            return;
        }
        // A single value where the other state has parts of which one is marked.
        let sensitive = sensitive || self.has_sensitive_parts(path);
        let shown = |side: Option<&Value>| {
            side.filter(|_| !sensitive).map(|value| shortened(&value.to_string(), LONGEST_VALUE))
        };
        let (before, after) = (shown(before), shown(after));
        let path = shortened(&written(path), LONGEST_NAME);
        self.attributes.push(AttributeChange { path, before, after, sensitive });
    }
}

fn part<'a>(value: Option<&'a Value>, step: &Step) -> Option<&'a Value> {
    match (value?, step) {
        (Value::Object(map), Step::Key(key)) => map.get(key),
        (Value::Array(items), Step::Index(index)) => items.get(usize::try_from(*index).ok()?),
        (_, Step::Key(_) | Step::Index(_)) => None,
    }
}

fn written(path: &[Step]) -> String {
    let mut text = String::new();
    for step in path {
        match step {
            Step::Key(key) if is_plain(key) && text.is_empty() => text.push_str(key),
            Step::Key(key) if is_plain(key) => {
                text.push('.');
                text.push_str(key);
            }
            Step::Key(key) => text.push_str(&format!("[{}]", Value::from(key.as_str()))),
            Step::Index(index) => text.push_str(&format!("[{index}]")),
        }
    }
    text
}

fn is_plain(key: &str) -> bool {
    !key.is_empty() && key.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-')
}

fn shortened(text: &str, longest: usize) -> String {
    if text.len() <= longest {
        return text.to_owned();
    }
    format!("{}…", &text[..text.floor_char_boundary(longest)])
}

fn size(change: &StateChange) -> usize {
    let length = |text: &Option<String>| text.as_ref().map_or(0, String::len);
    let attributes = change
        .attributes
        .iter()
        .map(|one| one.path.len() + length(&one.before) + length(&one.after) + 16);
    change.address.len() + 16 + attributes.sum::<usize>()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn state(resources: Value, outputs: Value) -> State {
        serde_json::from_value(json!({
            "version": 4, "serial": 1, "lineage": "l", "resources": resources, "outputs": outputs,
        }))
        .unwrap()
    }

    fn one(attributes: Value, marks: Value) -> State {
        let instance = json!({"attributes": attributes, "sensitive_attributes": marks});
        let resource = json!({
            "mode": "managed", "type": "t", "name": "n", "instances": [instance],
        });
        state(json!([resource]), json!({}))
    }

    /// What is told of the one resource, a line each.
    fn told(before: &State, after: &State) -> Vec<String> {
        let diff = diff(before, after);
        let line = |one: &AttributeChange| {
            let side = |side: &Option<String>| side.clone().unwrap_or_else(|| "-".into());
            let mark = if one.sensitive { " (sensitive)" } else { "" };
            format!("{}: {} > {}{mark}", one.path, side(&one.before), side(&one.after))
        };
        diff.changes.iter().flat_map(|change| change.attributes.iter().map(line)).collect()
    }

    #[test]
    fn each_value_is_told_with_its_path() {
        let before = json!({"a": 1, "same": {"x": [1, 2]}, "tags": {"Name": "old", "b.c": true},
            "list": ["x", "y"], "gone": {"k": "v"}, "kind": "text"});
        let after = json!({"a": 2, "same": {"x": [1, 2]}, "tags": {"Name": "new"},
            "list": ["x", "z", "w"], "kind": {"k": 1}, "none": null});
        let told = told(&one(before, json!([])), &one(after, json!([])));
        assert_eq!(
            told,
            [
                "a: 1 > 2",
                r#"gone.k: "v" > -"#,
                r#"kind: "text" > -"#,
                "kind.k: - > 1",
                r#"list[1]: "y" > "z""#,
                r#"list[2]: - > "w""#,
                r#"tags.Name: "old" > "new""#,
                r#"tags["b.c"]: true > -"#,
                "none: - > null",
            ]
        );
    }

    #[test]
    fn what_either_state_marks_is_not_told_in_any_form() {
        let attr = |name: &str| json!({"type": "get_attr", "value": name});
        let index = |value: Value| json!({"type": "index", "value": {"value": value, "type": "x"}});
        let secret = |n: u8| format!("canary-{n}");
        let before = json!({"password": secret(1), "block": [{"key": secret(2), "open": 1}],
            "map": {"k": secret(3)}, "deep": {"a": {"b": secret(4)}}, "odd": {"x": secret(5)}});
        let after = json!({"password": secret(6), "block": [{"key": secret(7), "open": 2}],
            "map": {"k": secret(8)}, "deep": secret(9), "odd": {"x": secret(0)}});
        let marks = json!([
            [attr("password")],
            [attr("block"), index(json!(0)), attr("key")],
            [attr("map"), index(json!("k"))],
            [attr("deep"), attr("a"), attr("b")],
            // Not understood: all beneath what is.
            [attr("odd"), {"type": "new", "value": 1}],
        ]);
        for (left, right) in [(marks.clone(), json!([])), (json!([]), marks.clone())] {
            let (left, right) = (one(before.clone(), left), one(after.clone(), right));
            let told = told(&left, &right);
            assert!(!told.iter().any(|line| line.contains("canary")), "{told:?}");
            assert!(told.contains(&"block[0].open: 1 > 2".to_owned()), "{told:?}");
            assert!(told.contains(&"password: - > - (sensitive)".to_owned()), "{told:?}");
        }
        // Also where the whole resource comes or goes.
        let gone = diff(&one(before, marks), &State::default());
        assert_eq!((gone.removed, gone.changes[0].action), (1, Action::Removed));
        assert!(!format!("{gone:?}").contains("canary"), "{gone:?}");
    }

    #[test]
    fn outputs_and_every_kind_of_address_are_told() {
        let resource = |mode: &str, instances: Value| {
            json!({"module": "module.m[\"x\"]", "mode": mode, "type": "t", "name": "n",
                "instances": instances})
        };
        let before = state(
            json!([resource("managed", json!([{"index_key": 0, "attributes": {"a": 1}}]))]),
            json!({"secret": {"value": "canary-1", "sensitive": true}, "open": {"value": 1}}),
        );
        let after = state(
            json!([
                resource(
                    "managed",
                    json!([
                        {"index_key": 0, "attributes": {"a": 1}, "status": "tainted"},
                        {"index_key": "k", "deposed": "12ab", "attributes": {}},
                    ])
                ),
                resource("data", json!([{"attributes": {}}])),
            ]),
            json!({"secret": {"value": "canary-2"}, "open": {"value": 1}}),
        );
        let diff = diff(&before, &after);
        let addresses: Vec<_> =
            diff.changes.iter().map(|change| (change.address.as_str(), change.action)).collect();
        assert_eq!(
            addresses,
            [
                (r#"module.m["x"].data.t.n"#, Action::Added),
                (r#"module.m["x"].t.n["k"] (deposed 12ab)"#, Action::Added),
                (r#"module.m["x"].t.n[0]"#, Action::Changed),
                ("output.secret", Action::Changed),
            ]
        );
        assert_eq!((diff.added, diff.changed, diff.removed), (2, 2, 0));
        assert_eq!(diff.changes[2].attributes[0].path, "(status)");
        assert!(!format!("{diff:?}").contains("canary"), "{diff:?}");
        assert_eq!(super::diff(&before, &before), StateDiff::default());
    }

    #[test]
    fn what_is_told_is_bounded_and_all_is_counted() {
        let wide: serde_json::Map<String, Value> =
            (0..150).map(|n| (format!("k{n}"), json!("é".repeat(300)))).collect();
        let resources: Vec<Value> = (0..60)
            .map(|n| {
                json!({"type": "t", "name": format!("n{n}"),
                    "instances": [{"attributes": wide.clone()}]})
            })
            .collect();
        let diff = diff(&State::default(), &state(json!(resources), json!({})));
        assert!(diff.truncated && diff.changes.iter().all(|change| change.truncated));
        assert_eq!(diff.added, 60);
        let told: usize = diff.changes.iter().map(size).sum();
        assert!(told <= LARGEST_DIFF && told > LARGEST_DIFF / 2, "{told}");
    }
}
