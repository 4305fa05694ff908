//! AWS's answers when it refuses: one table of code, HTTP status and message.
//!
//! The messages are AWS's own, with their odd spaces: callers match on parts of them, and a
//! message that is nicer than the real one would let a wrong match pass.

use std::borrow::Cow;

use jiff::{SignedDuration, Timestamp};

use crate::encoding::element;
use crate::world::Secret;

/// How far a request's time may be from ours.
pub(crate) const CLOCK_TOLERANCE: SignedDuration = SignedDuration::from_mins(15);

/// A refusal of the Query API.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// The code is wrong, too old, or used.
    CodeRejected,
    /// The serial is not this user's device, or the device's attempts are spent.
    DeviceRejected,
    /// A code without a serial, or a serial without a code.
    HalfMfa,
    /// Members outside their limits. Kept out of `Debug`: AWS echoes the values, codes too.
    Constraints(Vec<Secret>),
    /// More than the role's own maximum.
    RoleMaximum,
    /// More than an hour for a chained role.
    ChainLimit,
    /// `GetSessionToken` with a temporary key.
    SessionCredentials,
    /// The key is unknown, inactive, of another partition, or its token is missing or wrong.
    InvalidToken,
    WrongSecret,
    /// The request's time is too long ago.
    SignedTooEarly {
        signed: Timestamp,
        now: Timestamp,
    },
    /// The request's time is too far ahead.
    SignedTooLate {
        signed: Timestamp,
        now: Timestamp,
    },
    /// The signature is for something else than was asked.
    WrongScope(String),
    ExpiredToken,
    RegionDisabled {
        account: String,
    },
    Throttled,
    NotAuthorized {
        caller: String,
        role: String,
    },
    PackedPolicy {
        percent: usize,
    },
    MalformedPolicy,
    SourceIdentitySet,
    Unsigned,
    IncompleteSignature(String),
    UnknownAction {
        action: String,
        version: String,
    },
    ServiceUnavailable,
    InternalFailure,
    /// What a scripted fault says.
    Scripted {
        status: u16,
        code: String,
        message: String,
    },
}

/// One row of the table.
pub(crate) struct Row {
    pub(crate) status: u16,
    pub(crate) code: Cow<'static, str>,
    pub(crate) message: Cow<'static, str>,
}

impl Refusal {
    /// Looks the refusal up.
    pub(crate) fn row(&self) -> Row {
        match self {
            Self::CodeRejected => row(
                403,
                "AccessDenied",
                "MultiFactorAuthentication failed with invalid MFA one time pass code. ",
            ),
            Self::DeviceRejected => row(
                403,
                "AccessDenied",
                "MultiFactorAuthentication failed, unable to validate MFA code.  Please verify \
                 your MFA serial number is valid and associated with this user.",
            ),
            Self::HalfMfa => row(
                403,
                "AccessDenied",
                "MultiFactorAuthentication failed, must provide both MFA serial number and one \
                 time pass code. ",
            ),
            Self::Constraints(clauses) => row(400, "ValidationError", constraints(clauses)),
            Self::RoleMaximum => row(
                400,
                "ValidationError",
                "The requested DurationSeconds exceeds the MaxSessionDuration set for this role.",
            ),
            Self::ChainLimit => row(
                400,
                "ValidationError",
                "The requested DurationSeconds exceeds the 1 hour session limit for roles assumed \
                 by role chaining.",
            ),
            Self::SessionCredentials => {
                row(403, "AccessDenied", "Cannot call GetSessionToken with session credentials")
            }
            Self::InvalidToken => row(
                403,
                "InvalidClientTokenId",
                "The security token included in the request is invalid.",
            ),
            Self::WrongSecret => row(
                403,
                "SignatureDoesNotMatch",
                "The request signature we calculated does not match the signature you provided. \
                 Check your AWS Secret Access Key and signing method. Consult the service \
                 documentation for details.",
            ),
            Self::SignedTooEarly { signed, now } => row(
                403,
                "SignatureDoesNotMatch",
                format!(
                    "Signature expired: {} is now earlier than {} ({} - 15 min.)",
                    basic(*signed),
                    basic(*now - CLOCK_TOLERANCE),
                    basic(*now)
                ),
            ),
            Self::SignedTooLate { signed, now } => row(
                403,
                "SignatureDoesNotMatch",
                format!(
                    "Signature not yet current: {} is still later than {} ({} + 15 min.)",
                    basic(*signed),
                    basic(*now + CLOCK_TOLERANCE),
                    basic(*now)
                ),
            ),
            Self::WrongScope(message) => row(403, "SignatureDoesNotMatch", message.clone()),
            Self::ExpiredToken => {
                row(403, "ExpiredToken", "The security token included in the request is expired")
            }
            Self::RegionDisabled { account } => row(
                403,
                "RegionDisabledException",
                format!(
                    "STS is not activated in this region for account:{account}. Your account \
                     administrator can activate STS in this region using the IAM Console."
                ),
            ),
            Self::Throttled => row(400, "Throttling", "Rate exceeded"),
            Self::NotAuthorized { caller, role } => row(
                403,
                "AccessDenied",
                format!(
                    "User: {caller} is not authorized to perform: sts:AssumeRole on resource: \
                     {role}"
                ),
            ),
            Self::PackedPolicy { percent } => row(
                400,
                "PackedPolicyTooLarge",
                format!(
                    "Packed policy consumes {percent}% of allotted space, please use smaller \
                     policy."
                ),
            ),
            Self::MalformedPolicy => {
                row(400, "MalformedPolicyDocument", "This policy contains invalid Json")
            }
            Self::SourceIdentitySet => row(
                400,
                "ValidationError",
                "The source identity is already set for this assume role session",
            ),
            Self::Unsigned => {
                row(403, "MissingAuthenticationToken", "Request is missing Authentication Token")
            }
            Self::IncompleteSignature(message) => row(403, "IncompleteSignature", message.clone()),
            Self::UnknownAction { action, version } => row(
                400,
                "InvalidAction",
                format!("Could not find operation {action} for version {version}"),
            ),
            Self::ServiceUnavailable => {
                row(503, "ServiceUnavailable", "Service is unable to handle request.")
            }
            Self::InternalFailure => {
                row(500, "InternalFailure", "We encountered an internal error. Please try again.")
            }
            Self::Scripted { status, code, message } => row(*status, code.clone(), message.clone()),
        }
    }
}

impl Row {
    /// Writes the answer's body as STS does.
    pub(crate) fn sts_body(&self, request_id: &str) -> String {
        let kind = if self.status < 500 { "Sender" } else { "Receiver" };
        format!(
            "<ErrorResponse xmlns=\"https://sts.amazonaws.com/doc/2011-06-15/\">\n  <Error>\n    \
             {}\n    {}\n    {}\n  </Error>\n  {}\n</ErrorResponse>\n",
            element("Type", kind),
            element("Code", &self.code),
            element("Message", &self.message),
            element("RequestId", request_id),
        )
    }
}

/// Writes a time as signatures carry it.
pub(crate) fn basic(time: Timestamp) -> String {
    time.strftime("%Y%m%dT%H%M%SZ").to_string()
}

fn row(
    status: u16,
    code: impl Into<Cow<'static, str>>,
    message: impl Into<Cow<'static, str>>,
) -> Row {
    Row { status, code: code.into(), message: message.into() }
}

fn constraints(clauses: &[Secret]) -> String {
    let noun = if clauses.len() == 1 { "error" } else { "errors" };
    let clauses: Vec<&str> = clauses.iter().map(Secret::expose).collect();
    format!("{} validation {noun} detected: {}", clauses.len(), clauses.join("; "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    #[test]
    fn clock_messages_are_those_seen_from_aws() {
        let now = at("2020-03-17T22:40:41Z");
        let row = Refusal::SignedTooEarly { signed: at("2020-03-17T00:00:00Z"), now }.row();
        assert_eq!(
            row.message,
            "Signature expired: 20200317T000000Z is now earlier than 20200317T222541Z \
             (20200317T224041Z - 15 min.)"
        );
        let now = at("2021-05-02T17:36:40Z");
        let row = Refusal::SignedTooLate { signed: at("2021-05-02T18:36:40Z"), now }.row();
        assert_eq!(
            row.message,
            "Signature not yet current: 20210502T183640Z is still later than 20210502T175140Z \
             (20210502T173640Z + 15 min.)"
        );
    }

    #[test]
    fn odd_spaces_are_kept() {
        assert!(Refusal::CodeRejected.row().message.ends_with("code. "));
        assert!(Refusal::DeviceRejected.row().message.contains("code.  Please"));
    }

    #[test]
    fn a_body_escapes_what_the_caller_sent() {
        let row = Refusal::UnknownAction { action: "<b>".to_owned(), version: "&".to_owned() };
        let body = row.row().sts_body("id-1");
        assert!(body.contains("operation &lt;b&gt; for version &amp;"), "{body}");
        assert!(body.contains("<RequestId>id-1</RequestId>"));
    }
}
