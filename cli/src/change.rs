//! Changes that may take a token code: tried without one, and once more with one where the
//! control plane asks for it.

use std::future::Future;

use secrecy::SecretString;
use tonic::{Response, Status};
use uuid::Uuid;

use latchkey_proto::v1::Reason;

use crate::client::Client;
use crate::code::digits;
use crate::context::Context;
use crate::failure::{Failure, Refusal};
use crate::input::Question;

/// When a code is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ask {
    /// Once the control plane says that the change takes one.
    WhenNeeded,
    First,
}

/// Makes a change. `call` is given a code and a request id, both empty where there is no code.
pub(crate) async fn make<T, F, Fut>(
    context: &mut Context,
    client: &Client,
    ask: Ask,
    call: F,
) -> Result<T, Failure>
where
    F: Fn(String, String) -> Fut,
    Fut: Future<Output = Result<Response<T>, Status>>,
{
    if ask == Ask::WhenNeeded {
        match client.call(|| call(String::new(), String::new())).await {
            Err(Failure::Refused(refusal)) if takes_code(&refusal) => {
                context.output.note(&crate::log_view::clean(&refusal.message));
            }
            other => return other,
        }
    }
    let question = Question::Hidden("Token code for this change: ".into());
    let code: SecretString = context.input.answer(question).await?;
    let code = digits(&code)?.to_owned();
    // One for all repeats: what becomes of the code is recorded under it.
    let request_id = Uuid::new_v4().to_string();
    client.call(|| call(code.clone(), request_id.clone())).await
}

/// Tells a change that takes a code from a run that waits for one.
fn takes_code(refusal: &Refusal) -> bool {
    refusal.reason == Some(Reason::MfaRequired)
        && refusal.fields.iter().any(|(field, _)| field == "token_code")
}

#[cfg(test)]
mod tests {
    use tonic::Code;

    use super::*;

    #[test]
    fn only_a_change_is_repeated_with_a_code() {
        let mut refusal = Refusal::of_field("token_code", "this takes one");
        assert!(!takes_code(&refusal), "a malformed code is not asked for again");
        refusal.code = Code::FailedPrecondition;
        refusal.reason = Some(Reason::MfaRequired);
        assert!(takes_code(&refusal));
        refusal.fields.clear();
        assert!(!takes_code(&refusal));
    }
}
