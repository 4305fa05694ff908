//! `env doctor`: tries an environment's AWS set-up and says what to fix.

use clap::Args;
use uuid::Uuid;

use latchkey_proto::v1;

use crate::Done;
use crate::code;
use crate::context::Context;
use crate::exit::Exit;
use crate::input::Question;
use crate::view::check::CheckView;

#[derive(Debug, Args)]
pub(crate) struct Doctor {
    /// Name of the environment
    #[arg(value_name = "ENV")]
    environment: String,
    /// Spend one token code as well: asked for by a hidden prompt, or read as one line of standard
    /// input
    #[arg(long, alias = "code-stdin")]
    code: bool,
}

impl Doctor {
    pub(crate) async fn run(self, context: &mut Context) -> Done {
        let session = context.session()?;
        let (client, organization) = (&session.client, session.organization()?);
        let mut token_code = String::new();
        if self.code {
            let question = Question::Hidden("Token code to be spent on the check: ".into());
            let code = context.input.answer(question).await?;
            token_code.push_str(code::digits(&code)?);
        }
        let request = v1::CheckEnvironmentRequest {
            organization,
            environment: self.environment,
            token_code,
            request_id: Uuid::new_v4().to_string(),
        };
        let answer = client
            .call(|| {
                let (mut service, request) = (client.environments(), request.clone());
                async move { service.check_environment(request).await }
            })
            .await?;
        let view = CheckView::new(&answer.steps);
        context.output.data(&view, CheckView::human)?;
        Ok(if view.has_failed() { Exit::Refused } else { Exit::Ok })
    }
}
