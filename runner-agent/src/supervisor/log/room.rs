//! What the log leaves out while this host has no room: while its spool is full, or its disk
//! nearly. The agent's mark in the job's directory says so, and both are looked at here as well:
//! the bounds hold too while there is no agent, and between two of its looks. A mark that nobody
//! renews says nothing any more. One line says when that begins, and one how much it was, when
//! there is room again or at the end.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use jiff::{SignedDuration, Timestamp};
use serde_json::json;

use super::super::mask::Masker;
use super::{line, own_line};
use crate::clock;
use crate::job_directory::JobDirectory;
use crate::spool::{self, FULL};

/// The agent renews its mark far more often.
const VALID: SignedDuration = SignedDuration::from_secs(15);

/// Between two measurements of the spool.
const INTERVAL: Duration = Duration::from_millis(250);

/// The part of its time that this thread measures at most: all jobs of the host do, and each
/// looks at all of them.
const SHARE: u32 = 50;

#[derive(Debug)]
pub(super) struct Room {
    directory: PathBuf,
    limits: spool::Limits,
    /// What the spool held when it was measured last, and what this log has taken since.
    used: u64,
    next: Option<Instant>,
    /// As judged here.
    found: spool::Room,
    full: bool,
    /// In bytes, since it was told last.
    left_out: u64,
    /// The same at the last checkpoint.
    kept: u64,
}

impl Room {
    /// Goes on from what a predecessor has left out and not told.
    pub(super) fn of(directory: &JobDirectory, limits: spool::Limits, left_out: u64) -> Self {
        Self {
            directory: directory.path().to_owned(),
            limits,
            used: 0,
            next: None,
            found: spool::Room::Enough,
            full: false,
            left_out,
            kept: left_out,
        }
    }

    /// Looks at the mark and the disk; and at the spool, when there is something to write.
    pub(super) fn look(&mut self, has_news: bool) {
        if has_news {
            self.measure();
        }
        // What cannot be asked stops no log.
        let free = spool::free(&self.directory).unwrap_or(u64::MAX);
        self.found = self.limits.judge(self.found, self.used, free);
        self.full = self.is_marked() || self.found != spool::Room::Enough;
    }

    /// Measures all jobs' part of the spool, now and then.
    fn measure(&mut self) {
        let begin = Instant::now();
        if self.next.is_some_and(|next| begin < next) {
            return;
        }
        let jobs = self.directory.parent().unwrap_or(&self.directory);
        match spool::used(jobs) {
            Ok(used) => self.used = used,
            Err(error) => tracing::debug!(%error, "failed to measure the spool"),
        }
        self.next = Some(Instant::now() + INTERVAL.max(begin.elapsed() * SHARE));
    }

    fn is_marked(&self) -> bool {
        let made = std::fs::metadata(self.directory.join(FULL)).and_then(|mark| mark.modified());
        let made = made.ok().and_then(|made| Timestamp::try_from(made).ok());
        made.is_some_and(|made| clock::now().duration_since(made) < VALID)
    }

    pub(super) fn is_full(&self) -> bool {
        self.full
    }

    pub(super) fn left_out(&self) -> u64 {
        self.left_out
    }

    /// Leaves out so many bytes.
    pub(super) fn leave_out(&mut self, bytes: u64, out: &mut Vec<u8>) {
        if self.left_out == 0 && bytes > 0 {
            let text = "the spool of this host is full, or its disk: what terraform prints is left \
                        out; terraform goes on, and its state is kept";
            line::own(&own_line("gap", "warn", text, json!({})), &Masker::default(), out);
        }
        self.left_out += bytes;
    }

    /// Takes what stands behind `before`, and says how much was left out before it.
    pub(super) fn resume(&mut self, before: usize, out: &mut Vec<u8>) {
        if self.left_out > 0 {
            let rest = out.split_off(before);
            self.end(out);
            out.extend(rest);
        }
    }

    /// Says how much was left out, if anything was.
    pub(super) fn end(&mut self, out: &mut Vec<u8>) {
        let bytes = std::mem::take(&mut self.left_out);
        if bytes > 0 {
            let text =
                format!("{bytes} bytes of output were left out: the spool or the disk was full");
            let more = json!({"bytes": bytes});
            line::own(&own_line("gap", "warn", &text, more), &Masker::default(), out);
        }
    }

    /// With a checkpoint, and so many bytes in the log.
    pub(super) fn keep(&mut self, written: u64) {
        self.used = self.used.saturating_add(written);
        self.kept = self.left_out;
    }

    /// To the last checkpoint.
    pub(super) fn roll_back(&mut self) {
        self.left_out = self.kept;
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::super::tests::BOUNDLESS;
    use super::*;
    use crate::job::Phase;
    use crate::job_directory::tests as samples;

    fn directory() -> (tempfile::TempDir, JobDirectory) {
        let jobs = tempfile::tempdir().unwrap();
        let lease = samples::lease("r1", Phase::Plan);
        let directory =
            JobDirectory::create(jobs.path(), &lease, &samples::spec(), &samples::settings());
        (jobs, directory.unwrap())
    }

    #[test]
    fn what_is_left_out_is_told_once_at_each_end() {
        let (_jobs, directory) = directory();
        let mut room = Room::of(&directory, BOUNDLESS, 0);
        let mut out = Vec::new();
        let mut print = |room: &mut Room, text: &str| {
            room.look(true);
            if room.is_full() {
                room.leave_out(text.len() as u64, &mut out);
            } else {
                let before = out.len();
                out.extend_from_slice(text.as_bytes());
                room.resume(before, &mut out);
            }
            String::from_utf8(out.clone()).unwrap()
        };
        assert_eq!(print(&mut room, "one\n"), "one\n");
        directory.note(FULL, b"").unwrap();
        print(&mut room, "two\n");
        room.keep(0);
        let text = print(&mut room, "three\n");
        assert_eq!(text.matches("is full").count(), 1, "{text}");
        // As after a failed write: it is printed again.
        room.roll_back();
        print(&mut room, "three\n");
        std::fs::remove_file(directory.join(FULL)).unwrap();
        let text = print(&mut room, "four\n");
        assert!(text.contains("10 bytes of output were left out"), "{text}");
        assert!(text.starts_with("one\n") && text.ends_with("four\n"), "{text}");
        assert!(!text.contains("two") && !text.contains("three"), "{text}");
    }

    #[test]
    fn a_mark_that_no_agent_renews_says_nothing() {
        let (_jobs, directory) = directory();
        let mut room = Room::of(&directory, BOUNDLESS, 0);
        directory.note(FULL, b"").unwrap();
        room.look(true);
        assert!(room.is_full());
        let mark = File::options().write(true).open(directory.join(FULL)).unwrap();
        let made = mark.metadata().unwrap().modified().unwrap();
        mark.set_modified(made - Duration::from_secs(60)).unwrap();
        room.look(true);
        assert!(!room.is_full());
    }

    #[test]
    fn without_an_agent_the_disk_itself_is_looked_at() {
        let (_jobs, directory) = directory();
        let of_disk = |low_water| spool::Limits { low_water, ..BOUNDLESS };
        let mut room = Room::of(&directory, of_disk(u64::MAX / 2), 0);
        room.look(true);
        assert!(room.is_full());
        let mut room = Room::of(&directory, of_disk(1), 0);
        room.look(true);
        assert!(!room.is_full());
    }
    #[test]
    fn without_an_agent_what_all_jobs_keep_is_measured() {
        let (jobs, directory) = directory();
        let sibling = jobs.path().join("r0-apply-1-g1");
        std::fs::create_dir(&sibling).unwrap();
        let limits = spool::Limits { spool: 1 << 20, low_water: 0 };
        let mut room = Room::of(&directory, limits, 0);
        let look_anew = |room: &mut Room| {
            room.next = None;
            room.look(true);
            room.is_full()
        };
        assert!(!look_anew(&mut room));
        // Between two measurements what this log takes counts.
        room.keep(1 << 20);
        room.look(true);
        assert!(room.is_full());
        assert!(!look_anew(&mut room));
        std::fs::write(sibling.join("log"), vec![1; 1 << 20]).unwrap();
        room.look(true);
        assert!(!room.is_full(), "it is not measured at each line");
        assert!(look_anew(&mut room));
        // It flutters not: there is room again well below.
        std::fs::write(sibling.join("log"), vec![1; 1000 << 10]).unwrap();
        assert!(look_anew(&mut room));
        std::fs::remove_file(sibling.join("log")).unwrap();
        assert!(!look_anew(&mut room));
    }
}
