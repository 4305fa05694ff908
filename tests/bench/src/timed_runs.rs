//! Runs whose steps are timed from outside.

use std::time::Duration;

use anyhow::Context;
use latchkey_aws_simulator::World;
use latchkey_harness::{Configuration, Person, Stage, StageOptions, is_ended};
use latchkey_proto::v1::{self, MfaPolicy, PlainCredentials, RunKind, RunState};
use uuid::Uuid;

use crate::clock::Moment;
use crate::programs;
use crate::stub::Stub;

/// More than simulated runners have: the idlest runner is offered the job.
const SLOTS: u32 = 8;

/// Longer than any run here takes.
const LIMIT: Duration = Duration::from_secs(180);

/// A stage whose one runner has the stub as its terraform.
#[derive(Debug)]
pub(crate) struct StubStage {
    pub(crate) stage: Stage,
    pub(crate) stub: Stub,
}

impl StubStage {
    pub(crate) async fn start() -> anyhow::Result<Self> {
        Self::start_in(World::example()).await
    }

    /// With this world behind STS.
    pub(crate) async fn start_in(world: World) -> anyhow::Result<Self> {
        let stub = Stub::new()?;
        let options = StageOptions {
            world,
            runners: Vec::new(),
            slots: SLOTS,
            pass_env: vec![stub.environment()],
            ..StageOptions::new(programs::programs()?)
        };
        let mut stage = Stage::start(options).await.context("start a stage")?;
        stage.terraform = stub.program();
        stage.add_runner("real").await?;
        Ok(Self { stage, stub })
    }

    /// Makes an environment whose runs want no code and no credentials, and uploads its
    /// configuration.
    pub(crate) async fn prepared(&self, environment: &str) -> anyhow::Result<Prepared> {
        let main = "resource \"terraform_data\" \"one\" {}\n";
        prepare(&self.stage.owner, environment, &Configuration::of(&[("main.tf", main)])).await
    }

    /// Queues plans one after the other and times each; the first few are not counted.
    pub(crate) async fn plans(&self, count: usize) -> anyhow::Result<Vec<Plan>> {
        let prepared = self.prepared("stub").await?;
        let mut plans = Vec::new();
        for _ in 0..count + WARM_UP {
            let run = prepared.queue(&self.stage.owner, RunKind::PlanOnly).await?;
            let ended = watch(&self.stage.owner, &run.run_id, is_ended).await?;
            anyhow::ensure!(
                ended.run.state() == RunState::Planned,
                "plan with the stub: {}; the runner's log:\n{}",
                ended.run.reason,
                self.stage.runners.first().map(|runner| runner.log()).unwrap_or_default()
            );
            plans.push((run, ended.at));
        }
        let starts = self.stub.starts()?;
        plans
            .into_iter()
            .skip(WARM_UP)
            .map(|(run, result)| {
                let of = |command: &str| {
                    let mut its = starts.iter().filter(|start| start.run_id == run.run_id);
                    let start = its.find(|start| start.command == command);
                    start.map(|start| start.at).context("find when a run's terraform was started")
                };
                Ok(Plan {
                    sent: run.sent,
                    acknowledged: run.acknowledged,
                    started: of("init")?,
                    plan: of("plan")?,
                    show: of("show")?,
                    result,
                })
            })
            .collect()
    }
}

const WARM_UP: usize = 3;

/// One plan with the stub, which exits at once.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    pub(crate) sent: Moment,
    pub(crate) acknowledged: Moment,
    /// The first instruction of the stub's first process, which is `init`.
    pub(crate) started: Moment,
    pub(crate) plan: Moment,
    pub(crate) show: Moment,
    /// When somebody who watches the run knew its end.
    pub(crate) result: Moment,
}

/// An environment with an uploaded configuration.
#[derive(Clone, Debug)]
pub(crate) struct Prepared {
    pub(crate) environment: String,
    pub(crate) digest: String,
    auto_apply: Option<bool>,
}

/// A run that was queued.
#[derive(Clone, Debug)]
pub(crate) struct Queued {
    pub(crate) run_id: String,
    pub(crate) sent: Moment,
    pub(crate) acknowledged: Moment,
}

/// A run in the state that was waited for, and when that was told.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    pub(crate) run: v1::Run,
    pub(crate) at: Moment,
}

pub(crate) async fn prepare(
    owner: &Person,
    environment: &str,
    configuration: &Configuration,
) -> anyhow::Result<Prepared> {
    let settings = v1::EnvironmentSettings {
        mfa_policy: MfaPolicy::Never.into(),
        pool: Stage::POOL.to_owned(),
        plain_credentials: PlainCredentials::None.into(),
        ..Default::default()
    };
    let prepared = prepare_with(owner, environment, configuration, settings).await?;
    // By each run: for an environment that does it always, a code would be asked.
    Ok(Prepared { auto_apply: Some(true), ..prepared })
}

pub(crate) async fn prepare_with(
    owner: &Person,
    environment: &str,
    configuration: &Configuration,
    settings: v1::EnvironmentSettings,
) -> anyhow::Result<Prepared> {
    owner
        .create_environment_with(environment, settings)
        .await
        .with_context(|| format!("make environment {environment}"))?;
    let digest = owner.upload(environment, configuration).await.context("upload")?;
    Ok(Prepared { environment: environment.to_owned(), digest, auto_apply: None })
}

impl Prepared {
    pub(crate) async fn queue(&self, owner: &Person, kind: RunKind) -> anyhow::Result<Queued> {
        let request = v1::QueueRunRequest {
            organization: owner.organization.clone(),
            environment: self.environment.clone(),
            configuration_digest: self.digest.clone(),
            kind: kind.into(),
            auto_apply: self.auto_apply,
            request_id: Uuid::new_v4().to_string(),
            ..Default::default()
        };
        let mut runs = owner.runs();
        let sent = Moment::now();
        let answer = runs.queue_run(request).await;
        let acknowledged = Moment::now();
        let run = answer.context("queue a run")?.into_inner().run.unwrap_or_default();
        Ok(Queued { run_id: run.run_id, sent, acknowledged })
    }
}

/// Watches a run until it is as wanted.
pub(crate) async fn watch(
    owner: &Person,
    run_id: &str,
    wanted: impl Fn(&v1::Run) -> bool,
) -> anyhow::Result<Seen> {
    let request = v1::WatchRunRequest { run_id: run_id.to_owned() };
    let mut stream = owner.runs().watch_run(request).await.context("watch a run")?.into_inner();
    let watching = async {
        while let Some(update) = stream.message().await.context("watch a run")? {
            let at = Moment::now();
            let run = update.run.unwrap_or_default();
            if wanted(&run) {
                return Ok(Seen { run, at });
            }
        }
        anyhow::bail!("see the run reach its state before its stream ended")
    };
    tokio::time::timeout(LIMIT, watching).await.context("see the run reach its state in time")?
}
