//! Submitted codes, devices and sealed sessions as they are stored. No code is.

use latchkey_domain::device::Device;
use latchkey_domain::id::{AuthenticationId, Digest, RunId};
use latchkey_domain::policy::Phase;
use serde::{Deserialize, Serialize};

use super::run::PhaseRecord;
use super::{Millis, SealedBytes, Text};

/// One submitted code and what became of it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Authentication {
    pub id: Text<AuthenticationId>,
    pub run: Text<RunId>,
    #[serde(with = "PhaseRecord")]
    pub phase: Phase,
    pub user: String,
    /// Serial of the device.
    pub device: String,
    pub access_key_id: String,
    /// The plan that the person was shown, for an apply.
    pub seen: Option<Text<Digest>>,
    pub submitted_at: Millis,
    pub outcome: Outcome,
    #[serde(default)]
    pub purpose: Purpose,
    /// The role that the code assumes; absent for a session.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub role: Option<String>,
    /// How much of the space for policies and tags was used, where AWS says so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub packed_percent: Option<u32>,
}

impl Authentication {
    /// Of what kind the session is that the code buys.
    pub fn kind(&self) -> CredentialsKind {
        match &self.role {
            Some(role) => CredentialsKind::Role(role.clone()),
            None => CredentialsKind::Session,
        }
    }
}

/// What a code was submitted for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Purpose {
    /// To let the phase start.
    #[default]
    Phase,
    /// To let the phase, which runs, run on.
    TopUp,
}

/// Of what kind credentials are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CredentialsKind {
    Session,
    /// Of this role.
    Role(String),
    /// Long-term keys.
    Static,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The call to STS is under way, or this process died with it: then it becomes unknown.
    Spending,
    /// STS issued a session; whose account it is has still to be asked. That may be repeated.
    Verifying {
        session: SealedBytes,
        expires_at: Millis,
        aws_request_id: Option<String>,
    },
    Accepted {
        expires_at: Millis,
        aws_request_id: Option<String>,
        at: Millis,
    },
    Refused {
        reason: String,
        message: String,
        aws_request_id: Option<String>,
        at: Millis,
    },
}

impl Outcome {
    pub fn is_open(&self) -> bool {
        match self {
            Outcome::Spending | Outcome::Verifying { .. } => true,
            Outcome::Accepted { .. } | Outcome::Refused { .. } => false,
        }
    }
}

/// An attempt without an outcome: what a start has to look at.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct OpenAuthentication {
    pub run: Text<RunId>,
}

/// A request id that was used, and the authentication it made.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RequestRecord {
    pub run: Text<RunId>,
    pub authentication: Text<AuthenticationId>,
}

/// The session that waits for a phase.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Session {
    /// Absent for a session without MFA.
    pub authentication: Option<Text<AuthenticationId>>,
    pub credentials: SealedBytes,
    /// Absent for long-term keys.
    pub expires_at: Option<Millis>,
    /// Absent where an earlier release wrote the record.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kind: Option<CredentialsKind>,
    /// As AWS told it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub account: Option<String>,
}

#[derive(Debug, Serialize, Deserialize)]
pub struct DeviceRecord {
    window_start: i64,
    attempts: u32,
    recent: Vec<(Text<Digest>, Millis)>,
}

impl From<&Device> for DeviceRecord {
    fn from(device: &Device) -> Self {
        let recent = device.recent.iter();
        Self {
            window_start: device.window_start,
            attempts: device.attempts,
            recent: recent
                .map(|(digest, at)| (Text(Digest::from_bytes(*digest)), Millis::from(*at)))
                .collect(),
        }
    }
}

impl From<DeviceRecord> for Device {
    fn from(record: DeviceRecord) -> Self {
        let recent = record.recent.into_iter();
        Self {
            window_start: record.window_start,
            attempts: record.attempts,
            recent: recent.map(|(digest, at)| (*digest.0.as_bytes(), at.into())).collect(),
        }
    }
}
