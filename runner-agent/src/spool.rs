//! The host's spool: what jobs have written that may not be sent yet, and how much of the disk
//! it may take.
//!
//! The agent measures it, to take no job while it is full; so does the writer of each log, which
//! outlives the agent.
//!
//! When it is full, job logs are cut, never states and results: a mark in each job's directory
//! tells the writer of its log, for as long as it is renewed. What the mark says is looked at
//! between lines, so terraform never waits for it. A part of the disk is left alone in any case
//! (`low_water`): states must find room when logs have taken what they may.
//!
//! What terraform itself puts on the disk is not counted: nothing here could cut it. Neither is what
//! is kept for a person: it would close this runner until somebody came.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::statvfs;
use tokio::sync::watch;

/// In a job's directory, while its log takes nothing more.
pub(crate) const FULL: &str = "full";

const INTERVAL: Duration = Duration::from_millis(500);

/// What is terraform's in a job's directory.
const NOT_COUNTED: &[&str] = &["work", "restored", "home", "tmp"];

/// In bytes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    pub(crate) spool: u64,
    /// Of the disk, to be left free.
    pub(crate) low_water: u64,
}

/// Whether there is room for what jobs write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Room {
    Enough,
    /// The spool has reached its limit.
    Full {
        bytes: u64,
    },
    /// The disk has too little left.
    LowDisk {
        free: u64,
    },
}

impl Limits {
    /// Full at the limit; there is room again only well below it, so that it does not flutter.
    pub(crate) fn judge(&self, before: Room, used: u64, free: u64) -> Room {
        let was_enough = before == Room::Enough;
        let limit = if was_enough { self.spool } else { self.spool - self.spool / 8 };
        let low = if was_enough { self.low_water } else { self.low_water + self.low_water / 8 };
        match () {
            () if free < low => Room::LowDisk { free },
            () if used > limit => Room::Full { bytes: used },
            () => Room::Enough,
        }
    }
}

/// Watches the spool for as long as somebody listens.
pub(crate) fn watch(work_dir: &Path, limits: Limits) -> watch::Receiver<Room> {
    let (room_to, room) = watch::channel(Room::Enough);
    let work_dir = work_dir.to_owned();
    tokio::spawn(async move {
        while !room_to.is_closed() {
            let before = *room_to.borrow();
            let of = work_dir.clone();
            let look = move || look(&of, limits, before);
            match tokio::task::spawn_blocking(look).await {
                Ok(Ok(now)) => {
                    let is_news = (now == Room::Enough) != (before == Room::Enough);
                    match now {
                        Room::Enough if is_news => tracing::info!("the spool has room again"),
                        Room::Full { bytes } if is_news => tracing::error!(
                            bytes,
                            limit = limits.spool,
                            "the spool is full: job logs are cut and no job is taken"
                        ),
                        Room::LowDisk { free } if is_news => tracing::error!(
                            free,
                            limit = limits.low_water,
                            "the disk is nearly full: job logs are cut and no job is taken"
                        ),
                        Room::Enough | Room::Full { .. } | Room::LowDisk { .. } => {}
                    }
                    room_to.send_replace(now);
                }
                Ok(Err(error)) => tracing::warn!(%error, "failed to look at the spool"),
                Err(_) => return,
            }
            tokio::time::sleep(INTERVAL).await;
        }
    });
    room
}

/// Measures, and marks the jobs' directories.
fn look(work_dir: &Path, limits: Limits, before: Room) -> io::Result<Room> {
    let jobs = work_dir.join("jobs");
    let now = limits.judge(before, used(&jobs)?, free(work_dir)?);
    for job in directories(&jobs)? {
        let mark = job.join(FULL);
        let marked = match (now == Room::Enough, mark.exists()) {
            (true, true) => fs::remove_file(&mark),
            (true, false) => Ok(()),
            // Again, too: a mark that is not renewed has lost its agent.
            (false, _) => fs::write(&mark, ""),
        };
        // A directory may be gone by now.
        if let Err(error) = marked
            && job.exists()
        {
            tracing::warn!(%error, mark = %mark.display(), "failed to mark a job's directory");
        }
    }
    Ok(now)
}

/// Measures what all jobs together have put into the spool.
pub(crate) fn used(jobs: &Path) -> io::Result<u64> {
    Ok(directories(jobs)?.iter().map(|directory| size(directory)).sum())
}

/// Answers how much the disk has left.
pub(crate) fn free(path: &Path) -> io::Result<u64> {
    let disk = statvfs(path)?;
    Ok(disk.f_bavail.saturating_mul(disk.f_frsize))
}

fn directories(of: &Path) -> io::Result<Vec<PathBuf>> {
    match fs::read_dir(of) {
        Ok(entries) => Ok(entries
            .flatten()
            .filter(|entry| !entry.file_name().as_encoded_bytes().starts_with(b"."))
            .map(|entry| entry.path())
            .collect()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// Counts the blocks that one job's own files take, one directory deep.
pub(crate) fn size(directory: &Path) -> u64 {
    let blocks = |path: &Path| fs::symlink_metadata(path).map_or(0, |found| found.blocks() * 512);
    let entries = |path: &Path| fs::read_dir(path).into_iter().flatten().flatten();
    let mut bytes = 0;
    for entry in entries(directory) {
        let of_terraform = entry.file_name().to_str().is_some_and(|n| NOT_COUNTED.contains(&n));
        match entry.file_type() {
            Ok(kind) if kind.is_file() => bytes += blocks(&entry.path()),
            Ok(kind) if kind.is_dir() && !of_terraform => {
                bytes += entries(&entry.path()).map(|entry| blocks(&entry.path())).sum::<u64>();
            }
            Ok(_) | Err(_) => {}
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { spool: 80_000, low_water: 800 };

    #[test]
    fn there_is_room_again_only_well_below_the_limit() {
        let full = |bytes| Room::Full { bytes };
        let low = |free| Room::LowDisk { free };
        for (before, used, free, expect) in [
            (Room::Enough, 80_000, 9_999, Room::Enough),
            (Room::Enough, 80_001, 9_999, full(80_001)),
            (full(1), 70_001, 9_999, full(70_001)),
            (full(1), 70_000, 9_999, Room::Enough),
            (Room::Enough, 0, 799, low(799)),
            (low(1), 0, 899, low(899)),
            (low(1), 0, 900, Room::Enough),
        ] {
            assert_eq!(LIMITS.judge(before, used, free), expect, "{before:?} {used} {free}");
        }
    }

    #[test]
    fn logs_and_states_count_and_neither_terraforms_own_files_nor_what_is_kept() {
        let work_dir = tempfile::tempdir().unwrap();
        let job = work_dir.path().join("jobs/run1-apply-1");
        for sub in ["work", "state"] {
            fs::create_dir_all(job.join(sub)).unwrap();
        }
        let limits = Limits { spool: 64 * 1024, low_water: 0 };
        let kept = work_dir.path().join("kept/run0-apply-1");
        fs::create_dir_all(&kept).unwrap();
        fs::write(kept.join("log"), vec![1; 1 << 20]).unwrap();
        fs::write(job.join("work/large"), vec![1; 1 << 20]).unwrap();
        assert_eq!(look(work_dir.path(), limits, Room::Enough).unwrap(), Room::Enough);
        assert!(!job.join(FULL).exists());
        for name in ["log", "state/0001"] {
            fs::write(job.join(name), vec![1; 48 * 1024]).unwrap();
        }
        let now = look(work_dir.path(), limits, Room::Enough).unwrap();
        assert!(matches!(now, Room::Full { bytes } if bytes >= 96 * 1024), "{now:?}");
        let mark = fs::File::options().write(true).open(job.join(FULL)).unwrap();
        let made = mark.metadata().unwrap().modified().unwrap() - Duration::from_secs(60);
        mark.set_modified(made).unwrap();
        assert_eq!(look(work_dir.path(), limits, now).unwrap(), now);
        assert!(mark.metadata().unwrap().modified().unwrap() > made, "it is renewed");
        fs::remove_file(job.join("log")).unwrap();
        assert_eq!(look(work_dir.path(), limits, now).unwrap(), Room::Enough);
        assert!(!job.join(FULL).exists());
    }
}
