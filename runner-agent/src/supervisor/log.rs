//! From `raw`, which terraform writes, to `log`, which is canonical.
//!
//! One thread owns both files. It reads `raw` every few milliseconds, cuts it at line ends,
//! turns each line into its canonical form (`log/line.rs`), appends to `log`, syncs, and then
//! notes in `checkpoint` how much of `raw` became how much of `log`. Only after that is the new
//! length told. A successor cuts `log` back to the checkpoint and goes on from there, so told
//! bytes never change and no byte of `raw` is lost or used twice. What lies far enough behind
//! the checkpoint is punched out of `raw`, which stays small however much terraform prints.
//!
//! What terraform prints beyond the cap is read and left out, and one line says so; a part of the
//! cap is kept for lines of ours, which tell how the job ended. A state that terraform prints
//! because it can write it nowhere goes to a file of its own (`log/dump.rs`).
//!
//! A full disk stops this thread's progress, not terraform's: it cuts back to the checkpoint and
//! tries again with the next tick.

mod checkpoint;
#[cfg(test)]
mod chunks;
mod dump;
mod line;
mod room;

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread;
use std::time::Duration;

use rustix::fs::{FallocateFlags, fallocate};
use secrecy::SecretString;
use serde_json::Value;
use tokio::sync::{oneshot, watch};

use self::checkpoint::{Checkpoint, Position};
use self::line::Canonical;
use super::mask::Masker;
use crate::clock;
use crate::job_directory::{Error as DirectoryError, JobDirectory, STATE_DUMP};

pub(crate) use self::line::LONGEST as LONGEST_LINE;
pub(super) use self::line::plain;

const TICK: Duration = Duration::from_millis(10);

/// A line without an end is cut when it has grown this long.
const LONGEST_RAW_LINE: usize = 1 << 20;

/// The same for what looks like terraform's JSON: its outputs are one line.
const LONGEST_RAW_JSON: usize = 16 << 20;

/// Read at once, and punched at once.
const BLOCK: usize = 1 << 20;

#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("open the log")]
    Open(#[source] io::Error),
    #[error("go on with the log: its thread has ended")]
    Gone,
}

/// Handle of the thread. Dropping the last one ends it.
#[derive(Debug, Clone)]
pub(super) struct Log {
    commands: SyncSender<Command>,
}

enum Command {
    Own(Vec<Value>),
    Mask(Vec<SecretString>),
    LeaveOut,
    Drain(oneshot::Sender<Drained>),
}

/// What the thread knows when all of `raw` has become `log`.
#[derive(Debug)]
pub(super) struct Drained {
    pub(super) length: u64,
    /// The last line of type `outputs`, masked.
    pub(super) outputs: Option<Value>,
    /// Whether terraform printed its state, which is kept in the job directory.
    pub(super) dumped: bool,
}

impl Log {
    /// Opens the log or goes on with it. The length is told as it becomes durable.
    pub(super) fn start(
        directory: &JobDirectory,
        masker: Masker,
        told: watch::Sender<u64>,
        cap: u64,
    ) -> Result<Self, Error> {
        let mut writer = Writer::open(directory, masker, told, cap).map_err(Error::Open)?;
        let (commands, inbox) = sync_channel(64);
        thread::Builder::new()
            .name("log".into())
            .spawn(move || writer.run(&inbox))
            .map_err(Error::Open)?;
        Ok(Self { commands })
    }

    /// Appends a line of ours behind what terraform has written so far.
    pub(super) fn own(&self, kind: &str, level: &str, message: &str, more: Value) {
        self.send(Command::Own(vec![own_line(kind, level, message, more)]));
    }

    /// Appends a text of several lines as lines of ours.
    pub(super) fn own_text(&self, kind: &str, text: &str) {
        let lines = text.lines().flat_map(|line| pieces(line, 1 << 15));
        let lines = lines.map(|line| own_line(kind, "info", &line::plain(line), Value::Null));
        self.send(Command::Own(lines.collect()));
    }

    /// Appends lines that a program of the operator's has printed.
    pub(super) fn printed(&self, kind: &str, lines: &[String], more: &Value) {
        let line = |text: &String| own_line(kind, "info", &line::plain(text), more.clone());
        self.send(Command::Own(lines.iter().map(line).collect()));
    }

    /// Masks these too, from the next line on.
    pub(super) fn mask(&self, secrets: Vec<SecretString>) {
        self.send(Command::Mask(secrets));
    }

    /// Leaves out what is in `raw` and not in the log yet, and says so: its secrets are not known.
    pub(super) fn leave_out_the_rest(&self) {
        self.send(Command::LeaveOut);
    }

    /// Waits until everything written so far is in the log. A last line without an end counts.
    pub(super) async fn drain(&self) -> Result<Drained, Error> {
        let (answer, drained) = oneshot::channel();
        self.send(Command::Drain(answer));
        drained.await.map_err(|_| Error::Gone)
    }

    fn send(&self, command: Command) {
        // The thread ends only after its last handle, or by a panic, which `drain` reports.
        let _ = self.commands.send(command);
    }
}

fn own_line(kind: &str, level: &str, message: &str, more: Value) -> Value {
    let mut line = serde_json::json!({
        "@level": level,
        "@message": message,
        "@module": "latchkey",
        "@timestamp": clock::now().to_string(),
        "type": kind,
    });
    if let (Some(line), Value::Object(more)) = (line.as_object_mut(), more) {
        line.extend(more);
    }
    line
}

fn pieces(line: &str, longest: usize) -> Vec<&str> {
    let mut pieces = Vec::new();
    let mut rest = line;
    loop {
        let mut end = rest.len().min(longest);
        while !rest.is_char_boundary(end) {
            end -= 1;
        }
        pieces.push(&rest[..end]);
        rest = &rest[end..];
        if rest.is_empty() {
            return pieces;
        }
    }
}

struct Writer {
    directory: JobDirectory,
    raw: File,
    log: File,
    checkpoint: Checkpoint,
    at: Position,
    /// Where the next bytes are read; `at.raw` plus what is held.
    read_to: u64,
    /// The begin of a line whose end has not been read.
    held: Vec<u8>,
    /// Inside a line that had to be cut.
    in_cut_line: bool,
    /// Inside a state that terraform prints; its bytes are not held.
    dump: Option<dump::Open>,
    /// Lines that begin before this place of `raw` are left out.
    muted_until: u64,
    own: Vec<Value>,
    punched: u64,
    masker: Masker,
    outputs: Option<Value>,
    cap: u64,
    /// Whether terraform's output is being left out.
    capped: bool,
    /// Whether the line that says so is durable.
    gap_is_told: bool,
    /// What is left out while this host has no room.
    room: room::Room,
    told: watch::Sender<u64>,
}

impl Writer {
    fn open(
        directory: &JobDirectory,
        masker: Masker,
        told: watch::Sender<u64>,
        cap: u64,
    ) -> io::Result<Self> {
        let private = |name: &str| {
            let mut options = OpenOptions::new();
            options.read(true).write(true).create(true).truncate(false).mode(0o600);
            options.open(directory.join(name))
        };
        let raw = private("raw")?;
        let log = private("log")?;
        let (checkpoint, at) = Checkpoint::open(private("checkpoint")?)?;
        // What lies behind the checkpoint was never told.
        log.set_len(at.log)?;
        directory.sync().map_err(|error| match error {
            DirectoryError::Io { source, .. } => source,
            other @ DirectoryError::Record { .. } => io::Error::other(other),
        })?;
        told.send_replace(at.log);
        Ok(Self {
            directory: directory.clone(),
            raw,
            log,
            checkpoint,
            at,
            read_to: at.raw,
            held: Vec::new(),
            in_cut_line: false,
            dump: None,
            muted_until: 0,
            own: Vec::new(),
            punched: at.raw,
            masker,
            outputs: None,
            cap,
            capped: false,
            gap_is_told: false,
            room: room::Room::of(directory),
            told,
        })
    }

    fn run(&mut self, inbox: &Receiver<Command>) {
        let mut drains: Vec<oneshot::Sender<Drained>> = Vec::new();
        loop {
            match inbox.recv_timeout(TICK) {
                // Ours goes behind what terraform wrote before: the raw lines come first.
                Ok(Command::Own(lines)) => {
                    self.tick(false);
                    self.own.extend(lines);
                }
                Ok(Command::Mask(secrets)) => {
                    secrets.iter().for_each(|secret| self.masker.add(secret));
                }
                Ok(Command::LeaveOut) => self.leave_out(),
                Ok(Command::Drain(answer)) => drains.push(answer),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    self.tick(true);
                    return;
                }
            }
            if self.tick(!drains.is_empty()) {
                for answer in drains.drain(..) {
                    let drained = Drained {
                        length: self.at.log,
                        outputs: self.outputs.clone(),
                        dumped: self.directory.join(STATE_DUMP).exists(),
                    };
                    let _ = answer.send(drained);
                }
            }
        }
    }

    fn leave_out(&mut self) {
        let length = self.raw.metadata().map_or(self.at.raw, |metadata| metadata.len());
        let bytes = length.saturating_sub(self.at.raw);
        if bytes > 0 {
            let message = format!("{bytes} bytes of output are left out: they could not be masked");
            self.own.push(own_line("gap", "warn", &message, serde_json::json!({"bytes": bytes})));
        }
        // It is still read: a state may be in it.
        self.muted_until = length;
    }

    /// Brings the log up to `raw`, and says whether that worked. After a failure everything
    /// stands as at the last checkpoint.
    fn tick(&mut self, to_the_end: bool) -> bool {
        match self.advance(to_the_end) {
            Ok(()) => true,
            Err(error) => {
                tracing::warn!(%error, "failed to write the log; it is tried again");
                let _ = self.log.set_len(self.at.log);
                self.capped = self.gap_is_told;
                self.room.roll_back();
                self.read_to = self.at.raw;
                self.held.clear();
                self.in_cut_line = false;
                self.dump = None;
                false
            }
        }
    }

    fn advance(&mut self, to_the_end: bool) -> io::Result<()> {
        let mut block = vec![0u8; 64 * 1024];
        loop {
            self.room.look();
            let mut out = Vec::new();
            let mut ended = false;
            while out.len() < BLOCK {
                let read = self.raw.read_at(&mut block, self.read_to)?;
                if read == 0 {
                    ended = true;
                    break;
                }
                self.read_to += read as u64;
                self.held.extend_from_slice(&block[..read]);
                self.lines(false, &mut out)?;
            }
            if ended && to_the_end {
                self.lines(true, &mut out)?;
                self.room.end(&mut out);
            }
            let raw = match &self.dump {
                Some(dump) => dump.start,
                None => self.read_to - self.held.len() as u64,
            };
            if ended {
                for line in &self.own {
                    let before = out.len();
                    line::own(line, &self.masker, &mut out);
                    if self.at.log + out.len() as u64 > self.cap {
                        out.truncate(before);
                    }
                }
            }
            self.commit(raw, &out)?;
            if ended {
                self.own.clear();
                return Ok(());
            }
        }
    }

    /// Takes the lines that are whole; `last` says that nothing follows what is held.
    fn lines(&mut self, last: bool, out: &mut Vec<u8>) -> io::Result<()> {
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
                let form = if rest.starts_with(b"{\"") { dump::Form::Line } else { dump::Form::Lines };
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
            line::piece(&rest[..cut], self.in_cut_line, &self.masker, clock::now(), out);
            self.hold_to_the_cap(before, at, out);
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

    /// Keeps terraform's lines since `before` within the cap, less what is kept for ours.
    fn hold_to_the_cap(&mut self, before: usize, at: u64, out: &mut Vec<u8>) {
        if at < self.muted_until {
            out.truncate(before);
            return;
        }
        if self.room.hold(before, out) {
            return;
        }
        let limit = self.cap - (self.cap / 16).min(BLOCK as u64);
        if !self.capped && self.at.log + out.len() as u64 <= limit {
            return;
        }
        out.truncate(before);
        if !self.capped {
            self.capped = true;
            let message = format!(
                "the log has reached {limit} bytes: what terraform prints from here on is left out"
            );
            let more = serde_json::json!({"limit": limit});
            line::own(&own_line("gap", "warn", &message, more), &self.masker, out);
        }
    }

    fn line(&mut self, bytes: &[u8], at: u64, out: &mut Vec<u8>) -> io::Result<()> {
        if latchkey_failpoint::defect("line.dropped") {
            return Ok(());
        }
        let before = out.len();
        if std::mem::take(&mut self.in_cut_line) {
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
        self.hold_to_the_cap(before, at, out);
        Ok(())
    }

    fn commit(&mut self, raw: u64, out: &[u8]) -> io::Result<()> {
        if out.is_empty() && raw == self.at.raw {
            return Ok(());
        }
        self.log.write_all_at(out, self.at.log)?;
        self.log.flush()?;
        self.log.sync_data()?;
        let to = Position { raw, log: self.at.log + out.len() as u64 };
        self.checkpoint.write(to)?;
        self.at = to;
        self.gap_is_told = self.capped;
        self.room.keep();
        self.told.send_replace(to.log);
        self.punch();
        Ok(())
    }

    fn punch(&mut self) {
        let to = self.at.raw / 4096 * 4096;
        if to.saturating_sub(self.punched) >= BLOCK as u64 {
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            let from = self.punched / 4096 * 4096;
            // A filesystem without holes keeps the bytes: nothing else changes.
            let _ = fallocate(&self.raw, flags, from, to - from);
            self.punched = to;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;
    use crate::job::Phase;
    use crate::job_directory::tests as samples;

    fn directory() -> (tempfile::TempDir, JobDirectory) {
        let jobs = tempfile::tempdir().unwrap();
        let lease = samples::lease("r1", Phase::Plan);
        let directory =
            JobDirectory::create(jobs.path(), &lease, &samples::spec(), &samples::settings())
                .unwrap();
        (jobs, directory)
    }

    fn start(
        directory: &JobDirectory,
        masker: Masker,
        told: watch::Sender<u64>,
    ) -> Result<Log, Error> {
        Log::start(directory, masker, told, 256 << 20)
    }

    fn append(directory: &JobDirectory, bytes: &[u8]) {
        let path = directory.join("raw");
        OpenOptions::new().append(true).create(true).open(path).unwrap().write_all(bytes).unwrap();
    }

    fn messages(directory: &JobDirectory) -> Vec<String> {
        let log = std::fs::read_to_string(directory.join("log")).unwrap();
        log.lines()
            .map(|line| {
                let line: Value = serde_json::from_str(line).unwrap();
                line["@message"].as_str().unwrap().to_owned()
            })
            .collect()
    }

    #[tokio::test]
    async fn lines_are_held_until_they_end_and_ours_go_behind() {
        let (_jobs, directory) = directory();
        let (told, mut length) = watch::channel(0);
        let log = start(&directory, Masker::default(), told).unwrap();
        append(&directory, b"one\ntw");
        log.own("phase", "info", "between", Value::Null);
        let ours_is_in = |_: &u64| messages(&directory).contains(&"between".to_owned());
        length.wait_for(ours_is_in).await.unwrap();
        append(&directory, b"o\nthree");
        let drained = log.drain().await.unwrap();
        assert_eq!(messages(&directory), ["one", "between", "two", "three"]);
        assert_eq!(drained.length, *length.borrow());
    }

    #[tokio::test]
    async fn a_successor_goes_on_at_the_checkpoint() {
        let (_jobs, directory) = directory();
        let (length_to, mut length) = watch::channel(0);
        let first = start(&directory, Masker::default(), length_to).unwrap();
        append(&directory, b"one\n");
        let told = first.drain().await.unwrap().length;
        drop(first);
        // Its thread has ended when nobody tells the length any more.
        while length.changed().await.is_ok() {}
        // As if the first had died between writing the log and the checkpoint.
        let path = directory.join("log");
        let mut log = OpenOptions::new().append(true).open(&path).unwrap();
        log.write_all(b"half a li").unwrap();
        append(&directory, b"two\n");
        let before = std::fs::read(&path).unwrap()[..told as usize].to_vec();
        let second = start(&directory, Masker::default(), watch::channel(0).0).unwrap();
        second.drain().await.unwrap();
        assert_eq!(messages(&directory), ["one", "two"]);
        assert!(std::fs::read(&path).unwrap().starts_with(&before));
    }

    #[tokio::test]
    async fn a_flood_leaves_raw_small_and_the_log_whole() {
        let (_jobs, directory) = directory();
        let log = start(&directory, Masker::default(), watch::channel(0).0).unwrap();
        for n in 0..40 {
            let text: String =
                (0..1000).map(|m| format!("{n}-{m} {}\n", "x".repeat(100))).collect();
            append(&directory, text.as_bytes());
        }
        log.drain().await.unwrap();
        let found = messages(&directory);
        assert_eq!(found.len(), 40_000);
        assert!(found[12_345].starts_with("12-345 "));
        let raw = std::fs::metadata(directory.join("raw")).unwrap();
        assert!(raw.blocks() * 512 < raw.len() / 2, "{} of {}", raw.blocks() * 512, raw.len());
    }

    #[tokio::test]
    async fn beyond_the_cap_only_our_lines_are_taken_and_raw_is_read_on() {
        let (_jobs, directory) = directory();
        let cap = 1 << 20;
        let told = watch::channel(0).0;
        let log = Log::start(&directory, Masker::default(), told, cap).unwrap();
        for _ in 0..20 {
            append(&directory, format!("{}\n", "x".repeat(100)).repeat(1000).as_bytes());
        }
        append(&directory, "y".repeat(3 << 20).as_bytes());
        let outputs =
            r#"{"@level":"info","@message":"o","@module":"t","type":"outputs","outputs":{}}"#;
        append(&directory, format!("\n{outputs}\n").as_bytes());
        log.drain().await.unwrap();
        log.own("diagnostic", "error", "how it ended", Value::Null);
        let drained = log.drain().await.unwrap();
        assert!(drained.length <= cap && drained.length > cap / 2, "{}", drained.length);
        assert!(drained.outputs.is_some());
        let text = std::fs::read_to_string(directory.join("log")).unwrap();
        assert_eq!(text.matches(r#""type":"gap""#).count(), 1);
        let found = messages(&directory);
        assert!(found[found.len() - 2].contains("left out"), "{:?}", found[found.len() - 2]);
        assert_eq!(found[found.len() - 1], "how it ended");
    }

    #[tokio::test]
    async fn a_line_without_end_is_cut_and_its_secrets_are_masked() {
        let (_jobs, directory) = directory();
        let mut masker = Masker::default();
        masker.add(&SecretString::from("canary-canary"));
        let log = start(&directory, masker, watch::channel(0).0).unwrap();
        let text = "canary-canary ".repeat(200_000);
        append(&directory, text.as_bytes());
        log.drain().await.unwrap();
        let lines = std::fs::read_to_string(directory.join("log")).unwrap();
        assert!(lines.lines().all(|line| line.len() < LONGEST_LINE), "a line is too long");
        assert_eq!(messages(&directory).concat(), "*** ".repeat(200_000));
    }
}
