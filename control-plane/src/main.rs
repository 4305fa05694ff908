//! The control plane's process.

use std::process::ExitCode;

fn main() -> ExitCode {
    latchkey_control_plane::run(std::env::args_os())
}
