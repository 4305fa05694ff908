//! AWS's answers to our classes, and the sentence a person reads: one table.
//!
//! STS models almost none of its errors: every MFA failure is an `AccessDenied` that only its
//! text tells apart. So a row names the code and a part of the message; texts differ in spaces
//! and clause order between regions and years, so none is compared whole. Sources: captures in
//! public issue trackers and the SDKs' own mocks.
//!
//! No text of AWS is ever passed on: a `ValidationError` echoes the token code.

use latchkey_domain::time::Timestamp;
use latchkey_proto::v1::Reason;

/// What an answer of AWS means for us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    CodeRejected,
    /// Serial unknown or not this user's, or the device's attempts are spent: the same text.
    DeviceRejected,
    SerialMalformed,
    KeyRejected,
    SecretRejected,
    ClockSkew,
    SessionExpired,
    RegionDisabled,
    Throttled,
    /// The stored key is itself temporary.
    TemporaryKey,
    DurationRefused,
    NotAuthorized,
    /// The request was not as AWS wants it: our bug.
    OurBug,
    /// AWS said no in words this table does not know.
    Other,
}

struct Row {
    code: &'static str,
    /// Part of the message; empty matches any.
    contains: &'static str,
    class: Class,
}

const fn row(code: &'static str, contains: &'static str, class: Class) -> Row {
    Row { code, contains, class }
}

/// First match wins.
const TABLE: &[Row] = &[
    row("AccessDenied", "invalid MFA one time pass code", Class::CodeRejected),
    row("AccessDenied", "unable to validate MFA code", Class::DeviceRejected),
    row("AccessDenied", "must provide both MFA serial number", Class::OurBug),
    row("AccessDenied", "Cannot call GetSessionToken with session", Class::TemporaryKey),
    row("AccessDenied", "is not authorized to perform", Class::NotAuthorized),
    row("ValidationError", "'tokenCode'", Class::OurBug),
    row("ValidationError", "'serialNumber'", Class::SerialMalformed),
    row("ValidationError", "'durationSeconds'", Class::DurationRefused),
    row("ValidationError", "DurationSeconds exceeds", Class::DurationRefused),
    row("InvalidClientTokenId", "", Class::KeyRejected),
    row("SignatureDoesNotMatch", "Signature expired", Class::ClockSkew),
    row("SignatureDoesNotMatch", "Signature not yet current", Class::ClockSkew),
    row("SignatureDoesNotMatch", "", Class::SecretRejected),
    row("ExpiredToken", "", Class::SessionExpired),
    row("ExpiredTokenException", "", Class::SessionExpired),
    row("RegionDisabledException", "", Class::RegionDisabled),
    row("Throttling", "", Class::Throttled),
    row("ThrottlingException", "", Class::Throttled),
    row("MissingAuthenticationToken", "", Class::OurBug),
];

/// Classifies an error answer. `None` for answers that do not tell what happened (5xx).
pub fn classify(status: u16, code: Option<&str>, message: Option<&str>) -> Option<Class> {
    if status >= 500 {
        return None;
    }
    let (code, message) = (code.unwrap_or_default(), message.unwrap_or_default());
    let known = TABLE.iter().find(|row| row.code == code && message.contains(row.contains));
    Some(known.map_or(Class::Other, |row| row.class))
}

/// The refusal a person reads. `next_window` is when AWS listens to a device again that it has
/// stopped listening to, which it answers like a device it does not know.
pub fn sentence(class: Class, next_window: Option<Timestamp>, region: &str) -> (Reason, String) {
    match class {
        Class::CodeRejected => (
            Reason::CodeRejected,
            "AWS did not accept this code. It may be mistyped, too old or already used. Use the \
             next code."
                .into(),
        ),
        Class::DeviceRejected => {
            let mut text = "AWS does not know this MFA device for this user. Check \
                            AWS_MFA_SERIAL_NUMBER against the user's security credentials; a device \
                            just registered takes about 15 s to be known."
                .to_owned();
            if let Some(next_window) = next_window {
                text.push_str(&format!(
                    " If it is right, AWS has stopped listening to the device after too many \
                     attempts: use a new code from {} on.",
                    clock_time(next_window)
                ));
            }
            (Reason::DeviceRejected, text)
        }
        Class::SerialMalformed => (
            Reason::SerialUnusable,
            "AWS calls the device's serial malformed. Check AWS_MFA_SERIAL_NUMBER.".into(),
        ),
        Class::KeyRejected => (
            Reason::KeyRejected,
            "The access key is unknown to AWS, deleted or inactive. Check AWS_ACCESS_KEY_ID."
                .into(),
        ),
        Class::SecretRejected => (
            Reason::SecretRejected,
            "The secret key does not belong to this access key. Set AWS_SECRET_ACCESS_KEY again."
                .into(),
        ),
        Class::ClockSkew => (
            Reason::ClockSkew,
            "AWS and the control plane disagree about the time. The operator must correct the \
             control plane's clock."
                .into(),
        ),
        Class::SessionExpired => (
            Reason::ExchangeRefused,
            "The session has expired. Authenticate again with a new code.".into(),
        ),
        Class::RegionDisabled => (
            Reason::RegionDisabled,
            format!(
                "STS is not activated for this account in {region}. Activate it in the IAM \
                 console under Account settings, or set another region."
            ),
        ),
        Class::Throttled => (
            Reason::Throttled,
            "AWS is throttling requests of this account. Use the next code in a moment.".into(),
        ),
        Class::TemporaryKey => (
            Reason::KeyRejected,
            "The access key is temporary. Set the long-term key (AKIA…) of an IAM user.".into(),
        ),
        Class::DurationRefused => (
            Reason::ExchangeRefused,
            "AWS does not allow sessions of this length. Shorten the environment's session \
             duration; for a root user it is at most 1 hour."
                .into(),
        ),
        Class::NotAuthorized => (
            Reason::ExchangeRefused,
            "The access key's user is not allowed to make this call. Check its IAM policies."
                .into(),
        ),
        Class::OurBug => (
            Reason::Internal,
            "AWS found the request malformed, which is our bug; the control plane's log has its \
             request id."
                .into(),
        ),
        Class::Other => (
            Reason::ExchangeRefused,
            "AWS refused the request for a reason we do not know. Its request id is in the \
             authentication record; use a new code."
                .into(),
        ),
    }
}

/// `HH:MM:SS UTC`.
pub fn clock_time(time: Timestamp) -> String {
    let seconds = time.as_millis().div_euclid(1000).rem_euclid(86_400);
    format!("{:02}:{:02}:{:02} UTC", seconds / 3600, seconds / 60 % 60, seconds % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(code: &str, message: &str, expect: Class) {
        assert_eq!(classify(403, Some(code), Some(message)), Some(expect), "{code}: {message}");
    }

    #[test]
    fn spaces_and_clause_order_do_not_matter() {
        check(
            "AccessDenied",
            "MultiFactorAuthentication failed with invalid MFA one time pass code. ",
            Class::CodeRejected,
        );
        check(
            "AccessDenied",
            "MultiFactorAuthentication failed, unable to validate MFA code.  Please verify your \
             MFA serial number is valid and associated with this user.",
            Class::DeviceRejected,
        );
        check(
            "ValidationError",
            "2 validation errors detected: Value '12345' at 'tokenCode' failed to satisfy \
             constraint: Member must have length greater than or equal to 6; Value",
            Class::OurBug,
        );
        check("SignatureDoesNotMatch", "Signature expired: 2026 is now earlier", Class::ClockSkew);
        check("SignatureDoesNotMatch", "The request signature we", Class::SecretRejected);
        check("SomethingNew", "whatever", Class::Other);
    }

    #[test]
    fn a_server_error_tells_nothing_about_the_code() {
        assert_eq!(classify(503, Some("ServiceUnavailable"), None), None);
        assert_eq!(classify(500, Some("AccessDenied"), None), None);
    }

    #[test]
    fn no_sentence_repeats_what_aws_said() {
        let (reason, text) = sentence(Class::OurBug, None, "us-east-1");
        assert_eq!(reason, Reason::Internal);
        assert!(!text.contains("tokenCode"));
    }

    #[test]
    fn times_are_told_in_utc() {
        assert_eq!(clock_time(Timestamp::from_millis(3_661_000)), "01:01:01 UTC");
    }
}
