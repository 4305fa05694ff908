//! The shape of a token code. The code itself stays in the caller's wrapped buffer.

/// Why six digits were not recognised.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a token code is exactly six ASCII digits")]
pub struct NotACode;

/// Accepts exactly six ASCII digits: `char::is_numeric` and a regular expression's `\d` would
/// let other scripts' digits through.
pub fn check(code: &[u8]) -> Result<(), NotACode> {
    if code.len() == 6 && code.iter().all(u8::is_ascii_digit) { Ok(()) } else { Err(NotACode) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{any, proptest};

    use super::check;

    #[test]
    fn six_ascii_digits_and_nothing_else() {
        assert!(check(b"000000").is_ok());
        assert!(check(b"123456").is_ok());
        for bad in
            ["", "12345", "1234567", " 123456", "12345\0", "１２３４５６", "12٣456", "12345x"]
        {
            assert!(check(bad.as_bytes()).is_err(), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn whatever_passes_is_six_digits(text in any::<String>()) {
            if check(text.as_bytes()).is_ok() {
                assert!(text.len() == 6 && text.parse::<u32>().is_ok());
            }
        }
    }
}
