//! The words of the product for what the wire sends as numbers: one for people (`AwaitingApplyMfa`),
//! one for programs (`awaiting_apply_mfa`), and the sentences that explain them. Also the forms of
//! times and durations.

use jiff::{SignedDuration, Timestamp};
use prost_types::Duration as WireDuration;
use prost_types::Timestamp as WireTimestamp;

use latchkey_proto::v1::{
    Access, CheckOutcome, CodeCredentials, DeliveryState, Lock, MfaPolicy, NoticeEvent, Phase,
    PlainCredentials, QuarantinedKind, Role, RunKind, RunState, StateChangeAction, StateOrigin,
    VariableCategory, VariableOrigin,
};

use crate::exit::Exit;

/// The name of a value of one of the wire's enums.
pub(crate) trait Word: Copy {
    const PREFIX: &'static str;

    fn wire_name(self) -> &'static str;

    /// Returns the word for programs: `awaiting_apply_mfa`.
    fn snake(self) -> String {
        self.wire_name().trim_start_matches(Self::PREFIX).to_lowercase()
    }

    /// Returns the word for people, where it is a sentence's part: `applies only`.
    fn spaced(self) -> String {
        self.snake().replace('_', " ")
    }

    /// Returns the word for people, where it is a name: `AwaitingApplyMfa`.
    fn camel(self) -> String {
        let capital = |part: &str| {
            let (first, rest) = part.split_at(part.len().min(1));
            first.to_uppercase() + rest
        };
        self.snake().split('_').map(capital).collect()
    }
}

macro_rules! words {
    ($($name:ident: $prefix:literal),* $(,)?) => {$(
        impl Word for $name {
            const PREFIX: &'static str = $prefix;

            fn wire_name(self) -> &'static str {
                self.as_str_name()
            }
        }
    )*};
}

words! {
    Access: "ACCESS_",
    CheckOutcome: "CHECK_OUTCOME_",
    CodeCredentials: "CODE_CREDENTIALS_",
    DeliveryState: "DELIVERY_STATE_",
    Lock: "LOCK_",
    MfaPolicy: "MFA_POLICY_",
    NoticeEvent: "NOTICE_EVENT_",
    Phase: "PHASE_",
    PlainCredentials: "PLAIN_CREDENTIALS_",
    QuarantinedKind: "QUARANTINED_KIND_",
    Role: "ROLE_",
    RunKind: "RUN_KIND_",
    RunState: "RUN_STATE_",
    StateChangeAction: "STATE_CHANGE_ACTION_",
    StateOrigin: "STATE_ORIGIN_",
    VariableCategory: "VARIABLE_CATEGORY_",
    VariableOrigin: "VARIABLE_ORIGIN_",
}

/// Says what a state means to whoever waits.
pub(crate) fn explain(state: RunState) -> &'static str {
    match state {
        RunState::Unspecified => "in a state that this version of latchkey does not know",
        RunState::AwaitingPlanMfa => "waits for a token code before the plan",
        RunState::Pending => "waits for its turn in the environment",
        RunState::PlanQueued => "waits for a runner to plan",
        RunState::Planning => "terraform plans",
        RunState::AwaitingConfirmation => "the plan waits for a confirmation",
        RunState::AwaitingApplyMfa => "the plan waits for a token code, which also confirms it",
        RunState::ApplyQueued => "waits for a runner to apply",
        RunState::Applying => "terraform applies",
        RunState::Planned => "ended after the plan",
        RunState::Applied => "the plan was applied",
        RunState::Errored => "ended with an error",
        RunState::Canceled => "was canceled",
        RunState::Discarded => "its plan was given up",
        RunState::Lost => "the runner went silent during the apply; a person decides",
    }
}

/// Returns how following a run ends in this state; None while it goes on.
pub(crate) fn end_of(state: RunState) -> Option<Exit> {
    match state {
        RunState::Planned | RunState::Applied => Some(Exit::Ok),
        RunState::Errored => Some(Exit::RunErrored),
        RunState::Canceled | RunState::Discarded => Some(Exit::RunStopped),
        RunState::Lost => Some(Exit::RunLost),
        RunState::Unspecified
        | RunState::AwaitingPlanMfa
        | RunState::Pending
        | RunState::PlanQueued
        | RunState::Planning
        | RunState::AwaitingConfirmation
        | RunState::AwaitingApplyMfa
        | RunState::ApplyQueued
        | RunState::Applying => None,
    }
}

/// Returns the phase whose code a state waits for.
pub(crate) fn awaited_phase(state: RunState) -> Option<Phase> {
    match state {
        RunState::AwaitingPlanMfa => Some(Phase::Plan),
        RunState::AwaitingApplyMfa => Some(Phase::Apply),
        RunState::Unspecified
        | RunState::Pending
        | RunState::PlanQueued
        | RunState::Planning
        | RunState::AwaitingConfirmation
        | RunState::ApplyQueued
        | RunState::Applying
        | RunState::Planned
        | RunState::Applied
        | RunState::Errored
        | RunState::Canceled
        | RunState::Discarded
        | RunState::Lost => None,
    }
}

/// Writes a time as programs read it: RFC 3339, UTC.
pub(crate) fn time(time: Option<&WireTimestamp>) -> Option<String> {
    Some(parse_time(time?)?.to_string())
}

/// Writes a time as people read it; empty when there is none.
pub(crate) fn human_time(time: Option<&WireTimestamp>) -> String {
    time.and_then(parse_time)
        .map(|time| time.strftime("%Y-%m-%d %H:%M:%S UTC").to_string())
        .unwrap_or_default()
}

fn parse_time(time: &WireTimestamp) -> Option<Timestamp> {
    Timestamp::new(time.seconds, time.nanos).ok()
}

/// Writes a duration in the form that flags take: `1h 30m`.
pub(crate) fn human_duration(seconds: i64) -> String {
    let mut text = String::new();
    let mut rest = seconds.max(0);
    for (unit, size) in [("d", 86_400), ("h", 3_600), ("m", 60), ("s", 1)] {
        if rest >= size {
            let space = if text.is_empty() { "" } else { " " };
            text.push_str(&format!("{space}{}{unit}", rest / size));
            rest %= size;
        }
    }
    text
}

/// Reads a duration such as `1h`, `90m` or `1h 30m`.
pub(crate) fn parse_duration(text: &str) -> Result<WireDuration, String> {
    let duration: SignedDuration =
        text.parse().map_err(|_| "not a duration; write it as 1h, 90m or 1h30m".to_owned())?;
    if duration.as_secs() < 1 {
        return Err("must be at least a second".to_owned());
    }
    Ok(WireDuration { seconds: duration.as_secs(), nanos: 0 })
}

/// Reads a moment: a time such as `2026-11-24T12:00:00Z`, or how long ago it was, such as `24h`.
pub(crate) fn parse_moment(text: &str) -> Result<WireTimestamp, String> {
    let ago =
        |ago: WireDuration| Some(crate::clock::now() - SignedDuration::from_secs(ago.seconds));
    let moment = text.parse().ok().or_else(|| parse_duration(text).ok().and_then(ago));
    let moment: Timestamp = moment
        .ok_or("not a time; write it as 2026-11-24T12:00:00Z, or as 24h for that long ago")?;
    Ok(WireTimestamp { seconds: moment.as_second(), nanos: moment.subsec_nanosecond() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_those_of_the_design() {
        assert_eq!(RunState::AwaitingApplyMfa.camel(), "AwaitingApplyMfa");
        assert_eq!(RunState::AwaitingApplyMfa.snake(), "awaiting_apply_mfa");
        assert_eq!(MfaPolicy::PlansAndApplies.spaced(), "plans and applies");
        assert_eq!(RunKind::PlanAndApply.spaced(), "plan and apply");
    }

    #[test]
    fn durations_are_read_as_they_are_written() {
        #[track_caller]
        fn check(text: &str, seconds: i64, written: &str) {
            assert_eq!(parse_duration(text).unwrap().seconds, seconds);
            assert_eq!(human_duration(seconds), written);
        }
        check("1h", 3600, "1h");
        check("90m", 5400, "1h 30m");
        check("1h 30m", 5400, "1h 30m");
        check("36h", 129_600, "1d 12h");
        check("15m", 900, "15m");
        assert!(parse_duration("soon").is_err());
        assert!(parse_duration("-1h").is_err());
    }

    #[test]
    fn times_are_in_utc() {
        let wire = WireTimestamp { seconds: 1_767_225_600, nanos: 0 };
        assert_eq!(time(Some(&wire)).unwrap(), "2026-01-01T00:00:00Z");
        assert_eq!(human_time(Some(&wire)), "2026-01-01 00:00:00 UTC");
        assert_eq!(human_time(None), "");
    }
}
