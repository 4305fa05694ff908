//! The thread that owns both files: it reads, commits, punches, and takes what others say.

mod assembly;

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use rustix::fs::{FallocateFlags, fallocate};
use serde_json::Value;
use tokio::sync::{oneshot, watch};

use super::super::mask::Masker;
use super::checkpoint::{Checkpoint, Position};
use super::room::Room;
use super::{Command, Drained, Limits, Own, dump, line, own_line};
use crate::job_directory::{Error as DirectoryError, JobDirectory, STATE_DUMP};

const TICK: Duration = Duration::from_millis(10);

/// How long nothing is tried after a failure.
const REST: Duration = Duration::from_secs(1);

/// Written at once, and punched at once.
const BLOCK: usize = 1 << 20;

/// Read at once.
const MOST_AT_ONCE: u64 = 16 << 20;

/// The lines of one line of `raw` are not longer than this together.
const LONGEST_LINES: u64 = 8 << 20;

pub(super) struct Writer {
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
    own: Vec<Own>,
    punched: u64,
    masker: Masker,
    outputs: Option<Value>,
    cap: u64,
    /// Whether what is printed is being left out.
    capped: bool,
    /// Whether the line that says so is durable.
    gap_is_told: bool,
    /// What is left out while this host has no room.
    room: Room,
    failing: Option<Failing>,
    told: watch::Sender<u64>,
}

/// Why the files cannot be written at this moment.
struct Failing {
    reason: String,
    next: Instant,
}

impl Writer {
    pub(super) fn open(
        directory: &JobDirectory,
        masker: Masker,
        told: watch::Sender<u64>,
        Limits { cap, host }: Limits,
    ) -> io::Result<Self> {
        let private = |name: &str| {
            let mut options = OpenOptions::new();
            options.read(true).write(true).create(true).truncate(false).mode(0o600);
            options.open(directory.join(name))
        };
        let raw = private("raw")?;
        let log = private("log")?;
        let written = log.metadata()?.len();
        let (checkpoint, at) = Checkpoint::open(private("checkpoint")?, written)?;
        // What lies behind the checkpoint was never told.
        log.set_len(at.log)?;
        directory.sync().map_err(|error| match error {
            DirectoryError::Io { source, .. } => source,
            other @ DirectoryError::Record { .. } => io::Error::other(other),
        })?;
        told.send_replace(at.log);
        let capped = was_capped(&log, limit_of(cap), at.log)?;
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
            capped,
            gap_is_told: capped,
            room: Room::of(directory, host, at.left_out),
            failing: None,
            told,
        })
    }

    pub(super) fn run(&mut self, inbox: &Receiver<Command>) {
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
                    self.failing = None;
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

    pub(super) fn leave_out(&mut self) {
        let length = self.raw.metadata().map_or(self.at.raw, |metadata| metadata.len());
        let bytes = length.saturating_sub(self.at.raw);
        if bytes > 0 {
            let message = format!("{bytes} bytes of output are left out: they could not be masked");
            let line = own_line("gap", "warn", &message, serde_json::json!({"bytes": bytes}));
            self.own.push(Own::Said(line));
        }
        // It is still read: a state may be in it.
        self.muted_until = length;
    }

    /// Brings the log up to `raw`, and says whether that worked. After a failure everything
    /// stands as at the last checkpoint, and nothing is tried for a while.
    pub(super) fn tick(&mut self, to_the_end: bool) -> bool {
        if self.failing.as_ref().is_some_and(|failing| Instant::now() < failing.next) {
            return false;
        }
        match self.advance(to_the_end) {
            Ok(()) => {
                if self.failing.take().is_some() {
                    tracing::info!("the log is written again");
                }
                true
            }
            Err(error) => {
                let reason = error.to_string();
                // What is said lands on the same disk, perhaps: once is enough.
                if self.failing.as_ref().is_none_or(|failing| failing.reason != reason) {
                    tracing::warn!(%error, "failed to write the log; it is tried again");
                }
                self.failing = Some(Failing { reason, next: Instant::now() + REST });
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
            let has_news = !self.own.is_empty() || self.raw.metadata()?.len() > self.read_to;
            self.room.look(has_news);
            let mut out = Vec::new();
            let mut ended = false;
            let from = self.read_to;
            // What is left out makes no output, and shall be punched all the same.
            while out.len() < BLOCK && self.read_to - from < MOST_AT_ONCE {
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
            let own = if ended { self.append_own(&mut out) } else { 0 };
            if ended && to_the_end && own == self.own.len() {
                self.room.end(&mut out);
            }
            self.commit(raw, &out)?;
            self.own.drain(..own);
            if ended && self.own.is_empty() {
                return Ok(());
            }
        }
    }

    /// Appends lines of ours, and answers how many of them are done with.
    fn append_own(&mut self, out: &mut Vec<u8>) -> usize {
        let lines = std::mem::take(&mut self.own);
        let mut done = 0;
        for own in &lines {
            if out.len() >= BLOCK {
                break;
            }
            done += 1;
            let before = out.len();
            match own {
                Own::Said(line) => {
                    line::own(line, &self.masker, out);
                    if self.at.log + out.len() as u64 > self.cap {
                        out.truncate(before);
                    }
                }
                Own::Printed(line) => {
                    line::own(line, &self.masker, out);
                    let length = (out.len() - before) as u64;
                    self.hold_to_the_cap(before, u64::MAX, length, out);
                }
            }
        }
        self.own = lines;
        done
    }

    fn commit(&mut self, raw: u64, out: &[u8]) -> io::Result<()> {
        if out.is_empty() && raw == self.at.raw {
            return Ok(());
        }
        self.log.write_all_at(out, self.at.log)?;
        self.log.flush()?;
        self.log.sync_data()?;
        let (log, left_out) = (self.at.log + out.len() as u64, self.room.left_out());
        let to = Position { raw, log, left_out };
        self.checkpoint.write(to)?;
        self.at = to;
        self.gap_is_told = self.capped;
        self.room.keep(out.len() as u64);
        self.told.send_replace(to.log);
        self.punch();
        Ok(())
    }

    #[cfg(test)]
    pub(super) fn replace_log(&mut self, log: File) -> File {
        std::mem::replace(&mut self.log, log)
    }

    #[cfg(test)]
    pub(super) fn end_rest(&mut self) {
        self.failing = None;
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

/// Answers where the part of the cap begins that is kept for lines of ours.
fn limit_of(cap: u64) -> u64 {
    cap - (cap / 16).min(BLOCK as u64)
}

/// Tells whether a predecessor has said that the log is at its limit.
fn was_capped(log: &File, limit: u64, length: u64) -> io::Result<bool> {
    let from = limit.saturating_sub(LONGEST_LINES);
    let mut tail = vec![0u8; usize::try_from(length.saturating_sub(from)).unwrap_or(0)];
    log.read_exact_at(&mut tail, from.min(length))?;
    // Whatever else calls itself ours in there is wrapped.
    let is_gap = |line: &[u8]| {
        let line: Value = serde_json::from_slice(line).unwrap_or_default();
        line["@module"] == "latchkey" && line["type"] == "gap" && line["limit"].is_u64()
    };
    Ok(tail.split(|byte| *byte == b'\n').any(is_gap))
}
