//! A new token for somebody who has lost theirs.
//!
//! An owner may do it for a member of their own organization alone: who is in several has an
//! account that none of them may take over. The commit rests on that: becoming a member elsewhere
//! gives the user's record another version.

use latchkey_domain::id::OrganizationId;
use latchkey_proto::v1::Reason;
use secrecy::SecretString;

use super::sessions::without_session;
use super::{App, check_request_id};
use crate::auth::Caller;
use crate::error::{Error, Result};
use crate::store::keys::Kind;
use crate::store::record::people::{Bearer, Role, SignIn, Token};
use crate::store::record::{Text, decode, encode};
use crate::store::{Batch, Expect, keys};

impl App {
    /// Ends all that a user could prove themselves by, and makes a new token.
    pub async fn reset_user(
        &self,
        caller: &Caller,
        organization: &str,
        name: &str,
        request_id: &str,
    ) -> Result<SecretString> {
        let standing = self.owner(caller, organization).await?;
        check_request_id(request_id)?;
        let organization = standing.organization;
        let what = format!("reset of user {name}");
        let token = self.token_for(caller, "lk_", organization, &what, request_id);
        let new = keys::token(token.digest.as_bytes());
        if self.store.fetch(&new).await?.is_some() {
            return Ok(token.secret);
        }
        let missing = || Error::not_found("member of this organization");
        // Read before the memberships that it guards.
        let user = self.user_named(name).await?.ok_or_else(missing)?;
        let id = user.value.id.0;
        let membership = self.membership(organization, id).await?.ok_or_else(missing)?;
        let elsewhere =
            self.list(keys::memberships_by_user(id)).await?.iter().any(|(key, _)| {
                key.last_id().map(OrganizationId::from_bytes) != Some(organization)
            });
        if elsewhere {
            return Err(Error::refused(
                Reason::UserShared,
                "the user belongs to other organizations, too, and no single one of them may take \
                 the account over; remove them here, or have them sign in with their password",
            ));
        }
        let record = Token {
            bearer: Bearer::User { id: Text(id), name: user.value.name.clone() },
            expires_at: None,
            sign_in: None,
            used_at: None,
        };
        let mut batch = Batch::new()
            .put(user.key, Expect::At(user.version), encode(&user.value))
            .check(membership.key, Expect::At(membership.version))
            .delete(keys::password(id), Expect::Anything)
            .put(new, Expect::Absent, encode(&record));
        let (own, _) = caller.person()?;
        if own != id {
            let found = self.membership(organization, own).await?;
            let owner = found.filter(|found| found.value.role == Role::Owner);
            let owner = owner.ok_or_else(crate::auth::hidden)?;
            batch = batch.check(owner.key, Expect::At(owner.version));
        }
        let (mut tokens, mut sessions) = (0_usize, 0_usize);
        for (key, found) in self.list(keys::sign_ins_of(id)).await? {
            let session: SignIn = decode(&key, &found)?;
            batch = without_session(batch, &key, &session);
            sessions += 1;
        }
        for (key, found) in self.list(keys::all(Kind::Token)).await? {
            let token: Token = decode(&key, &found)?;
            let is_theirs = match token.bearer {
                Bearer::User { id: bearer, .. } => bearer.0 == id,
                Bearer::Service { .. } => false,
            };
            if is_theirs && !batch.names(&key) {
                batch = batch.delete(key, Expect::Anything);
                tokens += 1;
            }
        }
        let draft = self
            .draft(organization, caller.audit_name(), "reset_user", format!("user {name}"))
            .with("ended_tokens", tokens)
            .with("ended_sessions", sessions);
        self.store.commit(batch.audit(draft)).await?;
        Ok(token.secret)
    }
}

#[cfg(test)]
mod tests {
    use crate::app::fixture::{Fixture, ORGANIZATION};
    use crate::app::members::MemberChange;
    use crate::app::organizations::FirstOwner;
    use crate::store::record::people::Access;
    use latchkey_domain::policy::MfaPolicy;

    use super::*;

    #[tokio::test]
    async fn a_reset_ends_every_token_session_and_password_and_answers_a_repeat_alike() {
        let fixture = Fixture::new(MfaPolicy::Never).await;
        let (app, owner) = (&fixture.app, &fixture.owner);
        let old = fixture.create_user("bob", Role::Member, Access::Write).await;
        let proof = app.prove(&old).await.unwrap();
        let password = || SecretString::from("bob's long password");
        app.set_password(&proof, "".into(), password(), None).await.unwrap();
        let (session, _) = app.sign_in("bob", password(), "test", None).await.unwrap();

        let new = app.reset_user(owner, ORGANIZATION, "bob", "lost").await.unwrap();
        let again = app.reset_user(owner, ORGANIZATION, "bob", "lost").await.unwrap();
        assert_eq!(app.caller(&new).await.unwrap(), app.caller(&again).await.unwrap());
        for ended in [&old, &session] {
            let error = app.caller(ended).await.unwrap_err();
            assert_eq!(error.reason(), Reason::IdentityRequired);
        }
        let error = app.sign_in("bob", password(), "test", None).await.unwrap_err();
        assert_eq!(error.reason(), Reason::SignInRejected);
    }

    #[tokio::test]
    async fn who_is_in_two_organizations_is_reset_by_neither() {
        let fixture = Fixture::new(MfaPolicy::Never).await;
        let (app, owner) = (&fixture.app, &fixture.owner);
        fixture.create_user("bob", Role::Member, Access::Write).await;
        let first = FirstOwner::New("eve".into());
        let eve = app.create_organization("other", first).await.unwrap().unwrap();
        let eve = app.caller(&eve).await.unwrap();
        let error = app.reset_user(&eve, "other", "bob", "grab").await.unwrap_err();
        assert_eq!(error.reason(), Reason::NotFound);
        let change = MemberChange { role: Some(Role::Member), ..MemberChange::default() };
        app.add_member(&eve, "other", "bob", change).await.unwrap();
        for (caller, organization) in [(owner, ORGANIZATION), (&eve, "other")] {
            let reset = app.reset_user(caller, organization, "bob", "grab").await;
            assert_eq!(reset.unwrap_err().reason(), Reason::UserShared);
        }
        app.remove_member(&eve, "other", "bob").await.unwrap();
        app.reset_user(owner, ORGANIZATION, "bob", "lost").await.unwrap();
    }

    #[tokio::test]
    async fn a_reset_and_a_membership_elsewhere_do_not_pass_each_other() {
        let fixture = Fixture::new(MfaPolicy::Never).await;
        fixture.create_user("bob", Role::Member, Access::Write).await;
        let first = FirstOwner::New("eve".into());
        let eve = fixture.app.create_organization("other", first).await.unwrap().unwrap();
        let eve = fixture.app.caller(&eve).await.unwrap();
        let app = fixture.in_twos().await;
        let (reset, added) = tokio::join!(
            app.reset_user(&fixture.owner, ORGANIZATION, "bob", "lost"),
            app.add_member(&eve, "other", "bob", MemberChange::default()),
        );
        assert!(reset.is_ok() != added.is_ok(), "{:?}", added.map(drop));
    }

    #[tokio::test]
    async fn only_owners_reset_somebody() {
        let fixture = Fixture::new(MfaPolicy::Never).await;
        let bob = fixture.create_user("bob", Role::Member, Access::Admin).await;
        let bob = fixture.app.caller(&bob).await.unwrap();
        let error = fixture.app.reset_user(&bob, ORGANIZATION, "ada", "grab").await.unwrap_err();
        assert_eq!(error.reason(), Reason::NotAllowed);
    }
}
