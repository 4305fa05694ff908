//! The Query API of STS: a form in, XML out.
//!
//! One function per action beneath; here is what they share: verification, the region switch,
//! MFA, and the shape of the answers.

pub(crate) mod assume_role;
mod constraints;
mod get_caller_identity;
mod get_session_token;

use jiff::{SignedDuration, Timestamp};

use crate::credentials::{self, Caller, CallerKey, Incoming, Principal, Session};
use crate::device::Verdict;
use crate::encoding::{Form, element};
use crate::errors::Refusal;
use crate::ids;
use crate::sigv4;
use crate::state::State;
use crate::world::Secret;

const VERSION: &str = "2011-06-15";

/// What an accepted action answers: the XML inside `<ActionResult>`.
type Answer = Result<String, Refusal>;

/// An answer together with who was found to have asked.
pub(crate) struct Judged {
    pub(crate) caller: Option<String>,
    pub(crate) answer: Answer,
}

/// Reads the members of a request: from the body of a POST, from the query of a GET.
pub(crate) fn form_of(request: &Incoming) -> Form {
    if request.method == axum::http::Method::GET {
        Form::parse(request.uri.query().unwrap_or(""))
    } else {
        Form::parse(&String::from_utf8_lossy(&request.body))
    }
}

/// Judges a request and performs it.
pub(crate) fn judge(
    state: &mut State,
    request: &Incoming,
    form: &Form,
    service: &str,
    now: Timestamp,
) -> Judged {
    let hash = sigv4::sha256_hex(&request.body);
    let verified = credentials::verify(&state.world, &state.sessions, request, service, &hash, now);
    match verified {
        Ok(verified) => {
            let call = CallContext { form, now, caller: &verified.caller };
            Judged {
                caller: Some(verified.caller.arn()),
                answer: perform(state, &call, service, &verified.scope.region),
            }
        }
        Err(refusal) => Judged { caller: None, answer: Err(refusal) },
    }
}

/// A verified call: what an action needs to know of it.
struct CallContext<'a> {
    form: &'a Form,
    now: Timestamp,
    caller: &'a Caller,
}

fn perform(state: &mut State, call: &CallContext<'_>, service: &str, region: &str) -> Answer {
    if service == "iam" {
        return Err(iam(call));
    }
    let disabled = state
        .world
        .account(&call.caller.account)
        .is_some_and(|account| account.disabled_regions.iter().any(|known| known == region));
    if disabled {
        return Err(Refusal::RegionDisabled { account: call.caller.account.clone() });
    }
    let action = call.form.value("Action").unwrap_or("");
    let version = call.form.value("Version").unwrap_or("");
    match action {
        "GetSessionToken" if version == VERSION => get_session_token::perform(state, call),
        "AssumeRole" if version == VERSION => assume_role::perform(state, call),
        "GetCallerIdentity" if version == VERSION => Ok(get_caller_identity::perform(call)),
        _ => Err(Refusal::UnknownAction { action: action.to_owned(), version: version.to_owned() }),
    }
}

/// Answers IAM, of which there is only what a session without MFA meets: it cannot call it.
fn iam(call: &CallContext<'_>) -> Refusal {
    match (&call.caller.principal, call.caller.key) {
        (Principal::User { .. }, CallerKey::Session { mfa: None }) => Refusal::InvalidToken,
        (Principal::User { .. } | Principal::AssumedRole { .. }, _) => Refusal::UnknownAction {
            action: call.form.value("Action").unwrap_or("").to_owned(),
            version: call.form.value("Version").unwrap_or("").to_owned(),
        },
    }
}

/// Shows the code of the request to the device it names; says whether MFA was shown at all.
fn show_mfa(state: &mut State, call: &CallContext<'_>) -> Result<Option<Timestamp>, Refusal> {
    let (serial, code) = match (call.form.value("SerialNumber"), call.form.value("TokenCode")) {
        (None, None) => return Ok(None),
        (Some(_), None) | (None, Some(_)) => return Err(Refusal::HalfMfa),
        (Some(serial), Some(code)) => (serial, code),
    };
    let Principal::User { name } = &call.caller.principal else {
        return Err(Refusal::DeviceRejected);
    };
    let seed = state
        .world
        .account(&call.caller.account)
        .and_then(|account| account.users.iter().find(|user| user.name == *name))
        .and_then(|user| user.devices.iter().find(|device| device.serial == serial))
        .map(crate::world::Device::seed_bytes)
        .ok_or(Refusal::DeviceRejected)?;
    match state.devices.verify(serial, &seed, code, call.now.as_second()) {
        Verdict::Accepted => Ok(Some(call.now)),
        Verdict::Rejected => Err(Refusal::CodeRejected),
        Verdict::Exhausted => Err(Refusal::DeviceRejected),
    }
}

/// Issues a session and writes it as `<Credentials>`.
fn issue(state: &mut State, call: &CallContext<'_>, caller: Caller, seconds: i64) -> String {
    let minimum = call.form.value("MinimumSessionTokenSize").and_then(|size| size.parse().ok());
    let session = Session {
        secret: Secret::new(ids::secret_key()),
        token: Secret::new(ids::session_token(minimum.unwrap_or_default())),
        expires: call.now + SignedDuration::from_secs(seconds),
        caller,
    };
    let (secret, token) = (session.secret.clone(), session.token.clone());
    let expires = session.expires.strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
    let id = state.sessions.issue(session);
    format!(
        "<Credentials>{}{}{}{}</Credentials>",
        element("AccessKeyId", &id),
        element("SecretAccessKey", secret.expose()),
        element("SessionToken", token.expose()),
        element("Expiration", &expires),
    )
}

/// Writes an accepted action's whole body.
pub(crate) fn body(action: &str, result: &str, request_id: &str) -> String {
    format!(
        "<{action}Response xmlns=\"https://sts.amazonaws.com/doc/2011-06-15/\">\n  \
         <{action}Result>{result}</{action}Result>\n  <ResponseMetadata>{}</ResponseMetadata>\n\
         </{action}Response>\n",
        element("RequestId", request_id)
    )
}
