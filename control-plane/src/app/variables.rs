//! Variables of environments, organizations and persons.
//!
//! Where names meet, the narrower scope wins; from the widest: organization, environment,
//! personal, and those given for one run. Personal ones and those of the run are fixed when it is
//! queued ([`for_run`]), the others when its plan is released; an apply has what its plan had. The
//! triple exists at organization and personal scope only and never reaches a job.
//!
//! Nobody but the person themselves learns anything of their personal variables, their names
//! included: audit records say only that there was a change.

mod checked;
mod effective;
mod for_run;
mod literal;
mod value;

use std::sync::Arc;

use latchkey_domain::id::{OrganizationId, UserId};
use latchkey_proto::v1::Reason;
use secrecy::{ExposeSecret, SecretString};

use self::checked::{Triple, checked};
pub use self::effective::{EffectiveVariable, Origin};
pub(super) use self::for_run::Given;
pub use self::for_run::JobVariable;
use self::value::Prepared;
use super::guarded_change::{GivenCode, GuardedChange, Intent};
use super::secrets::{ACCESS_KEY, SECRET_KEY, TRIPLE};
use super::{App, Page, PageRequest};
use crate::audit::Draft;
use crate::auth::{Caller, Right, Standing};
use crate::error::{Error, Result};
use crate::store::keys::{BlobUser, VariableScope};
use crate::store::record::variable::{Category, Variable, stored_name};
use crate::store::record::{Loaded, decode, encode};
use crate::store::{Batch, CommitError, Expect, Key, Scan, Versioned, keys};

/// All values of one scope together: those of three scopes and of a run fit into the one message
/// that starts a job.
const LARGEST_SCOPE: u64 = 768 * 1024;
/// Of these, environment variables: with its arguments a process gets 2 MiB of them.
const LARGEST_ENVIRONMENT: u64 = 256 * 1024;
const MOST_VARIABLES: usize = 500;

const ATTEMPTS: usize = 16;

/// Which variables a caller means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Scope {
    Environment(String),
    Organization,
    Personal,
}

#[derive(Clone, Debug)]
pub struct NewVariable {
    pub name: String,
    pub category: Category,
    pub value: SecretString,
    pub sensitive: bool,
    pub hcl: bool,
}

/// A variable as it may be shown.
#[derive(Debug)]
pub struct VariableView {
    pub record: Variable,
    /// Absent when sensitive.
    pub value: Option<String>,
}

impl App {
    /// Sets a variable; one of the triple by a code, where it replaces one that guards.
    pub async fn set_variable(
        self: &Arc<Self>,
        caller: &Caller,
        organization: &str,
        scope: &Scope,
        variable: NewVariable,
        proof: Option<GivenCode>,
    ) -> Result<VariableView> {
        let (standing, stored) =
            self.variable_scope(caller, organization, scope, Access::Change).await?;
        let organization = standing.organization;
        let triple = match scope {
            Scope::Environment(_) => Triple::Refused,
            Scope::Organization | Scope::Personal => Triple::Taken,
        };
        let variable = checked(triple, variable)?;
        let shown = (!variable.sensitive).then(|| variable.value.expose_secret().to_owned());
        if is_of_triple(variable.category, &variable.name) {
            let key = keys::variable(stored, &stored_name(variable.category, &variable.name));
            let change = GuardedChange::SetVariable { stored, scope: scope.clone(), variable };
            self.change_guarded(Intent { caller: caller.clone(), organization, change }, proof)
                .await?;
            let record: Loaded<Variable> = self.fetch(key).await?.ok_or_else(missing)?;
            return Ok(VariableView { record: record.value, value: shown });
        }
        let prepared = self.prepare_value(organization, &variable.value).await?;
        let place = (stored, scope);
        let saved = self.save_variable(caller, organization, place, &variable, &prepared).await;
        if saved.is_err() {
            self.release_value(&prepared).await?;
        }
        self.collect_garbage_soon();
        Ok(VariableView { record: saved?, value: shown })
    }

    async fn save_variable(
        &self,
        caller: &Caller,
        organization: OrganizationId,
        place: (VariableScope, &Scope),
        variable: &NewVariable,
        prepared: &Prepared,
    ) -> Result<Variable> {
        for _ in 0..ATTEMPTS {
            let (batch, record) =
                self.saving_batch(caller, organization, place, variable, prepared, None).await?;
            match self.store.commit(batch).await {
                Ok(_) => return Ok(record),
                Err(CommitError::Conflict { .. }) => {}
                Err(error @ CommitError::Store(_)) => return Err(error.into()),
            }
        }
        Err(too_fast())
    }

    async fn saving_batch(
        &self,
        caller: &Caller,
        organization: OrganizationId,
        (stored, scope): (VariableScope, &Scope),
        variable: &NewVariable,
        prepared: &Prepared,
        by_code_of: Option<UserId>,
    ) -> Result<(Batch, Variable)> {
        let key = keys::variable(stored, &stored_name(variable.category, &variable.name));
        let stamp = keys::variable_stamp(stored);
        let record = self.variable_record(&key, variable, prepared);
        // Before the others are read: whoever changes one meanwhile writes it again.
        let stamped = self.store.fetch(&stamp).await?;
        let known = self.list(keys::variables_of(stored)).await?;
        check_budget(&known, &key, variable)?;
        let before = known.iter().find(|(other, _)| *other == key);
        let draft = self
            .variable_draft(caller, organization, scope, "set_variable", &variable.name)
            .with("sensitive", variable.sensitive);
        let completes = completes_after(variable, stamped.as_ref(), by_code_of);
        let mut batch = Batch::new()
            .put(stamp, expected(stamped.as_ref()), completes)
            .put(key, expected(before.map(|(_, found)| found)), encode(&record))
            .audit(draft);
        if let Prepared::Stored { claim, value } = prepared {
            batch = self.settle_claim(batch, claim, BlobUser::Value(value.id.0)).await?;
        }
        if let Some((key, found)) = before {
            batch = self.end_value(batch, organization, &decode(key, found)?).await?;
        }
        if let VariableScope::Personal(organization, user) = stored {
            // Whoever removes the member takes all of theirs away: none comes in between.
            let membership = self.membership(organization, user).await?;
            let membership = membership.ok_or_else(crate::auth::hidden)?;
            let same = encode(&membership.value);
            batch = batch.put(membership.key, Expect::At(membership.version), same);
        }
        Ok((batch, record))
    }

    /// Makes the commit that sets a variable of the triple, whose values are small.
    pub(super) async fn set_batch(
        &self,
        caller: &Caller,
        organization: OrganizationId,
        place: (VariableScope, &Scope),
        variable: &NewVariable,
        by_code: bool,
    ) -> Result<Batch> {
        let by_code_of = if by_code { Some(caller.person()?.0) } else { None };
        let small = Prepared::Small;
        let saving = self.saving_batch(caller, organization, place, variable, &small, by_code_of);
        Ok(saving.await?.0)
    }

    /// Takes a stored secret key away where its access key is replaced: it belongs to no other.
    /// The triple is incomplete then, and who replaced it completes it without a further code:
    /// the scope's stamp says who.
    pub(super) async fn without_old_secret(
        &self,
        batch: Batch,
        stored: VariableScope,
        variable: &NewVariable,
    ) -> Result<Batch> {
        if variable.name != ACCESS_KEY || variable.category != Category::Environment {
            return Ok(batch);
        }
        let before = self.triple_value(stored, ACCESS_KEY).await?;
        if before.is_some_and(|key| key.expose_secret() == variable.value.expose_secret()) {
            return Ok(batch);
        }
        let secret = keys::variable(stored, &stored_name(Category::Environment, SECRET_KEY));
        Ok(batch.delete(secret, Expect::Anything))
    }

    pub async fn list_variables(
        &self,
        caller: &Caller,
        organization: &str,
        scope: &Scope,
        page: PageRequest,
    ) -> Result<Page<VariableView>> {
        let (standing, stored_scope) =
            self.variable_scope(caller, organization, scope, Access::Read).await?;
        let size = page.size()?;
        let after = page.after::<String>()?.map(|name| keys::variable(stored_scope, &name));
        let scan = Scan::ascending(keys::variables_of(stored_scope), size + 1).after(after);
        let (mut items, mut next) = (vec![], None);
        for (key, found) in self.scan(scan).await? {
            let record: Variable = decode(&key, &found)?;
            if items.len() == size {
                next = items.last().map(|view: &VariableView| {
                    stored_name(view.record.category, &view.record.name)
                });
                break;
            }
            let value = match record.sensitive {
                true => None,
                false => {
                    let value = self.variable_value(standing.organization, &key, &record).await?;
                    Some(value.expose_secret().to_owned())
                }
            };
            items.push(VariableView { record, value });
        }
        Ok(Page { items, next })
    }

    pub async fn delete_variable(
        self: &Arc<Self>,
        caller: &Caller,
        organization: &str,
        scope: &Scope,
        (category, name): (Category, &str),
        proof: Option<GivenCode>,
    ) -> Result<()> {
        let (standing, stored) =
            self.variable_scope(caller, organization, scope, Access::Change).await?;
        let organization = standing.organization;
        if is_of_triple(category, name) {
            let (scope, name) = (scope.clone(), name.to_owned());
            let change = GuardedChange::DeleteVariable { stored, scope, category, name };
            let intent = Intent { caller: caller.clone(), organization, change };
            return self.change_guarded(intent, proof).await;
        }
        for _ in 0..ATTEMPTS {
            let place = (stored, scope);
            let batch = self.delete_batch(caller, organization, place, category, name).await?;
            match self.store.commit(batch).await {
                Ok(_) => {
                    self.collect_garbage_soon();
                    return Ok(());
                }
                Err(CommitError::Conflict { .. }) => {}
                Err(error @ CommitError::Store(_)) => return Err(error.into()),
            }
        }
        Err(too_fast())
    }

    /// Makes the commit that deletes a variable.
    pub(super) async fn delete_batch(
        &self,
        caller: &Caller,
        organization: OrganizationId,
        (stored, scope): (VariableScope, &Scope),
        category: Category,
        name: &str,
    ) -> Result<Batch> {
        let key = keys::variable(stored, &stored_name(category, name));
        let found = self.store.fetch(&key).await?.ok_or_else(missing)?;
        let draft = self.variable_draft(caller, organization, scope, "delete_variable", name);
        let batch = Batch::new()
            .put(keys::variable_stamp(stored), Expect::Anything, [])
            .delete(key.clone(), Expect::At(found.version))
            .audit(draft);
        self.end_value(batch, organization, &decode(&key, &found)?).await
    }

    async fn variable_scope(
        &self,
        caller: &Caller,
        organization: &str,
        scope: &Scope,
        access: Access,
    ) -> Result<(Standing, VariableScope)> {
        match scope {
            Scope::Environment(name) => {
                let right = match access {
                    Access::Read => Right::Read,
                    Access::Change => Right::Administer,
                };
                let (standing, found) = self.on(caller, organization, name, right).await?;
                let scope = VariableScope::Environment(standing.organization, found.value.id);
                Ok((standing, scope))
            }
            Scope::Organization => {
                let standing = match access {
                    Access::Read => {
                        let standing = self.member(caller, organization).await?;
                        if !standing.position.reads() {
                            let message = "this takes READ on an environment; ask an owner";
                            return Err(Error::refused(Reason::NotAllowed, message));
                        }
                        standing
                    }
                    Access::Change => self.owner(caller, organization).await?,
                };
                let scope = VariableScope::Organization(standing.organization);
                Ok((standing, scope))
            }
            Scope::Personal => {
                let standing = self.member(caller, organization).await?;
                let scope = VariableScope::Personal(standing.organization, caller.person()?.0);
                Ok((standing, scope))
            }
        }
    }

    /// Owners read the audit, and a personal variable's name is not theirs to know.
    fn variable_draft(
        &self,
        caller: &Caller,
        organization: OrganizationId,
        scope: &Scope,
        action: &str,
        name: &str,
    ) -> Draft {
        let (subject, scope) = match scope {
            Scope::Environment(environment) => {
                (format!("variable {name}"), format!("environment {environment}"))
            }
            Scope::Organization => (format!("variable {name}"), "organization".to_owned()),
            Scope::Personal => ("a personal variable".to_owned(), "personal".to_owned()),
        };
        self.draft(organization, caller.audit_name(), action, subject).with("scope", scope)
    }
}

fn missing() -> Error {
    Error::not_found("variable in this scope and category")
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Access {
    Read,
    Change,
}

fn check_budget(known: &[(Key, Versioned)], key: &Key, new: &NewVariable) -> Result<()> {
    let mut count = 1;
    let mut total = new.value.expose_secret().len() as u64;
    let mut environment = if new.category == Category::Environment { total } else { 0 };
    for (other, found) in known.iter().filter(|(other, _)| other != key) {
        let record: Variable = decode(other, found)?;
        count += 1;
        total += value::length(&record);
        if record.category == Category::Environment {
            environment += value::length(&record);
        }
    }
    let (limit, message) = if count > MOST_VARIABLES || total > LARGEST_SCOPE {
        (
            LARGEST_SCOPE,
            "a scope holds up to 500 variables of 768 KiB together; delete some, or put large \
             values into files of the configuration",
        )
    } else if environment > LARGEST_ENVIRONMENT {
        (
            LARGEST_ENVIRONMENT,
            "a scope holds environment variables of up to 256 KiB together: a process takes no \
             more; use Terraform variables for large values",
        )
    } else {
        return Ok(());
    };
    Err(Error::refused(Reason::LimitReached, message).with("limit", limit.to_string()))
}

fn is_of_triple(category: Category, name: &str) -> bool {
    category == Category::Environment && TRIPLE.contains(&name)
}

fn expected(found: Option<&Versioned>) -> Expect {
    found.map_or(Expect::Absent, |found| Expect::At(found.version))
}

/// What a scope's stamp says after a variable is set: who has replaced the triple's access key by
/// a code and has yet to set what belongs to it. Nobody else's change of the key keeps that.
fn completes_after(
    variable: &NewVariable,
    stamped: Option<&Versioned>,
    by_code_of: Option<UserId>,
) -> Vec<u8> {
    let kept = || stamped.map(|found| found.value.to_vec()).unwrap_or_default();
    if variable.category != Category::Environment {
        return kept();
    }
    match variable.name.as_str() {
        ACCESS_KEY => by_code_of.map(|user| user.as_bytes().to_vec()).unwrap_or_default(),
        SECRET_KEY => Vec::new(),
        _ => kept(),
    }
}

fn too_fast() -> Error {
    Error::refused(Reason::ChangedMeanwhile, "the variables of this scope change too fast; repeat")
}

#[cfg(test)]
mod tests;
