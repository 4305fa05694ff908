//! What a plan's stored changes say: the facts that plan rules look at, and the counts.
//!
//! They are read from the very bytes whose digest an approval binds, so that a runner which says
//! less than those show weakens nothing. Changes that cannot be read in full say nothing at all,
//! which every rule that demands anything takes for a match.

use latchkey_domain::policy::{DestroyedBy, PlanFacts};
use latchkey_domain::run::Counts;
use serde::Deserialize;
use serde::de::IgnoredAny;

/// The one format that is known.
const FORMAT: u64 = 1;

#[derive(Deserialize)]
struct Changes {
    format: u64,
    truncated: bool,
    resource_changes: Vec<Change>,
    #[serde(default)]
    action_invocations: Vec<Invocation>,
    /// Sections that the runner did not know: what they do is in none of the others.
    #[serde(default)]
    unread: Vec<String>,
}

/// An action that terraform invokes beside its changes (since 1.14).
#[derive(Deserialize)]
struct Invocation {
    address: String,
    r#type: String,
}

#[derive(Deserialize)]
struct Change {
    address: String,
    action: String,
    r#type: String,
    importing: Option<IgnoredAny>,
}

/// Reads the facts and counts; `None` unless they are known in full.
pub(super) fn read(changes: &[u8]) -> Option<(PlanFacts, Counts)> {
    let changes: Changes = serde_json::from_slice(changes).ok()?;
    if changes.format != FORMAT || changes.truncated || !changes.unread.is_empty() {
        return None;
    }
    let (mut facts, mut counts) = (PlanFacts::default(), Counts::default());
    for Change { address, action, r#type, importing } in changes.resource_changes {
        counts.import += u32::from(importing.is_some());
        let destroyed = match action.as_str() {
            // An import alone puts a resource under management.
            "no-op" if importing.is_some() => None,
            "no-op" | "read" => continue,
            "create" => {
                counts.add += 1;
                None
            }
            "update" => {
                counts.change += 1;
                None
            }
            "forget" => None,
            "delete" => {
                counts.destroy += 1;
                Some(DestroyedBy::Destroying)
            }
            "replace" => {
                counts.add += 1;
                counts.destroy += 1;
                counts.replace += 1;
                Some(DestroyedBy::Replacing)
            }
            // What it does is not known.
            _ => return None,
        };
        facts.add(&address, &r#type, destroyed);
    }
    for Invocation { address, r#type } in changes.action_invocations {
        facts.add(&address, &r#type, None);
    }
    Some((facts, counts))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn changes(list: Value) -> Value {
        json!({"format": 1, "truncated": false, "resource_changes": list, "more": {}})
    }

    fn facts(changes: &Value) -> Option<(PlanFacts, Counts)> {
        read(changes.to_string().as_bytes())
    }

    #[test]
    fn each_action_is_counted_as_what_it_is() {
        let one = |action: &str| json!({"address": format!("t.{action}"), "action": action, "type": "t", "after": {}});
        let list = ["create", "update", "delete", "replace", "forget", "no-op", "read"].map(one);
        let (found, counts) = facts(&changes(json!(list))).unwrap();
        assert_eq!(found.changes, 5);
        assert_eq!(found.destroys.unwrap().address, "t.delete");
        let expect = Counts { add: 2, change: 1, destroy: 2, import: 0, replace: 1 };
        assert_eq!(counts, expect);
        let mut imported = one("no-op");
        imported["importing"] = json!({"id": "x"});
        let (found, counts) = facts(&changes(json!([imported]))).unwrap();
        assert_eq!((found.changes, counts.import), (1, 1));
        assert!(found.types.contains("t"));
    }

    #[test]
    fn an_action_counts_as_a_change_of_its_type() {
        let mut invoking = changes(json!([]));
        let action = json!({"address": "action.aws_lambda_invoke.x", "type": "aws_lambda_invoke"});
        invoking["action_invocations"] = json!([action]);
        let (found, counts) = facts(&invoking).unwrap();
        assert_eq!((found.changes, counts), (1, Counts::default()));
        assert!(found.types.contains("aws_lambda_invoke"));
        invoking["action_invocations"] = json!([{"address": "action.x"}]);
        assert!(facts(&invoking).is_none());
    }

    #[test]
    fn what_cannot_be_read_in_full_says_nothing() {
        let one = json!([{"address": "a.b", "action": "create", "type": "a"}]);
        assert!(facts(&changes(one.clone())).is_some());
        let mut cut = changes(one.clone());
        cut["truncated"] = true.into();
        let mut other = changes(one.clone());
        other["format"] = 2.into();
        let mut more = changes(one);
        more["unread"] = json!(["miracles"]);
        let odd = |change: Value| changes(json!([change]));
        for unreadable in [
            cut,
            other,
            more,
            json!({}),
            json!([]),
            odd(json!({"address": "a.b", "action": "delete-update", "type": "a"})),
            odd(json!({"address": "a.b", "action": "create"})),
            odd(json!({"action": "create", "type": "a"})),
            odd(json!("create")),
        ] {
            assert!(facts(&unreadable).is_none(), "{unreadable}");
        }
        // A second list could not hide the first.
        let twice = br#"{"format":1,"truncated":false,
            "resource_changes":[{"address":"a.b","action":"delete","type":"a"}],
            "resource_changes":[]}"#;
        assert!(read(twice).is_none());
        assert!(read(b"no").is_none());
    }
}
