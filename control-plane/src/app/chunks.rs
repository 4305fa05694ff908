//! Bytes that arrive in parts, for a reader that blocks.

use std::io::{self, Cursor, Read};

use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TryRecvError;

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
            // What is there already needs no wait, which not every thread may do.
            let next = match self.chunks.try_recv() {
                Ok(chunk) => Some(chunk),
                Err(TryRecvError::Disconnected) => None,
                Err(TryRecvError::Empty) => self.chunks.blocking_recv(),
            };
            match next {
                Some(chunk) => self.current = Cursor::new(chunk),
                None => return Ok(0),
            }
        }
    }
}
