//! A runner as a process, with a work directory that outlives it.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;

use anyhow::Context;
use rustix::process::Signal;

use crate::process::{self, Logs, Process};
use crate::program::Program;

/// How a runner is started.
#[derive(Debug, Clone)]
pub struct RunnerOptions {
    pub name: String,
    pub slots: u32,
    /// `https://…` of the runners' listener.
    pub control_plane: String,
    /// Needed until it has its certificate.
    pub pool_token: String,
    /// The terraform to run; the one on PATH when absent.
    pub terraform: Option<PathBuf>,
    /// `LATCHKEY_RUNNER_LOG`; `info` when absent.
    pub log: Option<String>,
    /// Environment variables of the runner, passed on to its jobs.
    pub pass_env: Vec<(String, String)>,
    /// Further arguments of `run`.
    pub arguments: Vec<String>,
}

impl RunnerOptions {
    pub fn new(name: &str, control_plane: String, pool_token: String) -> Self {
        Self {
            name: name.to_owned(),
            slots: 1,
            control_plane,
            pool_token,
            terraform: None,
            log: None,
            pass_env: Vec::new(),
            arguments: Vec::new(),
        }
    }
}

/// A runner.
#[derive(Debug)]
pub struct TestRunner {
    program: Program,
    options: RunnerOptions,
    directory: PathBuf,
    logs: Logs,
    /// None while it is down.
    process: Option<Process>,
}

impl TestRunner {
    /// Starts one with its files in `directory`. That it is connected, `Person::wait_for_runner`
    /// tells.
    pub fn start(
        program: Program,
        directory: &Path,
        options: RunnerOptions,
    ) -> anyhow::Result<Self> {
        let logs = Logs::within(&directory.join("logs"), &format!("runner-{}", options.name));
        let mut runner =
            Self { program, options, directory: directory.to_owned(), logs, process: None };
        runner.restart()?;
        Ok(runner)
    }

    /// Kills the agent with SIGKILL; supervisors and their terraforms go on.
    pub async fn kill(&mut self) -> anyhow::Result<()> {
        let mut process = self.process.take().context("the runner does not run")?;
        process.kill().await
    }

    /// Kills everything of it with SIGKILL, as a host does that dies: agent, supervisors, terraforms.
    pub async fn lose_host(&mut self) -> anyhow::Result<()> {
        self.kill().await?;
        process::sweep(&self.work_dir());
        Ok(())
    }

    /// Asks the agent to stop, and waits until it has.
    pub async fn stop(&mut self) -> anyhow::Result<()> {
        let mut process = self.process.take().context("the runner does not run")?;
        process.signal(Signal::TERM)?;
        process.wait().await?;
        Ok(())
    }

    /// Asks the agent to stop, and does not wait.
    pub fn terminate(&self) -> anyhow::Result<()> {
        self.process.as_ref().context("the runner does not run")?.signal(Signal::TERM)
    }

    /// Waits until it has ended by itself or as it was asked to.
    pub async fn wait(&mut self) -> anyhow::Result<ExitStatus> {
        let mut process = self.process.take().context("the runner does not run")?;
        process.wait().await
    }

    /// Starts the agent on the files that it had. Does nothing while it runs.
    pub fn restart(&mut self) -> anyhow::Result<()> {
        if self.process.as_mut().is_some_and(Process::is_running) {
            return Ok(());
        }
        let token_file = self.directory.join(format!("{}.token", self.options.name));
        write_private(&token_file, &self.options.pool_token)
            .context("failed to write the pool token")?;
        let mut command = self.program.command();
        command.arg("run").arg("--work-dir").arg(self.work_dir());
        command.arg("--pool-token-file").arg(&token_file).args([
            "--control-plane",
            &self.options.control_plane,
            "--name",
            &self.options.name,
            "--slots",
            &self.options.slots.to_string(),
        ]);
        if let Some(terraform) = &self.options.terraform {
            command.arg("--terraform").arg(terraform);
        }
        for (name, value) in &self.options.pass_env {
            command.env(name, value).arg("--pass-env").arg(name);
        }
        command.args(&self.options.arguments);
        command.env("LATCHKEY_RUNNER_LOG", self.options.log.as_deref().unwrap_or("info"));
        self.process = Some(Process::start("the runner", command, self.logs.clone())?);
        Ok(())
    }

    /// Changes how the next start is done.
    pub fn options_mut(&mut self) -> &mut RunnerOptions {
        &mut self.options
    }

    pub fn options(&self) -> &RunnerOptions {
        &self.options
    }

    /// Changes which program the next start runs.
    pub fn set_program(&mut self, program: Program) {
        self.program = program;
    }

    /// Says whether it does not run, asked to or not.
    pub fn has_ended(&mut self) -> bool {
        self.process.as_mut().is_none_or(|process| !process.is_running())
    }

    /// Names it if it ended without having been asked to.
    pub(crate) fn ended_name(&mut self) -> Option<String> {
        let ended = self.process.as_mut().is_some_and(|process| !process.is_running());
        ended.then(|| self.options.name.clone())
    }

    pub fn process(&self) -> Option<&Process> {
        self.process.as_ref()
    }

    pub fn name(&self) -> &str {
        &self.options.name
    }

    pub fn work_dir(&self) -> PathBuf {
        self.directory.join(format!("runner-{}", self.options.name))
    }

    /// Everything that it has logged, over all its starts.
    pub fn log(&self) -> String {
        self.logs.stderr()
    }
}

impl Drop for TestRunner {
    fn drop(&mut self) {
        // The agent first, or it would start replacements for what is swept.
        drop(self.process.take());
        process::sweep(&self.work_dir());
        remove_short_directories(&self.work_dir());
    }
}

/// Removes the temporary directories that jobs with long paths have elsewhere: their supervisors,
/// killed by us, could not.
fn remove_short_directories(work_dir: &Path) {
    let Ok(jobs) = fs::read_dir(work_dir.join("jobs")) else { return };
    for job in jobs.flatten() {
        let Ok(short) = fs::read_to_string(job.path().join("tmpdir")) else { continue };
        if short.starts_with("/tmp/latchkey-") {
            // It may be gone already.
            let _ = fs::remove_dir_all(short);
        }
    }
}

fn write_private(path: &Path, text: &str) -> std::io::Result<()> {
    let mut options = OpenOptions::new();
    options
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)?
        .write_all(text.as_bytes())
}
