//! `GetSessionToken`: a user's own rights for a time, and the mark that MFA was shown.

use super::constraints::Constraints;
use super::{Answer, CallContext, issue, show_mfa};
use crate::credentials::{Caller, CallerKey};
use crate::errors::Refusal;
use crate::state::State;

const DURATIONS: (i64, i64) = (900, 129_600);
const DEFAULT_DURATION: i64 = 43_200;

pub(super) fn perform(state: &mut State, call: &CallContext<'_>) -> Answer {
    match call.caller.key {
        CallerKey::LongTerm => {}
        CallerKey::Session { .. } => return Err(Refusal::SessionCredentials),
    }
    let mut constraints = Constraints::default();
    constraints.mfa(call.form);
    let seconds = constraints.number(call.form, "DurationSeconds", DURATIONS, DEFAULT_DURATION);
    constraints.finish()?;

    let mfa = show_mfa(state, call)?;
    let caller = Caller { key: CallerKey::Session { mfa }, ..call.caller.clone() };
    Ok(issue(state, call, caller, seconds))
}
