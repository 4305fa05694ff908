//! What becomes of a code that was given for a change, kept under the caller's request id.

use latchkey_domain::id::{AuthenticationId, Digest, OrganizationId, UserId};
use latchkey_proto::v1::Reason;
use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Serialize};

use super::{GivenCode, GuardedChange, Intent};
use crate::app::App;
use crate::app::authenticate_run::unknown_sentence;
use crate::error::{Error, Result};
use crate::store::record::{Loaded, Millis, Text, decode, encode};
use crate::store::{Batch, Expect, Key, keys};

/// A code spent for a change, and what became of it.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct ChangeRecord {
    pub(super) id: Text<AuthenticationId>,
    pub(super) organization: Text<OrganizationId>,
    pub(super) user: String,
    pub(super) device: String,
    pub(super) access_key_id: String,
    /// A keyed digest of what was asked for: a request id stands for one change.
    pub(super) asked: Text<Digest>,
    pub(super) subject: String,
    pub(super) submitted_at: Millis,
    pub(super) outcome: ChangeOutcome,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum ChangeOutcome {
    Spending,
    Made { aws_request_id: Option<String>, at: Millis },
    Refused { reason: String, message: String, aws_request_id: Option<String>, at: Millis },
}

/// What a start looks at: the request whose attempt may be open.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct OpenChange {
    pub(super) user: Text<UserId>,
    pub(super) request: String,
}

pub(super) type Refusal = (Reason, String, Option<String>);

impl App {
    pub(super) async fn refuse_change(
        &self,
        request: Key,
        record: ChangeRecord,
        (reason, message, aws_request_id): Refusal,
        actor: &str,
    ) -> Result<()> {
        let outcome = ChangeOutcome::Refused {
            reason: reason.name().to_owned(),
            message,
            aws_request_id,
            at: self.now().into(),
        };
        let mut draft = self
            .draft(record.organization.0, actor, "refuse_code", &record.subject)
            .with("authentication", record.id.0.to_string())
            .with("device", record.device.as_str())
            .with("refusal", reason.name());
        if let ChangeOutcome::Refused { aws_request_id: Some(id), .. } = &outcome {
            draft = draft.with("aws_request_id", id.as_str());
        }
        let closed = ChangeRecord { outcome: outcome.clone(), ..record.again() };
        let batch = Batch::new()
            .put(request, Expect::Anything, encode(&closed))
            .delete(keys::change_open(record.id.0), Expect::Anything)
            .audit(draft);
        self.store.commit(batch).await?;
        answer(outcome)
    }

    pub(super) async fn recorded_by(&self, request: Key, intent: &Intent) -> Result<()> {
        let known = self.fetch::<ChangeRecord>(request.clone()).await?;
        let known = known.ok_or_else(|| Error::internal("a recorded request vanished"))?;
        self.recorded_change(request, known.value, intent).await
    }

    /// Answers what is recorded of a request, once it is.
    pub(super) async fn recorded_change(
        &self,
        request: Key,
        known: ChangeRecord,
        intent: &Intent,
    ) -> Result<()> {
        if known.asked.0 != self.asked(intent) {
            let message = "it was used for another change; give a new one";
            return Err(Error::field("request_id", message));
        }
        let mut feed = self.store.watch(keys::exactly(&request));
        loop {
            let found: Option<Loaded<ChangeRecord>> = self.fetch(request.clone()).await?;
            let found = found.ok_or_else(|| Error::internal("a recorded request vanished"))?;
            if found.value.outcome != ChangeOutcome::Spending {
                return answer(found.value.outcome);
            }
            feed.next().await;
        }
    }

    /// At a start: no change of an attempt that was cut off is made.
    pub async fn settle_changes(&self) -> Result<()> {
        for (key, found) in self.list(keys::all(keys::Kind::ChangeOpen)).await? {
            let open: OpenChange = decode(&key, &found)?;
            let request = keys::request(open.user.0, &open.request);
            let Some(record) = self.fetch::<ChangeRecord>(request.clone()).await? else {
                continue;
            };
            let refusal = (Reason::ExchangeUnknown, unknown_sentence(), None);
            match self.refuse_change(request, record.value, refusal, "system").await {
                Err(error) if error.reason() == Reason::ExchangeUnknown => {}
                other => other?,
            }
        }
        self.note_guards().await
    }

    /// A digest of what is asked for. Keyed: a value may be short.
    pub(super) fn asked(&self, intent: &Intent) -> Digest {
        let Intent { organization, change, .. } = intent;
        let value = match change {
            GuardedChange::SetVariable { variable, .. } => variable.value.expose_secret(),
            GuardedChange::Settings { .. }
            | GuardedChange::Create { .. }
            | GuardedChange::Accounts(_)
            | GuardedChange::DeleteVariable { .. } => "",
        };
        // What is secret is not shown by `Debug`.
        let text = SecretString::from(format!("{organization}\0{change:?}\0{value}"));
        Digest::from_bytes(self.master.digest(b"guarded change", text.expose_secret().as_bytes()))
    }
}

impl ChangeRecord {
    /// The same attempt, to be written again.
    pub(super) fn again(&self) -> Self {
        Self {
            user: self.user.clone(),
            device: self.device.clone(),
            access_key_id: self.access_key_id.clone(),
            subject: self.subject.clone(),
            outcome: self.outcome.clone(),
            ..*self
        }
    }
}

fn answer(outcome: ChangeOutcome) -> Result<()> {
    match outcome {
        ChangeOutcome::Made { .. } => Ok(()),
        ChangeOutcome::Refused { reason, message, aws_request_id, .. } => {
            let reason = Reason::from_str_name(&format!("REASON_{reason}"))
                .unwrap_or(Reason::ExchangeRefused);
            let error = Error::refused(reason, message).about("token_code");
            Err(match aws_request_id {
                Some(id) => error.with("aws_request_id", id),
                None => error,
            })
        }
        ChangeOutcome::Spending => {
            Err(Error::internal("an attempt was answered before it had an outcome"))
        }
    }
}

pub(super) fn request_text(organization: OrganizationId, proof: &GivenCode) -> String {
    format!("change:{organization}:{}", proof.request_id)
}

pub(super) fn request_key(user: UserId, organization: OrganizationId, request_id: &str) -> Key {
    keys::request(user, &format!("change:{organization}:{request_id}"))
}
