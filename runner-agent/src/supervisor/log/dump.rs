//! The state that terraform prints when it can write it nowhere: it never enters the log.
//!
//! As a line of its JSON it is `{"@level":…,"@message":"Emergency state dump",…,"state":{…}}`; as
//! text it is the state over many lines. Either may be larger than memory and may end in the
//! middle. So it stays in `raw`, which is not punched behind the checkpoint, until its end is
//! known, and is copied from there; the checkpoint passes it only when the copy is synced. A
//! successor finds all of it again.

use std::fs::{self, File};
use std::io::{self, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;

use crate::job_directory::{JobDirectory, STATE_DUMP, create_private};

/// The state's own first fields are this near to the begin of the line.
pub(super) const HEAD: usize = 1024;

const BLOCK: usize = 64 * 1024;

/// A dump whose end has not been read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Open {
    /// Where in `raw` it begins.
    pub(super) start: u64,
    pub(super) form: Form,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// One line of terraform's JSON.
    Line,
    /// The state itself, indented; it ends with a line of `}` alone.
    Lines,
}

/// Tells by the begin of a line whether it is a dump.
pub(super) fn is_head(line: &[u8]) -> bool {
    let head = String::from_utf8_lossy(&line[..line.len().min(HEAD)]);
    let named = head.contains("\"@message\":\"Emergency state dump\"");
    let state = head.contains("\"state\":{");
    let fields = head.contains("\"lineage\":") && head.contains("\"serial\":");
    head.starts_with("{\"@level\"") && state && (named || fields)
}

/// Whether an indented state begins with these lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Begin {
    Yes,
    No,
    /// More must be read to tell.
    Perhaps,
}

pub(super) fn begins(text: &[u8]) -> Begin {
    let mut lines = text.split_inclusive(|byte| *byte == b'\n');
    for begin in ["{", "\"version\":", "\"terraform_version\":"] {
        let Some(line) = lines.next() else { return Begin::Perhaps };
        let whole = line.ends_with(b"\n");
        let line = line.trim_ascii();
        if begin == "{" && line != b"{" {
            return Begin::No;
        }
        if !line.starts_with(begin.as_bytes()) {
            let grows = !whole && begin.as_bytes().starts_with(line);
            return if grows { Begin::Perhaps } else { Begin::No };
        }
    }
    Begin::Yes
}

/// Copies a dump out of `raw`, durably. Answers the size of what was kept.
pub(super) fn keep(directory: &JobDirectory, raw: &File, dump: Open, end: u64) -> io::Result<u64> {
    let whole = dump.start..end;
    let range = match dump.form {
        Form::Line => state_in(raw, whole.clone())?.unwrap_or(whole),
        Form::Lines => whole,
    };
    let (draft, kept) = (directory.join("state-dump.new"), directory.join(STATE_DUMP));
    let mut file = create_private(&draft)?;
    each_block(raw, range.clone(), |_, block| file.write_all(block))?;
    file.sync_all()?;
    fs::rename(draft, kept)?;
    File::open(directory.path())?.sync_all()?;
    Ok(range.end - range.start)
}

fn each_block(
    raw: &File,
    range: Range<u64>,
    mut each: impl FnMut(u64, &[u8]) -> io::Result<()>,
) -> io::Result<()> {
    let mut block = vec![0u8; BLOCK];
    let mut at = range.start;
    while at < range.end {
        let wanted = usize::try_from(range.end - at).unwrap_or(BLOCK).min(BLOCK);
        let read = raw.read_at(&mut block[..wanted], at)?;
        if read == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        each(at, &block[..read])?;
        at += read as u64;
    }
    Ok(())
}

/// Finds the value of the line's own field `state`: to the end of the line, if it was cut.
fn state_in(raw: &File, line: Range<u64>) -> io::Result<Option<Range<u64>>> {
    let mut scan = Scan::default();
    each_block(raw, line.clone(), |at, block| {
        for (offset, byte) in block.iter().enumerate() {
            scan.next(*byte, at + offset as u64);
        }
        Ok(())
    })?;
    Ok(scan.start.map(|start| start..scan.end.unwrap_or(line.end)))
}

/// Reads JSON byte by byte, only as far as strings and nesting go.
#[derive(Debug, Default)]
struct Scan {
    depth: usize,
    in_string: bool,
    escaped: bool,
    /// The newest string at the depth of the line's own fields; short ones are enough.
    string: Vec<u8>,
    /// `"state"` and a colon have been read.
    named: bool,
    start: Option<u64>,
    end: Option<u64>,
}

impl Scan {
    fn next(&mut self, byte: u8, at: u64) {
        if self.end.is_some() {
            return;
        }
        if self.in_string {
            match byte {
                _ if self.escaped => self.escaped = false,
                b'\\' => self.escaped = true,
                b'"' => self.in_string = false,
                byte if self.depth == 1 && self.string.len() < 16 => self.string.push(byte),
                _ => {}
            }
            return;
        }
        match byte {
            b'"' => {
                self.in_string = true;
                self.string.clear();
            }
            b'{' | b'[' => {
                if self.named && self.start.is_none() && self.depth == 1 {
                    self.start = Some(at);
                }
                self.depth += 1;
            }
            b'}' | b']' => {
                self.depth = self.depth.saturating_sub(1);
                if self.depth == 1 && self.start.is_some() {
                    self.end = Some(at + 1);
                }
            }
            b':' if self.depth == 1 => self.named = self.string == b"state",
            b',' if self.depth == 1 => self.named = false,
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_over_many_lines_is_known_by_its_begin() {
        for (text, expect) in [
            ("{\n  \"version\": 4,\n  \"terraform_version\": \"1\",\n", Begin::Yes),
            ("{\n  \"version\": 4,\n  \"terraf", Begin::Perhaps),
            ("{\n  \"vers", Begin::Perhaps),
            ("{\n", Begin::Perhaps),
            ("{\n  \"other\": 4,\n", Begin::No),
            ("{\n  \"version\": 4,\n  \"other\": 4,\n", Begin::No),
            ("{\"version\": 4,\n", Begin::No),
            ("text\n", Begin::No),
        ] {
            assert_eq!(begins(text.as_bytes()), expect, "{text}");
        }
    }

    #[test]
    fn the_state_is_found_in_its_line_whatever_stands_around_it() {
        for (line, expect) in [
            (
                r#"{"@message":"x","state":{"a":"}\"","b":[{}]},"type":"log"}"#,
                r#"{"a":"}\"","b":[{}]}"#,
            ),
            (r#"{"x":{"state":{"no":1}},"y":"state","state" : {"a":1}}"#, r#"{"a":1}"#),
            (r#"{"@message":"x","state":{"a":"cut in the mi"#, r#"{"a":"cut in the mi"#),
            (r#"{"@message":"x"}"#, r#"{"@message":"x"}"#),
        ] {
            let jobs = tempfile::tempdir().unwrap();
            let path = jobs.path().join("raw");
            fs::write(&path, line).unwrap();
            let raw = File::open(&path).unwrap();
            let directory = JobDirectory::open(jobs.path());
            let dump = Open { start: 0, form: Form::Line };
            let size = keep(&directory, &raw, dump, line.len() as u64).unwrap();
            let kept = fs::read_to_string(directory.join(STATE_DUMP));
            assert_eq!(kept.unwrap(), expect);
            assert_eq!(size, expect.len() as u64);
        }
    }
}
