//! The variables of one run: those that were given with it, and the personal ones of whoever
//! queued it, fixed in the commit that queues it; those of the organization and the environment,
//! fixed in the commit that releases its plan. All are deleted in the commit that ends it.
//!
//! So an apply has what its plan had. Terraform refuses other values for a saved plan, after the
//! code was spent; a variable of its environment, such as the region, would change what the plan
//! does though no digest tells; and a secret that the plan holds is masked though it was deleted.

use std::collections::{BTreeMap, BTreeSet};

use latchkey_domain::id::{OrganizationId, RunId};
use latchkey_domain::run::{self, Run};
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
use crate::store::{Batch, Expect, Key, Version, keys};

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
            let fixed = Variable { sensitive: true, ..record };
            batch = self.copy(batch, organization, run, (key, found.version), fixed).await?;
        }
        Ok(batch)
    }

    /// Makes the batch that fixes for a run what its plan is released with, beside the variables that
    /// the run has of its own, in place of what an earlier release of the plan had.
    pub(in crate::app) async fn keep_variables(&self, run: &Run) -> Result<Batch> {
        let (id, organization) = (run.id, run.request.organization);
        let mut kept: BTreeMap<Key, Variable> = BTreeMap::new();
        for (key, found) in self.list(keys::variables_of(VariableScope::Run(id))).await? {
            let record = decode(&key, &found)?;
            kept.insert(key, record);
        }
        let mut found_now = BTreeMap::new();
        for scope in shared_scopes(run) {
            for (key, found) in self.list(keys::variables_of(scope)).await? {
                let record: Variable = decode(&key, &found)?;
                let name = stored_name(record.category, &record.name);
                let place = keys::variable(VariableScope::Run(id), &name);
                let own = kept.get(&place).is_some_and(|record| !record.of_plan);
                if !own && !never_reaches_a_job(&record) {
                    found_now.insert(place, (key, found.version, record));
                }
            }
        }
        let mut batch = Batch::new();
        for (place, record) in &kept {
            if record.of_plan && !found_now.contains_key(place) {
                batch = batch.delete(place.clone(), Expect::Anything);
            }
        }
        for (key, version, record) in found_now.into_values() {
            let fixed = Variable { of_plan: true, ..record };
            batch = self.copy(batch, organization, id, (key, version), fixed).await?;
        }
        Ok(batch)
    }

    /// Adds to a batch that a run has what is under `key`, whatever becomes of that.
    async fn copy(
        &self,
        batch: Batch,
        organization: OrganizationId,
        run: RunId,
        (key, version): (Key, Version),
        mut fixed: Variable,
    ) -> Result<Batch> {
        let name = stored_name(fixed.category, &fixed.name);
        let place = keys::variable(VariableScope::Run(run), &name);
        let mut batch = batch;
        match &fixed.stored {
            Some(stored) => {
                let user = BlobUser::Made(run);
                batch = self.share(batch, organization, &stored.digest.0, user).await?;
                batch = batch.check(key, Expect::At(version));
            }
            None => {
                let value = self.open_value(&key, &fixed.value)?;
                fixed.value = self.seal_value(&place, &value);
            }
        }
        Ok(batch.put(place, Expect::Anything, encode(&fixed)))
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

    /// Gathers what a job gets that is released: what is fixed for its run. Runs whose plan was
    /// granted before that was all have what the wider scopes hold now, narrower ones last.
    pub(in crate::app) async fn job_variables(&self, run: &Run) -> Result<Vec<JobVariable>> {
        let organization = run.request.organization;
        let wider = shared_scopes(run).into_iter().filter(|_| run.site.is_none());
        let mut gathered = BTreeMap::new();
        for scope in wider.chain([VariableScope::Run(run.id)]) {
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

/// The scopes that a run shares with others, the narrower one last.
fn shared_scopes(run: &Run) -> [VariableScope; 2] {
    let (organization, environment) = (run.request.organization, run.request.environment);
    [
        VariableScope::Organization(organization),
        VariableScope::Environment(organization, environment),
    ]
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
