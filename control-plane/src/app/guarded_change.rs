//! Changes that weaken what a code protects, which therefore take a code themselves.
//!
//! A stolen login must not be enough to switch the codes off. Where a complete triple stands
//! ready for the caller, their own or the organization's, these take a code of its device: a
//! weaker setting of an environment ([`weakens`](self::weakens::weakens)), a new environment that
//! is weaker than one is by default, another list of AWS accounts, another triple. So does an owner's first triple of their own where the organization
//! has one. The first set-up, before any triple was complete or while no account is listed, takes
//! none: no code could be spent. Once there was one, whoever has no device weakens nothing
//! ([`standing`]).
//!
//! 1. The use case has authorized the caller, and tried the change out: what is malformed costs
//!    no code.
//! 2. A `request_id` seen before is answered with what is recorded.
//! 3. One commit counts the attempt at the device, remembers the code's digest and records the
//!    attempt as *spending*, as for a run ([`super::authenticate_run`]).
//! 4. One call to STS, for the shortest session there is, which is dropped at once.
//! 5. `GetCallerIdentity` must answer a listed account.
//! 6. One commit makes the change and closes the record, if the caller still has the right.
//!
//! An attempt found still open at a start is *unknown*: its change is not made, the code is spent.
//! Like those of runs, the steps from 3 on run in a task of their own.

mod by_code;
mod guard;
mod record;
mod standing;
mod weakens;

use std::sync::Arc;

use latchkey_domain::id::{EnvironmentId, OrganizationId, UserId};
use latchkey_domain::token_code;
use latchkey_proto::v1::Reason;
use secrecy::{ExposeSecret, SecretString};

use self::guard::Guard;
use self::record::{ChangeRecord, request_key};
use super::settings::SettingsChange;
use super::variables::{NewVariable, Scope};
use super::{App, check_request_id};
use crate::auth::{Caller, Right};
use crate::error::{Error, Result};
use crate::store::keys::VariableScope;
use crate::store::record::variable::Category;
use crate::store::{Batch, CommitError, Expect, Key, Version};
use crate::sts::Triple;

const ATTEMPTS: usize = 32;

/// A code that was given along with a change.
#[derive(Clone, Debug)]
pub struct GivenCode {
    pub code: SecretString,
    pub request_id: String,
}

/// A change that may take a code.
#[derive(Clone, Debug)]
pub(super) enum GuardedChange {
    Settings {
        environment: EnvironmentId,
        change: Box<SettingsChange>,
    },
    /// A new environment, whose settings are held against what one has by default. `request` is
    /// where it is kept that it was made.
    Create {
        name: String,
        settings: Box<SettingsChange>,
        request: Key,
    },
    Accounts(Vec<String>),
    SetVariable {
        stored: VariableScope,
        scope: Scope,
        variable: NewVariable,
    },
    DeleteVariable {
        stored: VariableScope,
        scope: Scope,
        category: Category,
        name: String,
    },
}

impl GuardedChange {
    /// What its use case has asked for.
    fn right(&self) -> (Right, Option<EnvironmentId>) {
        match self {
            GuardedChange::Settings { environment, change } => {
                let owners = change.is_for_owners();
                (if owners { Right::Own } else { Right::Administer }, Some(*environment))
            }
            GuardedChange::Create { .. } | GuardedChange::Accounts(_) => (Right::Own, None),
            GuardedChange::SetVariable { stored, .. }
            | GuardedChange::DeleteVariable { stored, .. } => match stored {
                VariableScope::Personal(..) => (Right::Belong, None),
                VariableScope::Environment(_, environment) => {
                    (Right::Administer, Some(*environment))
                }
                VariableScope::Organization(_) | VariableScope::Run(_) => (Right::Own, None),
            },
        }
    }
}

/// Who changes what.
#[derive(Clone, Debug)]
pub(super) struct Intent {
    pub(super) caller: Caller,
    pub(super) organization: OrganizationId,
    pub(super) change: GuardedChange,
}

/// Whether a change was made by a code of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Backing {
    Code,
    RightAlone,
}

/// What became of one try.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Round {
    Made,
    /// Somebody changed what it rests on.
    Lost,
}

impl App {
    /// Makes a change by the caller's right alone, or by a code where it takes one. A change that
    /// others make meanwhile is judged anew: it rests on the records that said what it takes.
    pub(super) async fn change_guarded(
        self: &Arc<Self>,
        intent: Intent,
        proof: Option<GivenCode>,
    ) -> Result<()> {
        let (user, _) = intent.caller.person()?;
        if let Some(proof) = &proof {
            check_request_id(&proof.request_id)?;
            let request = request_key(user, intent.organization, &proof.request_id);
            if let Some(known) = self.fetch::<ChangeRecord>(request.clone()).await? {
                return self.recorded_change(request, known.value, &intent).await;
            }
        }
        for _ in 0..ATTEMPTS {
            let Guard { triple, rests_on } =
                self.guard_of_change(&intent, user, proof.is_some()).await?;
            if let Some(triple) = triple {
                return self.change_with(intent, user, &triple, proof).await;
            }
            let round = self.try_change(&intent, Backing::RightAlone, rests_on, |batch| batch);
            match round.await? {
                Round::Made => return Ok(()),
                Round::Lost => {}
            }
        }
        Err(too_fast())
    }

    /// Makes a change that takes a code of the triple's device.
    async fn change_with(
        self: &Arc<Self>,
        intent: Intent,
        user: UserId,
        triple: &Triple,
        proof: Option<GivenCode>,
    ) -> Result<()> {
        let Some(proof) = proof else {
            let message = format!(
                "this weakens what a token code protects, so it takes one: submit a code of the \
                 device {}",
                triple.serial
            );
            return Err(Error::refused(Reason::MfaRequired, message).about("token_code"));
        };
        token_code::check(proof.code.expose_secret().as_bytes()).map_err(|_| {
            Error::field("token_code", "a token code is exactly six digits; nothing was spent")
        })?;
        // What is malformed is found out before anything is spent.
        self.change_batch(&intent, Backing::Code).await?.check_valid()?;
        let app = Arc::clone(self);
        let attempted = tokio::spawn(async move { app.change_by_code(intent, user, proof).await });
        attempted.await.map_err(Error::internal)?
    }

    /// Makes one try of the change, with what `more` adds, if all that it rests on is as it was
    /// read.
    async fn try_change(
        &self,
        intent: &Intent,
        backing: Backing,
        rests_on: Vec<(Key, Expect)>,
        more: impl FnOnce(Batch) -> Batch,
    ) -> Result<Round> {
        let (key, version) = self.right_to_change(intent, backing).await?;
        let batch = more(self.change_batch(intent, backing).await?);
        let mut rests_on = rests_on.into_iter().chain([(key, Expect::At(version))]);
        let committed = match rests_on.try_fold(batch, |b, (key, expect)| b.rest_on(key, expect)) {
            Ok(batch) => self.store.commit(batch).await,
            Err(lost) => Err(lost),
        };
        match committed {
            Ok(_) => Ok(Round::Made),
            Err(CommitError::Conflict { .. }) => Ok(Round::Lost),
            Err(error @ CommitError::Store(_)) => Err(error.into()),
        }
    }

    /// Asks for the right again, which the use case asked for first: while AWS answered, it may
    /// have ended. Answers the record that says so.
    async fn right_to_change(&self, intent: &Intent, backing: Backing) -> Result<(Key, Version)> {
        let (right, environment) = intent.change.right();
        let (caller, organization) = (&intent.caller, intent.organization);
        match self.standing_in(caller, organization, right, environment).await {
            Ok(standing) => Ok(standing.rests_on),
            Err(error)
                if backing == Backing::Code
                    && matches!(error.reason(), Reason::NotFound | Reason::NotAllowed) =>
            {
                let message = "you may not do this any more: your rights were changed while AWS \
                               looked at the code. Nothing was changed, and the code is spent";
                Err(Error::refused(Reason::NotAllowed, message))
            }
            Err(error) => Err(error),
        }
    }

    /// Makes the commit that a change is, as things stand.
    async fn change_batch(&self, intent: &Intent, backing: Backing) -> Result<Batch> {
        let Intent { caller, organization, change } = intent;
        match change {
            GuardedChange::Settings { environment, change } => {
                let found = self.environment(*organization, *environment).await?;
                self.settings_batch(caller, found, *change.clone(), backing).await
            }
            GuardedChange::Create { name, settings, request } => {
                self.creation_batch(caller, *organization, name, *settings.clone(), request).await
            }
            GuardedChange::Accounts(accounts) => {
                self.accounts_batch(caller, *organization, accounts).await
            }
            GuardedChange::SetVariable { stored, scope, variable } => {
                let place = (*stored, scope);
                let by_code = backing == Backing::Code;
                let batch = self.set_batch(caller, *organization, place, variable, by_code).await?;
                let batch = self.with_guard(batch, *organization, *stored, &variable.name).await?;
                Ok(match backing {
                    Backing::Code => self.without_old_secret(batch, *stored, variable).await?,
                    Backing::RightAlone => batch,
                })
            }
            GuardedChange::DeleteVariable { stored, scope, category, name } => {
                let place = (*stored, scope);
                let batch =
                    self.delete_batch(caller, *organization, place, *category, name).await?;
                Ok(match backing {
                    Backing::Code => self.without_guard(batch, *organization, *stored).await?,
                    Backing::RightAlone => batch,
                })
            }
        }
    }

    async fn subject_of(&self, intent: &Intent) -> Result<String> {
        Ok(match &intent.change {
            GuardedChange::Settings { environment, .. } => {
                let found = self.environment(intent.organization, *environment).await?;
                format!("environment {}", found.value.name)
            }
            GuardedChange::Create { name, .. } => format!("environment {name}"),
            GuardedChange::Accounts(_) => {
                let found = self.organization(intent.organization).await?;
                format!("organization {}", found.value.name)
            }
            GuardedChange::SetVariable { variable: NewVariable { name, .. }, .. }
            | GuardedChange::DeleteVariable { name, .. } => format!("variable {name}"),
        })
    }
}

fn too_fast() -> Error {
    Error::refused(Reason::ChangedMeanwhile, "it changes too fast; look again")
}

#[cfg(test)]
mod tests;
