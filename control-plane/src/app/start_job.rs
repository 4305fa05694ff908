//! Answers `Starting` with `Go`: the one place where credentials leave.
//!
//! What the phase may have is judged by the domain in the commit that releases it; the audit
//! record of the release is part of that commit, so nothing leaves unrecorded. A repeat, after
//! a lost answer or for a replaced supervisor, is given the same again and is not judged again.

use std::sync::Arc;

use latchkey_domain::id::JobId;
use latchkey_domain::policy::Phase;
use latchkey_domain::run::Event;
use latchkey_proto::v1::Reason;

use super::App;
use super::credentials::Plain;
use super::finish_job::{LONGEST_REASON, printable};
use super::lease_job::lease_lost;
use super::transition::{Advance, Decision, Details, Guard, Subject};
use super::variables::JobVariable;
use crate::auth::RunnerIdentity;
use crate::error::{Error, Result};
use crate::job::LeaseRef;
use crate::store::record::authentication::{CredentialsKind, Session};
use crate::store::record::encode;
use crate::store::{Batch, Expect, keys};
use crate::sts::Credentials;

/// How often a release is tried whose variables change meanwhile.
const ATTEMPTS: usize = 4;

/// What a job starts with.
#[derive(Debug)]
pub struct Go {
    pub session: Option<Credentials>,
    pub variables: Vec<JobVariable>,
}

/// The answer to `Starting`.
#[derive(Debug)]
pub enum Start {
    Go(Go),
    /// The lease is over: the run waits for a code again, or cannot start at all.
    Revoked {
        reason: String,
    },
    /// A person had it killed: there is nothing to start with.
    Forced,
}

impl App {
    pub async fn start_job(
        self: &Arc<Self>,
        runner: &RunnerIdentity,
        lease: LeaseRef,
    ) -> Result<Start> {
        latchkey_failpoint::reach("cp.starting.received");
        let subject = self.leased(runner, lease).await?;
        let job = lease.job;
        let phase = job.phase;
        let held = subject.run.value.job(phase).lease.as_ref().ok_or_else(lease_lost)?;
        if subject.run.value.forced_by.is_some() {
            return Ok(Start::Forced);
        }
        let plain = if held.released.is_some() {
            None
        } else {
            match self.plain_credentials(&subject, phase).await {
                Ok(plain) => plain,
                Err(reason) => return self.cannot_start(runner, lease, reason).await,
            }
        };
        let advance = self.release_phase(runner, lease, plain).await?;
        let run = advance.into_run();
        let released = run.job(phase).lease.as_ref().and_then(|lease| lease.released);
        if released.is_none() {
            let reason = run.reason.unwrap_or_else(|| "the lease is over".into());
            return Ok(Start::Revoked { reason });
        }
        latchkey_failpoint::reach("cp.go.committed");
        self.go(runner, lease).await
    }

    /// Commits the release of a phase: what it gets, and what a plan leaves to its apply.
    async fn release_phase(
        self: &Arc<Self>,
        runner: &RunnerIdentity,
        lease: LeaseRef,
        plain: Option<Plain>,
    ) -> Result<Advance> {
        let LeaseRef { job, epoch, .. } = lease;
        let phase = job.phase;
        let place = keys::session(job.run, phase);
        let waiting = plain.as_ref().map(|plain| Session {
            authentication: None,
            credentials: self.seal_session(&place, &plain.credentials),
            expires_at: plain.credentials.expires_at.map(Into::into),
            kind: Some(plain.kind.clone()),
            account: plain.account.clone(),
        });
        let actor = runner.audit_name();
        let release = (actor.as_str(), "release_credentials");
        let mut attempts = 0;
        loop {
            let kept = self.kept_for_apply(lease).await?;
            let advance = self
                .advance_guarded(job.run, Guard::Identity(runner.id), release, |subject| {
                    let event = Event::Starting {
                        phase,
                        runner: runner.id,
                        epoch,
                        current: subject.environment.value.settings.demands(),
                        floor: self.floor(&subject.environment.value.settings),
                    };
                    let job = subject.run.value.job(phase);
                    let batch = match (&waiting, &job.evidence) {
                        (Some(waiting), _) => {
                            kept.clone().put(place.clone(), Expect::Anything, encode(waiting))
                        }
                        // What an earlier lease was given is not this one's to have.
                        (None, None) => kept.clone().delete(place.clone(), Expect::Anything),
                        (None, Some(_)) => kept.clone(),
                    };
                    let mut details = vec![("epoch", epoch.get().into())];
                    match (&plain, &job.evidence) {
                        (Some(plain), _) => details.extend(told_of(plain)),
                        (None, None) => details.push(("credentials", "none".into())),
                        (None, Some(_)) => {
                            details.push(("credentials", "the session of the code".into()));
                        }
                    }
                    Ok(Decision { event, batch, details })
                })
                .await;
            attempts += 1;
            match advance {
                // One of the variables was changed: as they are now, then.
                Err(error) if error.reason() == Reason::ChangedMeanwhile && attempts < ATTEMPTS => {
                }
                done => return done,
            }
        }
    }

    /// Makes what the release of a plan fixes for its apply; nothing for one that was released
    /// before, or granted before anything was fixed.
    async fn kept_for_apply(&self, lease: LeaseRef) -> Result<Batch> {
        let run = self.run(lease.job.run).await?.value;
        let released = run.plan.lease.as_ref().is_some_and(|held| held.released.is_some());
        match lease.job.phase {
            Phase::Plan if run.site.is_some() && !released => self.keep_variables(&run).await,
            Phase::Plan | Phase::Apply => Ok(Batch::new()),
        }
    }

    /// Answers a supervisor that was replaced while terraform runs.
    pub async fn start_again(
        self: &Arc<Self>,
        runner: &RunnerIdentity,
        lease: LeaseRef,
    ) -> Result<Start> {
        let subject = self.leased(runner, lease).await?;
        let run = &subject.run.value;
        if run.forced_by.is_some() {
            return Ok(Start::Forced);
        }
        let held = run.job(lease.job.phase).lease.as_ref();
        match held.and_then(|held| held.released) {
            Some(_) => self.go(runner, lease).await,
            None => Err(lease_lost()),
        }
    }

    /// Answers what a released lease starts with.
    pub(super) async fn go(&self, runner: &RunnerIdentity, lease: LeaseRef) -> Result<Start> {
        let JobId { run: id, phase } = lease.job;
        let session = self.session_of(id, phase).await?;
        // Judged after the session was read: what takes one away, a kill or the lease's end, shows
        // here, so that no phase starts without the session it was released with.
        let run = self.leased(runner, lease).await?.run.value;
        if run.forced_by.is_some() {
            return Ok(Start::Forced);
        }
        let variables = self.job_variables(&run).await?;
        // Last: the alarm may have come since the lease was looked at.
        self.check_history()?;
        Ok(Start::Go(Go { session, variables }))
    }

    /// Gets what a phase that demands no code is given. The error is for the run's reason.
    async fn plain_credentials(
        &self,
        subject: &Subject,
        phase: Phase,
    ) -> Result<Option<Plain>, String> {
        let run = &subject.run.value;
        let current = subject.environment.value.settings.demands();
        let denied = phase == Phase::Apply && !run.is_approved_by_another(&current);
        if run.job(phase).evidence.is_some() || run.requires_code(phase, &current) || denied {
            return Ok(None);
        }
        self.plain(subject, phase).await
    }

    /// Ends a run whose job no runner of this kind can prepare: the next would fail alike.
    pub async fn decline_job(
        self: &Arc<Self>,
        runner: &RunnerIdentity,
        lease: LeaseRef,
        reason: String,
    ) -> Result<()> {
        self.leased(runner, lease).await?;
        self.cannot_start(runner, lease, printable(&reason, LONGEST_REASON)).await.map(drop)
    }

    async fn cannot_start(
        self: &Arc<Self>,
        runner: &RunnerIdentity,
        lease: LeaseRef,
        reason: String,
    ) -> Result<Start> {
        let LeaseRef { job, epoch, .. } = lease;
        let advance = self
            .advance_guarded(
                job.run,
                Guard::Identity(runner.id),
                ("system", "refuse_start"),
                |_| {
                    Ok(Decision::from(Event::CannotStart {
                        phase: job.phase,
                        runner: runner.id,
                        epoch,
                        reason: reason.clone(),
                    }))
                },
            )
            .await;
        match advance {
            Ok(_) => Ok(Start::Revoked { reason }),
            Err(error) if error.reason() == Reason::LeaseLost => Err(lease_lost()),
            Err(error) => Err(Error::internal(error)),
        }
    }
}

/// What the audit record of a release tells of credentials that no code bought.
fn told_of(plain: &Plain) -> Details {
    let mut details: Details = match &plain.kind {
        CredentialsKind::Session => vec![("credentials", "a session without MFA".into())],
        CredentialsKind::Role(arn) => vec![
            ("credentials", "a role, assumed without MFA".into()),
            ("role", arn.as_str().into()),
        ],
        CredentialsKind::Static => vec![
            ("credentials", "the organization's long-term keys themselves".into()),
            ("access_key_id", plain.credentials.access_key_id.as_str().into()),
        ],
    };
    details.extend(plain.packed_percent.map(|percent| ("packed_policy_percent", percent.into())));
    details
}
