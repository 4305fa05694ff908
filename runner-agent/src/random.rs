//! Random bytes, straight from the kernel.
//!
//! A supervisor lives for one job and draws a few tokens. The cryptographic provider's own
//! generator would gather entropy for 30 ms first, in every one of them, between `Go` and the
//! start of terraform.

use rustix::io::Errno;
use rustix::rand::{GetRandomFlags, getrandom};

/// Answers 32 random bytes as 64 hex digits.
pub(crate) fn token() -> String {
    let mut bytes = [0u8; 32];
    fill(&mut bytes);
    hex::encode(bytes)
}

/// Answers a number in 0..1, for jitter.
pub(crate) fn fraction() -> f64 {
    let mut bytes = [0u8; 4];
    fill(&mut bytes);
    f64::from(u32::from_le_bytes(bytes)) / f64::from(u32::MAX)
}

fn fill(bytes: &mut [u8]) {
    let mut filled = 0;
    while filled < bytes.len() {
        match getrandom(&mut bytes[filled..], GetRandomFlags::empty()) {
            Ok(more) => filled += more,
            Err(Errno::INTR) => {}
            Err(error) => panic!("no random bytes, so nothing is safe: {error}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_long_and_never_the_same() {
        let tokens: std::collections::BTreeSet<_> = (0..1000).map(|_| token()).collect();
        assert_eq!(tokens.len(), 1000);
        assert!(tokens.iter().all(|token| token.len() == 64));
        assert!((0..1000).map(|_| fraction()).all(|share| (0.0..=1.0).contains(&share)));
    }
}
