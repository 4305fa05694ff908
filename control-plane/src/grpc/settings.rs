//! An environment's settings, wire to record and back.

use std::time::Duration;

use latchkey_domain::policy::PlanRule;
use latchkey_proto::v1;

use super::convert;
use crate::error::{Error, Result};
use crate::store::record::environment::{
    CodeCredentials, Limits, PlainCredentials, RoleSettings, Roles, Settings,
};

/// Reads a mode; unspecified is absent.
pub(super) fn plain_credentials(value: i32) -> Result<Option<PlainCredentials>> {
    match v1::PlainCredentials::try_from(value) {
        Ok(v1::PlainCredentials::Unspecified) => Ok(None),
        Ok(v1::PlainCredentials::Session) => Ok(Some(PlainCredentials::Session)),
        Ok(v1::PlainCredentials::None) => Ok(Some(PlainCredentials::None)),
        Ok(v1::PlainCredentials::Role) => Ok(Some(PlainCredentials::Role)),
        Ok(v1::PlainCredentials::Static) => Ok(Some(PlainCredentials::Static)),
        Err(_) => Err(Error::field("plain_credentials", "say SESSION, ROLE, STATIC or NONE")),
    }
}

const fn plain_credentials_out(plain: PlainCredentials) -> v1::PlainCredentials {
    match plain {
        PlainCredentials::Session => v1::PlainCredentials::Session,
        PlainCredentials::None => v1::PlainCredentials::None,
        PlainCredentials::Role => v1::PlainCredentials::Role,
        PlainCredentials::Static => v1::PlainCredentials::Static,
    }
}

/// Reads a mode; unspecified is absent.
pub(super) fn code_credentials(value: i32) -> Result<Option<CodeCredentials>> {
    match v1::CodeCredentials::try_from(value) {
        Ok(v1::CodeCredentials::Unspecified) => Ok(None),
        Ok(v1::CodeCredentials::Session) => Ok(Some(CodeCredentials::Session)),
        Ok(v1::CodeCredentials::Role) => Ok(Some(CodeCredentials::Role)),
        Err(_) => Err(Error::field("code_credentials", "say SESSION or ROLE")),
    }
}

const fn code_credentials_out(code: CodeCredentials) -> v1::CodeCredentials {
    match code {
        CodeCredentials::Session => v1::CodeCredentials::Session,
        CodeCredentials::Role => v1::CodeCredentials::Role,
    }
}

pub(super) fn plan_rule(rule: v1::PlanRule) -> PlanRule {
    let v1::PlanRule { destructive, resource_types, more_than } = rule;
    PlanRule { destructive, resource_types: resource_types.into_iter().collect(), more_than }
}

pub(super) fn plan_rule_out(rule: PlanRule) -> Option<v1::PlanRule> {
    if rule == PlanRule::default() {
        return None;
    }
    let PlanRule { destructive, resource_types, more_than } = rule;
    let resource_types = resource_types.into_iter().collect();
    Some(v1::PlanRule { destructive, resource_types, more_than })
}

pub(super) fn roles(roles: v1::Roles) -> Roles {
    let one = |role: Option<v1::RoleSettings>| {
        let v1::RoleSettings { arn, policy_json, policy_arns } = role.unwrap_or_default();
        RoleSettings { arn, policy: policy_json, policy_arns }
    };
    Roles { plan: one(roles.plan), apply: one(roles.apply) }
}

fn roles_out(roles: Roles) -> Option<v1::Roles> {
    if roles == Roles::default() {
        return None;
    }
    let one = |role: RoleSettings| {
        let RoleSettings { arn, policy, policy_arns } = role;
        Some(v1::RoleSettings { arn, policy_json: policy, policy_arns })
    };
    Some(v1::Roles { plan: one(roles.plan), apply: one(roles.apply) })
}

pub(super) fn limits(limits: v1::Limits) -> Result<Limits> {
    let seconds = |field, given| {
        let duration = convert::duration(field, given)?;
        Ok::<_, Error>(duration.map(|duration| duration.as_secs()))
    };
    Ok(Limits {
        person: seconds("limits.person", limits.person)?,
        plan: seconds("limits.plan", limits.plan)?,
        apply: seconds("limits.apply", limits.apply)?,
    })
}

fn limits_out(limits: Limits) -> Option<v1::Limits> {
    if limits == Limits::default() {
        return None;
    }
    let Limits { person, plan, apply } = limits;
    let [person, plan, apply] =
        [person, plan, apply].map(|limit| limit.and_then(|s| duration_out(Duration::from_secs(s))));
    Some(v1::Limits { person, plan, apply })
}

fn duration_out(duration: Duration) -> Option<prost_types::Duration> {
    prost_types::Duration::try_from(duration).ok()
}

pub(super) fn settings_out(settings: Settings, pool: String) -> v1::EnvironmentSettings {
    let floor = Some(settings.session_floor).filter(|floor| !floor.is_zero());
    v1::EnvironmentSettings {
        mfa_policy: convert::policy_out(settings.policy).into(),
        auto_apply: settings.auto_apply,
        working_directory: settings.working_directory,
        pool,
        session_duration: duration_out(settings.session_duration),
        plain_credentials: plain_credentials_out(settings.plain_credentials).into(),
        region: settings.region,
        runner_labels: settings.runner_labels.into_iter().collect(),
        engine: settings.engine,
        engine_version: settings.engine_version,
        second_person: settings.second_person,
        plan_rule: plan_rule_out(settings.plan_rule),
        code_credentials: code_credentials_out(settings.code_credentials).into(),
        roles: roles_out(settings.roles),
        session_floor: floor.and_then(duration_out),
        limits: limits_out(settings.limits),
    }
}
