//! A whole Latchkey that can be broken: control plane, a network, a runner, an AWS, a stub.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use latchkey_aws_simulator::{User, World};
use latchkey_harness::stub::Stub;
use latchkey_harness::{
    Aws, Network, Person, PlaneOptions, Program, Proxy, RunnerOptions, Stage, TestPlane,
    TestRunner, wait_for,
};
use latchkey_proto::v1::Role;
use latchkey_proto::v1::variable_scope::Scope;
use rustix::process::Signal;
use tempfile::TempDir;

use crate::programs::programs;

/// Seconds: short, so that expiry is seen often.
const LEASE_TERM: u64 = 3;

/// How often a control plane may fail to open before that is a violation.
const STARTS: usize = 3;

/// A device has four or five codes at a time, and a new one only every 30 s.
const CODES_OF_A_DEVICE: u32 = 4;

const NAME: &str = "build-1";
const OTHER: &str = "build-2";

/// Which terraform a runner is given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Engine {
    Stub,
    Real,
}

/// How many build hosts a pool has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Hosts {
    One,
    Two,
}

/// The device in use, and how many codes of it were.
#[derive(Debug)]
struct Device {
    person: Person,
    serial: String,
    used: u32,
}

/// Fields are dropped in order: runners before what they talk to, the directory last.
#[derive(Debug)]
pub(crate) struct Bed {
    pub(crate) runner: TestRunner,
    /// A second build host of the pool, which nothing is done to.
    pub(crate) other: Option<TestRunner>,
    /// A second agent with the first one's identity, while there is one.
    pub(crate) twin: Option<TestRunner>,
    pub(crate) proxy: Proxy,
    pub(crate) plane: TestPlane,
    pub(crate) aws: Aws,
    pub(crate) owner: Person,
    pub(crate) stub: Stub,
    /// How many rounds it has seen.
    pub(crate) rounds: u64,
    device: Option<Device>,
    devices: u32,
    directory: TempDir,
}

impl Bed {
    pub(crate) async fn make(engine: Engine, hosts: Hosts) -> anyhow::Result<Self> {
        let directory = tempfile::Builder::new().prefix("latchkey-chaos-").tempdir()?;
        let at = directory.path();
        let faults = at.join("faults");
        fs::create_dir(&faults)?;
        let armed = (latchkey_failpoint::VARIABLE.to_owned(), faults.display().to_string());
        let aws = Aws::in_process(World::example()).await?;
        let options = PlaneOptions {
            sts_endpoint: aws.facts().url.clone(),
            lease_term: Some(LEASE_TERM),
            environment: vec![armed.clone()],
            ..PlaneOptions::default()
        };
        let programs = programs()?;
        let plane = TestPlane::start(programs.control_plane(), at, options).await?;
        let owner = Person::bootstrap(&plane, Stage::ORGANIZATION, Stage::OWNER).await?;
        owner.create_pool(Stage::POOL).await?;
        owner.list_accounts(&[&aws.facts().account_id]).await?;
        let proxy = Proxy::start(plane.runners_address()).await?;
        let stub = Stub::new(&at.join("stub"))?;
        let terraform = match engine {
            Engine::Stub => stub.program(),
            Engine::Real => latchkey_harness::engine::find()?,
        };
        let options = RunnerOptions {
            terraform: Some(terraform),
            pass_env: vec![armed, stub.environment()],
            // As an upgrade wants it: jobs go on, and the next agent takes them up.
            arguments: vec!["--on-sigterm".to_owned(), "leave".to_owned()],
            ..RunnerOptions::new(
                NAME,
                format!("https://{}", proxy.address()),
                owner.pool_token(Stage::POOL).await?,
            )
        };
        let runner = TestRunner::start(programs.runner(), at, options.clone())?;
        owner.wait_for_runner(NAME).await?;
        let other = match hosts {
            Hosts::One => None,
            Hosts::Two => {
                let options = RunnerOptions {
                    name: OTHER.to_owned(),
                    control_plane: plane.runners_url(),
                    pool_token: owner.pool_token(Stage::POOL).await?,
                    ..options
                };
                let other = TestRunner::start(programs.runner(), at, options)?;
                owner.wait_for_runner(OTHER).await?;
                Some(other)
            }
        };
        Ok(Self {
            runner,
            other,
            twin: None,
            proxy,
            plane,
            aws,
            owner,
            stub,
            rounds: 0,
            device: None,
            devices: 0,
            directory,
        })
    }

    pub(crate) fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Leaves the directory for a person to look at.
    pub(crate) fn keep(&mut self) -> PathBuf {
        self.directory.disable_cleanup(true);
        self.directory.path().to_owned()
    }

    pub(crate) fn faults(&self) -> PathBuf {
        self.directory.path().join("faults")
    }

    /// Lays a fault at a point.
    pub(crate) fn lay(&self, point: &str, what: &str) -> anyhow::Result<()> {
        // Written whole under another name: whoever comes by reads all or nothing.
        let draft = self.faults().join(".draft");
        fs::write(&draft, what)?;
        fs::rename(draft, self.faults().join(point)).context("lay a fault")
    }

    /// Says whether a fault has struck.
    pub(crate) fn has_struck(&self, point: &str) -> bool {
        self.faults().join(format!("{point}.fired")).exists()
    }

    /// Takes back what was laid.
    pub(crate) fn lift(&self, point: &str) {
        let _ = fs::remove_file(self.faults().join(point));
    }

    /// Takes everything back but planted defects.
    pub(crate) fn lift_all(&self) {
        for entry in fs::read_dir(self.faults()).into_iter().flatten().flatten() {
            if !entry.file_name().to_string_lossy().starts_with("defect.") {
                let _ = fs::remove_file(entry.path());
            }
        }
        self.proxy.set(Network::FINE);
    }

    pub(crate) async fn kill_plane(&mut self) {
        // It may have died of something else.
        let _ = self.plane.kill().await;
    }

    /// Starts the control plane again. That it opens is a promise of its own.
    pub(crate) async fn revive_plane(&mut self) -> anyhow::Result<()> {
        let mut last = Ok(());
        for _ in 0..STARTS {
            last = self.plane.restart().await;
            if last.is_ok() {
                break;
            }
        }
        last
    }

    pub(crate) async fn kill_agent(&mut self) {
        let _ = self.runner.kill().await;
    }

    /// Replaces the agent by another copy of the program, as an upgrade does.
    pub(crate) async fn upgrade_agent(&mut self) -> anyhow::Result<()> {
        let copy = self.directory().join(format!("latchkey-runner-{}", self.rounds));
        if !copy.exists() {
            fs::copy(std::env::current_exe()?, &copy).context("copy the program")?;
        }
        if let Some(process) = self.runner.process() {
            process.signal(Signal::TERM)?;
        }
        let limit = Duration::from_secs(3);
        let ended = wait_for("the agent to leave", limit, async || {
            self.runner.has_ended().then_some(()).ok_or_else(|| "it runs".to_owned())
        });
        let _ = ended.await;
        self.kill_agent().await;
        let program = programs()?.runner();
        self.runner.set_program(Program { exe: copy, ..program });
        self.runner.restart()
    }

    /// Starts a second agent with a copy of the first one's identity.
    pub(crate) fn start_twin(&mut self) -> anyhow::Result<()> {
        let place = self.directory().join("twin");
        let to = place.join(format!("runner-{NAME}"));
        copy_identity(&self.runner.work_dir(), &to)?;
        let options = self.runner.options().clone();
        self.twin = Some(TestRunner::start(programs()?.runner(), &place, options)?);
        Ok(())
    }

    /// Where the build hosts keep their jobs.
    pub(crate) fn job_directories(&self) -> Vec<PathBuf> {
        let runners = std::iter::once(&self.runner).chain(&self.other);
        runners.map(|runner| runner.work_dir().join("jobs")).collect()
    }

    /// Says whether the second agent holds nothing.
    pub(crate) fn twin_is_idle(&self) -> bool {
        self.twin.as_ref().is_none_or(|twin| {
            let jobs = fs::read_dir(twin.work_dir().join("jobs"));
            jobs.into_iter().flatten().next().is_none()
        })
    }

    /// Takes a code of a device that is good and not blocked, and says whose it is: a new
    /// person's after a few.
    pub(crate) async fn code(&mut self) -> anyhow::Result<(Person, String)> {
        if self.device.as_ref().is_none_or(|device| device.used >= CODES_OF_A_DEVICE) {
            self.device = Some(self.equip().await?);
        }
        let device = self.device.as_mut().context("a device was just chosen")?;
        device.used += 1;
        Ok((device.person.clone(), self.aws.unused_code_of(&device.serial).await?))
    }

    /// Makes a person whose own triple has a device that was never used. To replace a triple
    /// takes a code, and that could meet what is broken just now; to set a first one takes none.
    async fn equip(&mut self) -> anyhow::Result<Device> {
        self.devices += 1;
        let name = format!("person-{}", self.devices);
        let account = self.aws.facts().account_id.clone();
        let made = self.aws.simulator().change_world(|world| {
            world.add_user(&account, User::with_key_and_device("aws", &account, &name))?;
            let account = world.accounts.iter().find(|known| known.id == account);
            let user = account
                .and_then(|account| account.users.iter().find(|user| user.name == name).cloned());
            Ok::<_, latchkey_aws_simulator::Invalid>(user)
        });
        let user = made.context("add a user")?.context("find the user")?;
        let mut facts = self.aws.facts().clone();
        facts.access_key_id = user.access_keys[0].id.clone();
        facts.secret_access_key = user.access_keys[0].secret.clone();
        facts.mfa_serial = user.devices[0].serial.clone();
        let person = self.owner.create_user(&self.plane, &name, Role::Owner).await?;
        person.set_triple(Scope::Personal(true), &facts).await?;
        Ok(Device { person, serial: facts.mfa_serial, used: 0 })
    }
}

/// Copies everything but the jobs.
fn copy_identity(from: &Path, to: &Path) -> anyhow::Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let name = entry.file_name();
        if entry.file_type()?.is_dir() {
            if name != "jobs" && name != "kept" {
                copy_identity(&entry.path(), &to.join(name))?;
            }
        } else if name != "lock" {
            match fs::copy(entry.path(), to.join(name)) {
                // The agent lives: it writes beside a file, then renames.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                copied => drop(copied?),
            }
        }
    }
    Ok(())
}
