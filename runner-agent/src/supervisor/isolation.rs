//! What keeps jobs apart on this host: tried out, not concluded from versions.
//!
//! A process is started just as terraform would be, and tries what a hostile configuration
//! would. What it gets is missing; what it does not get holds.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::process::parent_id;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use rustix::process::{Pid, Resource, getrlimit, getuid, test_kill_process};
use serde::{Deserialize, Serialize};
use tokio::process::Command;

use super::confine::{Cage, Confinement, Parts};
use crate::Program;
use crate::job_directory::{create_private, private_directory};
use crate::random;

const PATIENCE: Duration = Duration::from_secs(20);

/// Stands before what the process found out: a program that embeds ours may print more.
const MARK: &str = "latchkey-probe ";

/// Short phrases, for people.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Facts {
    pub(crate) holds: Vec<String>,
    pub(crate) missing: Vec<String>,
}

/// What the process found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Found {
    works: bool,
    no_new_privileges: bool,
    no_core_dumps: bool,
    limits: bool,
    hides_files: bool,
    hides_memory: bool,
    keeps_signals: bool,
    is_root: bool,
}

#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("prepare")]
    Prepare(#[source] io::Error),
    #[error("start a process")]
    Start(#[source] io::Error),
    #[error("hear of the process in time")]
    Silent,
    #[error("understand the process")]
    Answer,
}

/// Tries out what holds for the jobs of a runner with this directory. Takes some milliseconds.
pub(crate) async fn probe(program: &Program, work_dir: &Path, confinement: &Confinement) -> Facts {
    let place = work_dir.join(format!("probe-{}", &random::token()[..12]));
    let found = try_out(program, work_dir, &place, confinement).await;
    if let Err(error) = fs::remove_dir_all(&place) {
        tracing::debug!(%error, "failed to remove the place of a probe");
    }
    match found {
        Ok(found) => found.facts(),
        Err(error) => {
            let error = &error as &dyn std::error::Error;
            tracing::warn!(error, "failed to find out what keeps jobs apart on this host");
            let missing = "what keeps jobs apart could not be tried out".to_owned();
            Facts { holds: Vec::new(), missing: vec![missing] }
        }
    }
}

async fn try_out(
    program: &Program,
    work_dir: &Path,
    place: &Path,
    confinement: &Confinement,
) -> Result<Found, Error> {
    let make = || {
        private_directory(&place.join("own")).map_err(io::Error::other)?;
        private_directory(&place.join("other")).map_err(io::Error::other)?;
        create_private(&place.join("other/secret"))?.write_all(b"secret")
    };
    make().map_err(Error::Prepare)?;
    let parts = Parts {
        own: vec![place.join("own")],
        written: Vec::new(),
        read: vec![program.exe.clone()],
    };
    let cage = Cage::new(confinement, work_dir, &parts).map_err(Error::Prepare)?;
    let mut command = Command::new(&program.exe);
    command.args(&program.prefix).arg("probe").arg(place).env_clear();
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).kill_on_drop(true);
    let mut child = cage.start(&mut command).map_err(Error::Start)?;
    // It begins when its limits are set.
    drop(child.stdin.take());
    let output = tokio::time::timeout(PATIENCE, child.wait_with_output())
        .await
        .map_err(|_| Error::Silent)?
        .map_err(Error::Start)?;
    let output = String::from_utf8_lossy(&output.stdout);
    tracing::debug!(%output, "a probe has answered");
    let answer = output.lines().find_map(|line| line.split_once(MARK));
    answer.and_then(|(_, answer)| serde_json::from_str(answer).ok()).ok_or(Error::Answer)
}

/// Runs the program `probe <dir>`: tries what it must not get, and prints what it got.
pub(crate) fn attempt(place: &Path) -> io::Result<()> {
    io::copy(&mut io::stdin(), &mut io::sink())?;
    let denied = |path: &str| match File::open(path).and_then(|mut file| file.read(&mut [0; 1])) {
        Ok(_) => false,
        Err(error) => error.kind() == io::ErrorKind::PermissionDenied,
    };
    let parent = parent_id();
    let signals = i32::try_from(parent).ok().and_then(Pid::from_raw).map(test_kill_process);
    let limited = |resource| getrlimit(resource).current.is_some();
    let found = Found {
        works: fs::write(place.join("own/file"), "x").is_ok(),
        no_new_privileges: rustix::thread::no_new_privs().unwrap_or(false),
        no_core_dumps: getrlimit(Resource::Core).maximum == Some(0),
        limits: limited(Resource::Nofile) && limited(Resource::Nproc),
        hides_files: denied(&place.join("other/secret").to_string_lossy())
            && fs::read_dir(place.join("other")).is_err(),
        hides_memory: denied(&format!("/proc/{parent}/mem"))
            && fs::read_link(format!("/proc/{parent}/cwd")).is_err(),
        keeps_signals: signals.is_some_and(|signal| signal.is_err()),
        is_root: getuid().is_root(),
    };
    let answer = serde_json::to_string(&found).map_err(io::Error::other)?;
    let mut stdout = io::stdout();
    writeln!(stdout, "{MARK}{answer}")?;
    stdout.flush()
}

impl Found {
    fn facts(self) -> Facts {
        let mut facts = Facts::default();
        let always = ["environment allow-list", "private directories"].map(str::to_owned);
        facts.holds.extend(always);
        for (holds, yes, no) in [
            (self.works, "", "a job's own directory cannot be written"),
            (self.no_new_privileges, "no new privileges", "jobs may gain privileges"),
            (self.no_core_dumps, "no core dumps", "jobs may dump core"),
            (self.limits, "resource limits", "jobs have no resource limits"),
            (
                self.hides_files,
                "other jobs and the runner's key are hidden",
                "jobs can read other jobs' files and the runner's key",
            ),
            (
                self.hides_memory,
                "the runner's memory is out of reach",
                "jobs can read the runner's memory",
            ),
            (self.keeps_signals, "signals stay inside a job", "jobs can signal the runner"),
            (!self.is_root, "jobs are not root", "jobs run as root"),
        ] {
            if holds && !yes.is_empty() {
                facts.holds.push(yes.to_owned());
            } else if !holds {
                facts.missing.push(no.to_owned());
            }
        }
        facts
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::program;
    use super::*;

    #[tokio::test]
    async fn a_probe_finds_what_this_host_keeps_apart_and_leaves_nothing() {
        let base = tempfile::tempdir().unwrap();
        fs::write(base.path().join("key"), "canary").unwrap();
        let facts = probe(&program(), base.path(), &Confinement::default()).await;
        for holds in ["environment allow-list", "no new privileges", "no core dumps"] {
            assert!(facts.holds.iter().any(|fact| fact == holds), "{facts:?}");
        }
        assert_eq!(fs::read_dir(base.path()).unwrap().count(), 1);
        let root = facts.missing.iter().any(|fact| fact.contains("root"));
        assert_eq!(root, getuid().is_root(), "{facts:?}");
        let hidden = facts.holds.iter().any(|fact| fact.contains("are hidden"));
        let shown = facts.missing.iter().any(|fact| fact.contains("runner's key"));
        assert!(hidden != shown, "{facts:?}");
    }

    #[tokio::test]
    async fn what_cannot_be_tried_out_does_not_hold() {
        let base = tempfile::tempdir().unwrap();
        let program = Program { exe: "/bin/true".into(), prefix: Vec::new() };
        let facts = probe(&program, base.path(), &Confinement::default()).await;
        assert!(facts.holds.is_empty() && facts.missing.len() == 1, "{facts:?}");
    }
}
