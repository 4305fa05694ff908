//! Organizations: made on the host, and their settings: the AWS accounts that triples may belong
//! to.

use std::collections::BTreeMap;
use std::sync::Arc;

use latchkey_domain::id::OrganizationId;
use latchkey_proto::v1::Reason;
use secrecy::SecretString;
use serde::{Deserialize, Serialize};

use super::guarded_change::{GivenCode, GuardedChange, Intent};
use super::members::with_member;
use super::{App, check_name};
use crate::auth::{Caller, NewToken};
use crate::error::{Error, Result};
use crate::store::record::people::{Access, HandedOver, Membership, Organization, Role};
use crate::store::record::{Text, encode};
use crate::store::{Batch, Expect, keys};

const MOST_ACCOUNTS: usize = 100;

/// Who owns a new organization.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FirstOwner {
    /// A user of this control plane.
    Existing(String),
    /// A user to be made.
    New(String),
}

impl App {
    /// Makes an organization, for whoever commands the host. Answers the token of a new owner.
    pub async fn create_organization(
        &self,
        name: &str,
        owner: FirstOwner,
    ) -> Result<Option<SecretString>> {
        check_name("organization", name)?;
        let id = OrganizationId::from_uuid(self.new_id());
        let record = Organization {
            id: Text(id),
            name: name.to_owned(),
            aws_accounts: vec![],
            external_id: String::new(),
            guarded: false,
            created_at: self.now().into(),
        };
        let taken = || {
            let message = "the name is taken by another organization; choose another";
            Error::refused(Reason::NameTaken, message)
        };
        if self.store.fetch(&keys::organization_by_name(name)).await?.is_some() {
            return Err(taken());
        }
        let subject = format!("organization {name}");
        let draft = self.draft(id, "host", "create_organization", subject);
        let batch = Batch::new().put(keys::organization(id), Expect::Absent, encode(&record)).put(
            keys::organization_by_name(name),
            Expect::Absent,
            encode(&Text(id)),
        );
        let (batch, owner, token) = match owner {
            FirstOwner::Existing(owner) => {
                let user = self.user_named(&owner).await?;
                let user = user.ok_or_else(|| Error::not_found("user"))?;
                Self::check_own_keys(&user.value, id)?;
                let membership = Membership {
                    role: Role::Owner,
                    access: Access::Admin,
                    environments: BTreeMap::new(),
                    created_at: Some(self.now().into()),
                };
                let user_id = user.value.id.0;
                // As where a member is added.
                let batch = batch.put(user.key, Expect::At(user.version), encode(&user.value));
                (with_member(batch, id, user_id, &membership), owner, None)
            }
            FirstOwner::New(owner) => {
                check_name("user", &owner)?;
                let token = NewToken::generate("lk_")?;
                let position = (Role::Owner, Access::Admin);
                let by_host = HandedOver { token: Text(token.digest), by: Text(id) };
                let batch = self.new_user(batch, id, &owner, position, &token, Some(by_host));
                (batch, owner, Some(token.secret))
            }
        };
        let batch = batch.audit(draft.with("owner", owner));
        self.commit_named(batch, "organization or user").await?;
        Ok(token)
    }

    pub async fn show_organization(&self, caller: &Caller, name: &str) -> Result<Organization> {
        let standing = self.member(caller, name).await?;
        // Made by now, whoever looks first.
        self.external_id(standing.organization).await?;
        Ok(self.organization(standing.organization).await?.value)
    }

    /// Replaces the list of accounts. With an empty list no code is spent at all.
    pub async fn update_organization(
        self: &Arc<Self>,
        caller: &Caller,
        name: &str,
        aws_accounts: Vec<String>,
        proof: Option<GivenCode>,
    ) -> Result<Organization> {
        let standing = self.owner(caller, name).await?;
        if aws_accounts.len() > MOST_ACCOUNTS {
            return Err(Error::field("aws_accounts", "at most 100 accounts"));
        }
        let well_formed =
            |account: &String| account.len() == 12 && account.bytes().all(|b| b.is_ascii_digit());
        if let Some(bad) = aws_accounts.iter().find(|account| !well_formed(account)) {
            let message = format!("{bad:?} is no AWS account number; give its twelve digits");
            return Err(Error::field("aws_accounts", message));
        }
        self.external_id(standing.organization).await?;
        let organization = standing.organization;
        let change = GuardedChange::Accounts(aws_accounts);
        let intent = Intent { caller: caller.clone(), organization, change };
        self.change_guarded(intent, proof).await?;
        Ok(self.organization(organization).await?.value)
    }

    /// Makes the commit that replaces the list.
    pub(super) async fn accounts_batch(
        &self,
        caller: &Caller,
        organization: OrganizationId,
        aws_accounts: &[String],
    ) -> Result<Batch> {
        let found = self.organization(organization).await?;
        let mut next = found.value.clone();
        next.aws_accounts = aws_accounts.to_vec();
        let subject = format!("organization {}", next.name);
        let draft = self
            .draft(organization, caller.audit_name(), "update_organization", subject)
            .with("aws_accounts_before", found.value.aws_accounts)
            .with("aws_accounts_after", next.aws_accounts.clone());
        Ok(Batch::new().put(found.key, Expect::At(found.version), encode(&next)).audit(draft))
    }
}

#[cfg(test)]
mod tests {
    use latchkey_domain::policy::MfaPolicy;

    use super::*;
    use crate::app::PageRequest;
    use crate::app::audit_trail::AuditFilter;
    use crate::app::fixture::{Fixture, ORGANIZATION};

    #[tokio::test]
    async fn the_host_makes_an_organization_for_who_is_there_or_for_a_new_owner() {
        let fixture = Fixture::new(MfaPolicy::Never).await;
        let (app, ada) = (&fixture.app, &fixture.owner);
        let existing = || FirstOwner::Existing("ada".into());
        assert!(app.create_organization("web", existing()).await.unwrap().is_none());
        let token = app.create_organization("shop", FirstOwner::New("eve".into())).await.unwrap();
        let eve = app.caller(&token.unwrap()).await.unwrap();

        let roles = async |caller: &Caller| {
            let mut roles = app.who_am_i(caller).await.unwrap().memberships;
            roles.sort_by(|one, other| one.0.cmp(&other.0));
            roles
        };
        let owner = |name: &str| (name.to_owned(), Role::Owner);
        assert_eq!(roles(ada).await, [owner(ORGANIZATION), owner("web")]);
        assert_eq!(roles(&eve).await, [owner("shop")]);
        let records = app.list_audit(&eve, "shop", AuditFilter::default(), PageRequest::default());
        let made = records.await.unwrap().items.remove(0).draft;
        assert_eq!((made.actor.as_str(), made.action.as_str()), ("host", "create_organization"));
        assert_eq!(made.details["owner"], "eve");
        assert!(app.show_organization(&eve, "web").await.is_err());

        let refused = async |name: &str, owner| {
            app.create_organization(name, owner).await.unwrap_err().reason()
        };
        assert_eq!(refused("web", existing()).await, Reason::NameTaken);
        assert_eq!(refused("new", FirstOwner::Existing("nobody".into())).await, Reason::NotFound);
        assert_eq!(refused("new", FirstOwner::New("ada".into())).await, Reason::NameTaken);
        assert_eq!(refused("No", existing()).await, Reason::FieldInvalid);
    }

    #[tokio::test]
    async fn an_external_id_is_made_once_and_recorded() {
        let fixture = Fixture::new(MfaPolicy::Never).await;
        for _ in 0..2 {
            fixture.app.show_organization(&fixture.owner, ORGANIZATION).await.unwrap();
        }
        let made = ("make_external_id".to_owned(), "system".to_owned());
        let audited = fixture.audited().await;
        assert_eq!(audited.iter().filter(|record| **record == made).count(), 1);
    }
}
