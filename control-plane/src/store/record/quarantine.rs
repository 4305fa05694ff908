//! What is kept in quarantine, as it is stored.

use latchkey_domain::id::{Digest, EnvironmentId, OrganizationId, QuarantinedId, RunId, RunnerId};
use latchkey_domain::policy::Phase;
use serde::{Deserialize, Serialize};

use super::run::PhaseRecord;
use super::{Millis, Text};

/// Something a runner brought that is not, or not yet, current.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Quarantined {
    pub id: Text<QuarantinedId>,
    /// Of the runner; and of the run, where that is known here.
    pub organization: Text<OrganizationId>,
    /// Absent when the run is not known here: it was queued after the backup that was restored.
    pub environment: Option<Text<EnvironmentId>>,
    pub run: Text<RunId>,
    #[serde(with = "PhaseRecord")]
    pub phase: Phase,
    pub epoch: u64,
    pub generation: u64,
    pub kind: Kind,
    pub digest: Text<Digest>,
    pub size: u64,
    pub runner: Text<RunnerId>,
    /// What its origin rests on.
    #[serde(default)]
    pub witness: Witness,
    pub at: Millis,
    /// How often something newer of the same lease and kind took its place.
    #[serde(default)]
    pub replaced: u32,
    /// Of a lease's snapshots of its state: which.
    #[serde(default)]
    pub sequence: u64,
    /// What a state says of itself; absent where it cannot be read as one.
    #[serde(default)]
    pub state: Option<StateFacts>,
    /// What a result says, in a sentence.
    #[serde(default)]
    pub outcome: Option<String>,
    /// Set when a person made the state current.
    #[serde(default)]
    pub accepted: Option<Accepted>,
}

/// What says that a lease brought something.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Witness {
    /// The runner was seen to hold the job at that epoch.
    #[default]
    Record,
    /// The word of the runner alone, of a time that a restore forgot.
    Word,
}

impl Witness {
    /// Stands for it in keys.
    pub const fn number(self) -> u8 {
        match self {
            Witness::Record => 0,
            Witness::Word => 1,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    State,
    ErroredState,
    StateDump,
    Workspace,
    Changes,
    Log,
    Result,
}

/// Which state it is, and how far it has come.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StateFacts {
    pub lineage: String,
    pub serial: u64,
}

/// The state version that a quarantined state became.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Accepted {
    pub environment: Text<EnvironmentId>,
    pub number: u64,
    pub state: StateFacts,
}

/// How much is kept of one run, or of one of those who bring it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tally {
    pub entries: u64,
    pub bytes: u64,
}
