//! Queues a run that has ended once more: what was asked for then, under what holds now.
//!
//! The values that were given for the first run alone ended with it. A retry without them would
//! do something else than the first, so they have to be given again.

use std::sync::Arc;

use latchkey_domain::id::RunId;
use latchkey_domain::run::{Category, Given, Run};
use latchkey_proto::v1::Reason;

use super::environments::request_owner;
use super::queue_run::{Asked, LONGEST_MESSAGE, check_destroy};
use super::variables::NewVariable;
use super::{App, check_request_id};
use crate::auth::{Caller, Right};
use crate::error::{Error, Result};
use crate::store::keys;

/// What is to be done again.
#[derive(Debug)]
pub struct Retry {
    pub run: RunId,
    /// Those that the first run had, again.
    pub variables: Vec<NewVariable>,
    /// The environment's name typed again, for a destroy.
    pub destroy_confirmation: String,
    pub request_id: String,
}

impl App {
    pub async fn retry_run(self: &Arc<Self>, caller: &Caller, retry: Retry) -> Result<Run> {
        let (_, first) = self.run_for(caller, retry.run, Right::Operate).await?;
        let (first, request) = (&first.value, &first.value.request);
        check_request_id(&retry.request_id)?;
        let request_key = keys::request(
            request_owner(caller),
            &format!("retry:{}:{}", first.id, retry.request_id),
        );
        if let Some(made) = self.queued_before(&request_key, request.environment).await? {
            return Ok(made);
        }
        if !first.state.is_end() {
            let message = "the run has not ended; wait for its end, or cancel it first";
            return Err(
                Error::refused(Reason::WrongState, message).with("state", first.state.as_str())
            );
        }
        let environment = self.environment(request.organization, request.environment).await?;
        check_destroy(request.kind, &retry.destroy_confirmation, &environment.value.name)?;
        check_given_again(&request.given, &retry.variables)?;
        let asked = Asked {
            organization: request.organization,
            environment: request.environment,
            kind: request.kind,
            configuration: request.configuration,
            message: message(first),
            target: request.target.clone(),
            replace: request.replace.clone(),
            // Who wanted to look first wants to look again; to apply by itself is the setting's word.
            auto_apply: if request.auto_apply { None } else { Some(false) },
            retry_of: Some(first.id),
            variables: retry.variables,
            request_key,
        };
        self.queue(caller, asked).await
    }
}

fn check_given_again(first: &[Given], now: &[NewVariable]) -> Result<()> {
    let is = |first: &Given, variable: &NewVariable| {
        let same = |category: Category| category == variable.category.into();
        first.name == variable.name && first.category.is_none_or(same)
    };
    let missing: Vec<String> = first
        .iter()
        .filter(|first| !now.iter().any(|variable| is(first, variable)))
        .map(|first| match first.category {
            Some(Category::Environment) => format!("{} (environment)", first.name),
            Some(Category::Terraform) | None => first.name.clone(),
        })
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let message = format!(
        "the first run had variables of its own, whose values ended with it; give them again: {}",
        missing.join(", ")
    );
    Err(Error::field("variables", message).with("missing", missing.join(", ")))
}

fn message(first: &Run) -> String {
    let whole = match first.request.message.as_str() {
        "" => format!("retry of {}", first.id),
        message => format!("retry of {}: {message}", first.id),
    };
    whole.chars().take(LONGEST_MESSAGE).collect()
}

#[cfg(test)]
mod tests;
