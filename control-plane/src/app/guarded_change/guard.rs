//! Which device a change takes a code of, if it takes one.

use latchkey_domain::id::UserId;
use latchkey_proto::v1::Reason;

use super::weakens::weakens;
use super::{GuardedChange, Intent};
use crate::app::App;
use crate::app::secrets::{SECRET_KEY, SERIAL, TRIPLE};
use crate::app::variables::NewVariable;
use crate::error::{Error, Result};
use crate::store::keys::VariableScope;
use crate::store::record::environment::Settings;
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
            GuardedChange::Create { settings, .. } => {
                let before = Settings::default();
                let after = self.changed(organization, before.clone(), *settings.clone()).await?;
                if !weakens(&before, &after) {
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
                        guard.triple =
                            self.triple_of_own(intent, user, &mut guard.rests_on).await?;
                        return Ok(guard);
                    }
                    VariableScope::Organization(_) => {}
                    VariableScope::Environment(..) | VariableScope::Run(_) => return Ok(guard),
                }
            }
        }
        guard.triple = self.triple_of_change(intent, user, &mut guard.rests_on).await?;
        Ok(guard)
    }

    /// Finds the caller's own triple, else the organization's. Where neither is whole but the
    /// organization is guarded, somebody else's device or one that is gone is what guards.
    async fn triple_of_change(
        &self,
        intent: &Intent,
        user: UserId,
        rests_on: &mut Vec<(Key, Expect)>,
    ) -> Result<Option<Triple>> {
        let organization = intent.organization;
        let personal = VariableScope::Personal(organization, user);
        for scope in [personal, VariableScope::Organization(organization)] {
            let found = self.triple_in(scope, rests_on).await?;
            if found.is_some() {
                return Ok(found);
            }
        }
        let found = self.organization(organization).await?;
        rests_on.push((found.key, Expect::At(found.version)));
        if self.completes(intent, VariableScope::Organization(organization), user).await? {
            return Ok(None);
        }
        let is_set_up = match &intent.change {
            // Nobody could give a code: as after break-glass, somebody sets one.
            GuardedChange::SetVariable { .. } => !self.any_triple(organization, None).await?,
            GuardedChange::Settings { .. }
            | GuardedChange::Create { .. }
            | GuardedChange::Accounts(_)
            | GuardedChange::DeleteVariable { .. } => false,
        };
        if !found.value.guarded || is_set_up {
            return Ok(None);
        }
        let message = "this weakens what a token code protects, so it takes one, and you have no \
                       device to give it with: set your own access key, secret key and MFA serial \
                       first (`latchkey var set --personal`)";
        Err(Error::refused(Reason::TripleIncomplete, message))
    }

    /// Finds whose code a change of the caller's own triple takes: their own; for the first one of
    /// an owner the organization's, or they would choose for themselves what guards.
    async fn triple_of_own(
        &self,
        intent: &Intent,
        user: UserId,
        rests_on: &mut Vec<(Key, Expect)>,
    ) -> Result<Option<Triple>> {
        let organization = intent.organization;
        let personal = VariableScope::Personal(organization, user);
        let own = self.triple_in(personal, rests_on).await?;
        if own.is_some() || self.completes(intent, personal, user).await? {
            return Ok(own);
        }
        let makes_whole = match &intent.change {
            GuardedChange::SetVariable { variable, .. } => {
                self.makes_whole(personal, &variable.name).await?
            }
            GuardedChange::Settings { .. }
            | GuardedChange::Create { .. }
            | GuardedChange::Accounts(_)
            | GuardedChange::DeleteVariable { .. } => false,
        };
        if !makes_whole || !self.is_owner(organization, user).await? {
            return Ok(None);
        }
        self.triple_in(VariableScope::Organization(organization), rests_on).await
    }

    /// Tells whether a change goes on with a triple whose access key the caller has replaced by a
    /// code. The scope's stamp says so, on which the change rests.
    async fn completes(&self, intent: &Intent, scope: VariableScope, user: UserId) -> Result<bool> {
        let GuardedChange::SetVariable { stored, variable, .. } = &intent.change else {
            return Ok(false);
        };
        if *stored != scope || ![SECRET_KEY, SERIAL].contains(&variable.name.as_str()) {
            return Ok(false);
        }
        let stamp = self.store.fetch(&keys::variable_stamp(scope)).await?;
        Ok(stamp.is_some_and(|found| found.value[..] == user.as_bytes()[..]))
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
