//! Finds the serial of a Terraform state, so that it can be replaced without touching any other
//! byte: what is not understood is not lost.

use serde::Deserialize;
use serde_json::value::RawValue;

/// A state without its serial.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Parts<'a> {
    pub(super) before: &'a [u8],
    pub(super) after: &'a [u8],
}

#[derive(Deserialize)]
struct Serial<'a> {
    #[serde(borrow)]
    serial: &'a RawValue,
}

/// Splits a state around the number of its top-level `serial`.
pub(super) fn split(state: &[u8]) -> Option<Parts<'_>> {
    let text = std::str::from_utf8(state).ok()?;
    let Serial { serial } = serde_json::from_str(text).ok()?;
    let number = serial.get();
    number.parse::<u64>().ok()?;
    // The number is borrowed from the text, so the difference is where it lies.
    let start = (number.as_ptr() as usize).checked_sub(text.as_ptr() as usize)?;
    let (before, rest) = state.split_at_checked(start)?;
    let (found, after) = rest.split_at_checked(number.len())?;
    (found == number.as_bytes()).then_some(Parts { before, after })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_top_level_serial_is_cut_out_and_every_other_byte_stays() {
        let state = r#"{ "resources":[{"serial":1, "big": 12345678901234567890123}],
  "ser\u0069al" : 41 ,"outputs":{"x":1.0e3},"later":null}
"#;
        let Parts { before, after } = split(state.as_bytes()).unwrap();
        let joined = [before, b"42", after].concat();
        assert_eq!(String::from_utf8(joined).unwrap(), state.replace(": 41 ,", ": 42 ,"));
    }

    #[test]
    fn what_has_no_plain_serial_is_not_split() {
        for state in [
            "",
            "[]",
            r#"{"serial":"7"}"#,
            r#"{"serial":7.5}"#,
            r#"{"serial":-1}"#,
            r#"{"serial":1,"serial":2}"#,
            r#"{"nested":{"serial":1}}"#,
            r#"{"serial":1} x"#,
        ] {
            assert_eq!(split(state.as_bytes()), None, "{state}");
        }
    }
}
