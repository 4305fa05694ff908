//! How two states differ, resource by resource, as far as a person can read it.
//!
//! What a state marks as sensitive is never told, whichever of the two marks it; nor is what
//! providers keep for themselves. Both states are in memory while they are compared, so they are
//! bounded, and one comparison goes on at a time; what is told is bounded, too.

mod compare;

use std::sync::Arc;

use latchkey_domain::id::{Digest, OrganizationId, QuarantinedId};
use latchkey_proto::v1::Reason;

use self::compare::{State, diff};
use super::App;
use super::configurations::blob_error;
use super::states::StateVersionView;
use crate::auth::{Caller, Right};
use crate::blobs::BlobError;
use crate::error::{Error, Result};
use crate::store::Batch;

/// The largest state that is compared. Parsed, it takes many times as much.
const LARGEST_COMPARED: u64 = 8 << 20;

/// What differs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StateDiff {
    pub changes: Vec<StateChange>,
    /// There are more; the counts are of all.
    pub truncated: bool,
    pub added: u32,
    pub changed: u32,
    pub removed: u32,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StateChange {
    /// Of a resource instance, or `output.NAME`.
    pub address: String,
    pub action: Action,
    pub attributes: Vec<AttributeChange>,
    pub truncated: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    Added,
    Changed,
    Removed,
}

/// One value within a resource or output. Neither side is told where it is sensitive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttributeChange {
    pub path: String,
    pub before: Option<String>,
    pub after: Option<String>,
    pub sensitive: bool,
}

impl App {
    /// Compares two versions; an `after` of 0 is the newest, a `before` of 0 the one before it.
    pub async fn diff_state_versions(
        self: &Arc<Self>,
        caller: &Caller,
        organization: &str,
        environment: &str,
        (before, after): (u64, u64),
    ) -> Result<(StateDiff, StateVersionView, StateVersionView)> {
        let (standing, found) =
            self.on(caller, organization, environment, Right::Administer).await?;
        let after = self.state_version(&found.value, after).await?;
        let before = match (before, after.number) {
            (0, 1) => {
                let message = "it is the first version; there is none before it";
                return Err(Error::field("before", message));
            }
            (0, after) => after - 1,
            (before, _) => before,
        };
        let before = self.state_version(&found.value, before).await?;
        let organization = standing.organization;
        let draft = self
            .state_draft(organization, caller, "diff_states", &found.value, &after)
            .with("before", before.number);
        self.store.commit(Batch::new().audit(draft)).await?;
        let digests = (Some(before.version.digest.0), after.version.digest.0);
        let diff = self.compare(organization, digests).await?;
        Ok((diff, before, after))
    }

    /// Compares a quarantined state with the current one of its environment.
    pub async fn compare_quarantined(
        self: &Arc<Self>,
        caller: &Caller,
        organization: &str,
        id: QuarantinedId,
    ) -> Result<StateDiff> {
        let organization = self.owner(caller, organization).await?.organization;
        let record = self.quarantined(organization, id).await?.value;
        let (Some(_), Some(environment)) = (&record.state, record.environment) else {
            let message = "it is no state of an environment that is known here; nothing can be \
                           compared with it";
            return Err(Error::refused(Reason::WrongState, message));
        };
        let head = self.environment(organization, environment.0).await?.value.state;
        let draft = self
            .draft(
                organization,
                caller.audit_name(),
                "compare_quarantined",
                format!("run {}", record.run.0),
            )
            .with("id", id.to_string())
            .with("digest", record.digest.0.to_string());
        self.store.commit(Batch::new().audit(draft)).await?;
        self.compare(organization, (head.map(|head| head.digest.0), record.digest.0)).await
    }

    async fn compare(
        self: &Arc<Self>,
        organization: OrganizationId,
        (before, after): (Option<Digest>, Digest),
    ) -> Result<StateDiff> {
        let app = Arc::clone(self);
        self.with_whole_states(organization, async move {
            let before = match before {
                Some(before) => app.state_to_compare(organization, before).await?,
                None => State::default(),
            };
            let after = app.state_to_compare(organization, after).await?;
            let compared = crate::blocking::spawn(move || diff(&before, &after)).await;
            compared.map_err(Error::internal)
        })
        .await
    }

    /// Does what has whole states in memory: in turn, and to its end also if nobody waits for it
    /// any more, since a thread that parses one does not stop.
    pub(super) async fn with_whole_states<T: Send + 'static>(
        self: &Arc<Self>,
        organization: OrganizationId,
        work: impl Future<Output = Result<T>> + Send + 'static,
    ) -> Result<T> {
        let turn = self.uploads.whole(organization).await?;
        let work = async move {
            let _turn = turn;
            work.await
        };
        tokio::spawn(work).await.map_err(Error::internal)?
    }

    async fn state_to_compare(
        &self,
        organization: OrganizationId,
        digest: Digest,
    ) -> Result<State> {
        let state = match self.blobs.get(organization, digest, LARGEST_COMPARED).await {
            Ok(state) => state,
            Err(BlobError::TooLarge { limit }) => {
                let message = format!(
                    "a state above {} MiB is not compared here; download both and compare them",
                    limit >> 20
                );
                let error = Error::refused(Reason::LimitReached, message);
                return Err(error.with("limit", limit.to_string()));
            }
            Err(error) => return Err(blob_error(error)),
        };
        let parsed =
            crate::blocking::spawn(move || serde_json::from_slice(state.expose_secret())).await;
        parsed.map_err(Error::internal)?.map_err(|_| {
            let message = "one of them is no state of format version 4; download it to look at it";
            Error::refused(Reason::WrongState, message)
        })
    }
}
