//! Replaces secrets in lines before they enter the log.
//!
//! A secret is looked for as it is, and as JSON writes it, by serde's rules and by Go's (which
//! also escape `<`, `>` and `&`), also several times over: JSON is printed inside JSON. One of
//! several lines is looked for line by line too. In a line of JSON only the contents of strings,
//! and scalars that are the secret, are replaced; strings are decoded for it and encoded again,
//! so that the line stays JSON.

use std::borrow::Cow;
use std::fmt::{self, Write};

use secrecy::{ExposeSecret, SecretString};
use zeroize::Zeroizing;

pub(super) const MARK: &str = "***";

/// Shorter values would blank out ordinary text.
const SHORTEST: usize = 4;

/// How many times JSON may be printed inside JSON: `jsonencode` of a text that has been through
/// it, shown in quotes by terraform.
const NESTED: usize = 3;

/// Values that say nothing, and whose masking would make a log unreadable.
const ORDINARY: &[&str] = &["true", "false", "null", "none", "default"];

#[derive(Default, Clone)]
pub(super) struct Masker {
    /// Longest first, so that a secret inside another one does not leave the other's rest.
    forms: Vec<Zeroizing<String>>,
}

impl fmt::Debug for Masker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Masker").field("forms", &self.forms.len()).finish()
    }
}

impl Masker {
    pub(super) fn add(&mut self, secret: &SecretString) {
        let secret = secret.expose_secret();
        self.add_forms(secret);
        if secret.contains('\n') {
            for line in secret.lines() {
                self.add_forms(line.trim());
            }
        }
        self.forms.sort_by(|a, b| b.len().cmp(&a.len()).then_with(|| a.cmp(b)));
        self.forms.dedup();
    }

    fn add_forms(&mut self, secret: &str) {
        if secret.len() < SHORTEST || ORDINARY.contains(&secret) {
            return;
        }
        let mut newest = vec![Zeroizing::new(secret.to_owned())];
        for _ in 0..NESTED {
            let mut next: Vec<_> = newest.iter().flat_map(|form| escaped(form)).collect();
            next.sort_by(|a: &Zeroizing<String>, b| a.as_str().cmp(b.as_str()));
            next.dedup();
            self.forms.append(&mut newest);
            newest = next;
        }
        self.forms.append(&mut newest);
    }

    /// Masks plain text.
    pub(super) fn text<'a>(&self, text: &'a str) -> Cow<'a, str> {
        let mut text = Cow::Borrowed(text);
        for form in &self.forms {
            if text.contains(form.as_str()) {
                text = Cow::Owned(text.replace(form.as_str(), MARK));
            }
        }
        text
    }

    /// Masks a line known to be valid JSON; the answer is valid JSON too.
    pub(super) fn json<'a>(&self, line: &'a str) -> Cow<'a, str> {
        // What has been escaped may be written in other ways than ours: it is decoded.
        if !line.contains('\\') && !self.forms.iter().any(|form| line.contains(form.as_str())) {
            return Cow::Borrowed(line);
        }
        let mut out = String::with_capacity(line.len());
        let mut rest = line;
        while let Some(first) = rest.chars().next() {
            if first == '"' {
                let end = string_end(rest);
                let content = &rest[1..end - 1];
                let is_key = rest[end..].trim_start().starts_with(':');
                out.push('"');
                // Terraform's own field names stay, or the line would lose its meaning.
                if is_key && is_field_name(content) {
                    out.push_str(content);
                } else {
                    out.push_str(&self.content(content));
                }
                out.push('"');
                rest = &rest[end..];
            } else if is_scalar(first) {
                let end = rest.find(|c| !is_scalar(c)).unwrap_or(rest.len());
                let scalar = &rest[..end];
                if self.is_secret(scalar) {
                    out.push('"');
                    out.push_str(MARK);
                    out.push('"');
                } else {
                    out.push_str(scalar);
                }
                rest = &rest[end..];
            } else {
                out.push(first);
                rest = &rest[first.len_utf8()..];
            }
        }
        Cow::Owned(out)
    }

    /// Masks what stands between the quotes of a JSON string.
    fn content<'a>(&self, content: &'a str) -> Cow<'a, str> {
        if !content.contains('\\') {
            return self.text(content);
        }
        let Ok(decoded) = serde_json::from_str::<String>(&format!("\"{content}\"")) else {
            // Half of a pair of surrogates, perhaps: no text to show in part.
            let safe = matches!(self.text(content), Cow::Borrowed(_));
            return Cow::Borrowed(if safe { content } else { MARK });
        };
        match self.text(&decoded) {
            Cow::Borrowed(_) => Cow::Borrowed(content),
            Cow::Owned(masked) => {
                let quoted = serde_json::to_string(&masked).expect("a string is always JSON");
                Cow::Owned(quoted[1..quoted.len() - 1].to_owned())
            }
        }
    }

    /// Tells whether the whole of a text is a secret.
    pub(super) fn is_secret(&self, text: &str) -> bool {
        self.forms.iter().any(|form| form.as_str() == text)
    }

    /// Answers where a long text may be cut, at or before `at`, without cutting a secret in two.
    /// What follows the cut must be at least as long as the longest form.
    pub(super) fn cut(&self, text: &[u8], at: usize) -> usize {
        let mut cut = at;
        // A cut moved to the front of one secret may now lie inside another.
        while let Some(earlier) = self.forms.iter().find_map(|form| straddled(text, cut, form)) {
            cut = earlier;
        }
        cut
    }

    pub(super) fn longest(&self) -> usize {
        self.forms.first().map_or(0, |form| form.len())
    }
}

/// Answers a text as serde and as Go write it inside a JSON string.
fn escaped(text: &str) -> [Zeroizing<String>; 2] {
    let quoted = Zeroizing::new(serde_json::to_string(text).expect("a string is always JSON"));
    let serde = Zeroizing::new(quoted[1..quoted.len() - 1].to_owned());
    let mut go = Zeroizing::new(String::with_capacity(serde.len()));
    for c in serde.chars() {
        match c {
            '<' | '>' | '&' | '\u{2028}' | '\u{2029}' => {
                let _ = write!(go, "\\u{:04x}", u32::from(c));
            }
            c => go.push(c),
        }
    }
    [serde, go]
}

/// Answers where the secret begins that a cut here would divide.
fn straddled(text: &[u8], cut: usize, form: &str) -> Option<usize> {
    let form = form.as_bytes();
    let from = cut.saturating_sub(form.len().saturating_sub(1));
    let to = (cut + form.len() - 1).min(text.len());
    text[from..to].windows(form.len()).position(|window| window == form).map(|at| from + at)
}

/// Answers the index behind the closing quote; the text starts with the opening one.
fn string_end(text: &str) -> usize {
    let bytes = text.as_bytes();
    let mut at = 1;
    while at < bytes.len() {
        match bytes[at] {
            b'\\' => at += 2,
            b'"' => return at + 1,
            _ => at += 1,
        }
    }
    text.len()
}

fn is_scalar(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '+' | '-' | '.')
}

fn is_field_name(key: &str) -> bool {
    key.chars().all(|c| c.is_ascii_lowercase() || c == '_' || c == '@')
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn masker(secrets: &[&str]) -> Masker {
        let mut masker = Masker::default();
        for secret in secrets {
            masker.add(&SecretString::from(*secret));
        }
        masker
    }

    #[test]
    fn every_form_of_a_secret_is_replaced() {
        let masker = masker(&["pa\"ss<w>&rd", "line one\nline two"]);
        for (input, expect) in [
            ("x pa\"ss<w>&rd y", "x *** y"),
            (r#"x pa\"ss<w>&rd y"#, "x *** y"),
            (r#"x pa\"ss\u003cw\u003e\u0026rd y"#, "x *** y"),
            ("line one", "***"),
            (r"line one\nline two", "***"),
            ("line three", "line three"),
        ] {
            assert_eq!(masker.text(input), expect);
        }
    }

    #[test]
    fn short_and_ordinary_values_are_left_alone() {
        assert_eq!(masker(&["abc", "true", ""]).text("abc true"), "abc true");
    }

    #[test]
    fn a_secret_inside_another_leaves_nothing_of_it() {
        assert_eq!(masker(&["secret", "my-secret-key"]).text("my-secret-key"), "***");
    }

    #[test]
    fn a_masked_line_of_json_stays_json() {
        let masker = masker(&["12345", "type", "a\"b:c"]);
        let line = r#"{"type":"x type","n":12345,"l":[12345,123456],"k a\"b:c":"a\"b:c \"q\""}"#;
        let masked = masker.json(line);
        assert_eq!(masked, r#"{"type":"x ***","n":"***","l":["***",123456],"k ***":"*** \"q\""}"#);
        serde_json::from_str::<serde_json::Value>(&masked).unwrap();
    }

    #[test]
    fn json_inside_json_is_masked() {
        let masker = masker(&["pa\"ss<w>&rd"]);
        // As terraform's `jsonencode` writes it.
        let mut text = r#"{"a":"pa\"ss\u003cw\u003e\u0026rd"}"#.to_owned();
        for depth in 0..NESTED {
            let line = serde_json::json!({"@message": text, "type": "x"}).to_string();
            for line in [line.replace('&', "\\u0026"), line] {
                let masked = masker.json(&line).into_owned();
                let value: serde_json::Value = serde_json::from_str(&masked).unwrap();
                let left = ["ss<", "u003cw", "&rd", "0026rd"].map(|part| masked.contains(part));
                assert_eq!(left, [false; 4], "{depth}: {masked}");
                assert!(value["@message"].as_str().unwrap().contains(MARK));
            }
            text = serde_json::to_string(&text).unwrap();
        }
        // Escaped in a way that nobody has to.
        assert_eq!(masker.json(r#"{"x":"\u0070a\"s\u0073<w>&rd"}"#), r#"{"x":"***"}"#);
    }

    #[test]
    fn an_escape_is_not_cut_in_two() {
        let masker = masker(&["name"]);
        let line = r#"{"x":"a\name","y":"a\\name","z":"\ud800 name"}"#;
        let masked = masker.json(line);
        assert_eq!(masked, r#"{"x":"a\name","y":"a\\***","z":"***"}"#);
    }

    #[test]
    fn a_cut_never_divides_a_secret() {
        let masker = masker(&["0123456789"]);
        let text = b"aaaa0123456789bbbbbbbbbbbbbb";
        for at in 0..=14 {
            let cut = masker.cut(text, at);
            assert_eq!(cut, if (5..14).contains(&at) { 4 } else { at }, "{at}");
        }
    }

    #[test]
    fn debug_shows_no_secret() {
        assert!(!format!("{:?}", masker(&["canary"])).contains("canary"));
    }

    proptest! {
        #[test]
        fn no_secret_survives_in_json(secret in "[ -~]{4,12}", before in "[ -~]{0,9}", n in any::<u32>()) {
            prop_assume!(!ORDINARY.contains(&secret.as_str()));
            let line = serde_json::json!({"@message": format!("{before}{secret}"), "n": n, "value": secret}).to_string();
            let masked = masker(&[&secret]).json(&line).into_owned();
            let value: serde_json::Value = serde_json::from_str(&masked).unwrap();
            let left = |v: &serde_json::Value| v.as_str().unwrap().replace(MARK, "").contains(&secret);
            prop_assert!(!left(&value["value"]), "{}", masked);
            prop_assert!(!left(&value["@message"]), "{}", masked);
        }
    }
}
