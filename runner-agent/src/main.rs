//! The runner's program; everything is in the library.

use std::env;
use std::process::ExitCode;

use latchkey_runner::Program;

fn main() -> anyhow::Result<ExitCode> {
    latchkey_runner::run(env::args_os(), Program { exe: env::current_exe()?, prefix: Vec::new() })
}
