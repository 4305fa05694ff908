//! Another code while an apply runs, so that it can run on.
//!
//! The code takes the way of every code (see [`super::authenticate_run`]): counted, spent once,
//! recorded, audited. What differs is what it is for. The session that it buys replaces the one of
//! the phase, and is given to whoever holds the lease; a runner that is away gets it when it is
//! back. Terraform fetches it with its next look at the container endpoint.
//!
//! It is never another kind of credentials than those the apply was started with, nor of another
//! account: the approval was given for these. And where a second person has to approve, who queued
//! the run tops nothing up: terraform would go on with a session of theirs.

use std::sync::Arc;
use std::time::Duration;

use latchkey_domain::id::{AuthenticationId, RunId};
use latchkey_domain::policy::{Permit, Phase};
use latchkey_domain::run::Run;
use latchkey_domain::time::Timestamp;
use latchkey_proto::v1::Reason;
use secrecy::SecretString;

use super::App;
use super::authenticate_run::Submission;
use super::transition::Subject;
use crate::auth::Caller;
use crate::error::{Error, Result, rfc3339};
use crate::store::keys;
use crate::store::record::Loaded;
use crate::store::record::authentication::{Authentication, CredentialsKind, Purpose, Session};
use crate::sts::{Wanted, account_of};

/// AWS's clock and ours may differ.
const SLACK: Duration = Duration::from_secs(300);

impl App {
    pub async fn top_up(
        self: &Arc<Self>,
        caller: &Caller,
        run: RunId,
        code: SecretString,
        request_id: String,
    ) -> Result<(Run, AuthenticationId)> {
        let submission = Submission {
            run,
            phase: Phase::Apply,
            code,
            seen: None,
            request_id,
            purpose: Purpose::TopUp,
        };
        self.authenticate_run(caller, submission).await
    }

    /// Refuses, before anything is spent, what could not replace the session in use.
    pub(super) async fn check_top_up(
        &self,
        subject: &Subject,
        phase: Phase,
        name: &str,
        wanted: &Wanted,
    ) -> Result<()> {
        let run = &subject.run.value;
        let lease = run.job(phase).lease.as_ref();
        let released = lease.is_some_and(|lease| lease.released.is_some());
        if run.running_phase() != Some(phase) || !released || run.forced_by.is_some() {
            let message = format!(
                "a session is topped up while the apply runs; the run is in {}. Nothing was spent",
                run.state
            );
            return Err(
                Error::refused(Reason::WrongState, message).with("state", run.state.as_str())
            );
        }
        let current = subject.environment.value.settings.demands();
        if !run.may_be_approved_by(name, &current) {
            return Err(latchkey_domain::run::Refusal::SecondPersonRequired.into());
        }
        let refuse = |message: String| Err(Error::refused(Reason::WrongState, message));
        let Some(session) = self.fetch::<Session>(keys::session(run.id, phase)).await? else {
            return refuse("the apply runs without credentials; there is nothing to top up".into());
        };
        let session = session.value;
        let kind = session.kind.unwrap_or(CredentialsKind::Session);
        let now_wanted = match &wanted.role {
            Some(role) => CredentialsKind::Role(role.arn.clone()),
            None => CredentialsKind::Session,
        };
        match (&kind, session.expires_at.map(Timestamp::from)) {
            (CredentialsKind::Static, _) | (_, None) => {
                refuse("the apply has long-term keys, which do not expire".into())
            }
            _ if kind != now_wanted => refuse(format!(
                "the apply was started with {}, and by the environment's settings a code now buys \
                 {}; nothing was spent. An owner sets them back with `latchkey env set`",
                described(&kind),
                described(&now_wanted)
            )),
            (_, Some(expires_at)) if self.now() + wanted.duration + SLACK < expires_at => {
                refuse(format!(
                    "the session in use lives until {}, longer than one that a code would buy now; \
                 nothing was spent",
                    rfc3339(expires_at)
                ))
            }
            (_, Some(_)) => Ok(()),
        }
    }

    /// Refuses a session of another account than the one in use.
    pub(super) async fn check_same_account(
        &self,
        record: &Authentication,
        account: &str,
    ) -> Result<()> {
        let place = keys::session(record.run.0, record.phase);
        let found: Option<Loaded<Session>> = self.fetch(place.clone()).await?;
        let Some(found) = found else {
            // The phase has ended meanwhile; that is told by the commit.
            return Ok(());
        };
        let known = match found.value.account.clone() {
            Some(account) => Some(account),
            None => {
                let in_use = self.open_session(&place, &found.value.credentials)?;
                account_of(&in_use.access_key_id)
            }
        };
        if known.as_deref() == Some(account) {
            return Ok(());
        }
        let known = known.unwrap_or_else(|| "one that is not known".into());
        let message = format!(
            "the code bought a session of the account {account}, but the apply runs in {known}; it \
             is not used. Top up with keys of the same account"
        );
        Err(Error::refused(Reason::AccountNotListed, message).with("account", account))
    }

    /// Gives the credentials that a held phase has now to its runner, which may have been away when
    /// they were replaced.
    pub(super) fn renew_if_topped_up(&self, run: &Run, phase: Phase) {
        let job = run.job(phase);
        let (Some(lease), Some(evidence)) = (&job.lease, &job.evidence) else { return };
        let Some(released) = lease.released else { return };
        let first = Permit::MfaSession { authentication: evidence.authentication };
        if released.permit != first {
            self.dispatch.renew(run.job_id(phase), lease.epoch);
        }
    }
}

fn described(kind: &CredentialsKind) -> String {
    match kind {
        CredentialsKind::Session => "a session of the keys".into(),
        CredentialsKind::Role(arn) => format!("the role {arn}"),
        CredentialsKind::Static => "the long-term keys".into(),
    }
}

#[cfg(test)]
mod tests;
