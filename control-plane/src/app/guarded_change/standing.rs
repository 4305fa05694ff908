//! That an organization is guarded outlives the triple that guards it.
//!
//! A triple goes with its person: a reset deletes it, and a removal. Were that the end of the
//! guard, a stolen login would end it. So the organization's record says that there has been one,
//! from the commit that makes the first one whole. A deletion of the last one takes it back that
//! a code of it backs, or that whoever has the host makes.

use latchkey_domain::id::{OrganizationId, UserId};
use latchkey_proto::v1::Reason;

use crate::app::App;
use crate::app::secrets::TRIPLE;
use crate::error::{Error, Result};
use crate::store::keys::{Kind, VariableScope};
use crate::store::record::people::{Membership, Organization, Role};
use crate::store::record::{Loaded, decode, encode};
use crate::store::{Batch, CommitError, Expect, keys};

impl App {
    /// Writes the organization's record along, where the variable makes a triple whole. Always, so
    /// that whoever finds no whole one at this moment is told.
    pub(super) async fn with_guard(
        &self,
        batch: Batch,
        organization: OrganizationId,
        stored: VariableScope,
        name: &str,
    ) -> Result<Batch> {
        if !self.makes_whole(stored, name).await? {
            return Ok(batch);
        }
        if let VariableScope::Personal(_, user) = stored
            && !self.is_owner(organization, user).await?
        {
            // Nobody else changes what is guarded, and three made-up values must not lock owners.
            return Ok(batch);
        }
        let found = self.organization(organization).await?;
        let next = Organization { guarded: true, ..found.value };
        Ok(batch.put(found.key, Expect::At(found.version), encode(&next)))
    }

    /// Lets somebody become an owner. One who has a device has not taken it by a code of the
    /// organization's, as an owner would have; where the organization has none, theirs guards from
    /// then on.
    pub(in crate::app) async fn with_new_owner(
        &self,
        batch: Batch,
        organization: OrganizationId,
        user: UserId,
    ) -> Result<Batch> {
        if self.guarding_triple(VariableScope::Personal(organization, user)).await?.is_none() {
            return Ok(batch);
        }
        if self.guarding_triple(VariableScope::Organization(organization)).await?.is_some() {
            let message = "they have a triple of their own, which would guard in place of the \
                           organization's and took no code of it; they delete it first, and set \
                           it again as an owner";
            return Err(Error::refused(Reason::WrongState, message));
        }
        let found = self.organization(organization).await?;
        let next = Organization { guarded: true, ..found.value };
        Ok(batch.put(found.key, Expect::At(found.version), encode(&next)))
    }

    /// Takes the guard back with the last triple, for a deletion that a code of it backs, or the
    /// host.
    pub(in crate::app) async fn without_guard(
        &self,
        batch: Batch,
        organization: OrganizationId,
        stored: VariableScope,
    ) -> Result<Batch> {
        // Before the triples: whoever makes one whole meanwhile writes it again.
        let found = self.organization(organization).await?;
        if !found.value.guarded || self.any_triple(organization, Some(stored)).await? {
            return Ok(batch);
        }
        let next = Organization { guarded: false, ..found.value };
        Ok(batch.put(found.key, Expect::At(found.version), encode(&next)))
    }

    /// Tells whether the other parts of the triple are there.
    pub(super) async fn makes_whole(&self, stored: VariableScope, name: &str) -> Result<bool> {
        for other in TRIPLE.into_iter().filter(|other| *other != name) {
            if self.triple_value(stored, other).await?.is_none() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Tells whether any triple of the organization or its owners is whole, but for one.
    pub(super) async fn any_triple(
        &self,
        organization: OrganizationId,
        but: Option<VariableScope>,
    ) -> Result<bool> {
        let mut scopes = vec![VariableScope::Organization(organization)];
        for (key, found) in self.list(keys::memberships_of(organization)).await? {
            let membership: Membership = decode(&key, &found)?;
            if membership.role != Role::Owner {
                continue;
            }
            let user = key.last_id().map(UserId::from_bytes);
            scopes.extend(user.map(|user| VariableScope::Personal(organization, user)));
        }
        for scope in scopes.into_iter().filter(|scope| Some(*scope) != but) {
            if self.guarding_triple(scope).await?.is_some() {
                return Ok(true);
            }
        }
        Ok(false)
    }

    pub(super) async fn is_owner(
        &self,
        organization: OrganizationId,
        user: UserId,
    ) -> Result<bool> {
        let membership = self.membership(organization, user).await?;
        Ok(membership.is_some_and(|found| found.value.role == Role::Owner))
    }

    /// At a start: notes the guard of organizations whose records are of before it was noted.
    pub(super) async fn note_guards(&self) -> Result<()> {
        for (key, found) in self.list(keys::all(Kind::Organization)).await? {
            let organization: Organization = decode(&key, &found)?;
            let id = organization.id.0;
            if organization.guarded || !self.any_triple(id, None).await? {
                continue;
            }
            self.note_guard(id).await?;
        }
        Ok(())
    }

    async fn note_guard(&self, organization: OrganizationId) -> Result<()> {
        loop {
            let Loaded { key, version, value } = self.organization(organization).await?;
            let next = Organization { guarded: true, ..value };
            let batch = Batch::new().put(key, Expect::At(version), encode(&next));
            match self.store.commit(batch).await {
                Ok(_) => return Ok(()),
                Err(CommitError::Conflict { .. }) => {}
                Err(error @ CommitError::Store(_)) => return Err(error.into()),
            }
        }
    }
}
