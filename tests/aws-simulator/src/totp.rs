//! The codes of a TOTP device: RFC 6238 with SHA-1, thirty seconds, six digits, which is what
//! AWS's virtual and hardware devices speak. Which codes are still good is `device`'s business.

use aws_lc_rs::hmac;

/// How long one code is the current one, in seconds.
pub const STEP_SECONDS: i64 = 30;

/// Says which step a moment (in Unix seconds) falls into.
pub fn step_at(unix_seconds: i64) -> i64 {
    unix_seconds.div_euclid(STEP_SECONDS)
}

/// Computes the six digits of one step.
pub fn code(seed: &[u8], step: i64) -> String {
    format!("{:06}", truncated(seed, step) % 1_000_000)
}

fn truncated(seed: &[u8], step: i64) -> u32 {
    let key = hmac::Key::new(hmac::HMAC_SHA1_FOR_LEGACY_USE_ONLY, seed);
    let tag = hmac::sign(&key, &step.to_be_bytes());
    let bytes = tag.as_ref();
    let offset = usize::from(bytes[bytes.len() - 1] & 0x0f);
    bytes[offset..offset + 4].iter().fold(0, |value, byte| (value << 8) | u32::from(*byte))
        & 0x7fff_ffff
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_agree_with_rfc_6238() {
        let seed = b"12345678901234567890";
        for (time, eight_digits) in [
            (59, 94_287_082),
            (1_111_111_109, 7_081_804),
            (1_111_111_111, 14_050_471),
            (1_234_567_890, 89_005_924),
            (2_000_000_000, 69_279_037),
            (20_000_000_000, 65_353_130),
        ] {
            assert_eq!(truncated(seed, step_at(time)) % 100_000_000, eight_digits, "at {time}");
            assert_eq!(code(seed, step_at(time)), format!("{:06}", eight_digits % 1_000_000));
        }
    }
}
