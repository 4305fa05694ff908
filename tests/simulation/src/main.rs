//! Deterministic simulation of the lease protocol: the real control plane, simulated build hosts,
//! people and AWS, in one process on one thread of simulated time.
//!
//! ```text
//!   people ──gRPC──┐                    ┌── STS (a port of the control plane)
//!                  ├── control plane ───┤
//!   builders ─gRPC─┘     real           └── the memory store, which survives the host
//!     agent, supervisors, terraform, disk: simulated
//! ```
//!
//! Real is all that decides on the control plane: `app`, `dispatch`, `domain`, the gRPC services
//! and the memory store. Of the agent, the lease stream (`lease.rs`) and the back-off are the
//! agent's own files; its table of jobs, its jobs and its shipping stand on processes and disks,
//! and are written again here over a disk in memory, in the same order of sync and send. So a
//! defect in *those* files of the agent is not found here but by `cargo chaos`.
//!
//! One process runs one seed. What is random or asks for the time is answered by the seed and by
//! turmoil's time (`mad-turmoil` stands before libc's own), so a seed gives the same trace, event
//! by event; `--one SEED --trace` shows it.

mod agent;
#[path = "../../../runner-agent/src/backoff.rs"]
#[cfg_attr(not(test), expect(dead_code, reason = "the agent itself asks for more of it"))]
mod backoff;
mod chance;
mod clock;
mod job;
#[expect(dead_code, reason = "an agent that ends closes its stream; this one is killed")]
#[path = "../../../runner-agent/src/lease.rs"]
mod lease;
mod logs;
mod machine;
mod model;
mod net;
mod people;
mod plan;
mod plane;
mod planted;
mod seeds;
mod ship;
mod sts;
mod supervisor;
mod terraform;
mod watched;
mod world;

use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use latchkey_control_plane::auth::sha256;
use rand::SeedableRng;
use rand::rngs::StdRng;

use crate::plan::Plant;

/// How long the control plane's disk takes for one thing.
const DISK: Duration = Duration::from_millis(1);

/// Simulates the lease protocol, seed by seed.
#[derive(Debug, Parser)]
pub(crate) struct Args {
    /// How many seeds to run.
    #[arg(long, default_value_t = 200)]
    seeds: u64,
    /// The first seed.
    #[arg(long, default_value_t = 0)]
    from: u64,
    /// How many worlds to run side by side.
    #[arg(long, default_value_t = 1)]
    jobs: usize,
    /// Stop after this many seconds, whatever is left.
    #[arg(long)]
    seconds: Option<u64>,
    /// Stop at the first seed that breaks a promise.
    #[arg(long)]
    first: bool,
    /// Run this seed alone, and tell what became of it.
    #[arg(long, conflicts_with_all = ["seeds", "from"])]
    one: Option<u64>,
    /// With `--one`: tell each event.
    #[arg(long, requires = "one")]
    trace: bool,
    /// Put a defect in, to see that it is found.
    #[arg(long)]
    plant: Option<Plant>,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let done = match args.one {
        Some(seed) => one(seed, &args),
        None => seeds::run(&args),
    };
    match done {
        Ok(code) => code,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "latchkey-simulate: failed to {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn one(seed: u64, args: &Args) -> anyhow::Result<ExitCode> {
    let directory = seeds::directory();
    std::fs::create_dir_all(&directory)?;
    mad_turmoil::rand::set_rng(StdRng::seed_from_u64(seed));
    let clocks = mad_turmoil::time::SimClocksGuard::init();
    latchkey_control_plane::blocking::work_in_place(DISK);
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let report = world::run(seed, args.plant, directory.clone());
    drop(clocks);
    let _ = std::fs::remove_dir_all(&directory);
    let report = report?;
    let mut out = std::io::stdout().lock();
    if args.trace {
        for line in &report.trace {
            writeln!(out, "{line}")?;
        }
    }
    let digest = sha256(report.trace.join("\n").as_bytes()).to_string();
    let counts = report.counts;
    writeln!(
        out,
        "seed {seed} trace {} events {} lasted {}ms runs {} commits {} faults {} plans {} applies {} lost {} codes {}",
        &digest[..16],
        report.trace.len(),
        report.lasted.as_millis(),
        report.runs,
        counts.commits,
        counts.faults,
        counts.plans,
        counts.applies,
        counts.lost,
        counts.codes,
    )?;
    for violation in &report.violations {
        writeln!(out, "seed {seed} VIOLATION {violation}")?;
    }
    Ok(if report.violations.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
