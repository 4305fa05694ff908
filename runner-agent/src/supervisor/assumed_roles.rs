//! Which providers assume a role for longer than an hour, by the plan's own configuration.
//!
//! AWS limits a role that is assumed with temporary credentials to one hour, whatever the role
//! allows. Whoever approves the plan should know before its apply fails of that. Only the
//! provider's name and the time are told: nothing else of the configuration leaves this host.
//!
//! `assume_role` is a block of the provider `aws` and an attribute of `awscc`; its time is a
//! constant or, here, the value of an input variable. What is computed otherwise is not known
//! before it is applied, and not told.

use serde_json::{Map, Value, json};

use super::mask::Masker;

const PROVIDERS: [&str; 2] = ["aws", "awscc"];

/// In seconds.
const LIMIT: u64 = 3600;

/// Lists them by name; empty where there is none, so that a plan without any is described as ever.
pub(super) fn read(plan: &Value, masker: &Masker) -> Vec<Value> {
    let configured = plan.pointer("/configuration/provider_config").and_then(Value::as_object);
    let variables = plan.get("variables").and_then(Value::as_object);
    let mut found = Vec::new();
    let mut names: Vec<_> = configured.into_iter().flatten().collect();
    names.sort_by_key(|(name, _)| name.as_str());
    for (name, provider) in names {
        let kind = provider.get("name").and_then(Value::as_str).unwrap_or_default();
        if !PROVIDERS.contains(&kind) {
            continue;
        }
        // A variable of a module is another than the root's of its name.
        let in_root = provider.get("module_address").is_none();
        let variables = variables.filter(|_| in_root);
        let seconds = provider
            .pointer("/expressions/assume_role")
            .into_iter()
            .flat_map(durations)
            .filter_map(|duration| seconds(&known(duration, variables)?))
            .max();
        if let Some(seconds) = seconds.filter(|seconds| *seconds > LIMIT) {
            found.push(json!({"provider": masker.text(name), "seconds": seconds}));
        }
    }
    found
}

/// Finds the expressions or values that say how long, in blocks and in attributes.
fn durations(assume_role: &Value) -> Vec<&Value> {
    let of = |fields: &'static str, role: &'_ Value| role.get(fields).is_some();
    let in_one = |role: &Value| of("duration", role) || of("duration_seconds", role);
    let roles: Vec<&Value> = match assume_role {
        Value::Array(blocks) => blocks.iter().collect(),
        Value::Object(_) => match assume_role.get("constant_value") {
            Some(Value::Array(roles)) => roles.iter().collect(),
            Some(role) => vec![role],
            None => vec![assume_role],
        },
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => vec![],
    };
    roles
        .into_iter()
        .filter(|role| in_one(role))
        .flat_map(|role| [role.get("duration"), role.get("duration_seconds")])
        .flatten()
        .collect()
}

/// Answers the value of an expression, if it is a constant or just one variable.
fn known(duration: &Value, variables: Option<&Map<String, Value>>) -> Option<Value> {
    if duration.is_string() || duration.is_number() {
        return Some(duration.clone());
    }
    if let Some(constant) = duration.get("constant_value") {
        return Some(constant.clone());
    }
    match duration.get("references")?.as_array()?.as_slice() {
        [one] => {
            let name = one.as_str()?.strip_prefix("var.")?;
            variables?.get(name)?.get("value").cloned()
        }
        _ => None,
    }
}

/// Reads a number of seconds, or a duration as Go writes it: `1h30m`, `90m`, `1.5h`.
fn seconds(value: &Value) -> Option<u64> {
    if let Some(number) = value.as_u64() {
        return Some(number);
    }
    let text = value.as_str()?;
    if let Ok(number) = text.parse() {
        return Some(number);
    }
    let (mut rest, mut millis) = (text, 0_u64);
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let (number, tail) = rest.split_at(digits);
        let end = tail.find(|c: char| c.is_ascii_digit()).unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(end);
        let unit = match unit {
            "h" => 3_600_000,
            "m" => 60_000,
            "s" => 1000,
            "ms" => 1,
            _ => return None,
        };
        millis = millis.checked_add(times(number, unit)?)?;
        rest = tail;
    }
    Some(millis.div_ceil(1000))
}

/// Multiplies a decimal number, as exactly as up to three digits of a fraction need.
fn times(number: &str, unit: u64) -> Option<u64> {
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let whole: u64 = whole.parse().ok()?;
    let thousandths: u64 = format!("{fraction:0<3}").get(..3)?.parse().ok()?;
    whole.checked_mul(unit)?.checked_add(thousandths.checked_mul(unit)? / 1000)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As `terraform show -json` writes it (format 1.2), cut to what matters.
    const RECORDED: &str = include_str!("assumed_roles/plan.json");

    fn read_plain(plan: &Value) -> Vec<Value> {
        read(plan, &Masker::default())
    }

    #[test]
    fn a_recorded_plan_tells_the_roles_that_are_too_long() {
        let plan: Value = serde_json::from_str(RECORDED).unwrap();
        assert_eq!(
            read_plain(&plan),
            [
                json!({"provider": "aws.by_variable", "seconds": 7200}),
                json!({"provider": "aws.long", "seconds": 5400}),
                json!({"provider": "awscc", "seconds": 43_200}),
                json!({"provider": "module.net:aws.old", "seconds": 10_800}),
            ]
        );
    }

    #[test]
    fn a_plan_without_any_is_described_as_ever() {
        assert!(read_plain(&json!({})).is_empty());
        let hour = json!({"configuration": {"provider_config": {"aws": {"name": "aws",
            "expressions": {"assume_role": [{"duration": {"constant_value": "1h"}}]}}}}});
        assert!(read_plain(&hour).is_empty());
        let other = json!({"configuration": {"provider_config": {"x": {"name": "google",
            "expressions": {"assume_role": [{"duration": {"constant_value": "9h"}}]}}}}});
        assert!(read_plain(&other).is_empty());
    }

    #[test]
    fn durations_are_read_as_go_reads_them() {
        let cases = [("1h", 3600), ("1h30m", 5400), ("90m", 5400), ("1.5h", 5400), ("7200s", 7200)];
        for (text, expect) in cases {
            assert_eq!(seconds(&json!(text)), Some(expect), "{text}");
        }
        assert_eq!(seconds(&json!(7200)), Some(7200));
        assert_eq!(seconds(&json!("7200")), Some(7200));
        for bad in ["1d", "h", "-1h", "1h-", "99999999999999999999h"] {
            assert_eq!(seconds(&json!(bad)), None, "{bad}");
        }
    }
}
