//! What a use case answers when it refuses or fails.
//!
//! The public half is for the caller: a reason from `error.proto`, a sentence with its remedy,
//! the field it is about. The internal half, the cause, has no way out but [`Error::cause`],
//! which the one place that logs uses.

use std::error::Error as StdError;
use std::fmt;

use latchkey_domain::run::Refusal;
use latchkey_domain::time::Timestamp;
use latchkey_proto::v1::Reason;

use crate::store::{CommitError, StoreError};

pub type Result<T, E = Error> = std::result::Result<T, E>;

#[derive(Debug)]
pub struct Error {
    reason: Reason,
    message: String,
    field: Option<&'static str>,
    metadata: Vec<(&'static str, String)>,
    cause: Option<Box<dyn StdError + Send + Sync>>,
}

impl Error {
    /// Refuses with a sentence that says what is wrong and what to do.
    pub fn refused(reason: Reason, message: impl Into<String>) -> Self {
        Self { reason, message: message.into(), field: None, metadata: vec![], cause: None }
    }

    /// Refuses a malformed field.
    pub fn field(field: &'static str, message: impl Into<String>) -> Self {
        Self { field: Some(field), ..Self::refused(Reason::FieldInvalid, message) }
    }

    pub fn not_found(what: &str) -> Self {
        let message = format!("no such {what}, or none that you may see; check its name or id");
        Self::refused(Reason::NotFound, message)
    }

    /// Fails for a reason that is no caller's business.
    pub fn internal(cause: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        let message = "an internal error; the control plane's log has the details";
        Self { cause: Some(cause.into()), ..Self::refused(Reason::Internal, message) }
    }

    /// Says another sentence to the caller.
    pub fn saying(self, message: impl Into<String>) -> Self {
        Self { message: message.into(), ..self }
    }

    pub fn with(mut self, key: &'static str, value: impl Into<String>) -> Self {
        self.metadata.push((key, value.into()));
        self
    }

    pub fn about(mut self, field: &'static str) -> Self {
        self.field = Some(field);
        self
    }

    pub fn reason(&self) -> Reason {
        self.reason
    }

    pub fn message(&self) -> &str {
        &self.message
    }

    pub fn field_name(&self) -> Option<&'static str> {
        self.field
    }

    pub fn metadata(&self) -> &[(&'static str, String)] {
        &self.metadata
    }

    /// Logs what must not be told. For the one place that answers the caller.
    pub(crate) fn log(&self) {
        let Some(cause) = self.cause() else { return };
        let mut chain = cause.to_string();
        let mut link = cause.source();
        while let Some(source) = link {
            chain.push_str(": ");
            chain.push_str(&source.to_string());
            link = source.source();
        }
        tracing::error!(reason = self.reason().name(), cause = %chain, "a request failed");
    }

    pub fn cause(&self) -> Option<&(dyn StdError + Send + Sync + 'static)> {
        self.cause.as_deref()
    }
}

/// The public message only.
impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl StdError for Error {}

impl From<StoreError> for Error {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Failed { .. } | StoreError::Unreadable { .. } => {}
            error @ (StoreError::Damaged { .. } | StoreError::Invalid { .. }) => {
                return Self::internal(error);
            }
        }
        let message = "the store cannot be reached; repeat with the same request_id";
        Self { cause: Some(Box::new(error)), ..Self::refused(Reason::StoreUnavailable, message) }
    }
}

impl From<CommitError> for Error {
    fn from(error: CommitError) -> Self {
        match error {
            CommitError::Conflict { .. } => Self::refused(
                Reason::ChangedMeanwhile,
                "somebody else changed it meanwhile; look again, then repeat",
            ),
            CommitError::Store(error) => error.into(),
        }
    }
}

/// The sentence for each refusal of the state machine, where the use case has no better one.
impl From<Refusal> for Error {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::WrongState => {
                Self::refused(Reason::WrongState, "the run is in no state for this")
            }
            Refusal::AlreadyEnded => Self::refused(Reason::WrongState, "the run has ended already"),
            Refusal::NotAwaitingCode => {
                Self::refused(Reason::NotAwaitingCode, "the run waits for no token code")
            }
            Refusal::OtherPhase => Self::refused(
                Reason::NotAwaitingCode,
                "the run waits for a token code for its other phase",
            ),
            Refusal::MfaRequired => Self::refused(
                Reason::MfaRequired,
                "this run needs a token code: submit one, it is also the confirmation",
            ),
            Refusal::SecondPersonRequired => Self::refused(
                Reason::SecondPersonRequired,
                "who queued a run does not approve its apply in this environment; ask somebody \
                 else to",
            ),
            Refusal::PlanChanged => Self::refused(
                Reason::PlanChanged,
                "what would be applied is not what you were shown; look at the plan again",
            ),
            Refusal::NotCanceled => Self::refused(
                Reason::CancelGrace,
                "nothing is killed before it was asked to stop: cancel the run without force first",
            ),
            Refusal::CancelGrace { until } => {
                let message = "terraform was asked to stop and has some time to write its state";
                Self::refused(Reason::CancelGrace, message).with("retry_at", rfc3339(until))
            }
            Refusal::Forced => {
                Self::refused(Reason::WrongState, "a person had it killed; nothing starts any more")
            }
            Refusal::ExpiresSooner => Self::refused(
                Reason::WrongState,
                "the session in use lives longer than the one that this code bought; it is kept",
            ),
            Refusal::LeaseLost => {
                Self::refused(Reason::LeaseLost, "the lease is not the current one")
            }
        }
    }
}

/// A time as metadata carry it.
pub fn rfc3339(time: Timestamp) -> String {
    jiff::Timestamp::from_millisecond(time.as_millis())
        .map(|time| time.to_string())
        .unwrap_or_default()
}
