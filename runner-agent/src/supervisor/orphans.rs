//! Processes that outlive the command that started them.
//!
//! The supervisor is the reaper of all that its commands start: what leaves terraform's process
//! group or session still becomes the supervisor's child when its parent ends. After each
//! command, every such child is killed, and so are the children it leaves in turn. A successor
//! is nobody's reaper yet: it knows the job's processes by their environment.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::process::{
    Pid, Signal, WaitOptions, getpid, kill_process, set_child_subreaper, waitpid,
};
use tokio::time::Instant;

use crate::job_directory::JobDirectory;

/// How long to chase what starts new processes as fast as they are killed.
const PATIENCE: Duration = Duration::from_secs(5);

/// Makes the orphans below this process its children.
pub(super) fn adopt() -> rustix::io::Result<()> {
    set_child_subreaper(Some(getpid()))
}

/// The commands that are meant to run. Shared by all that start some.
#[derive(Debug, Clone, Default)]
pub(super) struct Running(Arc<Mutex<BTreeSet<i32>>>);

impl Running {
    pub(super) fn begins(&self, pid: i32) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(pid);
    }

    pub(super) fn ends(&self, pid: i32) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&pid);
    }

    fn contains(&self, pid: i32) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).contains(&pid)
    }

    /// Kills our children that no command stands for. Answers their names.
    pub(super) async fn end_others(&self) -> Vec<String> {
        let mut names = Vec::new();
        let mut killed = BTreeSet::new();
        let limit = Instant::now() + PATIENCE;
        loop {
            let own = getpid().as_raw_pid();
            let found = processes().filter(|p| p.parent == own && !self.contains(p.pid));
            let mut left = false;
            for process in found {
                let Some(pid) = Pid::from_raw(process.pid) else { continue };
                if !process.is_dead {
                    left = true;
                    if killed.insert(process.pid) {
                        names.push(process.name);
                    }
                    let _ = kill_process(pid, Signal::KILL);
                }
                let _ = waitpid(Some(pid), WaitOptions::NOHANG);
            }
            if !left {
                return names;
            }
            if Instant::now() > limit {
                tracing::error!(?names, "failed to end what a command has left behind");
                return names;
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
}

/// Kills the processes that a job left behind whose supervisor is dead. Answers their names.
pub(crate) fn end_all_of(directory: &JobDirectory) -> Vec<String> {
    let home = directory.join("home");
    let mut names = Vec::new();
    let mut killed = BTreeSet::new();
    // They may start others meanwhile.
    for _ in 0..20 {
        let own = getpid().as_raw_pid();
        let found = processes().filter(|p| p.pid != own && !p.is_dead && has_home(p.pid, &home));
        let before = killed.len();
        for process in found {
            if let Some(pid) = Pid::from_raw(process.pid) {
                if killed.insert(process.pid) {
                    names.push(process.name);
                }
                let _ = kill_process(pid, Signal::KILL);
            }
        }
        if killed.len() == before {
            break;
        }
    }
    names
}

/// Of one epoch of one job: users cannot set it.
fn has_home(pid: i32, home: &Path) -> bool {
    let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
    let home = [b"HOME=", home.as_os_str().as_encoded_bytes()].concat();
    environment.split(|byte| *byte == 0).any(|variable| variable == home)
}

/// Says that something was killed; a few names tell enough.
pub(super) fn sentence(what: &str, names: &[String]) -> String {
    const SHOWN: usize = 5;
    let shown: Vec<&str> = names.iter().take(SHOWN).map(String::as_str).collect();
    let more = if names.len() > SHOWN { ", ..." } else { "" };
    let noun = if names.len() == 1 { "process" } else { "processes" };
    format!("{what} left {} {noun} behind: killed ({}{more})", names.len(), shown.join(", "))
}

struct Process {
    pid: i32,
    parent: i32,
    name: String,
    is_dead: bool,
}

fn processes() -> impl Iterator<Item = Process> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    pids.filter_map(|pid| {
        let stat = fs::read(format!("/proc/{pid}/stat")).ok()?;
        let stat = String::from_utf8_lossy(&stat);
        // The name, in parentheses, may hold anything.
        let (open, close) = (stat.find('(')?, stat.rfind(')')?);
        let mut fields = stat.get(close + 2..)?.split(' ');
        let is_dead = matches!(fields.next()?, "Z" | "X");
        let parent = fields.next()?.parse().ok()?;
        let name = stat.get(open + 1..close)?.chars().filter(|c| !c.is_control()).collect();
        Some(Process { pid, parent, name, is_dead })
    })
}
