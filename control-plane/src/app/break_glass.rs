//! Break-glass: what whoever has the control plane's host may do when a device is lost.
//!
//! It takes no code, since there is none to be had. So it is loud: audited in the organization's
//! chain as the actor `host`, told to every webhook and recipient of mail, and shown with every
//! environment it touched until a change that a code backs sets the policy again; and told to each
//! owner, by [`owners`], until they have acknowledged it.

mod owners;

use std::sync::Arc;

use latchkey_domain::id::{OrganizationId, UserId};
use latchkey_domain::policy::MfaPolicy;
use serde::{Deserialize, Serialize};

use super::App;
use super::notices::News;
use super::secrets::TRIPLE;
use super::settings::shown;
use crate::error::{Error, Result};
use crate::store::keys::VariableScope;
use crate::store::record::environment::{BreakGlass, Environment, EnvironmentRecord};
use crate::store::record::notice::Event;
use crate::store::record::people::Membership;
use crate::store::record::variable::{Category, stored_name};
use crate::store::record::{self, Loaded, Text, encode};
use crate::store::{Batch, CommitError, Expect, keys};

const LONGEST_REASON: usize = 500;
const ATTEMPTS: usize = 16;
const ACTOR: &str = "host";
/// Notices to owners go by this name.
const ACTION: &str = "break_glass";

/// What is to be broken.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Glass {
    /// The level of an environment, or of all.
    Policy { environment: Option<String>, level: Level },
    /// The triple of the organization, or that of one person.
    Triple { user: Option<String> },
}

/// The levels that it sets: what is stricter than these, owners set without a code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Level {
    Never,
    AppliesOnly,
}

/// What was done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Broken {
    /// One sentence each.
    pub done: Vec<String>,
    /// Webhooks and recipients of mail that are told.
    pub told: usize,
}

impl App {
    /// Breaks the glass.
    pub(crate) async fn break_glass(
        self: &Arc<Self>,
        organization: &str,
        glass: &Glass,
        reason: &str,
    ) -> Result<Broken> {
        let reason = reason.trim();
        if reason.is_empty() || reason.chars().count() > LONGEST_REASON {
            return Err(Error::field("reason", "say why, in 1 to 500 characters"));
        }
        let reason: String = reason.chars().filter(|c| !c.is_control()).collect();
        let found: Option<Loaded<Text<OrganizationId>>> =
            self.fetch(keys::organization_by_name(organization)).await?;
        let id = found.ok_or_else(|| Error::not_found("organization"))?.value.0;
        let done = match glass {
            Glass::Policy { environment, level } => {
                let policy = match level {
                    Level::Never => MfaPolicy::Never,
                    Level::AppliesOnly => MfaPolicy::AppliesOnly,
                };
                let environments = match environment {
                    Some(name) => vec![self.environment_named(id, name).await?.value],
                    None => self.environments_in(id).await?,
                };
                let mut done = vec![];
                for environment in environments {
                    done.extend(self.break_policy(environment, policy, &reason).await?);
                }
                done
            }
            Glass::Triple { user } => self.break_triple(id, user.as_deref(), &reason).await?,
        };
        let told = self.subscriptions(id).await?.value.selections().count();
        Ok(Broken { done, told })
    }

    async fn environments_in(&self, organization: OrganizationId) -> Result<Vec<Environment>> {
        let mut environments = vec![];
        for (key, found) in self.list(keys::environments_of(organization)).await? {
            let record: EnvironmentRecord = record::decode(&key, &found)?;
            environments.push(Environment::from(record));
        }
        Ok(environments)
    }

    /// Sets an environment's level, and takes away its plan rule and second person, which would
    /// stand in the way alike.
    async fn break_policy(
        &self,
        environment: Environment,
        policy: MfaPolicy,
        reason: &str,
    ) -> Result<Option<String>> {
        for _ in 0..ATTEMPTS {
            let found = self.environment(environment.organization, environment.id).await?;
            let before = found.value;
            let mut next = before.clone();
            next.settings.policy = policy.min(before.settings.policy);
            next.settings.plan_rule = Default::default();
            next.settings.second_person = false;
            if next.settings == before.settings {
                return Ok(None);
            }
            let what = format!("the policy was set to {}", level_name(next.settings.policy));
            next.break_glass = Some(self.broken(reason, &what));
            let draft = self
                .draft(next.organization, ACTOR, ACTION, format!("environment {}", next.name))
                .with("reason", reason)
                .with("before", shown(&before.settings))
                .with("after", shown(&next.settings));
            let record = encode(&EnvironmentRecord::from(&next));
            let batch = Batch::new().put(found.key, Expect::At(found.version), record).audit(draft);
            let batch = self
                .announce(
                    batch,
                    next.organization,
                    News {
                        event: Event::BreakGlass,
                        run: None,
                        environment: Some((next.id, &next.name)),
                        reason: Some(reason),
                    },
                )
                .await?;
            let told = format!("environment {}: {what}", next.name);
            let batch = self.tell_owners(batch, next.organization, &told, reason);
            match self.store.commit(batch).await {
                Ok(_) => {
                    tracing::warn!(environment = next.name, reason, "break-glass: {what}");
                    return Ok(Some(told));
                }
                Err(CommitError::Conflict { .. }) => {}
                Err(error @ CommitError::Store(_)) => return Err(error.into()),
            }
        }
        Err(CommitError::Conflict {
            key: keys::environment(environment.organization, environment.id),
        }
        .into())
    }

    async fn break_triple(
        &self,
        organization: OrganizationId,
        user: Option<&str>,
        reason: &str,
    ) -> Result<Vec<String>> {
        let (scope, whose) = match user {
            None => (VariableScope::Organization(organization), "the organization".to_owned()),
            Some(name) => {
                let missing = || Error::not_found("member of this name");
                let found: Option<Loaded<Text<UserId>>> =
                    self.fetch(keys::user_by_name(name)).await?;
                let id = found.ok_or_else(missing)?.value.0;
                let member: Option<Loaded<Membership>> =
                    self.fetch(keys::membership(organization, id)).await?;
                member.ok_or_else(missing)?;
                (VariableScope::Personal(organization, id), name.to_owned())
            }
        };
        let what = format!("the keys and the device of {whose} were cleared");
        let draft = self
            .draft(organization, ACTOR, ACTION, format!("triple of {whose}"))
            .with("reason", reason)
            .with("what", what.as_str());
        // First: should the host go down between, it is seen that something was done.
        for environment in self.environments_in(organization).await? {
            self.mark_broken(&environment, self.broken(reason, &what)).await?;
        }
        let batch = TRIPLE.iter().fold(Batch::new(), |batch, name| {
            let key = keys::variable(scope, &stored_name(Category::Environment, name));
            batch.delete(key, Expect::Anything)
        });
        let batch = self.without_guard(batch, organization, scope).await?;
        let news =
            News { event: Event::BreakGlass, run: None, environment: None, reason: Some(reason) };
        let batch = self.announce(batch.audit(draft), organization, news).await?;
        let batch = self.tell_owners(batch, organization, &what, reason);
        self.store.commit(batch).await?;
        tracing::warn!(reason, "break-glass: {what}");
        Ok(vec![what])
    }

    async fn mark_broken(&self, environment: &Environment, broken: BreakGlass) -> Result<()> {
        for _ in 0..ATTEMPTS {
            let found = self.environment(environment.organization, environment.id).await?;
            let mut next = found.value;
            next.break_glass = Some(broken.clone());
            let record = encode(&EnvironmentRecord::from(&next));
            let batch = Batch::new().put(found.key, Expect::At(found.version), record);
            match self.store.commit(batch).await {
                Ok(_) => return Ok(()),
                Err(CommitError::Conflict { .. }) => {}
                Err(error @ CommitError::Store(_)) => return Err(error.into()),
            }
        }
        Err(CommitError::Conflict {
            key: keys::environment(environment.organization, environment.id),
        }
        .into())
    }

    fn broken(&self, reason: &str, what: &str) -> BreakGlass {
        BreakGlass { at: self.now().into(), reason: reason.to_owned(), what: what.to_owned() }
    }
}

const fn level_name(policy: MfaPolicy) -> &'static str {
    match policy {
        MfaPolicy::Never => "never",
        MfaPolicy::AppliesOnly => "applies only",
        MfaPolicy::PlansAndApplies => "plans and applies",
    }
}

#[cfg(test)]
mod tests;
