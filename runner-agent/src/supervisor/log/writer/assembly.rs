//! From the bytes of `raw` to lines, and which of them the log takes.

use std::io;

use super::super::line::Canonical;
use super::super::{dump, line, own_line};
use super::{BLOCK, Writer, limit_of};
use crate::clock;

/// A line without an end is cut when it has grown this long.
const LONGEST_RAW_LINE: usize = 1 << 20;

/// The same for what looks like terraform's JSON: its outputs are one line.
const LONGEST_RAW_JSON: usize = 16 << 20;

impl Writer {
    /// Takes the lines that are whole; `last` says that nothing follows what is held.
    pub(super) fn lines(&mut self, last: bool, out: &mut Vec<u8>) -> io::Result<()> {
        let held = std::mem::take(&mut self.held);
        let mut rest = held.as_slice();
        loop {
            let at = self.read_to - rest.len() as u64;
            let end = rest.iter().position(|byte| *byte == b'\n');
            if let Some(open) = self.dump {
                let Some(end) = end.or(last.then_some(rest.len())) else {
                    // A part of a line is needed only to tell the last one of many.
                    let needed = open.form == dump::Form::Lines && rest.len() < BLOCK;
                    self.held = if needed { rest.to_vec() } else { Vec::new() };
                    return Ok(());
                };
                let is_last = open.form == dump::Form::Line || &rest[..end] == b"}";
                if is_last || (last && end == rest.len()) {
                    self.keep_dump(open, at + end as u64, out)?;
                    if last && end == rest.len() {
                        return Ok(());
                    }
                }
                rest = &rest[end + 1..];
                continue;
            }
            if !self.in_cut_line && self.begins_dump(rest, end, last) {
                let form =
                    if rest.starts_with(b"{\"") { dump::Form::Line } else { dump::Form::Lines };
                self.dump = Some(dump::Open { start: at, form });
                continue;
            }
            let Some(end) = end else { break };
            let waits = !last && rest[..end].trim_ascii() == b"{";
            if waits && dump::begins(rest) == dump::Begin::Perhaps {
                break;
            }
            self.line(&rest[..end], at, out)?;
            rest = &rest[end + 1..];
        }
        let json = !self.in_cut_line && rest.first() == Some(&b'{');
        let longest = if json { LONGEST_RAW_JSON } else { LONGEST_RAW_LINE };
        while rest.len() > longest + self.masker.longest() {
            let mut cut = self.masker.cut(rest, LONGEST_RAW_LINE).max(4);
            // Not inside a character.
            while cut > 1 && rest[cut] & 0xc0 == 0x80 {
                cut -= 1;
            }
            let (before, at) = (out.len(), self.read_to - rest.len() as u64);
            if self.takes_nothing(at) {
                self.pass_over(at, cut as u64, out);
            } else {
                line::piece(&rest[..cut], self.in_cut_line, &self.masker, clock::now(), out);
                self.hold_to_the_cap(before, at, cut as u64, out);
            }
            self.in_cut_line = true;
            rest = &rest[cut..];
        }
        if last && !rest.is_empty() {
            self.line(rest, self.read_to - rest.len() as u64, out)?;
            rest = &[];
        }
        self.held = rest.to_vec();
        Ok(())
    }

    /// Tells whether a dump begins here, as far as can be told by now.
    fn begins_dump(&self, rest: &[u8], end: Option<usize>, last: bool) -> bool {
        let known = end.is_some() || last || rest.len() >= dump::HEAD;
        let line = &rest[..end.unwrap_or(rest.len())];
        (known && dump::is_head(line)) || dump::begins(rest) == dump::Begin::Yes
    }

    fn keep_dump(&mut self, open: dump::Open, end: u64, out: &mut Vec<u8>) -> io::Result<()> {
        let size = dump::keep(&self.directory, &self.raw, open, end)?;
        self.dump = None;
        let message = format!(
            "terraform could write its state nowhere and printed it: {size} bytes are kept apart \
             from the log and go to quarantine"
        );
        let line = own_line("diagnostic", "error", &message, serde_json::json!({"bytes": size}));
        line::own(&line, &self.masker, out);
        Ok(())
    }

    /// Keeps what was printed since `before` within the cap, less what is kept for ours. `length`
    /// is what it was as it was printed.
    pub(super) fn hold_to_the_cap(
        &mut self,
        before: usize,
        at: u64,
        length: u64,
        out: &mut Vec<u8>,
    ) {
        if self.takes_nothing(at) {
            out.truncate(before);
            self.pass_over(at, length, out);
            return;
        }
        self.room.resume(before, out);
        let limit = limit_of(self.cap);
        if self.at.log + out.len() as u64 <= limit {
            return;
        }
        out.truncate(before);
        self.capped = true;
        let message =
            format!("the log has reached {limit} bytes: what is printed from here on is left out");
        let more = serde_json::json!({"limit": limit});
        line::own(&own_line("gap", "warn", &message, more), &self.masker, out);
    }

    fn takes_nothing(&self, at: u64) -> bool {
        at < self.muted_until || self.room.is_full() || self.capped
    }

    fn pass_over(&mut self, at: u64, length: u64, out: &mut Vec<u8>) {
        // Of the others it was said already.
        if at >= self.muted_until && !self.capped {
            self.room.leave_out(length, out);
        }
    }

    fn line(&mut self, bytes: &[u8], at: u64, out: &mut Vec<u8>) -> io::Result<()> {
        if latchkey_failpoint::defect("line.dropped") {
            return Ok(());
        }
        let (before, length) = (out.len(), bytes.len() as u64 + 1);
        let continues = std::mem::take(&mut self.in_cut_line);
        if self.takes_nothing(at) && (continues || !matters(bytes)) {
            // Without masking it: `raw` shall not grow faster than it is read.
            self.pass_over(at, length, out);
            return Ok(());
        }
        if continues {
            line::piece(bytes, true, &self.masker, clock::now(), out);
        } else {
            match line::canonical(bytes, &self.masker, clock::now(), out) {
                Canonical::Line => {}
                Canonical::Outputs(outputs) => self.outputs = outputs,
                Canonical::Dump => {
                    let open = dump::Open { start: at, form: dump::Form::Line };
                    return self.keep_dump(open, at + bytes.len() as u64, out);
                }
            }
        }
        self.hold_to_the_cap(before, at, length, out);
        Ok(())
    }
}

/// Tells whether a line may hold what is kept even if the log does not take it.
fn matters(line: &[u8]) -> bool {
    let has = |word: &[u8]| line.windows(word.len()).any(|part| part == word);
    line.starts_with(b"{") && (has(b"\"state\"") || has(b"\"outputs\""))
}
