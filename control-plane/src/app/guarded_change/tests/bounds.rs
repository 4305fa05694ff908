//! What is too large to be recorded spends no code.

use std::collections::{BTreeMap, BTreeSet};

use latchkey_domain::policy::{MfaPolicy, PlanRule};

use super::policy;
use crate::app::fixture::Fixture;
use crate::app::settings::SettingsChange;
use crate::store::record::environment::{RoleSettings, Roles};

fn roles(policy: &str) -> Option<Roles> {
    let role = RoleSettings {
        arn: "arn:aws:iam::123456789012:role/terraform".into(),
        policy: policy.into(),
        ..RoleSettings::default()
    };
    Some(Roles { plan: role.clone(), apply: role })
}

#[tokio::test]
async fn settings_that_no_audit_record_holds_are_refused_before_a_code_is_spent() {
    let fixture = Fixture::new(MfaPolicy::AppliesOnly).await;
    // Quotes take two bytes each in the record.
    let quotes = r#"{"":["#.to_owned() + &r#""","#.repeat(670) + r#"""]}"#;
    let resource_types: BTreeSet<String> =
        (0..64).map(|n| format!("{n:-<128}").replace('-', "a")).collect();
    let labels: BTreeMap<String, String> =
        (0..16).map(|n| (format!("{n:a<63}"), "b".repeat(63))).collect();
    let large = |text: &str| SettingsChange {
        roles: roles(text),
        plan_rule: Some(PlanRule { resource_types: resource_types.clone(), ..PlanRule::default() }),
        runner_labels: Some(labels.clone()),
        ..policy(MfaPolicy::Never)
    };
    let mut refused = None;
    for n in 0..2 {
        let given = fixture.proof(&format!("large-{n}"));
        if let Err(error) = fixture.try_settings(large(&quotes), given).await {
            refused = Some(error);
        }
    }
    let refused = refused.expect("no audit record holds it twice");
    assert_eq!(refused.field_name(), Some("roles"), "{refused}");
    assert_eq!(fixture.aws.requests_for("GetSessionToken"), 0);
}

#[tokio::test]
async fn a_session_policy_has_only_characters_that_aws_takes() {
    let fixture = Fixture::new(MfaPolicy::Never).await;
    for (text, is_taken) in [
        (r#"{"Sid":"caf\u00e9"}"#, true),
        ("{\"Sid\":\"café\"}\r\n\t", true),
        ("{\"Sid\":\"日本\"}", false),
    ] {
        let change = SettingsChange { roles: roles(text), ..policy(MfaPolicy::Never) };
        let set = fixture.try_settings(change, None).await;
        assert_eq!(set.is_ok(), is_taken, "{text:?}");
    }
}
