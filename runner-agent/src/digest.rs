//! SHA-256 digests as lower-case hex, the form they have on the wire.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use aws_lc_rs::digest::{Context, SHA256, digest};

/// Digests a stream as it passes.
pub(crate) struct Digester(Context);

impl Digester {
    pub(crate) fn new() -> Self {
        Self(Context::new(&SHA256))
    }

    pub(crate) fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    pub(crate) fn finish(self) -> String {
        hex::encode(self.0.finish())
    }
}

pub(crate) fn of_bytes(bytes: &[u8]) -> String {
    hex::encode(digest(&SHA256, bytes))
}

pub(crate) fn of_file(path: &Path) -> io::Result<String> {
    let mut file = File::open(path)?;
    let mut digester = Digester::new();
    let mut buffer = vec![0u8; 64 * 1024];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(digester.finish()),
            n => digester.update(&buffer[..n]),
        }
    }
}
