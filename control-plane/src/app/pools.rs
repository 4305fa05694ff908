//! Pools, the tokens that buy certificates for them, and the runners that did.

use std::time::Duration;

use latchkey_domain::id::{Digest, OrganizationId, PoolId, RunnerId};
use latchkey_domain::time::Timestamp;
use latchkey_proto::v1::Reason;
use secrecy::{ExposeSecret, SecretString};

use super::environments::request_owner;
use super::runners::revoked;
use super::{App, check_name, check_request_id};
use crate::auth::{Caller, RunnerIdentity, token_digest};
use crate::authority::Issued;
use crate::error::{Error, Result};
use crate::store::record::runner::{Pool, PoolToken, Runner};
use crate::store::record::{Loaded, Text, encode};
use crate::store::{Batch, CommitError, Expect, keys};

const DEFAULT_LIFETIME: Duration = Duration::from_secs(15 * 60);
const LONGEST_LIFETIME: Duration = Duration::from_secs(30 * 86_400);
/// The token's record names every buyer.
const MOST_USES: u32 = 500;
/// Each lost race is another host's gain, so a token is fought for no longer than it has uses.
const ATTEMPTS: u32 = MOST_USES + 1;

fn rejected() -> Error {
    Error::refused(
        Reason::PoolTokenRejected,
        "the pool token is unknown, used up or expired; make one with `latchkey pool token`",
    )
}

/// A runner's identity, made now.
#[derive(Debug)]
pub struct Enrolled {
    pub runner: RunnerId,
    pub issued: Issued,
}

impl App {
    pub async fn create_pool(
        &self,
        caller: &Caller,
        organization: &str,
        name: &str,
        request_id: &str,
    ) -> Result<Pool> {
        let standing = self.owner(caller, organization).await?;
        check_name("pool", name)?;
        check_request_id(request_id)?;
        let organization = standing.organization;
        let request =
            keys::request(request_owner(caller), &format!("pool:{organization}:{request_id}"));
        if let Some(made) = self.fetch::<Text<PoolId>>(request.clone()).await? {
            return self.pool(organization, made.value.0).await;
        }
        let id = PoolId::from_uuid(self.new_id());
        let pool = Pool {
            id: Text(id),
            organization: Text(organization),
            name: name.to_owned(),
            created_at: self.now().into(),
        };
        let batch = Batch::new()
            .put(keys::pool(organization, id), Expect::Absent, encode(&pool))
            .put(keys::pool_by_name(organization, name), Expect::Absent, encode(&Text(id)))
            .put(request, Expect::Absent, encode(&Text(id)))
            .audit(self.draft(
                organization,
                caller.audit_name(),
                "create_pool",
                format!("pool {name}"),
            ));
        self.commit_named(batch, "pool").await?;
        Ok(pool)
    }

    pub(super) async fn pool(&self, organization: OrganizationId, id: PoolId) -> Result<Pool> {
        let found: Option<Loaded<Pool>> = self.fetch(keys::pool(organization, id)).await?;
        Ok(found.ok_or_else(|| Error::not_found("pool"))?.value)
    }

    /// Makes a token that carries the CA's fingerprint beside its secret.
    pub async fn create_pool_token(
        &self,
        caller: &Caller,
        organization: &str,
        pool: &str,
        lifetime: Option<Duration>,
        uses: u32,
        request_id: &str,
    ) -> Result<(SecretString, Timestamp)> {
        let standing = self.owner(caller, organization).await?;
        check_request_id(request_id)?;
        let lifetime = lifetime.unwrap_or(DEFAULT_LIFETIME);
        if lifetime.is_zero() || lifetime > LONGEST_LIFETIME {
            return Err(Error::field("lifetime", "a pool token lives up to 30 days"));
        }
        let uses = uses.max(1);
        if uses > MOST_USES {
            return Err(Error::field("uses", "a pool token has 1 to 500 uses"));
        }
        let organization = standing.organization;
        let id: Loaded<Text<PoolId>> = self
            .fetch(keys::pool_by_name(organization, pool))
            .await?
            .ok_or_else(|| Error::not_found("pool"))?;
        let what = format!("pool {pool}");
        let token = self.token_for(caller, "lkp_", organization, &what, request_id);
        let expires_at = self.now() + lifetime;
        let record = PoolToken {
            pool: id.value,
            organization: Text(organization),
            expires_at: expires_at.into(),
            uses,
            bought_by: vec![],
        };
        let draft = self
            .draft(organization, caller.audit_name(), "create_pool_token", format!("pool {pool}"))
            .with("uses", uses);
        let batch = Batch::new()
            .put(keys::pool_token(token.digest.as_bytes()), Expect::Absent, encode(&record))
            .audit(draft);
        let stored = keys::pool_token(token.digest.as_bytes());
        match self.store.commit(standing.guard(batch)).await {
            Ok(_) => {}
            // The same request has made it before, or else somebody takes the role from the caller.
            Err(error) => match self.store.fetch(&stored).await? {
                Some(_) => {}
                None => return Err(error.into()),
            },
        }
        let stored: Option<Loaded<PoolToken>> = self.fetch(stored).await?;
        let expires_at = stored.map_or(expires_at, |token| token.value.expires_at.into());
        let fingerprint = self.authority.fingerprint();
        let shown = format!("{}.{fingerprint}", token.secret.expose_secret());
        Ok((shown.into(), expires_at))
    }

    /// Sells a client certificate for the key in the request. A repeat with the same key and
    /// token is answered with the same runner and not charged.
    pub async fn enroll(
        &self,
        token: &SecretString,
        certificate_request: &[u8],
        name: &str,
    ) -> Result<Enrolled> {
        check_name("name", name)?;
        for _ in 0..ATTEMPTS {
            if let Some(enrolled) = self.try_enroll(token, certificate_request, name).await? {
                return Ok(enrolled);
            }
        }
        Err(rejected())
    }

    /// `None` when another host used the token at the same moment.
    async fn try_enroll(
        &self,
        token: &SecretString,
        certificate_request: &[u8],
        name: &str,
    ) -> Result<Option<Enrolled>> {
        let key = keys::pool_token(token_digest(token).as_bytes());
        let found: Loaded<PoolToken> = self.fetch(key).await?.ok_or_else(rejected)?;
        if Timestamp::from(found.value.expires_at) <= self.now() {
            return Err(rejected());
        }
        let request = self.authority.read_request(certificate_request)?;
        let fingerprint: Digest = request.key();
        let by_key = keys::runner_by_key(fingerprint.as_bytes());
        if let Some(known) = self.fetch::<Text<RunnerId>>(by_key.clone()).await? {
            if !found.value.bought_by.contains(&Text(fingerprint)) {
                return Err(rejected());
            }
            self.identity_guard(known.value.0).await?;
            let issued = self.authority.issue(request, known.value.0)?;
            return Ok(Some(Enrolled { runner: known.value.0, issued }));
        }
        if found.value.bought_by.len() >= found.value.uses as usize {
            return Err(rejected());
        }
        let id = RunnerId::from_uuid(self.new_id());
        let issued = self.authority.issue(request, id)?;
        let mut sold = found.value.clone();
        sold.bought_by.push(Text(fingerprint));
        let organization = sold.organization.0;
        let runner = Runner {
            id: Text(id),
            name: name.to_owned(),
            pool: sold.pool,
            organization: sold.organization,
            key: Text(fingerprint),
            enrolled_at: self.now().into(),
            said: None,
            drained_at: None,
            revoked_at: None,
            fought_at: None,
        };
        let draft = self
            .draft(organization, format!("runner {id}"), "enroll_runner", format!("runner {id}"))
            .with("name", name)
            .with("key", fingerprint.to_string());
        let batch = Batch::new()
            .put(found.key, Expect::At(found.version), encode(&sold))
            .put(keys::runner(id), Expect::Absent, encode(&runner))
            .put(by_key, Expect::Absent, encode(&Text(id)))
            .put(keys::runner_by_pool(sold.pool.0, id), Expect::Absent, [])
            .audit(draft);
        match self.store.commit(batch).await {
            Ok(_) => Ok(Some(Enrolled { runner: id, issued })),
            Err(CommitError::Conflict { .. }) => Ok(None),
            Err(error @ CommitError::Store(_)) => Err(error.into()),
        }
    }

    /// Proves a runner by the key of its certificate.
    pub async fn runner_with_key(&self, key: &Digest) -> Result<RunnerIdentity> {
        let unknown = || {
            Error::refused(
                Reason::IdentityRequired,
                "the certificate's key belongs to no enrolled runner; enroll it with a pool token",
            )
        };
        let id: Loaded<Text<RunnerId>> =
            self.fetch(keys::runner_by_key(key.as_bytes())).await?.ok_or_else(unknown)?;
        let found: Loaded<Runner> =
            self.fetch(keys::runner(id.value.0)).await?.ok_or_else(unknown)?;
        let Runner { id, name, pool, organization, revoked_at, .. } = found.value;
        if revoked_at.is_some() {
            return Err(revoked());
        }
        Ok(RunnerIdentity { id: id.0, name, pool: pool.0, organization: organization.0 })
    }
}

#[cfg(test)]
mod tests;
