//! The end of a runner's identity: what is cut off at once, what becomes of what it holds, and
//! what every later commit in its name depends on.

use std::sync::Arc;

use latchkey_domain::id::{Epoch, JobId, RunnerId};
use latchkey_domain::policy::Phase;
use latchkey_domain::run::Event;
use latchkey_proto::v1::Reason;
use tracing::Instrument;

use super::RunnerView;
use crate::app::App;
use crate::auth::Caller;
use crate::error::{Error, Result};
use crate::store::record::Loaded;
use crate::store::record::runner::Runner;
use crate::store::{Expect, Key, keys};

pub(in crate::app) fn revoked() -> Error {
    Error::refused(
        Reason::IdentityRequired,
        "the runner was revoked; enroll the host again with a new pool token",
    )
}

impl App {
    /// Ends a runner's identity for good, and with it all that it holds.
    pub async fn revoke_runner(
        self: &Arc<Self>,
        caller: &Caller,
        id: RunnerId,
    ) -> Result<RunnerView> {
        let (app, caller) = (Arc::clone(self), caller.clone());
        // In a task of its own: what is revoked in the store must be cut off here, whether or
        // not the owner waits for it.
        let revoking = async move {
            let revoked = app.steer(&caller, id, "revoke_runner", |runner, now| {
                let changes = runner.revoked_at.is_none();
                runner.revoked_at.get_or_insert(now.into());
                Ok(changes)
            });
            let runner = revoked.await?;
            app.cut_off(id);
            // No grant to it is committed any more, so what is listed now is all.
            for run in app.open_runs().await? {
                for phase in Phase::ALL {
                    let held = run.job(phase).lease.as_ref().filter(|lease| lease.runner == id);
                    if let Some(lease) = held {
                        app.end_lease_of_revoked(run.job_id(phase), id, lease.epoch).await?;
                    }
                }
            }
            Ok::<_, Error>(runner)
        };
        let runner = tokio::spawn(revoking.in_current_span()).await.map_err(Error::internal)??;
        self.shown_runner(runner, None).await
    }

    /// Ends what this process has of a runner whose record says that it is revoked.
    pub(super) fn cut_off(&self, id: RunnerId) {
        self.revocations.revoke(id);
        self.dispatch.expel(id);
    }

    pub(in crate::app) async fn end_lease_of_revoked(
        self: &Arc<Self>,
        job: JobId,
        runner: RunnerId,
        epoch: Epoch,
    ) -> Result<()> {
        let ended = self
            .advance(job.run, "system", "end_lease_of_revoked_runner", |_| {
                Ok(Event::RunnerRevoked { phase: job.phase, runner, epoch })
            })
            .await;
        match ended {
            Ok(_) => {}
            // It ended by itself meanwhile.
            Err(error) if error.reason() == Reason::LeaseLost => {}
            Err(error) => return Err(error),
        }
        self.dispatch.released(job, epoch);
        Ok(())
    }

    /// Makes a commit depend on the identity that it is made for: refuses a runner that has been
    /// revoked since its call was let pass.
    pub(in crate::app) async fn identity_guard(&self, id: RunnerId) -> Result<(Key, Expect)> {
        let found = self.fetch::<Runner>(keys::runner(id)).await?;
        self.unrevoked(id, found)
    }

    pub(super) fn unrevoked(
        &self,
        id: RunnerId,
        found: Option<Loaded<Runner>>,
    ) -> Result<(Key, Expect)> {
        match found {
            Some(Loaded { value, .. }) if value.revoked_at.is_some() => {
                self.cut_off(id);
                Err(revoked())
            }
            Some(Loaded { key, version, .. }) => Ok((key, Expect::At(version))),
            // Records of runners are never deleted: whoever has none was never enrolled here.
            None => Err(Error::refused(Reason::IdentityRequired, "no such runner is enrolled")),
        }
    }

    /// Tells whether an owner has ended a runner's identity.
    pub(in crate::app) async fn is_revoked(&self, id: RunnerId) -> Result<bool> {
        let found = self.fetch::<Runner>(keys::runner(id)).await?;
        Ok(found.is_some_and(|found| found.value.revoked_at.is_some()))
    }
}
