//! From `raw`, which terraform writes, to `log`, which is canonical.
//!
//! One thread owns both files. It reads `raw` every few milliseconds, cuts it at line ends,
//! turns each line into its canonical form (`log/line.rs`), appends to `log`, syncs, and then
//! notes in `checkpoint` how much of `raw` became how much of `log`. Only after that is the new
//! length told. A successor cuts `log` back to the checkpoint and goes on from there, so told
//! bytes never change and no byte of `raw` is lost or used twice. What lies far enough behind
//! the checkpoint is punched out of `raw`, which stays small however much terraform prints.
//!
//! What is printed beyond the cap is read and left out, and one line says so; a part of the cap is
//! kept for lines of ours, which tell how the job ended. A state that terraform prints because it
//! can write it nowhere goes to a file of its own (`log/dump.rs`).
//!
//! A spool or a disk that is nearly full has the output left out (`log/room.rs`). One that is full stops this
//! thread's progress, not terraform's: it cuts back to the checkpoint and tries again.

mod checkpoint;
#[cfg(test)]
mod chunks;
mod dump;
mod line;
mod room;
#[cfg(test)]
mod tests;
mod writer;

use std::io;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread;

use secrecy::SecretString;
use serde_json::Value;
use tokio::sync::{oneshot, watch};

use self::writer::Writer;
use super::mask::Masker;
use crate::clock;
use crate::job_directory::JobDirectory;
use crate::spool;

pub(crate) use self::line::LONGEST as LONGEST_LINE;
pub(super) use self::line::plain;

/// How much a log takes, in bytes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    pub(super) cap: u64,
    /// Of the host: its spool and its disk.
    pub(super) host: spool::Limits,
}

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

/// A line of ours.
enum Own {
    /// What people must hear: it has a part of the cap for itself.
    Said(Value),
    /// From a program's output: held to what terraform's is.
    Printed(Value),
}

enum Command {
    Own(Vec<Own>),
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
        limits: Limits,
    ) -> Result<Self, Error> {
        let mut writer = Writer::open(directory, masker, told, limits).map_err(Error::Open)?;
        let (commands, inbox) = sync_channel(64);
        thread::Builder::new()
            .name("log".into())
            .spawn(move || writer.run(&inbox))
            .map_err(Error::Open)?;
        Ok(Self { commands })
    }

    /// Appends a line of ours behind what terraform has written so far.
    pub(super) fn own(&self, kind: &str, level: &str, message: &str, more: Value) {
        self.send(Command::Own(vec![Own::Said(own_line(kind, level, message, more))]));
    }

    /// Appends a text of several lines, as far as the log takes terraform's output.
    pub(super) fn own_text(&self, kind: &str, text: &str) {
        let lines = text.lines().flat_map(|line| pieces(line, 1 << 15));
        let lines = lines.map(|line| own_line(kind, "info", &line::plain(line), Value::Null));
        self.send(Command::Own(lines.map(Own::Printed).collect()));
    }

    /// Appends lines that a program of the operator's has printed, as far as the log takes
    /// terraform's output.
    pub(super) fn printed(&self, kind: &str, lines: &[String], more: &Value) {
        let line = |text: &String| own_line(kind, "info", &line::plain(text), more.clone());
        self.send(Command::Own(lines.iter().map(line).map(Own::Printed).collect()));
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
