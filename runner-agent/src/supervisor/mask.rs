//! Replaces secrets in lines before they enter the log.
//!
//! A secret is looked for as it is, and
//! - as JSON writes it, by serde's rules and by Go's (which also escape `<`, `>` and `&`), also
//!   several times over: JSON is printed inside JSON;
//! - as URLs write it, by the three common ideas of what needs `%`, with either case of digits;
//! - in Base64, with either alphabet, alone or inside a longer text at each of its alignments.
//!
//! One of several lines is looked for line by line too. Values shorter than four bytes, and words
//! that say nothing, are not looked for: they would blank out ordinary text. In Base64, only values
//! of eight bytes and more are: five characters would be found anywhere. Base64 that is wrapped
//! inside the secret is not recognised.
//!
//! In a line of JSON only the contents of strings, and scalars that are the secret, are replaced;
//! strings are decoded for it and encoded again, so that the line stays JSON.
//!
//! All forms of all secrets are one automaton, built with the first line: the speed does not
//! depend on how many there are.

use std::borrow::Cow;
use std::fmt::{self, Write};
use std::ops::Range;
use std::sync::OnceLock;

use aho_corasick::{AhoCorasick, MatchKind};
use base64::Engine;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD, URL_SAFE, URL_SAFE_NO_PAD};
use secrecy::{ExposeSecret, SecretString};
use zeroize::Zeroizing;

use super::log::plain;

pub(super) const MARK: &str = "***";

/// Shorter values would blank out ordinary text.
const SHORTEST: usize = 4;

/// The same for values in Base64.
const SHORTEST_IN_BASE64: usize = 8;

/// How many times JSON may be printed inside JSON: `jsonencode` of a text that has been through
/// it, shown in quotes by terraform.
const NESTED: usize = 3;

/// Values that say nothing, and whose masking would make a log unreadable.
const ORDINARY: &[&str] = &["true", "false", "null", "none", "default"];

/// What needs no `%`, beside letters and digits: by RFC 3986 and Go's `QueryEscape`, by
/// JavaScript's `encodeURIComponent`, and by Go's `PathEscape`.
const UNESCAPED: [&[u8]; 3] = [b"-_.~", b"-_.~!'()*", b"-_.~$&+=:@"];

#[derive(Default, Clone)]
pub(super) struct Masker {
    /// Longest first.
    forms: Vec<Zeroizing<String>>,
    /// Of all forms; made when it is needed.
    automaton: OnceLock<AhoCorasick>,
}

impl fmt::Debug for Masker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Masker").field("forms", &self.forms.len()).finish_non_exhaustive()
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
        self.automaton = OnceLock::new();
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
        for unescaped in UNESCAPED {
            self.forms.extend(percent(secret, unescaped));
        }
        if secret.len() >= SHORTEST_IN_BASE64 {
            self.forms.extend(in_base64(secret.as_bytes()));
        }
    }

    fn automaton(&self) -> &AhoCorasick {
        self.automaton.get_or_init(|| {
            let forms = self.forms.iter().map(|form| form.as_bytes());
            // Matches that overlap are all found, so that none leaves a part of another.
            AhoCorasick::builder()
                .match_kind(MatchKind::Standard)
                .build(forms)
                .expect("the forms of a job's secrets are far from 2 GiB")
        })
    }

    /// Answers where secrets are, in order, those that touch or overlap as one.
    fn found(&self, text: &[u8]) -> Vec<Range<usize>> {
        if self.forms.is_empty() || !self.automaton().is_match(text) {
            return Vec::new();
        }
        let matches = self.automaton().find_overlapping_iter(text).map(|found| found.range());
        let mut all: Vec<Range<usize>> = matches.collect();
        all.sort_by_key(|range| range.start);
        let mut joined: Vec<Range<usize>> = Vec::with_capacity(all.len());
        for range in all {
            match joined.last_mut() {
                // Two that only touch are two secrets.
                Some(last) if range.start < last.end => last.end = last.end.max(range.end),
                Some(_) | None => joined.push(range),
            }
        }
        joined
    }

    /// Masks plain text.
    pub(super) fn text<'a>(&self, text: &'a str) -> Cow<'a, str> {
        let found = self.found(text.as_bytes());
        if found.is_empty() {
            return Cow::Borrowed(text);
        }
        let mut out = String::with_capacity(text.len());
        let mut at = 0;
        for range in found {
            // Forms are text: their matches begin and end between characters.
            out.push_str(&text[at..range.start]);
            out.push_str(MARK);
            at = range.end;
        }
        out.push_str(&text[at..]);
        Cow::Owned(out)
    }

    /// Masks a line known to be valid JSON; the answer is valid JSON too.
    pub(super) fn json<'a>(&self, line: &'a str) -> Cow<'a, str> {
        // What has been escaped may be written in other ways than ours: it is decoded.
        let escapes = line.as_bytes().contains(&b'\\');
        if !escapes && (self.forms.is_empty() || !self.automaton().is_match(line)) {
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
        if !content.as_bytes().contains(&b'\\') {
            return self.text(content);
        }
        let Ok(decoded) = serde_json::from_str::<String>(&format!("\"{content}\"")) else {
            // Half of a pair of surrogates, perhaps: no text to show in part.
            let safe = matches!(self.text(content), Cow::Borrowed(_));
            return Cow::Borrowed(if safe { content } else { MARK });
        };
        let masked = self.text(&decoded);
        // A sequence of a terminal's may have been put into a secret: whoever shows the text
        // takes it out.
        if masked.contains('\u{1b}')
            && let Cow::Owned(again) = self.text(&plain(&masked))
        {
            return Cow::Owned(quoted(&again));
        }
        match masked {
            Cow::Borrowed(_) => Cow::Borrowed(content),
            Cow::Owned(masked) => Cow::Owned(quoted(&masked)),
        }
    }

    /// Tells whether the whole of a text is a secret.
    pub(super) fn is_secret(&self, text: &str) -> bool {
        self.forms.iter().any(|form| form.as_str() == text)
    }

    /// Answers where a long text may be cut, at or before `at`, without cutting a secret in two.
    /// What follows the cut must be at least as long as the longest form.
    pub(super) fn cut(&self, text: &[u8], at: usize) -> usize {
        let around = self.longest().saturating_sub(1);
        let mut cut = at;
        // A cut moved to the front of one secret may now lie inside another.
        loop {
            let from = cut.saturating_sub(around);
            let to = (cut + around).min(text.len());
            let divided = self.found(&text[from..to]).into_iter();
            let mut divided = divided.map(|range| from + range.start..from + range.end);
            match divided.find(|range| range.start < cut && cut < range.end) {
                Some(range) => cut = range.start,
                None => return cut,
            }
        }
    }

    pub(super) fn longest(&self) -> usize {
        self.forms.first().map_or(0, |form| form.len())
    }
}

/// Answers what stands between the quotes when serde writes a text.
fn quoted(text: &str) -> String {
    let quoted = Zeroizing::new(serde_json::to_string(text).expect("a string is always JSON"));
    quoted[1..quoted.len() - 1].to_owned()
}

/// Answers a text as serde and as Go write it inside a JSON string.
fn escaped(text: &str) -> [Zeroizing<String>; 2] {
    let serde = Zeroizing::new(quoted(text));
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

/// Answers a text as it stands in URLs, where it stands differently there.
fn percent(text: &str, unescaped: &[u8]) -> Vec<Zeroizing<String>> {
    let mut forms = Vec::new();
    for upper in [true, false] {
        let mut form = Zeroizing::new(String::with_capacity(text.len() * 3));
        for byte in text.bytes() {
            if byte.is_ascii_alphanumeric() || unescaped.contains(&byte) {
                form.push(char::from(byte));
            } else if upper {
                let _ = write!(form, "%{byte:02X}");
            } else {
                let _ = write!(form, "%{byte:02x}");
            }
        }
        if form.contains("%20") {
            forms.push(Zeroizing::new(form.replace("%20", "+")));
        }
        if form.as_str() != text {
            forms.push(form);
        }
    }
    forms
}

/// Answers bytes in Base64: whole, and what is the same of them wherever they stand in something
/// longer.
fn in_base64(bytes: &[u8]) -> Vec<Zeroizing<String>> {
    let mut forms = Vec::new();
    for engine in [STANDARD, STANDARD_NO_PAD, URL_SAFE, URL_SAFE_NO_PAD] {
        forms.push(Zeroizing::new(engine.encode(bytes)));
    }
    for engine in [STANDARD_NO_PAD, URL_SAFE_NO_PAD] {
        for before in 0..3 {
            let mut longer = Zeroizing::new(vec![0u8; before]);
            longer.extend_from_slice(bytes);
            let encoded = Zeroizing::new(engine.encode(&*longer));
            // Characters that also hold bits of what stands before or behind are left out.
            let (from, to) = ((before * 8).div_ceil(6), longer.len() * 8 / 6);
            forms.push(Zeroizing::new(encoded[from..to].to_owned()));
        }
    }
    forms
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
    fn what_overlaps_leaves_nothing() {
        assert_eq!(masker(&["abcdef", "defghi"]).text("xabcdefghiy"), "x***y");
        assert_eq!(masker(&["abcd"]).text("abcdabcd"), "******");
    }

    #[test]
    fn urls_and_base64_are_masked() {
        let masker = masker(&["p/s w+rd~(1)&x"]);
        for form in [
            "p%2Fs%20w%2Brd~%281%29%26x",
            "p%2fs%20w%2brd~%281%29%26x",
            "p%2Fs+w%2Brd~%281%29%26x",
            "p%2Fs%20w%2Brd~(1)%26x",
            "p%2Fs%20w+rd~%281%29&x",
        ] {
            assert_eq!(masker.text(&format!("a={form};")), "a=***;", "{form}");
        }
        assert_eq!(masker.text(&STANDARD.encode("p/s w+rd~(1)&x")), MARK);
    }

    #[test]
    fn a_secret_with_a_sequence_inside_is_masked_in_json_too() {
        let line = r#"{"@message":"can\u001b[1mary \u001b[0mok","type":"x"}"#;
        let masked = masker(&["canary"]).json(line).into_owned();
        assert_eq!(masked, r#"{"@message":"*** ok","type":"x"}"#);
    }

    #[test]
    fn debug_shows_no_secret() {
        assert!(!format!("{:?}", masker(&["canary"])).contains("canary"));
    }

    proptest! {
        #[test]
        fn no_secret_survives_in_base64(
            secret in "[ -~]{8,24}",
            before in prop::collection::vec(any::<u8>(), 0..7),
            after in prop::collection::vec(any::<u8>(), 0..7),
        ) {
            let whole = [before.as_slice(), secret.as_bytes(), after.as_slice()].concat();
            for engine in [STANDARD, STANDARD_NO_PAD, URL_SAFE, URL_SAFE_NO_PAD] {
                let masked = masker(&[&secret]).text(&engine.encode(&whole)).into_owned();
                // At most a character at either border is left of it: less than two bytes.
                prop_assert!(masked.contains(MARK), "{}", masked);
                let left = masked.len() - MARK.len();
                let others = (before.len() + after.len()) * 4 / 3 + 8;
                prop_assert!(left <= others, "{left} of {masked}");
            }
        }

        #[test]
        fn no_secret_survives_in_a_url(secret in "\\PC{4,12}", before in "[a-z]{0,4}") {
            prop_assume!(!ORDINARY.contains(&secret.as_str()));
            for unescaped in UNESCAPED {
                for form in percent(&secret, unescaped) {
                    let masked = masker(&[&secret]).text(&format!("{before}?x={}", *form)).into_owned();
                    prop_assert!(!masked.contains(form.as_str()), "{}", masked);
                }
            }
        }

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
#[cfg(test)]
mod speed {
    use super::*;

    /// `cargo test --release -p latchkey-runner masking_speed -- --ignored --nocapture`
    #[test]
    #[ignore = "measures, does not judge"]
    fn masking_speed() {
        let mut masker = Masker::default();
        for n in 0..20 {
            masker.add(&SecretString::from(format!("secret-{n}/AbCdEfGhIjKlMnOpQrSt{n}&x")));
        }
        let line = r#"{"@level":"info","@message":"terraform_data.one[17]: Still creating... [10s elapsed]","@module":"terraform.ui","@timestamp":"2026-01-02T03:04:05.000000Z","hook":{"resource":{"addr":"terraform_data.one[17]","module":"","resource":"terraform_data.one[17]","implied_provider":"terraform","resource_type":"terraform_data","resource_name":"one","resource_key":17},"action":"create","elapsed_seconds":10},"type":"apply_progress"}"#;
        let escaped = line.replace("Still creating", "Still \\\"creating\\\"");
        for (what, line) in
            [("json", line), ("escaped json", escaped.as_str()), ("text", &line[1..])]
        {
            let rounds = 64 * 1024 * 1024 / line.len();
            let begun = std::time::Instant::now();
            let mut kept = 0;
            for _ in 0..rounds {
                let masked = if what == "text" { masker.text(line) } else { masker.json(line) };
                kept += masked.len();
            }
            let rate = kept as f64 / 1e6 / begun.elapsed().as_secs_f64();
            let _ = std::io::Write::write_all(
                &mut std::io::stderr(),
                format!("{what}: {rate:.0} MB/s\n").as_bytes(),
            );
        }
    }
}
