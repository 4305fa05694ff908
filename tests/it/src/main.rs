//! Every program of the project in one executable, so that integration tests can start real
//! processes without building anything while they run; and, under its name, the stub terraform.

use std::process::ExitCode;

fn main() -> ExitCode {
    if let Some(code) = latchkey_harness::stub::run_if_named() {
        return code;
    }
    latchkey_dev::main()
}
