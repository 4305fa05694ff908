//! Users, organizations and tokens as they are stored.

use latchkey_domain::id::{OrganizationId, ServiceTokenId, UserId};
use serde::{Deserialize, Serialize};

use super::{Millis, Text};

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct User {
    pub id: Text<UserId>,
    pub name: String,
    pub created_at: Millis,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Organization {
    pub id: Text<OrganizationId>,
    pub name: String,
    /// Accounts that triples may belong to, twelve digits each.
    pub aws_accounts: Vec<String>,
    pub created_at: Millis,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    Member,
    Owner,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Membership {
    pub role: Role,
}

/// Found by the SHA-256 of a token: whom it speaks for.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Token {
    pub bearer: Bearer,
    /// Absent: until it is revoked.
    pub expires_at: Option<Millis>,
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
}

/// The one-time secret of the first start: its digest, and whether it was spent.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Bootstrap {
    pub secret: Text<latchkey_domain::id::Digest>,
    pub spent_at: Option<Millis>,
}
