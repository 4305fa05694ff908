//! Pools, their tokens and runners as they are stored.

use latchkey_domain::id::{Digest, OrganizationId, PoolId, RunnerId};
use serde::{Deserialize, Serialize};

use super::{Millis, Text};

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Pool {
    pub id: Text<PoolId>,
    pub organization: Text<OrganizationId>,
    pub name: String,
    pub created_at: Millis,
}

/// Found by the SHA-256 of the token's secret part.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PoolToken {
    pub pool: Text<PoolId>,
    pub organization: Text<OrganizationId>,
    pub expires_at: Millis,
    pub uses: u32,
    /// The keys that bought a certificate, so that a repeat is answered and not charged.
    pub bought_by: Vec<Text<Digest>>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Runner {
    pub id: Text<RunnerId>,
    pub name: String,
    pub pool: Text<PoolId>,
    pub organization: Text<OrganizationId>,
    /// SHA-256 of the public key (SPKI): what identifies it.
    pub key: Text<Digest>,
    pub enrolled_at: Millis,
}
