//! `confirm`: shows the plan, asks, and confirms what was shown.

use clap::Args;
use secrecy::ExposeSecret;

use latchkey_proto::v1;
use latchkey_proto::v1::RunState;

use crate::Done;
use crate::code;
use crate::context::Context;
use crate::exit::Exit;
use crate::input::Question;
use crate::view::run as view;
use crate::view::run::RunView;
use crate::watch;
use crate::words::{Word, explain};

/// Confirms the plan of a run whose policy demands no code
#[derive(Debug, Args)]
pub(crate) struct Confirm {
    /// Id of the run
    run: String,
    /// Do not ask
    #[arg(short, long)]
    yes: bool,
}

impl Confirm {
    pub(crate) async fn run(self, context: &mut Context) -> Done {
        let session = context.session()?;
        let client = &session.client;
        let run = watch::fetch(client, &self.run).await?;
        // In any other state the control plane says what is to be done instead.
        if run.state() == RunState::AwaitingConfirmation && !self.yes {
            if let Some(plan) = &run.plan_result {
                context.output.note(view::changes(plan).trim_end());
            }
            for line in view::before_apply(&run) {
                context.output.note(&line);
            }
            let question = Question::Visible("Apply this plan? Only `yes` confirms it: ".into());
            let answer = context.input.answer(question).await?;
            if answer.expose_secret().trim() != "yes" {
                context.output.note("Not confirmed; the run keeps waiting.");
                return Ok(Exit::WaitsForPerson);
            }
        }
        let request =
            v1::ConfirmRequest { run_id: self.run.clone(), plan_digest: code::digest(&run) };
        let answer = client
            .call(|| {
                let (mut runs, request) = (client.runs(), request.clone());
                async move { runs.confirm(request).await }
            })
            .await?;
        let run = answer.run.unwrap_or_default();
        context.output.data(&RunView::new(&run), |_| {
            format!("Confirmed\n{}: {}\n", run.state().camel(), explain(run.state()))
        })?;
        Ok(Exit::Ok)
    }
}
