//! Tokens for programs: made, listed, revoked.

use std::collections::BTreeMap;
use std::time::Duration;

use latchkey_domain::id::{EnvironmentId, OrganizationId, ServiceTokenId};
use latchkey_domain::time::Timestamp;
use latchkey_proto::v1::Reason;
use secrecy::SecretString;

use super::people::MOST_ENVIRONMENTS;
use super::{App, Page, PageRequest, check_name, check_request_id};
use crate::audit::Draft;
use crate::auth::{Caller, sha256};
use crate::error::{Error, Result, rfc3339};
use crate::store::keys::Kind;
use crate::store::record::people::{Access, Bearer, ServiceToken, Token};
use crate::store::record::{Loaded, Text, decode, encode};
use crate::store::{Batch, CommitError, Expect, Key, Scan, keys};

const DEFAULT_LIFETIME: Duration = Duration::from_secs(90 * 86_400);
const LONGEST_LIFETIME: Duration = Duration::from_secs(366 * 86_400);

/// What a service token may do, and where.
#[derive(Clone, Debug, Default)]
pub struct TokenScope {
    pub access: Access,
    /// Names; none is all, also those to come.
    pub environments: Vec<String>,
}

/// A service token with the names that people know; without its secret.
#[derive(Clone, Debug)]
pub struct ServiceTokenView {
    pub record: ServiceToken,
    pub access: Access,
    /// In the order of names; none is all.
    pub environments: Vec<String>,
}

impl App {
    pub async fn create_service_token(
        &self,
        caller: &Caller,
        organization: &str,
        name: &str,
        lifetime: Option<Duration>,
        scope: TokenScope,
        request_id: &str,
    ) -> Result<(SecretString, Timestamp)> {
        let standing = self.owner(caller, organization).await?;
        let (access, environments) = self.token_scope(standing.organization, scope).await?;
        check_name("name", name)?;
        check_request_id(request_id)?;
        let lifetime = lifetime.unwrap_or(DEFAULT_LIFETIME);
        if lifetime.is_zero() || lifetime > LONGEST_LIFETIME {
            return Err(Error::field("lifetime", "a service token lives up to 366 days"));
        }
        let organization = standing.organization;
        let id = id_of(organization, name);
        let what = format!("service token {name}");
        let token = self.token_for(caller, "lks_", organization, &what, request_id);
        let expires_at = self.now() + lifetime;
        let bearer = Bearer::Service {
            id: Text(id),
            organization: Text(organization),
            name: name.to_owned(),
        };
        let record =
            Token { bearer, expires_at: Some(expires_at.into()), sign_in: None, used_at: None };
        let service = ServiceToken {
            name: name.to_owned(),
            created_by: caller.name().to_owned(),
            created_at: self.now().into(),
            expires_at: expires_at.into(),
            access,
            environments,
            token: Some(Text(token.digest)),
        };
        let subject = format!("service-token {name}");
        let draft = self.draft(organization, caller.audit_name(), "create_service_token", subject);
        let draft = with_scope(draft, &service);
        let batch = Batch::new()
            .put(keys::service_token(organization, id), Expect::Absent, encode(&service))
            .put(keys::token(token.digest.as_bytes()), Expect::Absent, encode(&record))
            .audit(draft);
        let stored = keys::token(token.digest.as_bytes());
        self.commit_token(&standing, batch, &token, "service token").await?;
        let stored: Option<Loaded<Token>> = self.fetch(stored).await?;
        let expires_at = stored.and_then(|token| token.value.expires_at).map(Timestamp::from);
        Ok((token.secret, expires_at.unwrap_or(self.now() + lifetime)))
    }

    async fn token_scope(
        &self,
        organization: OrganizationId,
        scope: TokenScope,
    ) -> Result<(Access, BTreeMap<Text<EnvironmentId>, Access>)> {
        let access = scope.access;
        if !matches!(access, Access::Read | Access::Write) {
            return Err(Error::field("access", "a service token may READ or WRITE"));
        }
        if scope.environments.is_empty() {
            return Ok((access, BTreeMap::new()));
        }
        if scope.environments.len() > MOST_ENVIRONMENTS {
            return Err(Error::field("environments", "name up to 100, or none for all"));
        }
        let mut environments = BTreeMap::new();
        for name in &scope.environments {
            let missing = |_| Error::field("environments", format!("there is no `{name}`"));
            let found = self.environment_named(organization, name).await.map_err(missing)?;
            environments.insert(Text(found.value.id), access);
        }
        Ok((Access::None, environments))
    }

    /// Lists service tokens, in no order that means anything.
    pub async fn list_service_tokens(
        &self,
        caller: &Caller,
        organization: &str,
        page: PageRequest,
    ) -> Result<Page<ServiceTokenView>> {
        let standing = self.owner(caller, organization).await?;
        let (size, organization) = (page.size()?, standing.organization);
        let after = page.after::<ServiceTokenId>()?.map(|id| keys::service_token(organization, id));
        let scan = Scan::ascending(keys::service_tokens_of(organization), size + 1).after(after);
        let (mut items, mut next, mut last) = (vec![], None, None);
        for (key, found) in self.scan(scan).await? {
            if items.len() == size {
                next = last.map(|id: ServiceTokenId| id.to_string());
                break;
            }
            last = key.last_id().map(ServiceTokenId::from_bytes);
            items.push(self.service_token_view(organization, decode(&key, &found)?).await?);
        }
        Ok(Page { items, next })
    }

    async fn service_token_view(
        &self,
        organization: OrganizationId,
        record: ServiceToken,
    ) -> Result<ServiceTokenView> {
        let mut environments = vec![];
        for Text(id) in record.environments.keys() {
            match self.environment(organization, *id).await {
                Ok(found) => environments.push(found.value.name),
                Err(error) if error.reason() == Reason::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        environments.sort();
        // All that are named have the same.
        let access = record.environments.values().next().copied().unwrap_or(record.access);
        Ok(ServiceTokenView { record, access, environments })
    }

    /// Ends a service token: calls from the next on, and its open streams.
    pub async fn revoke_service_token(
        &self,
        caller: &Caller,
        organization: &str,
        name: &str,
    ) -> Result<()> {
        let standing = self.owner(caller, organization).await?;
        let organization = standing.organization;
        let missing = || Error::not_found("service token");
        let id = id_of(organization, name);
        let found: Loaded<ServiceToken> =
            self.fetch(keys::service_token(organization, id)).await?.ok_or_else(missing)?;
        let subject = format!("service-token {name}");
        let draft = self.draft(organization, caller.audit_name(), "revoke_service_token", subject);
        let draft = with_scope(draft, &found.value);
        let mut batch = Batch::new().delete(found.key, Expect::At(found.version));
        let tokens = match found.value.token {
            Some(Text(digest)) => vec![keys::token(digest.as_bytes())],
            None => self.tokens_of_service(id).await?,
        };
        // Else it would be good again once another one has the name.
        for token in tokens {
            batch = batch.delete(token, Expect::Anything);
        }
        match self.store.commit(batch.audit(draft)).await {
            Ok(_) => Ok(()),
            Err(CommitError::Conflict { .. }) => Err(missing()),
            Err(error @ CommitError::Store(_)) => Err(error.into()),
        }
    }

    async fn tokens_of_service(&self, service: ServiceTokenId) -> Result<Vec<Key>> {
        let mut tokens = vec![];
        for (key, found) in self.list(keys::all(Kind::Token)).await? {
            let token: Token = decode(&key, &found)?;
            match token.bearer {
                Bearer::Service { id, .. } if id.0 == service => tokens.push(key),
                Bearer::Service { .. } | Bearer::User { .. } => {}
            }
        }
        Ok(tokens)
    }
}

/// Tells what a token was good for. Environments by id: their names may be long, and many.
fn with_scope(draft: Draft, token: &ServiceToken) -> Draft {
    let environments: serde_json::Map<String, serde_json::Value> = token
        .environments
        .iter()
        .map(|(Text(id), access)| (id.to_string(), access.as_str().into()))
        .collect();
    draft
        .with("access", token.access.as_str())
        .with("environments", environments)
        .with("expires_at", rfc3339(token.expires_at.into()))
}

/// Names are unique within an organization because the id is derived from both.
fn id_of(organization: OrganizationId, name: &str) -> ServiceTokenId {
    let named = sha256(format!("{organization}:{name}").as_bytes());
    let (id, _) = named.as_bytes().split_first_chunk::<16>().expect("a digest has 32 bytes");
    ServiceTokenId::from_uuid(uuid::Uuid::new_v8(*id))
}

#[cfg(test)]
mod tests {
    use latchkey_domain::policy::MfaPolicy;

    use super::*;
    use crate::app::fixture::{ENVIRONMENT, Fixture, ORGANIZATION};
    use crate::app::open_streams::Ground;

    #[tokio::test]
    async fn a_revoked_token_is_refused_at_once_and_does_not_come_back_with_its_name() {
        let fixture = Fixture::new(MfaPolicy::Never).await;
        let (app, owner) = (&fixture.app, &fixture.owner);
        let scope = || TokenScope { access: Access::Write, environments: vec![ENVIRONMENT.into()] };
        let make = async |request: &str| {
            app.create_service_token(owner, ORGANIZATION, "ci", None, scope(), request).await
        };
        let (old, _) = make("one").await.unwrap();
        let proof = app.prove(&old).await.unwrap();
        let run = fixture.try_queue(&proof.caller, "first").await.unwrap();
        let lost = app.hold(&proof, Ground::Run(run.id)).await.unwrap();

        let page = app.list_service_tokens(owner, ORGANIZATION, PageRequest::default()).await;
        let listed = page.unwrap().items;
        assert_eq!(listed.len(), 1);
        assert_eq!(listed[0].environments, [ENVIRONMENT]);
        assert_eq!((listed[0].access, listed[0].record.name.as_str()), (Access::Write, "ci"));

        app.revoke_service_token(owner, ORGANIZATION, "ci").await.unwrap();
        assert_eq!(app.caller(&old).await.unwrap_err().reason(), Reason::IdentityRequired);
        assert_eq!(lost.await.reason(), Reason::IdentityRequired);
        let again = app.revoke_service_token(owner, ORGANIZATION, "ci").await;
        assert_eq!(again.unwrap_err().reason(), Reason::NotFound);
        // A late repeat makes nothing.
        let repeat = make("one").await.unwrap_err();
        assert_eq!(repeat.field_name(), Some("request_id"));
        let (new, _) = make("two").await.unwrap();
        assert!(app.caller(&new).await.is_ok());
        assert!(app.caller(&old).await.is_err());
    }

    #[tokio::test]
    async fn owners_alone_list_and_revoke() {
        let fixture = Fixture::new(MfaPolicy::Never).await;
        let bob = fixture.member("bob", Access::Admin).await;
        let app = &fixture.app;
        let listed = app.list_service_tokens(&bob, ORGANIZATION, PageRequest::default()).await;
        assert_eq!(listed.unwrap_err().reason(), Reason::NotAllowed);
        let revoked = app.revoke_service_token(&bob, ORGANIZATION, "ci").await;
        assert_eq!(revoked.unwrap_err().reason(), Reason::NotAllowed);
    }
}
