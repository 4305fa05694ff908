//! Variables of environments, organizations and persons.
//!
//! Where names meet, the narrower scope wins: environment over personal over organization.
//! Personal ones are fixed for a run when it is queued; the others are those of the moment its
//! credentials are released. The triple exists at organization and personal scope only and never reaches a job.

use std::collections::BTreeMap;

use latchkey_domain::id::{EnvironmentId, OrganizationId, RunId};
use latchkey_proto::reserved::is_reserved;
use latchkey_proto::v1::Reason;
use secrecy::{ExposeSecret, SecretString};

use super::secrets::{ACCESS_KEY, SERIAL, TRIPLE};
use super::{App, Page, PageRequest};
use crate::auth::{Caller, Right, Standing};
use crate::error::{Error, Result};
use crate::store::keys::VariableScope;
use crate::store::record::variable::{Category, Variable, stored_name};
use crate::store::record::{decode, encode};
use crate::store::{Batch, CommitError, Expect, Scan, keys};
use crate::sts::check_serial;

const LONGEST_VALUE: usize = 32 * 1024;

/// All values of one scope together, so that a job's fit into one message.
const LARGEST_SCOPE: usize = 256 * 1024;
const MOST_VARIABLES: usize = 500;

/// Which variables a caller means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Scope {
    Environment(String),
    Organization,
    Personal,
}

#[derive(Debug)]
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

/// A variable on its way to a job.
#[derive(Debug)]
pub struct JobVariable {
    pub name: String,
    pub category: Category,
    pub value: SecretString,
    pub sensitive: bool,
    pub hcl: bool,
}

impl App {
    pub async fn set_variable(
        &self,
        caller: &Caller,
        organization: &str,
        scope: &Scope,
        variable: NewVariable,
    ) -> Result<VariableView> {
        let (standing, stored_scope) =
            self.variable_scope(caller, organization, scope, Access::Change).await?;
        let variable = checked(scope, variable)?;
        let NewVariable { name, category, value, sensitive, hcl } = variable;
        let key = keys::variable(stored_scope, &stored_name(category, &name));
        let record = Variable {
            sensitive,
            hcl,
            category,
            value: self.seal_value(&key, &value),
            updated_at: self.now().into(),
            name: name.clone(),
        };
        self.check_budget(stored_scope, &key, value.expose_secret().len()).await?;
        let draft = self
            .draft(
                standing.organization,
                caller.audit_name(),
                "set_variable",
                format!("variable {name}"),
            )
            .with("scope", told(scope))
            .with("sensitive", sensitive);
        let mut batch = Batch::new().put(key, Expect::Anything, encode(&record)).audit(draft);
        if let VariableScope::Personal(organization, user) = stored_scope {
            // Whoever removes the member takes all of theirs away: none comes in between.
            let membership = self.membership(organization, user).await?;
            let membership = membership.ok_or_else(crate::auth::hidden)?;
            let same = encode(&membership.value);
            batch = batch.put(membership.key, Expect::At(membership.version), same);
        }
        self.store.commit(batch).await?;
        let shown = (!sensitive).then(|| value.expose_secret().to_owned());
        Ok(VariableView { record, value: shown })
    }

    pub async fn list_variables(
        &self,
        caller: &Caller,
        organization: &str,
        scope: &Scope,
        page: PageRequest,
    ) -> Result<Page<VariableView>> {
        let (_, stored_scope) =
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
                false => Some(self.open_value(&key, &record.value)?.expose_secret().to_owned()),
            };
            items.push(VariableView { record, value });
        }
        Ok(Page { items, next })
    }

    pub async fn delete_variable(
        &self,
        caller: &Caller,
        organization: &str,
        scope: &Scope,
        category: Category,
        name: &str,
    ) -> Result<()> {
        let (standing, stored_scope) =
            self.variable_scope(caller, organization, scope, Access::Change).await?;
        let key = keys::variable(stored_scope, &stored_name(category, name));
        let missing = || Error::not_found("variable in this scope and category");
        let found = self.store.fetch(&key).await?.ok_or_else(missing)?;
        let draft = self
            .draft(
                standing.organization,
                caller.audit_name(),
                "delete_variable",
                format!("variable {name}"),
            )
            .with("scope", told(scope));
        let batch = Batch::new().delete(key, Expect::At(found.version)).audit(draft);
        match self.store.commit(batch).await {
            Ok(_) => Ok(()),
            Err(CommitError::Conflict { .. }) => Err(missing()),
            Err(error @ CommitError::Store(_)) => Err(error.into()),
        }
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

    async fn check_budget(
        &self,
        scope: VariableScope,
        replaced: &crate::store::Key,
        length: usize,
    ) -> Result<()> {
        let others = self.list(keys::variables_of(scope)).await?;
        let (mut count, mut total) = (1, length);
        for (key, found) in others.iter().filter(|(key, _)| key != replaced) {
            count += 1;
            total += decode::<Variable>(key, found)?.value.0.len();
        }
        if count > MOST_VARIABLES || total > LARGEST_SCOPE {
            let message = "a scope holds up to 500 variables of 256 KiB together; delete some, or \
                           put large values into files of the configuration";
            return Err(Error::refused(Reason::LimitReached, message)
                .with("limit", LARGEST_SCOPE.to_string()));
        }
        Ok(())
    }

    /// Fixes a person's own variables for a run that they queue.
    pub(super) async fn fix_personal_variables(
        &self,
        mut batch: Batch,
        organization: OrganizationId,
        caller: &Caller,
        run: RunId,
    ) -> Result<Batch> {
        let Caller::User { id, .. } = caller else { return Ok(batch) };
        let personal = VariableScope::Personal(organization, *id);
        for (key, found) in self.list(keys::variables_of(personal)).await? {
            let record: Variable = decode(&key, &found)?;
            if record.category == Category::Environment && is_reserved(&record.name) {
                continue;
            }
            let value = self.open_value(&key, &record.value)?;
            let name = stored_name(record.category, &record.name);
            let place = keys::variable(VariableScope::Run(run), &name);
            let fixed = Variable { value: self.seal_value(&place, &value), ..record };
            batch = batch.put(place, Expect::Absent, encode(&fixed));
        }
        Ok(batch)
    }

    /// Gathers what a job gets, narrower scopes last.
    pub(super) async fn job_variables(
        &self,
        organization: OrganizationId,
        environment: EnvironmentId,
        run: RunId,
    ) -> Result<Vec<JobVariable>> {
        let scopes = [
            VariableScope::Organization(organization),
            VariableScope::Run(run),
            VariableScope::Environment(organization, environment),
        ];
        let mut gathered = BTreeMap::new();
        for scope in scopes {
            for (key, found) in self.list(keys::variables_of(scope)).await? {
                let record: Variable = decode(&key, &found)?;
                if record.category == Category::Environment && is_reserved(&record.name) {
                    continue;
                }
                let value = self.open_value(&key, &record.value)?;
                let Variable { name, category, sensitive, hcl, .. } = record;
                gathered.insert(
                    (category, name.clone()),
                    JobVariable { name, category, value, sensitive, hcl },
                );
            }
        }
        Ok(gathered.into_values().collect())
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Access {
    Read,
    Change,
}

fn told(scope: &Scope) -> String {
    match scope {
        Scope::Environment(name) => format!("environment {name}"),
        Scope::Organization => "organization".into(),
        Scope::Personal => "personal".into(),
    }
}

fn checked(scope: &Scope, mut variable: NewVariable) -> Result<NewVariable> {
    let bytes = variable.name.as_bytes();
    let first = |b: u8| b.is_ascii_alphabetic() || b == b'_';
    let rest = |b: &u8| b.is_ascii_alphanumeric() || *b == b'_' || *b == b'-';
    if !matches!(bytes.len(), 1..=128) || !first(bytes[0]) || !bytes.iter().all(rest) {
        let message = "a name has 1 to 128 letters, digits, `_` and `-`, and begins with a letter";
        return Err(Error::field("name", message));
    }
    if variable.value.expose_secret().len() > LONGEST_VALUE {
        return Err(Error::field("value", "a value has up to 32 KiB"));
    }
    if variable.category == Category::Terraform {
        return Ok(variable);
    }
    if variable.value.expose_secret().contains('\0') {
        return Err(Error::field("value", "an environment variable holds no NUL byte"));
    }
    if TRIPLE.contains(&variable.name.as_str()) && !matches!(scope, Scope::Environment(_)) {
        return checked_triple(variable);
    }
    if is_reserved(&variable.name) {
        let message = format!(
            "{} is reserved: Latchkey gives terraform its credentials, state and settings itself. \
             {}",
            variable.name,
            if TRIPLE.contains(&variable.name.as_str()) {
                "The triple is set at organization or personal scope."
            } else {
                "Remove it; for files and registries use the runner's own configuration."
            }
        );
        return Err(Error::refused(Reason::VariableReserved, message).about("name"));
    }
    variable.hcl = false;
    Ok(variable)
}

fn checked_triple(mut variable: NewVariable) -> Result<NewVariable> {
    let value = SecretString::from(variable.value.expose_secret().trim());
    let text = value.expose_secret();
    if variable.name == SERIAL {
        check_serial(text).map_err(|problem| {
            let message = format!("the serial cannot be used: {problem}");
            Error::refused(Reason::SerialUnusable, message).about("value")
        })?;
    }
    if variable.name == ACCESS_KEY {
        if text.starts_with("ASIA") {
            let message = "this key is temporary (ASIA…), and AWS issues no session for it; give \
                           the long-term key (AKIA…) of an IAM user";
            return Err(Error::field("value", message));
        }
        let word = text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
        if !(16..=128).contains(&text.len()) || !word {
            return Err(Error::field("value", "it is not an AWS access key id (AKIA…)"));
        }
    }
    if text.is_empty() {
        return Err(Error::field("value", "it is empty"));
    }
    variable.value = value;
    variable.sensitive = true;
    variable.hcl = false;
    Ok(variable)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn variable(name: &str, value: &str) -> NewVariable {
        NewVariable {
            name: name.into(),
            category: Category::Environment,
            value: value.into(),
            sensitive: false,
            hcl: false,
        }
    }

    #[track_caller]
    fn refused(scope: &Scope, variable: NewVariable, reason: Reason) {
        assert_eq!(checked(scope, variable).unwrap_err().reason(), reason);
    }

    #[test]
    fn reserved_names_are_refused_and_ordinary_ones_are_not() {
        for name in [
            "AWS_PROFILE",
            "TF_WORKSPACE",
            "TF_CLI_ARGS_plan",
            "AWS_ENDPOINT_URL_STS",
            "AWS_ROLE_ARN",
            "TF_LOG_PATH",
            "LD_PRELOAD",
            "Path",
        ] {
            refused(&Scope::Organization, variable(name, "x"), Reason::VariableReserved);
        }
        for name in ["TF_VAR_size", "HTTPS_PROXY", "AWS_REGION", "AWS_DEFAULT_REGION", "HOMEPAGE"] {
            assert!(checked(&Scope::Organization, variable(name, "x")).is_ok(), "{name}");
        }
    }

    #[test]
    fn the_triple_is_checked_when_it_is_saved_and_always_sensitive() {
        let wide = Scope::Organization;
        let saved = checked(&wide, variable(ACCESS_KEY, " AKIAQNZGKIQY56JQ7WML\n")).unwrap();
        assert!(saved.sensitive);
        assert_eq!(saved.value.expose_secret(), "AKIAQNZGKIQY56JQ7WML");
        refused(&wide, variable(ACCESS_KEY, "ASIAQNZGKIQY56JQ7WML"), Reason::FieldInvalid);
        let user = "arn:aws:iam::123456789012:user/ada";
        refused(&wide, variable(SERIAL, user), Reason::SerialUnusable);
        let here = Scope::Environment("web".into());
        refused(&here, variable(ACCESS_KEY, "AKIAQNZGKIQY56JQ7WML"), Reason::VariableReserved);
    }
}
