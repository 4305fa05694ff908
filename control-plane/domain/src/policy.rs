//! The MFA policy: what a phase needs before it may receive credentials.
//!
//! Asked twice. When a run is queued or its plan ends, [`MfaPolicy::requires_code`] decides
//! whether it waits for a code. When a job is about to start, [`judge`] looks at the evidence
//! once more, under the stricter of the policy the run carries and the one in force now, and
//! answers with a [`Permit`] or a [`Denial`] that carries all its enforcement needs.

pub mod plan_rule;

use std::fmt;
use std::time::Duration;

use crate::id::AuthenticationId;
use crate::time::Timestamp;

pub use self::plan_rule::{DestroyedBy, Destroys, Match, PlanFacts, PlanRule};

/// `plan` or `apply` of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Phase {
    Plan,
    Apply,
}

impl Phase {
    pub const ALL: [Phase; 2] = [Phase::Plan, Phase::Apply];

    pub const fn as_str(self) -> &'static str {
        match self {
            Phase::Plan => "plan",
            Phase::Apply => "apply",
        }
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Which phases start only after a token code. Ordered: a later one is stricter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum MfaPolicy {
    #[default]
    Never,
    AppliesOnly,
    PlansAndApplies,
}

impl MfaPolicy {
    pub const ALL: [MfaPolicy; 3] =
        [MfaPolicy::Never, MfaPolicy::AppliesOnly, MfaPolicy::PlansAndApplies];

    pub const fn requires_code(self, phase: Phase) -> bool {
        match (self, phase) {
            (MfaPolicy::Never, Phase::Plan | Phase::Apply)
            | (MfaPolicy::AppliesOnly, Phase::Plan) => false,
            (MfaPolicy::AppliesOnly, Phase::Apply)
            | (MfaPolicy::PlansAndApplies, Phase::Plan | Phase::Apply) => true,
        }
    }
}

/// What an environment demands before a phase may start, at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Demands {
    pub policy: MfaPolicy,
    pub plan_rule: PlanRule,
    /// Who approves must not be who queued.
    pub second_person: bool,
}

impl From<MfaPolicy> for Demands {
    /// Demands what the level does, and nothing more.
    fn from(policy: MfaPolicy) -> Self {
        Self { policy, ..Self::default() }
    }
}

/// A session that waits, sealed, for its phase to start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Evidence {
    pub authentication: AuthenticationId,
    /// The phase the code was submitted for; evidence never serves another.
    pub phase: Phase,
    pub user: String,
    pub authenticated_at: Timestamp,
    pub expires_at: Timestamp,
}

/// The question put at release, the first delivery of credentials for a phase and epoch.
#[derive(Clone, Debug)]
pub struct Release<'a> {
    pub phase: Phase,
    pub carried: MfaPolicy,
    pub current: MfaPolicy,
    /// Why a plan rule demands a code for this phase, the carried or the current one.
    pub matched: Option<Match>,
    pub evidence: Option<&'a Evidence>,
    /// The least life a session must have left, or the phase would outlive it.
    pub floor: Duration,
}

/// What may be released.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Permit {
    /// The session that the code bought.
    MfaSession { authentication: AuthenticationId },
    /// A session without MFA, of the organization's keys.
    PlainSession,
}

/// Why nothing may be released, and so what the run waits for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Denial {
    CodeRequired {
        policy: MfaPolicy,
    },
    RuleMatched(Match),
    /// Who queued approved, or nobody did.
    SecondPersonRequired,
    WrongPhase {
        submitted_for: Phase,
    },
    ExpiresTooSoon {
        expires_at: Timestamp,
        floor: Duration,
    },
}

impl fmt::Display for Denial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Denial::CodeRequired { .. } => {
                f.write_str("the environment's MFA policy now demands a token code for this phase")
            }
            Denial::RuleMatched(matched) => matched.fmt(f),
            Denial::SecondPersonRequired => f.write_str(
                "the environment now demands that somebody else than who queued the run approves",
            ),
            Denial::WrongPhase { submitted_for } => {
                write!(f, "the token code was submitted for the {submitted_for}, not this phase")
            }
            Denial::ExpiresTooSoon { floor, .. } => write!(
                f,
                "the session had less than {} s to live when the job was about to start",
                floor.as_secs()
            ),
        }
    }
}

/// Decides on the release of credentials, under the stricter of the two policies.
pub fn judge(release: Release<'_>, now: Timestamp) -> Result<Permit, Denial> {
    let policy = release.carried.max(release.current);
    let Some(evidence) = release.evidence else {
        return match release.matched {
            _ if policy.requires_code(release.phase) => Err(Denial::CodeRequired { policy }),
            Some(matched) => Err(Denial::RuleMatched(matched)),
            None => Ok(Permit::PlainSession),
        };
    };
    if evidence.phase != release.phase {
        return Err(Denial::WrongPhase { submitted_for: evidence.phase });
    }
    if evidence.expires_at.since(now) < release.floor {
        return Err(Denial::ExpiresTooSoon {
            expires_at: evidence.expires_at,
            floor: release.floor,
        });
    }
    Ok(Permit::MfaSession { authentication: evidence.authentication })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn evidence(phase: Phase) -> Evidence {
        Evidence {
            authentication: AuthenticationId::from_bytes([7; 16]),
            phase,
            user: "ada".into(),
            authenticated_at: Timestamp::from_millis(0),
            expires_at: Timestamp::from_millis(3_600_000),
        }
    }

    #[track_caller]
    fn check(
        (carried, current, phase): (MfaPolicy, MfaPolicy, Phase),
        evidence: Option<&Evidence>,
        now: i64,
        expect: Result<Permit, Denial>,
    ) {
        let floor = Duration::from_secs(300);
        let release = Release { phase, carried, current, matched: None, evidence, floor };
        assert_eq!(judge(release, Timestamp::from_millis(now)), expect);
    }

    #[test]
    fn every_level_and_phase_without_evidence() {
        for carried in MfaPolicy::ALL {
            for current in MfaPolicy::ALL {
                for phase in Phase::ALL {
                    let policy = carried.max(current);
                    let needs = matches!(
                        (policy, phase),
                        (MfaPolicy::AppliesOnly, Phase::Apply) | (MfaPolicy::PlansAndApplies, _)
                    );
                    let expect = if needs {
                        Err(Denial::CodeRequired { policy })
                    } else {
                        Ok(Permit::PlainSession)
                    };
                    check((carried, current, phase), None, 0, expect);
                }
            }
        }
    }

    #[test]
    fn a_matched_rule_demands_evidence_whatever_the_level() {
        let (phase, never) = (Phase::Apply, MfaPolicy::Never);
        let own = evidence(phase);
        for (evidence, expect) in [
            (None, Err(Denial::RuleMatched(Match::ManyTypes))),
            (Some(&own), Ok(Permit::MfaSession { authentication: own.authentication })),
        ] {
            let (carried, current, matched) = (never, never, Some(Match::ManyTypes));
            let floor = Duration::from_secs(300);
            let release = Release { phase, carried, current, matched, evidence, floor };
            assert_eq!(judge(release, Timestamp::from_millis(0)), expect);
        }
    }

    #[test]
    fn evidence_serves_its_own_phase_only_and_only_while_it_lives() {
        use MfaPolicy::{Never, PlansAndApplies};
        let plan = evidence(Phase::Plan);
        let permit = Ok(Permit::MfaSession { authentication: plan.authentication });
        check((PlansAndApplies, PlansAndApplies, Phase::Plan), Some(&plan), 0, permit.clone());
        check((PlansAndApplies, Never, Phase::Plan), Some(&plan), 3_300_000, permit);
        let wrong = Err(Denial::WrongPhase { submitted_for: Phase::Plan });
        check((PlansAndApplies, Never, Phase::Apply), Some(&plan), 0, wrong);
        let late = Err(Denial::ExpiresTooSoon {
            expires_at: plan.expires_at,
            floor: Duration::from_secs(300),
        });
        check((PlansAndApplies, Never, Phase::Plan), Some(&plan), 3_300_001, late);
    }
}
