//! The control plane as a process that can be killed and started again on its data.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};

use anyhow::Context;
use rustix::process::Signal;
use serde_json::Value;
use tokio::process::Command;

use crate::process::{Logs, Process};
use crate::program::Program;
use crate::wait::LIMIT;

/// How a control plane is started.
#[derive(Debug, Clone, Default)]
pub struct PlaneOptions {
    /// Where STS is.
    pub sts_endpoint: String,
    /// Seconds; the program's own default when absent.
    pub lease_term: Option<u64>,
    /// `LATCHKEY_LOG`; `info` when absent.
    pub log: Option<String>,
    /// Further arguments.
    pub arguments: Vec<String>,
    /// Variables of its own.
    pub environment: Vec<(String, String)>,
}

/// A control plane.
#[derive(Debug)]
pub struct TestPlane {
    program: Program,
    options: PlaneOptions,
    directory: PathBuf,
    data_dir: PathBuf,
    logs: Logs,
    /// None while it is down.
    process: Option<Process>,
    people: SocketAddr,
    runners: SocketAddr,
    ca_file: PathBuf,
}

impl TestPlane {
    /// Starts one with its data in `directory`, on free ports of loopback.
    pub async fn start(
        program: Program,
        directory: &Path,
        options: PlaneOptions,
    ) -> anyhow::Result<Self> {
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let mut plane = Self {
            program,
            options,
            directory: directory.to_owned(),
            data_dir: directory.join("data"),
            logs: Logs::within(&directory.join("logs"), "control-plane"),
            process: None,
            people: any,
            runners: any,
            ca_file: PathBuf::new(),
        };
        plane.restart().await?;
        Ok(plane)
    }

    /// Kills it with SIGKILL and returns when it is gone.
    pub async fn kill(&mut self) -> anyhow::Result<()> {
        let mut process = self.process.take().context("the control plane does not run")?;
        process.kill().await
    }

    /// Asks it to stop, and waits until it has.
    pub async fn stop(&mut self) -> anyhow::Result<()> {
        let mut process = self.process.take().context("the control plane does not run")?;
        process.signal(Signal::TERM)?;
        let status = process.wait().await?;
        anyhow::ensure!(status.success(), "the control plane ended with {status}");
        Ok(())
    }

    /// Starts it, on the ports that it had if it ran before. Does nothing while it runs.
    pub async fn restart(&mut self) -> anyhow::Result<()> {
        if self.process.as_mut().is_some_and(Process::is_running) {
            return Ok(());
        }
        let ready = self.directory.join("control-plane.json");
        match fs::remove_file(&ready) {
            Ok(()) => {}
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(error).context("failed to remove the old ready file"),
        }
        let mut process = self.spawn(&ready)?;
        let text = process.wait_for_file(&ready).await?;
        self.process = Some(process);
        let facts: Value =
            serde_json::from_slice(&text).context("failed to understand the ready file")?;
        let address = |name: &str| -> anyhow::Result<SocketAddr> {
            let text = facts[name].as_str().context("the ready file lacks an address")?;
            text.parse().with_context(|| format!("the ready file says {text}"))
        };
        (self.people, self.runners) = (address("people")?, address("runners")?);
        self.ca_file = facts["ca_file"].as_str().context("the ready file names no CA")?.into();
        Ok(())
    }

    /// Starts it and returns how it ended: for starts that must be refused.
    pub async fn refused_start(&mut self) -> anyhow::Result<String> {
        let before = self.log().len();
        let mut process = self.spawn(&self.directory.join("refused.json"))?;
        let status = process.wait().await?;
        anyhow::ensure!(!status.success(), "the control plane ended well");
        Ok(self.log().get(before..).unwrap_or_default().to_owned())
    }

    fn spawn(&self, ready: &Path) -> anyhow::Result<Process> {
        let mut command = self.program.command();
        command.arg("--data-dir").arg(self.data_dir()).arg("--key-file").arg(self.key_file());
        command.arg("--ready-file").arg(ready).args([
            "--people-address",
            &self.people.to_string(),
            "--runners-address",
            &self.runners.to_string(),
            "--sts-endpoint",
            &self.options.sts_endpoint,
        ]);
        if let Some(term) = self.options.lease_term {
            command.arg("--lease-term").arg(term.to_string());
        }
        command.args(&self.options.arguments);
        command.envs(self.options.environment.clone());
        command.env("LATCHKEY_LOG", self.options.log.as_deref().unwrap_or("info"));
        Process::start("the control plane", command, self.logs.clone())
    }

    /// Changes how the next start is done.
    pub fn options_mut(&mut self) -> &mut PlaneOptions {
        &mut self.options
    }

    /// Says whether it ended without having been asked to.
    pub fn has_ended(&mut self) -> bool {
        self.process.as_mut().is_some_and(|process| !process.is_running())
    }

    pub fn process(&self) -> Option<&Process> {
        self.process.as_ref()
    }

    pub fn data_dir(&self) -> PathBuf {
        self.data_dir.clone()
    }

    /// The master key, which is the same whatever the data directory is.
    pub fn key_file(&self) -> PathBuf {
        self.directory.join("data.key")
    }

    /// Takes a backup, running or not.
    pub async fn backup(&self, to: &Path) -> anyhow::Result<()> {
        let mut command = self.program.command();
        command.arg("backup").arg("--data-dir").arg(self.data_dir()).arg("--to").arg(to);
        ended_well("backup", command).await
    }

    /// Makes a new data directory out of a backup; the next start is on it.
    pub async fn restore(&mut self, from: &Path, data_dir: &Path) -> anyhow::Result<()> {
        let mut command = self.program.command();
        command.arg("restore").arg("--from").arg(from).arg("--data-dir").arg(data_dir);
        command.arg("--key-file").arg(self.key_file());
        ended_well("restore", command).await?;
        self.data_dir = data_dir.to_owned();
        Ok(())
    }

    /// Prepares a command of whoever has the host, on its data: `break-glass` and its like. It is
    /// tethered: it ends when its standard input closes.
    pub fn host_command(&self, arguments: &[&str]) -> Command {
        let mut command = self.program.command();
        command.args(arguments).arg("--data-dir").arg(self.data_dir());
        command
    }

    /// Runs one and returns what it said.
    pub async fn on_host(&self, arguments: &[&str]) -> anyhow::Result<Output> {
        finished("the command on the host", self.host_command(arguments)).await
    }

    /// `https://…` for people and programs.
    pub fn people_url(&self) -> String {
        format!("https://{}", self.people)
    }

    /// `https://…` for runners.
    pub fn runners_url(&self) -> String {
        format!("https://{}", self.runners)
    }

    /// Where runners connect, as an address.
    pub fn runners_address(&self) -> SocketAddr {
        self.runners
    }

    pub fn ca_file(&self) -> &Path {
        &self.ca_file
    }

    pub fn ca_pem(&self) -> anyhow::Result<String> {
        fs::read_to_string(&self.ca_file).context("failed to read the CA's certificate")
    }

    /// Everything that it has logged, over all its starts.
    pub fn log(&self) -> String {
        self.logs.stderr()
    }

    /// Everything that it wrote to standard output.
    pub fn stdout(&self) -> String {
        self.logs.stdout()
    }

    /// The secret that buys the first owner, as it was printed at the first start.
    pub fn bootstrap_secret(&self) -> anyhow::Result<String> {
        let text = self.stdout();
        let line = text.lines().find(|line| line.contains("login --bootstrap"));
        let secret = line.and_then(|line| line.rsplit(' ').next());
        Ok(secret.context("the control plane printed no one-time secret")?.to_owned())
    }
}

/// Runs a tethered program to its end.
pub async fn finished(name: &str, mut command: Command) -> anyhow::Result<Output> {
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().with_context(|| format!("failed to start {name}"))?;
    // Tethered, it ends when this closes.
    let _tether = child.stdin.take();
    let output = tokio::time::timeout(LIMIT, child.wait_with_output()).await;
    Ok(output.with_context(|| format!("{name} did not end"))??)
}

async fn ended_well(name: &str, command: Command) -> anyhow::Result<()> {
    let output = finished(name, command).await?;
    let said = String::from_utf8_lossy(&output.stderr);
    anyhow::ensure!(output.status.success(), "{name} ended with {}: {said}", output.status);
    Ok(())
}
