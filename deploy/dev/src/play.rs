//! The real command line, in this process: people see the commands that they would type, and
//! their real output.

use std::ffi::OsString;
use std::io::Cursor;
use std::path::{Path, PathBuf};

use latchkey_cli::{Exit, Stdin, Streams};

use crate::narrator::{Margin, Narrator, Show};

/// Somebody at a keyboard, signed in with a credentials file.
#[derive(Debug)]
pub(crate) struct Player {
    config: PathBuf,
    narrator: Narrator,
}

/// How a command ended.
#[derive(Debug)]
pub(crate) struct Played {
    pub(crate) exit: Exit,
    pub(crate) text: String,
}

impl Player {
    /// Signs in, quietly.
    pub(crate) async fn sign_in(
        narrator: Narrator,
        config: &Path,
        address: &str,
        ca_file: &Path,
        token: &str,
    ) -> anyhow::Result<Self> {
        let streams = Streams {
            stdin: lines(token),
            stdout: Box::new(std::io::sink()),
            stderr: Box::new(std::io::sink()),
        };
        let mut arguments = command_line(config, &["login", address, "--ca-file"]);
        arguments.push(ca_file.into());
        let exit = latchkey_cli::run_with(arguments, streams).await;
        anyhow::ensure!(exit == Exit::Ok, "failed to sign in: {exit:?}");
        Ok(Self { config: config.to_owned(), narrator })
    }

    /// Plays a command that must end well, and returns what it wrote.
    pub(crate) async fn play(&self, arguments: &[&str], typed: &str) -> anyhow::Result<String> {
        self.play_part(arguments, typed, Show::All).await
    }

    /// The same, with some of its output left out.
    pub(crate) async fn play_part(
        &self,
        arguments: &[&str],
        typed: &str,
        show: Show,
    ) -> anyhow::Result<String> {
        let played = self.try_play(arguments, typed, show).await;
        let command = arguments.join(" ");
        anyhow::ensure!(played.exit == Exit::Ok, "`latchkey {command}` ended: {:?}", played.exit);
        Ok(played.text)
    }

    /// Plays a command. `typed` is its standard input.
    pub(crate) async fn try_play(&self, arguments: &[&str], typed: &str, show: Show) -> Played {
        self.narrator.command(&shown(arguments));
        let margin = Margin::new(show);
        let streams = Streams {
            stdin: lines(typed),
            stdout: Box::new(margin.clone()),
            stderr: Box::new(margin.clone()),
        };
        let exit = latchkey_cli::run_with(command_line(&self.config, arguments), streams).await;
        Played { exit, text: margin.finish() }
    }
}

fn lines(text: &str) -> Stdin {
    Stdin::Lines(Box::new(Cursor::new(format!("{text}\n"))))
}

fn command_line(config: &Path, arguments: &[&str]) -> Vec<OsString> {
    let mut all: Vec<OsString> = vec!["latchkey".into(), "--config".into(), config.into()];
    all.extend(arguments.iter().map(OsString::from));
    all
}

fn shown(arguments: &[&str]) -> String {
    let mut text = "latchkey".to_owned();
    for argument in arguments {
        text.push(' ');
        if argument.contains(' ') {
            text.push_str(&format!("\"{argument}\""));
        } else {
            text.push_str(argument);
        }
    }
    text
}
