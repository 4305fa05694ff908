//! Runs as people see them.

use std::collections::HashMap;
use std::sync::Arc;

use latchkey_domain::id::{Digest, EnvironmentId, RunId};
use latchkey_domain::policy::{Demands, Phase};
use latchkey_domain::run::{Run, RunState};
use latchkey_domain::time::Timestamp;
use serde_json::Value;
use tokio::sync::mpsc;

use super::artifacts::LARGEST_CHANGES;
use super::configurations::blob_error;
use super::forecast::CredentialFacts;
use super::state_lock::told;
use super::transition::place;
use super::{App, Page, PageRequest};
use crate::auth::{Caller, Right};
use crate::blobs::BlobError;
use crate::dispatch::Waiting;
use crate::error::{Result, rfc3339};
use crate::seal::SecretBytes;
use crate::store::record::Loaded;
use crate::store::record::runner::Runner;
use crate::store::{Scan, keys};

/// What the lock beside a run shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lock {
    NotRequired,
    CodeRequired,
    Authenticated,
    Failed,
}

/// A run with the names that people know, and what is derived of it.
#[derive(Clone, Debug)]
pub struct RunView {
    pub run: Run,
    pub organization: String,
    pub environment: String,
    pub lock: Lock,
    /// Why a plan rule demands a code, or has demanded one.
    pub code_reason: Option<String>,
    pub plan_log_length: u64,
    pub apply_log_length: u64,
    pub plan_facts: JobFacts,
    pub apply_facts: JobFacts,
    /// From when on an owner may have it killed.
    pub force_cancel_time: Option<Timestamp>,
    /// 1 is next; 0 when it does not wait for its turn.
    pub queue_position: u32,
    pub detail: Detail,
    /// What is known of its credentials; only where one run is shown.
    pub credentials: CredentialFacts,
    /// The reduced `show -json` of its plan; only where one run is shown.
    pub changes: Option<Arc<Value>>,
}

/// What is known of a phase beyond the run's record; only where one run is shown.
#[derive(Clone, Debug, Default)]
pub struct JobFacts {
    /// Of who held it last.
    pub runner_name: String,
    /// When the lease's holder was last heard of.
    pub last_heard: Option<Timestamp>,
    pub quarantined: u32,
}

/// How much of a run is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Detail {
    /// One of many: without outputs, changes and the lengths of logs.
    Line,
    Whole,
}

/// The changes of a plan, parsed once for all views of one run.
#[derive(Debug, Default)]
struct Shown(Option<(Digest, Option<Arc<Value>>)>);

/// Tells what the lock shows: the phase that waits, or else the last that was gated.
pub fn lock(run: &Run, current: &Demands) -> Lock {
    if run.awaits_code(current).is_some() {
        return if run.refused_code.is_some() { Lock::Failed } else { Lock::CodeRequired };
    }
    let authenticated = |phase| run.job(phase).authenticated.is_some();
    if authenticated(Phase::Apply) || authenticated(Phase::Plan) {
        Lock::Authenticated
    } else {
        Lock::NotRequired
    }
}

fn code_reason(run: &Run, current: &Demands) -> Option<String> {
    let matched = || run.rule_match(Phase::Apply, current).map(|matched| matched.to_string());
    match run.awaits_code(current) {
        Some(Phase::Apply) => run.code_reason.clone().or_else(matched),
        Some(Phase::Plan) | None => run.code_reason.clone(),
    }
}

impl App {
    pub async fn show_run(&self, caller: &Caller, id: RunId) -> Result<RunView> {
        let (standing, run) = self.run_for(caller, id, Right::Read).await?;
        self.run_view(run.value, &standing.organization_name, &mut Shown::default()).await
    }

    async fn run_view(&self, run: Run, organization: &str, shown: &mut Shown) -> Result<RunView> {
        let mut view = self.view_without_changes(run, organization).await?;
        view.changes = self.changes(&view.run, shown).await?;
        if let Some(changes) = &view.changes {
            let warnings = self.chaining_warnings(&view.run, changes).await?;
            view.credentials.warnings.extend(warnings);
        }
        Ok(view)
    }

    /// Shows a run whose right was checked by the use case that answered it. The plan's changes
    /// are left out: who acts on a run has seen it.
    pub async fn view_of(&self, run: Run) -> Result<RunView> {
        let organization = self.organization(run.request.organization).await?.value.name;
        self.view_without_changes(run, &organization).await
    }

    async fn view_without_changes(&self, run: Run, organization: &str) -> Result<RunView> {
        let mut view = self.view(run, organization, &mut HashMap::new()).await?;
        view.detail = Detail::Whole;
        view.plan_log_length = self.log_length(&view.run, Phase::Plan).await?;
        view.apply_log_length = self.log_length(&view.run, Phase::Apply).await?;
        view.queue_position = self.queue_position(&view.run).await?;
        if view.run.reason.is_none() {
            view.run.reason = self.what_it_waits_for(&view.run).await?;
        }
        view.plan_facts = self.job_facts(&view.run, Phase::Plan).await?;
        view.apply_facts = self.job_facts(&view.run, Phase::Apply).await?;
        self.say_what_is_known(&mut view);
        view.credentials = self.credential_facts(&view.run).await?;
        Ok(view)
    }

    async fn job_facts(&self, run: &Run, phase: Phase) -> Result<JobFacts> {
        let job = run.job(phase);
        let Some(last_holder) = job.last_holder() else { return Ok(JobFacts::default()) };
        let runner: Option<Loaded<Runner>> = self.fetch(keys::runner(last_holder)).await?;
        let last_heard = match &job.lease {
            Some(lease) => {
                let seen = self.dispatch.see(vec![lease.runner]).await;
                seen.get(&lease.runner).and_then(|seen| seen.last_seen)
            }
            None => None,
        };
        Ok(JobFacts {
            runner_name: runner.map(|runner| runner.value.name).unwrap_or_default(),
            last_heard,
            quarantined: self.count_quarantined(run, phase).await?,
        })
    }

    /// Adds to a run's reason what a person can know and do where its runner is silent.
    fn say_what_is_known(&self, view: &mut RunView) {
        let RunView { run, plan_facts, apply_facts, .. } = view;
        let facts = match run.running_phase() {
            Some(Phase::Plan) => plan_facts,
            Some(Phase::Apply) => apply_facts,
            None => return,
        };
        let mut known = vec![];
        known.extend(run.reason.take());
        let silence = 2 * self.lease_term / 3;
        if let Some(heard) = facts.last_heard.filter(|heard| *heard + silence < self.now()) {
            known.push(format!("its runner has been silent since {}", rfc3339(heard)));
        }
        if run.state == RunState::Lost {
            let id = run.id;
            let count = facts.quarantined;
            let waits = match run.lost_its_runner() {
                false => "wait for the runner to come back, ",
                true => "",
            };
            known.push(format!(
                "{waits}recover a state (`latchkey quarantine list --run {id}`: {count} there), or \
                 give the run up with `latchkey discard {id}` (owners)"
            ));
        }
        run.reason = Some(known.join("; ")).filter(|known| !known.is_empty());
    }

    /// Lists an environment's runs, newest first.
    pub async fn list_runs(
        &self,
        caller: &Caller,
        organization: &str,
        environment: &str,
        page: PageRequest,
    ) -> Result<Page<RunView>> {
        let (standing, environment) =
            self.on(caller, organization, environment, Right::Read).await?;
        let environment = environment.value;
        let size = page.size()?;
        let after = page.after::<RunId>()?.map(|run| keys::run_by_environment(environment.id, run));
        let scan =
            Scan::descending(keys::runs_by_environment(environment.id), size + 1).after(after);
        let (mut items, mut next) = (vec![], None);
        let mut names = HashMap::new();
        for (key, _) in self.scan(scan).await? {
            if items.len() == size {
                next = items.last().map(|view: &RunView| view.run.id.to_string());
                break;
            }
            let Some(id) = key.last_id().map(RunId::from_bytes) else { continue };
            let run = self.run(id).await?.value;
            items.push(self.view(run, &standing.organization_name, &mut names).await?);
        }
        Ok(Page { items, next })
    }

    /// Sends the run now and again after every change, until it has ended or nobody listens.
    pub async fn watch_run(
        self: &Arc<Self>,
        caller: &Caller,
        id: RunId,
    ) -> Result<mpsc::Receiver<Result<RunView>>> {
        let (standing, run) = self.run_for(caller, id, Right::Read).await?;
        let environment = run.value.request.environment;
        let app = Arc::clone(self);
        let (sender, receiver) = mpsc::channel(4);
        let mut feed = self.store.watch(keys::exactly(&keys::run(id)));
        let mut line = self.store.watch(keys::pending_runs_of(environment));
        tokio::spawn(async move {
            let mut shown = Shown::default();
            loop {
                let view = match app.run(id).await {
                    Ok(run) => {
                        app.run_view(run.value, &standing.organization_name, &mut shown).await
                    }
                    Err(error) => Err(error),
                };
                let last = view.as_ref().map_or(true, |view| view.run.state.is_end());
                let in_line = view.as_ref().is_ok_and(|view| view.run.state == RunState::Pending);
                if sender.send(view).await.is_err() || last {
                    return;
                }
                tokio::select! {
                    _ = feed.next() => {}
                    // Its position is a matter of those before it.
                    _ = line.next(), if in_line => {}
                    () = sender.closed() => return,
                }
            }
        });
        Ok(receiver)
    }

    async fn view(
        &self,
        run: Run,
        organization: &str,
        names: &mut HashMap<EnvironmentId, (String, Demands)>,
    ) -> Result<RunView> {
        let request = &run.request;
        let (environment, current) = match names.get(&request.environment) {
            Some(known) => known.clone(),
            None => {
                let found = self.environment(request.organization, request.environment).await?;
                let known = (found.value.name, found.value.settings.demands());
                names.insert(request.environment, known.clone());
                known
            }
        };
        Ok(RunView {
            lock: lock(&run, &current),
            code_reason: code_reason(&run, &current),
            organization: organization.to_owned(),
            environment,
            plan_log_length: 0,
            apply_log_length: 0,
            plan_facts: JobFacts::default(),
            apply_facts: JobFacts::default(),
            force_cancel_time: run.force_cancel_time(self.force_cancel_grace),
            queue_position: 0,
            detail: Detail::Line,
            credentials: CredentialFacts::default(),
            changes: None,
            run,
        })
    }

    async fn queue_position(&self, run: &Run) -> Result<u32> {
        if run.state != RunState::Pending {
            return Ok(0);
        }
        let pending = self.list(keys::pending_runs_of(run.request.environment)).await?;
        let before = pending
            .iter()
            .filter(|(key, _)| key.last_id().is_some_and(|id| id <= *run.id.as_bytes()))
            .count();
        Ok(u32::try_from(before).unwrap_or(u32::MAX))
    }

    /// Says what a run waits for that no person decides: its turn, or a runner.
    async fn what_it_waits_for(&self, run: &Run) -> Result<Option<String>> {
        let Some(phase) = run.open_phase() else {
            return match run.state {
                RunState::Pending => self.what_holds_it_up(run).await,
                RunState::AwaitingPlanMfa
                | RunState::PlanQueued
                | RunState::Planning
                | RunState::AwaitingConfirmation
                | RunState::AwaitingApplyMfa
                | RunState::ApplyQueued
                | RunState::Applying
                | RunState::Planned
                | RunState::Applied
                | RunState::Errored
                | RunState::Canceled
                | RunState::Discarded
                | RunState::Lost => Ok(None),
            };
        };
        let organization = run.request.organization;
        let environment = self.environment(organization, run.request.environment).await?.value;
        let Some(pool) = environment.settings.pool else {
            let reason = "waits for a pool: the environment has none; set one with `latchkey env \
                          set --pool`";
            return Ok(Some(reason.into()));
        };
        let name = self.pool(organization, pool).await?.name;
        let place = place(run, phase, &environment.settings, pool);
        let reason = match self.dispatch.why_waiting(place).await {
            Some(Waiting::NobodyThere) => {
                format!("waits for a runner of pool {name}: none is connected")
            }
            Some(Waiting::NobodySuits { lacking }) => {
                format!("waits for a runner of pool {name} {lacking}")
            }
            Some(Waiting::NobodyIdle) => format!(
                "waits for a runner of pool {name}: all suitable runners are busy or draining"
            ),
            Some(Waiting::Soon) | None => return Ok(None),
        };
        Ok(Some(reason))
    }

    async fn what_holds_it_up(&self, run: &Run) -> Result<Option<String>> {
        let request = &run.request;
        let hold = self.environment(request.organization, request.environment).await?.value.hold;
        if let Some(locked) = hold.locked.filter(|_| !run.is_plan_only()) {
            return Ok(Some(format!(
                "{} has locked the environment: {}",
                locked.by, locked.reason
            )));
        }
        Ok(match (hold.frozen, hold.holder) {
            (Some(frozen), _) => Some(format!(
                "the environment is frozen by the remains of run {}: {}",
                frozen.run, frozen.reason
            )),
            (None, Some(holder)) => Some(format!("run {holder} has the environment")),
            (None, None) => {
                hold.state_lock.as_ref().map(|lock| format!("the state is locked: {}", told(lock)))
            }
        })
    }

    async fn changes(&self, run: &Run, shown: &mut Shown) -> Result<Option<Arc<Value>>> {
        let Some(planned) = &run.planned else { return Ok(None) };
        let digest = planned.digests.changes;
        if let Some((_, changes)) = shown.0.as_ref().filter(|(known, _)| *known == digest) {
            return Ok(changes.clone());
        }
        let organization = run.request.organization;
        // Parsed where it is read: those of a large plan would hold up all other calls.
        let parse =
            |bytes: SecretBytes| serde_json::from_slice(bytes.expose_secret()).ok().map(Arc::new);
        let changes = match self.blobs.get_with(organization, digest, LARGEST_CHANGES, parse).await
        {
            Ok(changes) => changes,
            // Pruned with age: the run is shown without them.
            Err(BlobError::Missing { .. }) => None,
            Err(error) => return Err(blob_error(error)),
        };
        shown.0 = Some((digest, changes.clone()));
        Ok(changes)
    }
}

#[cfg(test)]
mod many_tests;
#[cfg(test)]
mod tests;
