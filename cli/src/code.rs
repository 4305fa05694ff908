//! Submitting a token code: checked here, sent once under one `request_id`, and repeated only
//! under the same one when no answer came.

use secrecy::{ExposeSecret, SecretString};
use uuid::Uuid;

use latchkey_proto::v1;
use latchkey_proto::v1::{Lock, Phase, Reason, RunState};

use crate::client::{Client, Patience};
use crate::failure::{Failure, Refusal};
use crate::words::awaited_phase;

/// What a person is asked for: which phase, and the plan that they saw.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Wanted {
    pub(crate) phase: Phase,
    pub(crate) plan_digest: String,
}

impl Wanted {
    /// Reads from a run which code it waits for.
    pub(crate) fn of(run: &v1::Run) -> Option<Wanted> {
        // The policy may have become stricter since the run began to wait.
        let demanded = matches!(run.lock(), Lock::CodeRequired | Lock::Failed);
        let phase = match run.state() {
            RunState::AwaitingConfirmation if demanded => Phase::Apply,
            state => awaited_phase(state)?,
        };
        let plan_digest = match phase {
            Phase::Apply => digest(run),
            Phase::Plan | Phase::Unspecified => String::new(),
        };
        Some(Wanted { phase, plan_digest })
    }

    /// Returns what is asked for, in words.
    pub(crate) fn prompt(&self) -> &'static str {
        match self.phase {
            Phase::Apply => "Token code for the apply (approves this plan)",
            Phase::Plan | Phase::Unspecified => "Token code for the plan",
        }
    }
}

/// Returns the digest of the plan that a run shows; empty when there is none.
pub(crate) fn digest(run: &v1::Run) -> String {
    run.plan_result.as_ref().map(|plan| plan.digest.clone()).unwrap_or_default()
}

/// Submits a code and returns the run after it.
pub(crate) async fn submit(
    client: &Client,
    run_id: &str,
    wanted: &Wanted,
    code: &SecretString,
    patience: Patience,
) -> Result<v1::Run, Failure> {
    let digits = digits(code)?;
    let request_id = Uuid::new_v4().to_string();
    let answer = client
        .call_with(patience, || {
            let mut runs = client.runs();
            let request = v1::AuthenticateRequest {
                run_id: run_id.to_owned(),
                phase: wanted.phase.into(),
                token_code: digits.to_owned(),
                plan_digest: wanted.plan_digest.clone(),
                request_id: request_id.clone(),
            };
            async move { runs.authenticate(request).await }
        })
        .await?;
    Ok(answer.run.unwrap_or_default())
}

/// Checks what was typed, before it goes anywhere.
pub(crate) fn digits(code: &SecretString) -> Result<&str, Failure> {
    let digits = code.expose_secret().trim();
    if digits.len() != 6 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        // What was typed is not repeated: it may be a password in the wrong window.
        return Err(Refusal::of_field("token_code", "a token code is exactly six digits").into());
    }
    Ok(digits)
}

/// What follows a refused code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// Another code may do.
    AskAgain,
    /// The run is not what it was.
    LookAgain,
    /// No code of this caller will do.
    GiveUp,
}

/// Tells what a refusal leaves to do for whoever follows the run.
pub(crate) fn after(refusal: &Refusal) -> Next {
    let Some(reason) = refusal.reason else { return Next::GiveUp };
    match reason {
        Reason::FieldInvalid
        | Reason::ChangedMeanwhile
        | Reason::LimitReached
        | Reason::TripleIncomplete
        | Reason::SerialUnusable
        | Reason::AccountNotListed
        | Reason::CodeUsed
        | Reason::DeviceBusy
        | Reason::CodeRejected
        | Reason::DeviceRejected
        | Reason::KeyRejected
        | Reason::SecretRejected
        | Reason::ClockSkew
        | Reason::RegionDisabled
        | Reason::Throttled
        | Reason::ExchangeUnknown
        | Reason::AwsUnreachable
        | Reason::ExchangeRefused => Next::AskAgain,
        Reason::NotAwaitingCode | Reason::WrongState | Reason::PlanChanged => Next::LookAgain,
        Reason::Unspecified
        | Reason::IdentityRequired
        | Reason::NotAllowed
        | Reason::NotFound
        | Reason::NameTaken
        | Reason::StoreUnavailable
        | Reason::Internal
        | Reason::MfaRequired
        | Reason::PersonRequired
        | Reason::VariableReserved
        | Reason::ArchiveRefused
        | Reason::PoolTokenRejected
        | Reason::LeaseLost
        | Reason::LogOffset
        | Reason::DigestMismatch
        | Reason::CancelGrace
        | Reason::SecondPersonRequired
        | Reason::HistoryLost
        | Reason::SignInRejected
        | Reason::SignInThrottled
        | Reason::LastOwner
        | Reason::UserShared
        | Reason::MailUnavailable => Next::GiveUp,
    }
}
