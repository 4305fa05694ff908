//! The state that terraform could not deliver and saved in its working directory.
//!
//! It may be the only copy. So it is renamed out of the reach of the job's programs, which needs
//! no room and has no limit, and a disk that fails is tried again. What cannot be read then, or
//! is no state, stays in the job directory as `untaken`: the job is set aside with it. Where not
//! even that works, because the job has changed the way there, all of `work` becomes `untaken`.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustix::io::Errno;

use super::Error;
use super::log::Log;
use crate::job::Spec;
use crate::job_directory::{ERRORED_STATE, JobDirectory, UNTAKEN};
use crate::untrusted::{self, Folder};

/// What became of it.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum ErroredState {
    Absent,
    /// It is in the job directory, to be brought.
    Kept,
    /// It is on this host only; with the sentence that says why, and where.
    Untaken(String),
}

/// Takes `errored.tfstate` out of terraform's directory, if there is one, however long the disk
/// fails. Without the directory, it is looked for below `work`.
pub(super) async fn take(
    directory: &JobDirectory,
    spec: &Spec,
    root: Option<Arc<Folder>>,
    log: &Log,
) -> Result<ErroredState, Error> {
    loop {
        let (of, spec, root) = (directory.clone(), spec.clone(), root.clone());
        let attempt = move || attempt(&of, &spec, root.as_deref());
        match tokio::task::spawn_blocking(attempt).await.map_err(Error::Task)? {
            Ok(Ok(found)) => return Ok(found),
            Ok(Err(unusable)) => {
                let kept = directory.kept().join(UNTAKEN);
                let kept = kept.display();
                let reason = format!(
                    "errored.tfstate cannot be taken: {unusable}; it stays on the runner's host, \
                     in {kept}"
                );
                tracing::error!(%kept, error = %unusable, "errored.tfstate cannot be taken");
                log.own("diagnostic", "error", &reason, serde_json::Value::Null);
                return Ok(ErroredState::Untaken(reason));
            }
            Err(error) => {
                tracing::error!(%error, "failed to take errored.tfstate; it is tried again");
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }
    }
}

/// Answers why it stays untaken, or how the disk failed. Safe to repeat.
fn attempt(
    directory: &JobDirectory,
    spec: &Spec,
    root: Option<&Folder>,
) -> io::Result<Result<ErroredState, io::Error>> {
    let (kept, untaken) = (directory.join(ERRORED_STATE), directory.join(UNTAKEN));
    if exists(&kept) {
        return Ok(Ok(ErroredState::Kept));
    }
    let mut unusable = None;
    if !exists(&untaken) {
        let taken = match root {
            Some(root) => root.take(ERRORED_STATE, &untaken),
            None => Folder::open(&directory.join("work"), &spec.working_directory)
                .and_then(|root| root.take(ERRORED_STATE, &untaken)),
        };
        match taken {
            Ok(true) => {}
            Ok(false) => return Ok(Ok(ErroredState::Absent)),
            Err(error) if is_of_the_disk(&error) => return Err(error),
            Err(error) => {
                fs::rename(directory.join("work"), &untaken)?;
                unusable = Some(error);
            }
        }
    }
    let usable = match unusable {
        Some(error) => Err(error),
        None => usable(&untaken),
    };
    if usable.is_ok() {
        fs::rename(&untaken, &kept)?;
    }
    directory.sync().map_err(io::Error::other)?;
    Ok(usable.map(|()| ErroredState::Kept))
}

fn exists(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok()
}

fn is_of_the_disk(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull
            | io::ErrorKind::QuotaExceeded
            | io::ErrorKind::ReadOnlyFilesystem
    ) || error.raw_os_error() == Some(Errno::IO.raw_os_error())
}

/// Reads it whole, once: what it is brought with must not find out that it cannot be read.
fn usable(path: &Path) -> io::Result<()> {
    if fs::symlink_metadata(path)?.is_file() {
        // Then nothing else is known to stand in the way; reading shows it.
        let _ = fs::set_permissions(path, fs::Permissions::from_mode(0o600));
    }
    let mut file = untrusted::open(path)?;
    io::copy(&mut file, &mut io::sink())?;
    file.sync_all()
}

/// Removes one that came with the configuration: it would be taken for this apply's.
pub(super) fn remove_stale(directory: &JobDirectory, root: &Folder) -> io::Result<()> {
    let stale = directory.join("stale");
    if root.take(ERRORED_STATE, &stale)? {
        // Out of the way already: what stays of it goes with the job.
        let _ = match fs::symlink_metadata(&stale) {
            Ok(found) if found.is_dir() => fs::remove_dir_all(&stale),
            Ok(_) | Err(_) => fs::remove_file(&stale),
        };
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use rustix::fs::{CWD, FileType, Mode, mknodat};

    use super::*;
    use crate::job::{Lease, Phase};
    use crate::job_directory::tests as samples;

    struct Case {
        _jobs: tempfile::TempDir,
        directory: JobDirectory,
        spec: Spec,
    }

    impl Case {
        fn new(prepare: impl FnOnce(&Path)) -> Self {
            let jobs = tempfile::tempdir().unwrap();
            let lease: Lease = samples::lease("run1", Phase::Apply);
            let spec = Spec { working_directory: "env".into(), ..samples::spec() };
            let settings = samples::settings();
            let at = jobs.path().join("jobs");
            fs::create_dir(&at).unwrap();
            let directory = JobDirectory::create(&at, &lease, &spec, &settings).unwrap();
            let root = directory.join("work/env");
            fs::create_dir(&root).unwrap();
            prepare(&root);
            Self { _jobs: jobs, directory, spec }
        }

        fn attempt(&self) -> Result<ErroredState, io::Error> {
            let first = attempt(&self.directory, &self.spec, None).unwrap();
            // A successor finds the same.
            let again = attempt(&self.directory, &self.spec, None).unwrap();
            assert_eq!(first.as_ref().ok(), again.as_ref().ok());
            first
        }

        fn untaken(&self) -> fs::Metadata {
            let untaken = fs::symlink_metadata(self.directory.join(UNTAKEN)).unwrap();
            assert!(!self.directory.join(ERRORED_STATE).exists());
            // It outlives all that is left behind.
            let kept = self.directory.set_aside(0).unwrap();
            assert_eq!(kept, self.directory.kept());
            assert!(exists(&kept.join(UNTAKEN)));
            untaken
        }
    }

    #[test]
    fn a_state_is_moved_and_not_copied() {
        let case = Case::new(|root| {
            let path = root.join(ERRORED_STATE);
            fs::write(&path, "{}").unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o000)).unwrap();
        });
        assert_eq!(case.attempt().unwrap(), ErroredState::Kept);
        assert_eq!(fs::read_to_string(case.directory.join(ERRORED_STATE)).unwrap(), "{}");
        assert!(!exists(&case.directory.join("work/env/errored.tfstate")));
        assert!(!exists(&case.directory.join(UNTAKEN)));
        assert_eq!(Case::new(|_| {}).attempt().unwrap(), ErroredState::Absent);
    }

    #[test]
    fn a_state_that_is_too_large_is_never_lost() {
        let case = Case::new(|root| {
            let file = fs::File::create(root.join(ERRORED_STATE)).unwrap();
            file.set_len(untrusted::LARGEST + 1).unwrap();
        });
        assert!(case.attempt().unwrap_err().to_string().contains("larger than"));
        assert_eq!(case.untaken().len(), untrusted::LARGEST + 1);
    }

    #[test]
    fn what_is_no_file_is_set_aside_unread() {
        let pipe = Case::new(|root| {
            let at = root.join(ERRORED_STATE);
            mknodat(CWD, at, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        });
        assert!(pipe.attempt().unwrap_err().to_string().contains("no regular file"));
        pipe.untaken();
        let link = Case::new(|root| symlink("/etc/passwd", root.join(ERRORED_STATE)).unwrap());
        assert!(link.attempt().is_err());
        assert!(link.untaken().is_symlink());
    }

    #[test]
    fn behind_a_link_that_the_job_has_made_nothing_is_touched() {
        let other = tempfile::tempdir().unwrap();
        let state = other.path().join(ERRORED_STATE);
        fs::write(&state, "another job's").unwrap();
        let case = Case::new(|root| {
            fs::write(root.join(ERRORED_STATE), "its own").unwrap();
            fs::rename(root, root.with_file_name("x")).unwrap();
            symlink(other.path(), root).unwrap();
        });
        assert!(case.attempt().is_err());
        assert_eq!(fs::read_to_string(&state).unwrap(), "another job's");
        // What it may have saved elsewhere is kept with the rest.
        let own = case.directory.join(UNTAKEN).join("x").join(ERRORED_STATE);
        assert_eq!(fs::read_to_string(own).unwrap(), "its own");
        case.untaken();
    }

    #[test]
    fn an_old_one_is_removed_whatever_it_is() {
        let case = Case::new(|root| fs::create_dir_all(root.join("errored.tfstate/x")).unwrap());
        let work = case.directory.join("work");
        let root = Folder::open(&work, &case.spec.working_directory).unwrap();
        remove_stale(&case.directory, &root).unwrap();
        assert!(!exists(&case.directory.join("stale")));
        remove_stale(&case.directory, &root).unwrap();
        assert_eq!(case.attempt().unwrap(), ErroredState::Absent);
    }
}
