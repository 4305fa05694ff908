//! The programs under measurement, within this executable: it runs them when its first argument
//! names one.

use std::process::ExitCode;

use latchkey_harness::Programs;

const NAMES: [&str; 6] =
    ["control-plane", "runner", "aws-simulator", "cli", "tethered", "terraform-stub"];

/// Runs a program of Latchkey, if this process was started to be one.
pub(crate) fn run_if_asked() -> Option<ExitCode> {
    let first = std::env::args().nth(1)?;
    NAMES.contains(&first.as_str()).then(latchkey_dev::main)
}

/// The programs as the harness starts them.
pub(crate) fn programs() -> anyhow::Result<Programs> {
    Ok(Programs::in_one(std::env::current_exe()?))
}
