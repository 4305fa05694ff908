//! What of the settings protects less than what was before.

use latchkey_domain::policy::MfaPolicy;

use crate::store::record::environment::{CodeCredentials, PlainCredentials, Settings};

/// Tells whether settings protect less than those before.
///
/// Weaker are: a lower level; a plan rule that demands less anywhere; one person where two were
/// demanded; an apply by itself under `never`; other credentials for phases without a code, and
/// wider ones for a code.
pub(super) fn weakens(before: &Settings, after: &Settings) -> bool {
    after.policy < before.policy
        || !after.plan_rule.is_at_least(&before.plan_rule)
        || (before.second_person && !after.second_person)
        || (after.policy == MfaPolicy::Never && after.auto_apply && !before.auto_apply)
        || gives_more_plainly(before, after)
        || gives_more_by_code(before, after)
}

/// A role may be narrower than the keys or, to who may assume it, wider: only what holds nothing,
/// and what was left by those who had the keys themselves, is known to be no more.
fn gives_more_plainly(before: &Settings, after: &Settings) -> bool {
    match (before.plain_credentials, after.plain_credentials) {
        (_, PlainCredentials::None)
        | (PlainCredentials::Static, _)
        | (PlainCredentials::Session, PlainCredentials::Session) => false,
        (PlainCredentials::Role, PlainCredentials::Role) => before.roles != after.roles,
        (PlainCredentials::None | PlainCredentials::Role, PlainCredentials::Session)
        | (PlainCredentials::None | PlainCredentials::Session, PlainCredentials::Role)
        | (
            PlainCredentials::None | PlainCredentials::Session | PlainCredentials::Role,
            PlainCredentials::Static,
        ) => true,
    }
}

/// With the session of a code the roles can be assumed anyhow.
fn gives_more_by_code(before: &Settings, after: &Settings) -> bool {
    match (before.code_credentials, after.code_credentials) {
        (CodeCredentials::Session, CodeCredentials::Session | CodeCredentials::Role) => false,
        (CodeCredentials::Role, CodeCredentials::Session) => true,
        (CodeCredentials::Role, CodeCredentials::Role) => before.roles != after.roles,
    }
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

    #[test]
    fn what_a_phase_gets_is_never_widened_unseen() {
        type Plain = PlainCredentials;
        type Code = CodeCredentials;
        let role = |name: &str| RoleSettings {
            arn: format!("arn:aws:iam::123456789012:role/{name}"),
            ..RoleSettings::default()
        };
        let with = |plain, code, name: &str| {
            let mut settings = Settings {
                plain_credentials: plain,
                code_credentials: code,
                ..Settings::default()
            };
            settings.roles.plan = role(name);
            settings
        };
        let modes = [Plain::None, Plain::Session, Plain::Role, Plain::Static];
        let wider = |before, after| {
            weakens(&with(before, Code::Session, "a"), &with(after, Code::Session, "a"))
        };
        for mode in modes {
            assert!(!wider(mode, Plain::None));
            assert!(!wider(mode, mode));
            assert!(!wider(Plain::Static, mode));
        }
        for before in [Plain::None, Plain::Session, Plain::Role] {
            for after in modes.into_iter().filter(|mode| *mode != before && *mode != Plain::None) {
                assert!(wider(before, after), "{before:?} to {after:?}");
            }
        }
        let by_code = |before, after| weakens(&before, &after);
        let narrow = || with(Plain::None, Code::Role, "a");
        assert!(by_code(narrow(), with(Plain::None, Code::Session, "a")));
        assert!(by_code(narrow(), with(Plain::None, Code::Role, "admin")));
        assert!(!by_code(with(Plain::None, Code::Session, "a"), narrow()));
        let mut without_policy = narrow();
        let mut narrowed = narrow();
        narrowed.roles.plan.policy = "{}".into();
        assert!(by_code(narrowed, without_policy.clone()));
        without_policy.region = "eu-central-1".into();
        assert!(!by_code(narrow(), without_policy));
    }
}
