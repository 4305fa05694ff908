//! What the demo says between the commands. Colour and weight only repeat what the words say.

use std::collections::VecDeque;
use std::io::{self, IsTerminal, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anstyle::{AnsiColor, Style};

const BOLD: Style = Style::new().bold();
const DIM: Style = Style::new().dimmed();
const COMMAND: Style = AnsiColor::Cyan.on_default().bold();
const GOOD: Style = AnsiColor::Green.on_default();

/// How long a person at a terminal may read before the next chapter begins.
const BREATH: Duration = Duration::from_millis(1200);

/// Writes to standard output; clones write to the same.
#[derive(Clone, Debug)]
pub(crate) struct Narrator {
    chapter: Arc<Mutex<u32>>,
}

impl Narrator {
    pub(crate) fn new() -> Self {
        Self { chapter: Arc::new(Mutex::new(0)) }
    }

    pub(crate) fn title(&self, title: &str) {
        line(&format!("{BOLD}{title}{BOLD:#}"));
    }

    /// Begins a chapter.
    pub(crate) async fn chapter(&self, what: &str) {
        if io::stdout().is_terminal() {
            tokio::time::sleep(BREATH).await;
        }
        let mut number = self.chapter.lock().unwrap_or_else(PoisonError::into_inner);
        *number += 1;
        line(&format!("\n{BOLD}{}. {what}{BOLD:#}", *number));
    }

    pub(crate) fn say(&self, text: &str) {
        line(&format!("   {text}"));
    }

    pub(crate) fn aside(&self, text: &str) {
        line(&format!("   {DIM}({text}){DIM:#}"));
    }

    /// Something that was checked and found true.
    pub(crate) fn true_(&self, text: &str) {
        line(&format!("   {GOOD}[ok]{GOOD:#} {text}"));
    }

    /// A command as one would type it.
    pub(crate) fn command(&self, text: &str) {
        line(&format!("   {COMMAND}${COMMAND:#} {BOLD}{text}{BOLD:#}"));
    }
}

fn line(text: &str) {
    // A closed standard output shows in the end, when the exit code is all that is left.
    let _ = writeln!(anstream::stdout(), "{text}");
}

/// How much of what a command writes is shown.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Show {
    All,
    /// The first and the last lines.
    Ends {
        first: usize,
        last: usize,
    },
}

/// What a command writes: shown as it comes, behind a rule, and remembered.
#[derive(Clone, Debug)]
pub(crate) struct Margin {
    show: Show,
    inner: Arc<Mutex<Inner>>,
}

#[derive(Debug, Default)]
struct Inner {
    begun: String,
    lines: usize,
    held: VecDeque<String>,
    text: String,
}

impl Margin {
    pub(crate) fn new(show: Show) -> Self {
        Self { show, inner: Arc::default() }
    }

    /// Shows what was held back, and returns all that was written.
    pub(crate) fn finish(&self) -> String {
        let mut inner = self.lock();
        if !inner.begun.is_empty() {
            let rest = std::mem::take(&mut inner.begun);
            self.take(&mut inner, &rest);
        }
        let last = match self.show {
            Show::All => 0,
            Show::Ends { last, .. } => last,
        };
        let left_out = inner.held.len().saturating_sub(last);
        // One line is not worth being left out.
        if left_out > 1 {
            inner.held.drain(..left_out);
            show(&format!("{DIM}... {left_out} lines ...{DIM:#}"));
        }
        inner.held.drain(..).for_each(|line| show(&line));
        inner.text.clone()
    }

    fn take(&self, inner: &mut Inner, line: &str) {
        inner.lines += 1;
        match self.show {
            Show::Ends { first, .. } if inner.lines > first => {
                inner.held.push_back(line.to_owned());
            }
            Show::All | Show::Ends { .. } => show(line),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn show(text: &str) {
    line(&format!("   {DIM}|{DIM:#} {text}"));
}

impl Write for Margin {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut inner = self.lock();
        let text = String::from_utf8_lossy(bytes);
        inner.text.push_str(&text);
        inner.begun.push_str(&text);
        while let Some(end) = inner.begun.find('\n') {
            let line: String = inner.begun.drain(..=end).collect();
            self.take(&mut inner, line.trim_end());
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
