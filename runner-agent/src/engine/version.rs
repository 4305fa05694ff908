//! Asks a program for its version. It may be anything: so it is confined as what a job runs, and
//! has only so much time.

use std::env;
use std::fs::File;
use std::io::{Read, Seek};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};
use serde::Deserialize;

use super::Error;
use crate::supervisor::confine::{Cage, Confinement, Isolation, Parts};

/// A wrapper may have to download the engine first.
const PATIENCE: Duration = Duration::from_secs(60);

/// How often it is looked whether anybody still waits.
const GLANCE: Duration = Duration::from_millis(50);

const LONGEST_ANSWER: u64 = 1 << 20;

#[derive(Deserialize)]
struct Answer {
    terraform_version: String,
}

/// By which it is told that nobody waits for an answer any more.
#[derive(Debug, Clone, Default)]
pub(crate) struct GiveUp(Arc<AtomicBool>);

impl GiveUp {
    /// Ends what is being asked, and what would be.
    pub(crate) fn now(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    fn is_told(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

pub(super) fn of(
    path: &Path,
    confinement: &Confinement,
    give_up: &GiveUp,
) -> Result<String, Error> {
    within(PATIENCE, path, confinement, give_up)
}

#[expect(clippy::disallowed_methods, reason = "nothing tells when another lets go of the file")]
fn within(
    patience: Duration,
    path: &Path,
    confinement: &Confinement,
    give_up: &GiveUp,
) -> Result<String, Error> {
    const TRIES: u32 = 20;
    let failed = |source| Error::Start { path: path.to_owned(), source };
    let cage = cage(path, confinement).map_err(failed)?;
    // No pipe: what the program leaves behind could hold it open.
    let answer = memfd_create("version", MemfdFlags::CLOEXEC);
    let mut answer = File::from(answer.map_err(|errno| failed(errno.into()))?);
    let mut tries = 0;
    let mut child = loop {
        let mut command = Command::new(path);
        command
            .args(["version", "-json"])
            .env_clear()
            .envs([("CHECKPOINT_DISABLE", "1"), ("HOME", "/nonexistent")])
            .env("PATH", env::var_os("PATH").unwrap_or_default())
            .stdin(Stdio::null())
            .stdout(answer.try_clone().map_err(failed)?)
            .stderr(Stdio::null())
            .process_group(0);
        tries += 1;
        match cage.inside(|| command.spawn()) {
            // A process that another thread just started may still hold the file that we wrote.
            Err(error) if Errno::from_io_error(&error) == Some(Errno::TXTBSY) && tries < TRIES => {
                thread::sleep(Duration::from_millis(20));
            }
            Err(source) => return Err(failed(source)),
            Ok(child) => break child,
        }
    };
    let pid = Pid::from_child(&child);
    let ended = ends_within(patience, pid, give_up);
    // Its number is its own until it is waited for.
    let _ = kill_process_group(pid, Signal::KILL);
    child.wait().map_err(failed)?;
    if !ended {
        return Err(Error::Silent { path: path.to_owned() });
    }
    let mut text = Vec::new();
    answer.rewind().map_err(failed)?;
    answer.take(LONGEST_ANSWER).read_to_end(&mut text).map_err(failed)?;
    let answer: Answer =
        serde_json::from_slice(&text).map_err(|_| Error::Version { path: path.to_owned() })?;
    Ok(answer.terraform_version)
}

fn cage(path: &Path, confinement: &Confinement) -> std::io::Result<Cage> {
    let mut read = vec![path.to_owned()];
    read.extend(confinement.readable.iter().cloned());
    let parts = Parts { read, ..Parts::default() };
    // Where something is missing, the agent says so, and takes no jobs if that is wanted.
    let confinement = Confinement { isolation: Isolation::BestEffort, ..confinement.clone() };
    let hidden = confinement.hidden.as_deref().unwrap_or(Path::new("/nonexistent"));
    Cage::new(&confinement, hidden, &parts)
}

fn ends_within(patience: Duration, process: Pid, give_up: &GiveUp) -> bool {
    let Ok(handle) = pidfd_open(process, PidfdFlags::empty()) else { return false };
    let begun = Instant::now();
    let mut wait = [PollFd::new(&handle, PollFlags::IN)];
    loop {
        let left = patience.saturating_sub(begun.elapsed());
        let glance = Timespec::try_from(left.min(GLANCE)).ok();
        match poll(&mut wait, glance.as_ref()) {
            Ok(events) if events > 0 => return true,
            Ok(_) if left.is_zero() || give_up.is_told() => return false,
            Ok(_) | Err(Errno::INTR) => {}
            Err(_) => return false,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn program(text: &str) -> (tempfile::TempDir, std::path::PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("terraform");
        fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        (directory, path)
    }

    #[test]
    fn a_program_that_does_not_answer_is_ended_with_what_it_started() {
        let (directory, path) = program("echo $$ > \"${0%/*}/own/pid\"; sleep 600 & sleep 600");
        fs::create_dir(directory.path().join("own")).unwrap();
        let found =
            within(Duration::from_secs(1), &path, &Confinement::default(), &GiveUp::default());
        assert!(matches!(found, Err(Error::Silent { .. })), "{found:?}");
        let pid = fs::read_to_string(directory.path().join("own/pid")).unwrap();
        let group = Pid::from_raw(pid.trim().parse().unwrap()).unwrap();
        // Only zombies may be left of it, until their new parent looks.
        let lives = || {
            fs::read_dir("/proc").unwrap().flatten().any(|entry| {
                let stat = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
                let Some(end) = stat.rfind(')') else { return false };
                let fields: Vec<_> = stat[end + 2..].split(' ').collect();
                let is_dead = ["Z", "X"].contains(&fields[0]);
                fields[2] == group.as_raw_nonzero().to_string() && !is_dead
            })
        };
        // The one that was not waited for dies when the system comes to it.
        let begun = std::time::Instant::now();
        while lives() {
            assert!(begun.elapsed() < Duration::from_secs(30), "it is not ended");
            std::thread::yield_now();
        }
    }

    #[test]
    fn a_program_that_leaves_its_output_open_is_not_waited_for() {
        let answer = r#"echo '{"terraform_version":"1.2.3"}'; setsid sleep 5 &"#;
        let (_directory, path) = program(answer);
        let begun = std::time::Instant::now();
        assert_eq!(of(&path, &Confinement::default(), &GiveUp::default()).unwrap(), "1.2.3");
        assert!(begun.elapsed() < Duration::from_secs(5));
    }

    /// It runs before any job, and may come from a mirror.
    #[test]
    fn a_program_that_is_asked_sees_nothing_of_the_runner() {
        let work_dir = tempfile::tempdir().unwrap();
        fs::write(work_dir.path().join("key"), "9.9.9").unwrap();
        let text = format!(
            "echo \"{{\\\"terraform_version\\\":\\\"$(cat {}/key || echo 1.0.0)\\\"}}\"",
            work_dir.path().display()
        );
        let (_directory, path) = program(&text);
        let hidden = Some(work_dir.path().to_owned());
        let confinement = Confinement { hidden, ..Confinement::default() };
        let expect = if landlock_holds() { "1.0.0" } else { "9.9.9" };
        assert_eq!(of(&path, &confinement, &GiveUp::default()).unwrap(), expect);
    }

    fn landlock_holds() -> bool {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("x"), "").unwrap();
        let cage = Cage::new(&Confinement::default(), directory.path(), &Parts::default()).unwrap();
        cage.inside(|| File::open(directory.path().join("x"))).is_err()
    }
}
