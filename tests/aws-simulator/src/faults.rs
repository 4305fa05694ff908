//! Scripted faults: what goes wrong with which of the next requests.
//!
//! A queue, first in, first out. A request takes the first fault that fits its action, so one
//! fault strikes one request. Faults strike before the request is processed (a code stays good)
//! or after it (the code is spent, but the answer is lost).

use std::collections::VecDeque;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// One scripted fault.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fault {
    /// Which action it waits for; none means any STS action. S3 operations must be named.
    #[serde(default)]
    pub action: Option<String>,
    #[serde(default)]
    pub stage: Stage,
    /// How long to wait when it strikes, before its effect.
    #[serde(default)]
    pub delay_ms: u64,
    #[serde(default)]
    pub effect: Effect,
}

/// When a fault strikes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// The request was read, nothing was done with it.
    #[default]
    BeforeProcessing,
    /// All was done but to answer.
    AfterProcessing,
}

/// What a fault does, after its delay.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Effect {
    /// Goes on as if nothing had been: a fault that is only slow.
    #[default]
    Proceed,
    /// Answers 503 `ServiceUnavailable`.
    ServiceUnavailable,
    /// Answers 500 `InternalFailure`.
    InternalFailure,
    /// Answers 400 `Throttling`.
    Throttle,
    /// Resets the connection without an answer.
    Reset,
    /// Answers what the script says.
    Refuse { status: u16, code: String, message: String },
}

impl Fault {
    /// Makes a fault that strikes any STS request before it is processed.
    pub fn new(effect: Effect) -> Self {
        Self { action: None, stage: Stage::BeforeProcessing, delay_ms: 0, effect }
    }

    /// Makes a fault that only delays the answer.
    pub fn delay(by: Duration) -> Self {
        Self::new(Effect::Proceed).delayed(by)
    }

    /// Waits for a request with this action.
    #[must_use]
    pub fn on(mut self, action: &str) -> Self {
        self.action = Some(action.to_owned());
        self
    }

    /// Strikes after the request was processed, so that its code is spent.
    #[must_use]
    pub fn after_processing(mut self) -> Self {
        self.stage = Stage::AfterProcessing;
        self
    }

    /// Waits before the effect.
    #[must_use]
    pub fn delayed(mut self, by: Duration) -> Self {
        self.delay_ms = u64::try_from(by.as_millis()).unwrap_or(u64::MAX);
        self
    }

    fn fits(&self, service: Service, action: &str) -> bool {
        match (&self.action, service) {
            (Some(wanted), Service::Sts | Service::S3) => wanted == action,
            (None, Service::Sts) => true,
            (None, Service::S3) => false,
        }
    }
}

/// Which of the two services a request is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Service {
    Sts,
    S3,
}

/// The queue of faults that have not struck yet.
#[derive(Debug, Default)]
pub(crate) struct Script {
    waiting: VecDeque<Fault>,
}

impl Script {
    pub(crate) fn push(&mut self, fault: Fault) {
        self.waiting.push_back(fault);
    }

    pub(crate) fn take(&mut self, service: Service, action: &str) -> Option<Fault> {
        let at = self.waiting.iter().position(|fault| fault.fits(service, action))?;
        self.waiting.remove(at)
    }

    pub(crate) fn clear(&mut self) {
        self.waiting.clear();
    }

    pub(crate) fn waiting(&self) -> Vec<Fault> {
        self.waiting.iter().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_takes_the_first_fault_that_fits() {
        let mut script = Script::default();
        script.push(Fault::new(Effect::Reset).on("AssumeRole"));
        script.push(Fault::new(Effect::Throttle));
        script.push(Fault::new(Effect::InternalFailure));
        let mut next = |action| script.take(Service::Sts, action).map(|fault| fault.effect);
        assert_eq!(next("GetSessionToken"), Some(Effect::Throttle));
        assert_eq!(next("AssumeRole"), Some(Effect::Reset));
        assert_eq!(next("AssumeRole"), Some(Effect::InternalFailure));
        assert_eq!(next("AssumeRole"), None);
    }

    #[test]
    fn only_a_fault_that_names_it_strikes_an_s3_operation() {
        let mut script = Script::default();
        script.push(Fault::new(Effect::Reset));
        assert_eq!(script.take(Service::S3, "PutObject"), None);
        script.push(Fault::new(Effect::Reset).on("PutObject"));
        assert!(script.take(Service::S3, "PutObject").is_some());
    }

    #[test]
    fn a_fault_reads_from_short_json() {
        let fault: Fault = serde_json::from_str(
            r#"{"action": "GetSessionToken", "stage": "after_processing", "effect": "reset"}"#,
        )
        .unwrap();
        assert_eq!(fault, Fault::new(Effect::Reset).on("GetSessionToken").after_processing());
    }
}
