//! The settings of an environment: what may be said, and by whom.

use std::collections::BTreeMap;
use std::time::Duration;

use latchkey_domain::id::{OrganizationId, PoolId};
use latchkey_domain::policy::{MfaPolicy, Phase, PlanRule};
use serde_json::Value;

use super::App;
use super::credentials::life;
use crate::error::{Error, Result};
use crate::job::{ENGINES, is_label};
use crate::store::keys;
use crate::store::record::Text;
use crate::store::record::environment::{
    CodeCredentials, Limits, PlainCredentials, PlanRuleRecord, RoleSettings, Roles, Settings,
};
use crate::sts::errors::in_words;
use crate::sts::{LONGEST_ROLE_SESSION, partition_of, partition_of_region};

/// How many labels an environment may demand.
const MOST_LABELS: usize = 16;
const SHORTEST_SESSION: Duration = Duration::from_secs(15 * 60);
const LONGEST_SESSION: Duration = Duration::from_secs(36 * 3600);
/// Of an environment's floor.
pub(super) const LONGEST_FLOOR: Duration = Duration::from_secs(12 * 3600);
/// How much longer than the floor a session lives, so that it can wait for a runner.
pub(super) const TIME_TO_START: Duration = Duration::from_secs(5 * 60);
const MOST_RESOURCE_TYPES: usize = 64;
/// Of a session policy and the ARNs beside it, in characters (AWS STS, `AssumeRole`).
const LARGEST_POLICY: usize = 2048;
/// As they are shown, in bytes: an audit record holds them as they were and as they are.
const LARGEST: usize = 14 * 1024;
const MOST_POLICY_ARNS: usize = 10;
const DAY: u64 = 86_400;

/// Settings as a caller gives them: what is absent stays as it is.
#[derive(Clone, Debug, Default)]
pub struct SettingsChange {
    pub policy: Option<MfaPolicy>,
    pub auto_apply: Option<bool>,
    pub working_directory: Option<String>,
    /// The pool's name; empty for none.
    pub pool: Option<String>,
    pub session_duration: Option<Duration>,
    pub plain_credentials: Option<PlainCredentials>,
    pub region: Option<String>,
    /// All labels, in place of those before.
    pub runner_labels: Option<BTreeMap<String, String>>,
    pub engine: Option<String>,
    pub engine_version: Option<String>,
    pub second_person: Option<bool>,
    /// The whole rule, in place of the one before.
    pub plan_rule: Option<PlanRule>,
    pub code_credentials: Option<CodeCredentials>,
    /// Both, in place of those before.
    pub roles: Option<Roles>,
    pub session_floor: Option<Duration>,
    /// All, in place of those before.
    pub limits: Option<Limits>,
}

impl SettingsChange {
    /// Tells whether it says what an apply must be approved by.
    pub fn sets_policy(&self) -> bool {
        self.policy.is_some() || self.plan_rule.is_some() || self.second_person.is_some()
    }

    /// Tells whether it names a setting that only owners change: what a phase must be approved
    /// by, and what it gets.
    pub fn is_for_owners(&self) -> bool {
        let Self {
            policy,
            auto_apply,
            plain_credentials,
            second_person,
            plan_rule,
            code_credentials,
            roles,
            working_directory: _,
            pool: _,
            session_duration: _,
            region: _,
            runner_labels: _,
            engine: _,
            engine_version: _,
            session_floor: _,
            limits: _,
        } = self;
        policy.is_some()
            || auto_apply.is_some()
            || plain_credentials.is_some()
            || second_person.is_some()
            || plan_rule.is_some()
            || code_credentials.is_some()
            || roles.is_some()
    }
}

impl App {
    pub(super) async fn changed(
        &self,
        organization: OrganizationId,
        mut settings: Settings,
        change: SettingsChange,
    ) -> Result<Settings> {
        let SettingsChange {
            policy,
            auto_apply,
            working_directory,
            pool,
            session_duration,
            plain_credentials,
            region,
            runner_labels,
            engine,
            engine_version,
            second_person,
            plan_rule,
            code_credentials,
            roles,
            session_floor,
            limits,
        } = change;
        let size_before = size(&settings);
        let lives_before = lives(&settings, self.floor(&settings));
        settings.policy = policy.unwrap_or(settings.policy);
        settings.auto_apply = auto_apply.unwrap_or(settings.auto_apply);
        settings.plain_credentials = plain_credentials.unwrap_or(settings.plain_credentials);
        if let Some(directory) = working_directory {
            settings.working_directory = checked_directory(directory)?;
        }
        if let Some(duration) = session_duration {
            if !(SHORTEST_SESSION..=LONGEST_SESSION).contains(&duration) {
                let message = "a session lasts 15 minutes to 36 hours; give one between, such as \
                               `--session-duration 1h`";
                return Err(Error::field("session_duration", message));
            }
            settings.session_duration = duration;
        }
        if let Some(region) = region {
            let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
            if !(4..=32).contains(&region.len()) || !region.bytes().all(allowed) {
                return Err(Error::field("region", "give an AWS region, such as eu-central-1"));
            }
            settings.region = region;
        }
        if let Some(labels) = runner_labels {
            settings.runner_labels = checked_labels(labels)?;
        }
        settings.engine = engine.unwrap_or(settings.engine);
        settings.engine_version = engine_version.unwrap_or(settings.engine_version);
        check_engine(&settings.engine, &settings.engine_version)?;
        settings.second_person = second_person.unwrap_or(settings.second_person);
        settings.code_credentials = code_credentials.unwrap_or(settings.code_credentials);
        if let Some(rule) = plan_rule {
            settings.plan_rule = checked_rule(rule)?;
        }
        if let Some(roles) = roles {
            check_role("roles.plan", &roles.plan)?;
            check_role("roles.apply", &roles.apply)?;
            settings.roles = roles;
        }
        check_modes(&settings)?;
        if let Some(floor) = session_floor {
            if floor > LONGEST_FLOOR {
                return Err(Error::field("session_floor", "a floor is up to 12 hours"));
            }
            settings.session_floor = floor;
        }
        if let Some(limits) = limits {
            settings.limits = checked_limits(limits)?;
        }
        // What was saved before there was this bound does not stand in the way of other changes.
        if lives(&settings, self.floor(&settings)) != lives_before {
            check_floor(&settings, self.floor(&settings))?;
        }
        if let Some(name) = pool {
            settings.pool = if name.is_empty() {
                None
            } else {
                let found = self.fetch::<Text<PoolId>>(keys::pool_by_name(organization, &name));
                let missing = || Error::field("pool", "no such pool; `latchkey pool create` one");
                Some(found.await?.ok_or_else(missing)?.value.0)
            };
        }
        if size(&settings) > LARGEST.max(size_before) {
            let message = "the roles' policies, the plan rule's resource types and the labels come \
                           to more than 14 KiB together, as JSON writes them; shorten them";
            return Err(Error::field("roles", message));
        }
        Ok(settings)
    }
}

fn checked_directory(directory: String) -> Result<String> {
    let fits = directory.len() <= 256
        && !directory.starts_with('/')
        && !directory.chars().any(|c| c.is_control() || c == '\\')
        && directory.split('/').all(|part| part != "..");
    if !fits {
        return Err(Error::field(
            "working_directory",
            "give a relative path inside the archive, without `..`, up to 256 bytes",
        ));
    }
    Ok(directory
        .split('/')
        .filter(|part| !part.is_empty() && *part != ".")
        .collect::<Vec<_>>()
        .join("/"))
}

/// What of the settings decides who may take a job.
pub(super) fn asks(settings: &Settings) -> (Option<PoolId>, &BTreeMap<String, String>, &str, &str) {
    let Settings { pool, runner_labels, engine, engine_version, .. } = settings;
    (*pool, runner_labels, engine, engine_version)
}

fn checked_labels(labels: BTreeMap<String, String>) -> Result<BTreeMap<String, String>> {
    if labels.len() > MOST_LABELS {
        return Err(Error::field("runner_labels", "an environment demands up to 16 labels"));
    }
    if labels.iter().all(|(name, value)| is_label(name, value)) {
        return Ok(labels);
    }
    let message = "a label is NAME=VALUE, each of up to 63 letters, digits, `.`, `_`, `-` and `/`";
    Err(Error::field("runner_labels", message))
}

/// Checks that an engine is known, and that its version names exactly one.
fn check_engine(engine: &str, version: &str) -> Result<()> {
    if !engine.is_empty() && !ENGINES.contains(&engine) {
        return Err(Error::field("engine", "it is terraform or tofu, or empty"));
    }
    if version.is_empty() {
        return Ok(());
    }
    if engine.is_empty() {
        let message = "say which engine it is a version of: terraform or tofu";
        return Err(Error::field("engine", message));
    }
    if is_exact(version) {
        return Ok(());
    }
    Err(Error::field("engine_version", "give one exact version, such as 1.9.0 or 1.10.0-rc1"))
}

/// Tells whether this is one semantic version, without build metadata: two builds of a version
/// could not be told apart.
pub(super) fn is_exact(version: &str) -> bool {
    let (core, pre) = match version.split_once('-') {
        Some((core, pre)) => (core, Some(pre)),
        None => (version, None),
    };
    let is_number = |part: &str| {
        (1..=9).contains(&part.len())
            && part.bytes().all(|b| b.is_ascii_digit())
            && (part == "0" || !part.starts_with('0'))
    };
    let is_identifier = |part: &str| {
        let digits = part.bytes().all(|b| b.is_ascii_digit());
        !part.is_empty()
            && part.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
            && (!digits || part == "0" || !part.starts_with('0'))
    };
    version.len() <= 64
        && core.split('.').count() == 3
        && core.split('.').all(is_number)
        && pre.is_none_or(|pre| pre.split('.').all(is_identifier))
}

fn checked_rule(rule: PlanRule) -> Result<PlanRule> {
    let is_type = |name: &String| {
        let stem = name.strip_suffix('*').unwrap_or(name);
        (1..=128).contains(&name.len())
            && stem.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-')
    };
    if rule.resource_types.len() <= MOST_RESOURCE_TYPES && rule.resource_types.iter().all(is_type) {
        return Ok(rule);
    }
    let message = "name up to 64 resource types, such as aws_iam_role or aws_iam_*";
    Err(Error::field("plan_rule.resource_types", message))
}

/// Checks a role against what AWS takes (`AssumeRole`); an empty one is none.
fn check_role(field: &'static str, role: &RoleSettings) -> Result<()> {
    let RoleSettings { arn, policy, policy_arns } = role;
    if arn.is_empty() {
        if policy.is_empty() && policy_arns.is_empty() {
            return Ok(());
        }
        return Err(Error::field(field, "policies without a role's ARN narrow nothing"));
    }
    let parts: Vec<&str> = arn.splitn(6, ':').collect();
    let is_role = matches!(
        parts.as_slice(),
        ["arn", partition, "iam", "", account, resource]
            if partition.starts_with("aws")
                && account.len() == 12
                && account.bytes().all(|b| b.is_ascii_digit())
                && resource.strip_prefix("role/").is_some_and(|name| !name.is_empty())
    );
    if !is_role || arn.len() > 2048 || !arn.bytes().all(|b| b.is_ascii_graphic()) {
        let message = "give a role's ARN, such as arn:aws:iam::123456789012:role/terraform";
        return Err(Error::field(field, message));
    }
    let size = policy.chars().count() + policy_arns.iter().map(String::len).sum::<usize>();
    if size > LARGEST_POLICY || policy_arns.len() > MOST_POLICY_ARNS {
        let message = "a session policy and up to 10 managed ones have 2,048 characters together";
        return Err(Error::field(field, message));
    }
    let is_taken = |c: char| matches!(c, '\t' | '\n' | '\r' | ' '..='\u{ff}');
    if !policy.chars().all(is_taken) {
        let message = "AWS takes no characters beyond Latin-1 in a session policy: escape them";
        return Err(Error::field(field, message));
    }
    if !policy.is_empty() && !serde_json::from_str::<Value>(policy).is_ok_and(|p| p.is_object()) {
        return Err(Error::field(field, "the session policy is not a JSON object"));
    }
    let is_policy = |arn: &String| {
        arn.starts_with("arn:aws")
            && arn.contains(":policy/")
            && arn.bytes().all(|b| b.is_ascii_graphic())
    };
    if !policy_arns.iter().all(is_policy) {
        let message =
            "give ARNs of managed policies, such as arn:aws:iam::aws:policy/ReadOnlyAccess";
        return Err(Error::field(field, message));
    }
    Ok(())
}

/// What the floor is held against: itself, and the lives of what a phase may get.
fn lives(settings: &Settings, floor: Duration) -> [Option<Duration>; 3] {
    [Some(floor), life(settings, true), life(settings, false)]
}

/// Checks that whatever a phase may get is above the floor for long enough to be leased out: a code
/// after the other would be spent on what is refused.
fn check_floor(settings: &Settings, floor: Duration) -> Result<()> {
    let lives = [true, false].into_iter().filter_map(|by_code| life(settings, by_code));
    match lives.min() {
        Some(shortest) if shortest < floor + TIME_TO_START => {
            let message = format!(
                "a phase that must have {} to live could get a session of {}: let the floor be 5 \
                 minutes shorter, at least, or the sessions longer; a role's lives up to 12 hours",
                in_words(floor),
                in_words(shortest)
            );
            Err(Error::field("session_floor", message))
        }
        Some(_) | None => Ok(()),
    }
}

/// Checks that each credential mode has what it needs.
fn check_modes(settings: &Settings) -> Result<()> {
    let by_code = settings.code_credentials == CodeCredentials::Role;
    let plain = settings.plain_credentials == PlainCredentials::Role;
    let missing = Phase::ALL.into_iter().find(|phase| settings.roles.of(*phase).arn.is_empty());
    match missing {
        Some(phase) if by_code || plain => {
            let message = format!("the mode `role` needs a role for the {phase}: name its ARN");
            Err(Error::field("roles", message))
        }
        Some(_) | None => check_partitions(settings),
    }
}

/// Checks that the roles can be assumed where the environment's STS is.
fn check_partitions(settings: &Settings) -> Result<()> {
    let expected = partition_of_region(&settings.region);
    let foreign = Phase::ALL.into_iter().find(|phase| {
        partition_of(&settings.roles.of(*phase).arn).is_some_and(|found| found != expected)
    });
    match foreign {
        Some(phase) => {
            let message = format!(
                "the {phase}'s role is not in the partition {expected} of the region {}",
                settings.region
            );
            Err(Error::field("roles", message))
        }
        None => Ok(()),
    }
}

fn checked_limits(limits: Limits) -> Result<Limits> {
    let Limits { person, plan, apply } = limits;
    if person.is_some_and(|seconds| !(60..=366 * DAY).contains(&seconds)) {
        return Err(Error::field("limits.person", "a limit is 1 minute to 366 days"));
    }
    if [plan, apply].into_iter().flatten().any(|seconds| !(60..=36 * 3600).contains(&seconds)) {
        return Err(Error::field("limits", "a phase's limit is 1 minute to 36 hours"));
    }
    Ok(limits)
}

/// Says what of the settings has a price that a person should know.
pub fn warnings(settings: &Settings) -> Vec<String> {
    let mut warnings = vec![];
    let ungated = |phase| !settings.policy.requires_code(phase);
    let phases = match (ungated(Phase::Plan), ungated(Phase::Apply)) {
        (true, true) => Some("plans and applies"),
        (true, false) | (false, true) => Some("plans"),
        (false, false) => None,
    };
    let role = settings.code_credentials == CodeCredentials::Role
        || phases.is_some() && settings.plain_credentials == PlainCredentials::Role;
    if role && settings.session_duration > LONGEST_ROLE_SESSION {
        warnings.push(format!(
            "AWS lets the session of a role live {} at most, so those of this environment's roles \
             live that long and not {}",
            in_words(LONGEST_ROLE_SESSION),
            in_words(settings.session_duration)
        ));
    }
    if let Some(phases) = phases
        && settings.plain_credentials == PlainCredentials::Static
    {
        warnings.push(format!(
            "{phases} get the organization's long-term AWS keys themselves: they leave the control \
             plane, do not expire, and whatever runs there can keep them. Prefer `role` or `session`"
        ));
    }
    warnings
}

/// Settings as audit records show them.
pub(super) fn shown(settings: &Settings) -> Value {
    serde_json::json!({
        "mfa_policy": match settings.policy {
            MfaPolicy::Never => "never",
            MfaPolicy::AppliesOnly => "applies only",
            MfaPolicy::PlansAndApplies => "plans and applies",
        },
        "auto_apply": settings.auto_apply,
        "working_directory": settings.working_directory,
        "pool": settings.pool.map(|pool| pool.to_string()),
        "session_seconds": settings.session_duration.as_secs(),
        "plain_credentials": match settings.plain_credentials {
            PlainCredentials::Session => "session",
            PlainCredentials::None => "none",
            PlainCredentials::Role => "role",
            PlainCredentials::Static => "static",
        },
        "region": settings.region,
        "runner_labels": settings.runner_labels,
        "engine": settings.engine,
        "engine_version": settings.engine_version,
        "second_person": settings.second_person,
        "plan_rule": PlanRuleRecord::from(&settings.plan_rule),
        "code_credentials": settings.code_credentials,
        "roles": settings.roles,
        "floor_seconds": settings.session_floor.as_secs(),
        "limits": settings.limits,
    })
}

fn size(settings: &Settings) -> usize {
    shown(settings).to_string().len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_engine_version_is_exact_and_says_of_what() {
        for version in ["1.9.0", "1.10.0-rc1", "1.10.0-alpha.20241009", "0.12.31"] {
            assert!(check_engine("tofu", version).is_ok(), "{version}");
        }
        for version in
            ["1.9", "1.9.x", "~> 1.9", "01.9.0", "1.9.0-", "1.9.0-01", "1.9.0+build", "v1.9.0", "*"]
        {
            let error = check_engine("terraform", version).unwrap_err();
            assert_eq!(error.field_name(), Some("engine_version"), "{version}");
        }
        assert_eq!(check_engine("", "1.9.0").unwrap_err().field_name(), Some("engine"));
        assert_eq!(check_engine("pulumi", "").unwrap_err().field_name(), Some("engine"));
        assert!(check_engine("tofu", "").is_ok());
    }

    #[test]
    fn labels_are_few_and_plain() {
        let one = |name: &str, value: &str| {
            checked_labels(BTreeMap::from([(name.to_owned(), value.to_owned())]))
        };
        assert!(one("gpu", "yes").is_ok());
        assert!(one("net/zone", "eu-1.a").is_ok());
        for (name, value) in [("", "x"), ("a b", "x"), ("a", "\u{1b}[2J"), ("a", "")] {
            assert!(one(name, value).is_err(), "{name:?}={value:?}");
        }
        let many = (0..17).map(|n| (format!("l{n}"), "x".to_owned())).collect();
        assert!(checked_labels(many).is_err());
    }
}
