//! What the person and the program see: data to standard output, everything else to standard
//! error. Colour only repeats what the words say.

use std::io::{self, IsTerminal, Write};

use anstyle::{AnsiColor, Style};
use clap::ValueEnum;
use comfy_table::{Table, presets};
use serde::Serialize;

use crate::failure::Failure;
use crate::log_view::{Colour, clean};

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// Text and tables.
    #[default]
    Human,
    /// Objects with stable names.
    Json,
}

pub(crate) const BOLD: Style = Style::new().bold();
pub(crate) const DIM: Style = Style::new().dimmed();
pub(crate) const GREEN: Style = AnsiColor::Green.on_default();
pub(crate) const AMBER: Style = AnsiColor::Yellow.on_default();
pub(crate) const RED: Style = AnsiColor::Red.on_default().bold();

pub(crate) struct Output {
    out: Box<dyn Write + Send>,
    err: Box<dyn Write + Send>,
    pub(crate) format: Format,
    /// Of standard output and of standard error.
    colours: (Colour, Colour),
}

impl Output {
    /// Writes to this process's own streams, in colour if they and the environment want it.
    pub(crate) fn process() -> Output {
        Output {
            colours: (wanted(&io::stdout()), wanted(&io::stderr())),
            out: Box::new(io::stdout()),
            err: Box::new(io::stderr()),
            format: Format::Human,
        }
    }

    /// Writes without colour.
    pub(crate) fn to(out: Box<dyn Write + Send>, err: Box<dyn Write + Send>) -> Output {
        Output { out, err, format: Format::Human, colours: (Colour::Drop, Colour::Drop) }
    }

    pub(crate) fn is_json(&self) -> bool {
        self.format == Format::Json
    }

    /// Tells whether colours survive on standard output.
    pub(crate) fn colour(&self) -> Colour {
        self.colours.0
    }

    /// Writes text as it is to standard output.
    pub(crate) fn text(&mut self, text: &str) -> Result<(), Failure> {
        self.bytes(text.as_bytes())
    }

    pub(crate) fn bytes(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        self.out.write_all(bytes).and_then(|()| self.out.flush()).map_err(Failure::Output)
    }

    pub(crate) fn line(&mut self, line: &str) -> Result<(), Failure> {
        self.text(&format!("{line}\n"))
    }

    /// Writes one object over several lines.
    pub(crate) fn json(&mut self, value: &impl Serialize) -> Result<(), Failure> {
        let text = serde_json::to_string_pretty(value).map_err(io::Error::other);
        self.line(&text.map_err(Failure::Output)?)
    }

    /// Writes one object on one line, for streams of objects.
    pub(crate) fn json_line(&mut self, value: &impl Serialize) -> Result<(), Failure> {
        let text = serde_json::to_string(value).map_err(io::Error::other);
        self.line(&text.map_err(Failure::Output)?)
    }

    /// Writes the object for programs, or what `human` makes of it.
    pub(crate) fn data<T: Serialize>(
        &mut self,
        value: &T,
        human: impl FnOnce(&T) -> String,
    ) -> Result<(), Failure> {
        match self.format {
            Format::Json => self.json(value),
            Format::Human => self.text(&human(value)),
        }
    }

    /// Writes a line for the person to standard error. That it cannot be written is no reason to
    /// stop.
    pub(crate) fn note(&mut self, line: &str) {
        drop(self.err.write_all(format!("{line}\n").as_bytes()).and_then(|()| self.err.flush()));
    }

    pub(crate) fn hint(&mut self, hint: &str) {
        let label = self.paint(DIM, "hint:");
        self.note(&format!("{label} {hint}"));
    }

    pub(crate) fn failure(&mut self, failure: &Failure) {
        if failure.is_silent() {
            return;
        }
        if self.is_json() {
            if let Ok(text) = serde_json::to_string(&failure.view()) {
                self.note(&text);
            }
            return;
        }
        let label = self.paint(RED, "error:");
        self.note(&format!("{label} {}", failure.headline()));
        if let Failure::Refused(refusal) = failure {
            for (field, problem) in &refusal.fields {
                if *problem == refusal.message {
                    self.note(&format!("  field: {field}"));
                } else {
                    self.note(&format!("  {field}: {problem}"));
                }
            }
            if !refusal.reason_name.is_empty() {
                let reason = format!("  reason: {}", refusal.reason_name);
                let reason = self.paint(DIM, &reason);
                self.note(&reason);
            }
        }
        if let Some(hint) = failure.hint() {
            self.hint(&clean(&hint));
        }
    }

    /// Colours text for standard error.
    pub(crate) fn paint(&self, style: Style, text: &str) -> String {
        match self.colours.1 {
            Colour::Keep => format!("{style}{text}{style:#}"),
            Colour::Drop => text.to_owned(),
        }
    }
}

fn wanted(stream: &(impl anstream::stream::RawStream + IsTerminal)) -> Colour {
    match anstream::AutoStream::choice(stream) {
        anstream::ColorChoice::Never => Colour::Drop,
        anstream::ColorChoice::Auto
        | anstream::ColorChoice::Always
        | anstream::ColorChoice::AlwaysAnsi => Colour::Keep,
    }
}

/// Writes aligned columns under their names. `none` stands where there is no row.
pub(crate) fn table(names: &[&str], rows: Vec<Vec<String>>, none: &str) -> String {
    if rows.is_empty() {
        return format!("{none}\n");
    }
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(names.iter().copied());
    for row in rows {
        table.add_row(row.iter().map(|cell| cell_text(cell)));
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    let mut text = String::new();
    for line in table.lines() {
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// Writes names and values, the values aligned; lines without a value are left out.
pub(crate) fn fields(fields: &[(&str, String)]) -> String {
    let shown = || fields.iter().filter(|(_, value)| !value.is_empty());
    let width = shown().map(|(name, _)| name.len()).max().unwrap_or(0);
    let mut text = String::new();
    for (name, value) in shown() {
        text.push_str(&format!("  {name:width$}  {}\n", cell_text(value)));
    }
    text
}

fn cell_text(value: &str) -> String {
    match clean(value).replace(['\n', '\t'], " ") {
        empty if empty.is_empty() => "-".to_owned(),
        text => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_is_aligned_and_ends_no_line_in_blanks() {
        let rows =
            vec![vec!["a".into(), "".into()], vec!["longer".into(), "x\u{1b}[2Jy\nz".into()]];
        assert_eq!(
            table(&["NAME", "WHAT"], rows, "none"),
            "NAME    WHAT\na       -\nlonger  xy z\n"
        );
        assert_eq!(table(&["NAME"], Vec::new(), "none"), "none\n");
    }
}
