//! Which variables a run would get, and from where: without their values.

use std::collections::BTreeMap;

use super::for_run::never_reaches_a_job;
use crate::app::App;
use crate::auth::{Caller, Right};
use crate::error::Result;
use crate::store::keys;
use crate::store::keys::VariableScope;
use crate::store::record::decode;
use crate::store::record::variable::{Category, Variable};

/// Where a variable comes from; a later one wins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Origin {
    Organization,
    Environment,
    /// The caller's own.
    Personal,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EffectiveVariable {
    pub name: String,
    pub category: Category,
    pub sensitive: bool,
    pub hcl: bool,
    pub origin: Origin,
    /// One of the same name and category wins over it.
    pub shadowed: bool,
}

impl App {
    /// Lists what a run of an environment would get if the caller queued it now.
    pub async fn effective_variables(
        &self,
        caller: &Caller,
        organization: &str,
        environment: &str,
    ) -> Result<Vec<EffectiveVariable>> {
        let (standing, environment) =
            self.on(caller, organization, environment, Right::Read).await?;
        let organization = standing.organization;
        let mut scopes = vec![
            (Origin::Organization, VariableScope::Organization(organization)),
            (Origin::Environment, VariableScope::Environment(organization, environment.value.id)),
        ];
        if let Caller::User { id, .. } = caller {
            scopes.push((Origin::Personal, VariableScope::Personal(organization, *id)));
        }
        let mut found: BTreeMap<(Category, String), Vec<(Origin, Variable)>> = BTreeMap::new();
        for (origin, scope) in scopes {
            for (key, versioned) in self.list(keys::variables_of(scope)).await? {
                let record: Variable = decode(&key, &versioned)?;
                if !never_reaches_a_job(&record) {
                    let of_this_name = found.entry((record.category, record.name.clone()));
                    of_this_name.or_default().push((origin, record));
                }
            }
        }
        let variables = found.into_values().flat_map(|of_this_name| {
            let wins = of_this_name.last().map(|(origin, _)| *origin);
            of_this_name.into_iter().map(move |(origin, record)| EffectiveVariable {
                name: record.name,
                category: record.category,
                sensitive: record.sensitive,
                hcl: record.hcl,
                origin,
                shadowed: Some(origin) != wins,
            })
        });
        Ok(variables.collect())
    }
}
