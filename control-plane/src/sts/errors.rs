//! AWS's answers to our classes, and the sentence a person reads: one table.
//!
//! STS models almost none of its errors: every MFA failure is an `AccessDenied` that only its
//! text tells apart. So a row names the code and a part of the message; texts differ in spaces
//! and clause order between regions and years, so none is compared whole. Sources: captures in
//! public issue trackers and the SDKs' own mocks.
//!
//! No text of AWS is passed on as it is: a `ValidationError` echoes the token code. What of it a
//! person needs is taken out, by class: see [`Told`].

use std::time::Duration;

use latchkey_domain::time::Timestamp;
use latchkey_proto::v1::Reason;

use super::{Refused, Wanted};

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
    /// More than the role's own maximum.
    RoleMaximum,
    /// More than an hour for a role assumed with a role's or a session's credentials.
    ChainLimit,
    NotAuthorized,
    /// The role does not let the caller assume it, or not like this.
    RoleRefused,
    /// Session policies and tags need more space than there is.
    PolicyTooLarge,
    PolicyMalformed,
    SourceIdentitySet,
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
    row("AccessDenied", "is not authorized to perform: sts:AssumeRole", Class::RoleRefused),
    row("AccessDenied", "is not authorized to perform: sts:TagSession", Class::RoleRefused),
    row("AccessDenied", "is not authorized to perform: sts:SetSourceIdentity", Class::RoleRefused),
    row("AccessDenied", "is not authorized to perform", Class::NotAuthorized),
    row("ValidationError", "'tokenCode'", Class::OurBug),
    row("ValidationError", "'serialNumber'", Class::SerialMalformed),
    row("ValidationError", "'durationSeconds'", Class::DurationRefused),
    row("ValidationError", "MaxSessionDuration", Class::RoleMaximum),
    row("ValidationError", "1 hour session limit", Class::ChainLimit),
    row("ValidationError", "DurationSeconds exceeds", Class::DurationRefused),
    row("ValidationError", "source identity is already set", Class::SourceIdentitySet),
    row("PackedPolicyTooLarge", "", Class::PolicyTooLarge),
    row("PackedPolicyTooLargeException", "", Class::PolicyTooLarge),
    row("MalformedPolicyDocument", "", Class::PolicyMalformed),
    row("MalformedPolicyDocumentException", "", Class::PolicyMalformed),
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

/// What of AWS's words may be passed on; nothing for most classes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Told {
    /// Who asked, as AWS sees them: an ARN.
    pub caller: Option<String>,
    /// What they may not do, such as `sts:TagSession`.
    pub action: Option<String>,
    pub percent: Option<u32>,
    /// AWS's own words, without long numbers.
    pub text: Option<String>,
}

impl Told {
    /// Takes out of a message what its class promises to be in it.
    pub fn of(class: Class, message: &str) -> Self {
        match class {
            Class::RoleRefused => Self {
                caller: word_after(message, "User: ").filter(|arn| arn.starts_with("arn:")),
                action: word_after(message, "to perform: "),
                ..Self::default()
            },
            Class::PolicyTooLarge => Self {
                percent: word_after(message, "consumes ")
                    .and_then(|word| word.trim_end_matches('%').parse().ok()),
                ..Self::default()
            },
            Class::PolicyMalformed => Self { text: Some(harmless(message)), ..Self::default() },
            Class::CodeRejected
            | Class::DeviceRejected
            | Class::SerialMalformed
            | Class::KeyRejected
            | Class::SecretRejected
            | Class::ClockSkew
            | Class::SessionExpired
            | Class::RegionDisabled
            | Class::Throttled
            | Class::TemporaryKey
            | Class::DurationRefused
            | Class::RoleMaximum
            | Class::ChainLimit
            | Class::NotAuthorized
            | Class::SourceIdentitySet
            | Class::OurBug
            | Class::Other => Self::default(),
        }
    }
}

/// The word that follows a mark, if it is one of ARNs, actions and percentages.
fn word_after(message: &str, mark: &str) -> Option<String> {
    let (_, rest) = message.split_once(mark)?;
    let word = rest.split_whitespace().next()?;
    let allowed = |b: u8| b.is_ascii_alphanumeric() || b":/_+=,.@%-".contains(&b);
    (word.len() <= 256 && word.bytes().all(allowed)).then(|| word.to_owned())
}

/// Shortens AWS's words and hides numbers that could be a code or an account.
fn harmless(message: &str) -> String {
    let mut shown = String::new();
    let mut digits = String::new();
    let flush = |digits: &mut String, shown: &mut String| {
        if digits.len() >= 6 {
            shown.push('#');
        } else {
            shown.push_str(digits);
        }
        digits.clear();
    };
    for c in message.chars().filter(|c| !c.is_control()).take(256) {
        if c.is_ascii_digit() {
            digits.push(c);
        } else {
            flush(&mut digits, &mut shown);
            shown.push(c);
        }
    }
    flush(&mut digits, &mut shown);
    shown.trim().to_owned()
}

/// What a sentence says beside its class.
#[derive(Clone, Copy, Debug)]
pub struct About<'a> {
    pub wanted: &'a Wanted,
    /// When AWS listens to a device again that it has stopped listening to, which it answers like a
    /// device it does not know.
    pub next_window: Option<Timestamp>,
}

/// The refusal a person reads.
pub fn sentence(refused: &Refused, about: About<'_>) -> (Reason, String) {
    let (told, About { wanted, next_window }) = (&refused.told, about);
    let region = &wanted.region;
    let role = wanted.role.as_ref().map_or("the role", |role| role.arn.as_str());
    match refused.class {
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
        Class::RoleMaximum => (
            Reason::ExchangeRefused,
            format!(
                "The role {role} does not allow sessions of {}. Raise its maximum session duration \
                 (MaxSessionDuration, up to 12 hours), or shorten the environment's session \
                 duration.",
                in_words(wanted.duration)
            ),
        ),
        Class::ChainLimit => (
            Reason::ExchangeRefused,
            format!(
                "AWS limits a role that is assumed with temporary credentials to 1 hour, and {} were \
                 asked for {role}. Use long-term keys (AKIA…), or a session duration of up to 1 hour.",
                in_words(wanted.duration)
            ),
        ),
        Class::RoleRefused => {
            let caller = told.caller.as_deref().unwrap_or("the access key's user");
            let action = told.action.as_deref().unwrap_or("sts:AssumeRole");
            let external = wanted.role.as_ref().and_then(|role| role.external_id.as_deref());
            let external = external.map_or_else(String::new, |external| {
                format!(", and what it demands as sts:ExternalId must be {external}")
            });
            (
                Reason::ExchangeRefused,
                format!(
                    "{caller} may not {action} on {role}. The user needs that permission, and the \
                     role's trust policy must allow the user sts:AssumeRole, sts:TagSession and \
                     sts:SetSourceIdentity{external}; a role that demands MFA is assumed with a \
                     code only."
                ),
            )
        }
        Class::PolicyTooLarge => {
            let percent = told
                .percent
                .map_or_else(|| "more than there is".to_owned(), |percent| format!("{percent} %"));
            (
                Reason::ExchangeRefused,
                format!(
                    "The session policy, the managed policies and the tags for {role} need {percent} \
                     of the space that AWS has for them. Shorten the session policy, or put it into \
                     the role."
                ),
            )
        }
        Class::PolicyMalformed => (
            Reason::ExchangeRefused,
            format!(
                "AWS does not understand the session policy for {role}: {}. Correct it with \
                 `latchkey env set`.",
                told.text.as_deref().unwrap_or("it does not say why").trim_end_matches('.')
            ),
        ),
        Class::SourceIdentitySet => (
            Reason::ExchangeRefused,
            format!(
                "The credentials that were to assume {role} carry another source identity already. \
                 Use the long-term key (AKIA…) of an IAM user."
            ),
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

/// A length of time as people say it.
pub fn in_words(duration: Duration) -> String {
    let seconds = duration.as_secs();
    let (hours, minutes) = (seconds / 3600, seconds / 60 % 60);
    match (hours, minutes, seconds % 60) {
        (0, 0, seconds) => format!("{seconds} s"),
        (0, minutes, 0) => format!("{minutes} min"),
        (0, minutes, seconds) => format!("{minutes} min {seconds} s"),
        (hours, 0, _) => format!("{hours} h"),
        (hours, minutes, _) => format!("{hours} h {minutes} min"),
    }
}

/// `HH:MM:SS UTC`.
pub fn clock_time(time: Timestamp) -> String {
    let seconds = time.as_millis().div_euclid(1000).rem_euclid(86_400);
    format!("{:02}:{:02}:{:02} UTC", seconds / 3600, seconds / 60 % 60, seconds % 60)
}

#[cfg(test)]
mod tests {
    use super::super::RoleWanted;
    use super::*;

    const ROLE: &str = "arn:aws:iam::210987654321:role/deploy";

    fn wanted() -> Wanted {
        let role = RoleWanted {
            arn: ROLE.into(),
            external_id: Some("latchkey-1".into()),
            ..RoleWanted::default()
        };
        let duration = Duration::from_secs(5400);
        Wanted { region: "us-east-1".into(), duration, role: Some(role) }
    }

    fn about(wanted: &Wanted) -> About<'_> {
        About { wanted, next_window: None }
    }

    fn refused(class: Class, message: &str) -> Refused {
        Refused { class, request_id: None, told: Told::of(class, message) }
    }

    #[test]
    fn a_refused_role_is_told_with_both_arns_and_what_is_missing() {
        let message = format!(
            "User: arn:aws:iam::123456789012:user/x is not authorized to perform: sts:TagSession \
             on resource: {ROLE}"
        );
        assert_eq!(classify(403, Some("AccessDenied"), Some(&message)), Some(Class::RoleRefused));
        let (_, text) = sentence(&refused(Class::RoleRefused, &message), about(&wanted()));
        for part in ["arn:aws:iam::123456789012:user/x", ROLE, "sts:TagSession", "latchkey-1"] {
            assert!(text.contains(part), "{part}: {text}");
        }
    }

    #[test]
    fn the_other_rows_about_roles_have_their_own_sentences() {
        for (class, message, part) in [
            (Class::RoleMaximum, "", "MaxSessionDuration"),
            (Class::RoleMaximum, "", "1 h 30 min"),
            (Class::ChainLimit, "", "1 hour"),
            (Class::PolicyTooLarge, "Packed policy consumes 157% of allotted space", "157 %"),
            (Class::PolicyMalformed, "no Version; 123456789012", "no Version; #"),
            (Class::SourceIdentitySet, "", "source identity"),
        ] {
            let (reason, text) = sentence(&refused(class, message), about(&wanted()));
            assert_eq!(reason, Reason::ExchangeRefused);
            assert!(text.contains(part) && text.contains(ROLE), "{class:?}: {text}");
        }
    }

    #[test]
    fn what_is_passed_on_holds_no_code() {
        let told = Told::of(Class::PolicyMalformed, "at 123456 is 12345");
        assert_eq!(told.text.as_deref(), Some("at # is 12345"));
        let odd = Told::of(Class::RoleRefused, "User: arn:\u{1b}[2J is");
        assert_eq!(odd, Told::default());
    }

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
        let (reason, text) =
            sentence(&refused(Class::OurBug, "Value '123456' at 'tokenCode'"), about(&wanted()));
        assert_eq!(reason, Reason::Internal);
        assert!(!text.contains("tokenCode"));
    }

    #[test]
    fn times_are_told_in_utc() {
        assert_eq!(clock_time(Timestamp::from_millis(3_661_000)), "01:01:01 UTC");
    }
}
