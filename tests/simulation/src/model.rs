//! The model: watches every commit, every disk and AWS, and knows what must never be seen.
//!
//! It is told of things as they become true: the store shows each commit, a build host tells
//! before it executes, STS tells of each code that it reads. Each invariant is judged at once, so
//! the trace ends where the first one broke.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use latchkey_control_plane::store::record::environment::Environment;
use latchkey_domain::id::{Digest, EnvironmentId, RunId, RunnerId};
use latchkey_domain::policy::{Permit, Phase};
use latchkey_domain::run::{Run, RunState};
use latchkey_domain::time::Timestamp;
use latchkey_proto::v1;

use crate::clock::SPEED;
use crate::logs::Logs;
use crate::machine::Lease;

/// The domain's own table of moves, as its test writes it.
const LIFECYCLE: &str = include_str!("../../../control-plane/domain/LIFECYCLE.md");

/// Moves that depend on policy and kind, of which that table shows one example each.
const MORE_MOVES: [(RunState, RunState); 11] = [
    // A plan that ended well: by policy, by `auto_apply`, without changes or of a kind that ends.
    (RunState::Planning, RunState::AwaitingConfirmation),
    (RunState::Planning, RunState::ApplyQueued),
    (RunState::Planning, RunState::Planned),
    // A release that is denied: for want of a code, or of life left in its session.
    (RunState::Planning, RunState::AwaitingPlanMfa),
    (RunState::Applying, RunState::AwaitingApplyMfa),
    // The same for want of a second person.
    (RunState::Applying, RunState::AwaitingConfirmation),
    // A grant that finds too little life left.
    (RunState::PlanQueued, RunState::AwaitingPlanMfa),
    (RunState::ApplyQueued, RunState::AwaitingApplyMfa),
    // A code where the policy has become stricter than it was when the plan ended.
    (RunState::AwaitingConfirmation, RunState::ApplyQueued),
    // An apply that stopped because it was asked to.
    (RunState::Applying, RunState::Canceled),
    (RunState::Lost, RunState::Canceled),
];

/// How long AWS may take a code, by the clock on the wall: whatever a clock of ours says, it is
/// sent once within this. Later the same digits may be another code.
const CODE_LIFE: Duration = Duration::from_secs(150).checked_div(SPEED).expect("not zero");

#[derive(Debug, Default)]
pub(crate) struct Model(Mutex<Inner>);

#[derive(Debug, Default)]
struct Inner {
    /// Set once the world is furnished; before that nothing goes wrong.
    armed: bool,
    /// The simulated time of the current step.
    now: Duration,
    trace: Vec<String>,
    violations: Vec<String>,
    moves: BTreeSet<(String, String)>,
    runs: BTreeMap<RunId, Run>,
    names: BTreeMap<RunId, String>,
    environments: BTreeMap<EnvironmentId, Environment>,
    /// Runners whose identity has ended.
    revoked: BTreeSet<RunnerId>,
    /// What each released lease was permitted, and to whom.
    releases: BTreeMap<Lease, (RunnerId, Permit)>,
    executed: BTreeMap<(RunId, Phase), Vec<(Lease, String)>>,
    /// Whom states are of: the lease that wrote them.
    states: BTreeMap<Digest, Lease>,
    /// When STS last read each code, in simulated time.
    codes: BTreeMap<String, Duration>,
    /// What each code was submitted for.
    submitted: BTreeMap<String, (RunId, Phase)>,
    /// Which code, if any, bought the credentials of each access key id.
    minted: BTreeMap<String, Option<String>>,
    /// Where each session went.
    delivered: BTreeMap<String, (RunId, Phase)>,
    logs: Logs,
    counts: Counts,
}

/// What happened in a world, in numbers.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counts {
    pub(crate) commits: u64,
    pub(crate) faults: u64,
    pub(crate) plans: u64,
    pub(crate) applies: u64,
    pub(crate) lost: u64,
    pub(crate) codes: u64,
}

impl Model {
    pub(crate) fn new() -> Self {
        let inner = Inner { moves: moves(), ..Inner::default() };
        Self(Mutex::new(inner))
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn arm(&self) {
        self.inner().armed = true;
    }

    pub(crate) fn is_armed(&self) -> bool {
        self.inner().armed
    }

    pub(crate) fn set_now(&self, now: Duration) {
        self.inner().now = now;
    }

    pub(crate) fn note(&self, text: impl Into<String>) {
        self.inner().note(text.into());
    }

    pub(crate) fn fault(&self, text: impl Into<String>) {
        let mut inner = self.inner();
        inner.counts.faults += 1;
        inner.note(format!("FAULT {}", text.into()));
    }

    pub(crate) fn violated(&self, invariant: &str, text: impl Into<String>) {
        self.inner().violated(invariant, text.into());
    }

    pub(crate) fn violations(&self) -> Vec<String> {
        self.inner().violations.clone()
    }

    pub(crate) fn trace(&self) -> Vec<String> {
        self.inner().trace.clone()
    }

    pub(crate) fn counts(&self) -> Counts {
        self.inner().counts
    }

    pub(crate) fn runs(&self) -> Vec<Run> {
        self.inner().runs.values().cloned().collect()
    }

    pub(crate) fn name(&self, run: RunId) -> String {
        self.inner().name(run)
    }

    pub(crate) fn revoked(&self, runner: RunnerId) {
        self.inner().revoked.insert(runner);
    }

    /// Judges what a commit has changed.
    pub(crate) fn committed(&self, runs: &[Run], environments: &[Environment], now: Timestamp) {
        let mut inner = self.inner();
        inner.counts.commits += 1;
        for run in runs {
            let before = inner.runs.get(&run.id).cloned();
            if before.as_ref() != Some(run) {
                let environment = environments.iter().find(|e| e.id == run.request.environment);
                inner.run_changed(before.as_ref(), run, environment, now);
                inner.runs.insert(run.id, run.clone());
            }
        }
        for environment in environments {
            let before = inner.environments.insert(environment.id, environment.clone());
            let digest = |e: &Environment| e.state.as_ref().map(|state| state.digest.0);
            let known = before.as_ref().and_then(digest);
            if let Some(state) = digest(environment).filter(|state| Some(*state) != known) {
                inner.state_changed(state);
            }
        }
    }

    /// A build host is about to execute terraform. I2, I1.
    pub(crate) fn executes(&self, lease: Lease, host: &str, spec: &v1::JobSpec) {
        let mut inner = self.inner();
        let name = inner.name(lease.run);
        inner.note(format!("exec {name} {} epoch {} on {host}", lease.phase, lease.epoch));
        match lease.phase {
            Phase::Plan => inner.counts.plans += 1,
            Phase::Apply => inner.counts.applies += 1,
        }
        if !inner.releases.contains_key(&lease) {
            inner.violated("I9", format!("{name} {lease:?} executed without a release"));
        }
        let times = inner.executed.entry((lease.run, lease.phase)).or_default();
        times.push((lease, host.to_owned()));
        let same = times.iter().filter(|(other, _)| *other == lease).count();
        let (all, list) = (times.len(), format!("{times:?}"));
        if same > 1 || (lease.phase == Phase::Apply && all > 1) {
            inner.violated("I2", format!("{name} {} executed again: {list}", lease.phase));
        }
        if lease.phase == Phase::Apply {
            let told = spec.approved.clone().unwrap_or_default();
            let planned = inner.runs.get(&lease.run).and_then(|run| run.planned.clone());
            let fits = planned.is_some_and(|planned| {
                planned.digests.plan.to_string() == told.plan_digest
                    && planned.digests.workspace.to_string() == told.workspace_digest
                    && planned.digests.changes.to_string() == told.changes_digest
            });
            if !fits {
                inner.violated("I1", format!("{name} applies another plan than was approved"));
            }
        }
    }

    /// A runner was given its `Go`. I3, I4, I9.
    pub(crate) fn went(&self, lease: Lease, runner: RunnerId, access_key_id: Option<&str>) {
        let mut inner = self.inner();
        let name = inner.name(lease.run);
        inner.note(format!("go {name} {} epoch {}", lease.phase, lease.epoch));
        let Some((holder, permit)) = inner.releases.get(&lease).copied() else {
            inner.violated("I9", format!("{name} {lease:?} got its go without a release"));
            return;
        };
        if holder != runner {
            inner.violated("I3", format!("{name} {lease:?} was released to another runner"));
        }
        let Some(access_key_id) = access_key_id else { return };
        let code = inner.minted.get(access_key_id).cloned();
        match (permit, code) {
            (Permit::MfaSession { .. }, Some(Some(code))) => {
                if inner.submitted.get(&code) != Some(&(lease.run, lease.phase)) {
                    let text = format!("{name} {} got what a code for another bought", lease.phase);
                    inner.violated("I4", text);
                }
            }
            (Permit::MfaSession { .. }, _) => {
                inner.violated("I4", format!("{name} {} needs a code and had none", lease.phase));
            }
            (Permit::PlainSession, Some(None)) => {}
            (Permit::PlainSession, _) => {
                inner.violated("I4", format!("{name} {} got a code's session", lease.phase));
            }
        }
        let to = (lease.run, lease.phase);
        let earlier = inner.delivered.insert(access_key_id.to_owned(), to);
        if earlier.is_some_and(|earlier| earlier != to) {
            inner.violated("I9", format!("{name}: one session for two phases"));
        }
    }

    /// A runner was told that its result is recorded. I3.
    pub(crate) fn recorded(&self, lease: Lease) {
        let mut inner = self.inner();
        let name = inner.name(lease.run);
        inner.note(format!("recorded {name} {} epoch {}", lease.phase, lease.epoch));
        let epoch = inner.runs.get(&lease.run).map(|run| run.job(lease.phase).epoch.get());
        if epoch != Some(lease.epoch) {
            inner.violated("I3", format!("{name} took the result of {lease:?}, now {epoch:?}"));
        }
    }

    /// A runner has brought what a lost lease left. I3: it must be no current one.
    pub(crate) fn quarantined(&self, lease: Lease, whole: bool) {
        let mut inner = self.inner();
        let name = inner.name(lease.run);
        let what = if whole { "whole" } else { "in part" };
        inner.note(format!("quarantined {what} {name} {} epoch {}", lease.phase, lease.epoch));
        let job = inner.runs.get(&lease.run).map(|run| run.job(lease.phase).clone());
        let current = job.and_then(|job| job.lease).is_some_and(|l| l.epoch.get() == lease.epoch);
        if current && inner.runs.get(&lease.run).is_some_and(|run| run.state != RunState::Lost) {
            inner.violated("I3", format!("{name} {lease:?} went to quarantine while it stands"));
        }
    }

    pub(crate) fn wrote_state(&self, digest: Digest, lease: Lease) {
        self.inner().states.insert(digest, lease);
    }

    pub(crate) fn wrote_log(&self, lease: Lease, bytes: &[u8]) {
        self.inner().logs.wrote(lease, bytes);
    }

    pub(crate) fn submits(&self, code: &str, run: RunId, phase: Phase) {
        self.inner().submitted.entry(code.to_owned()).or_insert((run, phase));
    }

    /// STS has read a request; answers the key id of what it will issue. I5.
    pub(crate) fn sts_received(&self, code: Option<&str>) -> String {
        let mut inner = self.inner();
        let id = format!("ASIASIMULATED{:07}", inner.minted.len());
        inner.minted.insert(id.clone(), code.map(str::to_owned));
        if let Some(code) = code {
            inner.counts.codes += 1;
            inner.note(format!("sts reads code {code}"));
            let now = turmoil::sim_elapsed().unwrap_or_default();
            let before = inner.codes.insert(code.to_owned(), now);
            if before.is_some_and(|before| now - before < CODE_LIFE) {
                inner.violated("I5", format!("code {code} reached STS again"));
            }
        }
        id
    }

    /// Compares the canonical logs with what they were and with what was written. I11.
    pub(crate) fn check_logs(&self, directory: &Path) {
        let mut inner = self.inner();
        let runs: Vec<RunId> = inner.runs.keys().copied().collect();
        for run in runs {
            for phase in Phase::ALL {
                let path = directory.join(run.to_string()).join(format!("{phase}.log"));
                let Ok(bytes) = std::fs::read(path) else { continue };
                if let Err(problem) = inner.logs.check(run, phase, bytes) {
                    let name = inner.name(run);
                    inner.violated("I11", format!("the log of {name} {phase}: {problem}"));
                }
            }
        }
    }

    /// Checks that what ended well has its whole log. I11.
    pub(crate) fn check_whole_logs(&self) {
        let mut inner = self.inner();
        let ended: Vec<Lease> = inner
            .runs
            .values()
            .flat_map(|run| Phase::ALL.map(|phase| (run, phase)))
            .filter(|(run, phase)| match phase {
                Phase::Plan => run.planned.is_some(),
                Phase::Apply => run.state == RunState::Applied,
            })
            .filter_map(|(run, phase)| {
                let executed = inner.executed.get(&(run.id, phase))?;
                executed
                    .iter()
                    .map(|(lease, _)| *lease)
                    .find(|l| l.epoch == run.job(phase).epoch.get())
            })
            .collect();
        for lease in ended {
            if let Err(problem) = inner.logs.check_whole(lease) {
                let name = inner.name(lease.run);
                inner.violated("I11", format!("the log of {name} {}: {problem}", lease.phase));
            }
        }
    }

    /// Answers what still moves, or waits though nobody holds it up.
    pub(crate) fn unsettled(&self) -> Vec<String> {
        let inner = self.inner();
        let open = inner.runs.values().filter(|run| !run.state.is_end());
        open.map(|run| {
            let reason = run.reason.clone().unwrap_or_default();
            format!("{} is {} {reason}", inner.name(run.id), run.state)
        })
        .collect()
    }
}

impl Inner {
    fn note(&mut self, text: String) {
        let at = turmoil::sim_elapsed().unwrap_or(self.now).as_millis();
        self.trace.push(format!("{at:>6} {text}"));
    }

    fn violated(&mut self, invariant: &str, text: String) {
        let text = format!("{invariant} {text}");
        self.note(format!("VIOLATION {text}"));
        self.violations.push(text);
    }

    fn name(&self, run: RunId) -> String {
        self.names.get(&run).cloned().unwrap_or_else(|| "run-?".to_owned())
    }

    fn run_changed(
        &mut self,
        before: Option<&Run>,
        run: &Run,
        environment: Option<&Environment>,
        now: Timestamp,
    ) {
        let count = self.names.len() + 1;
        let name = self.names.entry(run.id).or_insert_with(|| format!("run-{count}")).clone();
        let from = before.map(|before| before.state);
        if from != Some(run.state) {
            let text = from.map_or("queued", RunState::as_str);
            self.note(format!("{name} {text} -> {}", run.state));
            if run.state == RunState::Lost {
                self.counts.lost += 1;
            }
        }
        match from {
            Some(from) if !self.may_move(from, run.state) => {
                self.violated("I13", format!("{name} went from {from} to {}", run.state));
            }
            Some(_) | None => {}
        }
        for phase in Phase::ALL {
            let known = before.map(|before| before.job(phase));
            let (job, epoch) = (run.job(phase), known.map_or(0, |known| known.epoch.get()));
            let held = known.and_then(|known| known.lease.as_ref());
            if job.epoch.get() < epoch || job.epoch.get() > epoch + 1 {
                self.violated(
                    "I3",
                    format!("{name} {phase}: epoch {epoch} to {}", job.epoch.get()),
                );
            }
            let lease_of = |epoch: u64| Lease { run: run.id, phase, epoch, generation: 1 };
            if let Some(lease) = &job.lease {
                if held.is_none_or(|held| held.epoch != lease.epoch) {
                    self.note(format!("{name} {phase} granted, epoch {}", lease.epoch.get()));
                    if self.revoked.contains(&lease.runner) {
                        self.violated("I9", format!("{name} {phase} went to a revoked runner"));
                    }
                    if lease.epoch.get() != epoch + 1 || lease.epoch != job.epoch {
                        self.violated("I3", format!("{name} {phase}: a grant of an old epoch"));
                    }
                }
                let was = held.filter(|held| held.epoch == lease.epoch).and_then(|h| h.released);
                if let (None, Some(released)) = (was, lease.released) {
                    let key = lease_of(lease.epoch.get());
                    self.note(format!("{name} {phase} released, epoch {}", key.epoch));
                    if self.revoked.contains(&lease.runner) {
                        self.violated("I9", format!("{name} {phase} released to a revoked runner"));
                    }
                    self.releases.insert(key, (lease.runner, released.permit));
                    self.judge_release(run, phase, released.permit, environment, now);
                }
            }
            let ended =
                known.is_some_and(|known| known.ended_at.is_none()) && job.ended_at.is_some();
            if ended && held.is_none() && from != Some(RunState::Lost) && job.started_at.is_some() {
                self.violated("I3", format!("{name} {phase} ended without a lease"));
            }
        }
    }

    /// I1, I4, I9: whether this phase may have what was released to it.
    fn judge_release(
        &mut self,
        run: &Run,
        phase: Phase,
        permit: Permit,
        environment: Option<&Environment>,
        now: Timestamp,
    ) {
        let name = self.name(run.id);
        if run.cancel_requested_by.is_some() {
            self.violated("I9", format!("{name} {phase} was released after a cancel"));
        }
        let current = environment.map(|environment| environment.settings.policy);
        let policy = run.request.policy.max(current.unwrap_or(run.request.policy));
        if policy.requires_code(phase) && !matches!(permit, Permit::MfaSession { .. }) {
            self.violated("I4", format!("{name} {phase} was released without its code"));
        }
        if let (Permit::MfaSession { .. }, Some(evidence)) = (permit, &run.job(phase).evidence)
            && (evidence.phase != phase || evidence.expires_at <= now)
        {
            self.violated("I9", format!("{name} {phase} was released by what is void"));
        }
        if phase == Phase::Apply {
            let planned = run.planned.as_ref().map(|planned| planned.digest);
            let approved = run.approval.as_ref().map(|approval| approval.digest);
            if planned.is_none() || (approved != planned && !run.request.auto_apply) {
                self.violated("I1", format!("{name} was released without an approval"));
            }
        }
    }

    /// I3: a state is of the lease that holds the job now.
    fn state_changed(&mut self, state: Digest) {
        let Some(lease) = self.states.get(&state).copied() else {
            self.violated("I3", format!("a state appeared that no apply wrote: {state}"));
            return;
        };
        let name = self.name(lease.run);
        self.note(format!("state of {name} epoch {}", lease.epoch));
        let held = self.runs.get(&lease.run).and_then(|run| run.job(lease.phase).lease.clone());
        if held.is_none_or(|held| held.epoch.get() != lease.epoch) {
            self.violated("I3", format!("the state of {lease:?} of {name} became current"));
        }
    }

    /// A commit may hold two moves: what made a run pending, and its turn.
    fn may_move(&self, from: RunState, to: RunState) -> bool {
        let has = |from: &str, to: &str| {
            from == to || self.moves.contains(&(from.to_owned(), to.to_owned()))
        };
        has(from.as_str(), to.as_str())
            || (to == RunState::PlanQueued && has(from.as_str(), RunState::Pending.as_str()))
    }
}

fn moves() -> BTreeSet<(String, String)> {
    let mut found = BTreeSet::new();
    let mut from = String::new();
    for line in LIFECYCLE.lines() {
        if let Some(title) = line.strip_prefix("## ") {
            from = title.split(' ').next().unwrap_or_default().to_owned();
        } else if let Some(to) = line.split("**").nth(1) {
            found.insert((from.clone(), to.to_owned()));
        }
    }
    found.extend(MORE_MOVES.map(|(from, to)| (from.to_string(), to.to_string())));
    found
}
