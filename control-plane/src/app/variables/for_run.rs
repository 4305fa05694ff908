//! The variables of one run: those that were given with it, and the personal ones of whoever
//! queued it, fixed in the commit that queues it and deleted in the one that ends it.

use std::collections::{BTreeMap, BTreeSet};

use latchkey_domain::id::{EnvironmentId, OrganizationId, RunId};
use latchkey_domain::run;
use latchkey_proto::reserved::is_reserved;
use latchkey_proto::v1::Reason;
use secrecy::{ExposeSecret, SecretString};

use super::checked::{Triple, checked};
use super::value::Prepared;
use super::{LARGEST_ENVIRONMENT, NewVariable};
use crate::app::App;
use crate::auth::Caller;
use crate::error::{Error, Result};
use crate::store::keys::{BlobUser, VariableScope};
use crate::store::record::variable::{Category, Variable, stored_name};
use crate::store::record::{decode, encode};
use crate::store::{Batch, Expect, keys};

const MOST_GIVEN: usize = 64;
/// Names and values of those given for a run.
const LARGEST_GIVEN: usize = 1024 * 1024;

/// A variable on its way to a job.
#[derive(Debug)]
pub struct JobVariable {
    pub name: String,
    pub category: Category,
    pub value: SecretString,
    pub sensitive: bool,
    pub hcl: bool,
}

/// Variables that somebody gives for one run, checked and, where large, stored.
#[derive(Debug, Default)]
pub(in crate::app) struct Given(Vec<(NewVariable, Prepared)>);

impl Given {
    /// All but the values, as a run's record keeps it.
    pub(in crate::app) fn kept(&self) -> Vec<run::Given> {
        let kept = |variable: &NewVariable| run::Given {
            name: variable.name.clone(),
            category: Some(variable.category.into()),
        };
        self.0.iter().map(|(variable, _)| kept(variable)).collect()
    }
}

impl App {
    /// Takes what is given for a run. It is to be fixed or released.
    pub(in crate::app) async fn take_given(
        &self,
        organization: OrganizationId,
        variables: Vec<NewVariable>,
    ) -> Result<Given> {
        let variables = all_checked(variables)?;
        let mut given = Given::default();
        for variable in variables {
            match self.prepare_value(organization, &variable.value).await {
                Ok(prepared) => given.0.push((variable, prepared)),
                Err(error) => {
                    self.release_given(&given).await?;
                    return Err(error);
                }
            }
        }
        Ok(given)
    }

    /// Gives up what no run came to need. Idempotent.
    pub(in crate::app) async fn release_given(&self, given: &Given) -> Result<()> {
        for (_, prepared) in &given.0 {
            self.release_value(prepared).await?;
        }
        Ok(())
    }

    /// Adds to the batch that queues a run the variables it will have of its own. Given ones come
    /// before personal ones of the same name.
    pub(in crate::app) async fn fix_variables(
        &self,
        mut batch: Batch,
        organization: OrganizationId,
        caller: &Caller,
        run: RunId,
        given: &Given,
    ) -> Result<Batch> {
        for (variable, prepared) in &given.0 {
            let name = stored_name(variable.category, &variable.name);
            let place = keys::variable(VariableScope::Run(run), &name);
            if let Prepared::Stored { claim, .. } = prepared {
                batch = self.settle_claim(batch, claim, BlobUser::Made(run)).await?;
            }
            let record = self.variable_record(&place, variable, prepared);
            batch = batch.put(place, Expect::Absent, encode(&record));
        }
        let Caller::User { id, .. } = caller else { return Ok(batch) };
        let personal = VariableScope::Personal(organization, *id);
        for (key, found) in self.list(keys::variables_of(personal)).await? {
            let record: Variable = decode(&key, &found)?;
            let name = stored_name(record.category, &record.name);
            let place = keys::variable(VariableScope::Run(run), &name);
            if never_reaches_a_job(&record) || batch.names(&place) {
                continue;
            }
            // Others read the run's log, and a personal value is not theirs to know.
            let mut fixed = Variable { sensitive: true, ..record };
            match &fixed.stored {
                Some(stored) => {
                    let user = BlobUser::Made(run);
                    batch = self.share(batch, organization, &stored.digest.0, user).await?;
                    batch = batch.check(key, Expect::At(found.version));
                }
                None => {
                    let value = self.open_value(&key, &fixed.value)?;
                    fixed.value = self.seal_value(&place, &value);
                }
            }
            batch = batch.put(place, Expect::Absent, encode(&fixed));
        }
        Ok(batch)
    }

    /// Adds to a batch, which ends a run or comes after its end, that its variables go.
    pub(in crate::app) async fn end_variables(
        &self,
        mut batch: Batch,
        organization: OrganizationId,
        run: RunId,
    ) -> Result<Batch> {
        for (key, found) in self.list(keys::variables_of(VariableScope::Run(run))).await? {
            let record: Variable = decode(&key, &found)?;
            batch = batch.delete(key, Expect::Anything);
            if let Some(stored) = &record.stored {
                batch = self.note(batch, organization, &stored.digest.0).await?;
            }
        }
        Ok(batch)
    }

    /// Gathers what a job gets, narrower scopes last.
    pub(in crate::app) async fn job_variables(
        &self,
        organization: OrganizationId,
        environment: EnvironmentId,
        run: RunId,
    ) -> Result<Vec<JobVariable>> {
        let scopes = [
            VariableScope::Organization(organization),
            VariableScope::Environment(organization, environment),
            VariableScope::Run(run),
        ];
        let mut gathered = BTreeMap::new();
        for scope in scopes {
            for (key, found) in self.list(keys::variables_of(scope)).await? {
                let record: Variable = decode(&key, &found)?;
                if !never_reaches_a_job(&record) {
                    gathered.insert((record.category, record.name.clone()), (key, record));
                }
            }
        }
        let mut variables = vec![];
        for (key, record) in gathered.into_values() {
            let value = self.variable_value(organization, &key, &record).await?;
            let Variable { name, category, sensitive, hcl, .. } = record;
            variables.push(JobVariable { name, category, value, sensitive, hcl });
        }
        Ok(variables)
    }
}

/// Tells whether it is of the triple, or was saved before its name was reserved.
pub(super) fn never_reaches_a_job(record: &Variable) -> bool {
    record.category == Category::Environment && is_reserved(&record.name)
}

fn all_checked(variables: Vec<NewVariable>) -> Result<Vec<NewVariable>> {
    let field = |message: &str| Error::field("variables", message);
    if variables.len() > MOST_GIVEN {
        return Err(field("a run takes up to 64 variables of its own; set the others beforehand"));
    }
    let size = |variable: &NewVariable| variable.name.len() + variable.value.expose_secret().len();
    if variables.iter().map(size).sum::<usize>() > LARGEST_GIVEN {
        return Err(field("the variables of a run have up to 1 MiB together"));
    }
    let environment = variables.iter().filter(|one| one.category == Category::Environment);
    if environment.map(|one| size(one) as u64).sum::<u64>() > LARGEST_ENVIRONMENT {
        return Err(field("the environment variables of a run have up to 256 KiB together"));
    }
    let mut names = BTreeSet::new();
    for variable in &variables {
        if !names.insert((variable.category, variable.name.clone())) {
            return Err(field("a variable is given twice; give each once"));
        }
    }
    variables
        .into_iter()
        .map(|variable| {
            let name: String = variable.name.chars().take(128).collect();
            checked(Triple::Refused, variable).map_err(|error| match error.reason() {
                // Which of them it is; the others say.
                Reason::FieldInvalid => Error::field(
                    "variables",
                    format!("the variable {name:?} cannot be given: {}", error.message()),
                ),
                _ => error,
            })
        })
        .collect()
}
