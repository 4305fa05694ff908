//! The reduced `show -json`: what a person is shown and what an approval is bound to.
//!
//! Format of `changes.json` (canonical: keys sorted, no white space, UTF-8):
//!
//! ```json
//! {"format":1,
//!  "applyable":true,
//!  "truncated":false,
//!  "counts":{"add":1,"change":0,"destroy":0,"import":0},
//!  "resource_changes":[{"address":"…","action":"create","before":null,"after":{…},
//!                       "after_unknown":{…},"replace_paths":[…],"mode":"managed","type":"…",
//!                       "provider_name":"…","action_reason":"…","previous_address":"…",
//!                       "deposed":"…","importing":{…}}],
//!  "output_changes":{"name":{"action":"create","before":…,"after":…,"after_unknown":…}},
//!  "resource_drift":[as resource_changes],
//!  "action_invocations":[{"address":"…","action":"invoke","after":{…},"after_unknown":{…},
//!                         "type":"…","provider_name":"…","trigger":{…}}],
//!  "unread":["name"],
//!  "assumed_roles":[{"provider":"aws.prod","seconds":7200}]}
//! ```
//!
//! `action` is one of create, read, update, delete, replace, no-op, forget. Absent facts are
//! absent fields. Sensitive values are replaced by `"(sensitive)"`, and the values of the job's
//! sensitive variables, where they are found in others, by `***`. Resources that do not change
//! are left out, unless they move or are imported. `action_invocations` is there only when terraform
//! (since 1.14) invokes any, and `unread` when its plan has sections that are not known here: what
//! they would do is not shown, and whoever demands a code by what a plan does takes such a plan for
//! one that does anything. `assumed_roles` is there only when a provider
//! assumes a role for longer than an hour. `variables`, `prior_state`, `configuration`
//! and `planned_values` hold secrets in clear and are dropped; what is deferred is not done by this
//! plan. When the whole would exceed 32
//! MiB, `before`, `after` and `after_unknown` are null everywhere and `truncated` is true.
//!
//! The digest is taken over exactly these bytes; the same saved plan yields the same bytes.

use serde_json::{Map, Value, json};

use super::assumed_roles;
use super::mask::{self, Masker};
use crate::digest;

/// The sections of a plan that are read here, or do nothing of their own.
const KNOWN: [&str; 19] = [
    "action_invocations",
    "applyable",
    "checks",
    "complete",
    "configuration",
    "deferred_action_invocations",
    "deferred_changes",
    "errored",
    "format_version",
    "output_changes",
    "planned_values",
    "prior_state",
    "proposed_unknown",
    "relevant_attributes",
    "resource_changes",
    "resource_drift",
    "terraform_version",
    "timestamp",
    "variables",
];

/// The wire's limit for the artifact.
const LARGEST: usize = 32 << 20;

const MARK: &str = "(sensitive)";

#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("read terraform's description of the plan")]
    NotJson(#[source] serde_json::Error),
    #[error("read terraform's description of the plan: format {0:?} is not known")]
    Format(String),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Changes {
    pub(super) bytes: Vec<u8>,
    pub(super) digest: String,
    pub(super) applyable: bool,
    pub(super) counts: Counts,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Counts {
    pub(super) add: u32,
    pub(super) change: u32,
    pub(super) destroy: u32,
    pub(super) import: u32,
}

/// Reduces what `terraform show -json plan.bin` printed.
pub(super) fn reduce(shown: &[u8], masker: &Masker) -> Result<Changes, Error> {
    let plan: Value = serde_json::from_slice(shown).map_err(Error::NotJson)?;
    let format = plan.get("format_version").and_then(Value::as_str).unwrap_or_default();
    if !format.starts_with("1.") {
        return Err(Error::Format(format.to_owned()));
    }
    let resource_changes = resources(plan.get("resource_changes"), masker);
    let resource_drift = resources(plan.get("resource_drift"), masker);
    let mut output_changes = Map::new();
    for (name, change) in
        plan.get("output_changes").and_then(Value::as_object).into_iter().flatten()
    {
        let reduced = reduced(change, masker);
        if reduced.get("action") != Some(&json!("no-op")) {
            output_changes.insert(name.clone(), Value::Object(reduced));
        }
    }
    let action_invocations = invocations(plan.get("action_invocations"), masker);
    let counts = count(&resource_changes);
    // Plans of terraform before 1.3 do not say; then any change counts.
    let applyable = plan.get("applyable").and_then(Value::as_bool).unwrap_or_else(|| {
        let changes = counts != Counts::default() || !output_changes.is_empty();
        changes || !action_invocations.is_empty()
    });
    let mut whole = json!({
        "format": 1,
        "applyable": applyable,
        "truncated": false,
        "counts": {
            "add": counts.add,
            "change": counts.change,
            "destroy": counts.destroy,
            "import": counts.import,
        },
        "resource_changes": resource_changes,
        "output_changes": output_changes,
        "resource_drift": resource_drift,
    });
    if !action_invocations.is_empty() {
        whole["action_invocations"] = action_invocations.into();
    }
    let unread = unread(&plan);
    if !unread.is_empty() {
        whole["unread"] = unread.into();
    }
    let assumed_roles = assumed_roles::read(&plan, masker);
    if !assumed_roles.is_empty() {
        whole["assumed_roles"] = assumed_roles.into();
    }
    let mut bytes = canonical(&whole);
    if bytes.len() > LARGEST {
        truncate(&mut whole);
        bytes = canonical(&whole);
    }
    Ok(Changes { digest: digest::of_bytes(&bytes), bytes, applyable, counts })
}

fn resources(changes: Option<&Value>, masker: &Masker) -> Vec<Value> {
    let mut out = Vec::new();
    for resource in changes.and_then(Value::as_array).into_iter().flatten() {
        let Some(change) = resource.get("change") else { continue };
        let mut entry = reduced(change, masker);
        let moved = resource.get("previous_address").is_some();
        if entry.get("action") == Some(&json!("no-op"))
            && !moved
            && !entry.contains_key("importing")
        {
            continue;
        }
        for field in [
            "address",
            "mode",
            "type",
            "provider_name",
            "action_reason",
            "previous_address",
            "deposed",
        ] {
            if let Some(value) = resource.get(field).filter(|value| !value.is_null()) {
                entry.insert(field.into(), named(field, value, masker));
            }
        }
        out.push(Value::Object(entry));
    }
    out
}

/// What names a resource. A key of `for_each` may be a secret; a type is none, and plan rules go by
/// it, so that it has to stay what it is.
fn named(field: &str, value: &Value, masker: &Masker) -> Value {
    match field {
        "address" | "previous_address" | "deposed" => without_secrets(value.clone(), masker),
        _ => value.clone(),
    }
}

/// Reduces the actions that terraform invokes beside its changes.
fn invocations(invoked: Option<&Value>, masker: &Masker) -> Vec<Value> {
    let reduced = |action: &Value| {
        let field = |name: &str| action.get(name).unwrap_or(&Value::Null);
        let config = masked(field("config_values"), field("config_sensitive"));
        let mut entry = Map::from_iter([
            ("action".to_owned(), json!("invoke")),
            ("after".to_owned(), without_secrets(config, masker)),
        ]);
        let shown = [
            ("address", "address"),
            ("type", "type"),
            ("provider_name", "provider_name"),
            ("config_unknown", "after_unknown"),
            ("lifecycle_action_trigger", "trigger"),
            ("invoke_action_trigger", "trigger"),
        ];
        for (name, shown) in shown {
            if let Some(value) = action.get(name).filter(|value| !value.is_null()) {
                let value = match name {
                    "type" | "provider_name" => value.clone(),
                    _ => without_secrets(value.clone(), masker),
                };
                entry.insert(shown.to_owned(), value);
            }
        }
        Value::Object(entry)
    };
    invoked.and_then(Value::as_array).into_iter().flatten().map(reduced).collect()
}

/// The names of sections that are not known and say something.
fn unread(plan: &Value) -> Vec<String> {
    let says_something = |value: &Value| match value {
        Value::Null => false,
        Value::Array(items) => !items.is_empty(),
        Value::Object(fields) => !fields.is_empty(),
        Value::Bool(_) | Value::Number(_) | Value::String(_) => true,
    };
    let sections = plan.as_object().into_iter().flatten();
    let unread =
        sections.filter(|(name, value)| !KNOWN.contains(&name.as_str()) && says_something(value));
    let mut unread: Vec<String> = unread.map(|(name, _)| name.clone()).collect();
    unread.sort();
    unread
}

fn reduced(change: &Value, masker: &Masker) -> Map<String, Value> {
    let field = |name: &str| change.get(name).unwrap_or(&Value::Null);
    let mut out = Map::new();
    out.insert("action".into(), action(field("actions")).into());
    let shown = |name, marks| without_secrets(masked(field(name), field(marks)), masker);
    out.insert("before".into(), shown("before", "before_sensitive"));
    out.insert("after".into(), shown("after", "after_sensitive"));
    for name in ["after_unknown", "replace_paths", "importing"] {
        if let Some(value) = change.get(name).filter(|value| !value.is_null()) {
            out.insert(name.into(), without_secrets(value.clone(), masker));
        }
    }
    out
}

fn action(actions: &Value) -> String {
    let actions: Vec<&str> =
        actions.as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    match actions.as_slice() {
        ["delete", "create"] | ["create", "delete"] | ["create", "forget"] => "replace".into(),
        [one] => (*one).into(),
        [] => "no-op".into(),
        more => more.join("-"),
    }
}

/// Replaces what the marks call sensitive: `true` for a whole value, else by key or index.
fn masked(value: &Value, sensitive: &Value) -> Value {
    match (value, sensitive) {
        (Value::Null, _) => Value::Null,
        (_, Value::Bool(true)) => MARK.into(),
        (Value::Object(fields), Value::Object(marks)) => fields
            .iter()
            .map(|(key, value)| {
                (key.clone(), masked(value, marks.get(key).unwrap_or(&Value::Null)))
            })
            .collect(),
        (Value::Array(items), Value::Array(marks)) => items
            .iter()
            .enumerate()
            .map(|(at, value)| masked(value, marks.get(at).unwrap_or(&Value::Null)))
            .collect(),
        (value, _) => value.clone(),
    }
}

/// Masks the job's own secrets, which terraform need not know to be sensitive.
fn without_secrets(value: Value, masker: &Masker) -> Value {
    match value {
        Value::String(text) => masker.text(&text).into_owned().into(),
        Value::Number(number) if masker.is_secret(&number.to_string()) => mask::MARK.into(),
        Value::Object(fields) => fields
            .into_iter()
            .map(|(key, value)| (masker.text(&key).into_owned(), without_secrets(value, masker)))
            .collect(),
        Value::Array(items) => {
            items.into_iter().map(|item| without_secrets(item, masker)).collect()
        }
        value @ (Value::Null | Value::Bool(_) | Value::Number(_)) => value,
    }
}

fn count(resources: &[Value]) -> Counts {
    let mut counts = Counts::default();
    for resource in resources {
        if resource.get("importing").is_some() {
            counts.import += 1;
        }
        match resource.get("action").and_then(Value::as_str).unwrap_or_default() {
            "create" => counts.add += 1,
            "update" => counts.change += 1,
            "delete" => counts.destroy += 1,
            "replace" => {
                counts.add += 1;
                counts.destroy += 1;
            }
            _ => {}
        }
    }
    counts
}

fn truncate(whole: &mut Value) {
    whole["truncated"] = true.into();
    for list in ["resource_changes", "resource_drift", "action_invocations"] {
        whole.get_mut(list).and_then(Value::as_array_mut).into_iter().flatten().for_each(empty);
    }
    whole["output_changes"].as_object_mut().into_iter().flat_map(Map::values_mut).for_each(empty);
}

fn empty(change: &mut Value) {
    for field in ["before", "after", "after_unknown"] {
        change[field] = Value::Null;
    }
}

/// Writes sorted keys, whatever order the JSON library keeps in this build.
fn canonical(value: &Value) -> Vec<u8> {
    fn sorted(value: &Value) -> Value {
        match value {
            Value::Object(fields) => {
                let mut keys: Vec<&String> = fields.keys().collect();
                keys.sort();
                keys.into_iter().map(|key| (key.clone(), sorted(&fields[key]))).collect()
            }
            Value::Array(items) => items.iter().map(sorted).collect(),
            Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => value.clone(),
        }
    }
    serde_json::to_vec(&sorted(value)).expect("a JSON value serializes")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secretive(secret: &str) -> secrecy::SecretString {
        secret.into()
    }

    fn unmasked(shown: &[u8]) -> Result<Changes, Error> {
        reduce(shown, &Masker::default())
    }

    fn plan() -> Value {
        json!({
            "format_version": "1.2",
            "applyable": true,
            "variables": {"secret": {"value": "canary-0"}},
            "prior_state": {"values": "canary-1"},
            "planned_values": {"x": "canary-2"},
            "configuration": {"x": "canary-3"},
            "timestamp": "2026-01-01T00:00:00Z",
            "resource_changes": [
                {"address": "a.b", "mode": "managed", "type": "a", "change": {
                    "actions": ["delete", "create"],
                    "before": {"p": "canary-4", "l": [{"x": "canary-5", "y": 1}], "n": 1},
                    "after": {"p": "canary-6", "l": [{"x": "canary-7", "y": 2}], "n": null},
                    "before_sensitive": {"p": true, "l": [{"x": true}]},
                    "after_sensitive": {"p": true, "l": [{"x": true}], "n": true},
                    "after_unknown": {"id": true}, "replace_paths": [["p"]]}},
                {"address": "c.d", "change": {"actions": ["no-op"], "before": {}, "after": {}}},
                {"address": "e.f", "previous_address": "e.g",
                 "change": {"actions": ["no-op"], "before": {}, "after": {}}},
                {"address": "h.i", "change": {"actions": ["update"], "before": {}, "after": {},
                 "importing": {"id": "i-1"}}},
            ],
            "output_changes": {
                "o": {"actions": ["create"], "before": null, "after": "canary-8",
                      "before_sensitive": true, "after_sensitive": true},
                "same": {"actions": ["no-op"], "before": 1, "after": 1},
            },
            "resource_drift": [{"address": "a.b", "change": {"actions": ["update"],
                "before": "canary-9", "after": 2, "before_sensitive": true}}],
        })
    }

    #[test]
    fn nothing_sensitive_is_left() {
        let changes = unmasked(plan().to_string().as_bytes()).unwrap();
        let text = String::from_utf8(changes.bytes.clone()).unwrap();
        assert!(!text.contains("canary"), "{text}");
        assert!(!text.contains("timestamp"));
        let shown: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(shown["format"], 1);
        let first = &shown["resource_changes"][0];
        assert_eq!(first["action"], "replace");
        assert_eq!(first["after"], json!({"p": MARK, "l": [{"x": MARK, "y": 2}], "n": null}));
        let addresses: Vec<&Value> =
            shown["resource_changes"].as_array().unwrap().iter().map(|r| &r["address"]).collect();
        assert_eq!(addresses, ["a.b", "e.f", "h.i"]);
        assert_eq!(shown["output_changes"].as_object().unwrap().len(), 1);
        assert_eq!(changes.counts, Counts { add: 1, change: 1, destroy: 1, import: 1 });
        assert!(changes.applyable);
        assert_eq!(changes.digest, digest::of_bytes(&changes.bytes));
    }

    #[test]
    fn the_jobs_own_secrets_are_masked_wherever_they_are() {
        let mut masker = Masker::default();
        for secret in ["hunter<2>", "4711"] {
            masker.add(&secretive(secret));
        }
        let shown = json!({"format_version": "1.2", "resource_changes": [{
            "address": "a.b", "change": {"actions": ["create"], "before": null, "after": {
                "plain": "hunter<2>", "in": ["x hunter<2> y"], "n": 4711, "m": 47110,
                "json": r#"{"a":"hunter\u003c2\u003e"}"#, "key hunter<2>": 1}}}]});
        let changes = reduce(shown.to_string().as_bytes(), &masker).unwrap();
        let found: Value = serde_json::from_slice(&changes.bytes).unwrap();
        let expect = json!({"plain": "***", "in": ["x *** y"], "n": "***", "m": 47110,
            "json": r#"{"a":"***"}"#, "key ***": 1});
        assert_eq!(found["resource_changes"][0]["after"], expect);
        assert_eq!(reduce(shown.to_string().as_bytes(), &masker).unwrap().digest, changes.digest);
    }

    #[test]
    fn an_address_tells_no_secret_and_a_type_stays_what_it_is() {
        let mut masker = Masker::default();
        for secret in ["hunter2", "aws_iam_role"] {
            masker.add(&secretive(secret));
        }
        let shown = json!({"format_version": "1.2", "resource_changes": [{
            "address": "aws_iam_role.x[\"hunter2\"]", "previous_address": "b.x[\"hunter2\"]",
            "deposed": "hunter2", "type": "aws_iam_role",
            "change": {"actions": ["delete"], "before": {}, "after": null}}]});
        let changes = reduce(shown.to_string().as_bytes(), &masker).unwrap();
        let found: Value = serde_json::from_slice(&changes.bytes).unwrap();
        let found = &found["resource_changes"][0];
        assert_eq!(found["address"], "***.x[\"***\"]");
        assert_eq!(found["previous_address"], "b.x[\"***\"]");
        assert_eq!(found["deposed"], "***");
        // Plan rules go by it.
        assert_eq!(found["type"], "aws_iam_role");
    }

    #[test]
    fn actions_are_shown_and_what_is_not_known_is_named() {
        let mut masker = Masker::default();
        masker.add(&secretive("hunter2"));
        let before = reduce(plan().to_string().as_bytes(), &masker).unwrap();
        let mut more = plan();
        more["action_invocations"] = json!([{
            "address": "action.aws_lambda_invoke.x[\"hunter2\"]", "type": "aws_lambda_invoke",
            "name": "x", "config_values": {"payload": "canary", "plain": "hunter2 y"},
            "config_sensitive": {"payload": true}, "config_unknown": {"id": true},
            "provider_name": "p",
            "lifecycle_action_trigger": {"triggering_resource_address": "a.b[\"hunter2\"]"}}]);
        more["miracles"] = json!([{"secret": "canary"}]);
        // What is known not to be done by this plan, and what says nothing.
        more["deferred_changes"] = json!([{"reason": "canary"}]);
        more["wonders"] = json!([]);
        more["marvels"] = json!(null);
        let changes = reduce(more.to_string().as_bytes(), &masker).unwrap();
        let found: Value = serde_json::from_slice(&changes.bytes).unwrap();
        let expect = json!([{
            "address": "action.aws_lambda_invoke.x[\"***\"]", "type": "aws_lambda_invoke",
            "action": "invoke",
            "after": {"payload": MARK, "plain": "*** y"}, "after_unknown": {"id": true},
            "provider_name": "p", "trigger": {"triggering_resource_address": "a.b[\"***\"]"}}]);
        assert_eq!(found["action_invocations"], expect);
        assert_eq!(found["unread"], json!(["miracles"]));
        assert!(!found.to_string().contains("canary"));
        // A plan without either is what it was before they were looked at.
        let before: Value = serde_json::from_slice(&before.bytes).unwrap();
        assert!(before.get("action_invocations").is_none() && before.get("unread").is_none());
    }

    #[test]
    fn a_plan_that_only_invokes_is_one_to_apply() {
        let shown = json!({"format_version": "1.2",
            "action_invocations": [{"address": "action.a.b", "type": "a"}]});
        assert!(unmasked(shown.to_string().as_bytes()).unwrap().applyable);
    }

    #[test]
    fn the_order_of_keys_does_not_matter() {
        let a = br#"{"format_version":"1.2","output_changes":{"a":{"actions":["create"],"after":{"x":1,"y":2}}}}"#;
        let b = br#"{"output_changes":{"a":{"after":{"y":2,"x":1},"actions":["create"]}},"format_version":"1.2"}"#;
        assert_eq!(unmasked(a).unwrap(), unmasked(b).unwrap());
    }

    #[test]
    fn another_major_format_is_refused() {
        assert!(matches!(unmasked(br#"{"format_version":"2.0"}"#), Err(Error::Format(_))));
        assert!(matches!(unmasked(b"no"), Err(Error::NotJson(_))));
    }

    #[test]
    fn a_huge_plan_keeps_its_list_without_values() {
        let mut huge = plan();
        huge["resource_changes"][0]["change"]["after"] = json!({"x": "y".repeat(LARGEST)});
        let changes = unmasked(huge.to_string().as_bytes()).unwrap();
        assert!(changes.bytes.len() < LARGEST);
        let shown: Value = serde_json::from_slice(&changes.bytes).unwrap();
        assert_eq!(shown["truncated"], true);
        assert_eq!(shown["resource_changes"][0]["action"], "replace");
        assert_eq!(shown["counts"]["add"], 1);
    }
}
