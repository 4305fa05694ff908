//! A terraform that does nothing and says when it was started.
//!
//! It is this executable under the name `terraform`: a link to it, so that no shell stands
//! between the supervisor's `exec` and the first instruction that is timed. It appends a line
//! `NANOSECONDS RUN COMMAND` to `starts` in the directory that [`DIRECTORY`] names, and reads
//! there what its `plan` shall print.

use std::env;
use std::fmt::Write as _;
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use tempfile::TempDir;

use crate::clock::Moment;

/// Passed on by the runner.
const DIRECTORY: &str = "BENCH_STUB";

const NAME: &str = "terraform";

/// The length of a line of [`Script::Bulk`].
const LINE: usize = 200;

/// What `plan` prints before it ends.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Script {
    Nothing,
    /// This many lines, each with the moment at which it was printed.
    Ticks {
        count: usize,
        pause: Duration,
    },
    /// Lines of this many bytes together, once [`Stub::release`] was called.
    Bulk {
        bytes: usize,
    },
}

/// The stub's files.
#[derive(Debug)]
pub(crate) struct Stub {
    directory: TempDir,
}

/// One start of the stub.
#[derive(Debug)]
pub(crate) struct Start {
    pub(crate) at: Moment,
    pub(crate) run_id: String,
    pub(crate) command: String,
}

impl Stub {
    pub(crate) fn new() -> anyhow::Result<Self> {
        let made = tempfile::Builder::new().prefix("latchkey-stub-").tempdir();
        let directory = made.context("make the stub's directory")?;
        let stub = Self { directory };
        // Jobs write the one and must not write the other.
        for name in ["files", "program"] {
            fs::create_dir(stub.directory.path().join(name)).context("make a directory")?;
        }
        std::os::unix::fs::symlink(env::current_exe()?, stub.program()).context("link the stub")?;
        Ok(stub)
    }

    pub(crate) fn program(&self) -> PathBuf {
        self.directory.path().join("program").join(NAME)
    }

    fn files(&self) -> PathBuf {
        self.directory.path().join("files")
    }

    /// What the runner must pass on.
    pub(crate) fn environment(&self) -> (String, String) {
        (DIRECTORY.to_owned(), self.files().display().to_string())
    }

    pub(crate) fn play(&self, script: Script) -> anyhow::Result<()> {
        let _ = fs::remove_file(self.files().join("go"));
        let text = match script {
            Script::Nothing => "nothing".to_owned(),
            Script::Ticks { count, pause } => format!("ticks {count} {}", pause.as_micros()),
            Script::Bulk { bytes } => format!("bulk {bytes} 0"),
        };
        fs::write(self.files().join("script"), text).context("write the stub's script")
    }

    /// Lets a [`Script::Bulk`] print.
    pub(crate) fn release(&self) -> anyhow::Result<()> {
        fs::write(self.files().join("go"), "").context("release the stub")
    }

    /// Every start so far, in order.
    pub(crate) fn starts(&self) -> anyhow::Result<Vec<Start>> {
        let text = fs::read_to_string(self.files().join("starts"))
            .context("read when the stub was started")?;
        Ok(text.lines().filter_map(start).collect())
    }
}

fn start(line: &str) -> Option<Start> {
    let mut words = line.split(' ');
    Some(Start {
        at: Moment::parse(words.next()?)?,
        run_id: words.next()?.to_owned(),
        command: words.next()?.to_owned(),
    })
}

/// Finds the moment in a piece of a log that [`Script::Ticks`] made.
pub(crate) fn ticks(log: &str) -> impl Iterator<Item = Moment> {
    log.split("tick ").skip(1).filter_map(|rest| {
        let digits = rest.split(|c: char| !c.is_ascii_digit()).next()?;
        Moment::parse(digits)
    })
}

/// Is the stub, if this process was started under its name.
pub(crate) fn run_if_named() -> Option<ExitCode> {
    let program = PathBuf::from(env::args_os().next()?);
    if program.file_name()? != NAME {
        return None;
    }
    let now = Moment::now();
    Some(match act(now) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            anstream::eprintln!("the stub failed: {error}");
            ExitCode::FAILURE
        }
    })
}

fn act(now: Moment) -> io::Result<u8> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let command = arguments.first().map_or("", String::as_str);
    let directory = env::var_os(DIRECTORY).map(PathBuf::from);
    if let Some(directory) = &directory {
        note(directory, now, command)?;
    }
    let mut out = io::stdout().lock();
    match command {
        "version" => out.write_all(br#"{"terraform_version":"1.9.8"}"#)?,
        "show" if arguments.iter().any(|argument| argument == "-json") => {
            out.write_all(br#"{"format_version":"1.2","applyable":true}"#)?;
        }
        "show" => out.write_all(b"nothing\n")?,
        "plan" => {
            if let Some(directory) = &directory {
                print(directory, &mut out)?;
            }
            let saved = arguments.iter().find_map(|argument| argument.strip_prefix("-out="));
            fs::write(saved.unwrap_or("plan.bin"), "a saved plan")?;
            return Ok(2);
        }
        _ => {}
    }
    Ok(0)
}

fn note(directory: &Path, now: Moment, command: &str) -> io::Result<()> {
    let run = env::var("LATCHKEY_RUN_ID").unwrap_or_else(|_| "none".to_owned());
    let line = format!("{} {run} {command}\n", now.nanos());
    let mut starts = OpenOptions::new().create(true).append(true).open(directory.join("starts"))?;
    starts.write_all(line.as_bytes())
}

fn print(directory: &Path, out: &mut impl Write) -> io::Result<()> {
    let script = fs::read_to_string(directory.join("script")).unwrap_or_default();
    let words: Vec<&str> = script.split(' ').collect();
    let number = |at: usize| words.get(at).and_then(|word| word.parse().ok()).unwrap_or(0usize);
    match words.first() {
        Some(&"ticks") => {
            for _ in 0..number(1) {
                let line = line(&format!("tick {}", Moment::now().nanos()));
                out.write_all(line.as_bytes())?;
                out.flush()?;
                std::thread::park_timeout(Duration::from_micros(number(2) as u64));
            }
        }
        Some(&"bulk") => {
            while !directory.join("go").exists() {
                std::thread::park_timeout(Duration::from_millis(1));
            }
            let mut padded = String::new();
            let bare = line("").len();
            let _ = write!(padded, "{:x<1$}", "", LINE - bare);
            let line = line(&padded);
            out.write_all(line.repeat(number(1) / line.len() + 1).as_bytes())?;
        }
        Some(_) | None => {}
    }
    out.flush()
}

/// A line as terraform prints them.
fn line(message: &str) -> String {
    format!(
        "{{\"@level\":\"info\",\"@message\":\"{message}\",\"@module\":\"terraform.ui\",\
         \"@timestamp\":\"2026-01-01T00:00:00.000000Z\",\"type\":\"log\"}}\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_found_in_a_log() {
        let log = format!("{}{}{}", line("tick 12"), line("else"), line("tick 345"));
        let found: Vec<_> = ticks(&log).map(Moment::nanos).collect();
        assert_eq!(found, [12, 345]);
    }
}
