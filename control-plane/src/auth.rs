//! Who is calling, and what they may do.
//!
//! A person or program proves itself by an opaque token, of which only the SHA-256 is stored; a
//! runner by its client certificate, of which only the key counts. What a caller may do in an
//! organization is a [`Right`]; every use case names the one it needs before it does anything
//! else. `rules` lists every rpc with who may call it.

pub mod revocation;
pub mod rules;

use aws_lc_rs::digest;
use aws_lc_rs::rand::{SecureRandom, SystemRandom};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use latchkey_domain::id::{Digest, OrganizationId, PoolId, RunnerId, ServiceTokenId, UserId};
use latchkey_domain::run::Actor;
use latchkey_proto::v1::Reason;
use secrecy::{ExposeSecret, SecretString};

use crate::error::{Error, Result};
use crate::store::record::people::Role;

/// A person or a program, proved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Caller {
    User {
        id: UserId,
        name: String,
    },
    /// A service token serves one organization only.
    Service {
        id: ServiceTokenId,
        organization: OrganizationId,
        name: String,
    },
}

/// A runner, proved by its certificate's key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunnerIdentity {
    pub id: RunnerId,
    pub name: String,
    pub organization: OrganizationId,
    pub pool: PoolId,
}

/// What a use case demands of its caller within an organization.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Right {
    /// See runs, logs, environments, non-sensitive values.
    Read,
    /// Upload, queue, cancel.
    Operate,
    /// Submit codes, confirm, discard, set environment variables: persons only.
    Decide,
    /// Policy, organization variables, people, pools, accounts: owners in person.
    Own,
}

/// A caller's standing in an organization, after [`Right`] was checked.
#[derive(Clone, Debug)]
pub struct Standing {
    pub caller: Caller,
    pub organization: OrganizationId,
    pub organization_name: String,
}

impl Caller {
    pub fn name(&self) -> &str {
        match self {
            Caller::User { name, .. } | Caller::Service { name, .. } => name,
        }
    }

    /// The caller as audit records name it.
    pub fn audit_name(&self) -> String {
        match self {
            Caller::User { name, .. } => format!("user {name}"),
            Caller::Service { name, .. } => format!("service-token {name}"),
        }
    }

    pub fn actor(&self) -> Actor {
        match self {
            Caller::User { id, name } => Actor::User { id: *id, name: name.clone() },
            Caller::Service { name, .. } => Actor::Service { name: name.clone() },
        }
    }

    pub fn person(&self) -> Result<(UserId, &str)> {
        match self {
            Caller::User { id, name } => Ok((*id, name)),
            Caller::Service { .. } => Err(person_required()),
        }
    }
}

impl RunnerIdentity {
    pub fn audit_name(&self) -> String {
        format!("runner {}", self.id)
    }
}

fn person_required() -> Error {
    Error::refused(
        Reason::PersonRequired,
        "a service token may not do this; sign in as a person and do it yourself",
    )
}

/// Decides whether a caller with this role has a right. `None` is no member.
pub fn check(caller: &Caller, role: Option<Role>, right: Right) -> Result<()> {
    let hidden = || Error::not_found("organization, or you are not a member of it");
    match (caller, right) {
        (Caller::Service { .. }, Right::Read | Right::Operate) => role.map(drop).ok_or_else(hidden),
        (Caller::Service { .. }, Right::Decide | Right::Own) => {
            role.ok_or_else(hidden)?;
            Err(person_required())
        }
        (Caller::User { .. }, Right::Read | Right::Operate | Right::Decide) => {
            role.map(drop).ok_or_else(hidden)
        }
        (Caller::User { .. }, Right::Own) => match role.ok_or_else(hidden)? {
            Role::Owner => Ok(()),
            Role::Member => Err(Error::refused(
                Reason::NotAllowed,
                "only an owner of the organization may do this; ask one",
            )),
        },
    }
}

/// A token made now, to be shown once.
#[derive(Debug)]
pub struct NewToken {
    pub secret: SecretString,
    pub digest: Digest,
}

impl NewToken {
    /// Makes 256 random bits behind a prefix that scanners recognise.
    pub fn generate(prefix: &str) -> Result<Self> {
        let mut bytes = [0_u8; 32];
        SystemRandom::new()
            .fill(&mut bytes)
            .map_err(|_| Error::internal("the system has no random bytes"))?;
        Ok(Self::of(prefix, &bytes))
    }

    /// Makes a token of 256 bits that nobody else can know, such as a keyed digest.
    pub fn of(prefix: &str, bytes: &[u8; 32]) -> Self {
        let secret = SecretString::from(format!("{prefix}{}", URL_SAFE_NO_PAD.encode(bytes)));
        let digest = token_digest(&secret);
        Self { secret, digest }
    }
}

/// What is stored of a token. Its 256 random bits need no slow hash.
pub fn token_digest(token: &SecretString) -> Digest {
    sha256(token.expose_secret().as_bytes())
}

pub fn sha256(bytes: &[u8]) -> Digest {
    let digest = digest::digest(&digest::SHA256, bytes);
    Digest::from_bytes(digest.as_ref().try_into().expect("SHA-256 has 32 bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user() -> Caller {
        Caller::User { id: UserId::from_bytes([1; 16]), name: "ada".into() }
    }

    fn service() -> Caller {
        Caller::Service {
            id: ServiceTokenId::from_bytes([2; 16]),
            organization: OrganizationId::from_bytes([3; 16]),
            name: "ci".into(),
        }
    }

    #[track_caller]
    fn refused(caller: &Caller, role: Option<Role>, right: Right, reason: Reason) {
        assert_eq!(check(caller, role, right).unwrap_err().reason(), reason);
    }

    #[test]
    fn a_service_token_never_decides() {
        for role in [Role::Member, Role::Owner] {
            assert!(check(&service(), Some(role), Right::Operate).is_ok());
            refused(&service(), Some(role), Right::Decide, Reason::PersonRequired);
            refused(&service(), Some(role), Right::Own, Reason::PersonRequired);
        }
    }

    #[test]
    fn only_owners_own_and_strangers_see_nothing() {
        assert!(check(&user(), Some(Role::Owner), Right::Own).is_ok());
        refused(&user(), Some(Role::Member), Right::Own, Reason::NotAllowed);
        assert!(check(&user(), Some(Role::Member), Right::Decide).is_ok());
        for right in [Right::Read, Right::Operate, Right::Decide, Right::Own] {
            refused(&user(), None, right, Reason::NotFound);
            refused(&service(), None, right, Reason::NotFound);
        }
    }

    #[test]
    fn a_token_is_not_shown_by_debug() {
        let token = NewToken::generate("lk_").unwrap();
        assert!(token.secret.expose_secret().starts_with("lk_"));
        assert!(!format!("{token:?}").contains(token.secret.expose_secret()));
    }
}
