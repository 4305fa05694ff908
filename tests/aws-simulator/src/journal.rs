//! What was asked of the simulation: every call, and how often each code was sent.
//!
//! A call is entered as soon as it was read, before faults and before judgement, because "STS saw
//! this code once" is a statement about what left the caller, not about what came of it.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::faults::Service;

/// One request as it was seen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Call {
    pub service: Service,
    pub action: String,
    /// As the request claims it; only an accepted call proves it.
    pub access_key_id: Option<String>,
    /// Whether a token code was sent along. The code itself is not kept here.
    pub had_code: bool,
    /// What an STS call asked, by the names of the Query API, the code left out.
    pub members: BTreeMap<String, String>,
    /// The ARN of the caller, once its signature was verified.
    pub caller: Option<String>,
    pub outcome: Outcome,
    /// Whether an answer was written, rather than the connection reset.
    pub answered: bool,
}

/// What came of a call.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// Not decided: read only, or dropped by a fault.
    Pending,
    Accepted,
    /// Refused with this AWS error code.
    Refused(String),
}

/// The calls so far.
#[derive(Default)]
pub(crate) struct Journal {
    calls: Vec<Call>,
    by_code: BTreeMap<String, usize>,
}

impl Journal {
    /// Enters a call and returns its place.
    pub(crate) fn enter(&mut self, call: Call, code: Option<&str>) -> usize {
        if let Some(code) = code {
            *self.by_code.entry(code.to_owned()).or_default() += 1;
        }
        self.calls.push(call);
        self.calls.len() - 1
    }

    pub(crate) fn call_mut(&mut self, place: usize) -> Option<&mut Call> {
        self.calls.get_mut(place)
    }

    pub(crate) fn calls(&self) -> &[Call] {
        &self.calls
    }

    pub(crate) fn with_code(&self, code: &str) -> usize {
        self.by_code.get(code).copied().unwrap_or_default()
    }

    pub(crate) fn by_code(&self) -> &BTreeMap<String, usize> {
        &self.by_code
    }

    pub(crate) fn by_action(&self) -> BTreeMap<String, usize> {
        let mut counts = BTreeMap::new();
        for call in &self.calls {
            *counts.entry(call.action.clone()).or_default() += 1;
        }
        counts
    }
}
