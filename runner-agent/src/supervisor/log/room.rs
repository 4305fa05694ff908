//! What the log leaves out while this host has no room: while its spool is full, by the agent's
//! mark in the job's directory, and while its disk is nearly full, which is looked at here. So the
//! disk is spared too while there is no agent, and between two of its looks; and a mark that
//! nobody renews says nothing any more. One line says when that begins, and one how much it was,
//! when there is room again or at the end.

use std::path::PathBuf;

use jiff::{SignedDuration, Timestamp};
use rustix::fs::statvfs;
use serde_json::json;

use super::super::mask::Masker;
use super::{line, own_line};
use crate::clock;
use crate::job_directory::JobDirectory;
use crate::spool::FULL;

/// The agent renews its mark far more often.
const VALID: SignedDuration = SignedDuration::from_secs(15);

#[derive(Debug)]
pub(super) struct Room {
    directory: PathBuf,
    /// Of the disk, to be left free.
    low_water: u64,
    full: bool,
    /// In bytes, since it was told last.
    left_out: u64,
    /// The same at the last checkpoint.
    kept: u64,
}

impl Room {
    /// Goes on from what a predecessor has left out and not told.
    pub(super) fn of(directory: &JobDirectory, low_water: u64, left_out: u64) -> Self {
        let directory = directory.path().to_owned();
        Self { directory, low_water, full: false, left_out, kept: left_out }
    }

    /// Looks at the mark and the disk.
    pub(super) fn look(&mut self) {
        self.full = self.is_marked() || self.is_low();
    }

    fn is_marked(&self) -> bool {
        let made = std::fs::metadata(self.directory.join(FULL)).and_then(|mark| mark.modified());
        let made = made.ok().and_then(|made| Timestamp::try_from(made).ok());
        made.is_some_and(|made| clock::now().duration_since(made) < VALID)
    }

    fn is_low(&self) -> bool {
        // There is room again only well above it, so that it does not flutter.
        let low = if self.full { self.low_water + self.low_water / 8 } else { self.low_water };
        let disk = statvfs(&self.directory);
        disk.is_ok_and(|disk| disk.f_bavail.saturating_mul(disk.f_frsize) < low)
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

    /// With a checkpoint.
    pub(super) fn keep(&mut self) {
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
    use std::time::Duration;

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
        let mut room = Room::of(&directory, 0, 0);
        let mut out = Vec::new();
        let mut print = |room: &mut Room, text: &str| {
            room.look();
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
        room.keep();
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
        let mut room = Room::of(&directory, 0, 0);
        directory.note(FULL, b"").unwrap();
        room.look();
        assert!(room.is_full());
        let mark = File::options().write(true).open(directory.join(FULL)).unwrap();
        let made = mark.metadata().unwrap().modified().unwrap();
        mark.set_modified(made - Duration::from_secs(60)).unwrap();
        room.look();
        assert!(!room.is_full());
    }

    #[test]
    fn without_an_agent_the_disk_itself_is_looked_at() {
        let (_jobs, directory) = directory();
        let mut room = Room::of(&directory, u64::MAX / 2, 0);
        room.look();
        assert!(room.is_full());
        let mut room = Room::of(&directory, 1, 0);
        room.look();
        assert!(!room.is_full());
    }
}
