//! The programs under test, within this executable, with their failpoints armed; and the stub.

use std::process::ExitCode;

use latchkey_harness::{Programs, stub};

const NAMES: [&str; 5] = ["control-plane", "runner", "aws-simulator", "cli", "tethered"];

/// Runs a program of Latchkey, if this process was started to be one.
pub(crate) fn run_if_asked() -> Option<ExitCode> {
    if let Some(code) = stub::run_if_named() {
        return Some(code);
    }
    let first = std::env::args().nth(1)?;
    if !NAMES.contains(&first.as_str()) {
        return None;
    }
    latchkey_failpoint::arm();
    Some(latchkey_dev::main())
}

/// The programs as the harness starts them.
pub(crate) fn programs() -> anyhow::Result<Programs> {
    Ok(Programs::in_one(std::env::current_exe()?))
}
