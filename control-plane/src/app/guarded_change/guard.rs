//! Which device a change takes a code of, if it takes one.

use latchkey_domain::id::UserId;

use super::weakens::weakens;
use super::{GuardedChange, Intent};
use crate::app::App;
use crate::app::secrets::TRIPLE;
use crate::app::variables::NewVariable;
use crate::error::Result;
use crate::store::keys::VariableScope;
use crate::store::record::variable::Category;
use crate::sts::Triple;

impl App {
    /// Answers the triple whose code a change takes, if it takes one. With a code that is given
    /// also a stricter policy takes one, where the one before was set on the host.
    pub(super) async fn guard_of_change(
        &self,
        intent: &Intent,
        user: UserId,
        given: bool,
    ) -> Result<Option<Triple>> {
        let Intent { organization, change, .. } = intent;
        let organization = *organization;
        let personal = VariableScope::Personal(organization, user);
        match change {
            GuardedChange::Settings { environment, change } => {
                let found = self.environment(organization, *environment).await?.value;
                let before = found.settings;
                let after = self.changed(organization, before.clone(), *change.clone()).await?;
                let mends = given && found.break_glass.is_some() && change.sets_policy();
                if !weakens(&before, &after) && !mends {
                    return Ok(None);
                }
            }
            GuardedChange::Accounts(accounts) => {
                let listed = self.organization(organization).await?.value.aws_accounts;
                // With none, no code can be spent.
                if listed.is_empty() || listed == *accounts {
                    return Ok(None);
                }
            }
            GuardedChange::SetVariable {
                stored,
                variable: NewVariable { name, category, .. },
                ..
            }
            | GuardedChange::DeleteVariable { stored, name, category, .. } => {
                if *category != Category::Environment || !TRIPLE.contains(&name.as_str()) {
                    return Ok(None);
                }
                match stored {
                    VariableScope::Personal(..) => return self.guarding_triple(personal).await,
                    VariableScope::Organization(_) => {}
                    VariableScope::Environment(..) | VariableScope::Run(_) => return Ok(None),
                }
            }
        }
        match self.guarding_triple(personal).await? {
            Some(own) => Ok(Some(own)),
            None => self.guarding_triple(VariableScope::Organization(organization)).await,
        }
    }
}
