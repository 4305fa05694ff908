//! A new token for somebody who has lost theirs.
//!
//! An owner may do it for a member of their own organization alone: who is in several has an
//! account that none of them may take over. The commit rests on that: becoming a member elsewhere
//! gives the user's record another version.

use std::sync::Arc;

use latchkey_proto::v1::Reason;
use secrecy::SecretString;

use super::people::{HANDED_OVER_FOR, made_token};
use super::sessions::without_session;
use super::{App, check_request_id};
use crate::auth::Caller;
use crate::error::{Error, Result};
use crate::store::keys::VariableScope;
use crate::store::record::people::{Bearer, HandedOver, SignIn, Token};
use crate::store::record::variable::Variable;
use crate::store::record::{Text, decode, encode};
use crate::store::{Batch, Expect, keys};

/// How often a lost race is run again.
const ATTEMPTS: usize = 16;

impl App {
    /// Ends all that a user could prove themselves by, and makes a new token. Their personal
    /// variables go, too: whoever hands the new token over could read them.
    pub async fn reset_user(
        self: &Arc<Self>,
        caller: &Caller,
        organization: &str,
        name: &str,
        request_id: &str,
    ) -> Result<SecretString> {
        check_request_id(request_id)?;
        let mut attempts = 0;
        loop {
            attempts += 1;
            match self.try_reset(caller, organization, name, request_id).await {
                // Somebody may sign in as the user all the time: that is what this is to end.
                Err(error) if error.reason() == Reason::ChangedMeanwhile && attempts < ATTEMPTS => {
                }
                answer => return answer,
            }
        }
    }

    async fn try_reset(
        self: &Arc<Self>,
        caller: &Caller,
        organization: &str,
        name: &str,
        request_id: &str,
    ) -> Result<SecretString> {
        let standing = self.owner(caller, organization).await?;
        let organization = standing.organization;
        let what = format!("reset of user {name}");
        let token = self.token_for(caller, "lk_", organization, &what, request_id);
        let new = keys::token(token.digest.as_bytes());
        let missing = || Error::not_found("member of this organization");
        // Read before the memberships that it guards.
        let mut user = self.user_named(name).await?.ok_or_else(missing)?;
        let id = user.value.id.0;
        let membership = self.membership(organization, id).await?.ok_or_else(missing)?;
        self.check_unshared(id, organization).await?;
        if self.made_before(caller, &token).await? {
            return Ok(token.secret);
        }
        let record = Token {
            bearer: Bearer::User { id: Text(id), name: user.value.name.clone() },
            expires_at: Some((self.now() + HANDED_OVER_FOR).into()),
            sign_in: None,
            used_at: None,
        };
        user.value.handed_over =
            Some(HandedOver { token: Text(token.digest), by: Text(organization) });
        let own = standing.rests_on.0 == membership.key;
        let version = if own { standing.rests_on.1 } else { membership.version };
        let mut batch = Batch::new()
            .put(user.key, Expect::At(user.version), encode(&user.value))
            // No personal variable is set by who was let before.
            .put(membership.key, Expect::At(version), encode(&membership.value))
            .delete(keys::password(id), Expect::Anything)
            .put(made_token(caller, &token), Expect::Absent, [])
            .put(new, Expect::Absent, encode(&record));
        if !own {
            batch = standing.guard(batch);
        }
        let mut sessions = 0_usize;
        for (key, found) in self.list(keys::sign_ins_of(id)).await? {
            let session: SignIn = decode(&key, &found)?;
            batch = without_session(batch, &key, &session);
            sessions += 1;
        }
        let (mut batch, tokens) = self.without_tokens_of(id, batch).await?;
        let personal = self.list(keys::variables_of(VariableScope::Personal(organization, id)));
        let personal = personal.await?;
        let draft = self
            .draft(organization, caller.audit_name(), "reset_user", format!("user {name}"))
            .with("ended_tokens", tokens)
            .with("ended_sessions", sessions)
            .with("personal_variables", personal.len());
        for (key, found) in personal {
            let variable: Variable = decode(&key, &found)?;
            batch = self.end_value(batch, organization, &variable).await?;
            batch = batch.delete(key, Expect::Anything);
        }
        self.store.commit(batch.audit(draft)).await?;
        self.collect_garbage_soon();
        Ok(token.secret)
    }
}

#[cfg(test)]
mod tests {
    use crate::app::PageRequest;
    use crate::app::fixture::{Fixture, ORGANIZATION};
    use crate::app::members::MemberChange;
    use crate::app::organizations::FirstOwner;
    use crate::app::variables::{NewVariable, Scope};
    use crate::store::record::people::{Access, Role};
    use crate::store::record::variable::Category;
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
        let bob = fixture.create_user("bob", Role::Member, Access::Write).await;
        let first = FirstOwner::New("eve".into());
        let eve = app.create_organization("other", first).await.unwrap().unwrap();
        let eve = app.caller(&eve).await.unwrap();
        let error = app.reset_user(&eve, "other", "bob", "grab").await.unwrap_err();
        assert_eq!(error.reason(), Reason::NotFound);
        let change = MemberChange { role: Some(Role::Member), ..MemberChange::default() };
        // Who made bob still has a key to the account.
        let early = app.add_member(&eve, "other", "bob", change.clone()).await;
        assert_eq!(early.unwrap_err().reason(), Reason::WrongState);
        let proof = app.prove(&bob).await.unwrap();
        app.set_password(&proof, "".into(), "bob's long password".into(), None).await.unwrap();
        assert!(app.caller(&bob).await.is_err());
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
        let bob = fixture.create_user("bob", Role::Member, Access::Write).await;
        let proof = fixture.app.prove(&bob).await.unwrap();
        let password = SecretString::from("bob's long password");
        fixture.app.set_password(&proof, "".into(), password, None).await.unwrap();
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
    async fn a_late_repeat_of_a_reset_ends_nothing_and_brings_nothing_back() {
        let fixture = Fixture::new(MfaPolicy::Never).await;
        let (app, owner) = (&fixture.app, &fixture.owner);
        let made = fixture.create_user("bob", Role::Member, Access::Write).await;
        let bob = app.caller(&made).await.unwrap();
        let variable = NewVariable {
            name: "mine".into(),
            category: Category::Terraform,
            value: "value".into(),
            sensitive: false,
            hcl: false,
        };
        app.set_variable(&bob, ORGANIZATION, &Scope::Personal, variable, None).await.unwrap();
        app.reset_user(owner, ORGANIZATION, "bob", "one").await.unwrap();
        let page = PageRequest::default();
        let listed = app.list_variables(&bob, ORGANIZATION, &Scope::Personal, page).await.unwrap();
        assert!(listed.items.is_empty());
        let good = app.reset_user(owner, ORGANIZATION, "bob", "two").await.unwrap();
        let late = app.reset_user(owner, ORGANIZATION, "bob", "one").await.unwrap_err();
        assert_eq!(late.field_name(), Some("request_id"));
        app.caller(&good).await.unwrap();
        let (role, access) = (Role::Member, Access::Write);
        let late = app.create_user(owner, ORGANIZATION, "bob", role, access, "make-bob").await;
        assert_eq!(late.unwrap_err().field_name(), Some("request_id"));
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
