//! Environments, configurations and state versions as they are stored.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use latchkey_domain::environment::{Frozen, Hold, Locked, StateLock};
use latchkey_domain::id::{Digest, EnvironmentId, OrganizationId, PoolId, RunId};
use latchkey_domain::policy::{Demands, MfaPolicy, Phase, PlanRule};
use latchkey_domain::time::Timestamp;
use serde::{Deserialize, Serialize};

use super::run::PolicyRecord;
use super::{Millis, Text};

/// A Terraform root with its settings; what runs change of it is its `hold`.
#[derive(Clone, Debug)]
pub struct Environment {
    pub id: EnvironmentId,
    pub organization: OrganizationId,
    pub name: String,
    pub settings: Settings,
    pub hold: Hold,
    /// Set while what it demands was last set on the host, without a code.
    pub break_glass: Option<BreakGlass>,
    pub state: Option<StateHead>,
    pub created_at: Timestamp,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    pub policy: MfaPolicy,
    pub auto_apply: bool,
    /// Relative path inside the archive; empty is its top.
    pub working_directory: String,
    pub pool: Option<PoolId>,
    pub session_duration: Duration,
    pub plain_credentials: PlainCredentials,
    pub region: String,
    /// What a runner must have.
    pub runner_labels: BTreeMap<String, String>,
    /// For plans; empty is the runner's own.
    pub engine: String,
    /// Exact; empty is the runner's own.
    pub engine_version: String,
    /// Who approves must not be who queued.
    pub second_person: bool,
    pub plan_rule: PlanRule,
    pub code_credentials: CodeCredentials,
    pub roles: Roles,
    /// The least life of credentials at a start; the control plane's where that is longer.
    pub session_floor: Duration,
    pub limits: Limits,
}

/// A policy that was set on the control plane's host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BreakGlass {
    pub at: Millis,
    pub reason: String,
    /// What was done.
    pub what: String,
}

impl Settings {
    /// What a phase must be approved by.
    pub fn demands(&self) -> Demands {
        Demands {
            policy: self.policy,
            plan_rule: self.plan_rule.clone(),
            second_person: self.second_person,
        }
    }
}

/// The roles of the credential modes `role`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Roles {
    pub plan: RoleSettings,
    pub apply: RoleSettings,
}

impl Roles {
    pub const fn of(&self, phase: Phase) -> &RoleSettings {
        match phase {
            Phase::Plan => &self.plan,
            Phase::Apply => &self.apply,
        }
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RoleSettings {
    /// Empty: none.
    pub arn: String,
    /// Session policy as JSON; empty: none.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub policy: String,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub policy_arns: Vec<String>,
}

/// Limits of time in seconds; what is absent has none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Waiting for a person.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub person: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub plan: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub apply: Option<u64>,
}

impl From<Limits> for latchkey_domain::run::Limits {
    fn from(limits: Limits) -> Self {
        let Limits { person, plan, apply } = limits;
        let [person, plan, apply] = [person, plan, apply].map(|l| l.map(Duration::from_secs));
        Self { person, plan, apply }
    }
}

/// What a code buys.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CodeCredentials {
    #[default]
    Session,
    Role,
}

/// [`PlanRule`] as it is stored.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlanRuleRecord {
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    destructive: bool,
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    resource_types: BTreeSet<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    more_than: Option<u32>,
}

impl From<&PlanRule> for PlanRuleRecord {
    fn from(rule: &PlanRule) -> Self {
        let PlanRule { destructive, resource_types, more_than } = rule.clone();
        Self { destructive, resource_types, more_than }
    }
}

impl From<PlanRuleRecord> for PlanRule {
    fn from(record: PlanRuleRecord) -> Self {
        let PlanRuleRecord { destructive, resource_types, more_than } = record;
        Self { destructive, resource_types, more_than }
    }
}

pub(super) fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// What a phase that demands no code gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PlainCredentials {
    Session,
    None,
    Role,
    /// The long-term keys themselves.
    Static,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            policy: MfaPolicy::Never,
            auto_apply: false,
            working_directory: String::new(),
            pool: None,
            session_duration: Duration::from_secs(3600),
            plain_credentials: PlainCredentials::Session,
            region: "us-east-1".into(),
            runner_labels: BTreeMap::new(),
            engine: String::new(),
            engine_version: String::new(),
            second_person: false,
            plan_rule: PlanRule::default(),
            code_credentials: CodeCredentials::default(),
            roles: Roles::default(),
            session_floor: Duration::ZERO,
            limits: Limits::default(),
        }
    }
}

/// How long the last applies took, in seconds, oldest first.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApplyDurations {
    pub seconds: Vec<u64>,
}

/// The newest state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StateHead {
    /// Counts the environment's state versions from 1.
    pub number: u64,
    pub digest: Text<Digest>,
    pub lineage: String,
    pub serial: u64,
}

/// One state version, kept for good.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct StateVersion {
    pub digest: Text<Digest>,
    pub lineage: String,
    pub serial: u64,
    /// Which wrote it, or left what was accepted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run: Option<Text<RunId>>,
    pub at: Millis,
    #[serde(default)]
    pub origin: StateOrigin,
    /// The person's name; empty where a run wrote it.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub user: String,
    /// Absent in records of before it was noted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<u64>,
}

/// How a state became current. Records of before it was noted are of runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StateOrigin {
    #[default]
    Run,
    /// From a workstation.
    Push,
    Import,
    /// To the version of this number.
    Rollback(u64),
    /// From quarantine.
    Accepted,
}

/// An uploaded archive.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Configuration {
    pub uploaded_by: String,
    pub at: Millis,
}

#[derive(Debug, Serialize, Deserialize)]
pub struct EnvironmentRecord {
    id: Text<EnvironmentId>,
    organization: Text<OrganizationId>,
    name: String,
    #[serde(with = "PolicyRecord")]
    policy: MfaPolicy,
    auto_apply: bool,
    working_directory: String,
    pool: Option<Text<PoolId>>,
    session_seconds: u64,
    plain_credentials: PlainCredentials,
    region: String,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    runner_labels: BTreeMap<String, String>,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    engine: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    engine_version: String,
    #[serde(default, skip_serializing_if = "is_default")]
    second_person: bool,
    #[serde(default, skip_serializing_if = "is_default")]
    plan_rule: PlanRuleRecord,
    #[serde(default, skip_serializing_if = "is_default")]
    code_credentials: CodeCredentials,
    #[serde(default, skip_serializing_if = "is_default")]
    roles: Roles,
    #[serde(default, skip_serializing_if = "is_default")]
    floor_seconds: u64,
    #[serde(default, skip_serializing_if = "is_default")]
    limits: Limits,
    holder: Option<Text<RunId>>,
    frozen: Option<FrozenRecord>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    state_lock: Option<StateLockRecord>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    locked: Option<LockedRecord>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    break_glass: Option<BreakGlass>,
    state: Option<StateHead>,
    created_at: Millis,
}

#[derive(Debug, Serialize, Deserialize)]
struct FrozenRecord {
    run: Text<RunId>,
    reason: String,
}

#[derive(Debug, Serialize, Deserialize)]
struct StateLockRecord {
    id: String,
    user: String,
    operation: String,
    workstation: String,
    info: String,
    engine_version: String,
    at: Millis,
}

impl From<&StateLock> for StateLockRecord {
    fn from(lock: &StateLock) -> Self {
        let StateLock { id, user, operation, workstation, info, engine_version, at } = lock.clone();
        Self { id, user, operation, workstation, info, engine_version, at: at.into() }
    }
}

impl From<StateLockRecord> for StateLock {
    fn from(record: StateLockRecord) -> Self {
        let StateLockRecord { id, user, operation, workstation, info, engine_version, at } = record;
        Self { id, user, operation, workstation, info, engine_version, at: at.into() }
    }
}

#[derive(Debug, Serialize, Deserialize)]
struct LockedRecord {
    by: String,
    reason: String,
    at: Millis,
}

impl From<&Environment> for EnvironmentRecord {
    fn from(environment: &Environment) -> Self {
        let settings = environment.settings.clone();
        Self {
            id: Text(environment.id),
            organization: Text(environment.organization),
            name: environment.name.clone(),
            policy: settings.policy,
            auto_apply: settings.auto_apply,
            working_directory: settings.working_directory,
            pool: settings.pool.map(Text),
            session_seconds: settings.session_duration.as_secs(),
            plain_credentials: settings.plain_credentials,
            region: settings.region,
            runner_labels: settings.runner_labels,
            engine: settings.engine,
            engine_version: settings.engine_version,
            second_person: settings.second_person,
            plan_rule: PlanRuleRecord::from(&settings.plan_rule),
            code_credentials: settings.code_credentials,
            roles: settings.roles,
            floor_seconds: settings.session_floor.as_secs(),
            limits: settings.limits,
            holder: environment.hold.holder.map(Text),
            frozen: environment.hold.frozen.as_ref().map(|frozen| FrozenRecord {
                run: Text(frozen.run),
                reason: frozen.reason.clone(),
            }),
            state_lock: environment.hold.state_lock.as_ref().map(StateLockRecord::from),
            locked: environment.hold.locked.as_ref().map(|locked| LockedRecord {
                by: locked.by.clone(),
                reason: locked.reason.clone(),
                at: locked.at.into(),
            }),
            break_glass: environment.break_glass.clone(),
            state: environment.state.clone(),
            created_at: environment.created_at.into(),
        }
    }
}

impl From<EnvironmentRecord> for Environment {
    fn from(record: EnvironmentRecord) -> Self {
        Self {
            id: record.id.0,
            organization: record.organization.0,
            name: record.name,
            settings: Settings {
                policy: record.policy,
                auto_apply: record.auto_apply,
                working_directory: record.working_directory,
                pool: record.pool.map(|pool| pool.0),
                session_duration: Duration::from_secs(record.session_seconds),
                plain_credentials: record.plain_credentials,
                region: record.region,
                runner_labels: record.runner_labels,
                engine: record.engine,
                engine_version: record.engine_version,
                second_person: record.second_person,
                plan_rule: record.plan_rule.into(),
                code_credentials: record.code_credentials,
                roles: record.roles,
                session_floor: Duration::from_secs(record.floor_seconds),
                limits: record.limits,
            },
            hold: Hold {
                holder: record.holder.map(|run| run.0),
                frozen: record
                    .frozen
                    .map(|frozen| Frozen { run: frozen.run.0, reason: frozen.reason }),
                state_lock: record.state_lock.map(StateLock::from),
                locked: record.locked.map(|locked| Locked {
                    by: locked.by,
                    reason: locked.reason,
                    at: locked.at.into(),
                }),
            },
            break_glass: record.break_glass,
            state: record.state,
            created_at: record.created_at.into(),
        }
    }
}
