//! Bytes that arrive in parts, for a reader that blocks.

use std::io::{self, Cursor, Read};

use tokio::sync::mpsc;

/// Reads what is sent over a channel, until it is closed. Blocks.
pub(super) struct Chunks {
    chunks: mpsc::Receiver<Vec<u8>>,
    current: Cursor<Vec<u8>>,
}

impl Chunks {
    pub(super) fn new(chunks: mpsc::Receiver<Vec<u8>>) -> Self {
        Self { chunks, current: Cursor::new(vec![]) }
    }
}

impl Read for Chunks {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let read = self.current.read(buffer)?;
            if read > 0 {
                return Ok(read);
            }
            match self.chunks.blocking_recv() {
                Some(chunk) => self.current = Cursor::new(chunk),
                None => return Ok(0),
            }
        }
    }
}
