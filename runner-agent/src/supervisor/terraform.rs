//! Terraform's process: how it is started, stopped and watched.
//!
//! It gets a process group of its own, so that a cancel reaches it alone: provider plugins
//! ignore SIGINT but die on SIGTERM. Its output goes to a file, never a pipe, so nothing of ours
//! that dies takes it along: no parent-death signal, no kill-on-drop. What it leaves behind in
//! its group is killed after its end.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};

use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, Command};
use tokio::sync::watch;

use crate::job_directory::JobDirectory;

/// How far a person went in stopping the job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Cancel {
    No,
    Graceful,
    Forced,
}

/// How a command of terraform's ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ended {
    /// It was not even started, since the job was being stopped.
    NeverStarted,
    Exited(i32),
    /// By a signal, which was ours if the job was forced to stop.
    Killed(i32),
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("start {program}")]
    Start {
        program: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("wait for terraform")]
    Wait(#[source] io::Error),
}

/// Names a process so that a later one with the same number is not taken for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ProcessRecord {
    pub(super) pid: i32,
    /// In the kernel's ticks since boot.
    pub(super) start_time: u64,
}

impl ProcessRecord {
    pub(super) fn of(pid: i32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The command's name, in parentheses, may hold anything.
        let fields = &stat[stat.rfind(')')? + 2..];
        let start_time = fields.split(' ').nth(19)?.parse().ok()?;
        Some(Self { pid, start_time })
    }

    pub(super) fn is_alive(self) -> bool {
        Self::of(self.pid) == Some(self)
    }
}

/// Everything the commands of one job have in common.
#[derive(Debug, Clone)]
pub(super) struct Terraform {
    pub(super) program: PathBuf,
    pub(super) root: PathBuf,
    pub(super) directory: JobDirectory,
    pub(super) environment: BTreeMap<String, OsString>,
    pub(super) cancel: watch::Receiver<Cancel>,
}

impl Terraform {
    /// Runs a command to its end; what it prints goes to `raw`.
    pub(super) async fn run(
        &mut self,
        arguments: &[OsString],
        var_file: Option<&SecretString>,
    ) -> Result<Ended, Error> {
        if *self.cancel.borrow() != Cancel::No {
            return Ok(Ended::NeverStarted);
        }
        let failed = |source| Error::Start { program: self.program.clone(), source };
        let raw = OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .open(self.directory.join("raw"))
            .map_err(failed)?;
        let mut command = self.command(arguments);
        command.stdin(if var_file.is_some() { Stdio::piped() } else { Stdio::null() });
        command.stdout(raw.try_clone().map_err(failed)?).stderr(raw);
        let mut child = command.spawn().map_err(failed)?;
        if let (Some(mut stdin), Some(file)) = (child.stdin.take(), var_file) {
            let file = file.clone();
            tokio::spawn(async move {
                // Terraform may end without reading it all.
                let _ = stdin.write_all(file.expose_secret().as_bytes()).await;
            });
        }
        self.watch(child).await
    }

    /// Runs a short reading command and answers what it prints on stdout and stderr.
    pub(super) async fn capture(
        &mut self,
        arguments: &[OsString],
    ) -> Result<(Ended, Vec<u8>, Vec<u8>), Error> {
        if *self.cancel.borrow() != Cancel::No {
            return Ok((Ended::NeverStarted, Vec::new(), Vec::new()));
        }
        let mut command = self.command(arguments);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command
            .spawn()
            .map_err(|source| Error::Start { program: self.program.clone(), source })?;
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        let read_out = async {
            match stdout {
                Some(mut stdout) => stdout.read_to_end(&mut out).await,
                None => Ok(0),
            }
        };
        let read_err = async {
            match stderr {
                Some(mut stderr) => stderr.read_to_end(&mut err).await,
                None => Ok(0),
            }
        };
        let (ended, read_out, read_err) = tokio::join!(self.watch(child), read_out, read_err);
        read_out.and(read_err).map_err(Error::Wait)?;
        Ok((ended?, out, err))
    }

    fn command(&self, arguments: &[OsString]) -> Command {
        let mut command = Command::new(&self.program);
        command.args(arguments).current_dir(&self.root);
        command.env_clear().envs(&self.environment).process_group(0);
        command
    }

    async fn watch(&self, mut child: Child) -> Result<Ended, Error> {
        let pid = child.id().and_then(|id| i32::try_from(id).ok());
        if let Some(record) = pid.and_then(ProcessRecord::of) {
            // Only for a successor on this host: a reboot ends the process anyway.
            let record = serde_json::to_vec(&record).unwrap_or_default();
            if let Err(error) = fs::write(self.directory.join("process"), record) {
                tracing::warn!(%error, "failed to note terraform's process");
            }
        }
        let group = pid.and_then(Pid::from_raw);
        let mut cancel = self.cancel.clone();
        let mut sent = Cancel::No;
        let status = loop {
            tokio::select! {
                status = child.wait() => break status.map_err(Error::Wait)?,
                () = changed(&mut cancel, sent) => {
                    sent = *cancel.borrow();
                    stop(group, sent);
                }
            }
        };
        // `local-exec` children outlive a terraform that was interrupted.
        stop(group, Cancel::Forced);
        Ok(ended(status))
    }
}

/// Waits until more is asked for than was sent. A graceful cancel is sent once: terraform takes
/// a second SIGINT for an order to lose state.
async fn changed(cancel: &mut watch::Receiver<Cancel>, sent: Cancel) {
    if cancel.wait_for(|cancel| *cancel > sent).await.is_err() {
        std::future::pending::<()>().await;
    }
}

pub(super) fn stop(leader: Option<Pid>, cancel: Cancel) {
    let Some(leader) = leader else { return };
    let result = match cancel {
        Cancel::No => Ok(()),
        Cancel::Graceful => kill_process(leader, Signal::INT),
        Cancel::Forced => kill_process_group(leader, Signal::KILL),
    };
    match result {
        Ok(()) | Err(Errno::SRCH) => {}
        Err(error) => tracing::warn!(%error, ?cancel, "failed to signal terraform"),
    }
}

fn ended(status: ExitStatus) -> Ended {
    match (status.code(), status.signal()) {
        (Some(code), _) => Ended::Exited(code),
        (None, signal) => Ended::Killed(signal.unwrap_or_default()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_known_by_number_and_start_time() {
        let own = ProcessRecord::of(i32::try_from(std::process::id()).unwrap()).unwrap();
        assert!(own.is_alive());
        assert!(!ProcessRecord { start_time: own.start_time + 1, ..own }.is_alive());
        assert!(ProcessRecord::of(-1).is_none());
    }
}
