//! What people type: codes and tokens by a hidden prompt on a terminal, or the next line of
//! standard input when it is none. A thread of its own reads, since a read cannot be taken back;
//! an answer may come after its question has lost its meaning, and the asker decides then.

use std::io::{self, IsTerminal, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};
use secrecy::SecretString;
use secrecy::zeroize::Zeroizing;
use tokio::sync::oneshot;

use crate::failure::Failure;

/// A value of a variable is at most 256 KiB.
const LONGEST: usize = 256 << 10;

/// Where answers come from.
pub enum Stdin {
    /// A terminal: questions are asked.
    Terminal,
    /// Anything else: the next line is the answer.
    Lines(Box<dyn Read + Send>),
}

impl std::fmt::Debug for Stdin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Stdin::Terminal => "Terminal",
            Stdin::Lines(_) => "Lines",
        })
    }
}

impl Stdin {
    /// Takes this process's own standard input.
    pub fn process() -> Stdin {
        if io::stdin().is_terminal() { Stdin::Terminal } else { Stdin::Lines(Box::new(Unbuffered)) }
    }
}

/// What is asked.
#[derive(Debug)]
pub(crate) enum Question {
    /// A secret of one line, not shown while it is typed.
    Hidden(String),
    /// A line that is shown.
    Visible(String),
    /// All there is: one hidden line of a terminal, else everything up to the end.
    Everything(String),
}

/// None when standard input has ended.
pub(crate) type Answer = io::Result<Option<SecretString>>;

pub(crate) struct Input {
    asker: Asker,
    terminal: bool,
}

enum Asker {
    Idle(Stdin),
    Running(SyncSender<(Question, oneshot::Sender<Answer>)>),
    Ended,
}

impl Input {
    pub(crate) fn new(stdin: Stdin) -> Input {
        Input { terminal: matches!(stdin, Stdin::Terminal), asker: Asker::Idle(stdin) }
    }

    pub(crate) fn is_terminal(&self) -> bool {
        self.terminal
    }

    /// Asks; the answer comes whenever it comes. Questions are answered in order.
    pub(crate) fn ask(&mut self, question: Question) -> oneshot::Receiver<Answer> {
        let (answer, receiver) = oneshot::channel();
        self.asker = match std::mem::replace(&mut self.asker, Asker::Ended) {
            Asker::Idle(stdin) => {
                let (sender, questions) = sync_channel(2);
                // Not joined: it may wait for a key that is never pressed.
                std::thread::spawn(move || answer_all(stdin, &questions));
                Asker::Running(sender)
            }
            other @ (Asker::Running(_) | Asker::Ended) => other,
        };
        if let Asker::Running(sender) = &self.asker {
            // A lost or refused question drops `answer`, which the receiver sees.
            drop(sender.try_send((question, answer)));
        }
        receiver
    }

    /// Asks and waits for the answer.
    pub(crate) async fn answer(&mut self, question: Question) -> Result<SecretString, Failure> {
        let wanted = match &question {
            Question::Hidden(prompt) | Question::Visible(prompt) | Question::Everything(prompt) => {
                prompt.trim_end_matches([':', ' ']).to_lowercase()
            }
        };
        // Restores the echo also when nobody waits for the answer any more.
        let _restored = self.terminal.then(TerminalGuard::new);
        match self.ask(question).await {
            Ok(Ok(Some(answer))) => Ok(answer),
            Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {
                Err(Failure::Interrupted)
            }
            Ok(Err(error)) => Err(Failure::Input(error)),
            Ok(Ok(None)) | Err(_) => {
                Err(Failure::NobodyToAsk { wanted, hint: "give it on standard input".into() })
            }
        }
    }
}

fn answer_all(mut stdin: Stdin, questions: &Receiver<(Question, oneshot::Sender<Answer>)>) {
    while let Ok((question, answer)) = questions.recv() {
        let read = match (&mut stdin, question) {
            (Stdin::Terminal, Question::Hidden(prompt) | Question::Everything(prompt)) => {
                rpassword::prompt_password(prompt).map(|line| Some(SecretString::from(line)))
            }
            (Stdin::Terminal, Question::Visible(prompt)) => {
                drop(io::stderr().write_all(prompt.as_bytes()));
                read_line(&mut Unbuffered)
            }
            (Stdin::Lines(lines), Question::Hidden(_) | Question::Visible(_)) => read_line(lines),
            (Stdin::Lines(lines), Question::Everything(_)) => read_all(lines),
        };
        // Nobody waits any more: the answer is wiped.
        drop(answer.send(read));
    }
}

/// Reads byte by byte, so that no buffer keeps a code and no byte of the next line is taken.
fn read_line(from: &mut impl Read) -> Answer {
    let mut line = Zeroizing::new(Vec::with_capacity(256));
    let mut byte = Zeroizing::new([0_u8; 1]);
    loop {
        match from.read(&mut byte[..]) {
            Ok(0) if line.is_empty() => return Ok(None),
            Ok(0) => break,
            Ok(_) if byte[0] == b'\n' => break,
            Ok(_) => line.push(byte[0]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
        if line.len() > LONGEST {
            return Err(io::Error::other("the line is longer than 256 KiB"));
        }
    }
    if line.last() == Some(&b'\r') {
        line.pop();
    }
    secret(&line)
}

/// Reads to the end and takes one line end off it.
fn read_all(from: &mut impl Read) -> Answer {
    let mut all = Zeroizing::new(Vec::with_capacity(LONGEST + 2));
    from.take(LONGEST as u64 + 2).read_to_end(&mut all)?;
    if all.is_empty() {
        return Ok(None);
    }
    if all.last() == Some(&b'\n') {
        all.pop();
    }
    if all.len() > LONGEST {
        return Err(io::Error::other("it is longer than 256 KiB"));
    }
    secret(&all)
}

fn secret(bytes: &[u8]) -> Answer {
    match std::str::from_utf8(bytes) {
        Ok(text) => Ok(Some(SecretString::from(text))),
        // The error of the standard library would not say more, and could show bytes.
        Err(_) => Err(io::Error::other("it is not UTF-8")),
    }
}

/// Standard input without the standard library's buffer, which would keep what passed through.
struct Unbuffered;

impl Read for Unbuffered {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        Ok(rustix::io::read(io::stdin().as_fd(), buffer)?)
    }
}

/// Remembers how the terminal was and makes it so again: a hidden prompt that is left open turns
/// the echo off for whoever comes after us.
pub(crate) struct TerminalGuard(Option<Termios>);

impl TerminalGuard {
    pub(crate) fn new() -> TerminalGuard {
        TerminalGuard(tcgetattr(io::stdin().as_fd()).ok())
    }
}

impl Drop for TerminalGuard {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            let stdin = io::stdin();
            let terminal: BorrowedFd<'_> = stdin.as_fd();
            // A terminal that has gone needs nothing.
            let _ = tcsetattr(terminal, OptionalActions::Now, before);
        }
    }
}

#[cfg(test)]
mod tests {
    use secrecy::ExposeSecret;

    use super::*;

    #[tokio::test]
    async fn lines_are_answers_in_order_until_they_end() {
        let lines = Box::new(io::Cursor::new("first\r\nsecond"));
        let mut input = Input::new(Stdin::Lines(lines));
        let question = || Question::Hidden("Code: ".into());
        assert_eq!(input.answer(question()).await.unwrap().expose_secret(), "first");
        assert_eq!(input.answer(question()).await.unwrap().expose_secret(), "second");
        let ended = input.answer(question()).await;
        assert!(matches!(ended, Err(Failure::NobodyToAsk { .. })), "{ended:?}");
    }

    #[tokio::test]
    async fn a_value_may_have_many_lines() {
        let mut input = Input::new(Stdin::Lines(Box::new(io::Cursor::new("{\n  a = 1\n}\n"))));
        let value = input.answer(Question::Everything("Value: ".into())).await.unwrap();
        assert_eq!(value.expose_secret(), "{\n  a = 1\n}");
    }
}
