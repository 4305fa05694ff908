//! `cargo budget`: what Latchkey costs, each figure beside the limit that the same machine showed
//! in the same run.
//!
//! A row does its work through the real protocol against real processes, and beside it measures
//! a small program that does only the physics: one fsync, one round trip, one copy. The ratio of
//! the two is what a budget is about; absolute times are the machine's.

mod bare;
mod bed;
mod before;
mod clock;
mod observed;
mod physics;
mod programs;
mod row;
mod rows;
mod sample;
mod simulated_runners;
mod stub;
mod table;
mod timed_runs;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;

use crate::before::Before;
use crate::row::{Context, Verdict};

/// Measures the budgets.
#[derive(Debug, Parser)]
#[command(name = "cargo budget", version)]
struct Args {
    /// Fewer repeats and smaller sizes: within a minute after the build
    #[arg(long)]
    quick: bool,
    /// Only these rows; may be repeated
    #[arg(long, value_name = "NAME")]
    only: Vec<String>,
    /// Print the rows as JSON
    #[arg(long, conflicts_with = "markdown")]
    json: bool,
    /// Print the page that the README links to
    #[arg(long)]
    markdown: bool,
    /// For the page: the `--json` of an earlier run, to show beside this one's
    #[arg(long, value_name = "FILE", requires = "markdown")]
    before: Option<PathBuf>,
    /// List the rows and end
    #[arg(long)]
    list: bool,
}

fn main() -> ExitCode {
    if let Some(code) = programs::run_if_asked() {
        return code;
    }
    let args = Args::parse();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let measured = runtime.map_err(anyhow::Error::from).and_then(|runtime| {
        let measured = runtime.block_on(measure(&args));
        runtime.shutdown_timeout(Duration::from_secs(5));
        measured
    });
    match measured {
        Ok(Verdict::Kept) => ExitCode::SUCCESS,
        Ok(Verdict::Missed) => ExitCode::FAILURE,
        Err(error) => {
            anstream::eprintln!("budget: failed to {error:#}");
            ExitCode::from(2)
        }
    }
}

async fn measure(args: &Args) -> anyhow::Result<Verdict> {
    let chosen = rows::chosen(&args.only)?;
    if args.list {
        for (name, what) in chosen.iter().map(|row| (row.name, row.what)) {
            anstream::println!("{name:<12} {what}");
        }
        return Ok(Verdict::Kept);
    }
    let before = args.before.as_deref().map(Before::read).transpose()?.unwrap_or_default();
    let context = Context::new(args.quick)?;
    let mut measured = Vec::new();
    let mut failed = Vec::new();
    for row in chosen {
        anstream::eprintln!("measuring {} …", row.name);
        // The others took long, and are none the worse for it.
        match (row.measure)(&context).await {
            Ok(rows) => measured.extend(rows),
            Err(error) => {
                anstream::eprintln!("budget: failed to measure {}: {error:#}", row.name);
                failed.push(row.name);
            }
        }
    }
    if args.json {
        anstream::println!("{}", table::json(&measured)?);
    } else if args.markdown {
        anstream::println!("{}", table::markdown(&measured, &before));
    } else {
        anstream::println!("{}", table::human(&measured));
    }
    anyhow::ensure!(failed.is_empty(), "measure all rows: not {}", failed.join(", "));
    let missed = measured.iter().any(|row| row.verdict() == Verdict::Missed);
    Ok(if missed { Verdict::Missed } else { Verdict::Kept })
}
