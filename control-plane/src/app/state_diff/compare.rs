//! The comparison itself: what is read of a state, and the walk through what differs.

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;
use serde_json::Value;

use super::{Action, AttributeChange, StateChange, StateDiff};

const MOST_CHANGES: usize = 500;
const MOST_ATTRIBUTES: usize = 100;
const LONGEST_VALUE: usize = 512;
const LONGEST_NAME: usize = 512;

/// Of all that is told together; an answer has a bound.
const LARGEST_DIFF: usize = 2 << 20;

/// A state of format version 4, as far as it is compared.
#[derive(Default, Deserialize)]
pub(super) struct State {
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

/// A step as it was taken. A value whose type the provider leaves open is stored as an object of
/// its `value` and its `type`, which paths of marks do not know of; but what looks like one may be
/// an object of the provider's own. So a mark may count such a step, or not.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Taken {
    step: Step,
    into_open: bool,
}

/// Tells how a state differs from an earlier one.
pub(super) fn diff(before: &State, after: &State) -> StateDiff {
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
    fn compare(&mut self, path: &mut Vec<Taken>, before: Option<&Value>, after: Option<&Value>) {
        if before == after || self.truncated {
            return;
        }
        if self.marks.iter().any(|mark| covers(mark, path)) {
            return self.tell(path, None, None, true);
        }
        let (leaf_before, leaf_after) = (is_leaf(before), is_leaf(after));
        if leaf_before && leaf_after {
            return self.tell(path, before, after, false);
        }
        // What stood here before it had parts, or stands here now that it has none.
        let stands = |side: Option<&Value>, is_leaf: bool| {
            is_leaf && side.is_some_and(|value| !value.is_null())
        };
        if stands(before, leaf_before) {
            self.tell(path, before, None, false);
        }
        let is_open = !path.is_empty() && (is_open(before) || is_open(after));
        for step in steps_into(before, after) {
            let (before, after) = (part(before, &step), part(after, &step));
            let into_open = is_open && step == Step::Key("value".into());
            path.push(Taken { step, into_open });
            self.compare(path, before, after);
            path.pop();
        }
        if stands(after, leaf_after) {
            self.tell(path, None, after, false);
        }
    }

    fn tell(
        &mut self,
        path: &[Taken],
        before: Option<&Value>,
        after: Option<&Value>,
        sensitive: bool,
    ) {
        if self.attributes.len() >= MOST_ATTRIBUTES {
            self.truncated = true;
            return;
        }
        // Also a single value where the other state has parts of which one is marked.
        let sensitive = sensitive || self.marks.iter().any(|mark| reaches(mark, path));
        let shown = |side: Option<&Value>| {
            side.filter(|_| !sensitive).map(|value| shortened(&value.to_string(), LONGEST_VALUE))
        };
        let (before, after) = (shown(before), shown(after));
        let path = shortened(&written(path), LONGEST_NAME);
        self.attributes.push(AttributeChange { path, before, after, sensitive });
    }
}

/// Tells whether a path is that of a mark, or leads into what is marked.
fn covers(mark: &[Step], path: &[Taken]) -> bool {
    let (Some((step, mark_rest)), Some((taken, path_rest))) =
        (mark.split_first(), path.split_first())
    else {
        return mark.is_empty();
    };
    (*step == taken.step && covers(mark_rest, path_rest))
        || (taken.into_open && covers(mark, path_rest))
}

/// Tells whether a mark is that of a path, or of a part of what is there.
fn reaches(mark: &[Step], path: &[Taken]) -> bool {
    let (Some((step, mark_rest)), Some((taken, path_rest))) =
        (mark.split_first(), path.split_first())
    else {
        return true;
    };
    (*step == taken.step && reaches(mark_rest, path_rest))
        || (taken.into_open && reaches(mark, path_rest))
}

fn is_leaf(side: Option<&Value>) -> bool {
    match side {
        Some(Value::Object(map)) => map.is_empty(),
        Some(Value::Array(items)) => items.is_empty(),
        Some(Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_)) | None => true,
    }
}

/// Tells whether it looks like a value with its type.
fn is_open(side: Option<&Value>) -> bool {
    let Some(Value::Object(map)) = side else { return false };
    let is_type = map.get("type").is_some_and(|of| of.is_string() || of.is_array());
    map.len() == 2 && is_type && map.contains_key("value")
}

/// Lists the steps into two values: those of the first, then what only the second has.
fn steps_into(before: Option<&Value>, after: Option<&Value>) -> Vec<Step> {
    let of = |side: Option<&Value>| -> Vec<Step> {
        match side {
            Some(Value::Object(map)) => map.keys().cloned().map(Step::Key).collect(),
            Some(Value::Array(items)) => (0..items.len() as u64).map(Step::Index).collect(),
            Some(Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_)) | None => {
                vec![]
            }
        }
    };
    let mut steps = of(before);
    steps.extend(of(after).into_iter().filter(|step| part(before, step).is_none()));
    steps
}

fn part<'a>(value: Option<&'a Value>, step: &Step) -> Option<&'a Value> {
    match (value?, step) {
        (Value::Object(map), Step::Key(key)) => map.get(key),
        (Value::Array(items), Step::Index(index)) => items.get(usize::try_from(*index).ok()?),
        (_, Step::Key(_) | Step::Index(_)) => None,
    }
}

fn written(path: &[Taken]) -> String {
    let mut text = String::new();
    for step in path.iter().filter(|taken| !taken.into_open).map(|taken| &taken.step) {
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
    fn a_mark_into_a_value_of_open_type_holds_whether_it_knows_of_the_wrapping_or_not() {
        let attr = |name: &str| json!({"type": "get_attr", "value": name});
        let open = |secret: &str, n: u8| {
            let value = json!({"password": secret, "user": n});
            json!({"input": {"value": value, "type": ["object", {"password": "string"}]}})
        };
        let (before, after) = (open("canary-1", 1), open("canary-2", 2));
        for mark in [
            json!([attr("input"), attr("password")]),
            json!([attr("input"), attr("value"), attr("password")]),
        ] {
            let told = told(&one(before.clone(), json!([mark])), &one(after.clone(), json!([])));
            assert_eq!(told, ["input.password: - > - (sensitive)", "input.user: 1 > 2"]);
        }
        let text = |secret: &str| json!({"input": {"value": secret, "type": "string"}});
        for mark in [json!([attr("input")]), json!([attr("input"), attr("value")])] {
            let (before, after) = (text("canary-1"), text("canary-2"));
            let told = told(&one(before, json!([])), &one(after, json!([mark])));
            assert_eq!(told, ["input: - > - (sensitive)"]);
        }
        // Where it has parts in one state only.
        let mark = json!([[attr("input"), attr("password")]]);
        let told = told(&one(open("canary-1", 1), mark), &one(text("canary-2"), json!([])));
        assert!(!told.iter().any(|line| line.contains("canary")), "{told:?}");
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
