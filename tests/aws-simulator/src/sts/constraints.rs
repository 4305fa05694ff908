//! The limits of the service model: lengths, alphabets, ranges, and AWS's sentence about each.

use crate::encoding::Form;
use crate::errors::Refusal;
use crate::world::Secret;

/// What was wrong with the members so far.
#[derive(Default)]
pub(super) struct Constraints {
    clauses: Vec<Secret>,
}

/// An alphabet as a test and as AWS writes it.
pub(super) struct Alphabet {
    pub(super) allows: fn(char) -> bool,
    pub(super) pattern: &'static str,
}

pub(super) const DIGITS: Alphabet =
    Alphabet { allows: |letter| letter.is_ascii_digit(), pattern: r"[\d]*" };
pub(super) const SERIAL: Alphabet =
    Alphabet { allows: |letter| word_or(letter, "+=/:,.@-"), pattern: r"[\w+=/:,.@-]*" };
pub(super) const NAME: Alphabet =
    Alphabet { allows: |letter| word_or(letter, "+=,.@-"), pattern: r"[\w+=,.@-]*" };
pub(super) const EXTERNAL_ID: Alphabet =
    Alphabet { allows: |letter| word_or(letter, "+=,.@:/-"), pattern: r"[\w+=,.@:\/-]*" };

impl Constraints {
    /// Checks a member's length and alphabet, if it is given.
    pub(super) fn text(
        &mut self,
        form: &Form,
        name: &str,
        (shortest, longest): (usize, usize),
        alphabet: Option<&Alphabet>,
    ) {
        let Some(value) = form.value(name) else { return };
        if let Some(alphabet) = alphabet
            && !value.chars().all(alphabet.allows)
        {
            let pattern = alphabet.pattern;
            self.add(name, value, &format!("satisfy regular expression pattern: {pattern}"));
        }
        let length = value.chars().count();
        if length < shortest {
            self.add(name, value, &format!("have length greater than or equal to {shortest}"));
        }
        if length > longest {
            self.add(name, value, &format!("have length less than or equal to {longest}"));
        }
    }

    /// Demands that a member is given.
    pub(super) fn required(&mut self, form: &Form, name: &str) {
        if form.value(name).is_none() {
            let member = member(name);
            self.clauses.push(Secret::new(format!(
                "Value null at '{member}' failed to satisfy constraint: Member must not be null"
            )));
        }
    }

    /// Reads a number within its range, or the one that holds when none is given.
    pub(super) fn number(
        &mut self,
        form: &Form,
        name: &str,
        (least, most): (i64, i64),
        otherwise: i64,
    ) -> i64 {
        let Some(text) = form.value(name) else { return otherwise };
        let number = text.parse::<i64>().unwrap_or_default();
        if number < least {
            self.add(name, text, &format!("have value greater than or equal to {least}"));
        }
        if number > most {
            self.add(name, text, &format!("have value less than or equal to {most}"));
        }
        number
    }

    /// Checks how many members a list has.
    pub(super) fn count(&mut self, name: &str, count: usize, most: usize) {
        if count > most {
            self.add(name, "[…]", &format!("have length less than or equal to {most}"));
        }
    }

    /// Checks the members that every MFA action has.
    pub(super) fn mfa(&mut self, form: &Form) {
        self.text(form, "SerialNumber", (9, 256), Some(&SERIAL));
        self.text(form, "TokenCode", (6, 6), Some(&DIGITS));
        self.number(form, "MinimumSessionTokenSize", (0, 4096), 0);
    }

    /// Ends the checks.
    pub(super) fn finish(self) -> Result<(), Refusal> {
        if self.clauses.is_empty() { Ok(()) } else { Err(Refusal::Constraints(self.clauses)) }
    }

    fn add(&mut self, name: &str, value: &str, must: &str) {
        let member = member(name);
        self.clauses.push(Secret::new(format!(
            "Value '{value}' at '{member}' failed to satisfy constraint: Member must {must}"
        )));
    }
}

/// Writes a member's name as the messages do, with a small first letter.
fn member(name: &str) -> String {
    let mut letters = name.chars();
    letters.next().map(|first| first.to_ascii_lowercase()).into_iter().chain(letters).collect()
}

fn word_or(letter: char, others: &str) -> bool {
    letter.is_ascii_alphanumeric() || letter == '_' || others.contains(letter)
}
