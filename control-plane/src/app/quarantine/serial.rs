//! Finds the serial of a Terraform state, so that it can be replaced without touching any other
//! byte: what is not understood is not lost.

use std::ops::Range;

use serde::Deserialize;
use serde_json::value::RawValue;

#[derive(Deserialize)]
struct Serial<'a> {
    #[serde(borrow)]
    serial: &'a RawValue,
}

/// Finds where the number of a state's top-level `serial` stands.
pub(super) fn place(state: &[u8]) -> Option<Range<usize>> {
    let text = std::str::from_utf8(state).ok()?;
    let Serial { serial } = serde_json::from_str(text).ok()?;
    let number = serial.get();
    number.parse::<u64>().ok()?;
    // The number is borrowed from the text, so the difference is where it lies.
    let start = (number.as_ptr() as usize).checked_sub(text.as_ptr() as usize)?;
    let place = start..start.checked_add(number.len())?;
    (state.get(place.clone()) == Some(number.as_bytes())).then_some(place)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_top_level_serial_is_cut_out_and_every_other_byte_stays() {
        let state = r#"{ "resources":[{"serial":1, "big": 12345678901234567890123}],
  "ser\u0069al" : 41 ,"outputs":{"x":1.0e3},"later":null}
"#;
        let place = place(state.as_bytes()).unwrap();
        let joined = [&state[..place.start], "42", &state[place.end..]].concat();
        assert_eq!(joined, state.replace(": 41 ,", ": 42 ,"));
    }

    #[test]
    fn what_has_no_plain_serial_has_no_place_for_one() {
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
            assert_eq!(place(state.as_bytes()), None, "{state}");
        }
    }
}
