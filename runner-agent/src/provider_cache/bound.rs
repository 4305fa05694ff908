//! How the cache stays within its bound: what was not used for the longest time goes first, and
//! nothing goes that a job of this host may still run.
//!
//! ```text
//! <cache>/linux_amd64/.lock              shared by who lends or takes in, alone for who removes
//! <cache>/linux_amd64/.job-<…>           what a job has links to, for as long as its directory is
//! <cache>/linux_amd64/<h1 in hex>/used   touched with each use
//! ```
//!
//! A job's record is written before its first link, under the shared lock. So whoever holds the
//! lock alone knows all links there are, and no link is being made. A package leaves its name under
//! the lock, whole, and is removed after it.
//!
//! Jobs can read the cache, so one may take the lock and keep it, and a lock is all that file gives.
//! Nobody waits for it without an end: who does not get it goes without the cache.
//!
//! A record counts while the job's private cache exists: a supervisor may die and terraform live.
//! Runners that share a cache must therefore see each other's work directories by the same paths.

use std::collections::HashSet;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use aws_lc_rs::digest::{SHA256, digest as sha256};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::{Error, failed, files, remove};
use crate::random;

const LOCK: &str = ".lock";
const RECORD: &str = ".job-";
const DRAFT: &str = ".draft";
const USED: &str = "used";

/// Whoever removes something holds the lock for milliseconds.
const PATIENCE: Duration = Duration::from_secs(2);

const PAUSE: Duration = Duration::from_millis(10);

/// What one job has links to.
#[derive(Debug, Serialize, Deserialize)]
struct Record {
    /// Its private cache.
    private: PathBuf,
    packages: HashSet<String>,
}

/// Held while links are made: nothing is removed meanwhile. `None` where nobody can remove
/// anything, such as in a cache that can only be read.
pub(super) fn hold(shared: &Path) -> Result<Option<File>, Error> {
    let held = open(shared).and_then(|lock| {
        lock_shared(&lock)?;
        Ok(lock)
    });
    match held {
        Ok(lock) => Ok(Some(lock)),
        // Without a record of the links, what they lead to could go.
        Err(error) if Errno::from_io_error(&error) == Some(Errno::WOULDBLOCK) => {
            Err(failed("wait for the lock of", shared)(error))
        }
        Err(error) => {
            tracing::debug!(%error, "the provider cache is used without its lock");
            Ok(None)
        }
    }
}

#[expect(clippy::disallowed_methods, reason = "nothing tells when another lets go of the lock")]
fn lock_shared(lock: &File) -> Result<(), Errno> {
    let since = Instant::now();
    loop {
        match flock(lock, FlockOperation::NonBlockingLockShared) {
            Err(Errno::WOULDBLOCK) if since.elapsed() < PATIENCE => thread::sleep(PAUSE),
            done => return done,
        }
    }
}

fn open(shared: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(0o600);
    options.open(shared.join(LOCK))
}

/// Notes that a job is about to have links to these. Under the lock.
pub(super) fn record(shared: &Path, private: &Path, packages: &[String]) -> Result<(), Error> {
    if packages.is_empty() {
        return Ok(());
    }
    let name = hex::encode(sha256(&SHA256, private.as_os_str().as_encoded_bytes()));
    let path = shared.join(format!("{RECORD}{name}"));
    // From an earlier `init` of the job.
    let mut record = read(&path)
        .unwrap_or_else(|| Record { private: private.to_owned(), packages: HashSet::new() });
    record.packages.extend(packages.iter().cloned());
    let draft = shared.join(format!("{RECORD}{name}{DRAFT}"));
    let write = || {
        fs::write(&draft, serde_json::to_vec(&record).map_err(io::Error::other)?)?;
        fs::rename(&draft, &path)
    };
    write().map_err(failed("note", &path))?;
    for package in packages {
        // The time is all it says; without it, another may go first.
        let _ = fs::write(shared.join(package).join(USED), "");
    }
    Ok(())
}

fn read(path: &Path) -> Option<Record> {
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}

/// A package that could go.
#[derive(Debug)]
struct Candidate {
    used: SystemTime,
    bytes: u64,
    name: String,
}

/// Removes what is over the limit, as far as nobody uses it, and answers how many packages that
/// were. Leaves it to others while they are at work here: each looks at its end. Without a limit
/// only the records of jobs that are gone go.
pub(super) fn shrink(shared: &Path, limit: u64) -> Result<usize, Error> {
    let lock = open(shared).map_err(failed("open the lock of", shared))?;
    if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
        return Ok(0);
    }
    let gone = match limit {
        0 => in_use(shared).map(|_| Vec::new())?,
        limit => take_out(shared, limit)?,
    };
    drop(lock);
    for directory in &gone {
        remove(directory)?;
    }
    Ok(gone.len())
}

/// Takes the names from what must go. Under the lock, alone.
fn take_out(shared: &Path, limit: u64) -> Result<Vec<PathBuf>, Error> {
    let in_use = in_use(shared)?;
    let packages = entries(shared)?.filter(|(name, _)| !name.starts_with('.'));
    let mut packages: Vec<_> = packages
        .map(|(name, path)| Candidate { used: last_use(&path), bytes: size(&path), name })
        .collect();
    let mut total: u64 = packages.iter().map(|package| package.bytes).sum();
    packages.retain(|package| !in_use.contains(&package.name));
    packages.sort_by_key(|package| package.used);
    let mut gone = Vec::new();
    for Candidate { bytes, name, .. } in packages {
        if total <= limit {
            break;
        }
        let path = shared.join(&name);
        let to = shared.join(format!(".gone-{}", &random::token()[..16]));
        fs::rename(&path, &to).map_err(failed("remove", &path))?;
        tracing::info!(package = %name, bytes, "a provider package left the full cache");
        total -= bytes;
        gone.push(to);
    }
    Ok(gone)
}

/// Answers what jobs have links to, and removes the records of those that are gone. Under the lock,
/// alone.
fn in_use(shared: &Path) -> Result<HashSet<String>, Error> {
    let mut in_use = HashSet::new();
    for (name, path) in entries(shared)?.filter(|(name, _)| name.starts_with(RECORD)) {
        let draft = name.ends_with(DRAFT);
        match read(&path).filter(|record| !draft && record.private.exists()) {
            Some(record) => in_use.extend(record.packages),
            // Of a job that is gone, or of one that was killed before it had links.
            None => drop(fs::remove_file(&path)),
        }
    }
    Ok(in_use)
}

fn entries(shared: &Path) -> Result<impl Iterator<Item = (String, PathBuf)>, Error> {
    let entries = fs::read_dir(shared).map_err(failed("list", shared))?.flatten();
    Ok(entries.filter_map(|entry| Some((entry.file_name().into_string().ok()?, entry.path()))))
}

/// By its mark, or since it is there.
fn last_use(package: &Path) -> SystemTime {
    let of = |path: &Path| fs::metadata(path).and_then(|found| found.modified());
    of(&package.join(USED)).or_else(|_| of(package)).unwrap_or(SystemTime::UNIX_EPOCH)
}

fn size(package: &Path) -> u64 {
    let package = package.join("package");
    let blocks = |name: &String| fs::symlink_metadata(package.join(name)).map(|m| m.blocks() * 512);
    files(&package).iter().flatten().flat_map(blocks).sum()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const SIZE: usize = 64 << 10;

    /// Makes packages, each used later than the one before.
    fn cache(names: &[&str]) -> tempfile::TempDir {
        let shared = tempfile::tempdir().unwrap();
        for (age, name) in names.iter().rev().enumerate() {
            let directory = shared.path().join(name);
            fs::create_dir_all(directory.join("package")).unwrap();
            fs::write(directory.join("package/provider"), vec![1; SIZE]).unwrap();
            let used = File::create(directory.join(USED)).unwrap();
            let now = used.metadata().unwrap().modified().unwrap();
            used.set_modified(now - Duration::from_secs(3600 * (age as u64 + 1))).unwrap();
        }
        shared
    }

    #[track_caller]
    fn holds(shared: &tempfile::TempDir, expect: &[&str]) {
        let entries = fs::read_dir(shared.path()).unwrap().flatten();
        let names = entries.map(|entry| entry.file_name().into_string().unwrap());
        let mut names: Vec<_> = names.filter(|name| name != LOCK).collect();
        names.sort_unstable();
        assert_eq!(names, expect);
    }

    #[test]
    fn what_was_used_last_stays() {
        let shared = cache(&["a", "b", "c", "d"]);
        assert_eq!(shrink(shared.path(), 0).unwrap(), 0);
        assert_eq!(shrink(shared.path(), 4 * SIZE as u64).unwrap(), 0);
        holds(&shared, &["a", "b", "c", "d"]);
        assert_eq!(shrink(shared.path(), 3 * SIZE as u64).unwrap(), 1);
        holds(&shared, &["b", "c", "d"]);
        // A use makes the oldest the newest.
        let job = tempfile::tempdir().unwrap();
        record(shared.path(), job.path(), &["b".into()]).unwrap();
        drop(job);
        assert_eq!(shrink(shared.path(), SIZE as u64).unwrap(), 2);
        holds(&shared, &["b"]);
    }

    #[test]
    fn what_a_job_has_links_to_stays_until_the_job_is_gone() {
        let shared = cache(&["a", "b", "c"]);
        let job = tempfile::tempdir().unwrap();
        record(shared.path(), job.path(), &["a".into()]).unwrap();
        record(shared.path(), job.path(), &["c".into()]).unwrap();
        assert_eq!(shrink(shared.path(), 1).unwrap(), 1);
        for name in ["a", "c"] {
            assert!(shared.path().join(name).exists(), "{name}");
        }
        drop(job);
        // A draft of one that was killed says nothing.
        fs::write(shared.path().join(format!("{RECORD}x{DRAFT}")), "{").unwrap();
        assert_eq!(shrink(shared.path(), 1).unwrap(), 2);
        holds(&shared, &[]);
    }

    #[test]
    fn nothing_is_removed_while_links_are_made() {
        let shared = cache(&["a"]);
        let held = hold(shared.path()).unwrap();
        let also = hold(shared.path()).unwrap();
        assert!(held.is_some() && also.is_some());
        drop(also);
        assert_eq!(shrink(shared.path(), 1).unwrap(), 0);
        drop(held);
        assert_eq!(shrink(shared.path(), 1).unwrap(), 1);
        holds(&shared, &[]);
    }
}
