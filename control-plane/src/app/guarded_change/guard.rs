//! Which device a change takes a code of, if it takes one.

use latchkey_domain::id::{OrganizationId, UserId};

use super::weakens::weakens;
use super::{GuardedChange, Intent};
use crate::app::App;
use crate::app::secrets::TRIPLE;
use crate::app::variables::NewVariable;
use crate::error::Result;
use crate::store::keys::VariableScope;
use crate::store::record::variable::Category;
use crate::store::{Expect, Key, keys};
use crate::sts::Triple;

/// Whose code a change takes.
#[derive(Debug, Default)]
pub(super) struct Guard {
    /// None: it takes no code.
    pub(super) triple: Option<Triple>,
    /// What says so. A change without a code is made only while it is as it was read.
    pub(super) rests_on: Vec<(Key, Expect)>,
}

impl App {
    /// Answers the triple whose code a change takes, if it takes one. With a code that is given
    /// also a stricter policy takes one, where the one before was set on the host.
    pub(super) async fn guard_of_change(
        &self,
        intent: &Intent,
        user: UserId,
        given: bool,
    ) -> Result<Guard> {
        let Intent { organization, change, .. } = intent;
        let organization = *organization;
        let mut guard = Guard::default();
        match change {
            GuardedChange::Settings { environment, change } => {
                let found = self.environment(organization, *environment).await?;
                guard.rests_on.push((found.key, Expect::At(found.version)));
                let found = found.value;
                let before = found.settings;
                let after = self.changed(organization, before.clone(), *change.clone()).await?;
                let mends = given && found.break_glass.is_some() && change.sets_policy();
                if !weakens(&before, &after) && !mends {
                    return Ok(guard);
                }
            }
            GuardedChange::Accounts(accounts) => {
                let found = self.organization(organization).await?;
                guard.rests_on.push((found.key, Expect::At(found.version)));
                let listed = found.value.aws_accounts;
                // With none, no code can be spent.
                if listed.is_empty() || listed == *accounts {
                    return Ok(guard);
                }
            }
            GuardedChange::SetVariable {
                stored,
                variable: NewVariable { name, category, .. },
                ..
            }
            | GuardedChange::DeleteVariable { stored, name, category, .. } => {
                if *category != Category::Environment || !TRIPLE.contains(&name.as_str()) {
                    return Ok(guard);
                }
                match stored {
                    VariableScope::Personal(..) => {
                        guard.triple = self.triple_in(*stored, &mut guard.rests_on).await?;
                        return Ok(guard);
                    }
                    VariableScope::Organization(_) => {}
                    VariableScope::Environment(..) | VariableScope::Run(_) => return Ok(guard),
                }
            }
        }
        guard.triple = self.triple_of_change(organization, user, &mut guard.rests_on).await?;
        Ok(guard)
    }

    /// Finds the caller's own triple, else the organization's.
    async fn triple_of_change(
        &self,
        organization: OrganizationId,
        user: UserId,
        rests_on: &mut Vec<(Key, Expect)>,
    ) -> Result<Option<Triple>> {
        let personal = VariableScope::Personal(organization, user);
        for scope in [personal, VariableScope::Organization(organization)] {
            let found = self.triple_in(scope, rests_on).await?;
            if found.is_some() {
                return Ok(found);
            }
        }
        Ok(None)
    }

    /// Finds a whole triple, and notes what says that there is none.
    async fn triple_in(
        &self,
        scope: VariableScope,
        rests_on: &mut Vec<(Key, Expect)>,
    ) -> Result<Option<Triple>> {
        // Before the variables: whoever sets one meanwhile writes it again.
        let stamp = keys::variable_stamp(scope);
        let found = self.store.fetch(&stamp).await?;
        rests_on.push((stamp, found.map_or(Expect::Absent, |found| Expect::At(found.version))));
        self.guarding_triple(scope).await
    }
}
