//! The canonical form of an audit record, its digest, and how records follow one another.
//!
//! It stands here, once, because two programs must agree on every byte: the control plane, which
//! writes the chain, and whoever checks an export of it without asking the control plane.
//!
//! Canonical form, which is what the SHA-256 covers: `"latchkey audit 1\0"`, organization (16
//! bytes), sequence, time in milliseconds (8 bytes each, big-endian), digest of the predecessor
//! (32; zeros before the first), then actor, action, subject and details, each behind its length
//! (4 bytes, big-endian). Details are a JSON object with sorted keys and without spaces.

use aws_lc_rs::digest;

/// The first bytes of every record.
pub const MAGIC: &[u8] = b"latchkey audit 1\0";

/// Bytes of a digest.
pub const DIGEST: usize = 32;

/// All that the digest of a record covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry<'a> {
    pub organization: [u8; 16],
    /// 1 for the first of an organization, then without gaps.
    pub sequence: u64,
    pub time_ms: i64,
    /// The digest of the predecessor; zeros for the first.
    pub previous: [u8; DIGEST],
    pub actor: &'a str,
    pub action: &'a str,
    pub subject: &'a str,
    /// As text, since every byte counts.
    pub details: &'a str,
}

impl Entry<'_> {
    /// Writes the canonical form.
    pub fn canonical(&self) -> Vec<u8> {
        let parts = [self.actor, self.action, self.subject, self.details];
        let texts: usize = parts.iter().map(|part| 4 + part.len()).sum();
        // With room for the digest, which follows it wherever it is kept.
        let mut bytes = Vec::with_capacity(PREVIOUS + DIGEST + texts + DIGEST);
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&self.organization);
        bytes.extend_from_slice(&self.sequence.to_be_bytes());
        bytes.extend_from_slice(&self.time_ms.to_be_bytes());
        bytes.extend_from_slice(&self.previous);
        for part in parts {
            let length = u32::try_from(part.len()).expect("a record is far below 4 GiB");
            bytes.extend_from_slice(&length.to_be_bytes());
            bytes.extend_from_slice(part.as_bytes());
        }
        bytes
    }

    /// Returns the digest that names the record and all before it.
    pub fn digest(&self) -> [u8; DIGEST] {
        digest_of(&self.canonical())
    }
}

/// Where the canonical form has what only the committer knows.
const SEQUENCE: usize = MAGIC.len() + 16;
const PREVIOUS: usize = SEQUENCE + 8 + 8;

/// Fills a record's place into its canonical form, which was written with any other, and returns
/// the digest it has there.
pub fn place(canonical: &mut [u8], sequence: u64, previous: &[u8; DIGEST]) -> [u8; DIGEST] {
    canonical[SEQUENCE..SEQUENCE + 8].copy_from_slice(&sequence.to_be_bytes());
    canonical[PREVIOUS..PREVIOUS + DIGEST].copy_from_slice(previous);
    digest_of(canonical)
}

fn digest_of(canonical: &[u8]) -> [u8; DIGEST] {
    let digest = digest::digest(&digest::SHA256, canonical);
    digest.as_ref().try_into().expect("SHA-256 has 32 bytes")
}

/// How a chain is broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    #[error("the record is not in the form it was written in")]
    Malformed,
    #[error("the record belongs to another organization")]
    Foreign,
    #[error("the record has another number: one was dropped, added or moved")]
    OutOfOrder { found: u64 },
    #[error("the record doesn't follow its predecessor")]
    Unlinked,
    #[error("the record was changed")]
    Edited,
    #[error("records at the end are missing")]
    Truncated,
    #[error("the chain ends otherwise than its head says")]
    WrongHead,
}

/// A walk along one organization's chain.
#[derive(Clone, Debug)]
pub struct Chain {
    organization: [u8; 16],
    /// Of the last record that held; 0 before the first.
    sequence: u64,
    digest: [u8; DIGEST],
}

impl Chain {
    /// Begins before the first record.
    pub fn begin(organization: [u8; 16]) -> Self {
        Self::after(organization, 0, [0; DIGEST])
    }

    /// Begins behind a record that is taken for true.
    pub fn after(organization: [u8; 16], sequence: u64, digest: [u8; DIGEST]) -> Self {
        Self { organization, sequence, digest }
    }

    pub fn sequence(&self) -> u64 {
        self.sequence
    }

    pub fn digest(&self) -> [u8; DIGEST] {
        self.digest
    }

    /// Returns the number that the next record must have.
    pub fn next(&self) -> u64 {
        self.sequence.saturating_add(1)
    }

    /// Judges the next record, which says of itself that it has this digest.
    pub fn follow(&mut self, entry: &Entry<'_>, digest: &[u8; DIGEST]) -> Result<(), Fault> {
        if entry.organization != self.organization {
            return Err(Fault::Foreign);
        }
        if entry.sequence != self.next() {
            return Err(Fault::OutOfOrder { found: entry.sequence });
        }
        if entry.previous != self.digest {
            return Err(Fault::Unlinked);
        }
        if entry.digest() != *digest {
            return Err(Fault::Edited);
        }
        self.sequence = entry.sequence;
        self.digest = *digest;
        Ok(())
    }
}

/// Writes a digest as text.
pub fn to_hex(digest: &[u8; DIGEST]) -> String {
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Reads what [`to_hex`] writes, and nothing else.
pub fn from_hex(text: &str) -> Option<[u8; DIGEST]> {
    let text = text.as_bytes();
    let value = |byte: &u8| match byte {
        b'0'..=b'9' => Some(byte - b'0'),
        b'a'..=b'f' => Some(byte - b'a' + 10),
        _ => None,
    };
    if text.len() != 2 * DIGEST {
        return None;
    }
    let mut bytes = [0; DIGEST];
    for (byte, pair) in bytes.iter_mut().zip(text.chunks_exact(2)) {
        *byte = value(&pair[0])? << 4 | value(&pair[1])?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(sequence: u64, previous: [u8; DIGEST]) -> Entry<'static> {
        Entry {
            organization: [1; 16],
            sequence,
            time_ms: 5,
            previous,
            actor: "user ada",
            action: "confirm_run",
            subject: "run 1",
            details: r#"{"a":1}"#,
        }
    }

    #[test]
    fn the_digest_of_a_record_never_changes() {
        // On disk and in exports: a change of this value is a new format.
        assert_eq!(
            to_hex(&entry(1, [0; DIGEST]).digest()),
            "4a451608aaf8c2a704860e6bc1e737886deab78bc688d46d69f01a9d56a61146"
        );
    }

    #[test]
    fn a_place_filled_in_later_is_the_place_written_at_once() {
        let there = entry(7, [3; DIGEST]);
        let mut bytes = entry(0, [0; DIGEST]).canonical();
        assert_eq!(place(&mut bytes, 7, &[3; DIGEST]), there.digest());
        assert_eq!(bytes, there.canonical());
    }

    #[test]
    fn each_fault_is_told() {
        let first = entry(1, [0; DIGEST]);
        let mut chain = Chain::begin([1; 16]);
        chain.follow(&first, &first.digest()).unwrap();
        let good = entry(2, first.digest());
        let other = Entry { organization: [2; 16], ..good };
        assert_eq!(chain.clone().follow(&other, &other.digest()), Err(Fault::Foreign));
        let third = entry(3, good.digest());
        let skipped = chain.clone().follow(&third, &third.digest());
        assert_eq!(skipped, Err(Fault::OutOfOrder { found: 3 }));
        let loose = entry(2, [9; DIGEST]);
        assert_eq!(chain.clone().follow(&loose, &loose.digest()), Err(Fault::Unlinked));
        let edited = Entry { actor: "user eve", ..good };
        assert_eq!(chain.clone().follow(&edited, &good.digest()), Err(Fault::Edited));
        assert_eq!(chain.follow(&good, &good.digest()), Ok(()));
        assert_eq!((chain.sequence(), chain.digest()), (2, good.digest()));
    }

    #[test]
    fn digests_are_read_as_they_are_written() {
        let digest = entry(1, [7; DIGEST]).digest();
        assert_eq!(from_hex(&to_hex(&digest)), Some(digest));
        assert_eq!(from_hex(&to_hex(&digest).to_uppercase()), None);
        assert_eq!(from_hex("00"), None);
    }
}
