//! Leases: granted by a compare-and-swap, given back, expired, taken up again.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use latchkey_domain::id::{Epoch, Generation, JobId, RunnerId};
use latchkey_domain::lease::{Engine, Lease, Site};
use latchkey_domain::policy::Phase;
use latchkey_domain::run::{Event, Run, RunState};
use latchkey_domain::time::Timestamp;
use latchkey_proto::v1::Reason;

use super::App;
use super::settings::is_exact;
use super::transition::{Decision, Guard, Subject, of_phase, wanted};
use crate::auth::RunnerIdentity;
use crate::dispatch::{Leases, Stop, Wanted};
use crate::error::{Error, Result};
use crate::job::{JobSpec, LeaseRef};
use crate::store::BoxFuture;

/// What a runner is told of a lease that is not its any more.
const OVER: &str = "the lease is over";

/// What is to become of a job that a runner says it holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Held {
    Keep,
    /// Keep, and ask terraform to stop, or kill it: a person did so while the runner could not
    /// hear.
    KeepCanceled {
        stop: Stop,
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
        // With what a runner that went away in mid-append left written: this lease begins behind it.
        let settled = self.logs.settle(job.run, job.phase).await;
        let mut length = settled.map_err(Error::internal)?;
        if length > 0 {
            // A log at its limit takes no more; the job is granted all the same.
            match self.note_in_log(job, length, "leased again: the phase starts over").await {
                Ok(longer) => length = longer,
                Err(error) => tracing::warn!(%job, error = %error, "the log says nothing of it"),
            }
        }
        let actor = format!("runner {runner}");
        let grant = (actor.as_str(), "grant_lease");
        let advance = self
            .advance_guarded(job.run, Guard::Grant(runner), grant, |subject| {
                let state = subject.environment.value.state.as_ref().map(|state| state.number);
                let settings = &subject.environment.value.settings;
                let wanted = wanted(&subject.run.value, job.phase, settings);
                Ok(Decision::from(Event::Granted {
                    phase: job.phase,
                    runner,
                    log_base: length,
                    state,
                    engine: Engine { name: wanted.engine, version: wanted.version },
                    site: Site {
                        region: settings.region.clone(),
                        working_directory: settings.working_directory.clone(),
                    },
                    floor: self.floor(settings),
                }))
            })
            .await?;
        latchkey_failpoint::reach("cp.grant.committed");
        let run = advance.into_run();
        let granted = run.job(job.phase);
        if granted.lease.is_none() {
            // Its credentials have too little life left: it waits for a code again.
            return Err(latchkey_domain::run::Refusal::WrongState.into());
        }
        let epoch = granted.epoch;
        // What is fixed for the lease, and not what was there a moment before.
        if let Some(Site { region, working_directory }) = &run.site {
            spec.region.clone_from(region);
            spec.working_directory.clone_from(working_directory);
        }
        if let Some(lease) = &granted.lease {
            spec.has_state = lease.state.is_some();
            spec.engine.clone_from(&lease.engine.name);
            spec.terraform_version.clone_from(&lease.engine.version);
        }
        self.dispatch.watch(job, epoch, runner);
        self.gates.of(job).epoch.store(epoch.get(), Ordering::SeqCst);
        Ok((LeaseRef { job, epoch, generation: self.generation }, spec))
    }

    async fn job_spec(&self, run: &Run, phase: Phase) -> Result<JobSpec> {
        let request = &run.request;
        let environment = self.environment(request.organization, request.environment).await?.value;
        let environment = of_phase(&environment, run, phase);
        let organization = self.organization(request.organization).await?.value.name;
        let Wanted { engine, version: terraform_version } =
            wanted(run, phase, &environment.settings);
        let (archive, approved) = match (phase, &run.planned) {
            (Phase::Plan, _) => (request.configuration, None),
            (Phase::Apply, Some(_)) if !is_exact(&terraform_version) => {
                let message = "its plan does not say which version of the engine made it: discard \
                               it and queue it again";
                return Err(Error::refused(Reason::WrongState, message));
            }
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
        self.advance_by(runner, job.run, "hand_back_job", |_| {
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
            .advance_by(runner, job.run, "return", |_| {
                Ok(Event::Returned { phase: job.phase, runner: runner.id, epoch })
            })
            .await;
        match returned {
            Ok(advance) => {
                self.dispatch.watch(job, epoch, runner.id);
                Ok(Held::of(&advance.into_run()))
            }
            Err(error) if matches!(error.reason(), Reason::LeaseLost | Reason::NotFound) => {
                Ok(Held::GiveUp)
            }
            Err(error) => Err(error),
        }
    }

    /// Asks again, once a runner's stream is registered, what is to become of what it holds, and
    /// has dispatch tell it: what was decided while it connected reached nobody.
    pub async fn confirm_held(
        self: &Arc<Self>,
        runner: &RunnerIdentity,
        held: &[LeaseRef],
    ) -> Result<()> {
        for lease in held {
            let LeaseRef { job, epoch, .. } = *lease;
            match self.take_up(runner, *lease).await? {
                Held::Keep => {}
                Held::KeepCanceled { stop } => self.dispatch.cancel(job, epoch, stop),
                Held::GiveUp => {
                    self.dispatch.revoke(job, epoch, OVER);
                    continue;
                }
            }
            self.renew_if_topped_up(&self.run(job.run).await?.value, job.phase);
        }
        Ok(())
    }

    /// Fetches the run of a lease, if the runner holds it now and is not revoked.
    pub(super) async fn leased(&self, runner: &RunnerIdentity, lease: LeaseRef) -> Result<Subject> {
        self.check_generation(lease)?;
        self.identity_guard(runner.id).await?;
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

    /// Tells dispatch of every open job and standing lease it does not know, and repeats to
    /// runners what the store asks of them. Rebuilds at a start what lives in memory only, and
    /// mends later what a failure made it miss. Idempotent, here and at the runners.
    pub async fn reconcile(self: &Arc<Self>) -> Result<()> {
        // First: a lease that is watched by now was granted in the store, or is over there.
        let watched = self.dispatch.watched().await;
        for run in self.open_runs().await? {
            for phase in Phase::ALL {
                if let Some(lease) = &run.job(phase).lease {
                    self.reconcile_lease(&run, phase, lease).await?;
                }
            }
            if let Some(phase) = run.open_phase() {
                let request = &run.request;
                let environment =
                    self.environment(request.organization, request.environment).await?.value;
                self.offer(&run, phase, &environment);
            }
        }
        for (job, epoch, runner) in watched {
            let run = match self.run(job.run).await {
                Ok(run) => run.value,
                Err(error) if error.reason() == Reason::NotFound => continue,
                Err(error) => return Err(error),
            };
            let known = run.job(job.phase);
            if known.lease.as_ref().is_some_and(|lease| lease.is(runner, epoch)) {
                continue;
            }
            if known.ended_at.is_some() && known.epoch == epoch {
                // It ended by its runner's word.
                self.dispatch.released(job, epoch);
            } else {
                self.dispatch.revoke(job, epoch, OVER);
            }
        }
        Ok(())
    }

    async fn reconcile_lease(
        self: &Arc<Self>,
        run: &Run,
        phase: Phase,
        lease: &Lease,
    ) -> Result<()> {
        let (job, epoch) = (run.job_id(phase), lease.epoch);
        if self.is_revoked(lease.runner).await? {
            return self.end_lease_of_revoked(job, lease.runner, epoch).await;
        }
        if run.state == RunState::Lost {
            return Ok(());
        }
        self.dispatch.watch_unknown(job, epoch, lease.runner);
        match Held::of(run) {
            Held::KeepCanceled { stop } => self.dispatch.cancel(job, epoch, stop),
            Held::Keep | Held::GiveUp => {}
        }
        Ok(())
    }
}

impl Held {
    /// Tells what the holder of a run's lease is to do with it.
    fn of(run: &Run) -> Self {
        match (&run.forced_by, &run.cancel_requested_by) {
            (Some(_), _) => Held::KeepCanceled { stop: Stop::ByForce },
            (None, Some(_)) => Held::KeepCanceled { stop: Stop::Gracefully },
            (None, None) => Held::Keep,
        }
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
