//! A terraform that does nothing, does it as told, and writes down what it did.
//!
//! It is the test's own executable under the name `terraform`. `apply` writes a start into the
//! ledger, synced, before anything else; so what the ledger says of starts is true whatever dies.
//! What it shall do stands in `stub.json` of the configuration (see [`Script`]).
//!
//! Lines are numbered within a start and can be computed again ([`line`]): a log proves by them
//! that nothing is missing, doubled, out of order or changed.

mod state;

use std::env;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Context;
use serde_json::{Value, json};

use self::state::StateStore;
use crate::configuration::Configuration;

/// Passed on by the runner.
const DIRECTORY: &str = "CHAOS_STUB";

const NAME: &str = "terraform";

/// How often a held stub looks whether it may go on.
const LOOK: Duration = Duration::from_millis(5);

/// A held stub goes on by itself then: nothing may hang for ever.
const LONGEST_HOLD: Duration = Duration::from_secs(120);

/// What a stub does on SIGINT.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnInterrupt {
    /// Dies.
    Die,
    /// Ends its work, writes its state, and fails, as terraform does.
    Stop,
    /// Goes on.
    Ignore,
}

/// What a stub shall do in `plan` and `apply`.
#[derive(Debug, Clone)]
pub struct Script {
    /// Numbered lines.
    pub lines: u64,
    /// Between two of them.
    pub pause: Duration,
    /// Bytes added to each.
    pub padding: usize,
    /// States written during `apply`, evenly spread; the last one at its end.
    pub states: u64,
    /// Waits in the middle of `apply` until [`Stub::release`].
    pub hold: bool,
    pub on_interrupt: OnInterrupt,
    /// Leaves a child behind that sleeps, and one in a session of its own.
    pub child: bool,
    /// Of `apply`.
    pub exit: u8,
    /// Pretends that its last state could not be written.
    pub errored: bool,
}

impl Default for Script {
    fn default() -> Self {
        Self {
            lines: 20,
            pause: Duration::from_millis(2),
            padding: 0,
            states: 2,
            hold: false,
            on_interrupt: OnInterrupt::Stop,
            child: false,
            exit: 0,
            errored: false,
        }
    }
}

impl Script {
    /// Packs it as the configuration of a run.
    pub fn configuration(&self) -> Configuration {
        let on_interrupt = match self.on_interrupt {
            OnInterrupt::Die => "die",
            OnInterrupt::Stop => "stop",
            OnInterrupt::Ignore => "ignore",
        };
        let script = json!({
            "lines": self.lines,
            "pause_us": u64::try_from(self.pause.as_micros()).unwrap_or(u64::MAX),
            "padding": self.padding,
            "states": self.states,
            "hold": self.hold,
            "on_interrupt": on_interrupt,
            "child": self.child,
            "exit": self.exit,
            "errored": self.errored,
        });
        Configuration::of(&[("main.tf", "terraform {}\n"), ("stub.json", &script.to_string())])
    }

    fn parse(script: &Value) -> Self {
        let number = |name: &str| script[name].as_u64().unwrap_or(0);
        let is = |name: &str| script[name] == true;
        Self {
            lines: number("lines"),
            pause: Duration::from_micros(number("pause_us")),
            padding: usize::try_from(number("padding")).unwrap_or(0),
            states: number("states"),
            hold: is("hold"),
            on_interrupt: match script["on_interrupt"].as_str() {
                Some("die") => OnInterrupt::Die,
                Some("ignore") => OnInterrupt::Ignore,
                Some(_) | None => OnInterrupt::Stop,
            },
            child: is("child"),
            exit: u8::try_from(number("exit")).unwrap_or(1),
            errored: is("errored"),
        }
    }
}

/// What the ledger says.
#[derive(Debug, Clone)]
pub struct Entry {
    pub run_id: String,
    /// `plan` or `apply`.
    pub phase: String,
    pub what: What,
    /// Tells one start from the next.
    pub start: String,
    pub pid: i32,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum What {
    Started,
    /// The backend acknowledged a state.
    State {
        serial: u64,
    },
    /// It acknowledged none, so the stub saved it.
    Errored {
        serial: u64,
    },
    Ended {
        code: u8,
    },
}

/// The stub's files.
#[derive(Debug, Clone)]
pub struct Stub {
    directory: PathBuf,
}

impl Stub {
    /// Makes the stub out of this very executable, which must call [`run_if_named`].
    pub fn new(directory: &Path) -> anyhow::Result<Self> {
        let own = env::current_exe().context("failed to find this executable")?;
        Self::of(&own, directory)
    }

    /// Makes it out of another executable that does.
    pub fn of(executable: &Path, directory: &Path) -> anyhow::Result<Self> {
        let stub = Self { directory: directory.to_owned() };
        let program = stub.program();
        // Jobs write the one and must not write the other.
        for directory in program.parent().into_iter().chain([directory]) {
            fs::create_dir_all(directory).context("failed to make the stub's directory")?;
        }
        std::os::unix::fs::symlink(executable, program).context("failed to link the stub")?;
        Ok(stub)
    }

    pub fn program(&self) -> PathBuf {
        self.directory.with_extension("program").join(NAME)
    }

    /// What the runner must pass on.
    pub fn environment(&self) -> (String, String) {
        (DIRECTORY.to_owned(), self.directory.display().to_string())
    }

    /// The process ids of the children that an `apply` has left behind.
    pub fn children(&self, run_id: &str) -> Vec<i32> {
        let text = fs::read_to_string(self.directory.join(format!("children-{run_id}")));
        text.unwrap_or_default().lines().filter_map(|line| line.parse().ok()).collect()
    }

    /// Lets a held `apply` go on.
    pub fn release(&self, run_id: &str) -> anyhow::Result<()> {
        fs::write(self.directory.join(format!("go-{run_id}")), "").context("failed to release")
    }

    /// Says whether an `apply` is held.
    pub fn holds(&self, run_id: &str) -> bool {
        self.directory.join(format!("holding-{run_id}")).exists()
    }

    /// Everything that was written down, in order.
    pub fn ledger(&self) -> anyhow::Result<Vec<Entry>> {
        let text = match fs::read_to_string(self.directory.join("ledger")) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
            Err(error) => return Err(error).context("failed to read the ledger"),
        };
        text.lines().map(entry).collect()
    }

    /// How many lines a start has printed, at least: it may have died before it counted one more.
    pub fn printed(&self, start: &str) -> u64 {
        let bytes = fs::read(self.directory.join(format!("count-{start}"))).unwrap_or_default();
        bytes.try_into().map_or(0, u64::from_le_bytes)
    }
}

fn entry(line: &str) -> anyhow::Result<Entry> {
    let value: Value = serde_json::from_str(line).context("the ledger has a broken line")?;
    let text = |name: &str| value[name].as_str().unwrap_or_default().to_owned();
    let number = value["number"].as_u64().unwrap_or(0);
    let what = match value["what"].as_str() {
        Some("started") => What::Started,
        Some("state") => What::State { serial: number },
        Some("errored") => What::Errored { serial: number },
        Some("ended") => What::Ended { code: u8::try_from(number).unwrap_or(u8::MAX) },
        Some(_) | None => anyhow::bail!("the ledger says something else: {line}"),
    };
    let pid = value["pid"].as_i64().and_then(|pid| i32::try_from(pid).ok()).unwrap_or(0);
    Ok(Entry { run_id: text("run"), phase: text("phase"), what, start: text("start"), pid })
}

/// A line as the stub prints it.
pub fn line(start: &str, number: u64, padding: usize) -> String {
    let fill = "x".repeat(padding);
    format!(
        "{{\"@level\":\"info\",\"@message\":\"stub {start} {number} {fill}\",\
         \"@module\":\"terraform.ui\",\"@timestamp\":\"2026-01-01T00:00:00.000000Z\",\
         \"type\":\"log\"}}"
    )
}

/// Is the stub, if this process was started under its name.
pub fn run_if_named() -> Option<ExitCode> {
    let program = PathBuf::from(env::args_os().next()?);
    if program.file_name()? != NAME {
        return None;
    }
    Some(match act() {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            // Nobody may be there to read it.
            let _ = writeln!(io::stderr(), "the stub failed: {error}");
            ExitCode::FAILURE
        }
    })
}

fn act() -> io::Result<u8> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let command = arguments.first().map_or("", String::as_str);
    let mut out = io::stdout().lock();
    match command {
        "version" => out.write_all(br#"{"terraform_version":"1.9.8"}"#)?,
        "show" if arguments.iter().any(|argument| argument == "-json") => {
            out.write_all(br#"{"format_version":"1.2","applyable":true}"#)?;
        }
        "show" => out.write_all(b"nothing\n")?,
        "plan" => {
            let start = Start::begin("plan")?;
            start.print_all(&mut out, |_| Ok(()))?;
            let saved = arguments.iter().find_map(|argument| argument.strip_prefix("-out="));
            fs::write(saved.unwrap_or("plan.bin"), format!("planned by {}", start.name))?;
            start.note("ended", 2)?;
            return Ok(2);
        }
        "apply" => return apply(&mut out),
        _ => {}
    }
    Ok(0)
}

fn apply(out: &mut impl Write) -> io::Result<u8> {
    // Before anything else.
    let start = Start::begin("apply")?;
    let script = start.script.clone();
    if script.child {
        start.leave_children()?;
    }
    let mut store = StateStore::from_environment()?;
    store.lock()?;
    let middle = script.lines / 2;
    let every = script.lines / script.states.max(1);
    let mut written = 0;
    start.print_all(out, |number| {
        if number == middle && script.hold {
            start.hold()?;
        }
        let due = every > 0 && number > 0 && number % every == 0;
        if due && written + 1 < script.states {
            written += 1;
            start.write_state(&mut store, false)?;
        }
        Ok(())
    })?;
    let kept = script.states == 0 || start.write_state(&mut store, script.errored)?;
    store.unlock();
    let code = match (start.interrupted(), kept) {
        (false, true) => script.exit,
        (true, _) | (_, false) => 1,
    };
    writeln!(
        out,
        "{{\"@level\":\"info\",\"@message\":\"Outputs: 0\",\"@module\":\"terraform.ui\",\
         \"@timestamp\":\"2026-01-01T00:00:00.000000Z\",\"outputs\":{{}},\"type\":\"outputs\"}}"
    )?;
    start.note("ended", code.into())?;
    Ok(code)
}

/// One start of `plan` or `apply`.
struct Start {
    directory: PathBuf,
    run: String,
    phase: &'static str,
    /// `RUN-PHASE-RANDOM`.
    name: String,
    script: Script,
    interrupted: Arc<AtomicBool>,
    ledger: File,
    count: File,
}

impl Start {
    fn begin(phase: &'static str) -> io::Result<Self> {
        let directory = env::var_os(DIRECTORY).map(PathBuf::from);
        let directory = directory.ok_or_else(|| io::Error::other("nobody named the ledger"))?;
        let run = env::var("LATCHKEY_RUN_ID").unwrap_or_default();
        let name = uuid::Uuid::new_v4().simple().to_string();
        let mut files = OpenOptions::new();
        files.create(true).append(true);
        let ledger = files.open(directory.join("ledger"))?;
        let mut files = OpenOptions::new();
        let count = files
            .create(true)
            .truncate(true)
            .write(true)
            .open(directory.join(format!("count-{name}")))?;
        let mut start = Self {
            directory,
            run,
            phase,
            name,
            script: Script::default(),
            interrupted: Arc::default(),
            ledger,
            count,
        };
        start.note("started", 0)?;
        let script = fs::read("stub.json")?;
        start.script = Script::parse(&serde_json::from_slice(&script)?);
        if start.script.on_interrupt != OnInterrupt::Die {
            start.hear()?;
        }
        Ok(start)
    }

    /// Their process ids are written down for [`Stub::children`].
    fn leave_children(&self) -> io::Result<()> {
        let mut pids = String::new();
        for (program, arguments) in [("sleep", vec!["86400"]), ("setsid", vec!["sleep", "86400"])] {
            let child = Command::new(program).args(arguments).stdin(Stdio::null()).spawn()?;
            pids += &child.id().to_string();
            pids.push('\n');
        }
        fs::write(self.directory.join(format!("children-{}", self.run)), pids)
    }

    /// Appends to the ledger, durably, in one write.
    fn note(&self, what: &str, number: u64) -> io::Result<()> {
        let entry = json!({
            "run": self.run, "phase": self.phase, "what": what, "number": number,
            "start": self.name, "pid": std::process::id(),
        });
        (&self.ledger).write_all(format!("{entry}\n").as_bytes())?;
        self.ledger.sync_data()
    }

    /// Listens for SIGINT.
    fn hear(&self) -> io::Result<()> {
        let heard = Arc::clone(&self.interrupted);
        let (ready, is_ready) = std::sync::mpsc::sync_channel(1);
        std::thread::spawn(move || {
            let built = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let Ok(runtime) = built else { return };
            runtime.block_on(async {
                use tokio::signal::unix::{SignalKind, signal};
                let Ok(mut interrupt) = signal(SignalKind::interrupt()) else { return };
                let _ = ready.send(());
                while interrupt.recv().await.is_some() {
                    heard.store(true, Ordering::SeqCst);
                }
            });
        });
        is_ready.recv().map_err(io::Error::other)
    }

    fn interrupted(&self) -> bool {
        self.script.on_interrupt == OnInterrupt::Stop && self.interrupted.load(Ordering::SeqCst)
    }

    /// Prints the numbered lines until it is interrupted.
    fn print_all(
        &self,
        out: &mut impl Write,
        mut between: impl FnMut(u64) -> io::Result<()>,
    ) -> io::Result<()> {
        for number in 0..self.script.lines {
            if self.interrupted() {
                return Ok(());
            }
            between(number)?;
            let line = line(&self.name, number, self.script.padding) + "\n";
            // In one write: what is counted has been printed whole.
            out.write_all(line.as_bytes())?;
            out.flush()?;
            self.count.write_all_at(&(number + 1).to_le_bytes(), 0)?;
            if !self.script.pause.is_zero() {
                std::thread::park_timeout(self.script.pause);
            }
        }
        Ok(())
    }

    fn hold(&self) -> io::Result<()> {
        fs::write(self.directory.join(format!("holding-{}", self.run)), "")?;
        let go = self.directory.join(format!("go-{}", self.run));
        let mut held = Duration::ZERO;
        while !go.exists() && !self.interrupted() && held < LONGEST_HOLD {
            std::thread::park_timeout(LOOK);
            held += LOOK;
        }
        Ok(())
    }

    /// Writes the next state; saves it beside the configuration when nobody takes it.
    fn write_state(&self, store: &mut StateStore, refused: bool) -> io::Result<bool> {
        let (serial, state) = store.next(&self.run);
        if !refused && store.post(&state) {
            self.note("state", serial)?;
            return Ok(true);
        }
        fs::write("errored.tfstate", state)?;
        self.note("errored", serial)?;
        Ok(false)
    }
}
