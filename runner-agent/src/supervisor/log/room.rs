//! What the log leaves out while this host's spool is full, by the agent's mark in the job's
//! directory. One line says when that begins, and one how much it was, when there is room again
//! or at the end.

use std::path::PathBuf;

use serde_json::json;

use super::super::mask::Masker;
use super::{line, own_line};
use crate::job_directory::JobDirectory;
use crate::spool::FULL;

#[derive(Debug)]
pub(super) struct Room {
    mark: PathBuf,
    full: bool,
    /// In bytes, since it was told last.
    left_out: u64,
    /// The same at the last checkpoint.
    kept: u64,
}

impl Room {
    pub(super) fn of(directory: &JobDirectory) -> Self {
        Self { mark: directory.join(FULL), full: false, left_out: 0, kept: 0 }
    }

    /// Looks at the mark.
    pub(super) fn look(&mut self) {
        self.full = self.mark.exists();
    }

    /// Leaves out what stands behind `before`, and answers whether it did.
    pub(super) fn hold(&mut self, before: usize, out: &mut Vec<u8>) -> bool {
        if !self.full {
            if self.left_out > 0 {
                let rest = out.split_off(before);
                self.end(out);
                out.extend(rest);
            }
            return false;
        }
        let bytes = (out.len() - before) as u64;
        out.truncate(before);
        if self.left_out == 0 && bytes > 0 {
            let text = "the spool of this host is full: what terraform prints is left out; \
                        terraform goes on, and its state is kept";
            line::own(&own_line("gap", "warn", text, json!({})), &Masker::default(), out);
        }
        self.left_out += bytes;
        true
    }

    /// Says how much was left out, if anything was.
    pub(super) fn end(&mut self, out: &mut Vec<u8>) {
        let bytes = std::mem::take(&mut self.left_out);
        if bytes > 0 {
            let text = format!("{bytes} bytes of output were left out: the spool was full");
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
    use super::*;
    use crate::job::Phase;
    use crate::job_directory::tests as samples;

    #[test]
    fn what_is_left_out_is_told_once_at_each_end() {
        let jobs = tempfile::tempdir().unwrap();
        let lease = samples::lease("r1", Phase::Plan);
        let directory =
            JobDirectory::create(jobs.path(), &lease, &samples::spec(), &samples::settings())
                .unwrap();
        let mut room = Room::of(&directory);
        let mut out = Vec::new();
        let mut print = |room: &mut Room, text: &str| {
            let before = out.len();
            out.extend_from_slice(text.as_bytes());
            room.look();
            room.hold(before, &mut out);
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
}
