//! Everything that the main story needs, ready to play.

use std::env;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::Context;
use latchkey_aws_simulator::World;
use latchkey_proto::v1::variable_scope::Scope;
use tempfile::TempDir;

use crate::aws::Aws;
use crate::engine;
use crate::person::Person;
use crate::plane::{PlaneOptions, TestPlane};
use crate::program::Programs;
use crate::runner::{RunnerOptions, TestRunner};

/// Where the simulated AWS runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AwsKind {
    InProcess,
    Process,
}

/// What a stage is made of.
#[derive(Debug, Clone)]
pub struct StageOptions {
    pub programs: Programs,
    pub aws: AwsKind,
    /// Its world, when it runs in process.
    pub world: World,
    /// `sts_endpoint` is filled in.
    pub plane: PlaneOptions,
    /// Names of the runners to start; none is possible.
    pub runners: Vec<String>,
    pub slots: u32,
    /// `LATCHKEY_RUNNER_LOG` of the runners.
    pub runner_log: Option<String>,
    /// Passed on to jobs, as the operator of a build host may.
    pub pass_env: Vec<(String, String)>,
}

impl StageOptions {
    /// One runner, AWS in this process.
    pub fn new(programs: Programs) -> Self {
        Self {
            programs,
            aws: AwsKind::InProcess,
            world: World::example(),
            plane: PlaneOptions::default(),
            runners: vec!["build-1".to_owned()],
            slots: 1,
            runner_log: None,
            pass_env: Vec::new(),
        }
    }
}

/// A whole Latchkey on loopback. Fields are dropped in order: runners before what they talk to,
/// the directory last.
#[derive(Debug)]
pub struct Stage {
    pub runners: Vec<TestRunner>,
    pub plane: TestPlane,
    pub aws: Aws,
    /// `ada`, owner of `acme`.
    pub owner: Person,
    /// The terraform or tofu that the runners use.
    pub terraform: PathBuf,
    programs: Programs,
    options: StageOptions,
    directory: Directory,
}

impl Stage {
    pub const ORGANIZATION: &str = "acme";
    pub const OWNER: &str = "ada";
    /// The pool of the stage's runners.
    pub const POOL: &str = "build";

    /// Starts all of it; fails with what to do when there is no terraform and none can be had.
    pub async fn start(options: StageOptions) -> anyhow::Result<Self> {
        let terraform = engine::find()?;
        let directory = Directory::new()?;
        fs::create_dir(directory.path().join("shared")).context("failed to make a directory")?;
        let programs = options.programs.clone();
        let aws = match options.aws {
            AwsKind::InProcess => Aws::in_process(options.world.clone()).await?,
            AwsKind::Process => Aws::process(&programs, directory.path()).await?,
        };
        let plane_options =
            PlaneOptions { sts_endpoint: aws.facts().url.clone(), ..options.plane.clone() };
        let plane =
            TestPlane::start(programs.control_plane(), directory.path(), plane_options).await?;
        let owner = Person::bootstrap(&plane, Self::ORGANIZATION, Self::OWNER).await?;
        owner.create_pool(Self::POOL).await?;
        owner.list_accounts(&[&aws.facts().account_id]).await?;
        owner.set_triple(Scope::WholeOrganization(true), aws.facts()).await?;
        let names = options.runners.clone();
        let mut stage = Self {
            runners: Vec::new(),
            plane,
            aws,
            owner,
            terraform,
            programs,
            options,
            directory,
        };
        for name in names {
            stage.add_runner(&name).await?;
        }
        Ok(stage)
    }

    /// Starts a runner of pool [`Stage::POOL`] and waits until it is connected.
    pub async fn add_runner(&mut self, name: &str) -> anyhow::Result<&mut TestRunner> {
        self.add_runner_with(name, |_| {}).await
    }

    /// Starts one that is not as the others.
    pub async fn add_runner_with(
        &mut self,
        name: &str,
        change: impl FnOnce(&mut RunnerOptions),
    ) -> anyhow::Result<&mut TestRunner> {
        let token = self.owner.pool_token(Self::POOL).await?;
        let mut options = RunnerOptions {
            slots: self.options.slots,
            log: self.options.runner_log.clone(),
            pass_env: self.options.pass_env.clone(),
            terraform: Some(self.terraform.clone()),
            ..RunnerOptions::new(name, self.plane.runners_url(), token)
        };
        change(&mut options);
        let runner = TestRunner::start(self.programs.runner(), self.directory.path(), options)?;
        self.runners.push(runner);
        let runner = self.runners.last_mut().context("a runner was just added")?;
        let connected = self.owner.wait_for_runner(name).await;
        connected.with_context(|| format!("the runner's log:\n{}", runner.log()))?;
        Ok(runner)
    }

    /// The temporary directory: data, logs, work directories.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Where jobs may make files: not beside the directory of their runner, which is hidden from
    /// them.
    pub fn shared(&self) -> PathBuf {
        self.directory.path().join("shared")
    }

    /// Keeps the directory and returns it.
    pub fn keep_directory(&mut self) -> PathBuf {
        self.directory.keep();
        self.directory.path().to_owned()
    }

    /// Names a process of the stage that has ended by itself.
    pub fn ended(&mut self) -> Option<String> {
        if !self.aws.is_running() {
            return Some("the simulated AWS".to_owned());
        }
        if self.plane.has_ended() {
            return Some("the control plane".to_owned());
        }
        let runner = self.runners.iter_mut().find_map(TestRunner::ended_name);
        runner.map(|name| format!("runner {name}"))
    }

    pub fn programs(&self) -> &Programs {
        &self.programs
    }
}

/// A temporary directory that stays when there is something to look at.
#[derive(Debug)]
struct Directory(TempDir);

impl Directory {
    fn new() -> anyhow::Result<Self> {
        let made = tempfile::Builder::new().prefix("latchkey-").tempdir();
        Ok(Self(made.context("failed to make a temporary directory")?))
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn keep(&mut self) {
        self.0.disable_cleanup(true);
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        if std::thread::panicking() || env::var_os("LATCHKEY_KEEP").is_some() {
            self.keep();
            let path = self.path().display().to_string();
            // Nobody may be there to read it.
            let _ = writeln!(std::io::stderr(), "kept for a look: {path}");
        }
    }
}
