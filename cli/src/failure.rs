//! Why a command did not do what it was asked: what the person reads, the hint that follows, and
//! the exit code. The only file that reads a gRPC status.

use std::collections::BTreeMap;
use std::error::Error as _;
use std::io;

use serde::Serialize;
use tonic::{Code, Status};
use tonic_types::StatusExt;

use latchkey_proto::ERROR_DOMAIN;
use latchkey_proto::v1::Reason;

use crate::exit::Exit;
use crate::log_view::clean;
use crate::{archive, config};

#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    #[error("{}", .0.message)]
    Refused(Box<Refusal>),
    #[error("reach the control plane at {address}: {problem}")]
    Unreachable { address: String, problem: String },
    #[error("{message}")]
    Usage { message: String, hint: String },
    #[error("pack the configuration")]
    Archive(#[from] archive::Error),
    #[error("use the credentials file")]
    Config(#[from] config::Error),
    #[error("read what was asked for")]
    Input(#[source] io::Error),
    #[error("write the answer")]
    Output(#[source] io::Error),
    /// Nobody is there to answer: standard input has ended.
    #[error("{wanted} was needed, but standard input has ended")]
    NobodyToAsk { wanted: String, hint: String },
    #[error("interrupted")]
    Interrupted,
}

/// What the control plane said no to, and why.
#[derive(Debug)]
pub(crate) struct Refusal {
    pub(crate) code: Code,
    /// None when the answer carries no reason of ours, or one that this version does not know.
    pub(crate) reason: Option<Reason>,
    /// The name as it was sent; empty when none was.
    pub(crate) reason_name: String,
    pub(crate) message: String,
    /// Name of a field, and what is wrong with it.
    pub(crate) fields: Vec<(String, String)>,
    pub(crate) metadata: BTreeMap<String, String>,
}

impl Refusal {
    /// Refuses a field before it leaves this machine, in the words of the control plane.
    pub(crate) fn of_field(field: &str, message: &str) -> Refusal {
        Refusal {
            code: Code::InvalidArgument,
            reason: Some(Reason::FieldInvalid),
            reason_name: Reason::FieldInvalid.name().to_owned(),
            message: message.to_owned(),
            fields: vec![(field.to_owned(), message.to_owned())],
            metadata: BTreeMap::new(),
        }
    }

    /// Refuses a code before it is asked for: the run waits for none.
    pub(crate) fn not_awaiting_code(state: String) -> Refusal {
        Refusal {
            code: Code::FailedPrecondition,
            reason: Some(Reason::NotAwaitingCode),
            reason_name: Reason::NotAwaitingCode.name().to_owned(),
            message: "the run waits for no code".to_owned(),
            fields: Vec::new(),
            metadata: BTreeMap::from([("state".to_owned(), state)]),
        }
    }
}

impl From<Refusal> for Failure {
    fn from(refusal: Refusal) -> Failure {
        Failure::Refused(Box::new(refusal))
    }
}

impl Failure {
    /// Reads an answer's status. `address` is whom we asked.
    pub(crate) fn of_status(address: &str, status: &Status) -> Failure {
        if is_trouble(status) {
            return Failure::Unreachable { address: address.to_owned(), problem: deepest(status) };
        }
        let info = status.get_details_error_info().filter(|info| info.domain == ERROR_DOMAIN);
        let reason_name = info.as_ref().map(|info| clean(&info.reason)).unwrap_or_default();
        let fields = status
            .get_details_bad_request()
            .map(|bad| bad.field_violations)
            .unwrap_or_default()
            .into_iter()
            .map(|field| (clean(&field.field), clean(&field.description)))
            .collect();
        let message = match clean(status.message()) {
            empty if empty.is_empty() => status.code().description().to_lowercase(),
            message => message,
        };
        Refusal {
            code: status.code(),
            reason: Reason::from_str_name(&format!("REASON_{reason_name}")),
            reason_name,
            message,
            fields,
            metadata: info
                .map(|info| info.metadata)
                .unwrap_or_default()
                .into_iter()
                .map(|(key, value)| (clean(&key), clean(&value)))
                .collect(),
        }
        .into()
    }

    pub(crate) fn exit(&self) -> Exit {
        match self {
            Failure::Refused(refusal) if refusal.code == Code::Unauthenticated => Exit::NotSignedIn,
            Failure::Unreachable { .. } => Exit::Unreachable,
            Failure::Usage { .. } => Exit::Usage,
            Failure::Config(config::Error::SignedOut { .. }) => Exit::NotSignedIn,
            Failure::NobodyToAsk { .. } => Exit::WaitsForPerson,
            Failure::Interrupted => Exit::Detached,
            Failure::Refused(_)
            | Failure::Archive(_)
            | Failure::Config(_)
            | Failure::Input(_)
            | Failure::Output(_) => Exit::Refused,
        }
    }

    /// Whether nothing is to be said: whoever read our output has gone.
    pub(crate) fn is_silent(&self) -> bool {
        matches!(self, Failure::Output(source) if source.kind() == io::ErrorKind::BrokenPipe)
    }

    /// Returns what follows `error: `, with its chain of causes.
    pub(crate) fn headline(&self) -> String {
        let mut text = match self {
            Failure::Refused(_)
            | Failure::Usage { .. }
            | Failure::NobodyToAsk { .. }
            | Failure::Interrupted
            | Failure::Config(config::Error::SignedOut { .. }) => String::new(),
            Failure::Unreachable { .. } => "cannot ".to_owned(),
            Failure::Archive(_) | Failure::Config(_) | Failure::Input(_) | Failure::Output(_) => {
                "failed to ".to_owned()
            }
        };
        if let Failure::Config(signed_out @ config::Error::SignedOut { .. }) = self {
            return clean(&signed_out.to_string());
        }
        text.push_str(&self.to_string());
        let mut source = std::error::Error::source(self);
        while let Some(cause) = source {
            text.push_str(": ");
            text.push_str(&cause.to_string());
            source = cause.source();
        }
        clean(&text)
    }

    /// Returns what the person can do next.
    pub(crate) fn hint(&self) -> Option<String> {
        match self {
            Failure::Refused(refusal) => reason_hint(refusal),
            Failure::Unreachable { problem, .. } if problem.contains("certificate") => Some(
                "sign in again with `latchkey login ADDRESS --ca-file FILE`, FILE being the \
                 control plane's own CA certificate"
                    .to_owned(),
            ),
            Failure::Unreachable { .. } => {
                Some("check the address and that the control plane is up, then repeat".to_owned())
            }
            Failure::Usage { hint, .. } | Failure::NobodyToAsk { hint, .. } => {
                Some(hint.clone()).filter(|hint| !hint.is_empty())
            }
            Failure::Archive(error) => error.hint(),
            Failure::Config(error) => error.hint(),
            Failure::Input(_) | Failure::Output(_) | Failure::Interrupted => None,
        }
    }

    /// Returns the same for programs.
    pub(crate) fn view(&self) -> FailureView {
        let (reason, fields, metadata) = match self {
            Failure::Refused(refusal) => (
                Some(refusal.reason_name.to_lowercase()).filter(|name| !name.is_empty()),
                refusal
                    .fields
                    .iter()
                    .map(|(field, problem)| FieldView {
                        field: field.clone(),
                        problem: problem.clone(),
                    })
                    .collect(),
                refusal.metadata.clone(),
            ),
            Failure::Unreachable { .. }
            | Failure::Usage { .. }
            | Failure::Archive(_)
            | Failure::Config(_)
            | Failure::Input(_)
            | Failure::Output(_)
            | Failure::NobodyToAsk { .. }
            | Failure::Interrupted => (None, Vec::new(), BTreeMap::new()),
        };
        FailureView {
            error: FailureBody {
                exit_code: self.exit().code(),
                message: self.headline(),
                reason,
                fields,
                metadata,
                hint: self.hint(),
            },
        }
    }
}

#[derive(Debug, Serialize)]
pub(crate) struct FailureView {
    error: FailureBody,
}

#[derive(Debug, Serialize)]
struct FailureBody {
    exit_code: u8,
    message: String,
    reason: Option<String>,
    fields: Vec<FieldView>,
    metadata: BTreeMap<String, String>,
    hint: Option<String>,
}

#[derive(Debug, Serialize)]
struct FieldView {
    field: String,
    problem: String,
}

/// Tells a broken connection from an answer: our control plane sends a reason with every refusal.
pub(crate) fn is_trouble(status: &Status) -> bool {
    let broken = matches!(
        status.code(),
        Code::Unavailable
            | Code::Unknown
            | Code::Cancelled
            | Code::Internal
            | Code::DeadlineExceeded
            | Code::OutOfRange
            | Code::Aborted
    );
    broken && status.get_details_error_info().is_none_or(|info| info.domain != ERROR_DOMAIN)
}

/// Whether the same request, with the same `request_id`, is worth sending again.
pub(crate) fn is_worth_repeating(status: &Status) -> bool {
    // A certificate that is not trusted will not be trusted in a moment.
    (is_trouble(status) && !deepest(status).contains("certificate"))
        || status.get_details_error_info().is_some_and(|info| {
            info.domain == ERROR_DOMAIN && info.reason == Reason::StoreUnavailable.name()
        })
}

/// Returns the innermost cause of a broken connection, the one that a person can act on.
fn deepest(status: &Status) -> String {
    let mut text = clean(status.message());
    let mut source = status.source();
    while let Some(cause) = source {
        text = clean(&cause.to_string());
        source = cause.source();
    }
    text
}

fn reason_hint(refusal: &Refusal) -> Option<String> {
    let of = |key: &str| refusal.metadata.get(key).cloned().unwrap_or_default();
    let Some(reason) = refusal.reason else {
        return (refusal.code == Code::Unauthenticated)
            .then(|| "sign in with `latchkey login ADDRESS`".to_owned());
    };
    let text = match reason {
        Reason::IdentityRequired => "sign in with `latchkey login ADDRESS`".to_owned(),
        Reason::NotAllowed => {
            "`latchkey whoami` shows your role; owners alone change policy, people, pools and \
             organization variables"
                .to_owned()
        }
        Reason::NotFound => {
            "check the name, and the organization with `latchkey whoami`; what you may not see is \
             answered the same way"
                .to_owned()
        }
        Reason::NameTaken => "choose another name".to_owned(),
        Reason::ChangedMeanwhile => "look again, then repeat".to_owned(),
        Reason::StoreUnavailable => "repeat in a moment; nothing was changed".to_owned(),
        Reason::Internal => "the log of the control plane has the details".to_owned(),
        Reason::MfaRequired if !refusal.fields.is_empty() => {
            "at a terminal the command asks for a code; else give it on standard input".to_owned()
        }
        Reason::MfaRequired => "submit a code: `latchkey authenticate RUN`".to_owned(),
        Reason::NotAwaitingCode | Reason::WrongState => match of("state") {
            state if state.is_empty() => "`latchkey run show RUN` shows its state".to_owned(),
            state => format!("its state is {state}; `latchkey run show RUN` shows more"),
        },
        Reason::CancelGrace => match of("retry_at") {
            at if at.is_empty() => "ask gracefully first: `latchkey cancel RUN`".to_owned(),
            at => format!("terraform may still end well; from {at} on it can be forced"),
        },
        Reason::HistoryLost => {
            "the control plane runs on an old copy of its data: on its host, bring it back with \
             `latchkey-control-plane restore`"
                .to_owned()
        }
        Reason::SignInRejected => {
            "repeat with the right ones; who has forgotten the password asks an owner for \
             `latchkey user reset NAME`"
                .to_owned()
        }
        Reason::SignInThrottled => match of("retry_at") {
            at if at.is_empty() => "wait a while, then repeat".to_owned(),
            at => format!("wait until {at}, then repeat; open sessions stay good meanwhile"),
        },
        Reason::LastOwner => {
            "make another owner first: `latchkey member set NAME --role owner`".to_owned()
        }
        Reason::PlanChanged => "look at the plan again: `latchkey run show RUN`".to_owned(),
        Reason::SecondPersonRequired => {
            "ask somebody else who may write to the environment; `latchkey run show RUN` says who \
             queued it"
                .to_owned()
        }
        Reason::PersonRequired => "sign in as a person: `latchkey login ADDRESS`".to_owned(),
        Reason::TripleIncomplete => {
            let missing = match of("missing") {
                missing if missing.is_empty() => "NAME".to_owned(),
                missing => missing,
            };
            format!(
                "set {missing} with `latchkey var set NAME --env-var --personal`, or an owner \
                 with --organization-wide"
            )
        }
        Reason::SerialUnusable => {
            "AWS_MFA_SERIAL_NUMBER must be the ARN of a virtual or hardware TOTP device: \
             arn:aws:iam::ACCOUNT:mfa/NAME"
                .to_owned()
        }
        Reason::AccountNotListed => match of("account") {
            account if account.is_empty() => {
                "an owner lists it with `latchkey org set --aws-account ID`".to_owned()
            }
            account => {
                format!("an owner lists it with `latchkey org set --aws-account {account}`")
            }
        },
        Reason::CodeUsed => "wait for the next code of your device".to_owned(),
        Reason::DeviceBusy => match of("retry_at") {
            at if at.is_empty() => "wait some minutes, then use a new code".to_owned(),
            at => format!("wait until {at}, then use a new code"),
        },
        Reason::CodeRejected => {
            "wait for the next code; check that it comes from the device named in \
             AWS_MFA_SERIAL_NUMBER"
                .to_owned()
        }
        Reason::DeviceRejected => {
            "check AWS_MFA_SERIAL_NUMBER: the device must belong to the user of the access key"
                .to_owned()
        }
        Reason::KeyRejected => "check AWS_ACCESS_KEY_ID: is the key active?".to_owned(),
        Reason::SecretRejected => {
            "set AWS_SECRET_ACCESS_KEY again; it does not belong to the access key".to_owned()
        }
        Reason::ClockSkew => "the operator must set the control plane's clock right".to_owned(),
        Reason::RegionDisabled => {
            "choose another region: `latchkey env set ENV --region REGION`".to_owned()
        }
        Reason::Throttled | Reason::ExchangeUnknown => {
            "use a new code; this one may be spent".to_owned()
        }
        Reason::AwsUnreachable => "the code was not used; submit one again in a moment".to_owned(),
        Reason::PoolTokenRejected => "make another token: `latchkey pool token NAME`".to_owned(),
        Reason::ArchiveRefused => {
            "leave the entry out with a line in `.terraformignore`".to_owned()
        }
        Reason::VariableReserved => {
            "choose another name: this one would change which credentials or settings terraform \
             uses"
                .to_owned()
        }
        // The message and the fields say it all.
        Reason::Unspecified
        | Reason::UserShared
        | Reason::FieldInvalid
        | Reason::LimitReached
        | Reason::ExchangeRefused
        | Reason::LeaseLost
        | Reason::LogOffset
        | Reason::DigestMismatch
        | Reason::MailUnavailable => return None,
    };
    Some(text)
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use tonic_types::{ErrorDetails, FieldViolation};

    use super::*;

    fn refused(code: Code, reason: Reason, metadata: &[(&str, &str)]) -> Failure {
        let metadata: HashMap<String, String> =
            metadata.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect();
        let mut details = ErrorDetails::with_error_info(reason.name(), ERROR_DOMAIN, metadata);
        details.set_bad_request(vec![FieldViolation::new("token_code", "six digits")]);
        Failure::of_status("https://x", &Status::with_error_details(code, "no", details))
    }

    #[test]
    fn each_kind_of_failure_has_its_exit_code() {
        #[track_caller]
        fn check(failure: Failure, exit: Exit) {
            assert_eq!(failure.exit(), exit, "{failure:?}");
        }
        check(refused(Code::FailedPrecondition, Reason::CodeRejected, &[]), Exit::Refused);
        check(refused(Code::Unauthenticated, Reason::IdentityRequired, &[]), Exit::NotSignedIn);
        check(refused(Code::Unavailable, Reason::AwsUnreachable, &[]), Exit::Refused);
        check(refused(Code::Internal, Reason::Internal, &[]), Exit::Refused);
        check(Failure::of_status("a", &Status::unavailable("refused")), Exit::Unreachable);
        check(Failure::of_status("a", &Status::unknown("reset")), Exit::Unreachable);
        check(Failure::of_status("a", &Status::not_found("x")), Exit::Refused);
        check(Failure::of_status("a", &Status::unauthenticated("x")), Exit::NotSignedIn);
        check(Failure::Interrupted, Exit::Detached);
        check(
            Failure::NobodyToAsk { wanted: "a code".into(), hint: String::new() },
            Exit::WaitsForPerson,
        );
        check(Failure::Config(config::Error::SignedOut { path: "x".into() }), Exit::NotSignedIn);
        check(Failure::Usage { message: "x".into(), hint: String::new() }, Exit::Usage);
    }

    #[test]
    fn a_refusal_keeps_reason_field_and_time() {
        let failure = refused(
            Code::ResourceExhausted,
            Reason::DeviceBusy,
            &[("retry_at", "2026-01-01T00:03:00Z")],
        );
        assert_eq!(failure.hint().unwrap(), "wait until 2026-01-01T00:03:00Z, then use a new code");
        let json = serde_json::to_value(failure.view()).unwrap();
        assert_eq!(json["error"]["reason"], "device_busy");
        assert_eq!(json["error"]["fields"][0]["field"], "token_code");
        assert_eq!(json["error"]["exit_code"], 1);
    }

    #[test]
    fn a_message_from_afar_cannot_steer_the_terminal() {
        let failure = Failure::of_status("a", &Status::not_found("no \u{1b}]0;x\u{7}run"));
        assert_eq!(failure.headline(), "no run");
    }
}
