//! Passwords, and the sessions that they open.
//!
//! A sign-in tells nobody which accounts exist: an unknown name, a user without a password and a
//! wrong password take the same steps, one hash among them, and get the same answer. A right
//! password is checked before anything is written, and the commit rests on the password still
//! being that one.
//!
//! A session ends 12 hours after its sign-in, whatever is done with it. Refused sign-ins are not
//! audited one by one, or strangers could fill the chain: the next one that succeeds says how many
//! there were, and so does one record an hour while an account's throttle holds.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use latchkey_domain::id::{OrganizationId, SignInId, UserId};
use latchkey_domain::time::Timestamp;
use latchkey_proto::v1::Reason;
use secrecy::SecretString;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::{App, check_name};
use crate::auth::password::{self, Hashed};
use crate::auth::throttle::{Attempt, Throttle};
use crate::auth::{Caller, NewToken, Proof};
use crate::blocking;
use crate::error::{Error, Result, rfc3339};
use crate::store::keys::Kind;
use crate::store::record::people::{Bearer, Password, SignIn, Token, User};
use crate::store::record::{Loaded, Text, decode, encode};
use crate::store::{Batch, CommitError, Expect, Key, keys};

/// Marks the tokens of sessions.
const PREFIX: &str = "lki_";
const LIFETIME: Duration = Duration::from_secs(12 * 3600);
/// How many sessions a user has at once.
const MOST_SESSIONS: usize = 100;
const LONGEST_CLIENT: usize = 64;
const HOUR: i64 = 3_600_000;

/// How many passwords are hashed at once, 19 MiB each, and how many wait for it.
const HASHING: usize = 2;
const WAITING: usize = 64;

/// How many of those wait who change their own: strangers do not take their places.
const CHANGING: usize = 16;

/// How many names are kept between two rounds of telling.
const MOST_GUESSED: usize = 1024;

/// How often a lost race is run again.
const ATTEMPTS: usize = 16;

/// Keeps those out who guess passwords, and the work of checking them bounded.
#[derive(Debug)]
pub struct Gate {
    throttle: Throttle,
    /// Of users who are known, by their ids: nobody else charges them.
    changes: Throttle,
    hashing: Arc<Semaphore>,
    waiting: Arc<Semaphore>,
    changing: Arc<Semaphore>,
    /// Names whose throttle holds, with how many attempts were refused; not told yet.
    guessed: Mutex<BTreeMap<String, u32>>,
}

/// A place among those whose password is looked at; the work keeps it until it has ended.
type Place = Arc<OwnedSemaphorePermit>;

impl Default for Gate {
    fn default() -> Self {
        Self {
            throttle: Throttle::default(),
            changes: Throttle::default(),
            hashing: Arc::new(Semaphore::new(HASHING)),
            waiting: Arc::new(Semaphore::new(WAITING)),
            changing: Arc::new(Semaphore::new(CHANGING)),
            guessed: Mutex::default(),
        }
    }
}

impl Gate {
    /// Keeps that a name is being guessed at, for who tells it: told here, it would take longer
    /// where there is such a user.
    fn note_guesses(&self, name: &str, attempt: Attempt, now: Timestamp) {
        let mut guessed = self.guessed.lock().unwrap_or_else(PoisonError::into_inner);
        if guessed.len() < MOST_GUESSED
            && let Some(refused) = self.throttle.untold(attempt, now)
        {
            guessed.insert(name.to_owned(), refused);
        }
    }

    /// Does the work of one password on a thread of its own. Who no longer waits for it does not
    /// make room for more of it.
    async fn hash<T: Send + 'static>(
        &self,
        place: &Place,
        work: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let turn = Arc::clone(&self.hashing).acquire_owned().await.map_err(Error::internal)?;
        let kept = (turn, Arc::clone(place));
        let work = move || {
            let done = work();
            drop(kept);
            done
        };
        blocking::spawn(work).await.map_err(Error::internal)?
    }
}

/// A session as its owner sees it.
#[derive(Clone, Debug)]
pub struct SessionView {
    pub id: SignInId,
    pub client: String,
    pub created_at: Timestamp,
    pub expires_at: Timestamp,
    /// To the hour.
    pub used_at: Option<Timestamp>,
    pub is_current: bool,
}

impl App {
    /// Makes a session for who knows the password.
    pub async fn sign_in(
        &self,
        name: &str,
        password: SecretString,
        client: &str,
        source: Option<IpAddr>,
    ) -> Result<(SecretString, SessionView)> {
        check_name("user", name)?;
        password::check("password", &password)?;
        let well_formed = |c: char| !c.is_control();
        if client.chars().count() > LONGEST_CLIENT || !client.chars().all(well_formed) {
            return Err(Error::field("client", "up to 64 characters, none of them of control"));
        }
        let attempt = Attempt::new(name, source);
        let place = self.place(&self.sign_ins.waiting)?;
        // The same whether there is such a user.
        self.sign_ins.throttle.begin(attempt, self.now()).map_err(|retry_at| {
            self.sign_ins.note_guesses(name, attempt, self.now());
            throttled(retry_at)
        })?;
        let user = self.user_named(name).await?;
        // Of nobody where there is no such user, so that as much is asked of the store.
        let id = user.as_ref().map_or(UserId::from_bytes([0; 16]), |user| user.value.id.0);
        let known = self.password_of(id).await?;
        let hashed = known.as_ref().map_or_else(Hashed::nobodys, |(_, hashed)| hashed.clone());
        let is_right = self.sign_ins.hash(&place, move || hashed.is_of(&password)).await?;
        let (Some(mut user), Some((stored, _)), true) = (user, known, is_right) else {
            self.sign_ins.throttle.refused(attempt);
            // Not the name: a password may have been typed in its place.
            tracing::info!(?source, "a sign-in was refused");
            return Err(rejected());
        };
        let refused = self.sign_ins.throttle.refusals(attempt);
        let mut attempts = 0;
        let opened = loop {
            attempts += 1;
            match self.begin_session(&user, &stored, client, refused).await {
                Err(error) if error.reason() == Reason::ChangedMeanwhile && attempts < ATTEMPTS => {
                }
                answer => break answer?,
            }
            // Another sign-in, or who has the last word: then the password is not that one.
            user = self.user_named(name).await?.ok_or_else(rejected)?;
        };
        // Only now: their number is in the record.
        self.sign_ins.throttle.succeeded(attempt);
        Ok(opened)
    }

    /// Tells in the audit whose passwords are being guessed, once an hour for each.
    pub async fn tell_guesses(&self) -> Result<()> {
        let guessed = {
            let mut guessed = self.sign_ins.guessed.lock().unwrap_or_else(PoisonError::into_inner);
            std::mem::take(&mut *guessed)
        };
        for (name, refused) in guessed {
            let Some(user) = self.user_named(&name).await? else { continue };
            for (key, _) in self.list(keys::memberships_by_user(user.value.id.0)).await? {
                let Some(id) = key.last_id().map(OrganizationId::from_bytes) else { continue };
                let draft = self.draft(id, "system", "sign_in_throttled", format!("user {name}"));
                let draft = draft.with("refused", refused);
                self.store.commit(Batch::new().audit(draft)).await?;
            }
        }
        Ok(())
    }

    async fn begin_session(
        &self,
        user: &Loaded<User>,
        password: &Loaded<Password>,
        client: &str,
        refused: u32,
    ) -> Result<(SecretString, SessionView)> {
        let (now, user_id) = (self.now(), user.value.id.0);
        let id = SignInId::from_uuid(self.new_id());
        let token = NewToken::generate(PREFIX)?;
        let expires_at = now + LIFETIME;
        let bearer = Bearer::User { id: user.value.id, name: user.value.name.clone() };
        let record = Token {
            bearer,
            expires_at: Some(expires_at.into()),
            sign_in: Some(Text(id)),
            used_at: Some(hour(now).into()),
        };
        let session = SignIn {
            token: Text(token.digest),
            client: client.to_owned(),
            created_at: now.into(),
            expires_at: expires_at.into(),
        };
        let mut batch = Batch::new()
            // Whoever resets the user or sets another password has the last word: they rest on the
            // user's record, too, and one who has missed this session reads again.
            .put(user.key.clone(), Expect::At(user.version), encode(&user.value))
            .check(password.key.clone(), Expect::At(password.version))
            .put(keys::token(token.digest.as_bytes()), Expect::Absent, encode(&record))
            .put(keys::sign_in(user_id, id), Expect::Absent, encode(&session));
        let open = self.open_sessions(user_id).await?;
        for (key, session) in open.iter().rev().skip(MOST_SESSIONS - 1) {
            batch = without_session(batch, key, session);
        }
        let details = [("refused_before", refused.into())];
        let batch = self.audit_user(batch, user_id, &user.value.name, "sign_in", details).await?;
        self.store.commit(batch).await?;
        let view = SessionView {
            id,
            client: client.to_owned(),
            created_at: now,
            expires_at,
            used_at: Some(hour(now)),
            is_current: true,
        };
        Ok((token.secret, view))
    }

    /// Ends the session that the caller came with.
    pub async fn sign_out(&self, proof: &Proof) -> Result<()> {
        let id = proof.sign_in.ok_or_else(|| {
            let message = "no such session: this token was not made by a sign-in, and stays good \
                           until `latchkey password` or its end";
            Error::refused(Reason::NotFound, message)
        })?;
        self.end_session(proof, id, "sign_out").await
    }

    pub async fn revoke_session(&self, proof: &Proof, id: SignInId) -> Result<()> {
        self.end_session(proof, id, "revoke_session").await
    }

    async fn end_session(&self, proof: &Proof, id: SignInId, action: &str) -> Result<()> {
        let (user, name) = proof.caller.person()?;
        let missing = || Error::not_found("session of yours");
        let found: Loaded<SignIn> =
            self.fetch(keys::sign_in(user, id)).await?.ok_or_else(missing)?;
        let batch = Batch::new()
            .delete(found.key, Expect::At(found.version))
            .delete(keys::token(found.value.token.0.as_bytes()), Expect::Anything);
        let batch = self.audit_user(batch, user, name, action, []).await?;
        match self.store.commit(batch).await {
            Ok(_) => Ok(()),
            Err(CommitError::Conflict { .. }) => Err(missing()),
            Err(error @ CommitError::Store(_)) => Err(error.into()),
        }
    }

    /// Lists the caller's own sessions, newest first.
    pub async fn list_sessions(&self, proof: &Proof) -> Result<Vec<SessionView>> {
        let (user, _) = proof.caller.person()?;
        let mut views = vec![];
        for (key, session) in self.open_sessions(user).await?.into_iter().rev() {
            let Some(id) = key.last_id().map(SignInId::from_bytes) else { continue };
            let token: Option<Loaded<Token>> =
                self.fetch(keys::token(session.token.0.as_bytes())).await?;
            views.push(SessionView {
                id,
                client: session.client,
                created_at: session.created_at.into(),
                expires_at: session.expires_at.into(),
                used_at: token.and_then(|token| token.value.used_at).map(Timestamp::from),
                is_current: proof.sign_in == Some(id),
            });
        }
        Ok(views)
    }

    /// Sets the caller's own password and answers how many other sessions that ended.
    pub async fn set_password(
        &self,
        proof: &Proof,
        current: SecretString,
        new: SecretString,
        source: Option<IpAddr>,
    ) -> Result<usize> {
        let (id, name) = proof.caller.person()?;
        password::check("new_password", &new)?;
        let known = self.password_of(id).await?;
        let place = self.place(&self.sign_ins.changing)?;
        let attempt = Attempt::of_user(id, source);
        self.sign_ins.changes.begin_account(attempt, self.now()).map_err(throttled)?;
        // A session is not enough: somebody may have found it open.
        if proof.sign_in.is_some() {
            self.check_current(&place, known.as_ref(), current).await?;
        }
        let hashed = self.sign_ins.hash(&place, move || Hashed::of(&new)).await?;
        let key = keys::password(id);
        let record = Password {
            sealed: self.seal_value(&key, &hashed.to_text()),
            set_at: self.now().into(),
        };
        let expect = known.map_or(Expect::Absent, |(found, _)| Expect::At(found.version));
        let mut attempts = 0;
        loop {
            attempts += 1;
            let batch = Batch::new().put(key.clone(), expect, encode(&record));
            match self.commit_password(proof, (id, name), batch).await {
                // A sign-in came in between, perhaps.
                Err(error) if error.reason() == Reason::ChangedMeanwhile && attempts < ATTEMPTS => {
                }
                Err(error) => return Err(error),
                Ok(ended) => {
                    self.sign_ins.changes.succeeded(attempt);
                    return Ok(ended);
                }
            }
        }
    }

    /// Commits a new password with the end of all that somebody else may know: the other sessions
    /// and every token that no password opened.
    async fn commit_password(
        &self,
        proof: &Proof,
        (id, name): (UserId, &str),
        batch: Batch,
    ) -> Result<usize> {
        let user = self.user_named(name).await?;
        let user = user.ok_or_else(|| Error::internal("a token of a user who does not exist"))?;
        // Asked after the user was read: a reset meanwhile either is seen here or refuses the
        // commit.
        self.live_token(proof.token).await?;
        let next = User { handed_over: None, ..user.value.clone() };
        let batch = batch.put(user.key, Expect::At(user.version), encode(&next));
        let (mut batch, tokens) = self.without_tokens_of(id, batch).await?;
        let mut ended = 0_usize;
        for (key, session) in self.open_sessions(id).await? {
            if key.last_id().map(SignInId::from_bytes) != proof.sign_in {
                batch = without_session(batch, &key, &session);
                ended += 1;
            }
        }
        let details = [("ended_sessions", ended.into()), ("ended_tokens", tokens.into())];
        let batch = self.audit_user(batch, id, name, "set_password", details).await?;
        self.store.commit(batch).await?;
        Ok(ended)
    }

    /// Adds to a batch the end of a user's tokens that no password opened, and says how many.
    /// Those that the batch names already stay as it says.
    pub(super) async fn without_tokens_of(
        &self,
        user: UserId,
        mut batch: Batch,
    ) -> Result<(Batch, usize)> {
        let mut ended = 0;
        for (key, found) in self.list(keys::all(Kind::Token)).await? {
            let token: Token = decode(&key, &found)?;
            let is_theirs = match token.bearer {
                Bearer::User { id, .. } => id.0 == user,
                Bearer::Service { .. } => false,
            };
            if is_theirs && token.sign_in.is_none() && !batch.names(&key) {
                batch = batch.delete(key, Expect::Anything);
                ended += 1;
            }
        }
        Ok((batch, ended))
    }

    async fn check_current(
        &self,
        place: &Place,
        known: Option<&(Loaded<Password>, Hashed)>,
        current: SecretString,
    ) -> Result<()> {
        let hashed = known.map_or_else(Hashed::nobodys, |(_, hashed)| hashed.clone());
        let is_right = password::check("current_password", &current).is_ok()
            && self.sign_ins.hash(place, move || hashed.is_of(&current)).await?;
        match known.is_some() && is_right {
            true => Ok(()),
            false => Err(Error::field("current_password", "it is not your current password")),
        }
    }

    /// Takes a place among those whose password is looked at.
    fn place(&self, places: &Arc<Semaphore>) -> Result<Place> {
        let soon = self.now() + Duration::from_secs(1);
        let place = Arc::clone(places).try_acquire_owned().map_err(|_| throttled(soon))?;
        Ok(Arc::new(place))
    }

    async fn password_of(&self, user: UserId) -> Result<Option<(Loaded<Password>, Hashed)>> {
        let key = keys::password(user);
        let Some(found) = self.fetch::<Password>(key.clone()).await? else { return Ok(None) };
        let hashed = Hashed::parse(&self.open_value(&key, &found.value.sealed)?)?;
        Ok(Some((found, hashed)))
    }

    /// Returns a user's sessions, oldest first, without those that have run out.
    pub(super) async fn open_sessions(&self, user: UserId) -> Result<Vec<(Key, SignIn)>> {
        let now = self.now();
        let mut open = vec![];
        for (key, found) in self.list(keys::sign_ins_of(user)).await? {
            let session: SignIn = decode(&key, &found)?;
            if Timestamp::from(session.expires_at) > now {
                open.push((key, session));
            }
        }
        Ok(open)
    }

    /// Keeps the hour in which a session was used. That it cannot be kept is no reason to refuse
    /// the call.
    pub(super) async fn note_use(&self, found: &Loaded<Token>) {
        let now = hour(self.now());
        let is_known = found.value.used_at.is_some_and(|at| Timestamp::from(at) >= now);
        if found.value.sign_in.is_none() || is_known {
            return;
        }
        let used = Token { used_at: Some(now.into()), ..found.value.clone() };
        let batch = Batch::new().put(found.key.clone(), Expect::At(found.version), encode(&used));
        match self.store.commit(batch).await {
            // Somebody else kept it, or the session has ended.
            Ok(_) | Err(CommitError::Conflict { .. }) => {}
            Err(error @ CommitError::Store(_)) => {
                tracing::warn!(error = %error, "a session's use was not kept");
            }
        }
    }

    /// Deletes the sessions that have run out, and the tokens of persons. Those of programs are
    /// listed until somebody revokes them.
    pub async fn prune_sessions(&self) -> Result<()> {
        let now = self.now();
        for (key, found) in self.list(keys::all(Kind::Token)).await? {
            let token: Token = decode(&key, &found)?;
            let is_over = token.expires_at.is_some_and(|at| Timestamp::from(at) <= now);
            let is_of_person = matches!(token.bearer, Bearer::User { .. });
            if is_over && is_of_person && token.sign_in.is_none() {
                self.store.commit(Batch::new().delete(key, Expect::Anything)).await?;
            }
        }
        for (key, found) in self.list(keys::all(Kind::SignIn)).await? {
            let session: SignIn = decode(&key, &found)?;
            if Timestamp::from(session.expires_at) <= now {
                self.store.commit(without_session(Batch::new(), &key, &session)).await?;
            }
        }
        Ok(())
    }

    /// Ends every session, as after a restore: which were revoked since is not known.
    pub(super) async fn void_sessions(&self) -> Result<()> {
        for (key, found) in self.list(keys::all(Kind::SignIn)).await? {
            let session: SignIn = decode(&key, &found)?;
            self.store.commit(without_session(Batch::new(), &key, &session)).await?;
        }
        Ok(())
    }

    /// Tells every organization that somebody belongs to what they did with their account; not
    /// from where: each of them would learn what is the others'.
    async fn audit_user<const N: usize>(
        &self,
        mut batch: Batch,
        user: UserId,
        name: &str,
        action: &str,
        details: [(&'static str, serde_json::Value); N],
    ) -> Result<Batch> {
        for (key, _) in self.list(keys::memberships_by_user(user)).await? {
            let Some(organization) = key.last_id().map(OrganizationId::from_bytes) else {
                continue;
            };
            let who = Caller::User { id: user, name: name.to_owned() }.audit_name();
            let mut draft = self.draft(organization, who.clone(), action, who);
            for (name, value) in &details {
                draft = draft.with(*name, value.clone());
            }
            batch = batch.audit(draft);
        }
        Ok(batch)
    }
}

/// Ends a session within a batch.
pub(super) fn without_session(batch: Batch, key: &Key, session: &SignIn) -> Batch {
    let token = keys::token(session.token.0.as_bytes());
    batch.delete(key.clone(), Expect::Anything).delete(token, Expect::Anything)
}

fn hour(time: Timestamp) -> Timestamp {
    Timestamp::from_millis(time.as_millis().div_euclid(HOUR) * HOUR)
}

fn rejected() -> Error {
    Error::refused(
        Reason::SignInRejected,
        "the name or the password is wrong; who has no password yet sets one with their token",
    )
}

fn throttled(retry_at: Timestamp) -> Error {
    let at = rfc3339(retry_at);
    let message = format!("too many attempts to sign in; come again at {at}");
    Error::refused(Reason::SignInThrottled, message).with("retry_at", at)
}

#[cfg(test)]
mod tests;
