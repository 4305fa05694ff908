//! Processes that outlive the command that started them.
//!
//! The supervisor is the reaper of all that its commands start: what leaves terraform's process
//! group or session still becomes the supervisor's child when its parent ends. After each
//! command, every such child is killed, with all that stems from it. They are held first
//! (SIGSTOP), until none is found that is not: what is held starts no others. A successor is
//! nobody's reaper yet: it knows the job's processes by their environment, by what they stem
//! from, and by the sessions those are in.
//!
//! Who forks and ends faster than it is found, or cannot be killed, may still be left. That is
//! said, and never called killed.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::process::{
    Pid, Signal, WaitId, WaitIdOptions, WaitOptions, getpid, kill_process, set_child_subreaper,
    waitid, waitpid,
};
use serde_json::Value;

use super::log::Log;
use crate::job_directory::JobDirectory;

/// How long to chase what starts new processes as fast as they are killed.
const PATIENCE: Duration = Duration::from_secs(5);

/// How often to look for others before those that are held are killed.
const MOST_LOOKS: usize = 100;

/// Makes the orphans below this process its children.
pub(super) fn adopt() -> rustix::io::Result<()> {
    set_child_subreaper(Some(getpid()))
}

/// The names of what was found.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Ended {
    killed: Vec<String>,
    /// They were sent SIGKILL and are still there.
    left: Vec<String>,
}

impl Ended {
    pub(crate) fn is_empty(&self) -> bool {
        self.killed.is_empty() && self.left.is_empty()
    }

    /// Says in the log what a command has left behind.
    pub(super) fn tell(&self, what: &str, log: &Log) {
        let level = if self.left.is_empty() { "warn" } else { "error" };
        log.own("diagnostic", level, &self.sentence(what), Value::Null);
    }

    fn sentence(&self, what: &str) -> String {
        let mut text = format!("{what} left ");
        if self.left.is_empty() || !self.killed.is_empty() {
            text += &format!("{} behind: killed ({})", count(&self.killed), some_of(&self.killed));
        }
        if !self.left.is_empty() {
            let and = if self.killed.is_empty() { "" } else { "; and " };
            let (count, names) = (count(&self.left), some_of(&self.left));
            text += &format!("{and}{count} that cannot be killed and may go on ({names})");
        }
        text
    }
}

fn count(names: &[String]) -> String {
    let noun = if names.len() == 1 { "process" } else { "processes" };
    format!("{} {noun}", names.len())
}

/// A few tell enough.
fn some_of(names: &[String]) -> String {
    const SHOWN: usize = 5;
    let shown: Vec<&str> = names.iter().take(SHOWN).map(String::as_str).collect();
    let more = if names.len() > SHOWN { ", ..." } else { "" };
    format!("{}{more}", shown.join(", "))
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

    /// Kills our children that no command stands for, and all that stems from them.
    pub(super) async fn end_others(&self) -> Ended {
        // Nearly always. To look at all processes would take longer than most commands do.
        if has_no_child() {
            return Ended::default();
        }
        let own = getpid().as_raw_pid();
        let is_other = |process: &Process| process.parent == own && !self.contains(process.pid);
        let mut hunt = Hunt::default();
        let limit = Instant::now() + PATIENCE;
        loop {
            self.hold_children();
            let found_more = hunt.kill(|all| stemming(all, is_other));
            for process in processes().filter(is_other) {
                if let (true, Some(pid)) = (process.is_dead, Pid::from_raw(process.pid)) {
                    let _ = waitpid(Some(pid), WaitOptions::NOHANG);
                }
            }
            if hunt.alive.is_empty() || Instant::now() > limit {
                return hunt.over();
            }
            if found_more {
                tokio::task::yield_now().await;
            } else {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        }
    }

    /// Holds our own children without a look at all processes: that would take longer than one
    /// needs that only starts another and ends.
    fn hold_children(&self) {
        let mut held = BTreeSet::new();
        for _ in 0..MOST_LOOKS {
            let mut new = false;
            for pid in children().filter(|pid| !self.contains(*pid)) {
                new |= held.insert(pid);
                signal(pid, Signal::STOP);
            }
            if !new {
                return;
            }
        }
    }
}

#[expect(clippy::disallowed_methods, reason = "the end of another's child is told to nobody else")]
pub(super) fn pause(time: Duration) {
    std::thread::sleep(time);
}

/// Kills the processes that a job left behind whose supervisor is dead.
pub(crate) fn end_all_of(directory: &JobDirectory) -> Ended {
    let home = directory.join("home");
    let mut hunt = Hunt::default();
    let limit = Instant::now() + PATIENCE;
    loop {
        hunt.kill(|all| of_the_job(all, getpid().as_raw_pid(), |pid| has_home(pid, &home)));
        if hunt.alive.is_empty() || Instant::now() > limit {
            return hunt.over();
        }
        pause(Duration::from_millis(1));
    }
}

/// Finds what the dead supervisor of a job has started itself, and what still runs: terraform,
/// whatever it is called, or a hook. They lead a group in the supervisor's own session, and
/// nothing of the job is their parent.
pub(super) fn commands_of(directory: &JobDirectory) -> Vec<i32> {
    let home = directory.join("home");
    processes()
        .filter(|p| !p.is_dead && p.group == p.pid && p.session != p.pid)
        .filter(|p| has_home(p.pid, &home) && !has_home(p.parent, &home))
        .map(|p| p.pid)
        .collect()
}

/// What was found so far, by number and start.
#[derive(Default)]
struct Hunt {
    found: BTreeMap<(i32, u64), String>,
    /// Of those, who was there at the last look.
    alive: BTreeSet<(i32, u64)>,
}

impl Hunt {
    /// Kills what is wanted once nothing new is found. Answers whether something new was.
    fn kill(&mut self, wanted: impl Fn(&[Process]) -> BTreeSet<i32>) -> bool {
        let known = self.found.len();
        for _ in 0..MOST_LOOKS {
            let all: Vec<Process> = processes().collect();
            let wanted = wanted(&all);
            let before = self.found.len();
            self.alive.clear();
            for process in all {
                if !process.is_dead && wanted.contains(&process.pid) {
                    signal(process.pid, Signal::STOP);
                    let key = (process.pid, process.start_time);
                    self.found.insert(key, process.name);
                    self.alive.insert(key);
                }
            }
            if self.found.len() == before {
                break;
            }
        }
        self.alive.iter().for_each(|(pid, _)| signal(*pid, Signal::KILL));
        self.found.len() > known
    }

    fn over(self) -> Ended {
        let mut ended = Ended::default();
        for (key, name) in self.found {
            let list = if self.alive.contains(&key) { &mut ended.left } else { &mut ended.killed };
            list.push(name);
        }
        if !ended.left.is_empty() {
            tracing::error!(?ended, "failed to end what a command has left behind");
        }
        ended
    }
}

fn signal(pid: i32, signal: Signal) {
    if let Some(pid) = Pid::from_raw(pid) {
        let _ = kill_process(pid, signal);
    }
}

/// Answers the roots and what stems from them.
fn stemming(all: &[Process], is_root: impl Fn(&Process) -> bool) -> BTreeSet<i32> {
    let mut found: BTreeSet<i32> = all.iter().filter(|p| is_root(p)).map(|p| p.pid).collect();
    loop {
        let before = found.len();
        for process in all {
            if found.contains(&process.parent) {
                found.insert(process.pid);
            }
        }
        if found.len() == before {
            return found;
        }
    }
}

/// A session of number 0 is led from outside our PID namespace (`proc(5)`): all who were started
/// into a container in the same way are in it, we too perhaps, and it tells nothing about a job.
fn of_the_job(all: &[Process], own: i32, is_known: impl Fn(i32) -> bool) -> BTreeSet<i32> {
    let own_session = all.iter().find(|p| p.pid == own).map_or(0, |p| p.session);
    let known: BTreeSet<i32> =
        all.iter().map(|p| p.pid).filter(|pid| *pid != own && is_known(*pid)).collect();
    // The dead supervisor's, or one that the job has made.
    let sessions: BTreeSet<i32> = all
        .iter()
        .filter(|p| known.contains(&p.pid) && ![0, own_session].contains(&p.session))
        .map(|p| p.session)
        .collect();
    let mut found = stemming(all, |p| known.contains(&p.pid) || sessions.contains(&p.session));
    found.remove(&own);
    found
}

/// Of one epoch of one job: users cannot set it.
fn has_home(pid: i32, home: &Path) -> bool {
    let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
    let home = [b"HOME=", home.as_os_str().as_encoded_bytes()].concat();
    environment.split(|byte| *byte == 0).any(|variable| variable == home)
}

struct Process {
    pid: i32,
    parent: i32,
    group: i32,
    session: i32,
    /// In the kernel's ticks since boot.
    start_time: u64,
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
        let fields: Vec<&str> = stat.get(close + 2..)?.split(' ').collect();
        let number = |at: usize| fields.get(at)?.parse::<i32>().ok();
        Some(Process {
            pid,
            parent: number(1)?,
            group: number(2)?,
            session: number(3)?,
            start_time: fields.get(19)?.parse().ok()?,
            name: stat.get(open + 1..close)?.chars().filter(|c| !c.is_control()).collect(),
            is_dead: matches!(*fields.first()?, "Z" | "X"),
        })
    })
}

/// Tells whether this process has no child at all, dead ones included. The kernel counts them:
/// unlike its lists, this misses none (`wait(2)`, ECHILD).
fn has_no_child() -> bool {
    let look = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
    matches!(waitid(WaitId::All, look), Err(rustix::io::Errno::CHILD))
}

/// Answers our own children; none on a kernel that does not list them.
fn children() -> impl Iterator<Item = i32> {
    let threads = fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    threads.flat_map(|thread| {
        let children = fs::read_to_string(thread.path().join("children")).unwrap_or_default();
        children.split_ascii_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<_>>()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn who_is_still_there_is_never_called_killed() {
        let killed = Ended { killed: names(&["sh", "sleep"]), left: Vec::new() };
        assert_eq!(killed.sentence("a hook"), "a hook left 2 processes behind: killed (sh, sleep)");
        let left = Ended { killed: Vec::new(), left: names(&["nfs"]) };
        let text = left.sentence("a hook");
        assert_eq!(text, "a hook left 1 process that cannot be killed and may go on (nfs)");
        let both = Ended { killed: names(&["sh"]), left: names(&["nfs"]) };
        let text = "a hook left 1 process behind: killed (sh); and 1 process that cannot be \
                    killed and may go on (nfs)";
        assert_eq!(both.sentence("a hook"), text);
    }

    fn process(pid: i32, parent: i32, session: i32) -> Process {
        let name = String::new();
        Process { pid, parent, group: pid, session, start_time: 0, name, is_dead: false }
    }

    #[test]
    fn what_stems_from_a_root_is_found_at_any_depth() {
        let all = [(4, 3), (3, 2), (2, 1), (9, 1), (1, 0)].map(|(pid, up)| process(pid, up, 1));
        assert_eq!(stemming(&all, |p| p.pid == 2), BTreeSet::from([2, 3, 4]));
    }

    #[test]
    fn what_shares_a_session_with_the_job_is_its_own() {
        let all = [process(5, 1, 5), process(20, 1, 20), process(21, 1, 20), process(22, 21, 22)];
        assert_eq!(of_the_job(&all, 5, |pid| pid == 20), BTreeSet::from([20, 21, 22]));
        let in_ours = [process(5, 1, 5), process(20, 1, 5), process(21, 1, 5)];
        assert_eq!(of_the_job(&in_ours, 5, |pid| pid == 20), BTreeSet::from([20]));
    }

    /// As in a container, or in a build's sandbox: what is started into it has session 0.
    #[test]
    fn a_session_from_outside_the_namespace_makes_nobody_the_jobs() {
        let all = [process(5, 1, 0), process(6, 1, 0), process(20, 1, 20), process(21, 1, 0)];
        assert_eq!(of_the_job(&all, 5, |pid| pid == 20), BTreeSet::from([20]));
        assert_eq!(of_the_job(&all, 5, |pid| [20, 21].contains(&pid)), BTreeSet::from([20, 21]));
        let ours_is_named = [process(5, 1, 5), process(6, 1, 0), process(21, 1, 0)];
        assert_eq!(of_the_job(&ours_is_named, 5, |pid| pid == 21), BTreeSet::from([21]));
    }
}
