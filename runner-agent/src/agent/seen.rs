//! How far the control plane's history has come, as far as this runner was ever told.
//!
//! A control plane that is told more than it knows runs on an old copy of its data. So what is
//! said in `Hello` must outlive this host's power: it is synced first. What `Renewed` tells grows
//! all the time, and is kept once per second at most: an older number is only a weaker witness.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use crate::job_directory::{self, replace};

const FILE: &str = "seen.json";

const PAUSE: Duration = Duration::from_secs(1);

/// Ordered: a history counts within its generation.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(super) struct History {
    pub(super) generation: u64,
    pub(super) history: u64,
}

#[derive(Debug)]
pub(super) struct Seen {
    work_dir: PathBuf,
    told: History,
    kept: History,
    next: Instant,
}

impl Seen {
    pub(super) fn open(work_dir: &Path) -> Self {
        let path = work_dir.join(FILE);
        let kept = match std::fs::read(&path).map(|bytes| serde_json::from_slice(&bytes)) {
            Ok(Ok(kept)) => kept,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => History::default(),
            // It holds no job and grants nothing: its loss weakens a witness, and no more.
            Ok(Err(_)) | Err(_) => {
                tracing::error!(path = %path.display(), "failed to read what was seen of history");
                History::default()
            }
        };
        Self { work_dir: work_dir.to_owned(), told: kept, kept, next: Instant::now() }
    }

    /// Takes what the control plane said.
    pub(super) fn note(&mut self, told: History) {
        self.told = self.told.max(told);
    }

    /// Keeps what was noted, when it was not kept for a while.
    pub(super) fn keep_now_and_then(&mut self, now: Instant) {
        if now >= self.next && self.told != self.kept {
            self.next = now + PAUSE;
            self.keep();
        }
    }

    /// Answers what is kept, for `Hello`.
    pub(super) fn kept(&mut self) -> History {
        self.keep();
        self.kept
    }

    fn keep(&mut self) {
        if self.told == self.kept {
            return;
        }
        match self.write() {
            Ok(()) => self.kept = self.told,
            Err(error) => {
                let error = &error as &dyn std::error::Error;
                tracing::warn!(error, "failed to keep what was seen of history");
            }
        }
    }

    fn write(&self) -> Result<(), job_directory::Error> {
        let bytes = serde_json::to_vec(&self.told).expect("two numbers have a JSON form");
        replace(&self.work_dir, FILE, &bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn history(generation: u64, history: u64) -> History {
        History { generation, history }
    }

    #[tokio::test]
    async fn the_highest_generation_counts_and_the_history_within_it() {
        let dir = tempfile::tempdir().unwrap();
        let mut seen = Seen::open(dir.path());
        assert_eq!(seen.kept(), History::default());
        for told in [history(1, 50), history(2, 3), history(1, 60), history(2, 2)] {
            seen.note(told);
        }
        assert_eq!(seen.kept(), history(2, 3));
        assert_eq!(Seen::open(dir.path()).kept(), history(2, 3));
    }

    #[tokio::test]
    async fn what_could_not_be_kept_is_not_said() {
        let dir = tempfile::tempdir().unwrap();
        let mut seen = Seen::open(dir.path());
        seen.note(history(1, 1));
        assert_eq!(seen.kept(), history(1, 1));
        std::fs::remove_dir_all(dir.path()).unwrap();
        seen.note(history(1, 2));
        assert_eq!(seen.kept(), history(1, 1));
    }

    #[tokio::test]
    async fn it_is_written_once_per_second_at_most() {
        let dir = tempfile::tempdir().unwrap();
        let mut seen = Seen::open(dir.path());
        let on_disk = || Seen::open(dir.path()).kept;
        let now = Instant::now();
        seen.note(history(1, 1));
        seen.keep_now_and_then(now);
        seen.note(history(1, 2));
        seen.keep_now_and_then(now + PAUSE / 2);
        assert_eq!(on_disk(), history(1, 1));
        seen.keep_now_and_then(now + PAUSE);
        assert_eq!(on_disk(), history(1, 2));
    }

    #[test]
    fn a_damaged_file_stops_nobody() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(FILE), "{").unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async { assert_eq!(Seen::open(dir.path()).kept(), History::default()) });
    }
}
