//! What dispatch asks of the use cases, with a defect where one is planted.

use std::sync::Arc;

use latchkey_control_plane::app::App;
use latchkey_control_plane::dispatch::Leases;
use latchkey_control_plane::error::Result;
use latchkey_control_plane::job::{JobSpec, LeaseRef};
use latchkey_control_plane::store::record::run::RunRecord;
use latchkey_control_plane::store::record::{self, Loaded, encode};
use latchkey_control_plane::store::{Batch, BoxFuture, Expect, keys};
use latchkey_domain::id::{Epoch, Generation, JobId, RunnerId};
use latchkey_domain::lease::Lease;
use latchkey_domain::policy::Phase;
use latchkey_domain::run::{Run, RunState};
use latchkey_domain::time::Timestamp;

use crate::plan::Plant;
use crate::world::World;

pub(crate) struct Planted {
    pub(crate) app: Arc<App>,
    pub(crate) world: Arc<World>,
}

impl Planted {
    async fn read(&self, job: JobId) -> Result<Option<Loaded<Run>>> {
        Ok(record::fetch::<RunRecord, _>(&*self.app.store, keys::run(job.run)).await?)
    }

    async fn overwrite(&self, run: &Run) -> Result<()> {
        let value = encode(&RunRecord::from(run));
        let batch = Batch::new().put(keys::run(run.id), Expect::Anything, value);
        self.app
            .store
            .commit(batch)
            .await
            .map_err(latchkey_control_plane::error::Error::internal)?;
        Ok(())
    }

    /// Decides on what it has read, however old that is by then.
    async fn grant_blindly(
        &self,
        job: JobId,
        runner: RunnerId,
    ) -> Result<Option<(LeaseRef, JobSpec)>> {
        let Some(read) = self.read(job).await? else { return Ok(None) };
        tokio::time::sleep(self.world.chance.millis(50, 2500)).await;
        match App::grant(&self.app, job, runner).await {
            Ok(granted) => Ok(Some(granted)),
            Err(_) => {
                let mut run = read.value;
                let granted = match job.phase {
                    Phase::Plan => &mut run.plan,
                    Phase::Apply => &mut run.apply,
                };
                let lease = Lease::after(granted.epoch, runner, 0, None, self.app.now());
                granted.epoch = lease.epoch;
                granted.lease = Some(lease);
                run.state = match job.phase {
                    Phase::Plan => RunState::Planning,
                    Phase::Apply => RunState::Applying,
                };
                self.overwrite(&run).await?;
                Ok(None)
            }
        }
    }

    /// Treats an apply like any job that may be done again.
    async fn expire_as_any_job(&self, job: JobId, epoch: Epoch) -> Result<()> {
        let Some(read) = self.read(job).await? else { return Ok(()) };
        let mut run = read.value;
        let held = run.apply.lease.as_ref();
        if job.phase == Phase::Apply
            && held.is_some_and(|l| l.epoch == epoch && l.released.is_some())
        {
            run.apply.lease = None;
            run.state = RunState::ApplyQueued;
            self.overwrite(&run).await?;
            return App::offer_if_open(&self.app, job).await;
        }
        App::expire(&self.app, job, epoch).await
    }
}

impl Leases for Planted {
    fn grant(
        self: Arc<Self>,
        job: JobId,
        runner: RunnerId,
    ) -> BoxFuture<'static, Result<Option<(LeaseRef, JobSpec)>>> {
        if self.world.plant == Some(Plant::BlindGrant) {
            return Box::pin(async move { self.grant_blindly(job, runner).await });
        }
        Leases::grant(Arc::clone(&self.app), job, runner)
    }

    fn expire(self: Arc<Self>, job: JobId, epoch: Epoch) -> BoxFuture<'static, Result<()>> {
        if self.world.plant == Some(Plant::ApplyAgain) {
            return Box::pin(async move { self.expire_as_any_job(job, epoch).await });
        }
        Leases::expire(Arc::clone(&self.app), job, epoch)
    }

    fn offer_if_open(self: Arc<Self>, job: JobId) -> BoxFuture<'static, Result<()>> {
        Leases::offer_if_open(Arc::clone(&self.app), job)
    }

    fn two_of_one(self: Arc<Self>, runner: RunnerId) -> BoxFuture<'static, Result<()>> {
        Leases::two_of_one(Arc::clone(&self.app), runner)
    }

    fn generation(&self) -> Generation {
        Leases::generation(&*self.app)
    }

    fn now(&self) -> Timestamp {
        self.app.now()
    }
}
