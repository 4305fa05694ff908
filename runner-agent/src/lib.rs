//! The runner's side of Latchkey: the agent, which dials out, leases jobs and ships what they
//! make; and the supervisor, one per job, which runs terraform and outlives the agent. The job
//! directory between them is the truth on the build host.
//!
//! ```text
//! control plane ◄─ lease stream ─ agent ─ socket ─ supervisor ─ terraform
//!                                     └── job directory ──┘
//! ```

mod agent;
mod backoff;
mod clock;
mod config;
mod digest;
mod engine;
mod enroll;
mod extract;
mod host;
mod job;
mod job_directory;
mod lease;
mod provider_cache;
mod random;
mod root_module;
mod ship;
mod spool;
mod supervisor;
mod untrusted;
mod workspace;

use std::ffi::OsString;
use std::io::{self, IsTerminal};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;
use tracing_subscriber::EnvFilter;

pub use crate::engine::at_hand as engine_at_hand;

use crate::config::{Arguments, Command, Config};

/// How to start this program again: a supervisor is `exe prefix... supervise <dir>`.
#[derive(Debug, Clone)]
pub struct Program {
    pub exe: PathBuf,
    /// What stands before our own arguments when the program embeds several.
    pub prefix: Vec<OsString>,
}

/// Runs the program with its arguments; the first one is the program's name.
///
/// # Errors
///
/// Fails when the configuration cannot be used, when enrolment is refused, or when the runner's
/// own files cannot be.
pub fn run(args: impl IntoIterator<Item = OsString>, program: Program) -> anyhow::Result<ExitCode> {
    let arguments = match Arguments::try_parse_from(args) {
        Ok(arguments) => arguments,
        Err(error) => {
            error.print().context("failed to print the help")?;
            return Ok(ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2)));
        }
    };
    let filter =
        EnvFilter::try_from_env("LATCHKEY_RUNNER_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    // A program that embeds this one may have its own.
    let colour = io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(colour)
        .with_writer(io::stderr)
        .try_init();
    // Another part of the same process may have installed it; it is the same one everywhere.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    match arguments.command {
        Command::Run(run) => {
            let config = Config::check(*run, program).context("failed to start the runner")?;
            supervisor::harden().context("failed to keep secrets in memory")?;
            agent::run(config).context("failed to run the agent")
        }
        Command::Supervise { directory } => {
            supervisor::supervise(&directory).context("failed to supervise the job")
        }
        Command::Probe { directory } => {
            let found = supervisor::isolation::attempt(&directory);
            found.context("failed to say what was found")?;
            Ok(ExitCode::SUCCESS)
        }
    }
}
