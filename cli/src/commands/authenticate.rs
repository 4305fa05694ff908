//! `authenticate`: shows what is being approved, takes one code, submits it once.

use clap::Args;

use latchkey_proto::v1::Phase;

use crate::Done;
use crate::client::Patience;
use crate::code::{self, Wanted};
use crate::context::Context;
use crate::exit::Exit;
use crate::failure::Refusal;
use crate::input::Question;
use crate::log_view::clean;
use crate::view::run as view;
use crate::view::run::RunView;
use crate::watch;
use crate::words::{Word, explain};

/// Submits a token code for a run that waits for one
///
/// The code is asked for by a hidden prompt, or read as one line of standard input. For an apply
/// the code approves the plan that is shown first.
#[derive(Debug, Args)]
pub(crate) struct Authenticate {
    /// Id of the run
    run: String,
}

impl Authenticate {
    pub(crate) async fn run(self, context: &mut Context) -> Done {
        let session = context.session()?;
        let run = watch::fetch(&session.client, &self.run).await?;
        let Some(wanted) = Wanted::of(&run) else {
            return Err(Refusal::not_awaiting_code(run.state().camel()).into());
        };
        if wanted.phase == Phase::Apply
            && let Some(plan) = &run.plan_result
        {
            context.output.note("This plan will be applied:");
            context.output.note(view::changes(plan).trim_end());
            for line in view::before_apply(&run) {
                context.output.note(&line);
            }
            context.output.note("A token code approves it.");
        }
        let question = Question::Hidden(format!("{}: ", wanted.prompt()));
        let code = context.input.answer(question).await?;
        let patience = Patience::Short;
        let run = code::submit(&session.client, &run.run_id, &wanted, &code, patience).await?;
        context.output.data(&RunView::new(&run), |_| {
            let mut text = String::new();
            for line in view::authenticated(&run) {
                text.push_str(&format!("{line}\n"));
            }
            text.push_str(&format!("{}: {}\n", run.state().camel(), explain(run.state())));
            clean(&text)
        })?;
        Ok(Exit::Ok)
    }
}
