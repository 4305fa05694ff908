//! Every program of the project in one executable, so that integration tests can start real
//! processes without building anything while they run.

use std::process::ExitCode;

fn main() -> ExitCode {
    latchkey_dev::main()
}
