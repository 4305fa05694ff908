//! Moves a run: read at a version, step, commit expecting that version, then perform.
//!
//! Everything a step changes is in one batch: the run, its environment, indexes, the sessions
//! that are over, the audit record that tells of it, and the notices to whoever wants to know. What remains for after the commit are
//! messages to the dispatch. They are sent by the task that commits, which nobody who hangs up
//! can stop, and are derived again from the store at a start and by the reaper.

use std::sync::Arc;

use latchkey_domain::environment::Change;
use latchkey_domain::id::{PoolId, RunId, RunnerId, UserId};
use latchkey_domain::lease::Site;
use latchkey_domain::policy::Phase;
use latchkey_domain::run::{
    Decision as Decided, Effect, Event, Refusal, Run, RunState, Step, step,
};
use latchkey_proto::v1::Reason;

use serde_json::Value;
use tracing::Instrument;

use super::App;
use crate::auth::RunnerIdentity;
use crate::dispatch::{Place, Stop, Wanted};
use crate::error::{Error, Result, rfc3339};
use crate::store::record::environment::{Environment, EnvironmentRecord, Settings};
use crate::store::record::run::RunRecord;
use crate::store::record::{Loaded, encode};
use crate::store::{Batch, CommitError, Expect, Scan, keys};

/// How often a lost race is run again before the caller is told.
const ATTEMPTS: usize = 16;

/// A run and its environment as one read them.
#[derive(Debug)]
pub(super) struct Subject {
    pub(super) run: Loaded<Run>,
    pub(super) environment: Loaded<Environment>,
}

/// More that an audit record tells.
pub(super) type Details = Vec<(&'static str, Value)>;

/// An event, what else belongs in its commit, and what else its audit record tells.
#[derive(Debug)]
pub(super) struct Decision {
    pub(super) event: Event,
    pub(super) batch: Batch,
    pub(super) details: Details,
}

impl From<Event> for Decision {
    fn from(event: Event) -> Self {
        Self { event, batch: Batch::new(), details: vec![] }
    }
}

/// Whose standing a commit depends on, besides the run's and the environment's.
#[derive(Clone, Copy, Debug)]
pub(super) enum Guard {
    /// A person's or our own word: rights were checked.
    None,
    /// The person whose code it is must still have the right to decide.
    Decider(UserId),
    /// The runner that speaks must not have been revoked.
    Identity(RunnerId),
    /// The runner that is given something to do must be neither revoked nor drained.
    Grant(RunnerId),
}

/// What an event did.
#[derive(Debug)]
pub(super) enum Advance {
    Moved(Box<Run>),
    /// It was so already.
    Unchanged(Box<Run>),
}

impl Advance {
    pub(super) fn into_run(self) -> Run {
        match self {
            Advance::Moved(run) | Advance::Unchanged(run) => *run,
        }
    }
}

impl App {
    pub(super) async fn subject(&self, id: RunId) -> Result<Subject> {
        let run = self.run(id).await?;
        let request = &run.value.request;
        let environment = self.environment(request.organization, request.environment).await?;
        Ok(Subject { run, environment })
    }

    /// Moves a run by the event that `decide` makes of what is stored, and performs what
    /// follows. `decide` is asked again after a lost race.
    pub(super) async fn advance(
        self: &Arc<Self>,
        id: RunId,
        actor: &str,
        action: &str,
        decide: impl Fn(&Subject) -> Result<Event>,
    ) -> Result<Advance> {
        self.advance_with(id, actor, action, |subject| decide(subject).map(Decision::from)).await
    }

    /// As [`App::advance`], with more that belongs in the same commit.
    pub(super) async fn advance_with(
        self: &Arc<Self>,
        id: RunId,
        actor: &str,
        action: &str,
        decide: impl Fn(&Subject) -> Result<Decision>,
    ) -> Result<Advance> {
        self.advance_guarded(id, Guard::None, (actor, action), decide).await
    }

    /// As [`App::advance`], by the word of a runner: it is worth nothing once the runner is
    /// revoked, whichever process heard it.
    pub(super) async fn advance_by(
        self: &Arc<Self>,
        runner: &RunnerIdentity,
        id: RunId,
        action: &str,
        decide: impl Fn(&Subject) -> Result<Event>,
    ) -> Result<Advance> {
        let (guard, actor) = (Guard::Identity(runner.id), runner.audit_name());
        let decide = |subject: &Subject| decide(subject).map(Decision::from);
        self.advance_guarded(id, guard, (&actor, action), decide).await
    }

    /// As [`App::advance_with`], if whom the commit is about is still admitted. Asked in each
    /// round: their record may be what changed.
    pub(super) async fn advance_guarded(
        self: &Arc<Self>,
        id: RunId,
        guard: Guard,
        (actor, action): (&str, &str),
        decide: impl Fn(&Subject) -> Result<Decision>,
    ) -> Result<Advance> {
        for _ in 0..ATTEMPTS {
            let admitted = match guard {
                Guard::None => None,
                Guard::Decider(user) => Some(self.decider_guard(id, user).await?),
                Guard::Identity(runner) => Some(self.identity_guard(runner).await?),
                Guard::Grant(runner) => Some(self.guard_of(runner).await?),
            };
            let subject = self.subject(id).await?;
            let Decision { event, batch, details } = decide(&subject)?;
            let release = release_of(&event);
            let run = &subject.run.value;
            let (next, environment, effects) = match step(run, event, self.now()) {
                Step::Unchanged => {
                    return Ok(Advance::Unchanged(Box::new(subject.run.value)));
                }
                Step::Refused(refusal) => return Err(refused(refusal, run)),
                Step::Moved { next, environment, effects } => (*next, environment, effects),
            };
            // What was put together for a release is not kept, nor told, where it is denied.
            let denied = release.is_some_and(|phase| !is_released(&next, phase));
            let (action, mut batch, details) = match denied {
                true => ("deny_release", Batch::new(), vec![]),
                false => (action, batch, details),
            };
            if let Some((key, expect)) = admitted {
                batch = batch.check(key, expect);
            }
            let moved = self.with_turn(&subject, (next, environment, effects)).await?;
            let batch = self.write(&subject, &moved, (actor, action, details), batch);
            let (next, change, effects) = &moved;
            let batch = self.note_what_ends(batch, &subject.run.value, next, effects).await?;
            let environment = &subject.environment.value;
            let hold = environment.hold.after(next.id, change);
            let frozen = hold.frozen.filter(|_| environment.hold.frozen.is_none());
            let reason = frozen.as_ref().map(|frozen| frozen.reason.as_str());
            let before = Some(subject.run.value.state);
            let batch = self.tell_of_run(batch, before, next, environment, reason).await?;
            if let Some(next) = self.commit_and_perform(subject, moved, batch, action).await? {
                return Ok(Advance::Moved(next));
            }
        }
        Err(CommitError::Conflict { key: keys::run(id) }.into())
    }

    /// Commits and performs in one task of its own: who asked may hang up while the disk writes,
    /// and what was committed must follow all the same. `None` after a lost race.
    async fn commit_and_perform(
        self: &Arc<Self>,
        subject: Subject,
        (next, _, effects): Moved,
        batch: Batch,
        action: &str,
    ) -> Result<Option<Box<Run>>> {
        let (app, action) = (Arc::clone(self), action.to_owned());
        let committing = async move {
            match app.store.commit(batch).await {
                Ok(_) => {}
                Err(CommitError::Conflict { .. }) => return Ok(None),
                Err(error @ CommitError::Store(_)) => return Err(Error::from(error)),
            }
            tracing::info!(run_id = %next.id, state = %next.state, action, "the run moved");
            app.after_leases(&subject.run.value, &next);
            app.note_limit(&next, &subject.environment.value);
            app.perform(&next, &subject.environment.value, effects);
            Ok(Some(Box::new(next)))
        };
        tokio::spawn(committing.in_current_span()).await.map_err(Error::internal)?
    }

    /// Gives a run that has just become pending its turn in the same commit, if nothing is in
    /// its way: one write to the disk less for the usual case.
    pub(super) async fn with_turn(&self, subject: &Subject, moved: Moved) -> Result<Moved> {
        let (next, change, mut effects) = moved;
        let hold = &subject.environment.value.hold;
        let free = hold.after(next.id, &change);
        if next.state != RunState::Pending || !may_start(&next, &free) {
            return Ok((next, change, effects));
        }
        if !next.is_plan_only() && self.others_waited_longer(&next).await? {
            // It is their turn, which nobody has given yet.
            effects.retain(|effect| *effect != Effect::GiveTurn);
            effects.push(Effect::GiveTurn);
            return Ok((next, change, effects));
        }
        Ok(match step(&next, Event::TurnCame, self.now()) {
            Step::Moved { next, environment, effects: more } => {
                effects.retain(|effect| *effect != Effect::GiveTurn);
                effects.extend(more);
                (*next, environment, effects)
            }
            Step::Unchanged | Step::Refused(_) => (next, change, effects),
        })
    }

    async fn others_waited_longer(&self, run: &Run) -> Result<bool> {
        let first = Scan::ascending(keys::pending_runs_of(run.request.environment), 1);
        let first = self.scan(first).await?;
        Ok(first.iter().any(|(key, _)| key.last_id().is_some_and(|id| id < *run.id.as_bytes())))
    }

    fn write(
        &self,
        subject: &Subject,
        (next, change, _): &Moved,
        (actor, action, details): (&str, &str, Details),
        mut batch: Batch,
    ) -> Batch {
        let Subject { run, environment } = subject;
        let request = &next.request;
        batch = batch.put(run.key.clone(), Expect::At(run.version), encode(&RunRecord::from(next)));
        let hold = environment.value.hold.after(next.id, change);
        let expect = Expect::At(environment.version);
        batch = if hold == environment.value.hold {
            // What was decided rests on the policy and the hold of this version.
            batch.check(environment.key.clone(), expect)
        } else {
            let mut changed = environment.value.clone();
            changed.hold = hold;
            let value = encode(&EnvironmentRecord::from(&changed));
            batch.put(environment.key.clone(), expect, value)
        };
        let pending = keys::pending_run(request.environment, next.id);
        match (run.value.state == RunState::Pending, next.state == RunState::Pending) {
            (false, true) => batch = batch.put(pending, Expect::Anything, []),
            (true, false) => batch = batch.delete(pending, Expect::Anything),
            (true, true) | (false, false) => {}
        }
        if next.state.is_end() && !run.value.state.is_end() {
            batch = batch.delete(keys::open_run(next.id), Expect::Anything);
        }
        for phase in Phase::ALL {
            let session = keys::session(next.id, phase);
            let over = has_session(&run.value, phase) && !has_session(next, phase);
            if over && !batch.names(&session) {
                batch = batch.delete(session, Expect::Anything);
            }
        }
        let mut draft = self
            .draft(request.organization, actor, action, format!("run {}", next.id))
            .with("environment", environment.value.name.as_str())
            .with("from", run.value.state.as_str())
            .with("to", next.state.as_str());
        if let Some(reason) = &next.reason {
            draft = draft.with("reason", reason.as_str());
        }
        batch.audit(details.into_iter().fold(draft, |draft, (name, value)| draft.with(name, value)))
    }

    /// Closes the log to leases that have ended.
    fn after_leases(&self, before: &Run, next: &Run) {
        for phase in Phase::ALL {
            if before.job(phase).lease.is_some() && next.job(phase).lease.is_none() {
                self.gates.close(next.job_id(phase));
            }
        }
    }

    /// Does what follows a commit. All of it can be done again: at a start it is derived from
    /// the store.
    pub(super) fn perform(
        self: &Arc<Self>,
        run: &Run,
        environment: &Environment,
        effects: Vec<Effect>,
    ) {
        for effect in effects {
            match effect {
                Effect::GiveTurn => self.give_turn_soon(run),
                Effect::Offer(job) => self.offer(run, job.phase, environment),
                Effect::Withdraw(job) => self.dispatch.withdraw(job),
                Effect::Cancel(job, epoch) => self.dispatch.cancel(job, epoch, Stop::Gracefully),
                Effect::Kill(job, epoch) => self.dispatch.cancel(job, epoch, Stop::ByForce),
                Effect::Revoke(job, epoch) => self.dispatch.revoke(job, epoch, &reason(run)),
                Effect::Renew(job, epoch) => self.dispatch.renew(job, epoch),
                Effect::DropPlan => self.collect_garbage_soon(),
            }
        }
        if run.state.is_end() && !run.request.given.is_empty() {
            self.collect_garbage_soon();
        }
    }

    /// Tells dispatch that a job waits. Without a pool it goes on waiting for one.
    pub(super) fn offer(&self, run: &Run, phase: Phase, environment: &Environment) {
        if let Some(pool) = environment.settings.pool {
            let place = place(run, phase, &environment.settings, pool);
            self.dispatch.open(run.job_id(phase), place, run.job(phase).epoch);
        }
    }
}

/// Where a job may run.
pub(super) fn place(run: &Run, phase: Phase, settings: &Settings, pool: PoolId) -> Place {
    let labels = settings.runner_labels.clone();
    Place { pool, phase, labels, wanted: wanted(run, phase, settings) }
}

/// An environment as it holds for a phase of a run: an apply is made where its plan was, whatever
/// has been set since.
pub(super) fn of_phase(environment: &Environment, run: &Run, phase: Phase) -> Environment {
    let mut environment = environment.clone();
    match (phase, run.site.clone()) {
        (Phase::Apply, Some(Site { region, working_directory })) => {
            environment.settings.region = region;
            environment.settings.working_directory = working_directory;
        }
        (Phase::Apply, None) | (Phase::Plan, _) => {}
    }
    environment
}

/// What a job runs by: a plan by what the settings say, an apply by what made its plan only.
pub(super) fn wanted(run: &Run, phase: Phase, settings: &Settings) -> Wanted {
    match (phase, &run.planned) {
        (Phase::Apply, Some(planned)) => {
            Wanted { engine: planned.engine.clone(), version: planned.terraform_version.clone() }
        }
        (Phase::Plan, _) | (Phase::Apply, None) => {
            Wanted { engine: settings.engine.clone(), version: settings.engine_version.clone() }
        }
    }
}

/// What one step makes: the run, what becomes of its environment, what follows.
pub(super) type Moved = (Run, Change, Vec<Effect>);

/// Tells whether a session may wait for a phase or be in use by it.
fn has_session(run: &Run, phase: Phase) -> bool {
    let job = run.job(phase);
    job.evidence.is_some() || job.lease.is_some()
}

/// The phase whose credentials an event is to release; the step may deny it.
fn release_of(event: &Event) -> Option<Phase> {
    if let Event::Starting { phase, .. } = event { Some(*phase) } else { None }
}

fn is_released(run: &Run, phase: Phase) -> bool {
    run.job(phase).lease.as_ref().is_some_and(|lease| lease.released.is_some())
}

/// Refuses what the state of a run does not admit, with what somebody decided before: who comes
/// second is told what happened.
pub(super) fn refused(refusal: Refusal, run: &Run) -> Error {
    let decided = |but: &str| {
        let Decided { what, by, at } = run.decision.as_ref()?;
        let (verb, at) = (what.verb(), rfc3339(*at));
        Some(format!("{by} {verb} at {at}; the run is {}{but}", run.state))
    };
    let error = match refusal {
        Refusal::WrongState | Refusal::AlreadyEnded => {
            decided("").map(|message| Error::refused(Reason::WrongState, message))
        }
        Refusal::NotAwaitingCode => decided(" and waits for no token code")
            .map(|message| Error::refused(Reason::NotAwaitingCode, message)),
        Refusal::OtherPhase
        | Refusal::MfaRequired
        | Refusal::SecondPersonRequired
        | Refusal::PlanChanged
        | Refusal::LeaseLost
        | Refusal::ExpiresSooner
        | Refusal::NotCanceled
        | Refusal::CancelGrace { .. }
        | Refusal::Forced => None,
    };
    with_decision(error.unwrap_or_else(|| refusal.into()), run)
}

/// Adds where a run stands, and by whose decision, for programs.
pub(super) fn with_decision(error: Error, run: &Run) -> Error {
    let error = error.with("state", run.state.as_str());
    let Some(Decided { what, by, at }) = &run.decision else { return error };
    error
        .with("decision", what.as_str())
        .with("decided_by", by.as_str())
        .with("decide_time", rfc3339(*at))
}

fn reason(run: &Run) -> String {
    run.reason.clone().unwrap_or_else(|| "the lease is over".to_owned())
}

/// Tells whether a pending run may start: plan-only runs pass those that hold the environment,
/// but nothing passes a frozen one.
pub(super) fn may_start(run: &Run, hold: &latchkey_domain::environment::Hold) -> bool {
    if run.is_plan_only() { hold.frozen.is_none() } else { hold.admits(run.id) }
}
