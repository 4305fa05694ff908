//! The use cases, one per file. Each takes a proved caller, checks its right first, decides
//! through the domain, commits, and performs what follows after that.
//!
//! Nothing here knows of gRPC, of sled or of AWS's SDK.

mod archive_check;
pub mod artifacts;
pub mod audit_trail;
pub mod authenticate_run;
pub mod break_glass;
pub mod check_environment;
mod chunks;
mod claims;
pub mod configurations;
mod credentials;
pub mod decide_run;
pub mod environments;
pub mod finish_job;
#[cfg(test)]
pub(crate) mod fixture;
pub mod forecast;
mod garbage;
pub mod guarded_change;
pub mod history;
pub mod lease_job;
pub mod limits;
pub mod locks;
pub mod members;
pub mod notices;
pub mod open_streams;
pub mod organizations;
pub mod people;
mod plan_facts;
#[cfg(test)]
mod policy_table;
#[cfg(test)]
mod policy_tests;
pub mod pools;
pub mod quarantine;
pub mod queue_run;
pub mod reset_user;
pub mod restore;
pub mod retry_run;
#[cfg(test)]
mod rights_tests;
pub mod run_output;
pub mod runners;
mod secrets;
pub mod service_tokens;
pub mod sessions;
pub mod settings;
pub mod start_job;
pub mod state_diff;
mod state_file;
pub mod state_lock;
pub mod states;
pub mod top_up;
mod transition;
mod turns;
#[cfg(test)]
mod two_at_once_tests;
pub mod uploads;
pub mod variables;
pub mod view_runs;

use std::sync::Arc;
use std::time::Duration;

use latchkey_domain::id::{Digest, EnvironmentId, Generation, OrganizationId, RunId};
use latchkey_domain::run::Run;
use latchkey_domain::time::Timestamp;
use latchkey_proto::v1::Reason;
use secrecy::SecretString;
use uuid::Uuid;

use crate::audit::Draft;
use crate::auth::revocation::Revocations;
use crate::auth::{self, Caller, Position, Proof, Right, Standing, token_digest};
use crate::authority::Authority;
use crate::blobs::Blobs;
use crate::clock::Clock;
use crate::dispatch;
use crate::error::{Error, Result};
use crate::notices::Outbound;
use crate::run_log::RunLogs;
use crate::seal::MasterKey;
use crate::store::record::environment::{Environment, EnvironmentRecord};
use crate::store::record::people::{Bearer, Membership, Organization, ServiceToken, Token};
use crate::store::record::run::RunRecord;
use crate::store::record::{self, Loaded, Text};
use crate::store::{Key, Prefix, Scan, Store, Version, Versioned, keys};
use crate::sts::Sts;

/// What the use cases stand on.
pub struct App {
    pub store: Arc<dyn Store>,
    pub blobs: Blobs,
    pub logs: RunLogs,
    pub sts: Arc<dyn Sts>,
    pub clock: Arc<dyn Clock>,
    pub master: Arc<MasterKey>,
    pub authority: Arc<Authority>,
    pub dispatch: dispatch::Handle,
    pub generation: Generation,
    /// The least life a session must have when its phase starts.
    pub session_floor: Duration,
    /// The life of a lease without a heartbeat.
    pub lease_term: Duration,
    /// How long after a graceful cancel a forced one may follow.
    pub force_cancel_grace: Duration,
    pub gates: run_output::Gates,
    /// Whether this control plane runs on an old copy of its data.
    pub history: history::History,
    /// Ends the open streams of runners whose identity has ended.
    pub revocations: Revocations,
    /// When runs reach a limit of time.
    pub limits: limits::Timer,
    /// Keeps those out who guess passwords.
    pub sign_ins: sessions::Gate,
    /// What is on its way in.
    pub uploads: uploads::Uploads,
    /// What notices go out through.
    pub outbound: Arc<Outbound>,
}

impl std::fmt::Debug for App {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("App").field("generation", &self.generation).finish_non_exhaustive()
    }
}

impl App {
    pub fn now(&self) -> Timestamp {
        self.clock.now()
    }

    /// Makes an id whose order is that of its making.
    fn new_id(&self) -> Uuid {
        Uuid::now_v7()
    }

    /// Proves a person or program by its token.
    pub async fn caller(&self, token: &SecretString) -> Result<Caller> {
        Ok(self.prove(token).await?.caller)
    }

    /// Proves a person or program by its token, and keeps when a session was used.
    pub async fn prove(&self, token: &SecretString) -> Result<Proof> {
        let digest = token_digest(token);
        let found = self.live_token(digest).await?;
        self.note_use(&found).await;
        let Token { bearer, expires_at, sign_in, .. } = found.value;
        let caller = match bearer {
            Bearer::User { id, name } => Caller::User { id: id.0, name },
            Bearer::Service { id, organization, name } => {
                Caller::Service { id: id.0, organization: organization.0, name }
            }
        };
        let sign_in = sign_in.map(|sign_in| sign_in.0);
        let expires_at = expires_at.map(Timestamp::from);
        Ok(Proof { caller, token: digest, sign_in, expires_at })
    }

    /// Fetches a token that has not ended.
    async fn live_token(&self, digest: Digest) -> Result<Loaded<Token>> {
        let found: Option<Loaded<Token>> = self.fetch(keys::token(digest.as_bytes())).await?;
        let now = self.now();
        let lives = |token: &Token| token.expires_at.is_none_or(|at| Timestamp::from(at) > now);
        found.filter(|found| lives(&found.value)).ok_or_else(|| {
            let message = "the token is unknown, revoked or expired; sign in again";
            Error::refused(Reason::IdentityRequired, message)
        })
    }

    /// Checks that the caller belongs to the organization of this name.
    pub(crate) async fn member(&self, caller: &Caller, organization: &str) -> Result<Standing> {
        let organization = self.organization_named(organization).await?;
        self.standing_in(caller, organization, Right::Belong, None).await
    }

    /// Checks that the caller is an owner, in person, of the organization of this name.
    pub(crate) async fn owner(&self, caller: &Caller, organization: &str) -> Result<Standing> {
        let organization = self.organization_named(organization).await?;
        self.standing_in(caller, organization, Right::Own, None).await
    }

    /// Checks a caller's right on an environment. One that the caller may not even read is
    /// answered as one that does not exist.
    pub(crate) async fn on(
        &self,
        caller: &Caller,
        organization: &str,
        environment: &str,
        right: Right,
    ) -> Result<(Standing, Loaded<Environment>)> {
        let standing = self.member(caller, organization).await?;
        let found = self.environment_named(standing.organization, environment).await?;
        let position = &standing.position;
        auth::check(caller, Some(position), right, Some(found.value.id))?;
        Ok((standing, found))
    }

    async fn organization_named(&self, name: &str) -> Result<OrganizationId> {
        let id: Option<Loaded<Text<OrganizationId>>> =
            self.fetch(keys::organization_by_name(name)).await?;
        id.map(|id| id.value.0).ok_or_else(auth::hidden)
    }

    pub(crate) async fn standing_in(
        &self,
        caller: &Caller,
        organization: OrganizationId,
        right: Right,
        environment: Option<EnvironmentId>,
    ) -> Result<Standing> {
        let found = self.position(caller, organization).await?;
        auth::check(caller, found.as_ref().map(|found| &found.0), right, environment)?;
        let (position, rests_on) = found.ok_or_else(auth::hidden)?;
        let name = self.organization(organization).await?.value.name;
        let (caller, organization_name) = (caller.clone(), name);
        Ok(Standing { caller, organization, organization_name, position, rests_on })
    }

    /// Finds what the caller is in an organization, and the record that says so; `None` is nothing.
    async fn position(
        &self,
        caller: &Caller,
        organization: OrganizationId,
    ) -> Result<Option<(Position, (Key, Version))>> {
        Ok(match caller {
            Caller::User { id, .. } => {
                let membership: Option<Loaded<Membership>> =
                    self.fetch(keys::membership(organization, *id)).await?;
                membership.map(|found| (Position::from(found.value), (found.key, found.version)))
            }
            Caller::Service { id, organization: own, .. } if *own == organization => {
                let token: Option<Loaded<ServiceToken>> =
                    self.fetch(keys::service_token(organization, *id)).await?;
                token.map(|found| (Position::from(found.value), (found.key, found.version)))
            }
            Caller::Service { .. } => None,
        })
    }

    pub(crate) async fn organization(&self, id: OrganizationId) -> Result<Loaded<Organization>> {
        self.fetch(keys::organization(id)).await?.ok_or_else(|| Error::not_found("organization"))
    }

    pub(crate) async fn environment_named(
        &self,
        organization: OrganizationId,
        name: &str,
    ) -> Result<Loaded<Environment>> {
        let id: Loaded<Text<EnvironmentId>> = self
            .fetch(keys::environment_by_name(organization, name))
            .await?
            .ok_or_else(|| Error::not_found("environment"))?;
        self.environment(organization, id.value.0).await
    }

    pub(crate) async fn environment(
        &self,
        organization: OrganizationId,
        id: EnvironmentId,
    ) -> Result<Loaded<Environment>> {
        record::fetch::<EnvironmentRecord, _>(&*self.store, keys::environment(organization, id))
            .await?
            .ok_or_else(|| Error::not_found("environment"))
    }

    /// Fetches a run that the caller is known to have a right to, or that no caller asks for.
    pub(crate) async fn run(&self, id: RunId) -> Result<Loaded<Run>> {
        record::fetch::<RunRecord, _>(&*self.store, keys::run(id))
            .await?
            .ok_or_else(|| Error::not_found("run"))
    }

    /// Fetches a run, if the caller has the right in its organization. An id of another tenant
    /// is answered as one that does not exist.
    pub(crate) async fn run_for(
        &self,
        caller: &Caller,
        id: RunId,
        right: Right,
    ) -> Result<(Standing, Loaded<Run>)> {
        let run = self.run(id).await?;
        let request = &run.value.request;
        let environment = Some(request.environment);
        match self.standing_in(caller, request.organization, right, environment).await {
            Ok(standing) => Ok((standing, run)),
            Err(error) if error.reason() == Reason::NotFound => Err(Error::not_found("run")),
            Err(error) => Err(error),
        }
    }

    pub(crate) async fn fetch<T>(&self, key: Key) -> Result<Option<Loaded<T>>>
    where
        T: serde::de::DeserializeOwned,
    {
        Ok(record::fetch::<T, T>(&*self.store, key).await?)
    }

    pub(crate) async fn scan(&self, scan: Scan) -> Result<Vec<(Key, Versioned)>> {
        Ok(self.store.scan(scan).await?)
    }

    pub(crate) async fn list(&self, prefix: Prefix) -> Result<Vec<(Key, Versioned)>> {
        Ok(crate::store::list(&*self.store, prefix).await?)
    }

    pub(crate) fn draft(
        &self,
        organization: OrganizationId,
        actor: impl Into<String>,
        action: &str,
        subject: impl Into<String>,
    ) -> Draft {
        Draft::new(organization, self.now(), actor, action, subject)
    }
}

/// A page of a listing, and the token of the next.
#[derive(Debug)]
pub struct Page<T> {
    pub items: Vec<T>,
    pub next: Option<String>,
}

/// What a listing asks for.
#[derive(Clone, Debug, Default)]
pub struct PageRequest {
    /// 0 means [`PageRequest::DEFAULT`].
    pub size: u32,
    pub token: String,
}

impl PageRequest {
    pub const DEFAULT: usize = 50;
    pub const LIMIT: usize = 200;

    pub(crate) fn size(&self) -> Result<usize> {
        match usize::try_from(self.size).unwrap_or(usize::MAX) {
            0 => Ok(Self::DEFAULT),
            size if size <= Self::LIMIT => Ok(size),
            _ => Err(Error::field("page_size", "a page has 1 to 200 items; ask for fewer")),
        }
    }

    /// Reads the token as the id at which the last page ended.
    pub(crate) fn after<T: std::str::FromStr>(&self) -> Result<Option<T>> {
        if self.token.is_empty() {
            return Ok(None);
        }
        let token = self.token.parse().map_err(|_| {
            Error::field("page_token", "it is not one that the last page answered; begin again")
        })?;
        Ok(Some(token))
    }
}

/// Checks a name that people give: organizations, environments, users, pools.
pub(crate) fn check_name(field: &'static str, name: &str) -> Result<()> {
    let bytes = name.as_bytes();
    let ok = matches!(bytes.len(), 1..=63)
        && bytes[0].is_ascii_lowercase()
        && bytes.iter().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || *b == b'-');
    if ok {
        return Ok(());
    }
    Err(Error::field(
        field,
        "a name has 1 to 63 lower-case letters, digits and `-`, and begins with a letter",
    ))
}

/// Checks an id that makes a call repeatable.
pub(crate) fn check_request_id(request_id: &str) -> Result<()> {
    if (1..=64).contains(&request_id.len()) && request_id.bytes().all(|b| b.is_ascii_graphic()) {
        return Ok(());
    }
    Err(Error::field("request_id", "give 1 to 64 visible ASCII characters, unique per intent"))
}

pub(crate) fn parse_run_id(text: &str) -> Result<RunId> {
    text.parse().map_err(|_| Error::field("run_id", "it is not a run's id (a UUID)"))
}

pub(crate) fn parse_digest(field: &'static str, text: &str) -> Result<Digest> {
    text.parse().map_err(|_| Error::field(field, "it is not a SHA-256 digest in hex"))
}
