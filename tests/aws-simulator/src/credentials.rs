//! Who sent a request: from its signature to a caller, or to the reason why not.
//!
//! The order of the checks is AWS's: the key must exist before times and signatures matter, and a
//! session that has ended is told so only to who can sign with it.

use std::collections::HashMap;

use aws_lc_rs::hmac;
use axum::http::{HeaderMap, Method, Uri};
use jiff::{Timestamp, civil, tz};
use subtle::ConstantTimeEq;

use crate::errors::{CLOCK_TOLERANCE, Refusal, basic};
use crate::ids;
use crate::sigv4::{self, Authorization, Scope};
use crate::world::{KeyStatus, Secret, World};

/// A request with its body read.
pub(crate) struct Incoming {
    pub(crate) method: Method,
    pub(crate) uri: Uri,
    pub(crate) headers: HeaderMap,
    pub(crate) body: axum::body::Bytes,
}

/// A caller that proved who it is.
#[derive(Debug, Clone)]
pub(crate) struct Caller {
    pub(crate) account: String,
    pub(crate) partition: String,
    pub(crate) principal: Principal,
    pub(crate) key: CallerKey,
}

/// Whom a key or a session stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Principal {
    User { name: String },
    AssumedRole { role: String, session_name: String, source_identity: Option<String> },
}

/// With what the caller signed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum CallerKey {
    LongTerm,
    /// A session, and when MFA was shown for it: the mark that a role's trust may demand.
    Session {
        mfa: Option<Timestamp>,
    },
}

/// A session that was issued.
#[derive(Debug, Clone)]
pub(crate) struct Session {
    pub(crate) secret: Secret,
    pub(crate) token: Secret,
    pub(crate) expires: Timestamp,
    pub(crate) caller: Caller,
}

/// All sessions, by access key id.
#[derive(Debug, Default)]
pub(crate) struct Sessions {
    by_key: HashMap<String, Session>,
}

/// A verified request.
pub(crate) struct Verified {
    pub(crate) caller: Caller,
    pub(crate) scope: Scope,
    /// What verifies the chunks of a signed `aws-chunked` body.
    pub(crate) chain: SignatureChain,
}

/// A signature and what is needed to verify those that build on it.
pub(crate) struct SignatureChain {
    pub(crate) key: hmac::Key,
    pub(crate) time: String,
    pub(crate) scope: Scope,
    pub(crate) signature: String,
}

impl Sessions {
    /// Issues a session and returns its access key id.
    pub(crate) fn issue(&mut self, session: Session) -> String {
        let id = ids::access_key_id(ids::KeyKind::Session, &session.caller.account);
        self.by_key.insert(id.clone(), session);
        id
    }
}

impl Caller {
    /// Names the caller as `GetCallerIdentity` does.
    pub(crate) fn arn(&self) -> String {
        let (partition, account) = (&self.partition, &self.account);
        match &self.principal {
            Principal::User { name } => format!("arn:{partition}:iam::{account}:user/{name}"),
            Principal::AssumedRole { role, session_name, .. } => {
                format!("arn:{partition}:sts::{account}:assumed-role/{role}/{session_name}")
            }
        }
    }

    /// Names what a policy would grant to: the user, or the role behind the session.
    pub(crate) fn principal_arn(&self) -> String {
        match &self.principal {
            Principal::User { .. } => self.arn(),
            Principal::AssumedRole { role, .. } => {
                format!("arn:{}:iam::{}:role/{role}", self.partition, self.account)
            }
        }
    }

    /// Names the caller by its unique id.
    pub(crate) fn unique_id(&self) -> String {
        match &self.principal {
            Principal::User { .. } => ids::unique_id("AIDA", &self.arn()),
            Principal::AssumedRole { session_name, .. } => {
                format!("{}:{session_name}", ids::unique_id("AROA", &self.principal_arn()))
            }
        }
    }
}

/// Reads the access key id that a request claims, without verifying anything.
pub(crate) fn claimed_key(headers: &HeaderMap) -> Option<String> {
    Some(Authorization::parse(header(headers, "authorization")?).ok()?.access_key_id)
}

/// Reads the service that a request was signed for, without verifying anything.
pub(crate) fn claimed_service(headers: &HeaderMap) -> Option<String> {
    Some(Authorization::parse(header(headers, "authorization")?).ok()?.scope.service)
}

/// Verifies a request for `service`, whose body hashes to `payload_hash`.
pub(crate) fn verify(
    world: &World,
    sessions: &Sessions,
    request: &Incoming,
    service: &str,
    payload_hash: &str,
    now: Timestamp,
) -> Result<Verified, Refusal> {
    let header_text = header(&request.headers, "authorization").ok_or(Refusal::Unsigned)?;
    let given = Authorization::parse(header_text).map_err(Refusal::IncompleteSignature)?;
    let time = header(&request.headers, "x-amz-date").ok_or_else(|| {
        Refusal::IncompleteSignature(
            "Authorization header requires existence of either a 'X-Amz-Date' or a 'Date' header."
                .to_owned(),
        )
    })?;
    if !given.signed_headers.iter().any(|name| name == "host") {
        return Err(Refusal::IncompleteSignature(
            "'Host' or ':authority' must be a 'SignedHeader' in the AWS Authorization.".to_owned(),
        ));
    }
    let key = find_key(world, sessions, &given.access_key_id, &request.headers)?;
    check_partition(&key.caller, &given.scope.region)?;
    check_time(time, &given.scope, now)?;
    if given.scope.service != service {
        return Err(Refusal::WrongScope(format!(
            "Credential should be scoped to correct service: '{service}'. "
        )));
    }
    let canonical = sigv4::canonical_request(
        request.method.as_str(),
        request.uri.path(),
        request.uri.query().unwrap_or(""),
        &request.headers,
        &given.signed_headers,
        payload_hash,
    );
    let signing_key = sigv4::signing_key(key.secret.expose(), &given.scope);
    let text = sigv4::string_to_sign(time, &given.scope, &canonical);
    if !sigv4::verify(&signing_key, &text, &given.signature) {
        return Err(Refusal::WrongSecret);
    }
    if key.expires.is_some_and(|expires| expires <= now) {
        return Err(Refusal::ExpiredToken);
    }
    let chain = SignatureChain {
        key: signing_key,
        time: time.to_owned(),
        scope: given.scope.clone(),
        signature: given.signature,
    };
    Ok(Verified { caller: key.caller, scope: given.scope, chain })
}

/// A key that may sign, and for whom.
struct FoundKey {
    secret: Secret,
    expires: Option<Timestamp>,
    caller: Caller,
}

fn find_key(
    world: &World,
    sessions: &Sessions,
    id: &str,
    headers: &HeaderMap,
) -> Result<FoundKey, Refusal> {
    let token = header(headers, "x-amz-security-token");
    if let Some(session) = sessions.by_key.get(id) {
        let given = token.unwrap_or("").as_bytes();
        let same: bool = session.token.expose().as_bytes().ct_eq(given).into();
        return if same {
            Ok(FoundKey {
                secret: session.secret.clone(),
                expires: Some(session.expires),
                caller: session.caller.clone(),
            })
        } else {
            Err(Refusal::InvalidToken)
        };
    }
    let (account, user, key) = world.key(id).ok_or(Refusal::InvalidToken)?;
    match (key.status, token) {
        (KeyStatus::Active, None) => Ok(FoundKey {
            secret: key.secret.clone(),
            expires: None,
            caller: Caller {
                account: account.id.clone(),
                partition: account.partition.clone(),
                principal: Principal::User { name: user.name.clone() },
                key: CallerKey::LongTerm,
            },
        }),
        (KeyStatus::Active, Some(_)) | (KeyStatus::Inactive, _) => Err(Refusal::InvalidToken),
    }
}

/// Refuses a key where it does not exist: partitions share nothing.
fn check_partition(caller: &Caller, region: &str) -> Result<(), Refusal> {
    let partition = match region {
        region if region.starts_with("cn-") => "aws-cn",
        region if region.starts_with("us-gov-") => "aws-us-gov",
        region if region.starts_with("eusc-") => "aws-eusc",
        _ => "aws",
    };
    if caller.partition == partition { Ok(()) } else { Err(Refusal::InvalidToken) }
}

fn check_time(time: &str, scope: &Scope, now: Timestamp) -> Result<(), Refusal> {
    let signed = civil::DateTime::strptime("%Y%m%dT%H%M%SZ", time)
        .ok()
        .and_then(|time| tz::TimeZone::UTC.to_timestamp(time).ok())
        .ok_or_else(|| {
            Refusal::IncompleteSignature(format!(
                "Date must be in ISO-8601 'basic format'. Got '{time}'. See \
                 http://en.wikipedia.org/wiki/ISO_8601"
            ))
        })?;
    if signed < now - CLOCK_TOLERANCE {
        return Err(Refusal::SignedTooEarly { signed, now });
    }
    if signed > now + CLOCK_TOLERANCE {
        return Err(Refusal::SignedTooLate { signed, now });
    }
    let day = &basic(signed)[..8];
    if scope.date != day {
        return Err(Refusal::WrongScope(format!(
            "Date in Credential scope does not match YYYYMMDD from ISO-8601 version of date from \
             HTTP: '{}' != '{day}', from '{time}'.",
            scope.date
        )));
    }
    Ok(())
}

pub(crate) fn header<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}
