//! The program `latchkey`: hands its arguments to the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    latchkey_cli::run(std::env::args_os())
}
