//! Users, organizations and tokens as they are stored.

use std::collections::BTreeMap;
use std::fmt;

use latchkey_domain::id::{
    Digest, EnvironmentId, OrganizationId, ServiceTokenId, SignInId, UserId,
};
use serde::{Deserialize, Serialize};

use super::{Millis, SealedBytes, Text};

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct User {
    pub id: Text<UserId>,
    pub name: String,
    pub created_at: Millis,
    /// The token that an owner has handed over, until the person sets a password.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub handed_over: Option<HandedOver>,
}

/// A token that somebody else has seen: who made the user, or reset them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HandedOver {
    pub token: Text<Digest>,
    pub by: Text<OrganizationId>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Organization {
    pub id: Text<OrganizationId>,
    pub name: String,
    /// Accounts that triples may belong to, twelve digits each.
    pub aws_accounts: Vec<String>,
    /// What its runs give when they assume a role; empty until that is first needed.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub external_id: String,
    /// Set from the first whole triple on, its own or a member's: what weakens takes a code, until
    /// a code or the host has given the last one up. Nobody who merely loses theirs takes the guard away.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub guarded: bool,
    pub created_at: Millis,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    Member,
    Owner,
}

/// What a member may do in an environment; each holds what is before it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Access {
    /// The environment is hidden.
    None,
    Read,
    /// Upload, queue, cancel; for persons also: submit codes, confirm, discard.
    #[default]
    Write,
    /// Settings but for the owners', variables, locks.
    Admin,
}

impl Access {
    pub const fn as_str(self) -> &'static str {
        match self {
            Access::None => "none",
            Access::Read => "read",
            Access::Write => "write",
            Access::Admin => "admin",
        }
    }
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl Role {
    pub const fn as_str(self) -> &'static str {
        match self {
            Role::Member => "member",
            Role::Owner => "owner",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Membership {
    pub role: Role,
    /// In environments that `environments` does not name.
    #[serde(default)]
    pub access: Access,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub environments: BTreeMap<Text<EnvironmentId>, Access>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created_at: Option<Millis>,
}

/// Found by the SHA-256 of a token: whom it speaks for.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Token {
    pub bearer: Bearer,
    /// Absent: until it is revoked.
    pub expires_at: Option<Millis>,
    /// The sign-in with a password that made it; absent in other tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sign_in: Option<Text<SignInId>>,
    /// The hour of a session's last use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub used_at: Option<Millis>,
}

/// A session that a person has open: where to find its token.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SignIn {
    pub token: Text<Digest>,
    /// As the program called itself.
    pub client: String,
    pub created_at: Millis,
    pub expires_at: Millis,
}

/// A person's password: what [`crate::auth::password`] made of it, sealed.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Password {
    pub sealed: SealedBytes,
    pub set_at: Millis,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Bearer {
    User { id: Text<UserId>, name: String },
    Service { id: Text<ServiceTokenId>, organization: Text<OrganizationId>, name: String },
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ServiceToken {
    pub name: String,
    pub created_by: String,
    pub created_at: Millis,
    pub expires_at: Millis,
    /// At most [`Access::Write`], in environments that `environments` does not name.
    #[serde(default)]
    pub access: Access,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub environments: BTreeMap<Text<EnvironmentId>, Access>,
    /// Absent in records of before tokens could be revoked: then it has to be searched.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token: Option<Text<Digest>>,
}

/// The one-time secret of the first start: its digest, and whether it was spent.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Bootstrap {
    pub secret: Text<Digest>,
    pub spent_at: Option<Millis>,
}
