//! Whether a text is one HCL value that a var-file may hold: told when it is saved, with the place
//! where it is not, rather than by terraform in the middle of a run.
//!
//! Nothing can be referred to in a var-file, so a value is a literal: strings without templates,
//! numbers, `true`, `false`, `null`, lists and objects of these. That is a little less than
//! terraform takes (`60 * 60`), and in return it needs no general parser: one that recurses can
//! be made to overflow its stack, and this process serves everybody.

use std::fmt;

/// How deep lists and objects may be in each other.
const DEEPEST: usize = 64;

/// Where and why a text is no value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Problem {
    pub(super) line: usize,
    pub(super) column: usize,
    what: &'static str,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}, column {}: {}", self.line, self.column, self.what)
    }
}

/// Checks that a text is exactly one value.
pub(super) fn check(text: &str) -> Result<(), Problem> {
    let mut reader = Reader { text, at: 0 };
    let result = reader.whole();
    result.map_err(|what| {
        let before = &text[..reader.at];
        let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
        Problem {
            line: before.matches('\n').count() + 1,
            column: before[line_start..].chars().count() + 1,
            what,
        }
    })
}

type Read = Result<(), &'static str>;

/// Reads from `at` on; after an error, `at` is where it is.
struct Reader<'a> {
    text: &'a str,
    at: usize,
}

/// Whether a line end is more than space: it parts the items of an object.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Lines {
    Space,
    Part,
}

impl Reader<'_> {
    fn whole(&mut self) -> Read {
        self.space(Lines::Space)?;
        self.value(0)?;
        self.space(Lines::Space)?;
        if self.rest().is_empty() { Ok(()) } else { Err("more follows behind the value") }
    }

    fn value(&mut self, depth: usize) -> Read {
        if depth > DEEPEST {
            return Err("lists and objects are more than 64 deep in each other");
        }
        match self.peek() {
            Some('"') => self.string(),
            Some('[') => self.list(depth),
            Some('{') => self.object(depth),
            Some('(') => {
                self.skip('(');
                self.space(Lines::Space)?;
                self.value(depth + 1)?;
                self.space(Lines::Space)?;
                if self.skip(')') { Ok(()) } else { Err("the closing `)` is missing") }
            }
            Some('<') => self.heredoc(),
            Some(c) if c == '-' || c.is_ascii_digit() => self.number(),
            Some(c) if starts_word(c) => self.keyword(),
            Some(_) => Err("a value does not begin like this; put a string into double quotes"),
            None => Err("a value is missing here"),
        }
    }

    fn keyword(&mut self) -> Read {
        let start = self.at;
        let word = self.word();
        if matches!(word, "true" | "false" | "null") {
            return Ok(());
        }
        self.at = start;
        Err("a value can refer to nothing and call nothing; put a string into double quotes")
    }

    fn word(&mut self) -> &str {
        let start = self.at;
        while self.peek().is_some_and(|c| starts_word(c) || c == '-' || c.is_numeric()) {
            self.advance();
        }
        &self.text[start..self.at]
    }

    fn number(&mut self) -> Read {
        self.skip('-');
        if !self.digits() {
            return Err("a number has digits here");
        }
        if self.skip('.') && !self.digits() {
            return Err("a number has digits behind its point");
        }
        if self.skip('e') || self.skip('E') {
            let _ = self.skip('+') || self.skip('-');
            if !self.digits() {
                return Err("a number has digits in its exponent");
            }
        }
        match self.peek() {
            Some(c) if starts_word(c) || c == '.' => Err("this does not belong to a number"),
            Some(_) | None => Ok(()),
        }
    }

    fn digits(&mut self) -> bool {
        let start = self.at;
        while self.peek().is_some_and(|c| c.is_ascii_digit()) {
            self.advance();
        }
        self.at > start
    }

    fn string(&mut self) -> Read {
        let start = self.at;
        self.skip('"');
        loop {
            match self.peek() {
                Some('"') => {
                    self.advance();
                    return Ok(());
                }
                Some('\\') => self.escape()?,
                Some('\n' | '\r') | None => {
                    self.at = start;
                    return Err("this string does not end on its line; write a line end as \\n");
                }
                Some(c) => self.character(c)?,
            }
        }
    }

    fn escape(&mut self) -> Read {
        let start = self.at;
        self.advance();
        let digits = match self.peek() {
            Some('n' | 'r' | 't' | '"' | '\\') => {
                self.advance();
                return Ok(());
            }
            Some('u') => 4,
            Some('U') => 8,
            Some(_) | None => {
                self.at = start;
                return Err("there is no such escape; write a backslash as \\\\");
            }
        };
        self.advance();
        let hex = self.rest().get(..digits);
        let number = hex
            .filter(|hex| hex.bytes().all(|b| b.is_ascii_hexdigit()))
            .and_then(|hex| u32::from_str_radix(hex, 16).ok());
        if number.and_then(char::from_u32).is_none() {
            self.at = start;
            return Err("this names no character");
        }
        self.at += digits;
        Ok(())
    }

    /// Takes one character of a string, or the escape of a template's beginning.
    fn character(&mut self, c: char) -> Read {
        for (template, escaped) in [("${", "$${"), ("%{", "%%{")] {
            if self.rest().starts_with(escaped) {
                self.at += escaped.len();
                return Ok(());
            }
            if self.rest().starts_with(template) {
                return Err("a value has no templates; write ${ as $${ and %{ as %%{");
            }
        }
        self.at += c.len_utf8();
        Ok(())
    }

    fn heredoc(&mut self) -> Read {
        let start = self.at;
        let open =
            self.rest().strip_prefix("<<").map(|rest| rest.strip_prefix('-').unwrap_or(rest));
        let Some((marker, _)) = open.and_then(|rest| rest.split_once('\n')) else {
            return Err("a value does not begin like this");
        };
        let marker = marker.trim_end_matches('\r');
        if marker.is_empty() || !marker.chars().all(|c| starts_word(c) || c.is_ascii_digit()) {
            return Err("behind << stands the word that ends the text, and nothing else");
        }
        let marker = marker.to_owned();
        self.line();
        loop {
            if self.rest().is_empty() {
                self.at = start;
                return Err("the line that ends this text is missing");
            }
            let line = self.rest().lines().next().unwrap_or_default();
            if line.trim() == marker {
                // Its line end stays: it parts the items of an object.
                self.at += line.trim_end().len();
                return Ok(());
            }
            let end = self.at + line.len();
            while self.at < end
                && let Some(c) = self.peek()
            {
                self.character(c)?;
            }
            self.line();
        }
    }

    fn list(&mut self, depth: usize) -> Read {
        self.skip('[');
        loop {
            self.space(Lines::Space)?;
            if self.skip(']') {
                return Ok(());
            }
            self.value(depth + 1)?;
            self.space(Lines::Space)?;
            if !self.skip(',') {
                return if self.skip(']') { Ok(()) } else { Err("a `,` or `]` is missing here") };
            }
        }
    }

    fn object(&mut self, depth: usize) -> Read {
        self.skip('{');
        loop {
            self.space(Lines::Space)?;
            if self.skip('}') {
                return Ok(());
            }
            self.key(depth)?;
            self.space(Lines::Part)?;
            if !self.skip('=') && !self.skip(':') {
                return Err("behind a key stands `=` and its value");
            }
            self.space(Lines::Part)?;
            self.value(depth + 1)?;
            self.space(Lines::Part)?;
            match self.peek() {
                Some(',' | '\n') => self.advance(),
                Some('}') => {}
                Some(_) | None => return Err("a `,`, a new line or `}` is missing here"),
            }
        }
    }

    fn key(&mut self, depth: usize) -> Read {
        match self.peek() {
            Some(c) if starts_word(c) => {
                self.word();
                Ok(())
            }
            Some(c) if c == '"' || c == '(' || c.is_ascii_digit() => self.value(depth + 1),
            Some(_) | None => Err("a key is a word or a string"),
        }
    }

    /// Skips space and comments.
    fn space(&mut self, lines: Lines) -> Read {
        loop {
            match self.peek() {
                Some('\n') if lines == Lines::Part => return Ok(()),
                Some(' ' | '\t' | '\r' | '\n') => self.advance(),
                Some('#') => self.comment(),
                Some('/') if self.rest().starts_with("//") => self.comment(),
                Some('/') if self.rest().starts_with("/*") => match self.rest().find("*/") {
                    Some(end) => self.at += end + 2,
                    None => return Err("this comment does not end"),
                },
                Some(_) | None => return Ok(()),
            }
        }
    }

    /// Skips up to the end of the line.
    fn comment(&mut self) {
        self.at += self.rest().find('\n').unwrap_or(self.rest().len());
    }

    /// Skips the rest of the line, its end too.
    fn line(&mut self) {
        self.comment();
        self.skip('\n');
    }

    fn rest(&self) -> &str {
        &self.text[self.at..]
    }

    fn peek(&self) -> Option<char> {
        self.rest().chars().next()
    }

    fn advance(&mut self) {
        self.at += self.peek().map_or(0, char::len_utf8);
    }

    fn skip(&mut self, wanted: char) -> bool {
        let found = self.peek() == Some(wanted);
        if found {
            self.advance();
        }
        found
    }
}

fn starts_word(c: char) -> bool {
    c == '_' || c.is_alphabetic()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_var_file_holds_is_taken() {
        for text in [
            "1",
            "-1.5e-3",
            "true",
            "null",
            r#""a \"b\" \n \u00e9 $${x} %%{y} $5 100%""#,
            "[]",
            "[1, \"a\",\n null,]",
            "{}",
            "{ a = 1, \"b c\" : [true] }",
            "{\n  a = {\n    b-c = \"x\" # why\n  }\n\n  // and\n  d = 2, \n}\n",
            "(\n [1]\n)",
            "<<EOT\nany \"text\" $${a}\n  EOT\n",
            "{ a = <<-EOT\n  x\n  EOT\n  b = 1 }",
            " /* first */ \"größe 🦀\" ",
            &format!("{}{}", "[".repeat(64), "]".repeat(64)),
        ] {
            assert_eq!(check(text), Ok(()), "{text}");
        }
    }

    #[test]
    fn what_it_cannot_hold_is_refused_at_its_place() {
        for (text, line, column) in [
            ("", 1, 1),
            ("plain", 1, 1),
            ("[1, var.x]", 1, 5),
            ("{\n  a = file(\"x\")\n}", 2, 7),
            ("\"a ${b}\"", 1, 4),
            ("\"%{ if x }\"", 1, 2),
            ("\"open", 1, 1),
            ("\"a\nb\"", 1, 1),
            ("\"\\q\"", 1, 2),
            ("\"\\ud800\"", 1, 2),
            ("[1 2]", 1, 4),
            ("{ a 1 }", 1, 5),
            ("{ a = 1 b = 2 }", 1, 9),
            ("{ a =\n1 }", 1, 6),
            ("1\n)\nother = (\n2", 2, 1),
            ("1) other = (2", 1, 2),
            ("a b", 1, 1),
            ("{", 1, 2),
            ("1.", 1, 3),
            ("1x", 1, 2),
            ("60 * 60", 1, 4),
            ("<<EOT\nx\n", 1, 1),
            ("/* ", 1, 1),
            ("[\"größe\", x]", 1, 11),
            (&"[".repeat(100_000), 1, 66),
            (&"-".repeat(100_000), 1, 2),
            (&"(".repeat(100_000), 1, 66),
        ] {
            let found = check(text).unwrap_err();
            let shown: String = text.chars().take(40).collect();
            assert_eq!((found.line, found.column), (line, column), "{shown}: {found}");
        }
    }
}
