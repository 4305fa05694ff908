//! Who may do what again after a restore: for the person who restores to look at. What was
//! revoked or removed after the backup was taken cannot be known, only suspected.

use std::fmt;

use latchkey_domain::id::{OrganizationId, UserId};
use latchkey_domain::time::Timestamp;

use crate::store::keys::Kind;
use crate::store::record::decode;
use crate::store::record::people::{Membership, Organization, Role, ServiceToken, User};
use crate::store::record::runner::Runner;
use crate::store::{Store, StoreError, keys, list};

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Returned {
    /// Their logins are valid.
    pub people: Vec<Person>,
    /// Void from the first start on.
    pub service_tokens: Vec<Named>,
    /// Drained from the first start on.
    pub runners: Vec<Named>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Person {
    pub name: String,
    pub created_at: Timestamp,
    pub roles: Vec<(String, Role)>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Named {
    pub organization: String,
    pub name: String,
    pub created_at: Timestamp,
}

/// Reads who is in the records.
pub(super) async fn read(store: &dyn Store) -> Result<Returned, StoreError> {
    let mut returned = Returned::default();
    for (key, found) in list(store, keys::all(Kind::User)).await? {
        let user: User = decode(&key, &found)?;
        let roles = roles(store, user.id.0).await?;
        let created_at = user.created_at.into();
        returned.people.push(Person { name: user.name, created_at, roles });
    }
    for (key, found) in list(store, keys::all(Kind::ServiceToken)).await? {
        let token: ServiceToken = decode(&key, &found)?;
        let first = key.as_bytes().get(1..).and_then(|rest| rest.first_chunk::<16>());
        let id =
            OrganizationId::from_bytes(*first.ok_or(StoreError::Damaged { key: key.clone() })?);
        let organization = organization(store, id).await?;
        let created_at = token.created_at.into();
        returned.service_tokens.push(Named { organization, name: token.name, created_at });
    }
    for (key, found) in list(store, keys::all(Kind::Runner)).await? {
        let runner: Runner = decode(&key, &found)?;
        if runner.revoked_at.is_some() {
            continue;
        }
        let organization = organization(store, runner.organization.0).await?;
        let created_at = runner.enrolled_at.into();
        returned.runners.push(Named { organization, name: runner.name, created_at });
    }
    Ok(returned)
}

async fn roles(store: &dyn Store, user: UserId) -> Result<Vec<(String, Role)>, StoreError> {
    let mut roles = vec![];
    for (key, found) in list(store, keys::memberships_by_user(user)).await? {
        let membership: Membership = decode(&key, &found)?;
        let Some(id) = key.last_id().map(OrganizationId::from_bytes) else { continue };
        roles.push((organization(store, id).await?, membership.role));
    }
    Ok(roles)
}

async fn organization(store: &dyn Store, id: OrganizationId) -> Result<String, StoreError> {
    let key = keys::organization(id);
    match store.fetch(&key).await? {
        Some(found) => Ok(decode::<Organization>(&key, &found)?.name),
        None => Ok(id.to_string()),
    }
}

impl fmt::Display for Person {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, since {}:", self.name, Shown(self.created_at))?;
        for (number, (organization, role)) in self.roles.iter().enumerate() {
            let role = match role {
                Role::Member => "member",
                Role::Owner => "owner",
            };
            let comma = if number == 0 { "" } else { "," };
            write!(f, "{comma} {role} of {organization}")?;
        }
        Ok(())
    }
}

impl fmt::Display for Named {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {}, since {}", self.name, self.organization, Shown(self.created_at))
    }
}

struct Shown(Timestamp);

impl fmt::Display for Shown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match jiff::Timestamp::from_second(self.0.as_millis().div_euclid(1000)) {
            Ok(time) => time.fmt(f),
            Err(_) => f.write_str("an unknown time"),
        }
    }
}
