//! `top-up`: another code while an apply runs.

use clap::Args;
use uuid::Uuid;

use latchkey_proto::v1;

use crate::Done;
use crate::client::Patience;
use crate::code;
use crate::context::Context;
use crate::exit::Exit;
use crate::input::Question;
use crate::log_view::clean;
use crate::view::run as view;
use crate::view::run::RunView;
use crate::words::human_time;

/// Submits another token code while an apply runs, so that it can run on
///
/// The running terraform gets the session that the code buys, without a restart. The code is asked
/// for by a hidden prompt, or read as one line of standard input.
#[derive(Debug, Args)]
pub(crate) struct TopUp {
    /// Id of the run
    run: String,
}

impl TopUp {
    pub(crate) async fn run(self, context: &mut Context) -> Done {
        let session = context.session()?;
        let client = &session.client;
        let question = Question::Hidden("Token code to top the apply up: ".into());
        let code = context.input.answer(question).await?;
        let digits = code::digits(&code)?;
        let request_id = Uuid::new_v4().to_string();
        let answer = client
            .call_with(Patience::Short, || {
                let mut runs = client.runs();
                let request = v1::TopUpRequest {
                    run_id: self.run.clone(),
                    token_code: digits.to_owned(),
                    request_id: request_id.clone(),
                };
                async move { runs.top_up(request).await }
            })
            .await?;
        let run = answer.run.unwrap_or_default();
        context.output.data(&RunView::new(&run), |_| {
            let mut text = String::new();
            for line in view::authenticated(&run) {
                text.push_str(&format!("{line}\n"));
            }
            let expires = run
                .apply
                .as_ref()
                .and_then(|apply| apply.authenticated.as_ref())
                .map(|authenticated| human_time(authenticated.expire_time.as_ref()));
            match expires {
                Some(expires) => {
                    text.push_str(&format!("The apply's session lives until {expires}\n"));
                }
                None => text.push_str("The apply has the new session\n"),
            }
            clean(&text)
        })?;
        Ok(Exit::Ok)
    }
}
