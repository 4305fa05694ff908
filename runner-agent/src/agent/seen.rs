//! The furthest that the control plane said its history has come, in its own words.
//!
//! A control plane whose data cannot have said it runs on an old copy of them. So what is said in
//! `Hello` must outlive this host's power: it is synced first, and what `Go` says is synced before
//! terraform starts. What `Renewed` tells grows all the time, and is kept once per second at most:
//! an older mark is only a weaker witness.

use std::path::{Path, PathBuf};
use std::time::Duration;

use latchkey_proto::v1;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use crate::job_directory::{self, replace};

const FILE: &str = "seen.json";

const PAUSE: Duration = Duration::from_secs(1);

/// The words themselves: kept and said again as they were told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Mark {
    generation: u64,
    incarnation: String,
    history: u64,
    mac: Vec<u8>,
}

impl Mark {
    /// A history counts within its generation.
    fn reach(&self) -> (u64, u64) {
        (self.generation, self.history)
    }
}

impl From<v1::HistoryMark> for Mark {
    fn from(told: v1::HistoryMark) -> Self {
        let v1::HistoryMark { generation, incarnation, history, mac } = told;
        Self { generation, incarnation, history, mac }
    }
}

impl From<Mark> for v1::HistoryMark {
    fn from(mark: Mark) -> Self {
        let Mark { generation, incarnation, history, mac } = mark;
        Self { generation, incarnation, history, mac }
    }
}

#[derive(Debug)]
pub(super) struct Seen {
    work_dir: PathBuf,
    told: Option<Mark>,
    kept: Option<Mark>,
    next: Instant,
}

impl Seen {
    pub(super) fn open(work_dir: &Path) -> Self {
        let path = work_dir.join(FILE);
        let kept = match std::fs::read(&path).map(|bytes| serde_json::from_slice(&bytes)) {
            Ok(Ok(kept)) => Some(kept),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
            // It holds no job and grants nothing: its loss weakens a witness, and no more.
            Ok(Err(_)) | Err(_) => {
                tracing::error!(path = %path.display(), "failed to read what was seen of history");
                None
            }
        };
        Self { work_dir: work_dir.to_owned(), told: kept.clone(), kept, next: Instant::now() }
    }

    /// Takes what the control plane said.
    pub(super) fn note(&mut self, told: Option<v1::HistoryMark>) {
        let Some(told) = told.map(Mark::from) else { return };
        if self.told.as_ref().is_none_or(|before| before.reach() <= told.reach()) {
            self.told = Some(told);
        }
    }

    /// Keeps what was noted, when it was not kept for a while.
    pub(super) fn keep_now_and_then(&mut self, now: Instant) {
        if now >= self.next && self.told != self.kept {
            self.next = now + PAUSE;
            self.keep();
        }
    }

    /// Answers what is kept, for `Hello`.
    pub(super) fn kept(&mut self) -> Option<v1::HistoryMark> {
        self.keep();
        self.kept.clone().map(Into::into)
    }

    /// Keeps what was noted: before terraform starts.
    pub(super) fn keep(&mut self) {
        if self.told == self.kept {
            return;
        }
        match self.write() {
            Ok(()) => self.kept = self.told.clone(),
            Err(error) => {
                let error = &error as &dyn std::error::Error;
                tracing::warn!(error, "failed to keep what was seen of history");
            }
        }
    }

    fn write(&self) -> Result<(), job_directory::Error> {
        let bytes = serde_json::to_vec(&self.told).expect("numbers and texts have a JSON form");
        replace(&self.work_dir, FILE, &bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[expect(clippy::unnecessary_wraps, reason = "as it is on the wire")]
    fn mark(generation: u64, history: u64) -> Option<v1::HistoryMark> {
        let incarnation = format!("{history:032}");
        Some(v1::HistoryMark { generation, incarnation, history, mac: vec![7; 32] })
    }

    fn on_disk(work_dir: &Path) -> Option<v1::HistoryMark> {
        Seen::open(work_dir).kept.map(Into::into)
    }

    #[tokio::test]
    async fn the_highest_generation_counts_and_the_history_within_it() {
        let dir = tempfile::tempdir().unwrap();
        let mut seen = Seen::open(dir.path());
        assert_eq!(seen.kept(), None);
        for told in [mark(1, 50), mark(2, 3), mark(1, 60), None, mark(2, 2)] {
            seen.note(told);
        }
        assert_eq!(seen.kept(), mark(2, 3));
        assert_eq!(Seen::open(dir.path()).kept(), mark(2, 3));
    }

    #[tokio::test]
    async fn what_could_not_be_kept_is_not_said() {
        let dir = tempfile::tempdir().unwrap();
        let mut seen = Seen::open(dir.path());
        seen.note(mark(1, 1));
        assert_eq!(seen.kept(), mark(1, 1));
        std::fs::remove_dir_all(dir.path()).unwrap();
        seen.note(mark(1, 2));
        assert_eq!(seen.kept(), mark(1, 1));
    }

    #[tokio::test]
    async fn it_is_written_once_per_second_at_most() {
        let dir = tempfile::tempdir().unwrap();
        let mut seen = Seen::open(dir.path());
        let now = Instant::now();
        seen.note(mark(1, 1));
        seen.keep_now_and_then(now);
        seen.note(mark(1, 2));
        seen.keep_now_and_then(now + PAUSE / 2);
        assert_eq!(on_disk(dir.path()), mark(1, 1));
        seen.keep_now_and_then(now + PAUSE);
        assert_eq!(on_disk(dir.path()), mark(1, 2));
    }

    #[test]
    fn a_damaged_file_stops_nobody() {
        let dir = tempfile::tempdir().unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        // The second is one of before there were marks.
        for left in ["{", r#"{"generation":1,"history":5}"#] {
            std::fs::write(dir.path().join(FILE), left).unwrap();
            runtime.block_on(async { assert_eq!(Seen::open(dir.path()).kept(), None) });
        }
    }
}
