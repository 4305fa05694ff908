//! Sealing of streams, segment by segment (the STREAM construction), so that neither end holds
//! the whole, and a truncated, reordered or extended stream doesn't open.
//!
//! Header: `"LKS1"`, key version (1 byte), salt (32), nonce prefix (4). The salt derives a key
//! for this stream alone. Then segments of 64 KiB and their tags; only the last may be shorter,
//! and a stream without bytes has one empty segment. Nonce of a segment: prefix (4), number (7),
//! 1 if it is the last, else 0. Header and context are authenticated with every segment.

use std::fmt;

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use zeroize::Zeroize;

use super::{KEY_VERSION, MasterKey, OpenError, random};

/// Plaintext bytes of a segment that is not the last.
pub const SEGMENT: usize = 64 * 1024;
/// What sealing adds to each segment.
pub const TAG: usize = 16;
pub const HEADER: usize = MAGIC.len() + 1 + SALT + PREFIX;

const MAGIC: &[u8; 4] = b"LKS1";
const SALT: usize = 32;
const PREFIX: usize = 4;

/// Whether a segment ends its stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    Inner,
    Last,
}

/// Seals the segments of one stream in turn.
pub struct Sealer(Segments);

/// Opens the segments of one stream in turn.
pub struct Opener(Segments);

/// What both ends keep of a stream.
struct Segments {
    key: LessSafeKey,
    prefix: [u8; PREFIX],
    authenticated: Vec<u8>,
    /// The number of the next segment; `None` after the last one.
    next: Option<u64>,
}

impl Sealer {
    /// Begins a stream for one place; returns the header, which goes first.
    pub fn new(master: &MasterKey, context: &[u8]) -> (Self, [u8; HEADER]) {
        let mut header = [0; HEADER];
        header[..4].copy_from_slice(MAGIC);
        header[4] = KEY_VERSION;
        header[5..].copy_from_slice(&random::<{ SALT + PREFIX }>());
        (Self(Segments::new(master, context, &header)), header)
    }

    /// Seals a segment where it lies and appends its tag.
    ///
    /// # Panics
    ///
    /// If an inner segment is not full, or the stream has ended.
    pub fn seal(&mut self, segment: &mut Vec<u8>, place: Place) {
        assert!(
            segment.len() == SEGMENT || (place == Place::Last && segment.len() < SEGMENT),
            "only the last segment may be short"
        );
        let nonce = self.0.advance(place).expect("a stream is not sealed beyond its end");
        self.0
            .key
            .seal_in_place_append_tag(nonce, Aad::from(&self.0.authenticated), segment)
            .expect("AES-GCM seals a segment");
    }
}

impl Opener {
    /// Begins a stream by its header.
    pub fn new(
        master: &MasterKey,
        context: &[u8],
        header: &[u8; HEADER],
    ) -> Result<Self, OpenError> {
        if !header.starts_with(MAGIC) {
            return Err(OpenError::Rejected);
        }
        if header[4] != KEY_VERSION {
            return Err(OpenError::UnknownKey { version: header[4] });
        }
        Ok(Self(Segments::new(master, context, header)))
    }

    /// Opens a segment where it lies and cuts off its tag. The caller knows the last one by the
    /// end of the file; if that is not where the stream ended, it is rejected.
    pub fn open(&mut self, segment: &mut Vec<u8>, place: Place) -> Result<(), OpenError> {
        let nonce = self.0.advance(place).ok_or(OpenError::Rejected)?;
        let opened = self.0.key.open_in_place(nonce, Aad::from(&self.0.authenticated), segment);
        match opened.map(|plaintext| plaintext.len()) {
            Ok(length) => {
                segment.truncate(length);
                Ok(())
            }
            Err(_) => {
                segment.zeroize();
                self.0.next = None;
                Err(OpenError::Rejected)
            }
        }
    }
}

impl Segments {
    fn new(master: &MasterKey, context: &[u8], header: &[u8; HEADER]) -> Self {
        let (salt, prefix) = header[MAGIC.len() + 1..].split_at(SALT);
        let info = [b"stream", salt];
        let key = master.blobs.expand(&info, &AES_256_GCM).expect("HKDF gives short keys");
        Self {
            key: LessSafeKey::new(UnboundKey::from(key)),
            prefix: prefix.try_into().expect("the header ends with the prefix"),
            authenticated: [header, context].concat(),
            next: Some(0),
        }
    }

    fn advance(&mut self, place: Place) -> Option<Nonce> {
        let number = self.next?;
        let mut nonce = [0; NONCE_LEN];
        nonce[..PREFIX].copy_from_slice(&self.prefix);
        nonce[PREFIX..PREFIX + 7].copy_from_slice(&number.to_be_bytes()[1..]);
        nonce[NONCE_LEN - 1] = match place {
            Place::Inner => 0,
            Place::Last => 1,
        };
        self.next = match place {
            Place::Inner => Some(number + 1),
            Place::Last => None,
        };
        Some(Nonce::assume_unique_for_key(nonce))
    }
}

impl fmt::Debug for Sealer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sealer").field("next", &self.0.next).finish_non_exhaustive()
    }
}

impl fmt::Debug for Opener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Opener").field("next", &self.0.next).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A header and sealed segments.
    type Stream = ([u8; HEADER], Vec<Vec<u8>>);

    fn sealed(master: &MasterKey, plaintext: &[u8]) -> Stream {
        let (mut sealer, header) = Sealer::new(master, b"here");
        let mut segments: Vec<Vec<u8>> = plaintext.chunks(SEGMENT).map(<[u8]>::to_vec).collect();
        if segments.is_empty() {
            segments.push(Vec::new());
        }
        let last = segments.len() - 1;
        for (index, segment) in segments.iter_mut().enumerate() {
            sealer.seal(segment, if index == last { Place::Last } else { Place::Inner });
        }
        (header, segments)
    }

    fn opened(
        master: &MasterKey,
        context: &[u8],
        (header, segments): &Stream,
    ) -> Result<Vec<u8>, OpenError> {
        let mut opener = Opener::new(master, context, header)?;
        let mut plaintext = Vec::new();
        let last = segments.len() - 1;
        for (index, segment) in segments.iter().enumerate() {
            let mut segment = segment.clone();
            let place = if index == last { Place::Last } else { Place::Inner };
            opener.open(&mut segment, place)?;
            plaintext.extend(segment);
        }
        Ok(plaintext)
    }

    fn bytes(length: usize) -> Vec<u8> {
        (0..length).map(|index| (index * 31 % 251) as u8).collect()
    }

    #[test]
    fn streams_of_all_lengths_around_a_segment_open() {
        let master = MasterKey::ephemeral();
        for length in [0, 1, SEGMENT - 1, SEGMENT, SEGMENT + 1, 3 * SEGMENT, 3 * SEGMENT + 5] {
            let plaintext = bytes(length);
            let stream = sealed(&master, &plaintext);
            assert_eq!(opened(&master, b"here", &stream).unwrap(), plaintext);
        }
    }

    #[test]
    fn a_changed_stream_does_not_open() {
        let master = MasterKey::ephemeral();
        let whole = sealed(&master, &bytes(3 * SEGMENT));
        let other = sealed(&master, &bytes(3 * SEGMENT));
        let changed = |change: &dyn Fn(&mut Stream)| {
            let mut stream = whole.clone();
            change(&mut stream);
            opened(&master, b"here", &stream)
        };
        assert!(changed(&|_| ()).is_ok());
        assert!(changed(&|stream| drop(stream.1.pop())).is_err(), "truncated at a segment");
        assert!(changed(&|stream| stream.1[2].truncate(9)).is_err(), "truncated within one");
        assert!(changed(&|stream| stream.1.swap(0, 1)).is_err(), "reordered");
        assert!(changed(&|stream| drop(stream.1.remove(0))).is_err(), "beginning dropped");
        assert!(changed(&|stream| stream.1.push(stream.1[2].clone())).is_err(), "extended");
        assert!(changed(&|stream| stream.1[1] = other.1[1].clone()).is_err(), "spliced");
        for at in 0..HEADER {
            assert!(changed(&|stream| stream.0[at] ^= 1).is_err(), "header byte {at}");
        }
        for segment in 0..3 {
            for at in [0, SEGMENT - 1, SEGMENT, SEGMENT + TAG - 1] {
                assert!(changed(&|stream| stream.1[segment][at] ^= 0x80).is_err());
            }
        }
        assert!(opened(&master, b"there", &whole).is_err());
        assert!(opened(&MasterKey::ephemeral(), b"here", &whole).is_err());
    }

    #[test]
    fn two_streams_of_the_same_bytes_share_nothing() {
        let master = MasterKey::ephemeral();
        let (one, two) = (sealed(&master, b"same"), sealed(&master, b"same"));
        assert_ne!(one.0, two.0);
        assert_ne!(one.1, two.1);
    }
}
