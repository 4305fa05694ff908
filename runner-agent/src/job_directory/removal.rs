//! How a job's directory goes: it is removed, or set aside in `kept` beside the jobs when this host
//! has the only copy of something.
//!
//! A directory that goes loses its name first, so that a half-removed one is never taken for a
//! job. What cannot be removed then keeps nothing else in its place, and is tried again.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;

use super::{Error, JobDirectory, io_error, private_directory, sync_directory};
use crate::random;

const GONE: &str = ".gone-";

/// What a directory that is set aside goes without: it is large, holds secrets, or was of use
/// while it ran.
const NOT_KEPT: &[&str] = &[
    "work",
    "restored",
    "home",
    "raw",
    "plan.bin",
    "changes.json",
    "archive.tar.gz",
    "workspace.tar.gz",
    "state/base",
    "endpoints.json",
    "credentials-token",
    "control",
    "control-token",
];

/// How deep what cannot be removed is gone into.
const DEEPEST: u32 = 64;

impl JobDirectory {
    /// Removes the directory. Where only a part of it can be, all else is removed and the rest is
    /// left to `sweep`.
    pub(crate) fn wipe(&self) -> Result<(), Error> {
        let name = self.path.file_name().unwrap_or_default().to_string_lossy();
        let gone = format!("{GONE}{name}-{}", &random::token()[..8]);
        let gone = Self { path: self.path.with_file_name(gone) };
        match fs::rename(&self.path, &gone.path) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(io_error("unname", &self.path)(error)),
        }
        if let Some(jobs) = self.path.parent() {
            sync_directory(jobs)?;
        }
        gone.clear()
    }

    /// Tries again to remove what `wipe` could not.
    pub(crate) fn sweep(jobs: &Path) -> Result<(), Error> {
        for entry in fs::read_dir(jobs).map_err(io_error("list", jobs))? {
            let path = entry.map_err(io_error("list", jobs))?.path();
            if is_named(&path, GONE.as_bytes()) {
                Self { path }.clear_or_warn();
            }
        }
        Ok(())
    }

    /// Takes the directory out of the jobs, into `kept` beside them, for a person; answers where
    /// it is. What only terraform needed is removed. All logs in `kept` together have at most
    /// `cap` bytes: the oldest go first. States stay.
    pub(crate) fn set_aside(&self, cap: u64) -> Result<PathBuf, Error> {
        let jobs = self.path.parent().unwrap_or(&self.path);
        let to = self.kept();
        let kept = to.parent().unwrap_or(&to);
        private_directory(kept)?;
        fs::rename(&self.path, &to).map_err(io_error("set aside", &self.path))?;
        sync_directory(kept)?;
        sync_directory(jobs)?;
        Self { path: to.clone() }.trim();
        hold_logs_to(kept, cap)?;
        Ok(to)
    }

    /// Answers where the directory is once it is set aside.
    pub(crate) fn kept(&self) -> PathBuf {
        let jobs = self.path.parent().unwrap_or(&self.path);
        jobs.with_file_name("kept").join(self.path.file_name().unwrap_or_default())
    }

    /// Removes what is of no use to a person. Safe to repeat.
    pub(crate) fn trim(&self) {
        let others = NOT_KEPT.iter().map(|name| self.join(name));
        for path in others.chain([self.tmpdir()]) {
            if let Err(error) = remove_all_that_can_be(&path, DEEPEST) {
                let error = &error as &dyn std::error::Error;
                tracing::warn!(error, "failed to trim what is kept");
            }
        }
    }

    pub(super) fn clear_or_warn(&self) {
        if let Err(error) = self.clear() {
            let error = &error as &dyn std::error::Error;
            tracing::warn!(error, "failed to remove a leftover");
        }
    }

    /// Removes what has no name any more. The record of the temporary files goes behind them.
    fn clear(&self) -> Result<(), Error> {
        let tmpdir = self.tmpdir();
        let mut cleared = Ok(());
        for entry in fs::read_dir(&self.path).into_iter().flatten().flatten() {
            if entry.file_name() != "tmpdir" {
                cleared = cleared.and(remove_all_that_can_be(&entry.path(), DEEPEST));
            }
        }
        cleared.and(remove_all_that_can_be(&tmpdir, DEEPEST))?;
        remove_tree(&self.path)
    }
}

pub(super) fn is_named(path: &Path, prefix: &[u8]) -> bool {
    path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(prefix))
}

fn hold_logs_to(kept: &Path, cap: u64) -> Result<(), Error> {
    let mut logs = Vec::new();
    for entry in fs::read_dir(kept).map_err(io_error("list", kept))? {
        let log = entry.map_err(io_error("list", kept))?.path().join("log");
        if let Ok(found) = fs::metadata(&log) {
            logs.push((found.modified().ok(), found.len(), log));
        }
    }
    logs.sort();
    let mut total: u64 = logs.iter().map(|(_, bytes, _)| bytes).sum();
    for (_, bytes, log) in logs {
        if total <= cap {
            break;
        }
        tracing::error!(log = %log.display(), bytes, "a log that was kept is removed: too many");
        fs::remove_file(&log).map_err(io_error("remove", &log))?;
        total -= bytes;
    }
    Ok(())
}

/// Removes a tree, and where that fails all of it but what cannot be removed. Links are not
/// followed, whoever puts one in the way meanwhile. Answers the first failure.
fn remove_all_that_can_be(path: &Path, depth: u32) -> Result<(), Error> {
    let Err(error) = remove_tree(path) else { return Ok(()) };
    let directory = OpenOptions::new()
        .read(true)
        .custom_flags((OFlags::NOFOLLOW | OFlags::DIRECTORY).bits().cast_signed())
        .open(path);
    if let (Ok(directory), Some(depth)) = (directory, depth.checked_sub(1)) {
        for child in children(&directory) {
            // The first failure is the one to tell.
            let _ = remove_all_that_can_be(&child, depth);
        }
    }
    Err(error)
}

/// Answers paths that lead through the handle.
fn children(of: &File) -> Vec<PathBuf> {
    let path = PathBuf::from(format!("/proc/self/fd/{}", of.as_raw_fd()));
    fs::read_dir(path).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
}

/// Removes a tree or a file without following links, also where terraform took our own permission
/// away.
pub(super) fn remove_tree(path: &Path) -> Result<(), Error> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() == io::ErrorKind::NotADirectory => {
            return fs::remove_file(path).map_err(io_error("remove", path));
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {}
        other => return other.map_err(io_error("remove", path)),
    }
    reclaim(path);
    fs::remove_dir_all(path).map_err(io_error("remove", path))
}

fn reclaim(path: &Path) {
    // Errors show when the removal fails again.
    let is_directory = fs::symlink_metadata(path).is_ok_and(|metadata| metadata.is_dir());
    if is_directory {
        let _ = fs::set_permissions(path, Permissions::from_mode(0o700));
        for entry in fs::read_dir(path).into_iter().flatten().flatten() {
            reclaim(&entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{lease, settings, spec};
    use super::*;
    use crate::job::{Lease, Phase};

    #[test]
    fn what_is_set_aside_keeps_its_state_and_the_oldest_logs_go_first() {
        let base = tempfile::tempdir().unwrap();
        let jobs = base.path().join("jobs");
        private_directory(&jobs).unwrap();
        let mut kept = Vec::new();
        for run_id in ["r1", "r2"] {
            let lease = lease(run_id, Phase::Apply);
            let dir = JobDirectory::create(&jobs, &lease, &spec(), &settings()).unwrap();
            for name in ["log", "state/0001", "work/main.tf", "state/base", "plan.bin"] {
                fs::write(dir.join(name), "x".repeat(100)).unwrap();
            }
            kept.push(dir.set_aside(150).unwrap());
        }
        assert!(fs::read_dir(&jobs).unwrap().next().is_none());
        for path in &kept {
            assert!(path.join("state/0001").exists() && path.join("lease.json").exists());
            for name in ["work", "state/base", "plan.bin"] {
                assert!(!path.join(name).exists(), "{name}");
            }
        }
        assert!(!kept[0].join("log").exists() && kept[1].join("log").exists());
    }

    #[test]
    fn what_cannot_be_removed_keeps_nothing_else_and_is_tried_again() {
        let jobs = tempfile::tempdir().unwrap();
        let lease = lease("r1", Phase::Plan);
        let dir = JobDirectory::create(jobs.path(), &lease, &spec(), &settings()).unwrap();
        fs::write(dir.join("plan.bin"), "secret").unwrap();
        fs::write(dir.join("state/0001"), "secret").unwrap();
        // No file can have such a name: its removal fails.
        fs::write(dir.join("tmpdir"), format!("/tmp/latchkey-{}", "x".repeat(300))).unwrap();
        assert!(dir.wipe().is_err());
        assert!(JobDirectory::list(jobs.path()).unwrap().is_empty());
        let left = |path: &Path| -> Vec<PathBuf> {
            fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()).collect()
        };
        let gone = left(jobs.path()).remove(0);
        assert_eq!(left(&gone), [gone.join("tmpdir")]);
        fs::remove_file(gone.join("tmpdir")).unwrap();
        JobDirectory::sweep(jobs.path()).unwrap();
        assert!(left(jobs.path()).is_empty());
    }

    #[test]
    fn a_job_of_a_later_generation_has_a_place_of_its_own() {
        let base = tempfile::tempdir().unwrap();
        let jobs = base.path().join("jobs");
        private_directory(&jobs).unwrap();
        let older = lease("r1", Phase::Apply);
        let newer = Lease { generation: 2, ..older.clone() };
        let make = |lease| JobDirectory::create(&jobs, lease, &spec(), &settings()).unwrap();
        let (older, newer) = (make(&older), make(&newer));
        older.set_aside(0).unwrap();
        newer.set_aside(0).unwrap();
        assert_eq!(JobDirectory::list(&base.path().join("kept")).unwrap().len(), 2);
    }
}
