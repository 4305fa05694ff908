//! Who belongs to an organization, and what they may do in it.
//!
//! An organization keeps an owner. Who takes the role from somebody else rests on their own, and
//! who gives up their own on another owner's: the commit holds that record at the version that was
//! read. So of two who take it from each other at once, one is told that it changed meanwhile.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use latchkey_domain::id::{EnvironmentId, OrganizationId, UserId};
use latchkey_proto::v1::Reason;

use super::people::MOST_ENVIRONMENTS;
use super::{App, Page, PageRequest};
use crate::audit::Draft;
use crate::auth::{self, Caller, Right, Standing};
use crate::error::{Error, Result};
use crate::store::keys::VariableScope;
use crate::store::record::people::{Access, Membership, Role, User};
use crate::store::record::variable::Variable;
use crate::store::record::{Loaded, Text, decode, encode};
use crate::store::{Batch, CommitError, Expect, Scan, keys};

/// A member with the names that people know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemberView {
    pub user: String,
    pub membership: Membership,
    /// In the order of names.
    pub environments: BTreeMap<String, Access>,
}

/// What is to be changed of a membership.
#[derive(Clone, Debug, Default)]
pub struct MemberChange {
    pub role: Option<Role>,
    pub access: Option<Access>,
    /// By name; `None` takes the environment off the list.
    pub environments: Vec<(String, Option<Access>)>,
}

/// Names of environments, looked up once for many members.
type Names = HashMap<EnvironmentId, Option<String>>;

impl App {
    /// Lists members in the order in which their users were made.
    pub async fn list_members(
        &self,
        caller: &Caller,
        organization: &str,
        page: PageRequest,
    ) -> Result<Page<MemberView>> {
        let standing = self.member(caller, organization).await?;
        let (own, _) = caller.person()?;
        let (size, organization) = (page.size()?, standing.organization);
        let mut names = Names::new();
        if standing.position.role != Role::Owner {
            let found = self.membership(organization, own).await?.ok_or_else(missing)?;
            let mut membership = found.value;
            // They need not know what is hidden from them.
            membership.environments.retain(|_, access| *access != Access::None);
            let view = self.member_view(organization, own, membership, &mut names).await?;
            return Ok(Page { items: vec![view], next: None });
        }
        let after = page.after::<UserId>()?.map(|user| keys::membership(organization, user));
        let scan = Scan::ascending(keys::memberships_of(organization), size + 1).after(after);
        let (mut items, mut next, mut last) = (vec![], None, None);
        for (key, found) in self.scan(scan).await? {
            if items.len() == size {
                next = last.map(|user: UserId| user.to_string());
                break;
            }
            let Some(user) = key.last_id().map(UserId::from_bytes) else { continue };
            let membership = decode(&key, &found)?;
            items.push(self.member_view(organization, user, membership, &mut names).await?);
            last = Some(user);
        }
        Ok(Page { items, next })
    }

    /// Makes an existing user a member.
    pub async fn add_member(
        &self,
        caller: &Caller,
        organization: &str,
        name: &str,
        change: MemberChange,
    ) -> Result<MemberView> {
        let standing = self.owner(caller, organization).await?;
        let organization = standing.organization;
        let user = self.user_named(name).await?.ok_or_else(|| Error::not_found("user"))?;
        let id = user.value.id.0;
        if standing.caller.person()?.0 == id {
            return Err(member_already());
        }
        let new = Membership {
            role: Role::Member,
            access: Access::default(),
            environments: BTreeMap::new(),
            created_at: Some(self.now().into()),
        };
        let membership = self.changed_membership(organization, new, change).await?;
        if self.membership(organization, id).await?.is_some() {
            return Err(member_already());
        }
        Self::check_own_keys(&user.value, organization)?;
        let view =
            self.member_view(organization, id, membership.clone(), &mut Names::new()).await?;
        let draft = with_position(self.member_draft(&standing, "add_member", name), "", &view);
        // Who resets the user at this moment rests on there being one organization alone.
        let batch = Batch::new().put(user.key, Expect::At(user.version), encode(&user.value));
        let batch = standing.guard(batch.audit(draft));
        self.store.commit(with_member(batch, organization, id, &membership)).await?;
        Ok(view)
    }

    pub async fn update_member(
        &self,
        caller: &Caller,
        organization: &str,
        name: &str,
        change: MemberChange,
    ) -> Result<MemberView> {
        let standing = self.owner(caller, organization).await?;
        let organization = standing.organization;
        let (id, found) = self.member_to_change(&standing, name).await?;
        let before = found.value;
        let membership = self.changed_membership(organization, before.clone(), change).await?;
        let mut names = Names::new();
        let view = self.member_view(organization, id, membership.clone(), &mut names).await?;
        if membership == before {
            return Ok(view);
        }
        let was = self.member_view(organization, id, before.clone(), &mut names).await?;
        let draft = self.member_draft(&standing, "update_member", name);
        let draft = with_position(with_position(draft, "_before", &was), "_after", &view);
        let encoded = encode(&membership);
        let batch = Batch::new()
            .put(found.key, Expect::At(found.version), encoded.clone())
            .put(keys::membership_by_user(id, organization), Expect::Anything, encoded)
            .audit(draft);
        let batch = match before.role != Role::Owner && membership.role == Role::Owner {
            true => self.with_new_owner(batch, organization, id).await?,
            false => batch,
        };
        let gives_up = before.role == Role::Owner && membership.role != Role::Owner;
        let batch = self.resting_on_an_owner(batch, &standing, id, gives_up).await?;
        self.store.commit(batch).await?;
        Ok(view)
    }

    /// Takes somebody out: owners anybody, others themselves. Their open streams end by the change
    /// of the record.
    pub async fn remove_member(
        self: &Arc<Self>,
        caller: &Caller,
        organization: &str,
        name: &str,
    ) -> Result<()> {
        let standing = self.member(caller, organization).await?;
        if caller.person()?.1 != name {
            auth::check(caller, Some(&standing.position), Right::Own, None)?;
        }
        let organization = standing.organization;
        let (id, found) = self.member_to_change(&standing, name).await?;
        // None is added once the membership has another version: setting one rests on it.
        let personal = keys::variables_of(VariableScope::Personal(organization, id));
        let personal = self.list(personal).await?;
        let draft = self
            .member_draft(&standing, "remove_member", name)
            .with("personal_variables", personal.len());
        let was =
            self.member_view(organization, id, found.value.clone(), &mut Names::new()).await?;
        let draft = with_position(draft, "_before", &was);
        let mut batch = Batch::new()
            .delete(found.key, Expect::At(found.version))
            .delete(keys::membership_by_user(id, organization), Expect::Anything)
            .audit(draft);
        for (key, found) in personal {
            let variable: Variable = decode(&key, &found)?;
            batch = self.end_value(batch, organization, &variable).await?;
            batch = batch.delete(key, Expect::Anything);
        }
        let gives_up = found.value.role == Role::Owner;
        let batch = self.resting_on_an_owner(batch, &standing, id, gives_up).await?;
        self.store.commit(batch).await?;
        self.collect_garbage_soon();
        Ok(())
    }

    /// Makes a batch rest on an owner who stays: the caller, or another one if the caller is who
    /// gives the role up.
    async fn resting_on_an_owner(
        &self,
        batch: Batch,
        standing: &Standing,
        target: UserId,
        gives_up: bool,
    ) -> Result<Batch> {
        let organization = standing.organization;
        let (own, _) = standing.caller.person()?;
        if own != target {
            return Ok(standing.guard(batch));
        }
        if !gives_up {
            return Ok(batch);
        }
        for (key, found) in self.list(keys::memberships_of(organization)).await? {
            let membership: Membership = decode(&key, &found)?;
            let is_target = key.last_id() == Some(*target.as_bytes());
            if membership.role == Role::Owner && !is_target {
                return Ok(batch.check(key, Expect::At(found.version)));
            }
        }
        Err(Error::refused(
            Reason::LastOwner,
            "an organization keeps an owner, and this is the last one; make another one first",
        ))
    }

    /// Finds who is to be changed. The caller's own is the one that they were let by: another
    /// owner may have taken the role from them since.
    async fn member_to_change(
        &self,
        standing: &Standing,
        name: &str,
    ) -> Result<(UserId, Loaded<Membership>)> {
        let (id, found) = self.member_named(standing.organization, name).await?;
        let (key, version) = &standing.rests_on;
        if found.key == *key && found.version != *version {
            return Err(CommitError::Conflict { key: found.key }.into());
        }
        Ok((id, found))
    }

    async fn changed_membership(
        &self,
        organization: OrganizationId,
        before: Membership,
        change: MemberChange,
    ) -> Result<Membership> {
        if change.environments.len() > MOST_ENVIRONMENTS {
            return Err(too_many());
        }
        let mut next = before;
        next.role = change.role.unwrap_or(next.role);
        next.access = change.access.unwrap_or(next.access);
        for (name, access) in change.environments {
            let found = self.environment_named(organization, &name).await;
            let id = match found {
                Ok(found) => Text(found.value.id),
                Err(error) if error.reason() == Reason::NotFound => {
                    return Err(Error::field("environments", format!("there is no `{name}`")));
                }
                Err(error) => return Err(error),
            };
            match access {
                Some(access) => next.environments.insert(id, access),
                None => next.environments.remove(&id),
            };
        }
        if next.environments.len() > MOST_ENVIRONMENTS {
            return Err(too_many());
        }
        Ok(next)
    }

    async fn member_view(
        &self,
        organization: OrganizationId,
        user: UserId,
        membership: Membership,
        names: &mut Names,
    ) -> Result<MemberView> {
        let record: Option<Loaded<User>> = self.fetch(keys::user(user)).await?;
        let name = record.map(|record| record.value.name).unwrap_or_else(|| user.to_string());
        let mut environments = BTreeMap::new();
        for (Text(id), access) in &membership.environments {
            if !names.contains_key(id) {
                let found = match self.environment(organization, *id).await {
                    Ok(found) => Some(found.value.name),
                    Err(error) if error.reason() == Reason::NotFound => None,
                    Err(error) => return Err(error),
                };
                names.insert(*id, found);
            }
            if let Some(Some(name)) = names.get(id) {
                environments.insert(name.clone(), *access);
            }
        }
        Ok(MemberView { user: name, membership, environments })
    }

    /// Finds a member. Who is none is answered as who does not exist.
    pub(super) async fn member_named(
        &self,
        organization: OrganizationId,
        name: &str,
    ) -> Result<(UserId, Loaded<Membership>)> {
        let user = self.user_named(name).await?.ok_or_else(missing)?.value.id.0;
        let found = self.membership(organization, user).await?.ok_or_else(missing)?;
        Ok((user, found))
    }

    pub(super) async fn membership(
        &self,
        organization: OrganizationId,
        user: UserId,
    ) -> Result<Option<Loaded<Membership>>> {
        self.fetch(keys::membership(organization, user)).await
    }

    pub(super) async fn user_named(&self, name: &str) -> Result<Option<Loaded<User>>> {
        let id: Option<Loaded<Text<UserId>>> = self.fetch(keys::user_by_name(name)).await?;
        match id {
            Some(id) => self.fetch(keys::user(id.value.0)).await,
            None => Ok(None),
        }
    }

    fn member_draft(&self, standing: &Standing, action: &str, name: &str) -> Draft {
        let actor = standing.caller.audit_name();
        self.draft(standing.organization, actor, action, format!("user {name}"))
    }
}

/// Writes a new membership at both its places.
pub(super) fn with_member(
    batch: Batch,
    organization: OrganizationId,
    user: UserId,
    membership: &Membership,
) -> Batch {
    let membership = encode(membership);
    batch.put(keys::membership(organization, user), Expect::Absent, membership.clone()).put(
        keys::membership_by_user(user, organization),
        Expect::Anything,
        membership,
    )
}

fn with_position(draft: Draft, when: &str, view: &MemberView) -> Draft {
    let environments: serde_json::Map<String, serde_json::Value> = view
        .environments
        .iter()
        .map(|(name, access)| (name.clone(), access.as_str().into()))
        .collect();
    draft
        .with(format!("role{when}"), view.membership.role.as_str())
        .with(format!("access{when}"), view.membership.access.as_str())
        .with(format!("environments{when}"), environments)
}

fn missing() -> Error {
    Error::not_found("member of this organization")
}

fn member_already() -> Error {
    let message = "they are a member already; change what they may do instead";
    Error::refused(Reason::NameTaken, message)
}

fn too_many() -> Error {
    Error::refused(Reason::LimitReached, "a member has an access of their own in 100 environments")
        .with("limit", MOST_ENVIRONMENTS.to_string())
}

#[cfg(test)]
mod tests;
