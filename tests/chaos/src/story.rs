//! One run from its queue to its end, while faults strike.
//!
//! A single loop does everything: strikes what is due, brings back what died, acts for the
//! person (who repeats whatever got no answer), and ends when the run has ended and the runner's
//! host is empty again. It waits without faults for a limited time only: then the run is stuck.

use std::time::Duration;

use anyhow::Context;
use latchkey_aws_simulator::Fault as AwsFault;
use latchkey_harness::stub::Script;
use latchkey_harness::{Configuration, Network, Person, TestRunner, is_ended, reason};
use latchkey_proto::v1;
use latchkey_proto::v1::{MfaPolicy, Phase, PlainCredentials, RunState};
use tokio::time::{Instant, sleep, timeout};
use tonic::Code;
use uuid::Uuid;

use crate::bed::{Bed, Engine};
use crate::processes;

/// How long a call of the person's may take.
const PATIENCE: Duration = Duration::from_secs(4);
/// How long a run may take once nothing is broken any more.
const LIMIT: Duration = Duration::from_secs(45);
/// Whatever happens.
const HARD_LIMIT: Duration = Duration::from_secs(110);
const LOOK: Duration = Duration::from_millis(20);

/// What goes wrong.
#[derive(Debug, Clone)]
pub(crate) enum Action {
    KillPlane,
    KillAgent,
    KillSupervisor,
    KillTerraform,
    /// At a named point of whoever passes it for the n-th time.
    KillAt {
        point: &'static str,
        hit: u64,
    },
    /// Whoever passes a named point waits there.
    PauseAt {
        point: &'static str,
        lasts: Duration,
    },
    Network {
        network: Network,
        lasts: Duration,
    },
    /// Nothing can be written at a point for a while.
    NoSpace {
        point: &'static str,
        lasts: Duration,
    },
    /// The wall clocks of control plane and runner jump.
    Clock {
        millis: i64,
    },
    UpgradeAgent,
    /// A person asks the run to stop.
    Cancel,
    /// A second agent with the same identity.
    Twin {
        lasts: Duration,
    },
    Aws(Vec<AwsFault>),
}

/// A fault, and when after the phase's begin it strikes.
#[derive(Debug, Clone)]
pub(crate) struct Fault {
    pub(crate) after: Duration,
    pub(crate) action: Action,
}

/// Everything about a round, derived from its seed.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    pub(crate) engine: Engine,
    /// Whether both phases want codes.
    pub(crate) gated: bool,
    pub(crate) script: Script,
    /// How long who died stays away.
    pub(crate) away: Duration,
    /// A held `apply` is let go so long after its begin.
    pub(crate) release: Duration,
    pub(crate) in_plan: Vec<Fault>,
    pub(crate) in_apply: Vec<Fault>,
    /// Whether the run must succeed all the same.
    pub(crate) expect: Expect,
}

/// What a round must come to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Expect {
    /// `Applied`, whatever was broken.
    Success,
    /// Any end that tells the truth.
    AnyEnd,
}

/// What a round has seen, for the checks.
#[derive(Debug)]
pub(crate) struct Seen {
    pub(crate) plan: Plan,
    pub(crate) environment: String,
    pub(crate) run_id: String,
    pub(crate) run: Option<v1::Run>,
    pub(crate) codes: Vec<String>,
    pub(crate) struck: u64,
    /// Where a real terraform's program notes that it ran.
    pub(crate) notes: std::path::PathBuf,
    /// What went wrong with the test's own eyes: stuck, or a control plane that does not open.
    pub(crate) problems: Vec<(&'static str, String)>,
}

/// A code on its way; repeated as it is until it has an outcome.
#[derive(Debug, Clone)]
struct Submission {
    person: Person,
    request: v1::AuthenticateRequest,
}

struct Story<'a> {
    bed: &'a mut Bed,
    seen: Seen,
    /// Faults to come, each at its moment.
    due: Vec<(Instant, Action)>,
    /// What to take back, and when.
    heal: Vec<(Instant, Heal)>,
    /// Points with something laid.
    laid: Vec<&'static str>,
    /// Points that hold whoever passes, and for how long.
    pauses: Vec<(&'static str, Duration)>,
    plane_back: Option<Instant>,
    agent_back: Option<Instant>,
    other_back: Option<Instant>,
    release_at: Option<Instant>,
    applying: bool,
    submission: Option<Submission>,
    /// Since when nothing is broken.
    calm: Instant,
}

#[derive(Debug)]
enum Heal {
    Network,
    Point(&'static str),
    /// Ends a pause.
    Go(&'static str),
    Twin,
}

/// Plays a round.
pub(crate) async fn play(bed: &mut Bed, plan: Plan) -> anyhow::Result<Seen> {
    bed.rounds += 1;
    let environment = format!("r{}", bed.rounds);
    let notes = bed.directory().join(format!("notes-{}", bed.rounds));
    let policy = if plan.gated { MfaPolicy::PlansAndApplies } else { MfaPolicy::Never };
    let settings = v1::EnvironmentSettings {
        mfa_policy: policy.into(),
        pool: latchkey_harness::Stage::POOL.to_owned(),
        plain_credentials: PlainCredentials::None.into(),
        ..Default::default()
    };
    bed.owner.create_environment_with(&environment, settings).await.context("make one")?;
    let configuration = match plan.engine {
        Engine::Stub => plan.script.configuration(),
        Engine::Real => real(&notes),
    };
    // A person has devices before anything breaks.
    if plan.gated {
        let _ = bed.code().await?;
    }
    let now = Instant::now();
    let seen = Seen {
        plan: plan.clone(),
        environment: environment.clone(),
        run_id: String::new(),
        run: None,
        codes: Vec::new(),
        struck: 0,
        notes,
        problems: Vec::new(),
    };
    let mut story = Story {
        bed,
        seen,
        due: Vec::new(),
        heal: Vec::new(),
        laid: Vec::new(),
        pauses: Vec::new(),
        plane_back: None,
        agent_back: None,
        other_back: None,
        release_at: None,
        applying: false,
        submission: None,
        calm: now,
    };
    let digest = story.bed.owner.upload(&environment, &configuration).await?;
    story.schedule(plan.in_plan);
    // Faults at no time are there before the first word.
    story.strike().await?;
    let request = v1::QueueRunRequest {
        organization: story.bed.owner.organization.clone(),
        environment,
        configuration_digest: digest,
        request_id: Uuid::new_v4().to_string(),
        ..Default::default()
    };
    story.run(request).await?;
    Ok(story.seen)
}

/// A resource whose program notes that it ran and prints numbered lines.
fn real(notes: &std::path::Path) -> Configuration {
    let main = format!(
        r#"resource "terraform_data" "one" {{}}
resource "terraform_data" "two" {{
  input = terraform_data.one.id
  provisioner "local-exec" {{
    command = "echo ran >> '{}'; for n in 0 1 2 3 4 5 6 7 8 9; do echo real line $n; sleep 0.08; done"
  }}
}}
"#,
        notes.display()
    );
    Configuration::of(&[("main.tf", &main)])
}

impl Story<'_> {
    fn schedule(&mut self, faults: Vec<Fault>) {
        let now = Instant::now();
        self.due.extend(faults.into_iter().map(|fault| (now + fault.after, fault.action)));
    }

    async fn run(&mut self, queue: v1::QueueRunRequest) -> anyhow::Result<()> {
        let begin = Instant::now();
        loop {
            self.strike().await?;
            self.mend().await?;
            if self.seen.run_id.is_empty() {
                let asked = timeout(PATIENCE, self.bed.owner.runs().queue_run(queue.clone())).await;
                if let Ok(Ok(answer)) = asked {
                    self.seen.run_id = answer.into_inner().run.unwrap_or_default().run_id;
                }
                continue;
            }
            // Asked first: what the host has brought is then surely seen in the run.
            let empty = self.host_is_empty();
            if let Some(run) = self.look().await {
                self.act(&run).await?;
                let over = is_ended(&run) && empty;
                self.seen.run = Some(run);
                if over && self.is_calm() {
                    return Ok(());
                }
            }
            if !self.is_calm() {
                self.calm = Instant::now();
            }
            if self.calm.elapsed() > LIMIT || begin.elapsed() > HARD_LIMIT {
                let jobs = self.jobs();
                let last = self.seen.run.as_ref().map(|run| (run.state(), run.reason.clone()));
                let what = format!("the last of the run was {last:?}; on the host are {jobs:?}");
                self.seen.problems.push(("nothing is stuck", what));
                return Ok(());
            }
            sleep(LOOK).await;
        }
    }

    /// Nothing is broken, or will be.
    fn is_calm(&mut self) -> bool {
        let unstruck = self.laid.iter().any(|point| self.bed.faults().join(point).exists());
        let ended = self.seen.run.as_ref().is_some_and(is_ended);
        self.plane_back.is_none()
            && self.agent_back.is_none()
            && self.other_back.is_none()
            && self.heal.is_empty()
            // What was laid where nobody comes by any more does not hold the round up.
            && (self.due.is_empty() || ended)
            && (!unstruck || ended || self.seen.run.is_some())
            && !self.bed.plane.has_ended()
            && !self.bed.runner.has_ended()
            && self.bed.other.as_mut().is_none_or(|other| !other.has_ended())
    }

    /// Faults whose time has come.
    async fn strike(&mut self) -> anyhow::Result<()> {
        let now = Instant::now();
        let (due, later): (Vec<_>, Vec<_>) = self.due.drain(..).partition(|(at, _)| *at <= now);
        self.due = later;
        for (_, action) in due {
            let away = now + self.seen.plan.away;
            self.seen.struck += 1;
            match action {
                Action::KillPlane => {
                    self.bed.kill_plane().await;
                    self.plane_back = Some(away);
                }
                Action::KillAgent => {
                    self.bed.kill_agent().await;
                    self.agent_back = Some(away);
                }
                Action::KillSupervisor => {
                    let jobs = self.bed.runner.work_dir().join("jobs");
                    if processes::kill(&processes::supervisors(&jobs)) == 0 {
                        self.seen.struck -= 1;
                    }
                }
                Action::KillTerraform => {
                    let jobs = self.bed.runner.work_dir().join("jobs");
                    if processes::kill(&processes::terraforms(&jobs)) == 0 {
                        self.seen.struck -= 1;
                    }
                }
                Action::KillAt { point, hit } => {
                    self.seen.struck -= 1;
                    let _ = std::fs::remove_file(self.bed.faults().join(format!("{point}.fired")));
                    self.bed.lay(point, &format!("kill {hit}"))?;
                    self.laid.push(point);
                }
                Action::PauseAt { point, lasts } => {
                    self.seen.struck -= 1;
                    for end in ["fired", "go"] {
                        let _ =
                            std::fs::remove_file(self.bed.faults().join(format!("{point}.{end}")));
                    }
                    self.bed.lay(point, "pause 1")?;
                    self.laid.push(point);
                    self.pauses.push((point, lasts));
                }
                Action::Network { network, lasts } => {
                    self.bed.proxy.set(network);
                    self.heal.push((now + lasts, Heal::Network));
                }
                Action::NoSpace { point, lasts } => {
                    self.bed.lay(point, "enospc 1")?;
                    self.heal.push((now + lasts, Heal::Point(point)));
                }
                Action::Clock { millis } => self.bed.lay("clock", &millis.to_string())?,
                Action::Cancel => {
                    self.seen.struck -= 1;
                    let request =
                        v1::CancelRequest { run_id: self.seen.run_id.clone(), force: false };
                    // It may come too early or too late.
                    let _ = timeout(PATIENCE, self.bed.owner.runs().cancel(request)).await;
                }
                Action::UpgradeAgent => self.bed.upgrade_agent().await?,
                Action::Twin { lasts } => {
                    self.bed.start_twin()?;
                    self.heal.push((now + lasts, Heal::Twin));
                }
                Action::Aws(faults) => {
                    faults.into_iter().for_each(|fault| self.bed.aws.simulator().script(fault));
                }
            }
        }
        Ok(())
    }

    /// Brings back what died, and takes back what is over.
    async fn mend(&mut self) -> anyhow::Result<()> {
        let now = Instant::now();
        let struck: Vec<_> =
            self.laid.iter().copied().filter(|point| self.bed.has_struck(point)).collect();
        self.laid.retain(|point| !struck.contains(point));
        let (begun, rest): (Vec<_>, Vec<_>) =
            self.pauses.drain(..).partition(|(point, _)| struck.contains(point));
        self.pauses = rest;
        self.heal.extend(begun.into_iter().map(|(point, lasts)| (now + lasts, Heal::Go(point))));
        self.seen.struck += struck.len() as u64;
        let (over, later): (Vec<_>, Vec<_>) = self.heal.drain(..).partition(|(at, _)| *at <= now);
        self.heal = later;
        for (_, heal) in over {
            match heal {
                Heal::Network => self.bed.proxy.set(Network::FINE),
                Heal::Point(point) => self.bed.lift(point),
                Heal::Go(point) => self.bed.lay(&format!("{point}.go"), "")?,
                // Its host does not burn: what it has begun, it ends.
                Heal::Twin if !self.bed.twin_is_idle() => self.heal.push((now + LOOK, heal)),
                Heal::Twin => self.bed.twin = None,
            }
        }
        if self.bed.plane.has_ended() && self.plane_back.is_none() {
            self.plane_back = Some(now + self.seen.plan.away);
        }
        if self.bed.runner.has_ended() && self.agent_back.is_none() {
            self.agent_back = Some(now + self.seen.plan.away);
        }
        if let Some(other) = self.bed.other.as_mut().filter(|_| self.other_back.is_none())
            && other.has_ended()
        {
            // It came by a point before the first one did.
            self.other_back = Some(now + self.seen.plan.away);
        }
        if self.other_back.is_some_and(|at| at <= now) {
            self.other_back = None;
            self.bed.other.as_mut().map_or(Ok(()), TestRunner::restart)?;
        }
        if self.plane_back.is_some_and(|at| at <= now) {
            self.plane_back = None;
            let full = self.heal.iter().any(|(_, heal)| matches!(heal, Heal::Point(_)));
            if let Err(error) = self.bed.revive_plane().await {
                if full {
                    // It says so, and is started again, as a service manager does.
                    self.plane_back = Some(now + self.seen.plan.away);
                    return Ok(());
                }
                self.seen.problems.push(("the control plane opens again", format!("{error:#}")));
                anyhow::bail!("the control plane does not open: {error:#}");
            }
        }
        if self.agent_back.is_some_and(|at| at <= now) {
            self.agent_back = None;
            self.bed.runner.restart()?;
        }
        let run_id = self.seen.run_id.clone();
        if self.release_at.is_none() && !run_id.is_empty() && self.bed.stub.holds(&run_id) {
            self.release_at = Some(now + self.seen.plan.release);
        }
        if self.release_at.is_some_and(|at| at <= now) {
            self.bed.stub.release(&run_id)?;
        }
        Ok(())
    }

    async fn look(&mut self) -> Option<v1::Run> {
        let asked = timeout(PATIENCE, self.bed.owner.run(&self.seen.run_id)).await;
        asked.ok().and_then(Result::ok)
    }

    /// What the person does when the run waits for them.
    async fn act(&mut self, run: &v1::Run) -> anyhow::Result<()> {
        let state = run.state();
        let after_plan =
            matches!(state, RunState::AwaitingConfirmation | RunState::AwaitingApplyMfa);
        if after_plan && !self.applying {
            self.applying = true;
            self.submission = None;
            let faults = self.seen.plan.in_apply.clone();
            self.schedule(faults);
            self.strike().await?;
        }
        match state {
            RunState::AwaitingConfirmation => {
                // Whatever is answered: the next look tells.
                let _ = timeout(PATIENCE, self.bed.owner.confirm(&run.run_id)).await;
            }
            RunState::AwaitingPlanMfa => self.submit(run, Phase::Plan).await?,
            RunState::AwaitingApplyMfa => self.submit(run, Phase::Apply).await?,
            RunState::Unspecified
            | RunState::Pending
            | RunState::PlanQueued
            | RunState::Planning
            | RunState::ApplyQueued
            | RunState::Applying
            | RunState::Planned
            | RunState::Applied
            | RunState::Errored
            | RunState::Canceled
            | RunState::Discarded
            | RunState::Lost => {}
        }
        Ok(())
    }

    async fn submit(&mut self, run: &v1::Run, phase: Phase) -> anyhow::Result<()> {
        let submission = match self.submission.clone() {
            Some(submission) if submission.request.phase() == phase => submission,
            Some(_) | None => {
                // The triple is set through the control plane, which may be down.
                let made = timeout(PATIENCE, self.bed.code()).await;
                let Ok(Ok((person, code))) = made else { return Ok(()) };
                self.seen.codes.push(code.clone());
                let digest = run.plan_result.as_ref().map(|plan| plan.digest.clone());
                let request = v1::AuthenticateRequest {
                    run_id: run.run_id.clone(),
                    phase: phase.into(),
                    token_code: code,
                    plan_digest: digest.unwrap_or_default(),
                    request_id: Uuid::new_v4().to_string(),
                };
                Submission { person, request }
            }
        };
        self.submission = Some(submission.clone());
        let Submission { person, request } = submission;
        let asked = timeout(PATIENCE, person.runs().authenticate(request)).await;
        match asked {
            Ok(Ok(_)) => self.submission = None,
            // An answer of our own: the code is spent, or its fate unknown.
            Ok(Err(status)) if !reason(&status).is_empty() => self.submission = None,
            Ok(Err(status)) if status.code() == Code::InvalidArgument => self.submission = None,
            Ok(Err(_)) | Err(_) => {}
        }
        Ok(())
    }

    fn jobs(&self) -> Vec<String> {
        let places = self.bed.job_directories().into_iter();
        let jobs = places.filter_map(|jobs| std::fs::read_dir(jobs).ok()).flatten();
        let names = jobs.flatten().map(|entry| entry.file_name());
        names.map(|name| name.to_string_lossy().into_owned()).collect()
    }

    fn host_is_empty(&self) -> bool {
        self.jobs().is_empty()
    }
}
