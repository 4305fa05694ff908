//! Pools, their tokens and runners as they are stored.

use std::collections::BTreeMap;

use latchkey_domain::id::{Digest, OrganizationId, PoolId, RunnerId};
use latchkey_domain::policy::Phase;
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
    /// What it said of itself last; written when that changes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub said: Option<Said>,
    /// Set while an owner wants it to take nothing new.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drained_at: Option<Millis>,
    /// Set once an owner has ended its identity, for good.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revoked_at: Option<Millis>,
    /// When two programs last fought over its identity.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fought_at: Option<Millis>,
}

/// A runner's words about itself, bounded and printable.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Said {
    pub slots: u32,
    /// Name and version; `*` is any version.
    pub engines: Vec<(String, String)>,
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// Empty is both.
    #[serde(default)]
    pub accepts: Vec<Accepted>,
    #[serde(default)]
    pub host: Option<Host>,
    #[serde(default)]
    pub version: String,
}

/// A phase that a runner takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Accepted {
    Plan,
    Apply,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Host {
    pub kernel: String,
    pub architecture: String,
    pub cpus: u32,
    pub memory_bytes: u64,
    pub isolation: Vec<String>,
    pub isolation_missing: Vec<String>,
}

impl From<Accepted> for Phase {
    fn from(accepted: Accepted) -> Phase {
        match accepted {
            Accepted::Plan => Phase::Plan,
            Accepted::Apply => Phase::Apply,
        }
    }
}

impl From<Phase> for Accepted {
    fn from(phase: Phase) -> Accepted {
        match phase {
            Phase::Plan => Accepted::Plan,
            Phase::Apply => Accepted::Apply,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_runner_of_before_it_could_be_steered_is_read() {
        let old = r#"{"id":"00000000-0000-0000-0000-000000000001","name":"a",
            "pool":"00000000-0000-0000-0000-000000000002",
            "organization":"00000000-0000-0000-0000-000000000003","key":"KEY","enrolled_at":5}"#;
        let old = old.replace("KEY", &"00".repeat(32));
        let runner: Runner = serde_json::from_str(&old).unwrap();
        assert!(runner.said.is_none() && runner.revoked_at.is_none());
    }
}
