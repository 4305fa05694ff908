//! Terraform's process: how it is started, stopped and watched.
//!
//! It gets a process group of its own, so that a cancel reaches it alone: provider plugins
//! ignore SIGINT but die on SIGTERM. Its output goes to a file, never a pipe, so nothing of ours
//! that dies takes it along: no parent-death signal, no kill-on-drop. What it leaves behind, in
//! its group or outside of it, is killed after its end.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Serialize};
use tokio::io::AsyncWriteExt;
use tokio::process::{Child, Command};
use tokio::sync::watch;

use super::confine::Cage;
use super::log::Log;
use super::orphans;
use super::output::{self, LARGEST_OUTPUT, Output, Printed};
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

/// What a reading command has printed.
#[derive(Debug)]
pub(super) struct Captured {
    pub(super) ended: Ended,
    pub(super) stdout: Printed,
    pub(super) stderr: Printed,
}

/// How much of what such a command says of its failure is held.
const LARGEST_ERRORS: usize = 1 << 20;

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

/// Names a living process so that a later one with the same number is not taken for it.
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
        let mut fields = stat.get(stat.rfind(')')? + 2..)?.split(' ');
        if matches!(fields.next()?, "Z" | "X") {
            return None;
        }
        let start_time = fields.nth(18)?.parse().ok()?;
        Some(Self { pid, start_time })
    }

    pub(super) fn is_alive(self) -> bool {
        Self::of(self.pid) == Some(self)
    }
}

/// The name of the record of the running process.
pub(super) const PROCESS: &str = "process";

/// Says that SIGINT was sent: a successor must not send another.
pub(super) const INTERRUPTED: &str = "interrupted";

pub(super) fn note_interrupted(directory: &JobDirectory) {
    if let Err(error) = directory.note(INTERRUPTED, b"") {
        let error = &error as &dyn std::error::Error;
        tracing::warn!(error, "failed to note that terraform was interrupted");
    }
}

/// How long terraform may take to install its handler of SIGINT when nothing shows that it has:
/// before, the signal would kill it.
const DEAF: Duration = Duration::from_millis(500);

/// Everything the commands of one job have in common.
#[derive(Debug, Clone)]
pub(super) struct Terraform {
    pub(super) program: PathBuf,
    pub(super) root: PathBuf,
    pub(super) directory: JobDirectory,
    pub(super) environment: BTreeMap<String, OsString>,
    pub(super) cage: Cage,
    pub(super) cancel: watch::Receiver<Cancel>,
    /// All commands of the job that run at this moment.
    pub(super) running: orphans::Running,
    pub(super) log: Log,
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
        let printed = raw.metadata().map_err(failed)?.len();
        let mut command = self.command(arguments);
        command.stdin(if var_file.is_some() { Stdio::piped() } else { Stdio::null() });
        command.stdout(raw.try_clone().map_err(failed)?).stderr(raw);
        let mut child = self.cage.start(&mut command).map_err(failed)?;
        latchkey_failpoint::reach("sup.execed");
        if let (Some(mut stdin), Some(file)) = (child.stdin.take(), var_file) {
            let file = file.clone();
            tokio::spawn(async move {
                // Terraform may end without reading it all.
                let _ = stdin.write_all(file.expose_secret().as_bytes()).await;
            });
        }
        self.watch(child, Some(printed), arguments).await
    }

    /// Runs a short reading command and answers what it prints on stdout and stderr.
    pub(super) async fn capture(&mut self, arguments: &[OsString]) -> Result<Captured, Error> {
        if *self.cancel.borrow() != Cancel::No {
            let (stdout, stderr) = (Printed::default(), Printed::default());
            return Ok(Captured { ended: Ended::NeverStarted, stdout, stderr });
        }
        let mut command = self.command(arguments);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = self
            .cage
            .start(&mut command)
            .map_err(|source| Error::Start { program: self.program.clone(), source })?;
        let (over_to, over) = watch::channel(false);
        let stdout = child.stdout.take().map(|pipe| Output::new(pipe, over.clone()));
        let stderr = child.stderr.take().map(|pipe| Output::new(pipe, over));
        let watching = async {
            let ended = self.watch(child, None, arguments).await;
            over_to.send_replace(true);
            ended
        };
        let (ended, stdout, stderr) = tokio::join!(
            watching,
            output::read(stdout, LARGEST_OUTPUT),
            output::read(stderr, LARGEST_ERRORS)
        );
        let (stdout, stderr) = (stdout.map_err(Error::Wait)?, stderr.map_err(Error::Wait)?);
        Ok(Captured { ended: ended?, stdout, stderr })
    }

    fn command(&self, arguments: &[OsString]) -> Command {
        let mut command = Command::new(&self.program);
        command.args(arguments).current_dir(&self.root);
        command.env_clear().envs(&self.environment).process_group(0);
        command
    }

    /// Waits until terraform has printed something into `raw`, or long enough.
    async fn listening(&self, printed: Option<u64>) {
        let raw = self.directory.join("raw");
        let prints = async {
            loop {
                let now = fs::metadata(&raw).map_or(0, |metadata| metadata.len());
                if printed.is_some_and(|printed| now > printed) {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        let _ = tokio::time::timeout(DEAF, prints).await;
    }

    async fn watch(
        &self,
        mut child: Child,
        printed: Option<u64>,
        arguments: &[OsString],
    ) -> Result<Ended, Error> {
        let pid = child.id().and_then(|id| i32::try_from(id).ok());
        pid.iter().for_each(|pid| self.running.begins(*pid));
        if let Some(record) = pid.and_then(ProcessRecord::of) {
            // Only for a successor on this host: a reboot ends the process anyway.
            let record = serde_json::to_vec(&record).unwrap_or_default();
            if let Err(error) = self.directory.note(PROCESS, &record) {
                let error = &error as &dyn std::error::Error;
                tracing::warn!(error, "failed to note terraform's process");
            }
        }
        let group = pid.and_then(Pid::from_raw);
        let mut cancel = self.cancel.clone();
        let mut sent = Cancel::No;
        // SIGKILL is heard by everybody.
        let mut heard = Cancel::Graceful;
        let listening = self.listening(printed);
        tokio::pin!(listening);
        let status = loop {
            tokio::select! {
                status = child.wait() => break status.map_err(Error::Wait)?,
                () = &mut listening, if heard != Cancel::No => heard = Cancel::No,
                () = changed(&mut cancel, sent.max(heard)) => {
                    sent = *cancel.borrow();
                    if sent == Cancel::Graceful {
                        note_interrupted(&self.directory);
                    }
                    stop(group, sent);
                }
            }
        };
        pid.iter().for_each(|pid| self.running.ends(*pid));
        // `local-exec` children outlive a terraform that was interrupted. Its group is not
        // signalled: the number is free by now, and its members are among ours.
        let left = self.running.end_others().await;
        if !left.is_empty() {
            let command = arguments.first().map(|word| word.to_string_lossy()).unwrap_or_default();
            left.tell(&format!("terraform {command}"), &self.log);
        }
        Ok(ended(status))
    }
}

/// Waits until more is asked for than was sent. A graceful cancel is sent once: terraform takes
/// a second SIGINT for an order to lose state.
pub(super) async fn changed(cancel: &mut watch::Receiver<Cancel>, sent: Cancel) {
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

pub(super) fn ended(status: ExitStatus) -> Ended {
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
