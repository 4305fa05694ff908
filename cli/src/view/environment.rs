//! Environments and variables, as programs and people see them.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::Value;

use latchkey_proto::v1;

use crate::output::{fields, table};
use crate::view::pool::labels;
use crate::view::state::StateLockView;
use crate::words::{Word, human_duration, time};

#[derive(Debug, Serialize)]
pub(crate) struct EnvironmentView {
    environment_id: String,
    organization: String,
    environment: String,
    mfa_policy: String,
    auto_apply: bool,
    working_directory: String,
    pool: Option<String>,
    session_duration_seconds: Option<i64>,
    plain_credentials: String,
    code_credentials: String,
    plan_role: Option<RoleView>,
    apply_role: Option<RoleView>,
    session_floor_seconds: Option<i64>,
    warnings: Vec<String>,
    region: String,
    runner_labels: BTreeMap<String, String>,
    engine: Option<String>,
    engine_version: Option<String>,
    create_time: Option<String>,
    active_run_id: Option<String>,
    frozen: Option<FrozenView>,
    locked: Option<LockedView>,
    break_glass: Option<BreakGlassView>,
    second_person: bool,
    plan_rule: Option<PlanRuleView>,
    limits: LimitsView,
    state: Option<StateView>,
    state_lock: Option<StateLockView>,
}

#[derive(Debug, Serialize)]
struct RoleView {
    arn: String,
    policy: Option<Value>,
    policy_arns: Vec<String>,
}

impl RoleView {
    fn new(role: Option<v1::RoleSettings>) -> Option<RoleView> {
        let role = role.filter(|role| !role.arn.is_empty())?;
        Some(RoleView {
            arn: role.arn,
            policy: serde_json::from_str(&role.policy_json).ok(),
            policy_arns: role.policy_arns,
        })
    }

    fn human(&self) -> String {
        let policy = if self.policy.is_some() { ", with a session policy" } else { "" };
        let managed = match self.policy_arns.len() {
            0 => String::new(),
            1 => ", with 1 managed policy".to_owned(),
            count => format!(", with {count} managed policies"),
        };
        format!("{}{policy}{managed}", self.arn)
    }
}

#[derive(Debug, Serialize)]
struct FrozenView {
    run_id: String,
    reason: String,
}

#[derive(Debug, Serialize)]
struct LockedView {
    user: String,
    reason: String,
    lock_time: Option<String>,
}

#[derive(Debug, Serialize)]
struct BreakGlassView {
    what: String,
    reason: String,
    time: Option<String>,
}

#[derive(Debug, Serialize)]
struct LimitsView {
    person_seconds: Option<i64>,
    plan_seconds: Option<i64>,
    apply_seconds: Option<i64>,
}

impl LimitsView {
    fn new(limits: v1::Limits) -> LimitsView {
        let seconds = |limit: Option<prost_types::Duration>| limit.map(|limit| limit.seconds);
        LimitsView {
            person_seconds: seconds(limits.person),
            plan_seconds: seconds(limits.plan),
            apply_seconds: seconds(limits.apply),
        }
    }

    fn human(&self) -> String {
        let limits = [
            ("waiting for a person", self.person_seconds),
            ("plan", self.plan_seconds),
            ("apply", self.apply_seconds),
        ];
        let shown = limits.into_iter().filter_map(|(what, limit)| {
            limit.map(|seconds| format!("{what} {}", human_duration(seconds)))
        });
        shown.collect::<Vec<_>>().join(", ")
    }
}

/// What a plan rule demands, for programs and in words.
#[derive(Debug, Serialize)]
pub(crate) struct PlanRuleView {
    destructive: bool,
    resource_types: Vec<String>,
    more_than: Option<u32>,
}

impl PlanRuleView {
    pub(crate) fn new(rule: v1::PlanRule) -> PlanRuleView {
        let v1::PlanRule { destructive, resource_types, more_than } = rule;
        PlanRuleView { destructive, resource_types, more_than }
    }

    pub(crate) fn human(&self) -> String {
        let mut parts = vec![];
        if self.destructive {
            parts.push("destroys or replaces anything".to_owned());
        }
        if !self.resource_types.is_empty() {
            parts.push(format!("changes {}", self.resource_types.join(", ")));
        }
        parts.extend(self.more_than.map(|more| format!("changes more than {more} resources")));
        format!("a code if a plan {}", parts.join("; or "))
    }
}

#[derive(Debug, Serialize)]
struct StateView {
    lineage: String,
    serial: u64,
}

#[derive(Debug, Serialize)]
pub(crate) struct EnvironmentListView {
    pub(crate) environments: Vec<EnvironmentView>,
}

/// What is said of an environment that demands a second person.
const ANOTHER: &str = "who approves an apply must not be who queued it";

fn some(text: &str) -> Option<String> {
    Some(text.to_owned()).filter(|text| !text.is_empty())
}

impl EnvironmentView {
    pub(crate) fn new(environment: &v1::Environment) -> EnvironmentView {
        let settings = environment.settings.clone().unwrap_or_default();
        EnvironmentView {
            environment_id: environment.environment_id.clone(),
            organization: environment.organization.clone(),
            environment: environment.environment.clone(),
            mfa_policy: settings.mfa_policy().snake(),
            auto_apply: settings.auto_apply,
            pool: some(&settings.pool),
            session_duration_seconds: settings.session_duration.map(|duration| duration.seconds),
            plain_credentials: settings.plain_credentials().snake(),
            code_credentials: settings.code_credentials().snake(),
            plan_role: RoleView::new(settings.roles.clone().and_then(|roles| roles.plan)),
            apply_role: RoleView::new(settings.roles.clone().and_then(|roles| roles.apply)),
            session_floor_seconds: settings.session_floor.map(|floor| floor.seconds),
            warnings: environment.warnings.clone(),
            region: settings.region,
            runner_labels: settings.runner_labels.into_iter().collect(),
            engine: some(&settings.engine),
            engine_version: some(&settings.engine_version),
            working_directory: settings.working_directory,
            create_time: time(environment.create_time.as_ref()),
            active_run_id: some(&environment.active_run_id),
            frozen: environment.frozen.as_ref().map(|frozen| FrozenView {
                run_id: frozen.run_id.clone(),
                reason: frozen.reason.clone(),
            }),
            locked: environment.locked.as_ref().map(|locked| LockedView {
                user: locked.user.clone(),
                reason: locked.reason.clone(),
                lock_time: time(locked.lock_time.as_ref()),
            }),
            break_glass: environment.break_glass.as_ref().map(|broken| BreakGlassView {
                what: broken.what.clone(),
                reason: broken.reason.clone(),
                time: time(broken.time.as_ref()),
            }),
            second_person: settings.second_person,
            plan_rule: settings.plan_rule.map(PlanRuleView::new),
            limits: LimitsView::new(settings.limits.unwrap_or_default()),
            state: some(&environment.state_lineage)
                .map(|lineage| StateView { lineage, serial: environment.state_serial }),
            state_lock: environment.state_lock.as_ref().map(StateLockView::new),
        }
    }

    pub(crate) fn human(&self) -> String {
        let auto_apply = if self.auto_apply { "yes" } else { "no" };
        let pool = self.pool.clone().unwrap_or_else(|| "none: runs wait".to_owned());
        let version = self.engine_version.clone().unwrap_or_default();
        let engine = self.engine.clone().unwrap_or_else(|| "the runner's own".to_owned());
        let engine = format!("{engine} {version}").trim_end().to_owned();
        let frozen = self
            .frozen
            .as_ref()
            .map(|frozen| format!("{} (run {})", frozen.reason, frozen.run_id))
            .unwrap_or_default();
        let at = |time: &Option<String>| time.clone().unwrap_or_default();
        let locked = self.locked.as_ref().map(|locked| {
            format!("by {} since {}: {}", locked.user, at(&locked.lock_time), locked.reason)
        });
        let locked = locked.unwrap_or_default();
        let broken = self.break_glass.as_ref().map(|broken| {
            format!("{} on the host, {}: {}", broken.what, at(&broken.time), broken.reason)
        });
        let broken = broken.unwrap_or_default();
        let state = self
            .state
            .as_ref()
            .map(|state| format!("serial {} of {}", state.serial, state.lineage))
            .unwrap_or_default();
        let lock = self.state_lock.as_ref().map(StateLockView::human).unwrap_or_default();
        let heading = format!("Environment {}/{}\n", self.organization, self.environment);
        let mut text = crate::log_view::clean(&heading);
        text.push_str(&fields(&[
            ("frozen", frozen),
            ("locked", locked),
            ("break-glass", broken),
            ("mfa policy", self.mfa_policy.replace('_', " ")),
            ("plan rule", self.plan_rule.as_ref().map(PlanRuleView::human).unwrap_or_default()),
            ("second person", if self.second_person { ANOTHER } else { "" }.to_owned()),
            ("auto apply", auto_apply.to_owned()),
            ("pool", pool),
            ("runner labels", labels(&self.runner_labels)),
            ("engine", engine),
            ("session", self.session_duration_seconds.map(human_duration).unwrap_or_default()),
            (
                "session floor",
                self.session_floor_seconds
                    .filter(|seconds| *seconds > 0)
                    .map(human_duration)
                    .unwrap_or_default(),
            ),
            ("with a code", self.code_credentials.replace('_', " ")),
            ("without a code", self.plain_credentials.replace('_', " ")),
            ("plan role", self.plan_role.as_ref().map(RoleView::human).unwrap_or_default()),
            ("apply role", self.apply_role.as_ref().map(RoleView::human).unwrap_or_default()),
            ("limits", self.limits.human()),
            ("region", self.region.clone()),
            ("directory", self.working_directory.clone()),
            ("active run", self.active_run_id.clone().unwrap_or_default()),
            ("state", state),
            ("state lock", lock.trim_end().to_owned()),
        ]));
        for warning in &self.warnings {
            text.push_str(&format!("\nWARNING: {}\n", crate::log_view::clean(warning)));
        }
        if self.mfa_policy == "applies_only" {
            text.push_str(
                "\nnote: with `applies only`, plan code runs with credentials and without a code; \
                 let IAM demand aws:MultiFactorAuthPresent for changes.\n",
            );
        }
        if self.plain_credentials == "session" && self.mfa_policy != "plans_and_applies" {
            text.push_str("\nnote: AWS refuses IAM calls with a session that no code bought.\n");
        }
        text
    }
}

impl EnvironmentListView {
    pub(crate) fn human(&self) -> String {
        let rows = self
            .environments
            .iter()
            .map(|environment| {
                let workstation = environment.state_lock.as_ref();
                let status = match (&environment.frozen, &environment.active_run_id, workstation) {
                    (Some(_), _, _) => "frozen".to_owned(),
                    (None, _, _) if environment.locked.is_some() => "locked".to_owned(),
                    (None, Some(run), _) => format!("run {run}"),
                    (None, None, Some(_)) => "a workstation".to_owned(),
                    (None, None, None) => String::new(),
                };
                vec![
                    environment.environment.clone(),
                    environment.mfa_policy.replace('_', " "),
                    environment.pool.clone().unwrap_or_default(),
                    status,
                ]
            })
            .collect();
        table(&["ENVIRONMENT", "MFA POLICY", "POOL", "HELD BY"], rows, "no environments yet")
    }
}

#[derive(Debug, Serialize)]
pub(crate) struct VariableView {
    name: String,
    category: String,
    sensitive: bool,
    hcl: bool,
    value: Option<String>,
    update_time: Option<String>,
}

#[derive(Debug, Serialize)]
pub(crate) struct VariableListView {
    pub(crate) variables: Vec<VariableView>,
}

impl VariableView {
    pub(crate) fn new(variable: &v1::Variable) -> VariableView {
        VariableView {
            name: variable.name.clone(),
            category: variable.category().snake(),
            sensitive: variable.sensitive,
            hcl: variable.hcl,
            value: variable.value.clone().filter(|_| !variable.sensitive),
            update_time: time(variable.update_time.as_ref()),
        }
    }

    pub(crate) fn human(&self) -> String {
        let sensitive = if self.sensitive { "sensitive " } else { "" };
        let name = crate::log_view::clean(&self.name);
        format!("Set the {sensitive}{} variable {name}\n", self.category)
    }
}

impl VariableListView {
    pub(crate) fn human(&self) -> String {
        let rows = self
            .variables
            .iter()
            .map(|variable| {
                let value = match (&variable.value, variable.sensitive) {
                    (_, true) => "(sensitive)".to_owned(),
                    (Some(value), false) => value.clone(),
                    (None, false) => String::new(),
                };
                vec![
                    variable.name.clone(),
                    variable.category.clone(),
                    if variable.hcl { "hcl".into() } else { "string".into() },
                    value,
                ]
            })
            .collect();
        table(&["NAME", "CATEGORY", "KIND", "VALUE"], rows, "no variables")
    }
}

#[derive(Debug, Serialize)]
struct EffectiveView {
    name: String,
    category: String,
    sensitive: bool,
    hcl: bool,
    origin: String,
    shadowed: bool,
}

#[derive(Debug, Serialize)]
pub(crate) struct EffectiveListView {
    variables: Vec<EffectiveView>,
}

impl EffectiveListView {
    pub(crate) fn new(variables: &[v1::EffectiveVariable]) -> EffectiveListView {
        let view = |variable: &v1::EffectiveVariable| EffectiveView {
            name: variable.name.clone(),
            category: variable.category().snake(),
            sensitive: variable.sensitive,
            hcl: variable.hcl,
            origin: variable.origin().snake(),
            shadowed: variable.shadowed,
        };
        EffectiveListView { variables: variables.iter().map(view).collect() }
    }

    pub(crate) fn human(&self) -> String {
        let rows = self
            .variables
            .iter()
            .map(|variable| {
                let marks = [
                    (variable.shadowed, "shadowed"),
                    (variable.sensitive, "sensitive"),
                    (variable.hcl, "hcl"),
                ];
                let marks = marks.iter().filter(|(is, _)| *is).map(|(_, mark)| *mark);
                vec![
                    variable.name.clone(),
                    variable.category.clone(),
                    variable.origin.clone(),
                    marks.collect::<Vec<_>>().join(", "),
                ]
            })
            .collect();
        table(&["NAME", "CATEGORY", "FROM", ""], rows, "no variables")
    }
}
