//! A run: what a person asked for, where it stands, and what each phase left behind.
//!
//! ```text
//! queue ─► AwaitingPlanMfa ─code─► Pending ─turn─► PlanQueued ─lease─► Planning
//!                                                                         │
//!    ┌─────────────────────┬──────────────────────┬───────────────────────┤
//!    ▼                     ▼                      ▼                       ▼
//!  Planned        AwaitingConfirmation     AwaitingApplyMfa            Errored
//!                          └──confirm──► ApplyQueued ◄──code──┘
//!                                             └─lease─► Applying ─► Applied | Errored | Lost
//! ```
//!
//! [`step`] is the only way a run changes. `LIFECYCLE.md` beside this crate's manifest holds the
//! whole table, written by a test.

#[cfg(test)]
mod approval_tests;
#[cfg(test)]
mod credentials_tests;
mod decision;
mod limits;
mod step;
#[cfg(test)]
mod step_tests;
#[cfg(test)]
mod table;

use std::fmt;
use std::time::Duration;

use crate::id::{
    AuthenticationId, Digest, EnvironmentId, Epoch, JobId, OrganizationId, RunId, RunnerId, UserId,
};
use crate::lease::{Lease, Site};
use crate::policy::{Demands, Evidence, Match, MfaPolicy, Phase, PlanFacts, PlanRule};
use crate::time::Timestamp;

pub use self::decision::{Decided, Decision};
pub use self::limits::{Limits, deadline};
pub use self::step::{
    ApplyOutcome, Effect, Event, Failure, FailureKind, PlanOutcome, Refusal, Step, step,
};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RunKind {
    PlanAndApply,
    PlanOnly,
    Destroy,
    RefreshOnly,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RunState {
    AwaitingPlanMfa,
    Pending,
    PlanQueued,
    Planning,
    AwaitingConfirmation,
    AwaitingApplyMfa,
    ApplyQueued,
    Applying,
    Planned,
    Applied,
    Errored,
    Canceled,
    Discarded,
    Lost,
}

impl RunState {
    pub const ALL: [RunState; 14] = [
        RunState::AwaitingPlanMfa,
        RunState::Pending,
        RunState::PlanQueued,
        RunState::Planning,
        RunState::AwaitingConfirmation,
        RunState::AwaitingApplyMfa,
        RunState::ApplyQueued,
        RunState::Applying,
        RunState::Planned,
        RunState::Applied,
        RunState::Errored,
        RunState::Canceled,
        RunState::Discarded,
        RunState::Lost,
    ];

    /// Tells whether nothing moves the run any more. A lost run still waits for a person or for
    /// its runner.
    pub const fn is_end(self) -> bool {
        match self {
            RunState::Planned
            | RunState::Applied
            | RunState::Errored
            | RunState::Canceled
            | RunState::Discarded => true,
            RunState::AwaitingPlanMfa
            | RunState::Pending
            | RunState::PlanQueued
            | RunState::Planning
            | RunState::AwaitingConfirmation
            | RunState::AwaitingApplyMfa
            | RunState::ApplyQueued
            | RunState::Applying
            | RunState::Lost => false,
        }
    }

    /// Tells whether a run in this state keeps others from their turn.
    pub const fn holds_environment(self) -> bool {
        match self {
            RunState::PlanQueued
            | RunState::Planning
            | RunState::AwaitingConfirmation
            | RunState::AwaitingApplyMfa
            | RunState::ApplyQueued
            | RunState::Applying
            | RunState::Lost => true,
            RunState::AwaitingPlanMfa
            | RunState::Pending
            | RunState::Planned
            | RunState::Applied
            | RunState::Errored
            | RunState::Canceled
            | RunState::Discarded => false,
        }
    }

    pub const fn as_str(self) -> &'static str {
        match self {
            RunState::AwaitingPlanMfa => "AwaitingPlanMfa",
            RunState::Pending => "Pending",
            RunState::PlanQueued => "PlanQueued",
            RunState::Planning => "Planning",
            RunState::AwaitingConfirmation => "AwaitingConfirmation",
            RunState::AwaitingApplyMfa => "AwaitingApplyMfa",
            RunState::ApplyQueued => "ApplyQueued",
            RunState::Applying => "Applying",
            RunState::Planned => "Planned",
            RunState::Applied => "Applied",
            RunState::Errored => "Errored",
            RunState::Canceled => "Canceled",
            RunState::Discarded => "Discarded",
            RunState::Lost => "Lost",
        }
    }
}

impl fmt::Display for RunState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Who asked for something: a person, or a program by its service token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Actor {
    User { id: UserId, name: String },
    Service { name: String },
}

impl Actor {
    pub fn name(&self) -> &str {
        match self {
            Actor::User { name, .. } | Actor::Service { name } => name,
        }
    }
}

/// What was asked for; never changes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    pub organization: OrganizationId,
    pub environment: EnvironmentId,
    pub kind: RunKind,
    pub configuration: Digest,
    pub message: String,
    pub target: Vec<String>,
    pub replace: Vec<String>,
    pub auto_apply: bool,
    /// The environment's policy at the moment of queueing.
    pub policy: MfaPolicy,
    /// Its plan rule at that moment.
    pub plan_rule: PlanRule,
    /// Whether it demanded a second person at that moment.
    pub second_person: bool,
    pub queued_by: Actor,
    pub queued_at: Timestamp,
    /// The run that this one does again.
    pub retry_of: Option<RunId>,
    /// The variables that were given for this run alone; their values end with it.
    pub given: Vec<Given>,
}

/// A variable that was given for one run, by all but its value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Given {
    pub name: String,
    /// Absent for runs of before it was kept.
    pub category: Option<Category>,
}

/// What a variable is one of. The two share no names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Category {
    Terraform,
    Environment,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    pub id: RunId,
    pub request: Request,
    pub state: RunState,
    pub updated_at: Timestamp,
    /// When it came into its state.
    pub entered_at: Timestamp,
    pub plan: Job,
    pub apply: Job,
    /// Where the plan is or was made: set by each of its grants, and with it that the variables of
    /// its release are kept. Absent for runs whose plan was granted before that was so.
    pub site: Option<Site>,
    /// Set when the plan has ended well.
    pub planned: Option<Planned>,
    pub approval: Option<Approval>,
    /// Terraform's JSON, without the values of sensitive outputs.
    pub outputs: Option<String>,
    /// Who asked a running phase to stop.
    pub cancel_requested_by: Option<String>,
    /// When that was: a forced cancel has to wait for a grace from then.
    pub cancel_requested_at: Option<Timestamp>,
    /// Who had it killed: credentials are withdrawn from then on.
    pub forced_by: Option<String>,
    /// The last code that was refused for the phase that waits: why the lock is red.
    pub refused_code: Option<RefusedCode>,
    /// Why a plan rule demanded a code for the apply; stays when one was submitted.
    pub code_reason: Option<String>,
    /// What somebody decided last: whoever comes second is told.
    pub decision: Option<Decision>,
    /// One sentence: why the run waits or how it ended.
    pub reason: Option<String>,
}

/// One phase as runners see it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Job {
    /// The highest epoch ever granted.
    pub epoch: Epoch,
    /// The current lease; absent while nobody holds the job.
    pub lease: Option<Lease>,
    /// The code accepted for this phase, while its session waits or is in use.
    pub evidence: Option<Evidence>,
    /// Who authenticated; stays when the evidence is spent.
    pub authenticated: Option<Authenticated>,
    pub queued_at: Option<Timestamp>,
    pub started_at: Option<Timestamp>,
    pub ended_at: Option<Timestamp>,
    /// Bytes of its whole log, once a runner has told its end: nothing is appended after that.
    /// Absent until then, where it ended by nobody's word, and in runs of before it was kept.
    pub log_length: Option<u64>,
    /// Who held it, latest last; at most [`Job::REMEMBERED`].
    pub holders: Vec<(Epoch, RunnerId)>,
}

impl Job {
    /// How many holders are remembered: what an older one brings back is not taken any more.
    pub const REMEMBERED: usize = 16;

    pub(crate) fn remember(&mut self, runner: RunnerId, epoch: Epoch) {
        if self.holders.len() == Self::REMEMBERED {
            self.holders.remove(0);
        }
        self.holders.push((epoch, runner));
    }

    /// Returns who held the job last.
    pub fn last_holder(&self) -> Option<RunnerId> {
        self.holders.last().map(|(_, runner)| *runner)
    }

    /// Tells whether this runner once held the job at this epoch.
    pub fn was_held_by(&self, runner: RunnerId, epoch: Epoch) -> bool {
        self.holders.contains(&(epoch, runner))
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Authenticated {
    pub user: String,
    pub at: Timestamp,
    pub expires_at: Timestamp,
}

/// The digests an approval is bound to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlanDigests {
    pub plan: Digest,
    pub workspace: Digest,
    /// Absent when the plan left no lock file.
    pub lock_file: Option<Digest>,
    pub changes: Digest,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Planned {
    pub digests: PlanDigests,
    /// One digest over the four: what a person is shown and sends back with the approval.
    pub digest: Digest,
    pub applyable: bool,
    pub counts: Counts,
    /// What plan rules look at; absent where it is not known in full.
    pub facts: Option<PlanFacts>,
    /// `terraform` or `tofu`: what the apply must use too.
    pub engine: String,
    /// Version of the engine.
    pub terraform_version: String,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub add: u32,
    pub change: u32,
    pub destroy: u32,
    pub import: u32,
    /// Counted among `add` and `destroy` too.
    pub replace: u32,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Approval {
    pub by: String,
    pub at: Timestamp,
    /// Equal to [`Planned::digest`] of the plan it approves.
    pub digest: Digest,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RefusedCode {
    pub authentication: AuthenticationId,
    /// The refusal's name, as the wire carries it.
    pub reason: String,
    /// The sentence for the person, remedy included.
    pub message: String,
    pub at: Timestamp,
    pub aws_request_id: Option<String>,
}

impl Run {
    /// Makes the run that `request` asks for.
    pub fn queue(id: RunId, request: Request) -> Run {
        let state = if request.policy.requires_code(Phase::Plan) {
            RunState::AwaitingPlanMfa
        } else {
            RunState::Pending
        };
        Run {
            id,
            updated_at: request.queued_at,
            entered_at: request.queued_at,
            request,
            state,
            plan: Job::default(),
            apply: Job::default(),
            site: None,
            planned: None,
            approval: None,
            outputs: None,
            cancel_requested_by: None,
            cancel_requested_at: None,
            forced_by: None,
            refused_code: None,
            code_reason: None,
            decision: None,
            reason: None,
        }
    }

    pub fn job(&self, phase: Phase) -> &Job {
        match phase {
            Phase::Plan => &self.plan,
            Phase::Apply => &self.apply,
        }
    }

    pub(crate) fn job_mut(&mut self, phase: Phase) -> &mut Job {
        match phase {
            Phase::Plan => &mut self.plan,
            Phase::Apply => &mut self.apply,
        }
    }

    pub fn job_id(&self, phase: Phase) -> JobId {
        JobId { run: self.id, phase }
    }

    /// Returns the phase whose code the run waits for, under the stricter of what it carries
    /// and `current`.
    pub fn awaits_code(&self, current: &Demands) -> Option<Phase> {
        match self.state {
            RunState::AwaitingPlanMfa => Some(Phase::Plan),
            RunState::AwaitingApplyMfa => Some(Phase::Apply),
            RunState::AwaitingConfirmation => {
                self.requires_code(Phase::Apply, current).then_some(Phase::Apply)
            }
            RunState::Pending
            | RunState::PlanQueued
            | RunState::Planning
            | RunState::ApplyQueued
            | RunState::Applying
            | RunState::Planned
            | RunState::Applied
            | RunState::Errored
            | RunState::Canceled
            | RunState::Discarded
            | RunState::Lost => None,
        }
    }

    /// Tells whether a phase needs a code, under the stricter of what the run carries and
    /// `current`.
    pub fn requires_code(&self, phase: Phase, current: &Demands) -> bool {
        self.request.policy.max(current.policy).requires_code(phase)
            || self.rule_match(phase, current).is_some()
    }

    /// Answers why a plan rule demands a code for a phase, the carried rule or the current one.
    pub fn rule_match(&self, phase: Phase, current: &Demands) -> Option<Match> {
        match phase {
            Phase::Plan => None,
            Phase::Apply => {
                let facts = self.planned.as_ref().and_then(|planned| planned.facts.as_ref());
                let carried = &self.request.plan_rule;
                carried.matches(facts).or_else(|| current.plan_rule.matches(facts))
            }
        }
    }

    /// Tells whether this person may approve the apply, under the stricter of what the run
    /// carries and `current`.
    pub fn may_be_approved_by(&self, person: &str, current: &Demands) -> bool {
        !self.requires_second_person(current) || self.request.queued_by.name() != person
    }

    /// Tells whether the apply is approved, by a second person where one is demanded.
    pub fn is_approved_by_another(&self, current: &Demands) -> bool {
        let by = self.approval.as_ref().map(|approval| approval.by.as_str());
        by.is_some_and(|by| self.may_be_approved_by(by, current))
    }

    pub fn requires_second_person(&self, current: &Demands) -> bool {
        self.request.second_person || current.second_person
    }

    /// Returns the phase that is open: queued for a runner, and leased by none.
    pub fn open_phase(&self) -> Option<Phase> {
        match self.state {
            RunState::PlanQueued => Some(Phase::Plan),
            RunState::ApplyQueued => Some(Phase::Apply),
            RunState::AwaitingPlanMfa
            | RunState::Pending
            | RunState::Planning
            | RunState::AwaitingConfirmation
            | RunState::AwaitingApplyMfa
            | RunState::Applying
            | RunState::Planned
            | RunState::Applied
            | RunState::Errored
            | RunState::Canceled
            | RunState::Discarded
            | RunState::Lost => None,
        }
    }

    /// Returns the phase that may be running: one with a lease, or lost.
    pub fn running_phase(&self) -> Option<Phase> {
        match self.state {
            RunState::Planning => Some(Phase::Plan),
            RunState::Applying | RunState::Lost => Some(Phase::Apply),
            RunState::AwaitingPlanMfa
            | RunState::Pending
            | RunState::PlanQueued
            | RunState::AwaitingConfirmation
            | RunState::AwaitingApplyMfa
            | RunState::ApplyQueued
            | RunState::Planned
            | RunState::Applied
            | RunState::Errored
            | RunState::Canceled
            | RunState::Discarded => None,
        }
    }

    /// Tells whether this person has approved the plan, by a confirmation rather than a code.
    pub fn was_confirmed_by(&self, person: &str) -> bool {
        self.apply.authenticated.is_none()
            && self.approval.as_ref().is_some_and(|approval| approval.by == person)
    }

    /// Returns from when on a person may have a running phase killed; absent unless a graceful
    /// cancel was asked for and terraform may still run.
    pub fn force_cancel_time(&self, grace: Duration) -> Option<Timestamp> {
        let may_run = self.running_phase().is_some();
        self.cancel_requested_at.filter(|_| may_run).map(|at| at + grace)
    }

    /// Tells whether the run is lost for good: its runner was revoked, so that nobody is left who
    /// could tell how the apply ended.
    pub fn lost_its_runner(&self) -> bool {
        self.state == RunState::Lost && self.apply.lease.is_none()
    }

    /// Tells whether the run's kind ends after its plan and lets others pass.
    pub fn is_plan_only(&self) -> bool {
        self.request.kind == RunKind::PlanOnly
    }
}
