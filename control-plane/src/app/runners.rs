//! Runners as people see and steer them: shown, drained, resumed, revoked.
//!
//! What an owner decides is durable in the runner's record before anything follows from it, and
//! a grant is committed only against the record that it was judged by. So a drain that crosses a
//! grant is decided by the store, as is a [`revocation`] that crosses anything.

mod budget;
mod revocation;

use std::str::FromStr;

use latchkey_domain::id::{Epoch, JobId, OrganizationId, PoolId, RunnerId};
use latchkey_domain::policy::Phase;
use latchkey_domain::run::RunState;
use latchkey_domain::time::Timestamp;
use latchkey_proto::v1::Reason;

use super::{App, Page, PageRequest};
use crate::auth::{Caller, Position, Right, RunnerIdentity};
use crate::dispatch::{Abilities, Engine, Seen, Standing};
use crate::error::{Error, Result};
use crate::store::record::people::Access;
use crate::store::record::runner::{Pool, Runner, Said};
use crate::store::record::{Loaded, decode, encode};
use crate::store::{Batch, CommitError, Expect, Key, Scan, keys};

pub use self::budget::{Budget, Spending};
pub(super) use self::revocation::revoked;

/// How often a lost race is run again before the caller is told.
const ATTEMPTS: usize = 16;

/// A runner, and what this process knows of its connection.
#[derive(Debug)]
pub struct RunnerView {
    pub runner: Runner,
    pub pool: String,
    pub seen: Seen,
    /// Oldest first.
    pub holds: Vec<HeldJob>,
}

/// A job that a runner holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeldJob {
    pub job: JobId,
    pub epoch: Epoch,
    pub granted_at: Timestamp,
    pub started_at: Option<Timestamp>,
}

/// Where a page of runners ended: they are listed pool by pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    pool: PoolId,
    runner: RunnerId,
}

impl FromStr for Place {
    type Err = latchkey_domain::id::Malformed;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (pool, runner) = text.split_once('.').ok_or(latchkey_domain::id::Malformed)?;
        Ok(Self { pool: pool.parse()?, runner: runner.parse()? })
    }
}

impl App {
    pub async fn list_runners(
        &self,
        caller: &Caller,
        organization: &str,
        page: PageRequest,
    ) -> Result<Page<RunnerView>> {
        let member = self.member(caller, organization).await?;
        let organization = member.organization;
        let (size, after) = (page.size()?, page.after::<Place>()?);
        let mut found: Vec<(RunnerId, Pool)> = vec![];
        for (key, stored) in self.list(keys::pools_of(organization)).await? {
            let pool: Pool = decode(&key, &stored)?;
            if found.len() > size || after.is_some_and(|after| pool.id.0 < after.pool) {
                continue;
            }
            let behind = after.filter(|after| after.pool == pool.id.0);
            let behind = behind.map(|after| keys::runner_by_pool(after.pool, after.runner));
            let wanted = size + 1 - found.len();
            let scan = Scan::ascending(keys::runners_by_pool(pool.id.0), wanted).after(behind);
            let ids = self.scan(scan).await?.into_iter();
            let ids = ids.filter_map(|(key, _)| key.last_id().map(RunnerId::from_bytes));
            found.extend(ids.map(|id| (id, pool.clone())));
        }
        let more = found.len() > size;
        found.truncate(size);
        let next = found.last().filter(|_| more).map(|(runner, pool)| {
            let Pool { id, .. } = pool;
            format!("{}.{runner}", id.0)
        });
        let mut seen = self.dispatch.see(found.iter().map(|(id, _)| *id).collect()).await;
        let mut items = vec![];
        for (id, pool) in found {
            let Some(runner) = self.fetch::<Runner>(keys::runner(id)).await? else { continue };
            let seen = seen.remove(&id).unwrap_or_default();
            items.push(
                self.runner_view(runner.value, pool.name, seen, Some(&member.position)).await?,
            );
        }
        Ok(Page { items, next })
    }

    pub async fn show_runner(&self, caller: &Caller, id: RunnerId) -> Result<RunnerView> {
        let runner = self.runner_for(caller, id, Right::Belong).await?.value;
        let organization = runner.organization.0;
        let member = self.standing_in(caller, organization, Right::Belong, None).await?;
        self.shown_runner(runner, Some(&member.position)).await
    }

    /// Lets a runner finish what it holds and offers it nothing more.
    pub async fn drain_runner(&self, caller: &Caller, id: RunnerId) -> Result<RunnerView> {
        let drained = self.steer(caller, id, "drain_runner", |runner, now| {
            if runner.revoked_at.is_some() {
                return Err(Error::refused(Reason::WrongState, "the runner was revoked"));
            }
            let changes = runner.drained_at.is_none();
            runner.drained_at.get_or_insert(now.into());
            Ok(changes)
        });
        self.shown_runner(drained.await?, None).await
    }

    /// Takes a drain back.
    pub async fn resume_runner(&self, caller: &Caller, id: RunnerId) -> Result<RunnerView> {
        let resumed = self.steer(caller, id, "resume_runner", |runner, _| {
            if runner.revoked_at.is_some() {
                let message = "the runner was revoked, for good; enroll the host again";
                return Err(Error::refused(Reason::WrongState, message));
            }
            Ok(runner.drained_at.take().is_some())
        });
        self.shown_runner(resumed.await?, None).await
    }

    /// Records what a connecting runner says of itself, if that is news, and answers whether it
    /// may have jobs. Where it says something else too often, it is let in all the same, and
    /// shown as it was recorded last.
    pub async fn introduce(
        &self,
        runner: &RunnerIdentity,
        said: &Said,
        budget: &Budget,
    ) -> Result<Standing> {
        let mut spending = None;
        for _ in 0..ATTEMPTS {
            let Loaded { key, version, value } = self.runner_record(runner.id).await?;
            if value.revoked_at.is_some() {
                return Err(revoked());
            }
            let drained = value.drained_at.is_some();
            if value.said.as_ref() == Some(said) {
                return Ok(Standing { drained, version });
            }
            if *spending.get_or_insert_with(|| budget.spend()) == Spending::Beyond {
                if let Some(times) = budget.beyond.count() {
                    tracing::warn!(runner_id = %runner.id, times,
                        "a runner says something else of itself too often; not recorded");
                }
                return Ok(Standing { drained, version });
            }
            let next = Runner { said: Some(said.clone()), ..value };
            let batch = Batch::new().put(key, Expect::At(version), encode(&next));
            match self.store.commit(batch).await {
                Ok(version) => return Ok(Standing { drained, version }),
                Err(CommitError::Conflict { .. }) => {}
                Err(error @ CommitError::Store(_)) => return Err(error.into()),
            }
        }
        Err(changed_meanwhile())
    }

    /// Tells dispatch what a runner's record says now, in case it changed while its stream was
    /// being registered.
    pub async fn confirm_standing(&self, id: RunnerId) -> Result<()> {
        let Loaded { version, value, .. } = self.runner_record(id).await?;
        if value.revoked_at.is_some() {
            self.cut_off(id);
            return Err(revoked());
        }
        let drained = value.drained_at.is_some();
        self.dispatch.stand(id, Standing { drained, version });
        Ok(())
    }

    /// Makes a grant depend on what lets its runner have jobs.
    pub(super) async fn guard_of(&self, id: RunnerId) -> Result<(Key, Expect)> {
        let found = self.fetch::<Runner>(keys::runner(id)).await?;
        if let Some(Loaded { version, value, .. }) = &found
            && value.drained_at.is_some()
            && value.revoked_at.is_none()
        {
            self.dispatch.stand(id, Standing { drained: true, version: *version });
            return Err(Error::refused(Reason::NotAllowed, "the runner is drained"));
        }
        self.unrevoked(id, found)
    }

    /// Records that two programs fight over one identity.
    pub(super) async fn record_fight(&self, id: RunnerId) -> Result<()> {
        for _ in 0..ATTEMPTS {
            let Loaded { key, version, value } = self.runner_record(id).await?;
            let next = Runner { fought_at: Some(self.now().into()), ..value };
            let draft = self
                .draft(
                    next.organization.0,
                    "system",
                    "two_programs_of_one_runner",
                    format!("runner {id}"),
                )
                .with("name", next.name.as_str());
            let batch = Batch::new().put(key, Expect::At(version), encode(&next)).audit(draft);
            match self.store.commit(batch).await {
                Ok(_) => return Ok(()),
                Err(CommitError::Conflict { .. }) => {}
                Err(error @ CommitError::Store(_)) => return Err(error.into()),
            }
        }
        Err(changed_meanwhile())
    }

    /// Changes a runner's record as an owner wants it; `change` tells whether there is a change.
    async fn steer(
        &self,
        caller: &Caller,
        id: RunnerId,
        action: &str,
        change: impl Fn(&mut Runner, Timestamp) -> Result<bool>,
    ) -> Result<Runner> {
        for _ in 0..ATTEMPTS {
            let Loaded { key, version, value } = self.runner_for(caller, id, Right::Own).await?;
            let mut next = value;
            let mut stored = version;
            if change(&mut next, self.now())? {
                let draft = self
                    .draft(next.organization.0, caller.audit_name(), action, format!("runner {id}"))
                    .with("name", next.name.as_str());
                let batch = Batch::new().put(key, Expect::At(version), encode(&next)).audit(draft);
                stored = match self.store.commit(batch).await {
                    Ok(stored) => stored,
                    Err(CommitError::Conflict { .. }) => continue,
                    Err(error @ CommitError::Store(_)) => return Err(error.into()),
                };
                tracing::info!(runner_id = %id, action, "an owner steered a runner");
            }
            let drained = next.drained_at.is_some();
            self.dispatch.stand(id, Standing { drained, version: stored });
            return Ok(next);
        }
        Err(changed_meanwhile())
    }

    /// Fetches a runner, if the caller has the right in its organization. An id of another tenant
    /// is answered as one that does not exist.
    async fn runner_for(
        &self,
        caller: &Caller,
        id: RunnerId,
        right: Right,
    ) -> Result<Loaded<Runner>> {
        let runner = self.runner_record(id).await?;
        match self.standing_in(caller, runner.value.organization.0, right, None).await {
            Ok(_) => Ok(runner),
            Err(error) if error.reason() == Reason::NotFound => Err(Error::not_found("runner")),
            Err(error) => Err(error),
        }
    }

    /// Tells how many jobs a runner said that it can have at a time.
    pub(crate) async fn slots_of(&self, id: RunnerId) -> Result<u32> {
        let said = self.runner_record(id).await?.value.said;
        Ok(said.map_or(1, |said| said.slots))
    }

    async fn runner_record(&self, id: RunnerId) -> Result<Loaded<Runner>> {
        self.fetch(keys::runner(id)).await?.ok_or_else(|| Error::not_found("runner"))
    }

    /// Shows it to an owner, or to who is in this position.
    async fn shown_runner(
        &self,
        runner: Runner,
        position: Option<&Position>,
    ) -> Result<RunnerView> {
        let (organization, pool): (OrganizationId, PoolId) = (runner.organization.0, runner.pool.0);
        let name = self.pool(organization, pool).await?.name;
        let id = runner.id.0;
        let seen = self.dispatch.see(vec![id]).await.remove(&id).unwrap_or_default();
        self.runner_view(runner, name, seen, position).await
    }

    async fn runner_view(
        &self,
        runner: Runner,
        pool: String,
        seen: Seen,
        position: Option<&Position>,
    ) -> Result<RunnerView> {
        let hides = |id| position.is_some_and(|position| position.access(id) == Access::None);
        let mut holds = vec![];
        for (job, epoch) in &seen.held {
            let run = match self.run(job.run).await {
                Ok(run) => run.value,
                Err(error) if error.reason() == Reason::NotFound => continue,
                Err(error) => return Err(error),
            };
            let lease = run.job(job.phase).lease.as_ref();
            let Some(lease) = lease.filter(|lease| lease.is(runner.id.0, *epoch)) else { continue };
            if run.state != RunState::Lost && !hides(run.request.environment) {
                holds.push(HeldJob {
                    job: *job,
                    epoch: *epoch,
                    granted_at: lease.granted_at,
                    started_at: lease.released.map(|released| released.at),
                });
            }
        }
        holds.sort_unstable_by_key(|held| (held.granted_at, held.job));
        Ok(RunnerView { runner, pool, seen, holds })
    }
}

fn changed_meanwhile() -> Error {
    Error::refused(Reason::ChangedMeanwhile, "the runner changes too fast; repeat")
}

/// What dispatch matches by.
impl From<&Said> for Abilities {
    fn from(said: &Said) -> Abilities {
        let engine = |(name, version): &(String, String)| Engine {
            name: name.clone(),
            version: version.clone(),
        };
        Abilities {
            slots: said.slots,
            engines: said.engines.iter().map(engine).collect(),
            labels: said.labels.clone(),
            accepts: said.accepts.iter().copied().map(Phase::from).collect(),
        }
    }
}

#[cfg(test)]
mod tests;
