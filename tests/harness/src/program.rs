//! How to start each program of the project.

use std::env;
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::Stdio;

use tokio::process::Command;

/// First argument that makes a program end when its standard input closes: it cannot outlive
/// who started it, whatever became of them.
pub const TETHERED: &str = "tethered";

/// An executable, and what stands before the program's own arguments.
#[derive(Debug, Clone)]
pub struct Program {
    pub exe: PathBuf,
    pub prefix: Vec<OsString>,
}

impl Program {
    /// Prepares a start: in a process group of its own, without variables of this process that
    /// would configure the program, ended with us.
    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.exe);
        command.args(&self.prefix).process_group(0).kill_on_drop(true).stdin(Stdio::piped());
        for (name, _) in env::vars_os() {
            let text = name.to_string_lossy();
            // Where whoever runs the tests gets an engine from is not ours to forget.
            let configures = text.starts_with("LATCHKEY_") && text != "LATCHKEY_ENGINE_MIRROR";
            if configures || text.starts_with("AWS_") {
                command.env_remove(name);
            }
        }
        command
    }
}

/// One executable that contains every program, as `deploy/dev` makes it.
#[derive(Debug, Clone)]
pub struct Programs {
    exe: PathBuf,
}

impl Programs {
    /// Takes the executable; tests give `env!("CARGO_BIN_EXE_latchkey-it")`.
    pub fn in_one(exe: impl Into<PathBuf>) -> Self {
        Self { exe: exe.into() }
    }

    pub fn aws_simulator(&self) -> Program {
        self.tethered("aws-simulator")
    }

    pub fn control_plane(&self) -> Program {
        self.tethered("control-plane")
    }

    pub fn runner(&self) -> Program {
        self.tethered("runner")
    }

    /// The command line. Not tethered, since its standard input is its own.
    pub fn cli(&self) -> Program {
        Program { exe: self.exe.clone(), prefix: vec!["cli".into()] }
    }

    /// `demo` and `dev`.
    pub fn dev(&self, command: &str) -> Program {
        Program { exe: self.exe.clone(), prefix: vec![command.into()] }
    }

    fn tethered(&self, program: &str) -> Program {
        Program { exe: self.exe.clone(), prefix: vec![TETHERED.into(), program.into()] }
    }
}
