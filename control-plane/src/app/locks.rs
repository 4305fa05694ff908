//! The lock that a person puts on an environment, with a reason: no run that would change
//! anything has its turn until it is taken away, and nobody else works on the state
//! ([`super::state_lock`]). What runs goes on, and so do plan-only runs.
//! Not to be taken for an environment that is frozen by what a run left behind.

use std::sync::Arc;

use latchkey_domain::environment::Locked;
use latchkey_proto::v1::Reason;

use super::App;
use super::environments::EnvironmentView;
use crate::auth::{Caller, Right};
use crate::error::{Error, Result};
use crate::store::record::encode;
use crate::store::record::environment::EnvironmentRecord;
use crate::store::{Batch, CommitError, Expect, keys};

const LONGEST_REASON: usize = 500;
const ATTEMPTS: usize = 16;

impl App {
    /// Locks an environment. A repeat by the same person with the same reason changes nothing.
    pub async fn lock_environment(
        self: &Arc<Self>,
        caller: &Caller,
        organization: &str,
        name: &str,
        reason: &str,
    ) -> Result<EnvironmentView> {
        self.on(caller, organization, name, Right::Administer).await?;
        let (_, by) = caller.person()?;
        let length = reason.chars().count();
        let is_blank = reason.trim().is_empty();
        if is_blank || length > LONGEST_REASON || reason.chars().any(char::is_control) {
            let message = "say why, in 1 to 500 characters on one line";
            return Err(Error::field("reason", message));
        }
        self.set_lock(caller, organization, name, Some((by, reason))).await
    }

    /// Takes a lock away, whoever has put it, and gives the turns that wait.
    pub async fn unlock_environment(
        self: &Arc<Self>,
        caller: &Caller,
        organization: &str,
        name: &str,
    ) -> Result<EnvironmentView> {
        self.on(caller, organization, name, Right::Administer).await?;
        caller.person()?;
        let view = self.set_lock(caller, organization, name, None).await?;
        self.give_turns(view.environment.organization, view.environment.id).await?;
        self.show_environment(caller, organization, name).await
    }

    async fn set_lock(
        &self,
        caller: &Caller,
        organization: &str,
        name: &str,
        wanted: Option<(&str, &str)>,
    ) -> Result<EnvironmentView> {
        // Runs change the same record as they move.
        for _ in 0..ATTEMPTS {
            let (standing, found) = self.on(caller, organization, name, Right::Administer).await?;
            let mut next = found.value;
            let before = next.hold.locked.take();
            next.hold.locked = wanted.map(|(by, reason)| Locked {
                by: by.to_owned(),
                reason: reason.to_owned(),
                at: self.now(),
            });
            match (&before, &next.hold.locked) {
                (Some(before), Some(wanted)) => {
                    if (&before.by, &before.reason) != (&wanted.by, &wanted.reason) {
                        let message = format!(
                            "{} has locked it already: {}; unlock it first",
                            before.by, before.reason
                        );
                        return Err(Error::refused(Reason::WrongState, message));
                    }
                    next.hold.locked = Some(before.clone());
                    return self.environment_view(next, standing.organization_name).await;
                }
                (None, None) => {
                    return self.environment_view(next, standing.organization_name).await;
                }
                (Some(_), None) | (None, Some(_)) => {}
            }
            let (action, told) = match &next.hold.locked {
                Some(locked) => ("lock_environment", Some(locked)),
                None => ("unlock_environment", before.as_ref()),
            };
            let subject = format!("environment {name}");
            let mut draft = self.draft(standing.organization, caller.audit_name(), action, subject);
            if let Some(lock) = told {
                draft =
                    draft.with("locked_by", lock.by.as_str()).with("reason", lock.reason.as_str());
            }
            let key = keys::environment(next.organization, next.id);
            let record = encode(&EnvironmentRecord::from(&next));
            let batch = Batch::new().put(key, Expect::At(found.version), record).audit(draft);
            match self.store.commit(batch).await {
                Ok(_) => return self.environment_view(next, standing.organization_name).await,
                Err(CommitError::Conflict { .. }) => {}
                Err(error @ CommitError::Store(_)) => return Err(error.into()),
            }
        }
        Err(Error::refused(Reason::ChangedMeanwhile, "it changes too fast; repeat"))
    }
}

#[cfg(test)]
mod tests;
