//! The exit codes, in one table that `--help` prints.

use std::process::ExitCode;

/// How a command ended, for the program that called it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// Done.
    Ok,
    /// The control plane, or a check before it, said no; nothing was changed.
    Refused,
    /// The command line is wrong.
    Usage,
    /// The run that was followed ended `Errored`.
    RunErrored,
    /// The run waits for a person and there is nobody to ask.
    WaitsForPerson,
    /// No credential, or none that is known.
    NotSignedIn,
    /// The control plane cannot be reached.
    Unreachable,
    /// The run that was followed was canceled or discarded.
    RunStopped,
    /// The run's apply was lost; a person decides.
    RunLost,
    /// Left by Ctrl-C; a run goes on without us.
    Detached,
}

impl Exit {
    /// Every way to end, in the order of the codes.
    pub const ALL: [Exit; 10] = [
        Exit::Ok,
        Exit::Refused,
        Exit::Usage,
        Exit::RunErrored,
        Exit::WaitsForPerson,
        Exit::NotSignedIn,
        Exit::Unreachable,
        Exit::RunStopped,
        Exit::RunLost,
        Exit::Detached,
    ];

    /// Returns the number that the caller's shell sees.
    pub fn code(self) -> u8 {
        match self {
            Exit::Ok => 0,
            Exit::Refused => 1,
            Exit::Usage => 2,
            Exit::RunErrored => 3,
            Exit::WaitsForPerson => 4,
            Exit::NotSignedIn => 5,
            Exit::Unreachable => 6,
            Exit::RunStopped => 7,
            Exit::RunLost => 8,
            Exit::Detached => 130,
        }
    }

    fn meaning(self) -> &'static str {
        match self {
            Exit::Ok => "done; a followed run ended well",
            Exit::Refused => "refused or failed; the reason is on standard error",
            Exit::Usage => "the command line is wrong",
            Exit::RunErrored => "the followed run ended Errored",
            Exit::WaitsForPerson => {
                "the run waits for a code or a confirmation and nobody gave one"
            }
            Exit::NotSignedIn => "not signed in, or the token is not known any more",
            Exit::Unreachable => "the control plane cannot be reached",
            Exit::RunStopped => "the followed run was canceled or discarded",
            Exit::RunLost => "the apply of the followed run was lost; a person decides",
            Exit::Detached => "left by Ctrl-C; a queued run goes on",
        }
    }

    /// Writes the table for `--help`.
    pub(crate) fn help() -> String {
        let mut text = String::from("Exit codes:\n");
        for exit in Exit::ALL {
            text.push_str(&format!("  {:>3}  {}\n", exit.code(), exit.meaning()));
        }
        text
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> ExitCode {
        ExitCode::from(exit.code())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_is_documented_once() {
        let help = Exit::help();
        for exit in Exit::ALL {
            let line = format!("  {:>3}  {}\n", exit.code(), exit.meaning());
            assert_eq!(help.matches(&line).count(), 1, "{exit:?}");
        }
    }
}
