//! What of the settings protects less than what was before.

use latchkey_domain::policy::MfaPolicy;

use crate::store::record::environment::{PlainCredentials, Settings};

/// Tells whether settings protect less than those before.
///
/// Weaker are: a lower level; a plan rule that demands less anywhere; one person where two were
/// demanded; an apply by itself under `never`; more credentials for phases without a code, or
/// other roles that they assume.
pub(super) fn weakens(before: &Settings, after: &Settings) -> bool {
    let reach = |plain: PlainCredentials| match plain {
        PlainCredentials::None => 0,
        PlainCredentials::Session => 1,
        PlainCredentials::Role => 2,
        PlainCredentials::Static => 3,
    };
    after.policy < before.policy
        || !after.plan_rule.is_at_least(&before.plan_rule)
        || (before.second_person && !after.second_person)
        || (after.policy == MfaPolicy::Never && after.auto_apply && !before.auto_apply)
        || reach(after.plain_credentials) > reach(before.plain_credentials)
        || (after.plain_credentials == PlainCredentials::Role && after.roles != before.roles)
}

#[cfg(test)]
mod tests {
    use latchkey_domain::policy::PlanRule;

    use super::*;
    use crate::store::record::environment::RoleSettings;

    #[test]
    fn what_protects_less_is_weaker_and_what_protects_more_is_not() {
        let rule = |types: &[&str], more_than| PlanRule {
            resource_types: types.iter().map(|name| (*name).to_owned()).collect(),
            more_than,
            ..PlanRule::default()
        };
        let role = |arn: &str| RoleSettings { arn: arn.into(), ..RoleSettings::default() };
        type Set = Box<dyn Fn(&mut Settings)>;
        // What is set before, and what after.
        let table: Vec<(&str, Set, Set)> = vec![
            (
                "level",
                Box::new(|s| s.policy = MfaPolicy::AppliesOnly),
                Box::new(|s| s.policy = MfaPolicy::Never),
            ),
            (
                "destructive",
                Box::new(|s| s.plan_rule.destructive = true),
                Box::new(|s| s.plan_rule.destructive = false),
            ),
            (
                "types",
                Box::new(move |s| s.plan_rule = rule(&["aws_iam_*"], None)),
                Box::new(move |s| s.plan_rule = rule(&["aws_iam_role"], None)),
            ),
            (
                "number",
                Box::new(move |s| s.plan_rule = rule(&[], Some(3))),
                Box::new(move |s| s.plan_rule = rule(&[], Some(4))),
            ),
            (
                "second person",
                Box::new(|s| s.second_person = true),
                Box::new(|s| s.second_person = false),
            ),
            ("auto apply", Box::new(|_| ()), Box::new(|s| s.auto_apply = true)),
            (
                "plain credentials",
                Box::new(|_| ()),
                Box::new(|s| s.plain_credentials = PlainCredentials::Static),
            ),
            (
                "roles",
                Box::new(|s| s.plain_credentials = PlainCredentials::Role),
                Box::new(move |s| {
                    s.plain_credentials = PlainCredentials::Role;
                    s.roles.apply = role("arn:aws:iam::123456789012:role/admin");
                }),
            ),
        ];
        for (name, before, after) in &table {
            let (mut strong, mut weak) = (Settings::default(), Settings::default());
            before(&mut strong);
            after(&mut weak);
            assert!(weakens(&strong, &weak), "{name}");
            assert!(!weakens(&strong, &strong), "{name}");
            if *name != "roles" {
                assert!(!weakens(&weak, &strong), "{name}");
            }
        }
        let harmless = Settings { region: "eu-central-1".into(), ..Settings::default() };
        assert!(!weakens(&Settings::default(), &harmless));
        let gated = |auto_apply| Settings {
            policy: MfaPolicy::AppliesOnly,
            auto_apply,
            ..Settings::default()
        };
        assert!(!weakens(&gated(false), &gated(true)), "a code is demanded all the same");
    }
}
