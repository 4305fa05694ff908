//! Ends this process with whoever started it: they hold the other end of standard input, and the
//! kernel closes it when they are gone, even by SIGKILL.

use std::io::{ErrorKind, Read};
use std::process;
use std::thread;

/// Ends the process, at once, when standard input closes.
pub(crate) fn end_with_stdin() {
    thread::spawn(|| {
        let mut stdin = std::io::stdin();
        let mut ignored = [0; 64];
        loop {
            match stdin.read(&mut ignored) {
                Ok(read) if read > 0 => {}
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                // Every program here must survive a sudden end, so nothing is said good-bye to.
                Ok(_) | Err(_) => process::exit(0),
            }
        }
    });
}
