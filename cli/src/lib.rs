//! `latchkey`, the command line: thin, every command is one or two rpcs. It decides nothing; it
//! packs, asks, sends, follows and shows.
//!
//! `run` is the program; `run_with` is the same with streams of the caller's, for tests and for
//! whoever embeds it.

mod archive;
mod audit_export;
mod change;
mod client;
mod clock;
mod code;
mod commands;
mod config;
mod context;
mod download;
mod exit;
mod failure;
mod follow;
mod given;
mod input;
mod log_view;
mod output;
mod progress;
mod view;
mod watch;
mod words;

use std::ffi::OsString;
use std::fmt;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{CommandFactory, Parser};
use tokio::signal::unix::{Signal, SignalKind, signal};

pub use crate::exit::Exit;
pub use crate::input::Stdin;

use crate::commands::Command;
use crate::context::Context;
use crate::failure::Failure;
use crate::input::Input;
use crate::output::{Format, Output};

const GLOBAL: &str = "For every command";

/// Runs Terraform for teams; a person proves presence with an AWS MFA code before what their
/// policy gates.
#[derive(Debug, Parser)]
#[command(name = "latchkey", version, after_help = Exit::help(), max_term_width = 100)]
struct Cli {
    /// How data is written to standard output
    #[arg(
        short,
        long,
        global = true,
        value_enum,
        default_value_t = Format::Human,
        value_name = "human|json",
        hide_possible_values = true,
        help_heading = GLOBAL
    )]
    output: Format,
    /// Organization to work in; the one of the last login if absent
    #[arg(
        long,
        global = true,
        value_name = "NAME",
        env = "LATCHKEY_ORGANIZATION",
        help_heading = GLOBAL
    )]
    organization: Option<String>,
    /// Credentials file
    #[arg(
        long,
        global = true,
        value_name = "FILE",
        env = "LATCHKEY_CONFIG",
        help_heading = GLOBAL
    )]
    config: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

/// The streams that a command reads and writes.
pub struct Streams {
    pub stdin: Stdin,
    pub stdout: Box<dyn Write + Send>,
    pub stderr: Box<dyn Write + Send>,
}

impl fmt::Debug for Streams {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Streams").field("stdin", &self.stdin).finish_non_exhaustive()
    }
}

/// Runs the program with this process's streams.
pub fn run(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let mut output = Output::process();
    let built = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = match built {
        Ok(runtime) => runtime,
        Err(error) => {
            output.note(&format!("error: failed to start: {error}"));
            return Exit::Refused.into();
        }
    };
    let input = Input::new(Stdin::process());
    let exit = runtime.block_on(dispatch(args.into_iter().collect(), output, input));
    // Not awaited: a thread may wait for a key that nobody presses.
    runtime.shutdown_background();
    exit.into()
}

/// Runs one command with the given streams, without colour. The first of `args` is the program's
/// name.
pub async fn run_with(args: impl IntoIterator<Item = OsString>, streams: Streams) -> Exit {
    let output = Output::to(streams.stdout, streams.stderr);
    let input = Input::new(streams.stdin);
    dispatch(args.into_iter().collect(), output, input).await
}

async fn dispatch(args: Vec<OsString>, mut output: Output, input: Input) -> Exit {
    // An embedder may have installed one already; then that one serves.
    drop(rustls::crypto::aws_lc_rs::default_provider().install_default());
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(error) => {
            let text = error.render().to_string();
            if error.use_stderr() {
                output.note(text.trim_end());
                return Exit::Usage;
            }
            return match output.text(&text) {
                Ok(()) => Exit::Ok,
                Err(failure) => failure.exit(),
            };
        }
    };
    output.format = cli.output;
    let mut context = Context { output, input, config: cli.config, organization: cli.organization };
    let follows = cli.command.follows();
    // A hidden prompt raises the signal itself, and would end us with the echo off.
    let mut interrupts = if follows { None } else { signal(SignalKind::interrupt()).ok() };
    let result = tokio::select! {
        result = cli.command.run(&mut context) => result,
        () = interrupted(&mut interrupts) => Err(Failure::Interrupted),
    };
    match result {
        Ok(exit) => exit,
        Err(failure) => {
            context.output.failure(&failure);
            failure.exit()
        }
    }
}

/// Waits for Ctrl-C; for ever where a command listens to it itself.
async fn interrupted(interrupts: &mut Option<Signal>) {
    match interrupts {
        Some(interrupts) => drop(interrupts.recv().await),
        None => std::future::pending().await,
    }
}

/// Returns the whole command line, for completions.
fn command_line() -> clap::Command {
    Cli::command()
}

/// What commands answer.
type Done = Result<Exit, Failure>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        command_line().debug_assert();
    }
}
