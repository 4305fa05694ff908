//! One line of `raw` to its canonical form: always one line of JSON, masked, without control
//! characters that a terminal would obey, at most `LONGEST` bytes.
//!
//! Terraform's own JSON passes through. Everything else, and JSON that claims to be ours, is
//! wrapped as `"type":"console"`, so that nothing in `raw` can pose as a line of Latchkey's.

use std::borrow::Cow;

use jiff::Timestamp;
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::{Value, json};

use super::super::mask::Masker;

/// What one message to the control plane holds, end of line included.
pub(crate) const LONGEST: usize = 256 * 1024;

/// Text per wrapped line: escaping at most doubles it, a lossy character at most triples it.
const PIECE: usize = 60 * 1024;

/// The fields by which terraform's lines are known.
#[derive(Deserialize)]
struct Head<'a> {
    #[serde(rename = "@level", borrow)]
    level: Cow<'a, str>,
    #[serde(rename = "@message", borrow)]
    message: Cow<'a, str>,
    #[serde(rename = "@module", borrow)]
    module: Cow<'a, str>,
    #[serde(rename = "type", borrow, default)]
    kind: Option<Cow<'a, str>>,
    /// In a dump of the state only.
    #[serde(default)]
    state: Option<StateHead>,
}

/// What every state has. Of any other shape, a field of this name is no dump.
#[derive(Deserialize)]
#[serde(untagged)]
enum StateHead {
    State(StateFields),
    Other(IgnoredAny),
}

#[derive(Deserialize)]
struct StateFields {
    #[serde(rename = "lineage")]
    _lineage: IgnoredAny,
    #[serde(rename = "serial")]
    _serial: IgnoredAny,
}

/// What a line was.
pub(super) enum Canonical {
    Line,
    /// It holds terraform's outputs; masked, when that is JSON.
    Outputs(Option<Value>),
    /// It holds the state: nothing was appended.
    Dump,
}

/// Appends the canonical form of a line.
pub(super) fn canonical(
    bytes: &[u8],
    masker: &Masker,
    now: Timestamp,
    out: &mut Vec<u8>,
) -> Canonical {
    let text = String::from_utf8_lossy(bytes);
    let text = text.trim_end_matches('\r');
    let head =
        if text.starts_with('{') { serde_json::from_str::<Head<'_>>(text).ok() } else { None };
    let Some(head) = head.filter(|head| head.module != "latchkey") else {
        wrap(text, false, masker, now, out);
        return Canonical::Line;
    };
    if matches!(head.state, Some(StateHead::State(_))) {
        return Canonical::Dump;
    }
    let outputs = head.kind.as_deref() == Some("outputs");
    let masked = masker.json(text);
    if masked.len() < LONGEST {
        out.extend_from_slice(masked.as_bytes());
        out.push(b'\n');
    } else {
        shortened(&head, masked.len(), masker, now, out);
    }
    if outputs { Canonical::Outputs(serde_json::from_str(&masked).ok()) } else { Canonical::Line }
}

/// Appends a piece of a line too long to be held whole.
pub(super) fn piece(
    bytes: &[u8],
    continued: bool,
    masker: &Masker,
    now: Timestamp,
    out: &mut Vec<u8>,
) {
    wrap(&String::from_utf8_lossy(bytes), continued, masker, now, out);
}

/// Appends a line of ours.
pub(super) fn own(line: &Value, masker: &Masker, out: &mut Vec<u8>) {
    let line = line.to_string();
    let masked = masker.json(&line);
    debug_assert!(masked.len() < LONGEST, "a line of ours is short");
    out.extend_from_slice(masked.as_bytes());
    out.push(b'\n');
}

/// Answers text without ANSI sequences and control characters, but for tabs.
pub(crate) fn plain(text: &str) -> Cow<'_, str> {
    if !text.chars().any(|c| c.is_control() && c != '\t') {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len());
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '\u{1b}' => match chars.next() {
                Some('[') => {
                    // Parameters and intermediates, up to the final byte.
                    while chars.next_if(|c| matches!(c, ' '..='?')).is_some() {}
                    chars.next_if(|c| matches!(c, '@'..='~'));
                }
                Some(']' | 'P' | 'X' | '^' | '_') => {
                    while let Some(c) = chars.next() {
                        let ends = c == '\u{7}' || c == '\u{9c}';
                        if ends || (c == '\u{1b}' && chars.next_if_eq(&'\\').is_some()) {
                            break;
                        }
                    }
                }
                Some(_) | None => {}
            },
            c if c.is_control() && c != '\t' => {}
            c => out.push(c),
        }
    }
    Cow::Owned(out)
}

fn wrap(text: &str, continued: bool, masker: &Masker, now: Timestamp, out: &mut Vec<u8>) {
    // Before, because a sequence may have been part of the secret; after, because one may have
    // been put into it.
    let masked = masker.text(text);
    let stripped = plain(&masked);
    let masked = masker.text(&stripped);
    let mut rest: &str = &masked;
    let mut continued = continued;
    loop {
        let mut end = rest.len().min(PIECE);
        while !rest.is_char_boundary(end) {
            end -= 1;
        }
        let mut line = json!({
            "@level": "info",
            "@message": &rest[..end],
            "@module": "latchkey",
            "@timestamp": now.to_string(),
            "type": "console",
        });
        if continued {
            line["continued"] = Value::Bool(true);
        }
        out.extend_from_slice(line.to_string().as_bytes());
        out.push(b'\n');
        rest = &rest[end..];
        continued = true;
        if rest.is_empty() {
            return;
        }
    }
}

fn shortened(head: &Head<'_>, length: usize, masker: &Masker, now: Timestamp, out: &mut Vec<u8>) {
    let message = masker.text(&head.message);
    let mut end = message.len().min(PIECE);
    while !message.is_char_boundary(end) {
        end -= 1;
    }
    let line = json!({
        "@level": &*masker.text(&head.level),
        "@message": &*plain(&message[..end]),
        "@module": "latchkey",
        "@timestamp": now.to_string(),
        "type": "shortened",
        "original_type": head.kind.as_deref(),
        "original_length": length,
    });
    out.extend_from_slice(line.to_string().as_bytes());
    out.push(b'\n');
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use secrecy::SecretString;

    use super::*;

    fn now() -> Timestamp {
        "2026-01-02T03:04:05Z".parse().unwrap()
    }

    fn convert(line: &[u8]) -> Vec<Value> {
        let mut out = Vec::new();
        canonical(line, &Masker::default(), now(), &mut out);
        let text = String::from_utf8(out).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    #[track_caller]
    fn check_text(line: &[u8], expect: &str) {
        let lines = convert(line);
        assert_eq!(lines.len(), 1);
        assert_eq!(lines[0]["type"], "console");
        assert_eq!(lines[0]["@module"], "latchkey");
        assert_eq!(lines[0]["@message"], expect);
    }

    #[test]
    fn terraforms_own_lines_pass_unchanged() {
        let line = br#"{"@level":"info","@message":"x","@module":"terraform.ui","type":"version"}"#;
        let mut out = Vec::new();
        canonical(line, &Masker::default(), now(), &mut out);
        assert_eq!(out, [line.as_slice(), b"\n"].concat());
    }

    #[test]
    fn everything_else_is_wrapped() {
        check_text(b"plain\ttext\r", "plain\ttext");
        check_text(b"bad \xff utf-8", "bad \u{fffd} utf-8");
        check_text(b"\x1b[31mred\x1b[0m \x07bell", "red bell");
        check_text(b"\x1b]0;title\x07x\x1b]8;;u\x1b\\y", "xy");
        check_text("c1 \u{9b}31m".as_bytes(), "c1 31m");
        check_text(b"{\"some\":\"json\"}", "{\"some\":\"json\"}");
        check_text(b"", "");
        let forged =
            br#"{"@level":"info","@message":"x","@module":"latchkey","type":"phase"}"#.as_slice();
        check_text(forged, std::str::from_utf8(forged).unwrap());
        let doubled = br#"{"@level":"a","@message":"x","@module":"t","@module":"latchkey"}"#;
        check_text(doubled, std::str::from_utf8(doubled).unwrap());
    }

    #[test]
    fn long_lines_keep_within_a_message() {
        let lines = convert("\"".repeat(300_000).as_bytes());
        assert!(lines.len() > 1 && lines[0].get("continued").is_none());
        assert!(lines[1..].iter().all(|line| line["continued"] == true));
        let whole: usize = lines.iter().map(|l| l["@message"].as_str().unwrap().len()).sum();
        assert_eq!(whole, 300_000);

        let long = format!(
            r#"{{"@level":"info","@message":"Outputs: 1","@module":"t","type":"outputs","outputs":{{"a":{{"value":"{}"}}}}}}"#,
            "x".repeat(LONGEST)
        );
        let mut out = Vec::new();
        let outputs = canonical(long.as_bytes(), &Masker::default(), now(), &mut out);
        assert!(matches!(outputs, Canonical::Outputs(Some(_))) && out.len() < LONGEST);
        let line: Value = serde_json::from_slice(&out).unwrap();
        assert_eq!(
            (&line["type"], &line["original_type"]),
            (&json!("shortened"), &json!("outputs"))
        );
    }

    #[test]
    fn outputs_are_answered_masked() {
        let mut masker = Masker::default();
        masker.add(&SecretString::from("canary"));
        let line = br#"{"@level":"info","@message":"Outputs: 1","@module":"t","type":"outputs","outputs":{"a":{"value":"x canary"}}}"#;
        let Canonical::Outputs(Some(outputs)) = canonical(line, &masker, now(), &mut Vec::new())
        else {
            panic!("these are outputs")
        };
        assert_eq!(outputs["outputs"]["a"]["value"], "x ***");
    }

    #[test]
    fn a_secret_with_a_sequence_inside_is_masked() {
        let mut masker = Masker::default();
        masker.add(&SecretString::from("canary"));
        let mut out = Vec::new();
        canonical(b"can\x1b[1mary and canary", &masker, now(), &mut out);
        assert!(!String::from_utf8(out).unwrap().contains("canary"));
    }

    proptest! {
        #[test]
        fn any_bytes_become_lines_of_json_without_controls(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            for line in convert(&bytes) {
                let message = line["@message"].as_str().unwrap();
                prop_assert!(!message.chars().any(|c| c.is_control() && c != '\t'));
            }
        }
    }
}
