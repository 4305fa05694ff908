//! Who is told what, and what is on its way to them, as it is stored.

use std::collections::BTreeSet;

use latchkey_domain::id::{DeliveryId, EnvironmentId, RunId, SubscriberId};
use serde::{Deserialize, Serialize};

use super::{Millis, SealedBytes, Text};

/// What there is to tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Event {
    WaitingForCode,
    NeedsConfirmation,
    Applied,
    Errored,
    RunnerLost,
    EnvironmentFrozen,
    BreakGlass,
    Test,
}

impl Event {
    pub const fn as_str(self) -> &'static str {
        match self {
            Event::WaitingForCode => "waiting_for_code",
            Event::NeedsConfirmation => "needs_confirmation",
            Event::Applied => "applied",
            Event::Errored => "errored",
            Event::RunnerLost => "runner_lost",
            Event::EnvironmentFrozen => "environment_frozen",
            Event::BreakGlass => "break_glass",
            Event::Test => "test",
        }
    }
}

/// All that an organization tells others: one record, read wherever a run moves.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Subscriptions {
    pub webhooks: Vec<Webhook>,
    pub recipients: Vec<Recipient>,
}

/// Which notices somebody gets.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Selection {
    pub events: BTreeSet<Event>,
    /// Empty: of all environments.
    #[serde(default)]
    pub environments: BTreeSet<Text<EnvironmentId>>,
}

impl Selection {
    /// What belongs to no environment is told to those who chose some, too; and a broken glass to
    /// all, whatever they chose.
    pub fn wants(&self, event: Event, environment: Option<EnvironmentId>) -> bool {
        let here = environment.is_none_or(|environment| {
            self.environments.is_empty() || self.environments.contains(&Text(environment))
        });
        event == Event::BreakGlass || here && self.events.contains(&event)
    }
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Webhook {
    pub id: Text<SubscriberId>,
    /// Sealed for this webhook: paths of webhooks are often secrets.
    pub url: SealedBytes,
    pub selection: Selection,
    /// Sealed for this webhook.
    pub secret: SealedBytes,
    pub created_by: String,
    pub created_at: Millis,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Recipient {
    pub id: Text<SubscriberId>,
    pub address: String,
    pub selection: Selection,
    pub created_by: String,
    pub created_at: Millis,
}

/// What happened, as it was when it did: all attempts tell the same.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Notice {
    pub event: Event,
    pub at: Millis,
    /// Names.
    pub organization: String,
    #[serde(default)]
    pub environment: Option<String>,
    #[serde(default)]
    pub run: Option<RunFacts>,
    #[serde(default)]
    pub reason: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunFacts {
    pub id: Text<RunId>,
    pub kind: String,
    pub state: String,
    pub message: String,
    pub queued_by: String,
}

/// A notice on its way to somebody, or how that ended.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Delivery {
    pub id: Text<DeliveryId>,
    pub subscriber: Text<SubscriberId>,
    pub notice: Notice,
    pub created_at: Millis,
    pub attempts: u32,
    /// While it is tried, when it may be tried again should nobody have settled this attempt.
    pub next_at: Millis,
    #[serde(default)]
    pub last: Option<Outcome>,
    pub state: DeliveryState,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DeliveryState {
    Pending,
    Delivered,
    GivenUp,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    pub at: Millis,
    #[serde(default)]
    pub status: Option<u16>,
    pub detail: String,
}
