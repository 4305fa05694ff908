//! Leases: granted by a compare-and-swap, given back, expired, taken up again.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use latchkey_domain::id::{Epoch, Generation, JobId, RunnerId};
use latchkey_domain::policy::Phase;
use latchkey_domain::run::{Event, Run, RunState};
use latchkey_domain::time::Timestamp;
use latchkey_proto::v1::Reason;

use super::App;
use super::transition::{Decision, Subject, wanted};
use crate::auth::RunnerIdentity;
use crate::dispatch::{Leases, Wanted};
use crate::error::{Error, Result};
use crate::job::{JobSpec, LeaseRef};
use crate::store::{Batch, BoxFuture};

/// What is to become of a job that a runner says it holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Held {
    Keep,
    /// Keep, and ask terraform to stop, or kill it: a person did so while the runner could not
    /// hear.
    KeepCanceled {
        force: bool,
    },
    GiveUp,
}

impl App {
    /// Grants an open job to a runner, if nobody else was faster.
    pub async fn grant(
        self: &Arc<Self>,
        job: JobId,
        runner: RunnerId,
    ) -> Result<(LeaseRef, JobSpec)> {
        self.check_history()?;
        let gate = self.gates.of(job);
        let _locked = gate.lock.lock().await;
        let run = self.run(job.run).await?.value;
        if run.open_phase() != Some(job.phase) {
            return Err(latchkey_domain::run::Refusal::WrongState.into());
        }
        let mut spec = self.job_spec(&run, job.phase).await?;
        let mut length = self.log_length(job.run, job.phase).await?;
        if length > 0 {
            // A log at its limit takes no more; the job is granted all the same.
            match self.note_in_log(job, length, "leased again: the phase starts over").await {
                Ok(longer) => length = longer,
                Err(error) => tracing::warn!(%job, error = %error, "the log says nothing of it"),
            }
        }
        let (record, expect) = self.guard_of(runner).await?;
        let advance = self
            .advance_with(job.run, &format!("runner {runner}"), "grant_lease", |subject| {
                let state = subject.environment.value.state.as_ref().map(|state| state.number);
                let event =
                    Event::Granted { phase: job.phase, runner, log_base: length, state };
                let batch = Batch::new().check(record.clone(), expect);
                Ok(Decision { batch, ..Decision::from(event) })
            })
            .await?;
        latchkey_failpoint::reach("cp.grant.committed");
        let run = advance.into_run();
        let granted = run.job(job.phase);
        let epoch = granted.epoch;
        // The one that is fixed for the lease, and not what was there a moment before.
        spec.has_state = granted.lease.as_ref().is_some_and(|lease| lease.state.is_some());
        self.dispatch.watch(job, epoch, runner);
        self.gates.of(job).epoch.store(epoch.get(), Ordering::SeqCst);
        Ok((LeaseRef { job, epoch, generation: self.generation }, spec))
    }

    async fn job_spec(&self, run: &Run, phase: Phase) -> Result<JobSpec> {
        let request = &run.request;
        let environment = self.environment(request.organization, request.environment).await?.value;
        let organization = self.organization(request.organization).await?.value.name;
        let Wanted { engine, version: terraform_version } =
            wanted(run, phase, &environment.settings);
        let (archive, approved) = match (phase, &run.planned) {
            (Phase::Plan, _) => (request.configuration, None),
            (Phase::Apply, Some(planned)) => {
                (planned.digests.workspace, Some(planned.digests.clone()))
            }
            (Phase::Apply, None) => {
                return Err(Error::internal("an apply was granted without a plan"));
            }
        };
        Ok(JobSpec {
            organization,
            environment: environment.name,
            kind: request.kind,
            archive,
            working_directory: environment.settings.working_directory,
            target: request.target.clone(),
            replace: request.replace.clone(),
            has_state: environment.state.is_some(),
            engine,
            terraform_version,
            approved,
            queued_by: request.queued_by.name().to_owned(),
            message: request.message.clone(),
            region: environment.settings.region,
        })
    }

    /// Takes back a job that its runner did not start.
    pub async fn hand_back(
        self: &Arc<Self>,
        runner: &RunnerIdentity,
        lease: LeaseRef,
    ) -> Result<()> {
        self.check_generation(lease)?;
        let LeaseRef { job, epoch, .. } = lease;
        // First, or the job would be offered to the same runner again.
        self.dispatch.rest(runner.id);
        self.advance(job.run, &runner.audit_name(), "hand_back_job", |_| {
            Ok(Event::HandedBack { phase: job.phase, runner: runner.id, epoch })
        })
        .await?;
        Ok(())
    }

    /// Ends a lease whose runner has been silent for a whole term.
    pub async fn expire(self: &Arc<Self>, job: JobId, epoch: Epoch) -> Result<()> {
        // On an old copy it is not for us to say what became of a job.
        self.check_history()?;
        let advance = self
            .advance(job.run, "system", "expire_lease", |_| {
                Ok(Event::LeaseExpired { phase: job.phase, epoch })
            })
            .await;
        match advance {
            Ok(_) => Ok(()),
            Err(error) if error.reason() == Reason::LeaseLost => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Decides what becomes of a job that a runner holds when it connects. A lost apply whose
    /// runner is back with its own lease goes on.
    pub async fn take_up(
        self: &Arc<Self>,
        runner: &RunnerIdentity,
        lease: LeaseRef,
    ) -> Result<Held> {
        self.check_generation(lease)?;
        let LeaseRef { job, epoch, .. } = lease;
        let returned = self
            .advance(job.run, &runner.audit_name(), "return", |_| {
                Ok(Event::Returned { phase: job.phase, runner: runner.id, epoch })
            })
            .await;
        match returned {
            Ok(advance) => {
                self.dispatch.watch(job, epoch, runner.id);
                let run = advance.into_run();
                Ok(match (run.forced_by, run.cancel_requested_by) {
                    (Some(_), _) => Held::KeepCanceled { force: true },
                    (None, Some(_)) => Held::KeepCanceled { force: false },
                    (None, None) => Held::Keep,
                })
            }
            Err(error) if matches!(error.reason(), Reason::LeaseLost | Reason::NotFound) => {
                Ok(Held::GiveUp)
            }
            Err(error) => Err(error),
        }
    }

    /// Fetches the run of a lease, if the runner holds it now.
    pub(super) async fn leased(&self, runner: &RunnerIdentity, lease: LeaseRef) -> Result<Subject> {
        self.check_generation(lease)?;
        let subject = match self.subject(lease.job.run).await {
            Ok(subject) => subject,
            // Ids of others are answered like any lease that is not theirs.
            Err(error) if error.reason() == Reason::NotFound => return Err(lease_lost()),
            Err(error) => return Err(error),
        };
        let run = &subject.run.value;
        let job = run.job(lease.job.phase);
        let current = job.lease.as_ref().is_some_and(|held| held.is(runner.id, lease.epoch));
        if current { Ok(subject) } else { Err(lease_lost()) }
    }

    /// Fetches every run that has not ended.
    pub(super) async fn open_runs(&self) -> Result<Vec<Run>> {
        let mut runs = vec![];
        for (key, _) in self.list(crate::store::keys::open_runs()).await? {
            if let Some(id) = key.last_id().map(latchkey_domain::id::RunId::from_bytes) {
                runs.push(self.run(id).await?.value);
            }
        }
        Ok(runs)
    }

    /// Tells dispatch of one job, if it is still open.
    pub async fn offer_if_open(&self, job: JobId) -> Result<()> {
        let Subject { run, environment } = self.subject(job.run).await?;
        if run.value.open_phase() == Some(job.phase) {
            self.offer(&run.value, job.phase, &environment.value);
        }
        Ok(())
    }

    /// Tells dispatch of every open job and standing lease it does not know. Rebuilds at a start
    /// what lives in memory only, and mends later what a failure made it miss. Idempotent.
    pub async fn reconcile(self: &Arc<Self>) -> Result<()> {
        for run in self.open_runs().await? {
            for phase in Phase::ALL {
                if let Some(lease) = &run.job(phase).lease
                    && run.state != RunState::Lost
                {
                    self.dispatch.watch_unknown(run.job_id(phase), lease.epoch, lease.runner);
                }
            }
            if let Some(phase) = run.open_phase() {
                let request = &run.request;
                let environment =
                    self.environment(request.organization, request.environment).await?.value;
                self.offer(&run, phase, &environment);
            }
        }
        Ok(())
    }
}

impl Leases for App {
    fn grant(
        self: Arc<Self>,
        job: JobId,
        runner: RunnerId,
    ) -> BoxFuture<'static, Result<Option<(LeaseRef, JobSpec)>>> {
        Box::pin(async move {
            match App::grant(&self, job, runner).await {
                Ok(granted) => Ok(Some(granted)),
                Err(error)
                    if matches!(error.reason(), Reason::WrongState | Reason::HistoryLost) =>
                {
                    Ok(None)
                }
                Err(error) => Err(error),
            }
        })
    }

    fn expire(self: Arc<Self>, job: JobId, epoch: Epoch) -> BoxFuture<'static, Result<()>> {
        Box::pin(async move {
            match App::expire(&self, job, epoch).await {
                // Nothing is left to watch: the alarm has been told.
                Err(error) if error.reason() == Reason::HistoryLost => Ok(()),
                done => done,
            }
        })
    }

    fn offer_if_open(self: Arc<Self>, job: JobId) -> BoxFuture<'static, Result<()>> {
        Box::pin(async move { App::offer_if_open(&self, job).await })
    }

    fn two_of_one(self: Arc<Self>, runner: RunnerId) -> BoxFuture<'static, Result<()>> {
        Box::pin(async move { self.record_fight(runner).await })
    }

    fn generation(&self) -> Generation {
        self.generation
    }

    fn now(&self) -> Timestamp {
        App::now(self)
    }
}

pub(super) fn lease_lost() -> Error {
    latchkey_domain::run::Refusal::LeaseLost.into()
}

/// The least life a session must have left when its phase starts.
pub const SESSION_FLOOR: Duration = Duration::from_secs(300);

#[cfg(test)]
mod tests;
