//! People: the first owner, users, who is calling.
//!
//! The first start prints a one-time secret. Whoever brings it makes the first organization and
//! owns it; the secret is spent by the same commit.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use latchkey_domain::id::{OrganizationId, UserId};
use latchkey_proto::v1::Reason;
use secrecy::SecretString;

use super::environments::request_owner;
use super::members::with_member;
use super::{App, check_name, check_request_id};
use crate::auth::{Caller, NewToken, Standing, token_digest};
use crate::error::{Error, Result};
use crate::store::record::glass::BrokenGlass;
use crate::store::record::people::{
    Access, Bearer, Bootstrap, HandedOver, Membership, Organization, Role, Token, User,
};
use crate::store::record::{Loaded, Text, encode};
use crate::store::{Batch, CommitError, Expect, Key, keys};

/// How many environments a service token or a membership names.
pub(super) const MOST_ENVIRONMENTS: usize = 100;
const BOOTSTRAP: &str = "bootstrap";
/// How long a person has to set a password with the token that an owner has handed over.
pub(super) const HANDED_OVER_FOR: Duration = Duration::from_secs(7 * 86_400);

/// What a caller learns of itself.
#[derive(Debug)]
pub struct Who {
    pub caller: Caller,
    pub memberships: Vec<(String, Role)>,
    /// With the organization's name; what an owner has not acknowledged.
    pub broken_glass: Vec<(String, BrokenGlass)>,
}

impl App {
    /// Makes the one-time secret, anew at each start until it is spent: what was printed may have
    /// been lost.
    pub async fn prepare_bootstrap(&self) -> Result<Option<SecretString>> {
        let key = keys::setting(BOOTSTRAP);
        let expect = match self.fetch::<Bootstrap>(key.clone()).await? {
            Some(found) if found.value.spent_at.is_some() => return Ok(None),
            Some(found) => Expect::At(found.version),
            None => Expect::Absent,
        };
        let token = NewToken::generate("lkb_")?;
        let record = Bootstrap { secret: Text(token.digest), spent_at: None };
        match self.store.commit(Batch::new().put(key, expect, encode(&record))).await {
            Ok(_) => Ok(Some(token.secret)),
            Err(CommitError::Conflict { .. }) => Ok(None),
            Err(error @ CommitError::Store(_)) => Err(error.into()),
        }
    }

    pub async fn bootstrap(
        &self,
        secret: &SecretString,
        organization: &str,
        user: &str,
    ) -> Result<SecretString> {
        let rejected = || {
            Error::refused(
                Reason::IdentityRequired,
                "the one-time secret is wrong or spent; it was printed at the first start",
            )
        };
        let key = keys::setting(BOOTSTRAP);
        let stored: Loaded<Bootstrap> = self.fetch(key).await?.ok_or_else(rejected)?;
        let known = stored.value.secret.0;
        let given = token_digest(secret);
        let same: bool =
            subtle::ConstantTimeEq::ct_eq(known.as_bytes().as_slice(), given.as_bytes().as_slice())
                .into();
        if !same || stored.value.spent_at.is_some() {
            return Err(rejected());
        }
        check_name("organization", organization)?;
        check_name("user", user)?;
        let now = self.now();
        let id = OrganizationId::from_uuid(self.new_id());
        let spent = Bootstrap { spent_at: Some(now.into()), ..stored.value };
        let record = Organization {
            id: Text(id),
            name: organization.to_owned(),
            aws_accounts: vec![],
            external_id: String::new(),
            guarded: false,
            created_at: now.into(),
        };
        let token = NewToken::generate("lk_")?;
        let position = (Role::Owner, Access::Admin);
        let batch = self.new_user(Batch::new(), id, user, position, &token, None);
        let batch = batch
            .put(stored.key, Expect::At(stored.version), encode(&spent))
            .put(keys::organization(id), Expect::Absent, encode(&record))
            .put(keys::organization_by_name(organization), Expect::Absent, encode(&Text(id)))
            .audit(self.draft(id, format!("user {user}"), "bootstrap", format!("user {user}")));
        self.store.commit(batch).await.map_err(|error| match error {
            CommitError::Conflict { .. } => rejected(),
            CommitError::Store(_) => error.into(),
        })?;
        Ok(token.secret)
    }

    pub(super) fn new_user(
        &self,
        batch: Batch,
        organization: OrganizationId,
        name: &str,
        (role, access): (Role, Access),
        token: &NewToken,
        handed_over: Option<HandedOver>,
    ) -> Batch {
        let id = UserId::from_uuid(self.new_id());
        let bearer = Bearer::User { id: Text(id), name: name.to_owned() };
        let expires_at = handed_over.as_ref().map(|_| (self.now() + HANDED_OVER_FOR).into());
        let record = Token { bearer, expires_at, sign_in: None, used_at: None };
        let created_at = self.now().into();
        let user = User { id: Text(id), name: name.to_owned(), created_at, handed_over };
        let membership = Membership {
            role,
            access,
            environments: BTreeMap::new(),
            created_at: Some(self.now().into()),
        };
        let batch = batch
            .put(keys::user(id), Expect::Absent, encode(&user))
            .put(keys::user_by_name(name), Expect::Absent, encode(&Text(id)))
            .put(keys::token(token.digest.as_bytes()), Expect::Absent, encode(&record));
        with_member(batch, organization, id, &membership)
    }

    /// Makes the token that answers a request: always the same for the same request, so that a
    /// repeat after a lost answer is answered, though only its digest is stored.
    pub(super) fn token_for(
        &self,
        caller: &Caller,
        prefix: &str,
        organization: OrganizationId,
        what: &str,
        request_id: &str,
    ) -> NewToken {
        let (owner, generation) = (request_owner(caller), self.generation.get());
        let intent = format!("{owner}:{organization}:{what}:{request_id}:{generation}");
        NewToken::of(prefix, &self.master.digest(b"token for a request", intent.as_bytes()))
    }

    /// Tells whether a request has made its token before. One that has ended since does not come
    /// back: whoever ended it may have had a reason.
    pub(super) async fn made_before(&self, caller: &Caller, token: &NewToken) -> Result<bool> {
        if self.store.fetch(&made_token(caller, token)).await?.is_none() {
            return Ok(false);
        }
        match self.live_token(token.digest).await {
            Ok(_) => Ok(true),
            Err(error) if error.reason() == Reason::IdentityRequired => Err(Error::field(
                "request_id",
                "it made a token that has ended since; give a new request_id",
            )),
            Err(error) => Err(error),
        }
    }

    /// Commits a batch that makes a token, or finds that the same request has made it before.
    pub(super) async fn commit_token(
        &self,
        standing: &Standing,
        batch: Batch,
        token: &NewToken,
        what: &str,
    ) -> Result<()> {
        let made = made_token(&standing.caller, token);
        let batch = standing.guard(batch.put(made, Expect::Absent, []));
        match self.store.commit(batch).await {
            Ok(_) => Ok(()),
            Err(error @ CommitError::Conflict { .. }) => {
                if self.made_before(&standing.caller, token).await? {
                    return Ok(());
                }
                match &error {
                    CommitError::Conflict { key } if *key == standing.rests_on.0 => {
                        Err(error.into())
                    }
                    CommitError::Conflict { .. } | CommitError::Store(_) => Err(taken(what)),
                }
            }
            Err(error @ CommitError::Store(_)) => Err(error.into()),
        }
    }

    /// Refuses to let somebody into another organization who has set no password since an owner
    /// made or reset them: the key to their account may be in other hands, and once they are in
    /// two organizations neither of them can reset who never had one. The commit rests on the
    /// user's record.
    pub(super) fn check_own_keys(user: &User, into: OrganizationId) -> Result<()> {
        if user.handed_over.as_ref().is_none_or(|token| token.by.0 == into) {
            return Ok(());
        }
        let message = "the user has set no password since they were made or reset, so that \
                       somebody else may have a token of theirs; they set one first";
        Err(Error::refused(Reason::WrongState, message))
    }

    /// Refuses what an organization may not do with an account that others rely on, too.
    pub(super) async fn check_unshared(
        &self,
        user: UserId,
        organization: OrganizationId,
    ) -> Result<()> {
        let memberships = self.list(keys::memberships_by_user(user)).await?;
        let elsewhere = memberships
            .iter()
            .any(|(key, _)| key.last_id().map(OrganizationId::from_bytes) != Some(organization));
        if elsewhere {
            return Err(Error::refused(
                Reason::UserShared,
                "the user belongs to other organizations, too, and no single one of them may take \
                 the account over; remove them here, or have them sign in with their password",
            ));
        }
        Ok(())
    }

    /// Makes a user of an organization. Users' names are unique in the whole control plane.
    pub async fn create_user(
        &self,
        caller: &Caller,
        organization: &str,
        name: &str,
        role: Role,
        access: Access,
        request_id: &str,
    ) -> Result<SecretString> {
        let standing = self.owner(caller, organization).await?;
        check_name("user", name)?;
        check_request_id(request_id)?;
        let organization = standing.organization;
        let what = format!("user {name}");
        let token = self.token_for(caller, "lk_", organization, &what, request_id);
        if self.made_before(caller, &token).await? {
            // Answered only to who could reset the user as well.
            let missing = || Error::not_found("member of this organization");
            let user = self.user_named(name).await?.ok_or_else(missing)?.value.id.0;
            self.membership(organization, user).await?.ok_or_else(missing)?;
            self.check_unshared(user, organization).await?;
            return Ok(token.secret);
        }
        let handed_over = HandedOver { token: Text(token.digest), by: Text(organization) };
        let position = (role, access);
        let batch =
            self.new_user(Batch::new(), organization, name, position, &token, Some(handed_over));
        let batch = batch.audit(
            self.draft(
                standing.organization,
                caller.audit_name(),
                "create_user",
                format!("user {name}"),
            )
            .with("role", role.as_str())
            .with("access", access.as_str()),
        );
        self.commit_token(&standing, batch, &token, "user").await?;
        Ok(token.secret)
    }

    /// Commits a batch in which a conflict means that the name is taken.
    pub(super) async fn commit_named(&self, batch: Batch, what: &str) -> Result<()> {
        match self.store.commit(batch).await {
            Ok(_) => Ok(()),
            Err(CommitError::Conflict { .. }) => Err(taken(what)),
            Err(error @ CommitError::Store(_)) => Err(error.into()),
        }
    }

    pub async fn who_am_i(self: &Arc<Self>, caller: &Caller) -> Result<Who> {
        let (mut memberships, mut broken_glass) = (vec![], vec![]);
        match caller {
            Caller::User { id, .. } => {
                for (key, found) in self.list(keys::memberships_by_user(*id)).await? {
                    let Some(organization) = key.last_id().map(OrganizationId::from_bytes) else {
                        continue;
                    };
                    let membership: Membership = crate::store::record::decode(&key, &found)?;
                    let name = self.organization(organization).await?.value.name;
                    if membership.role == Role::Owner {
                        let unseen = self.unseen_glass(organization, *id).await?.into_iter();
                        broken_glass.extend(unseen.map(|glass| (name.clone(), glass)));
                    }
                    memberships.push((name, membership.role));
                }
            }
            Caller::Service { organization, .. } => {
                let name = self.organization(*organization).await?.value.name;
                memberships.push((name, Role::Member));
            }
        }
        Ok(Who { caller: caller.clone(), memberships, broken_glass })
    }
}

pub(super) fn taken(what: &str) -> Error {
    let message = format!("the name is taken by another {what}; choose another");
    Error::refused(Reason::NameTaken, message)
}

/// Where it is kept that a request has made its token, also once the token has ended.
pub(super) fn made_token(caller: &Caller, token: &NewToken) -> Key {
    keys::request(request_owner(caller), &format!("token:{}", token.digest))
}
