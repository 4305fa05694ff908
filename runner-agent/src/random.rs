//! Random bytes from the one cryptographic provider.

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
    aws_lc_rs::rand::fill(bytes).expect("the system's random source answers or nothing is safe");
}
