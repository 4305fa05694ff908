//! State versions: listed, read, gone back to. All are kept.
//!
//! A version is named by its number, which counts them. Listing takes the right to read the
//! environment; the content, which holds secrets, a person who administers it. What people send
//! comes in through [`push`].

pub mod push;

use std::sync::Arc;

use latchkey_domain::id::OrganizationId;
use latchkey_proto::v1::Reason;

use super::configurations::blob_error;
use super::state_lock::check_free;
use super::{App, Page, PageRequest};
use crate::audit::Draft;
use crate::auth::{Caller, Right};
use crate::blobs::BlobReader;
use crate::error::{Error, Result};
use crate::store::keys::{self, BlobUser};
use crate::store::record::environment::{
    Environment, EnvironmentRecord, StateHead, StateOrigin, StateVersion,
};
use crate::store::record::{Loaded, Text, decode, encode};
use crate::store::{Batch, CommitError, Expect, Scan};

const ATTEMPTS: usize = 16;

/// A version and its number.
#[derive(Clone, Debug)]
pub struct StateVersionView {
    pub number: u64,
    pub version: StateVersion,
    pub is_current: bool,
}

impl App {
    /// Lists an environment's state versions, newest first, and tells of the environment too.
    pub async fn list_state_versions(
        &self,
        caller: &Caller,
        organization: &str,
        environment: &str,
        page: PageRequest,
    ) -> Result<(Page<StateVersionView>, Environment)> {
        let (_, found) = self.on(caller, organization, environment, Right::Read).await?;
        let environment = found.value;
        let size = page.size()?;
        let after = page.after::<u64>()?.map(|number| keys::state_version(environment.id, number));
        let scan = Scan::descending(keys::state_versions_of(environment.id), size + 1).after(after);
        let mut items = vec![];
        for (key, value) in self.scan(scan).await? {
            let Some(number) = keys::number_of_state_version(&key) else { continue };
            items.push(view(&environment, number, decode(&key, &value)?));
        }
        let more = items.len() > size;
        items.truncate(size);
        let next = items.last().filter(|_| more).map(|last| last.number.to_string());
        Ok((Page { items, next }, environment))
    }

    /// Shows one version; 0 is the newest.
    pub async fn show_state_version(
        &self,
        caller: &Caller,
        organization: &str,
        environment: &str,
        number: u64,
    ) -> Result<StateVersionView> {
        let (_, found) = self.on(caller, organization, environment, Right::Read).await?;
        self.state_version(&found.value, number).await
    }

    /// Begins to read a version; the record of who did is durable before a byte of it leaves.
    pub async fn read_state_version(
        &self,
        caller: &Caller,
        organization: &str,
        environment: &str,
        number: u64,
    ) -> Result<BlobReader> {
        let (standing, found) =
            self.on(caller, organization, environment, Right::Administer).await?;
        let view = self.state_version(&found.value, number).await?;
        let (organization, digest) = (standing.organization, view.version.digest.0);
        let reader = self.blobs.read(organization, digest).await.map_err(blob_error)?;
        let draft = self.state_draft(organization, caller, "read_state", &found.value, &view);
        self.store.commit(Batch::new().audit(draft)).await?;
        Ok(reader)
    }

    /// As [`App::read_state_version`], of the newest version; `None` where there is none yet.
    pub async fn read_newest_state(
        &self,
        caller: &Caller,
        organization: &str,
        environment: &str,
    ) -> Result<Option<BlobReader>> {
        let (_, found) = self.on(caller, organization, environment, Right::Administer).await?;
        let Some(head) = &found.value.state else { return Ok(None) };
        let number = head.number;
        self.read_state_version(caller, organization, environment, number).await.map(Some)
    }

    /// Makes the content of an old version the newest.
    pub async fn rollback_state(
        self: &Arc<Self>,
        caller: &Caller,
        organization: &str,
        environment: &str,
        number: u64,
        confirmation: &str,
    ) -> Result<StateVersionView> {
        for _ in 0..ATTEMPTS {
            let (standing, found) =
                self.on(caller, organization, environment, Right::Administer).await?;
            if confirmation != found.value.name {
                let message = "type the environment's name again to go back to an older state";
                return Err(Error::field("environment_confirmation", message));
            }
            if number == 0 {
                return Err(Error::field("version", "name the version to go back to"));
            }
            self.check_history()?;
            check_free(&found.value.hold, caller)?;
            let old = self.state_version(&found.value, number).await?.version;
            let head = found.value.state.as_ref().ok_or_else(|| Error::not_found("state"))?;
            if head.number == number {
                let message = "this version is the current one already";
                return Err(Error::refused(Reason::WrongState, message));
            }
            check_lineage(&old.lineage, head)?;
            let serial = head
                .serial
                .checked_add(1)
                .ok_or_else(|| Error::refused(Reason::WrongState, "there is no higher serial"))?;
            let organization = standing.organization;
            let (claim, size) = self.with_serial(organization, old.digest.0, serial).await?;
            let version = StateVersion {
                digest: Text(claim.digest),
                lineage: old.lineage.clone(),
                serial,
                run: None,
                at: self.now().into(),
                origin: StateOrigin::Rollback(number),
                user: caller.name().to_owned(),
                size: Some(size),
            };
            let (batch, made) = with_version(Batch::new(), &found, &version);
            let made =
                StateVersionView { number: made, version: version.clone(), is_current: true };
            let draft = self
                .state_draft(organization, caller, "rollback_state", &found.value, &made)
                .with("to", number);
            let batch = batch.audit(draft);
            let user = BlobUser::State(found.value.id);
            let committed = match self.settle_claim(batch, &claim, user).await {
                Ok(batch) => self.store.commit(batch).await,
                Err(error) => {
                    self.release_claim(&claim).await?;
                    return Err(error);
                }
            };
            if committed.is_err() {
                self.release_claim(&claim).await?;
                self.collect_garbage_soon();
            }
            match committed {
                Ok(_) => return Ok(made),
                Err(CommitError::Conflict { .. }) => {}
                Err(error @ CommitError::Store(_)) => return Err(error.into()),
            }
        }
        Err(Error::refused(Reason::ChangedMeanwhile, "the environment changes too fast; repeat"))
    }

    /// Fetches a version of an environment that the caller is known to have a right to.
    pub(super) async fn state_version(
        &self,
        environment: &Environment,
        number: u64,
    ) -> Result<StateVersionView> {
        let none = || {
            let message = "no such state version; `latchkey state list` shows those there are";
            Error::refused(Reason::NotFound, message)
        };
        let number = match (number, &environment.state) {
            (0, Some(head)) => head.number,
            (0, None) => return Err(none()),
            (number, _) => number,
        };
        let key = keys::state_version(environment.id, number);
        let found: Loaded<StateVersion> = self.fetch(key).await?.ok_or_else(none)?;
        Ok(view(environment, number, found.value))
    }

    pub(super) fn state_draft(
        &self,
        organization: OrganizationId,
        caller: &Caller,
        action: &str,
        environment: &Environment,
        view: &StateVersionView,
    ) -> Draft {
        let subject = format!("environment {}", environment.name);
        self.draft(organization, caller.audit_name(), action, subject)
            .with("version", view.number)
            .with("serial", view.version.serial)
            .with("digest", view.version.digest.0.to_string())
    }
}

/// Adds to a batch that a state becomes the environment's newest, and answers its number.
pub(super) fn with_version(
    batch: Batch,
    environment: &Loaded<Environment>,
    version: &StateVersion,
) -> (Batch, u64) {
    let mut next = environment.value.clone();
    let number = next.state.as_ref().map_or(0, |head| head.number) + 1;
    next.state = Some(StateHead {
        number,
        digest: version.digest,
        lineage: version.lineage.clone(),
        serial: version.serial,
    });
    let record = encode(&EnvironmentRecord::from(&next));
    let batch = batch.put(environment.key.clone(), Expect::At(environment.version), record).put(
        keys::state_version(next.id, number),
        Expect::Absent,
        encode(version),
    );
    (batch, number)
}

/// Refuses a state that is not of the line of the current one.
fn check_lineage(lineage: &str, head: &StateHead) -> Result<()> {
    if lineage == head.lineage {
        return Ok(());
    }
    let message = format!(
        "it is of another lineage than the environment's state ({lineage}, not {}): it is the state \
         of something else",
        head.lineage
    );
    Err(Error::refused(Reason::WrongState, message))
}

fn view(environment: &Environment, number: u64, version: StateVersion) -> StateVersionView {
    let is_current = environment.state.as_ref().is_some_and(|head| head.number == number);
    StateVersionView { number, version, is_current }
}

#[cfg(test)]
mod tests;
