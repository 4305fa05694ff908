//! What keeps a job inside its own directory on a plain host, without root or containers.
//!
//! A thread of the supervisor confines itself and starts terraform, or a hook; what it starts
//! inherits that and cannot take it off. The supervisor stays outside, so that what it holds in
//! memory is beyond the reach of what it started, even where both have the same user.
//!
//! Landlock knows only what is allowed, and a rule cannot take back what one above it gives. All is
//! allowed, except the runner's directory, of which a job has parts of its own job directory; and
//! except what jobs share and the runner trusts, wherever it lies: engines, caches, hooks, the
//! runner's program. That can be read, not written (`shared.rs`).

mod shared;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;

use landlock::{
    ABI, Access, AccessFs, BitFlags, CompatLevel, Compatible, Ruleset, RulesetAttr, RulesetCreated,
    RulesetCreatedAttr, Scope, path_beneath_rules,
};
use rustix::process::Pid;
use serde::{Deserialize, Serialize};
use tokio::process::{Child, Command};
use tokio::runtime::Handle;

use self::shared::Around;
pub(super) use self::shared::places;
use super::limits::Limits;
use crate::job_directory::{JobDirectory, Settings, create_private};

/// The newest that was read about; an older kernel does what it can.
const KNOWN: ABI = ABI::V9;

/// What to do on a host that lacks a part of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Isolation {
    /// Go on with what there is, and say what is missing.
    #[default]
    BestEffort,
    /// Take no jobs.
    Required,
}

/// What the runner's configuration says of keeping jobs apart.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Confinement {
    pub(crate) isolation: Isolation,
    pub(crate) limits: Limits,
    /// The runner's directory, which jobs do not see; the directory of the jobs when not given.
    pub(crate) hidden: Option<PathBuf>,
    /// What jobs share and may read and run, but not write, in there or elsewhere.
    pub(crate) readable: Vec<PathBuf>,
    /// What in it jobs may also write.
    pub(crate) writable: Vec<PathBuf>,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("hide the runner's directory: look at {path}")]
    Look {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("hide the runner's directory")]
    Landlock(#[from] landlock::RulesetError),
}

/// Starts processes that are confined.
#[derive(Debug, Clone)]
pub(crate) struct Cage {
    /// Absent where the kernel has nothing of the kind.
    rules: Option<Arc<RulesetCreated>>,
    limits: Limits,
    isolation: Isolation,
}

/// The parts of the filesystem a job has besides what is outside of the hidden directory.
#[derive(Debug, Default)]
pub(crate) struct Parts {
    /// Read, write, run.
    pub(crate) own: Vec<PathBuf>,
    /// Written in place, but neither replaced nor run.
    pub(crate) written: Vec<PathBuf>,
    /// Read and run, and not written wherever it lies.
    pub(crate) read: Vec<PathBuf>,
}

impl Parts {
    /// Answers what a job needs of its directory, and makes what must exist for it.
    pub(super) fn of(directory: &JobDirectory, settings: &Settings) -> io::Result<Self> {
        let plan = directory.join("plan.bin");
        if !plan.exists() {
            create_private(&plan)?;
        }
        let confinement = &settings.confinement;
        let mut own = vec![directory.join("work"), directory.join("home"), directory.tmpdir()];
        own.extend(confinement.writable.iter().cloned());
        let mut read = vec![
            settings.terraform.clone(),
            directory.join(super::TOKEN_FILE),
            directory.join(super::CLI_CONFIG),
        ];
        read.extend(settings.terraform_cli_config.clone());
        read.extend(settings.provider_cache.clone());
        read.extend(settings.hooks.directory.clone());
        read.extend(confinement.readable.iter().cloned());
        Ok(Self { own, written: vec![plan], read })
    }
}

impl Cage {
    pub(super) fn of(directory: &JobDirectory, settings: &Settings) -> io::Result<Self> {
        let parts = Parts::of(directory, settings)?;
        let jobs = directory.path().parent().unwrap_or(directory.path());
        let hidden = settings.confinement.hidden.as_deref().unwrap_or(jobs);
        Self::new(&settings.confinement, hidden, &parts)
    }

    pub(crate) fn new(confinement: &Confinement, hidden: &Path, parts: &Parts) -> io::Result<Self> {
        let (limits, isolation) = (confinement.limits, confinement.isolation);
        let rules = match rules(hidden, parts) {
            Ok(rules) => Some(Arc::new(rules)),
            Err(error) if isolation == Isolation::Required => return Err(io::Error::other(error)),
            Err(error) => {
                let error = &error as &dyn std::error::Error;
                tracing::warn!(error, "the job is not kept apart from others");
                None
            }
        };
        Ok(Self { rules, limits, isolation })
    }

    /// Starts a command, confined.
    pub(super) fn start(&self, command: &mut Command) -> io::Result<Child> {
        let runtime = Handle::current();
        let started = self.inside(|| {
            let _runtime = runtime.enter();
            command.spawn()
        })?;
        // Not the supervisor's own, which must go on when a job has used all up. Terraform takes
        // far longer than this to come to what others have written.
        let pid = started.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
        if let Some(pid) = pid {
            self.limits.set(pid);
        }
        Ok(started)
    }

    /// Does something in a thread that is confined; so is what it starts.
    pub(crate) fn inside<T: Send>(
        &self,
        start: impl FnOnce() -> io::Result<T> + Send,
    ) -> io::Result<T> {
        // Of this thread only: it ends with the start, the rest of us is not confined.
        thread::scope(|scope| {
            let start = || self.enter().and_then(|()| start());
            let thread = thread::Builder::new().name("start".into()).spawn_scoped(scope, start)?;
            thread.join().unwrap_or_else(|_| Err(io::Error::other("the starting thread failed")))
        })
    }

    fn enter(&self) -> io::Result<()> {
        rustix::thread::set_no_new_privs(true)?;
        let Some(rules) = &self.rules else { return Ok(()) };
        match rules.try_clone()?.restrict_self() {
            Ok(_) => Ok(()),
            Err(error) if self.isolation == Isolation::Required => Err(io::Error::other(error)),
            Err(error) => {
                tracing::warn!(%error, "failed to keep a process of the job apart");
                Ok(())
            }
        }
    }
}

fn rules(hidden: &Path, parts: &Parts) -> Result<RulesetCreated, Error> {
    let all = AccessFs::from_all(KNOWN);
    let read = AccessFs::from_read(KNOWN);
    let written: BitFlags<AccessFs> = AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::Truncate;
    let around = Around::of(hidden, &parts.read, &parts.own)?;
    let rules = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(all)?
        .scope(Scope::from_all(KNOWN))?
        .create()?
        .add_rules(path_beneath_rules(around.all, all))?
        .add_rules(path_beneath_rules(around.read, read))?
        .add_rules(path_beneath_rules(&parts.own, all))?
        .add_rules(path_beneath_rules(&parts.written, written))?;
    Ok(rules)
}
