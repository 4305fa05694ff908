//! The canonical log as a person reads it. The log is lines of JSON in terraform's UI format, of
//! our runners and therefore of whatever a configuration prints: nothing in it may steer the
//! terminal.
//!
//! `LogView` turns bytes, cut anywhere, into text; `sanitize` is the guard for every text from
//! afar.

use std::iter::Peekable;
use std::str::Chars;

use serde_json::Value;

/// A line longer than this is shown as it is, in pieces, so that memory stays bounded.
const LONGEST_LINE: usize = 4 << 20;

/// Whether colours survive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Colour {
    Keep,
    Drop,
}

/// Holds the begun line between two chunks.
#[derive(Debug)]
pub(crate) struct LogView {
    begun: Vec<u8>,
    colour: Colour,
}

impl LogView {
    pub(crate) fn new(colour: Colour) -> LogView {
        LogView { begun: Vec::new(), colour }
    }

    /// Takes the next bytes and returns the text of the lines that they end.
    pub(crate) fn push(&mut self, bytes: &[u8]) -> String {
        self.lines(bytes).iter().map(|line| show(line, self.colour)).collect()
    }

    /// Takes the next bytes and returns the lines that they end, as they are.
    pub(crate) fn lines(&mut self, bytes: &[u8]) -> Vec<String> {
        let mut lines = Vec::new();
        for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
            self.begun.extend_from_slice(piece);
            if piece.ends_with(b"\n") || self.begun.len() > LONGEST_LINE {
                lines.extend(self.take());
            }
        }
        lines
    }

    /// Returns what a log that ended without a line's end leaves.
    pub(crate) fn finish(&mut self) -> String {
        self.take().map(|line| show(&line, self.colour)).unwrap_or_default()
    }

    fn take(&mut self) -> Option<String> {
        let line = std::mem::take(&mut self.begun);
        let line = String::from_utf8_lossy(&line);
        let line = line.trim_end_matches(['\n', '\r']);
        Some(line.to_owned()).filter(|line| !line.is_empty())
    }
}

fn show(line: &str, colour: Colour) -> String {
    let mut text = match serde_json::from_str::<Value>(line) {
        Ok(value) => sanitize(&human(&value, line), colour),
        Err(_) => sanitize(line, colour),
    };
    if !text.ends_with('\n') {
        text.push('\n');
    }
    text
}

/// Returns a text from afar without anything but what can be seen.
pub(crate) fn clean(text: &str) -> String {
    sanitize(text, Colour::Drop)
}

/// Strips every control character and escape sequence but line ends, tabs and, if they are kept,
/// colours. An unended sequence hides the rest of its line, as it would in a terminal.
pub(crate) fn sanitize(text: &str, colour: Colour) -> String {
    let mut clean = String::with_capacity(text.len());
    let mut coloured = false;
    let mut chars = text.chars().peekable();
    while let Some(char) = chars.next() {
        match char {
            '\n' | '\t' => clean.push(char),
            '\u{1b}' => match chars.peek() {
                Some('[') => {
                    chars.next();
                    coloured |= sequence(&mut chars, colour, &mut clean);
                }
                Some(']' | 'P' | 'X' | '^' | '_') => {
                    chars.next();
                    skip_string(&mut chars);
                }
                Some(_) | None => skip_escape(&mut chars),
            },
            '\u{9b}' => coloured |= sequence(&mut chars, colour, &mut clean),
            '\u{90}' | '\u{98}' | '\u{9d}' | '\u{9e}' | '\u{9f}' => skip_string(&mut chars),
            // Marks that reorder the text around them can make a line say what it does not.
            '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => {}
            control if control.is_control() => {}
            visible => clean.push(visible),
        }
    }
    if coloured {
        clean.push_str("\u{1b}[0m");
    }
    clean
}

/// Reads a control sequence after its introducer; copies it when it is a colour that is kept.
fn sequence(chars: &mut Peekable<Chars<'_>>, colour: Colour, clean: &mut String) -> bool {
    let mut parameters = String::new();
    while let Some(char) = chars.next_if(|char| ('\u{20}'..='\u{3f}').contains(char)) {
        parameters.push(char);
    }
    let last = chars.next_if(|char| ('\u{40}'..='\u{7e}').contains(char));
    let plain = parameters.chars().all(|char| char.is_ascii_digit() || char == ';');
    if last == Some('m') && plain && colour == Colour::Keep && parameters.len() <= 32 {
        clean.push_str("\u{1b}[");
        clean.push_str(&parameters);
        clean.push('m');
        return true;
    }
    false
}

/// Skips a string of a device or an operating system command up to its end or the line's.
fn skip_string(chars: &mut Peekable<Chars<'_>>) {
    while let Some(char) = chars.next_if(|char| *char != '\n') {
        match char {
            '\u{7}' | '\u{9c}' => return,
            '\u{1b}' if chars.next_if_eq(&'\\').is_some() => return,
            _ => {}
        }
    }
}

fn skip_escape(chars: &mut Peekable<Chars<'_>>) {
    while chars.next_if(|char| ('\u{20}'..='\u{2f}').contains(char)).is_some() {}
    chars.next_if(|char| ('\u{30}'..='\u{7e}').contains(char));
}

fn human(value: &Value, line: &str) -> String {
    if let Some(diagnostic) = value.get("diagnostic").filter(|value| value.is_object()) {
        return diagnose(diagnostic);
    }
    match value.get("@message").and_then(Value::as_str) {
        Some(message) => message.to_owned(),
        None => line.to_owned(),
    }
}

/// Writes a diagnostic as terraform would: what, where, why.
fn diagnose(diagnostic: &Value) -> String {
    let text = |key: &str| diagnostic.get(key).and_then(Value::as_str).unwrap_or_default();
    let severity = match text("severity") {
        "warning" => "Warning",
        _ => "Error",
    };
    let mut shown = format!("{severity}: {}", text("summary"));
    let range = diagnostic.get("range");
    if let Some(file) = range.and_then(|range| range.get("filename")).and_then(Value::as_str) {
        shown.push_str(&format!("\n  on {file}"));
        let line = range.and_then(|range| range.pointer("/start/line")).and_then(Value::as_u64);
        if let Some(line) = line {
            shown.push_str(&format!(":{line}"));
        }
        let context = diagnostic.pointer("/snippet/context").and_then(Value::as_str);
        if let Some(context) = context {
            shown.push_str(&format!(", in {context}"));
        }
        if let Some(code) = diagnostic.pointer("/snippet/code").and_then(Value::as_str) {
            for code in code.lines() {
                shown.push_str(&format!("\n    {code}"));
            }
        }
    }
    for detail in text("detail").lines() {
        shown.push_str(&format!("\n  {detail}"));
    }
    shown
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{Strategy, any, prop, prop_oneof, proptest};

    use super::*;

    fn view(log: &str) -> String {
        let mut view = LogView::new(Colour::Drop);
        let mut text = view.push(log.as_bytes());
        text.push_str(&view.finish());
        text
    }

    #[test]
    fn a_line_is_shown_by_its_message() {
        let log = concat!(
            r#"{"@level":"info","@message":"Terraform 1.13.0","type":"version"}"#,
            "\n",
            r#"{"@message":"  + resource \"x\"\n  - y","@module":"latchkey","type":"plan_text"}"#,
            "\n",
            "not json at all\n",
        );
        assert_eq!(view(log), "Terraform 1.13.0\n  + resource \"x\"\n  - y\nnot json at all\n");
    }

    #[test]
    fn a_diagnostic_says_what_where_and_why() {
        let log = concat!(
            r#"{"@level":"error","@message":"Error: Unsupported argument","type":"diagnostic","#,
            r#""diagnostic":{"severity":"error","summary":"Unsupported argument","#,
            r#""detail":"An argument named \"a\" is not expected here.\nRemove it.","#,
            r#""range":{"filename":"main.tf","start":{"line":3,"column":1,"byte":2}},"#,
            r#""snippet":{"context":"resource \"terraform_data\" \"x\"","code":"  a = 1"}}}"#,
        );
        assert_eq!(
            view(log),
            concat!(
                "Error: Unsupported argument\n",
                "  on main.tf:3, in resource \"terraform_data\" \"x\"\n",
                "      a = 1\n",
                "  An argument named \"a\" is not expected here.\n",
                "  Remove it.\n",
            )
        );
    }

    #[test]
    fn chunks_may_be_cut_anywhere() {
        let log = "{\"@message\":\"größe\"}\n{\"@message\":\"zwei\"}\n";
        for cut in 0..log.len() {
            let mut view = LogView::new(Colour::Drop);
            let mut text = view.push(&log.as_bytes()[..cut]);
            text.push_str(&view.push(&log.as_bytes()[cut..]));
            assert_eq!(text, "größe\nzwei\n");
        }
    }

    #[test]
    fn only_colours_survive() {
        #[track_caller]
        fn check(text: &str, expect: &str) {
            assert_eq!(sanitize(text, Colour::Keep), expect);
        }
        check("\u{1b}[1;31mred\u{1b}[0m", "\u{1b}[1;31mred\u{1b}[0m\u{1b}[0m");
        check("a\u{1b}[2Jb\u{1b}[?25lc", "abc");
        check("a\u{1b}]8;;http://x\u{1b}\\link\u{1b}]8;;\u{7}b", "alinkb");
        check("a\u{1b}Pq#0\u{9c}b\u{9b}5Ac\u{9d}0;t\u{7}d", "abcd");
        check("a\u{1b}(Bb\u{1b}cc\rd\u{8}e\u{7f}", "abcde");
        check("rest \u{1b}]0;hidden\nnext", "rest \nnext");
        assert_eq!(sanitize("\u{1b}[31mred\u{1b}[m", Colour::Drop), "red");
    }

    /// Texts in which escapes are likely.
    fn hostile() -> impl Strategy<Value = String> {
        let piece = prop_oneof![
            any::<char>().prop_map(String::from),
            prop::sample::select(vec![
                "\u{1b}",
                "[",
                "]",
                "P",
                "m",
                "0",
                ";",
                "?",
                "\u{7}",
                "\u{9b}",
                "\u{9d}",
                "\u{9c}",
                "\\",
                "\n",
                "\r",
                "\u{1b}[31m",
                "\u{1b}]0;",
                "\u{202e}",
            ])
            .prop_map(String::from),
        ];
        prop::collection::vec(piece, 0..60).prop_map(|pieces| pieces.concat())
    }

    proptest! {
        #[test]
        fn nothing_that_steers_a_terminal_is_left(text in hostile()) {
            let plain = sanitize(&text, Colour::Drop);
            assert!(plain.chars().all(|char| !char.is_control() || "\n\t".contains(char)));
            assert_eq!(sanitize(&plain, Colour::Drop), plain);

            let coloured = sanitize(&text, Colour::Keep);
            let mut rest = coloured.as_str();
            while let Some(at) = rest.find('\u{1b}') {
                let sequence = rest[at..].strip_prefix("\u{1b}[").expect("a colour");
                let end = sequence.find(|char: char| !(char.is_ascii_digit() || char == ';'));
                let end = end.expect("a colour's end");
                assert!(sequence[end..].starts_with('m'));
                rest = &sequence[end..];
            }
            let others = coloured.replace('\u{1b}', "");
            assert!(others.chars().all(|char| !char.is_control() || "\n\t".contains(char)));
        }

        #[test]
        fn text_without_controls_is_left_alone(text in "[^\\p{C}]{0,60}") {
            assert_eq!(sanitize(&text, Colour::Keep), text);
        }
    }
}
