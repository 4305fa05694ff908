//! Everything in one process tree, for trying it out: one executable that contains every program
//! and starts itself again as each of them.
//!
//! ```text
//! latchkey-dev demo | dev
//!   ├─ latchkey-dev tethered aws-simulator …    STS with signatures and devices
//!   ├─ latchkey-dev tethered control-plane …    on sled, TLS from its own CA
//!   └─ latchkey-dev tethered runner run …
//!        └─ latchkey-dev runner supervise …     one per job, beside terraform
//! ```
//!
//! The processes are what a production has; only their addresses, their directory and the AWS
//! that they talk to are not. The tree is built by the harness that the tests use.

mod code;
mod demo;
mod dev;
mod narrator;
mod play;
mod tether;

use std::env;
use std::ffi::OsString;
use std::fmt::Display;
use std::future::Future;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use latchkey_harness::{AwsKind, Programs, Stage, StageOptions, TETHERED};
use latchkey_runner::Program;

const USAGE: &str = "\
Usage: latchkey-dev COMMAND

  demo                plays the main story and ends
  dev                 starts the same and stays, with the CLI logged in
  code ADDRESS        prints a token code of the simulated AWS at ADDRESS
  cli ...             latchkey
  control-plane ...   latchkey-control-plane
  runner ...          latchkey-runner
  aws-simulator ...   latchkey-aws-simulator
";

/// Runs what the first argument names.
pub fn main() -> ExitCode {
    let mut arguments = env::args_os().skip(1).peekable();
    if arguments.next_if(|argument| argument == TETHERED).is_some() {
        tether::end_with_stdin();
    }
    let Some(command) = arguments.next() else { return usage() };
    let rest: Vec<OsString> = arguments.collect();
    match command.to_str() {
        Some("demo") if rest.is_empty() => demo::main(),
        Some("dev") if rest.is_empty() => within_runtime(dev::run()),
        Some("code") => within_runtime(code::run(rest)),
        Some("cli") => latchkey_cli::run(named("latchkey", rest)),
        Some("control-plane") => latchkey_control_plane::run(named("latchkey-control-plane", rest)),
        Some("runner") => ended(runner(rest)),
        Some("aws-simulator") => {
            let run = latchkey_aws_simulator::cli::run(named("latchkey-aws-simulator", rest));
            ended(run.map(|()| ExitCode::SUCCESS))
        }
        Some(_) | None => usage(),
    }
}

fn named(program: &str, rest: Vec<OsString>) -> impl Iterator<Item = OsString> {
    std::iter::once(OsString::from(program)).chain(rest)
}

fn runner(rest: Vec<OsString>) -> anyhow::Result<ExitCode> {
    let exe = env::current_exe().context("failed to find this program")?;
    // Not tethered: a supervisor outlives its agent.
    let again = Program { exe, prefix: vec!["runner".into()] };
    latchkey_runner::run(named("latchkey-runner", rest), again)
}

fn usage() -> ExitCode {
    complain(USAGE.trim_end());
    ExitCode::from(2)
}

fn ended(result: anyhow::Result<ExitCode>) -> ExitCode {
    result.unwrap_or_else(|error| {
        complain(format!("error: {error:#}"));
        ExitCode::FAILURE
    })
}

fn within_runtime(work: impl Future<Output = anyhow::Result<()>>) -> ExitCode {
    let built = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let result = built.context("failed to start the runtime").and_then(|runtime| {
        let result = runtime.block_on(work);
        // A thread may be reading a terminal.
        runtime.shutdown_background();
        result
    });
    ended(result.map(|()| ExitCode::SUCCESS))
}

fn complain(text: impl Display) {
    // Standard error may be closed, and then nobody is there to be told.
    let _ = writeln!(anstream::stderr(), "{text}");
}

/// Starts the tree.
async fn stage() -> anyhow::Result<Stage> {
    let exe = env::current_exe().context("failed to find this program")?;
    let options =
        StageOptions { aws: AwsKind::Process, ..StageOptions::new(Programs::in_one(exe)) };
    Stage::start(options).await
}

/// The example configuration, as one would name it from here.
fn example() -> PathBuf {
    let whole = Path::new(env!("CARGO_MANIFEST_DIR")).join("example");
    let here = env::current_dir().unwrap_or_default();
    whole.strip_prefix(here).map(Path::to_owned).unwrap_or(whole)
}
