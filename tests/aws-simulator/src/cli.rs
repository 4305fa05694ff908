//! The simulation as a process of its own.
//!
//! A harness starts it with `--ready-file` and waits for that file, which appears whole: it is
//! written beside its place and renamed. With `--exit-with-stdin` the process ends as soon as its
//! standard input closes, so that it cannot outlive who started it.

use std::ffi::OsString;
use std::fs;
use std::io::Write as _;
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::Parser;
use tokio::io::AsyncReadExt as _;

use crate::{Clock, Facts, Simulator, World};

/// Simulates AWS's STS, and S3 as far as terraform's backend uses it.
#[derive(Debug, Parser)]
#[command(name = "latchkey-aws-simulator")]
pub struct Args {
    /// Where to listen; must be a loopback address
    #[arg(long, default_value = "127.0.0.1:0", value_name = "ADDRESS")]
    listen: SocketAddr,
    /// The world to start with, as JSON; without it, one account with one user and two roles
    #[arg(long, value_name = "FILE")]
    world: Option<PathBuf>,
    /// Where to write the address and the first user's key, secret and serial, once listening
    #[arg(long, value_name = "FILE")]
    ready_file: Option<PathBuf>,
    /// End when standard input closes
    #[arg(long)]
    exit_with_stdin: bool,
}

/// Runs the simulation until it is told to end; builds its own runtime.
pub fn run(args: impl IntoIterator<Item = OsString>) -> anyhow::Result<()> {
    let args = match Args::try_parse_from(args) {
        Ok(args) => args,
        Err(error) => error.exit(),
    };
    tracing_subscriber::fmt()
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_default_env()
                .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info")),
        )
        .with_writer(std::io::stderr)
        .try_init()
        .ok();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("failed to start the runtime")?;
    let ended = runtime.block_on(serve(args));
    // A read of standard input cannot be taken back; do not wait for it.
    runtime.shutdown_background();
    ended
}

/// Runs the simulation within the current runtime.
pub async fn serve(args: Args) -> anyhow::Result<()> {
    anyhow::ensure!(
        args.listen.ip().is_loopback(),
        "failed to listen on {}: it hands out codes and secrets, so it must be loopback",
        args.listen
    );
    let world = match &args.world {
        Some(path) => read_world(path)?,
        None => World::example(),
    };
    let mut simulator = Simulator::start_on(args.listen, world, Clock::wall())
        .await
        .context("failed to start the simulation")?;
    if let Some(path) = &args.ready_file {
        write_facts(path, &simulator.facts())
            .with_context(|| format!("failed to write {}", path.display()))?;
    }
    tracing::info!(address = %simulator.address(), "simulated AWS is listening");
    tokio::select! {
        ended = simulator.ended() => ended.context("failed to go on serving"),
        () = stdin_closed(), if args.exit_with_stdin => Ok(()),
        interrupted = tokio::signal::ctrl_c() => {
            interrupted.context("failed to listen for an interrupt")
        }
    }
}

fn read_world(path: &Path) -> anyhow::Result<World> {
    let text =
        fs::read_to_string(path).with_context(|| format!("failed to read {}", path.display()))?;
    serde_json::from_str(&text).with_context(|| format!("failed to understand {}", path.display()))
}

fn write_facts(path: &Path, facts: &Facts) -> anyhow::Result<()> {
    let partial = path.with_extension("partial");
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&partial)?;
    file.write_all(&serde_json::to_vec_pretty(facts)?)?;
    file.write_all(b"\n")?;
    fs::rename(&partial, path)?;
    Ok(())
}

async fn stdin_closed() {
    let mut stdin = tokio::io::stdin();
    let mut ignored = [0; 256];
    while stdin.read(&mut ignored).await.is_ok_and(|read| read > 0) {}
}
