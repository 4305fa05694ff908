//! Many seeds, each in a process of its own: what a process keeps (counters of libraries, the
//! seeds of hash maps) would otherwise let one world leak into the next.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Output};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::Context;
use clap::ValueEnum;

use crate::Args;

/// Failures that are shown in full.
const SHOWN: usize = 10;

/// Where the files of this process's world lie: in memory where there is such a place.
pub(crate) fn directory() -> PathBuf {
    let memory = Path::new("/dev/shm");
    let base = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
    base.join(format!("latchkey-simulation-{}", std::process::id()))
}

#[derive(Default)]
struct Sums {
    seeds: u64,
    failed: Vec<u64>,
    by_name: BTreeMap<String, u64>,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let program = std::env::current_exe().context("find this program")?;
    let until = match args.seconds {
        Some(seconds) => Some(uptime()? + seconds),
        None => None,
    };
    let (next, sums) = (AtomicU64::new(args.from), Mutex::new(Sums::default()));
    std::thread::scope(|scope| {
        for _ in 0..args.jobs.max(1) {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::SeqCst);
                    let over = until.is_some_and(|until| uptime().is_ok_and(|now| now >= until))
                        || (args.first && !lock(&sums).failed.is_empty());
                    if seed >= args.from.saturating_add(args.seeds) || over {
                        return;
                    }
                    let mut command = Command::new(&program);
                    command.args(["--one", &seed.to_string()]);
                    if let Some(plant) = args.plant.and_then(|plant| plant.to_possible_value()) {
                        command.args(["--plant", plant.get_name()]);
                    }
                    let output = command.output();
                    lock(&sums).count(seed, output);
                }
            });
        }
    });
    let sums = sums.into_inner().unwrap_or_else(PoisonError::into_inner);
    let mut out = std::io::stdout().lock();
    let facts: Vec<String> =
        sums.by_name.iter().map(|(name, count)| format!("{name} {count}")).collect();
    writeln!(
        out,
        "{} seeds from {}: {} violations; {}",
        sums.seeds,
        args.from,
        sums.failed.len(),
        facts.join(", ")
    )?;
    for seed in &sums.failed {
        writeln!(out, "again: cargo simulate --one {seed} --trace")?;
    }
    Ok(if sums.failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Seconds since this machine came up. In this program libc's clocks stand still: they are the
/// simulation's.
fn uptime() -> anyhow::Result<u64> {
    let text = std::fs::read_to_string("/proc/uptime").context("read the time")?;
    let seconds = text.split('.').next().unwrap_or_default();
    seconds.parse().context("understand the time")
}

fn lock(sums: &Mutex<Sums>) -> MutexGuard<'_, Sums> {
    sums.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Sums {
    fn count(&mut self, seed: u64, output: std::io::Result<Output>) {
        self.seeds += 1;
        let mut out = std::io::stdout().lock();
        let output = match output {
            Ok(output) => output,
            Err(error) => {
                self.failed.push(seed);
                let _ = writeln!(out, "seed {seed} could not be run: {error}");
                return;
            }
        };
        let text = String::from_utf8_lossy(&output.stdout);
        let mut words = text.lines().next().unwrap_or_default().split(' ');
        while let (Some(name), Some(value)) = (words.next(), words.next()) {
            if let ("runs" | "commits" | "faults" | "plans" | "applies" | "lost" | "codes", Ok(n)) =
                (name, value.parse::<u64>())
            {
                *self.by_name.entry(name.to_owned()).or_default() += n;
            }
        }
        if !output.status.success() {
            self.failed.push(seed);
            if self.failed.len() <= SHOWN {
                let errors = String::from_utf8_lossy(&output.stderr);
                let _ = writeln!(out, "{}{}", text, errors);
            }
        }
    }
}
