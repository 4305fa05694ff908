//! What a check of an environment's AWS set-up found, kept under the request that spent a code.

use latchkey_domain::id::EnvironmentId;
use serde::{Deserialize, Serialize};

use super::Text;

/// A check that spends a code. A repeat is answered from it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct CheckRecord {
    pub environment: Text<EnvironmentId>,
    /// Absent until it has ended, and for good where the process died with it.
    pub steps: Option<Vec<CheckStep>>,
}

/// One thing that was tried.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckStep {
    /// Stable, for programs.
    pub name: String,
    pub outcome: CheckOutcome,
    /// What was found.
    pub sentence: String,
    /// What to do; empty when there is nothing.
    pub remedy: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CheckOutcome {
    Ok,
    Failed,
    /// It could not be tried, or there was nothing to try.
    Skipped,
}

impl CheckOutcome {
    pub const fn as_str(self) -> &'static str {
        match self {
            CheckOutcome::Ok => "ok",
            CheckOutcome::Failed => "failed",
            CheckOutcome::Skipped => "skipped",
        }
    }
}
