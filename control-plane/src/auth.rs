//! Who is calling, and what they may do.
//!
//! A person or program proves itself by an opaque token, of which only the SHA-256 is stored; a
//! runner by its client certificate, of which only the key counts. What a caller may do in an
//! organization is a [`Right`]; every use case names the one it needs before it does anything
//! else. `rules` lists every rpc with who may call it.

pub mod password;
pub mod revocation;
pub mod rules;
pub mod throttle;

use std::collections::BTreeMap;

use aws_lc_rs::digest;
use aws_lc_rs::rand::{SecureRandom, SystemRandom};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use latchkey_domain::id::{
    Digest, EnvironmentId, OrganizationId, PoolId, RunnerId, ServiceTokenId, SignInId, UserId,
};
use latchkey_domain::run::Actor;
use latchkey_domain::time::Timestamp;
use latchkey_proto::v1::Reason;
use secrecy::{ExposeSecret, SecretString};

use crate::error::{Error, Result};
use crate::store::record::Text;
use crate::store::record::people::{Access, Membership, Role, ServiceToken};
use crate::store::{Batch, Expect, Key, Version};

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

/// A caller, and the token that proved it: what an open stream goes on standing on.
#[derive(Clone, Debug)]
pub struct Proof {
    pub caller: Caller,
    pub token: Digest,
    /// The session that the token belongs to, if a password made it.
    pub sign_in: Option<SignInId>,
    pub expires_at: Option<Timestamp>,
}

/// A runner, proved by its certificate's key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunnerIdentity {
    pub id: RunnerId,
    pub name: String,
    pub organization: OrganizationId,
    pub pool: PoolId,
}

/// What a use case demands of its caller: of the organization the first and the last, of one
/// environment the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Right {
    /// Be a member in any way: see the organization and its pools, have personal variables.
    Belong,
    /// See runs, logs, settings, non-sensitive values.
    Read,
    /// Upload, queue, cancel.
    Operate,
    /// Submit codes, confirm, discard: persons only.
    Decide,
    /// Settings but for the owners', variables, locks, states: persons only.
    Administer,
    /// Policy, organization variables, people, pools, accounts: owners in person.
    Own,
}

/// What a caller is in an organization.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Position {
    pub role: Role,
    access: Access,
    environments: BTreeMap<Text<EnvironmentId>, Access>,
}

impl Position {
    /// Tells whether there may be an environment to read.
    pub fn reads(&self) -> bool {
        let all = [self.access].into_iter().chain(self.environments.values().copied());
        self.role == Role::Owner || all.max() > Some(Access::None)
    }

    /// Answers what may be done in an environment.
    pub fn access(&self, environment: EnvironmentId) -> Access {
        match self.role {
            Role::Owner => Access::Admin,
            Role::Member => {
                self.environments.get(&Text(environment)).copied().unwrap_or(self.access)
            }
        }
    }
}

impl From<Membership> for Position {
    fn from(Membership { role, access, environments, .. }: Membership) -> Self {
        Self { role, access, environments }
    }
}

impl From<ServiceToken> for Position {
    fn from(ServiceToken { access, environments, .. }: ServiceToken) -> Self {
        Self { role: Role::Member, access, environments }
    }
}

/// A caller's standing in an organization, after [`Right`] was checked.
#[derive(Clone, Debug)]
pub struct Standing {
    pub caller: Caller,
    pub organization: OrganizationId,
    pub organization_name: String,
    pub position: Position,
    /// The record that says so, as it was when it was checked.
    pub rests_on: (Key, Version),
}

impl Standing {
    /// Makes a batch rest on the very record by which the caller was let.
    pub fn guard(&self, batch: Batch) -> Batch {
        let (key, version) = self.rests_on.clone();
        batch.check(key, Expect::At(version))
    }
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

/// How an organization is answered to who has no part in it.
pub fn hidden() -> Error {
    Error::not_found("organization")
}

/// Decides whether a caller in this position has a right, on an environment where the right is
/// about one. No position is no member.
pub fn check(
    caller: &Caller,
    position: Option<&Position>,
    right: Right,
    environment: Option<EnvironmentId>,
) -> Result<()> {
    let position = position.ok_or_else(hidden)?;
    // First: the answer must be that of what does not exist, whatever is asked.
    if environment.is_some_and(|environment| position.access(environment) == Access::None)
        && right != Right::Belong
    {
        return Err(Error::not_found("environment"));
    }
    let needed = match right {
        Right::Belong => return Ok(()),
        Right::Own => {
            caller.person()?;
            return match position.role {
                Role::Owner => Ok(()),
                Role::Member => Err(Error::refused(
                    Reason::NotAllowed,
                    "only an owner of the organization may do this; ask one",
                )),
            };
        }
        Right::Read => Access::Read,
        Right::Operate | Right::Decide => Access::Write,
        Right::Administer => Access::Admin,
    };
    let access = environment.map_or(Access::None, |environment| position.access(environment));
    if access == Access::None {
        return Err(Error::not_found("environment"));
    }
    if matches!(right, Right::Decide | Right::Administer) {
        caller.person()?;
    }
    if access >= needed {
        return Ok(());
    }
    let message = format!(
        "this takes the access `{needed}` to the environment, and yours is `{access}`; ask an owner"
    );
    Err(Error::refused(Reason::NotAllowed, message))
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

    const HERE: EnvironmentId = EnvironmentId::from_bytes([4; 16]);
    const ELSEWHERE: EnvironmentId = EnvironmentId::from_bytes([5; 16]);

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

    fn position(role: Role, access: Access) -> Position {
        Position { role, access: Access::None, environments: [(Text(HERE), access)].into() }
    }

    /// What each right answers, in the order of their list; `None` is granted.
    #[track_caller]
    fn answers(caller: &Caller, position: &Position, expect: [Option<Reason>; 6]) {
        let rights = [
            Right::Belong,
            Right::Read,
            Right::Operate,
            Right::Decide,
            Right::Administer,
            Right::Own,
        ];
        let answer = |right| check(caller, Some(position), right, Some(HERE)).err();
        assert_eq!(rights.map(|right| answer(right).map(|error| error.reason())), expect);
    }

    const NO: Option<Reason> = Some(Reason::NotAllowed);
    const HIDDEN: Option<Reason> = Some(Reason::NotFound);
    const PERSONS: Option<Reason> = Some(Reason::PersonRequired);

    #[test]
    fn each_access_holds_what_is_before_it() {
        let member = |access| position(Role::Member, access);
        answers(&user(), &member(Access::None), [None, HIDDEN, HIDDEN, HIDDEN, HIDDEN, HIDDEN]);
        answers(&user(), &member(Access::Read), [None, None, NO, NO, NO, NO]);
        answers(&user(), &member(Access::Write), [None, None, None, None, NO, NO]);
        answers(&user(), &member(Access::Admin), [None, None, None, None, None, NO]);
        answers(&user(), &position(Role::Owner, Access::None), [None; 6]);
    }

    #[test]
    fn a_service_token_never_decides() {
        for access in [Access::Write, Access::Admin] {
            let position = position(Role::Member, access);
            answers(&service(), &position, [None, None, None, PERSONS, PERSONS, PERSONS]);
        }
        let reader = position(Role::Member, Access::Read);
        answers(&service(), &reader, [None, None, NO, PERSONS, PERSONS, PERSONS]);
        // Also where its organization's record of it said more.
        answers(
            &service(),
            &position(Role::Owner, Access::Admin),
            [None, None, None, PERSONS, PERSONS, PERSONS],
        );
    }

    #[test]
    fn access_ends_at_its_environment_and_strangers_see_nothing() {
        let position = position(Role::Member, Access::Admin);
        for right in [Right::Read, Right::Operate, Right::Decide, Right::Administer] {
            for elsewhere in [Some(ELSEWHERE), None] {
                let error = check(&user(), Some(&position), right, elsewhere).unwrap_err();
                assert_eq!(error.reason(), Reason::NotFound);
            }
            let error = check(&user(), None, right, Some(HERE)).unwrap_err();
            assert_eq!(error.reason(), Reason::NotFound);
        }
    }

    #[test]
    fn a_token_is_not_shown_by_debug() {
        let token = NewToken::generate("lk_").unwrap();
        assert!(token.secret.expose_secret().starts_with("lk_"));
        assert!(!format!("{token:?}").contains(token.secret.expose_secret()));
    }
}
