//! `cargo demo` and `cargo dev`; everything is in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    latchkey_dev::main()
}
