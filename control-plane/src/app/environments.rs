//! Environments: made, shown and set.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use latchkey_domain::environment::Hold;
use latchkey_domain::id::{EnvironmentId, OrganizationId, PoolId, RunId, UserId};
use latchkey_domain::policy::MfaPolicy;
use latchkey_domain::run::RunState;
use latchkey_proto::v1::Reason;
use serde_json::Value;

use super::{App, Page, PageRequest, check_name, check_request_id};
use crate::auth::{Caller, Right};
use crate::error::{Error, Result};
use crate::job::{ENGINES, is_label};
use crate::store::record::environment::{
    Environment, EnvironmentRecord, PlainCredentials, Settings,
};
use crate::store::record::{Loaded, Text, encode};
use crate::store::{Batch, CommitError, Expect, Scan, keys};

/// How many labels an environment may demand.
const MOST_LABELS: usize = 16;
const SHORTEST_SESSION: Duration = Duration::from_secs(15 * 60);
const LONGEST_SESSION: Duration = Duration::from_secs(36 * 3600);

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
}

/// An environment with the names that people know.
#[derive(Debug)]
pub struct EnvironmentView {
    pub environment: Environment,
    pub organization_name: String,
    pub pool_name: String,
}

impl App {
    pub async fn create_environment(
        &self,
        caller: &Caller,
        organization: &str,
        name: &str,
        settings: SettingsChange,
        request_id: &str,
    ) -> Result<EnvironmentView> {
        let standing = self.standing(caller, organization, Right::Own).await?;
        check_name("environment", name)?;
        check_request_id(request_id)?;
        let organization = standing.organization;
        let request = keys::request(
            request_owner(caller),
            &format!("environment:{organization}:{request_id}"),
        );
        if let Some(made) = self.fetch::<Text<EnvironmentId>>(request.clone()).await? {
            let environment = self.environment(organization, made.value.0).await?.value;
            return self.environment_view(environment, standing.organization_name).await;
        }
        let environment = Environment {
            id: EnvironmentId::from_uuid(self.new_id()),
            organization,
            name: name.to_owned(),
            settings: self.changed(organization, Settings::default(), settings).await?,
            hold: Hold::default(),
            state: None,
            created_at: self.now(),
        };
        let id = encode(&Text(environment.id));
        let record = encode(&EnvironmentRecord::from(&environment));
        let draft = self
            .draft(
                organization,
                caller.audit_name(),
                "create_environment",
                format!("environment {name}"),
            )
            .with("settings", shown(&environment.settings));
        let batch = Batch::new()
            .put(keys::environment(organization, environment.id), Expect::Absent, record)
            .put(keys::environment_by_name(organization, name), Expect::Absent, id.clone())
            .put(request, Expect::Absent, id)
            .audit(draft);
        self.commit_named(batch, "environment").await?;
        self.environment_view(environment, standing.organization_name).await
    }

    pub async fn show_environment(
        &self,
        caller: &Caller,
        organization: &str,
        name: &str,
    ) -> Result<EnvironmentView> {
        let standing = self.standing(caller, organization, Right::Read).await?;
        let found = self.environment_named(standing.organization, name).await?;
        self.environment_view(found.value, standing.organization_name).await
    }

    pub async fn list_environments(
        &self,
        caller: &Caller,
        organization: &str,
        page: PageRequest,
    ) -> Result<Page<EnvironmentView>> {
        let standing = self.standing(caller, organization, Right::Read).await?;
        let (size, organization) = (page.size()?, standing.organization);
        let after =
            page.after::<String>()?.map(|name| keys::environment_by_name(organization, &name));
        let scan = Scan::ascending(keys::environments_by_name(organization), size + 1).after(after);
        let found = self.scan(scan).await?;
        let mut items = vec![];
        let mut next = None;
        for (key, value) in found {
            if items.len() == size {
                next = items.last().map(|view: &EnvironmentView| view.environment.name.clone());
                break;
            }
            let id: Text<EnvironmentId> = crate::store::record::decode(&key, &value)?;
            let environment = self.environment(organization, id.0).await?.value;
            let view =
                self.environment_view(environment, standing.organization_name.clone()).await?;
            items.push(view);
        }
        Ok(Page { items, next })
    }

    pub async fn update_environment(
        self: &Arc<Self>,
        caller: &Caller,
        organization: &str,
        name: &str,
        change: SettingsChange,
    ) -> Result<EnvironmentView> {
        let standing = self.standing(caller, organization, Right::Own).await?;
        let Loaded { key, version, value } =
            self.environment_named(standing.organization, name).await?;
        let mut next = value.clone();
        next.settings = self.changed(standing.organization, value.settings.clone(), change).await?;
        let draft = self
            .draft(
                standing.organization,
                caller.audit_name(),
                "update_environment",
                format!("environment {name}"),
            )
            .with("before", shown(&value.settings))
            .with("after", shown(&next.settings));
        let record = encode(&EnvironmentRecord::from(&next));
        let batch = Batch::new().put(key, Expect::At(version), record).audit(draft);
        self.store.commit(batch).await.map_err(|error| match error {
            CommitError::Conflict { .. } | CommitError::Store(_) => Error::from(error),
        })?;
        if asks(&next.settings) != asks(&value.settings) {
            self.offer_again(&next).await?;
        }
        self.environment_view(next, standing.organization_name).await
    }

    /// Lets an environment start runs again after a person has dealt with what a run left.
    pub async fn unfreeze_environment(
        self: &Arc<Self>,
        caller: &Caller,
        organization: &str,
        name: &str,
        run: RunId,
    ) -> Result<EnvironmentView> {
        let standing = self.standing(caller, organization, Right::Own).await?;
        let found = self.environment_named(standing.organization, name).await?;
        if self.run(run).await?.value.request.environment != found.value.id {
            return Err(Error::not_found("run of this environment"));
        }
        let frozen = found.value.hold.frozen.as_ref();
        if frozen.is_none() {
            return self.environment_view(found.value, standing.organization_name).await;
        }
        if frozen.is_some_and(|frozen| frozen.run != run) {
            let message = "another run froze the environment; `latchkey env show` names it";
            return Err(Error::field("run_id", message));
        }
        if self.run(run).await?.value.state == RunState::Lost {
            let message = "the run is lost but not given up: its runner may still be applying. \
                           Cancel the run first";
            return Err(Error::refused(Reason::WrongState, message));
        }
        let mut next = found.value;
        next.hold.frozen = None;
        let draft = self
            .draft(
                standing.organization,
                caller.audit_name(),
                "unfreeze_environment",
                format!("environment {name}"),
            )
            .with("run", run.to_string());
        let record = encode(&EnvironmentRecord::from(&next));
        let batch = Batch::new().put(found.key, Expect::At(found.version), record).audit(draft);
        self.store.commit(batch).await?;
        self.give_turns(standing.organization, next.id).await?;
        let next = self.environment(standing.organization, next.id).await?.value;
        self.environment_view(next, standing.organization_name).await
    }

    /// Moves the environment's open job to the pool that it now belongs to.
    async fn offer_again(&self, environment: &Environment) -> Result<()> {
        for (key, _) in self.list(keys::open_runs()).await? {
            let Some(id) = key.last_id().map(RunId::from_bytes) else { continue };
            let run = self.run(id).await?.value;
            if run.request.environment != environment.id {
                continue;
            }
            if let Some(phase) = run.open_phase() {
                self.dispatch.withdraw(run.job_id(phase));
                self.offer(&run, phase, environment);
            }
        }
        Ok(())
    }

    async fn changed(
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
        } = change;
        settings.policy = policy.unwrap_or(settings.policy);
        settings.auto_apply = auto_apply.unwrap_or(settings.auto_apply);
        settings.plain_credentials = plain_credentials.unwrap_or(settings.plain_credentials);
        if let Some(directory) = working_directory {
            settings.working_directory = checked_directory(directory)?;
        }
        if let Some(duration) = session_duration {
            if !(SHORTEST_SESSION..=LONGEST_SESSION).contains(&duration) {
                let message = "a session lasts 15 minutes to 36 hours";
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
        if let Some(name) = pool {
            settings.pool = if name.is_empty() {
                None
            } else {
                let found = self.fetch::<Text<PoolId>>(keys::pool_by_name(organization, &name));
                let missing = || Error::field("pool", "no such pool; `latchkey pool create` one");
                Some(found.await?.ok_or_else(missing)?.value.0)
            };
        }
        Ok(settings)
    }

    pub(super) async fn environment_view(
        &self,
        environment: Environment,
        organization_name: String,
    ) -> Result<EnvironmentView> {
        let pool_name = match environment.settings.pool {
            Some(pool) => self.pool(environment.organization, pool).await?.name,
            None => String::new(),
        };
        Ok(EnvironmentView { environment, organization_name, pool_name })
    }
}

/// Request ids are kept per caller; programs have their own space of ids.
pub(super) fn request_owner(caller: &Caller) -> UserId {
    match caller {
        Caller::User { id, .. } => *id,
        Caller::Service { id, .. } => UserId::from_bytes(*id.as_bytes()),
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
fn asks(settings: &Settings) -> (Option<PoolId>, &BTreeMap<String, String>, &str, &str) {
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

/// Settings as audit records show them.
fn shown(settings: &Settings) -> Value {
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
        },
        "region": settings.region,
        "runner_labels": settings.runner_labels,
        "engine": settings.engine,
        "engine_version": settings.engine_version,
    })
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
