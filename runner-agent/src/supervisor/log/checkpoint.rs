//! How much of `raw` became how much of `log`.
//!
//! Two slots are written in turn, each with a digest: a torn write destroys the older one's
//! successor, never both.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use aws_lc_rs::digest::{SHA256, digest};

const SLOT: usize = 40;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Position {
    pub(super) raw: u64,
    pub(super) log: u64,
}

pub(super) struct Checkpoint {
    file: File,
    number: u64,
}

impl Checkpoint {
    pub(super) fn open(file: File) -> io::Result<(Self, Position)> {
        let mut newest = (0, Position::default());
        for slot in 0..2 {
            let mut bytes = [0u8; SLOT];
            match file.read_exact_at(&mut bytes, slot * SLOT as u64) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => continue,
                Err(error) => return Err(error),
            }
            if let Some(found) = decode(&bytes)
                && found.0 > newest.0
            {
                newest = found;
            }
        }
        Ok((Self { file, number: newest.0 }, newest.1))
    }

    pub(super) fn write(&mut self, position: Position) -> io::Result<()> {
        let number = self.number + 1;
        self.file.write_all_at(&encode(number, position), (number % 2) * SLOT as u64)?;
        self.file.sync_data()?;
        self.number = number;
        Ok(())
    }
}

fn encode(number: u64, position: Position) -> [u8; SLOT] {
    let mut bytes = [0u8; SLOT];
    bytes[..8].copy_from_slice(&number.to_le_bytes());
    bytes[8..16].copy_from_slice(&position.raw.to_le_bytes());
    bytes[16..24].copy_from_slice(&position.log.to_le_bytes());
    let sum = digest(&SHA256, &bytes[..24]);
    bytes[24..].copy_from_slice(&sum.as_ref()[..16]);
    bytes
}

fn decode(bytes: &[u8; SLOT]) -> Option<(u64, Position)> {
    let number = |at: usize| bytes[at..at + 8].try_into().map(u64::from_le_bytes).ok();
    let position = Position { raw: number(8)?, log: number(16)? };
    let number = number(0)?;
    (encode(number, position) == *bytes).then_some((number, position))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_torn_slot_leaves_the_one_before() {
        let file = tempfile::tempfile().unwrap();
        let (mut checkpoint, at) = Checkpoint::open(file.try_clone().unwrap()).unwrap();
        assert_eq!(at, Position::default());
        for n in 1..=3 {
            checkpoint.write(Position { raw: n, log: n * 10 }).unwrap();
        }
        let reopen = || Checkpoint::open(file.try_clone().unwrap()).unwrap().1;
        assert_eq!(reopen(), Position { raw: 3, log: 30 });
        file.write_all_at(b"torn", SLOT as u64 + 9).unwrap();
        assert_eq!(reopen(), Position { raw: 2, log: 20 });
    }
}
