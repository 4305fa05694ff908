//! `completions`: what a shell needs to complete our command lines.

use clap::Args;
use clap_complete::Shell;

use crate::Done;
use crate::context::Context;
use crate::exit::Exit;

/// Writes the completions for a shell to standard output
#[derive(Debug, Args)]
pub(crate) struct Completions {
    /// Which shell
    #[arg(value_enum)]
    shell: Shell,
}

impl Completions {
    pub(crate) fn run(self, context: &mut Context) -> Done {
        let mut script = Vec::new();
        let mut command = crate::command_line();
        clap_complete::generate(self.shell, &mut command, "latchkey", &mut script);
        context.output.bytes(&script)?;
        Ok(Exit::Ok)
    }
}
