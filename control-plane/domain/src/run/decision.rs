//! What somebody decided about a run last, for whoever decides a moment later and is refused.

use super::Run;
use crate::policy::Phase;
use crate::time::Timestamp;

/// A decision that moved a run, or asked it to stop.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    pub what: Decided,
    /// A person's or service token's name; or `system`, with why.
    pub by: String,
    pub at: Timestamp,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decided {
    /// By a code.
    AuthenticatedPlan,
    /// By a code.
    AuthenticatedApply,
    /// By a confirmation.
    ApprovedApply,
    Discarded,
    GaveUp,
    Canceled,
    AskedToStop,
    AskedToKill,
}

impl Decided {
    pub const ALL: [Decided; 8] = [
        Decided::AuthenticatedPlan,
        Decided::AuthenticatedApply,
        Decided::ApprovedApply,
        Decided::Discarded,
        Decided::GaveUp,
        Decided::Canceled,
        Decided::AskedToStop,
        Decided::AskedToKill,
    ];

    /// Names it for programs.
    pub const fn as_str(self) -> &'static str {
        match self {
            Decided::AuthenticatedPlan => "authenticated_plan",
            Decided::AuthenticatedApply => "authenticated_apply",
            Decided::ApprovedApply => "approved_apply",
            Decided::Discarded => "discarded",
            Decided::GaveUp => "gave_up",
            Decided::Canceled => "canceled",
            Decided::AskedToStop => "asked_to_stop",
            Decided::AskedToKill => "asked_to_kill",
        }
    }

    /// Says what was done: the middle of "bob ... at ten".
    pub const fn verb(self) -> &'static str {
        match self {
            Decided::AuthenticatedPlan => "authenticated the plan",
            Decided::AuthenticatedApply => "authenticated and approved the apply",
            Decided::ApprovedApply => "approved the apply",
            Decided::Discarded => "discarded the run",
            Decided::GaveUp => "gave the lost run up",
            Decided::Canceled => "canceled the run",
            Decided::AskedToStop => "asked the run to stop",
            Decided::AskedToKill => "had the run killed",
        }
    }

    pub(super) const fn authenticated(phase: Phase) -> Self {
        match phase {
            Phase::Plan => Decided::AuthenticatedPlan,
            Phase::Apply => Decided::AuthenticatedApply,
        }
    }
}

impl Run {
    pub(super) fn decide(&mut self, what: Decided, by: &str, at: Timestamp) {
        self.decision = Some(Decision { what, by: by.to_owned(), at });
    }
}
