//! A child process: its output in files, its group killed with its handle.

use std::fs::{self, File, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context;
use rustix::process::{
    Pid, Signal, WaitId, WaitIdOptions, kill_process, kill_process_group, waitid,
};
use tokio::process::{Child, ChildStdin, Command};

use crate::wait::{LIMIT, wait_for};

/// How much of a log an error carries.
const TAIL_LINES: usize = 15;

/// Killed processes are gone long before.
const SWEEP_LIMIT: Duration = Duration::from_secs(10);

/// A running child.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    pid: Pid,
    /// A tethered program ends when this closes.
    _tether: Option<ChildStdin>,
    logs: Logs,
}

/// Where a program's output goes; a restarted one goes on in the same files.
#[derive(Debug, Clone)]
pub(crate) struct Logs {
    pub(crate) stdout: PathBuf,
    pub(crate) stderr: PathBuf,
}

impl Logs {
    pub(crate) fn within(directory: &Path, name: &str) -> Self {
        Self {
            stdout: directory.join(format!("{name}.out")),
            stderr: directory.join(format!("{name}.log")),
        }
    }

    /// Reads what was written to standard error.
    pub(crate) fn stderr(&self) -> String {
        read(&self.stderr)
    }

    pub(crate) fn stdout(&self) -> String {
        read(&self.stdout)
    }

    fn tail(&self) -> String {
        let text = self.stderr();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(TAIL_LINES)..].join("\n")
    }
}

impl Process {
    /// Starts the command, its output appended to the files.
    pub(crate) fn start(name: &str, mut command: Command, logs: Logs) -> anyhow::Result<Self> {
        let open = |path: &Path| -> anyhow::Result<File> {
            if let Some(directory) = path.parent() {
                fs::create_dir_all(directory).context("failed to make the directory of logs")?;
            }
            OpenOptions::new()
                .create(true)
                .append(true)
                .open(path)
                .with_context(|| format!("failed to open {}", path.display()))
        };
        command.stdout(Stdio::from(open(&logs.stdout)?)).stderr(Stdio::from(open(&logs.stderr)?));
        let mut child = command.spawn().with_context(|| format!("failed to start {name}"))?;
        let pid = child
            .id()
            .and_then(|id| i32::try_from(id).ok())
            .and_then(Pid::from_raw)
            .with_context(|| format!("{name} ended before it had a process id"))?;
        let tether = child.stdin.take();
        Ok(Self { name: name.to_owned(), child, pid, _tether: tether, logs })
    }

    /// Returns the process id.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// Waits until the file that says "ready" appears.
    pub(crate) async fn wait_for_file(&mut self, path: &Path) -> anyhow::Result<Vec<u8>> {
        let name = self.name.clone();
        let what = format!("the ready file of {name}");
        let (child, logs) = (&mut self.child, &self.logs);
        let found = wait_for(&what, LIMIT, async || {
            if let Ok(content) = fs::read(path) {
                return Ok(Ok(content));
            }
            match child.try_wait() {
                Ok(None) => Err("it runs and is not ready".to_owned()),
                Ok(Some(status)) => Ok(Err(format!("{name} ended ({status}):\n{}", logs.tail()))),
                Err(error) => Ok(Err(format!("failed to look after {name}: {error}"))),
            }
        })
        .await?;
        found.map_err(anyhow::Error::msg)
    }

    /// Sends a signal to the process alone.
    pub fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        kill_process(self.pid, signal).with_context(|| format!("failed to signal {}", self.name))
    }

    /// Waits until the process has ended.
    pub async fn wait(&mut self) -> anyhow::Result<ExitStatus> {
        let waited = tokio::time::timeout(LIMIT, self.child.wait()).await;
        waited
            .with_context(|| format!("{} did not end", self.name))?
            .with_context(|| format!("failed to wait for {}", self.name))
    }

    /// Says whether the process still runs.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Kills the process alone with SIGKILL and waits for its end.
    pub async fn kill(&mut self) -> anyhow::Result<()> {
        self.child.kill().await.with_context(|| format!("failed to kill {}", self.name))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Once it was waited for, its number may be somebody else's.
        if self.is_running() {
            // It may end at this very moment, and then all is well.
            let _ = kill_process_group(self.pid, Signal::KILL);
            // It must not write any more when its files are removed. It stays to be reaped by
            // its handle.
            let options = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
            let _ = waitid(WaitId::Pid(self.pid), options);
        }
    }
}

/// Kills what runs on behalf of a directory in sessions of its own, and returns when it is gone:
/// supervisors outlive their agent on purpose, so they are in nobody's process group.
pub(crate) fn sweep(directory: &Path) {
    let start = Instant::now();
    while start.elapsed() < SWEEP_LIMIT {
        let all = processes();
        let sessions: Vec<i32> =
            all.iter().filter(|found| found.is_of(directory)).map(|found| found.session).collect();
        let doomed: Vec<&Found> = all
            .iter()
            .filter(|found| found.terminal == 0)
            .filter(|found| found.is_of(directory) || sessions.contains(&found.session))
            .filter(|found| found.session != own_session(&all))
            .collect();
        if doomed.is_empty() {
            return;
        }
        for found in doomed {
            if let Some(pid) = Pid::from_raw(found.pid) {
                let _ = kill_process(pid, Signal::KILL);
            }
        }
        std::thread::park_timeout(Duration::from_millis(2));
    }
}

/// A process of this host.
struct Found {
    pid: i32,
    session: i32,
    /// 0 for none: what a person started in a terminal is not ours to kill.
    terminal: i32,
    command: Vec<u8>,
    directory: Option<PathBuf>,
}

impl Found {
    fn is_of(&self, directory: &Path) -> bool {
        let needle = directory.as_os_str().as_encoded_bytes();
        let supervises = self.command.windows(9).any(|piece| piece == b"supervise")
            && self.command.windows(needle.len()).any(|piece| piece == needle);
        supervises || self.directory.as_ref().is_some_and(|its| its.starts_with(directory))
    }
}

fn own_session(all: &[Found]) -> i32 {
    let own = i32::try_from(std::process::id()).unwrap_or_default();
    all.iter().find(|found| found.pid == own).map_or(0, |found| found.session)
}

fn processes() -> Vec<Found> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    entries
        .filter_map(|entry| {
            let path = entry.ok()?.path();
            let pid = path.file_name()?.to_str()?.parse().ok()?;
            let stat = fs::read_to_string(path.join("stat")).ok()?;
            // The name may hold blanks and brackets; what follows it does not.
            let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
            // A zombie does nothing any more.
            fields.next().filter(|state| *state != "Z")?;
            let mut fields = fields.skip(2);
            let (session, terminal) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
            let command = fs::read(path.join("cmdline")).unwrap_or_default();
            Some(Found {
                pid,
                session,
                terminal,
                command,
                directory: fs::read_link(path.join("cwd")).ok(),
            })
        })
        .collect()
}

fn read(path: &Path) -> String {
    String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned()
}
