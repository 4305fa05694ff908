//! `cargo chaos`: breaks a whole Latchkey in every way it must survive, and looks from outside
//! whether its promises hold.
//!
//! ```text
//! suite      rounds of scenarios over several beds at once; a line per scenario
//!   ├─ scenarios   what each round shall suffer, derived from its seed alone
//!   ├─ story       one run, played by an impatient person, while faults strike
//!   │    └─ bed    real processes, a network and an AWS that can be broken
//!   ├─ frames      the same with a runner that repeats, delays and reorders its frames
//!   ├─ old_copy    a control plane that comes back with an older copy of its data
//!   └─ check       the promises, read from the stub's ledger, the logs and the API
//! ```
//!
//! Real processes do not run twice alike: a seed repeats the faults and their times, not the
//! instruction they strike. Named points (`latchkey_failpoint`) do strike where they say.

mod bed;
mod check;
mod frames;
mod old_copy;
mod points;
mod processes;
mod programs;
mod random;
mod scenarios;
mod story;
mod suite;

use std::process::ExitCode;

use clap::Parser;

/// Breaks things on purpose.
#[derive(Debug, Parser)]
#[command(name = "cargo chaos", version)]
pub(crate) struct Arguments {
    /// Rounds of each scenario
    #[arg(long, default_value_t = 10)]
    rounds: u64,
    /// Seed of the first round; the next has the next number
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Only these scenarios; may be repeated
    #[arg(long, value_name = "NAME")]
    scenario: Vec<String>,
    /// Beds in use at once
    #[arg(long, default_value_t = 4)]
    jobs: usize,
    /// The short, fixed selection that `cargo test` plays
    #[arg(long, conflicts_with_all = ["rounds", "scenario"])]
    short: bool,
    /// Plants a defect, to see that it is seen
    #[arg(long, value_name = "DEFECT")]
    plant: Option<String>,
    /// Tell every round
    #[arg(long, short)]
    verbose: bool,
    /// List the scenarios and end
    #[arg(long)]
    list: bool,
}

fn main() -> ExitCode {
    if let Some(code) = programs::run_if_asked() {
        return code;
    }
    suite::main(Arguments::parse())
}
