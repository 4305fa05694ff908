//! How much of `raw` became how much of `log`.
//!
//! Two slots are written in turn, each with a digest: a torn write destroys the older one's
//! successor, never both. A slot that tells of more than the log holds is none: it was written when
//! the log could not be synced.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use aws_lc_rs::digest::{SHA256, digest};

const SLOT: usize = 40;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Position {
    pub(super) raw: u64,
    pub(super) log: u64,
    /// How much of `raw` was left out for want of room, and is not told yet.
    pub(super) left_out: u64,
}

pub(super) struct Checkpoint {
    file: File,
    number: u64,
}

impl Checkpoint {
    /// Finds the newest position within a log of this length.
    pub(super) fn open(file: File, log: u64) -> io::Result<(Self, Position)> {
        let mut number = 0;
        let mut newest = (0, Position::default());
        for slot in 0..2 {
            let mut bytes = [0u8; SLOT];
            match file.read_exact_at(&mut bytes, slot * SLOT as u64) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => continue,
                Err(error) => return Err(error),
            }
            let Some(found) = decode(&bytes) else { continue };
            number = found.0.max(number);
            if found.0 > newest.0 && found.1.log <= log {
                newest = found;
            }
        }
        // The slot that is worthless is the next to be written.
        let number = if number > newest.0 { newest.0 } else { number };
        Ok((Self { file, number }, newest.1))
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
    bytes[24..32].copy_from_slice(&position.left_out.to_le_bytes());
    let sum = digest(&SHA256, &bytes[..32]);
    bytes[32..].copy_from_slice(&sum.as_ref()[..8]);
    bytes
}

fn decode(bytes: &[u8; SLOT]) -> Option<(u64, Position)> {
    let at = |at: usize| bytes[at..at + 8].try_into().map(u64::from_le_bytes).ok();
    let number = at(0)?;
    let position = Position { raw: at(8)?, log: at(16)?, left_out: at(24)? };
    if encode(number, position) == *bytes {
        return Some((number, position));
    }
    // As older programs wrote it: with a longer digest, and nothing of what was left out.
    let sum = digest(&SHA256, &bytes[..24]);
    let older = Position { left_out: 0, ..position };
    (sum.as_ref()[..16] == bytes[24..]).then_some((number, older))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_torn_slot_leaves_the_one_before() {
        let file = tempfile::tempfile().unwrap();
        let (mut checkpoint, at) = Checkpoint::open(file.try_clone().unwrap(), 0).unwrap();
        assert_eq!(at, Position::default());
        let position = |n| Position { raw: n, log: n * 10, left_out: n };
        for n in 1..=3 {
            checkpoint.write(position(n)).unwrap();
        }
        let reopen = |log| Checkpoint::open(file.try_clone().unwrap(), log).unwrap();
        assert_eq!(reopen(30).1, position(3));
        file.write_all_at(b"torn", SLOT as u64 + 9).unwrap();
        assert_eq!(reopen(30).1, position(2));
    }
    /// Its log was written, but not synced, when the host went down.
    #[test]
    fn a_slot_that_tells_of_more_than_the_log_holds_is_none() {
        let file = tempfile::tempfile().unwrap();
        let position = |n| Position { raw: n, log: n * 10, left_out: 0 };
        let (mut checkpoint, _) = Checkpoint::open(file.try_clone().unwrap(), 0).unwrap();
        for n in 1..=3 {
            checkpoint.write(position(n)).unwrap();
        }
        let reopen = |log| Checkpoint::open(file.try_clone().unwrap(), log).unwrap();
        let (mut successor, at) = reopen(29);
        assert_eq!(at, position(2));
        successor.write(Position { raw: 4, log: 29, left_out: 0 }).unwrap();
        assert_eq!(reopen(30).1, Position { raw: 4, log: 29, left_out: 0 });
    }

    #[test]
    fn a_slot_of_an_older_program_is_understood() {
        let file = tempfile::tempfile().unwrap();
        let mut bytes = [0u8; SLOT];
        for (at, number) in [(0, 5u64), (8, 70), (16, 90)] {
            bytes[at..at + 8].copy_from_slice(&number.to_le_bytes());
        }
        let sum = digest(&SHA256, &bytes[..24]);
        bytes[24..].copy_from_slice(&sum.as_ref()[..16]);
        file.write_all_at(&bytes, SLOT as u64).unwrap();
        let (_, at) = Checkpoint::open(file, 100).unwrap();
        assert_eq!(at, Position { raw: 70, log: 90, left_out: 0 });
    }
}
