//! What keeps jobs apart on this host: tried out, not concluded from versions.
//!
//! A process is started just as terraform would be, and tries what a hostile configuration
//! would. What it gets is missing; what it does not get holds.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::parent_id;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use rustix::fs::OFlags;
use rustix::process::{Pid, Resource, getrlimit, getuid, test_kill_process};
use serde::{Deserialize, Serialize};
use tokio::process::Command;

use super::confine::{Cage, Confinement, Parts, places};
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
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Found {
    works: bool,
    no_new_privileges: bool,
    no_core_dumps: bool,
    limits: bool,
    hides_files: bool,
    hides_memory: bool,
    keeps_signals: bool,
    is_root: bool,
    /// What jobs share, as far as it could be written or replaced.
    writes: Vec<PathBuf>,
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
    let place = Place(work_dir.join(format!("probe-{}", &random::token()[..12])));
    match try_out(program, work_dir, &place.0, confinement).await {
        Ok(found) => found.facts(),
        Err(error) => {
            let error = &error as &dyn std::error::Error;
            tracing::warn!(error, "failed to find out what keeps jobs apart on this host");
            let missing = "what keeps jobs apart could not be tried out".to_owned();
            Facts { holds: Vec::new(), missing: vec![missing] }
        }
    }
}

/// Removed with the probe, or when that is abandoned.
struct Place(PathBuf);

impl Drop for Place {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            tracing::debug!(%error, "failed to remove the place of a probe");
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
        create_private(&place.join("other/secret"))?.write_all(b"secret")?;
        private_directory(&place.join("shared")).map_err(io::Error::other)?;
        create_private(&place.join("shared/file"))?.write_all(b"shared")?;
        let shared = serde_json::to_vec(&confinement.readable).map_err(io::Error::other)?;
        create_private(&place.join("own/shared"))?.write_all(&shared)
    };
    make().map_err(Error::Prepare)?;
    let mut read = vec![program.exe.clone(), place.join("shared")];
    read.extend(confinement.readable.iter().cloned());
    let parts = Parts { own: vec![place.join("own")], written: Vec::new(), read };
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
    let shared = fs::read(place.join("own/shared"))?;
    let mut writes: Vec<PathBuf> = serde_json::from_slice(&shared)?;
    writes.push(place.join("shared"));
    writes.retain(|path| is_written(path));
    if is_emptied(&place.join("shared/file")) {
        writes.push("the content of files".into());
    }
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
        writes,
    };
    let answer = serde_json::to_string(&found).map_err(io::Error::other)?;
    let mut stdout = io::stdout();
    writeln!(stdout, "{MARK}{answer}")?;
    stdout.flush()
}

/// Tries to write something, or to put something else in its place, and leaves it as it was.
fn is_written(path: &Path) -> bool {
    let Ok(places) = places(path) else { return true };
    let name = format!(".latchkey-probe-{}", &random::token()[..12]);
    let is_made = |directory: &Path| {
        let file = directory.join(&name);
        let made = OpenOptions::new().write(true).create_new(true).open(&file).is_ok();
        if made && let Err(error) = fs::remove_file(&file) {
            tracing::warn!(%error, file = %file.display(), "failed to remove what a probe made");
        }
        made
    };
    places.iter().any(|place| {
        let written = match fs::symlink_metadata(place) {
            Ok(metadata) if metadata.is_dir() => is_made(place),
            Ok(metadata) if metadata.is_file() => {
                match OpenOptions::new().append(true).open(place) {
                    Ok(_) => true,
                    // A program that runs; it will not for ever.
                    Err(error) => error.kind() == io::ErrorKind::ExecutableFileBusy,
                }
            }
            Ok(_) | Err(_) => false,
        };
        written || place.ancestors().skip(1).any(is_made)
    })
}

/// Tries to empty a file that can be read, which older kernels do not keep from jobs.
fn is_emptied(file: &Path) -> bool {
    let flags = i32::try_from(OFlags::TRUNC.bits()).unwrap_or_default();
    OpenOptions::new().read(true).custom_flags(flags).open(file).is_ok()
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
        if self.writes.is_empty() {
            facts.holds.push("what jobs share can only be read".to_owned());
        }
        facts.missing.extend(
            self.writes.iter().map(|path| format!("jobs can write or replace {}", path.display())),
        );
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

    /// What the configuration puts elsewhere, where the runner's user owns all.
    #[tokio::test]
    async fn what_jobs_share_is_tried_out_wherever_it_lies() {
        let base = tempfile::tempdir().unwrap();
        let elsewhere = tempfile::tempdir().unwrap();
        for name in ["work", "cache"] {
            fs::create_dir(base.path().join(name)).unwrap();
        }
        fs::write(elsewhere.path().join("terraform"), "engine").unwrap();
        let readable = vec![base.path().join("cache"), elsewhere.path().join("terraform")];
        let confinement = Confinement { readable, ..Confinement::default() };
        let facts = probe(&program(), &base.path().join("work"), &confinement).await;
        let hidden = facts.holds.iter().any(|fact| fact.contains("are hidden"));
        let shared = facts.holds.iter().any(|fact| fact.contains("only be read"));
        let names =
            |path: &Path| facts.missing.iter().any(|m| m.contains(&*path.to_string_lossy()));
        assert_eq!(hidden, shared, "{facts:?}");
        assert!(hidden || confinement.readable.iter().all(|path| names(path)), "{facts:?}");
        assert_eq!(fs::read_dir(base.path().join("cache")).unwrap().count(), 0);
        assert_eq!(fs::read(elsewhere.path().join("terraform")).unwrap(), b"engine");
    }

    #[test]
    fn without_confinement_a_probe_would_say_so() {
        let base = tempfile::tempdir().unwrap();
        fs::write(base.path().join("file"), "x").unwrap();
        assert!(is_written(base.path()) && is_written(&base.path().join("file")));
        assert!(is_emptied(&base.path().join("file")));
        assert_eq!(fs::read_dir(base.path()).unwrap().count(), 1);
    }

    #[tokio::test]
    async fn what_cannot_be_tried_out_does_not_hold() {
        let base = tempfile::tempdir().unwrap();
        let program = Program { exe: "/bin/true".into(), prefix: Vec::new() };
        let facts = probe(&program, base.path(), &Confinement::default()).await;
        assert!(facts.holds.is_empty() && facts.missing.len() == 1, "{facts:?}");
    }
}
