//! The port to AWS STS: one token code in, session credentials or a classified refusal out.
//!
//! A code is good for one call. So [`Sts::exchange`] makes exactly one, and its answer says
//! what became of the code: [`Exchange::Unknown`] whenever the request may have been read.

pub mod aws;
pub mod errors;
#[cfg(test)]
mod rows;

use std::time::Duration;

use latchkey_domain::time::Timestamp;
use secrecy::SecretString;

use crate::store::BoxFuture;

pub use self::errors::{Class, Told};

/// Long-term keys and the device they are used with.
#[derive(Clone, Debug)]
pub struct Triple {
    pub access_key_id: String,
    pub secret_access_key: SecretString,
    pub serial: String,
}

impl Triple {
    /// The long-term keys as they are.
    pub fn keys(&self) -> Credentials {
        Credentials {
            access_key_id: self.access_key_id.clone(),
            secret_access_key: self.secret_access_key.clone(),
            session_token: None,
            expires_at: None,
        }
    }
}

/// What signs a request, or what terraform is given.
#[derive(Clone, Debug)]
pub struct Credentials {
    pub access_key_id: String,
    pub secret_access_key: SecretString,
    /// Absent for long-term keys, as is the expiry.
    pub session_token: Option<SecretString>,
    pub expires_at: Option<Timestamp>,
}

/// What STS is asked to issue.
#[derive(Clone, Debug)]
pub struct Wanted {
    pub region: String,
    /// 15 minutes to 36 hours; for a role, to 12 hours.
    pub duration: Duration,
    /// `AssumeRole` into this one; `GetSessionToken` when absent.
    pub role: Option<RoleWanted>,
}

/// A role, and what narrows and marks the session in it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RoleWanted {
    pub arn: String,
    /// 2 to 64 of `[\w+=,.@-]`; visible in the account's CloudTrail.
    pub session_name: String,
    /// As `session_name`; immutable through chains.
    pub source_identity: Option<String>,
    pub tags: Vec<(String, String)>,
    pub external_id: Option<String>,
    pub policy: Option<String>,
    pub policy_arns: Vec<String>,
}

/// The longest session of an assumed role.
pub const LONGEST_ROLE_SESSION: Duration = Duration::from_secs(12 * 3600);

/// Tells whose session it is, in the alphabet of `SourceIdentity` and session names.
pub fn identity_of(name: &str) -> String {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "_+=,.@-".contains(c);
    let name: String = name.chars().map(|c| if allowed(c) { c } else { '-' }).take(64).collect();
    // The least length is two.
    if name.len() < 2 { format!("user-{name}") } else { name }
}

/// What a code becomes.
#[derive(Debug)]
pub enum Exchange {
    Issued {
        credentials: Credentials,
        request_id: Option<String>,
        /// How much of the space for policies and tags was used; told by `AssumeRole` alone.
        packed_percent: Option<u32>,
    },
    /// AWS answered no.
    Refused(Refused),
    /// The request was or may have been sent, and no answer came that tells.
    Unknown { request_id: Option<String> },
    /// The connection was provably never made: the code is still good.
    NotReached,
}

#[derive(Clone, Debug)]
pub struct Refused {
    pub class: Class,
    pub request_id: Option<String>,
    /// What of AWS's words may be passed on.
    pub told: Told,
}

#[derive(Debug)]
pub enum Identity {
    /// The account of the credentials, twelve digits.
    Account(String),
    /// AWS could not be asked; may be tried again.
    Unavailable,
    Refused(Refused),
}

/// A code and the device that shows it.
#[derive(Clone, Copy, Debug)]
pub struct Code<'a> {
    pub serial: &'a str,
    pub digits: &'a SecretString,
}

pub trait Sts: Send + Sync {
    /// Calls `GetSessionToken` or `AssumeRole` once, signed by `signer`; with `code`, MFA is shown.
    fn exchange<'a>(
        &'a self,
        signer: &'a Credentials,
        code: Option<Code<'a>>,
        wanted: &'a Wanted,
    ) -> BoxFuture<'a, Exchange>;

    /// Calls `GetCallerIdentity`. May be repeated.
    fn identify<'a>(&'a self, signer: &'a Credentials, region: &'a str) -> BoxFuture<'a, Identity>;
}

/// Why a serial cannot be used, known without asking AWS.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SerialProblem {
    #[error(
        "it is the ARN of a user; use the ARN of the user's MFA device, which has `:mfa/` in it"
    )]
    UserArn,
    #[error(
        "it is a FIDO security key, which AWS STS does not accept; register a virtual (TOTP) MFA \
         device and use its ARN"
    )]
    Fido,
    #[error(
        "it is neither a device ARN (`arn:aws:iam::ACCOUNT:mfa/NAME`) nor a hardware serial of 9 \
         to 256 letters, digits and `+=/:,.@_-`"
    )]
    Malformed,
}

/// Checks a serial as far as possible without AWS. Limits are those of the STS API.
pub fn check_serial(serial: &str) -> Result<(), SerialProblem> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"+=/:,.@_-".contains(&byte);
    if serial.contains(":u2f/") {
        return Err(SerialProblem::Fido);
    }
    if serial.contains(":user/") {
        return Err(SerialProblem::UserArn);
    }
    let arn = serial.starts_with("arn:");
    if !(9..=256).contains(&serial.len())
        || !serial.bytes().all(allowed)
        || arn != serial.contains(":mfa/")
    {
        return Err(SerialProblem::Malformed);
    }
    Ok(())
}

/// The AWS partition a serial belongs to; a hardware serial tells none.
pub fn partition_of(serial: &str) -> Option<&str> {
    serial.strip_prefix("arn:")?.split(':').next()
}

/// The account in the ARN of a device; a hardware serial has none.
pub fn account_of_serial(serial: &str) -> Option<&str> {
    serial.strip_prefix("arn:")?.split(':').nth(3)
}

/// The account in the ARN of a role.
pub fn account_of_role(arn: &str) -> Option<&str> {
    arn.strip_prefix("arn:")?.split(':').nth(3)
}

/// The partition a region belongs to.
pub fn partition_of_region(region: &str) -> &'static str {
    if region.starts_with("us-gov-") {
        "aws-us-gov"
    } else if region.starts_with("cn-") {
        "aws-cn"
    } else if region.starts_with("eusc-") {
        "aws-eusc"
    } else {
        "aws"
    }
}

/// The account that an access key id encodes: 12 digits.
///
/// Ids made since 2019 hold the account number in base32 behind their four-letter prefix
/// (published by several researchers, documented by AWS only through `GetAccessKeyInfo`).
/// Older ids, whose fifth letter is in the first half of the alphabet, hold none: `None`. So it
/// may serve to refuse early but never to let pass.
pub fn account_of(access_key_id: &str) -> Option<String> {
    const ALPHABET: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567";
    let encoded = access_key_id.get(4..)?.as_bytes();
    if encoded.len() != 16 || !matches!(encoded[0], b'Q'..=b'Z' | b'2'..=b'7') {
        return None;
    }
    let mut number: u64 = 0;
    for byte in &encoded[..10] {
        let digit = ALPHABET.iter().position(|known| known == byte)?;
        number = number << 5 | u64::try_from(digit).ok()?;
    }
    let account = (number >> 2 & 0x7fff_ffff_ff80) >> 7;
    (account < 1_000_000_000_000).then(|| format!("{account:012}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn serials_that_cannot_work_are_told_apart() {
        assert_eq!(check_serial("arn:aws:iam::123456789012:mfa/ada"), Ok(()));
        assert_eq!(check_serial("arn:aws-us-gov:iam::123456789012:mfa/team/ada"), Ok(()));
        assert_eq!(check_serial("GAHT12345678"), Ok(()));
        let user = "arn:aws:iam::123456789012:user/ada";
        assert_eq!(check_serial(user), Err(SerialProblem::UserArn));
        let fido = "arn:aws:iam::123456789012:u2f/user/ada/key-ABC";
        assert_eq!(check_serial(fido), Err(SerialProblem::Fido));
        for bad in ["", "short", "has a space in it", "arn:aws:iam::123456789012:group/ada"] {
            assert_eq!(check_serial(bad), Err(SerialProblem::Malformed), "{bad:?}");
        }
    }

    #[test]
    fn a_name_becomes_an_identity_that_aws_takes() {
        assert_eq!(identity_of("ada"), "ada");
        assert_eq!(identity_of("a"), "user-a");
        assert_eq!(identity_of("aws:ada lovelace"), "aws-ada-lovelace");
        assert_eq!(identity_of("ä"), "user--");
        assert_eq!(identity_of(&"x".repeat(99)).len(), 64);
    }

    #[test]
    fn an_access_key_id_tells_its_account() {
        // The example of the public write-up of the encoding.
        assert_eq!(account_of("ASIAQNZGKIQY56JQ7WML").as_deref(), Some("029608264753"));
        // The documentation's example is of the older kind.
        assert_eq!(account_of("AKIAIOSFODNN7EXAMPLE"), None);
        assert_eq!(account_of("AKIA"), None);
        assert_eq!(account_of("not an access key id"), None);
    }
}
