//! Passwords and sessions: what opens one, what ends one, and what a stranger learns.

use latchkey_domain::policy::MfaPolicy;
use secrecy::ExposeSecret;

use super::*;
use crate::app::audit_trail::AuditFilter;
use crate::app::fixture::{Fixture, ORGANIZATION};
use crate::app::open_streams::Ground;
use crate::app::service_tokens::TokenScope;
use crate::store::record::people::{Access, Role};

const PASSWORD: &str = "a long enough password";
const OTHER: &str = "another long password";

struct Scene {
    fixture: Fixture,
    /// Bob with the token that was handed over; with a password: with one that nobody else knows.
    bob: Proof,
}

async fn scene() -> Scene {
    let fixture = Fixture::new(MfaPolicy::Never).await;
    let token = fixture.create_user("bob", Role::Member, Access::Write).await;
    let bob = fixture.app.prove(&token).await.unwrap();
    Scene { fixture, bob }
}

impl Scene {
    async fn with_password() -> Self {
        let mut scene = scene().await;
        scene.set(&scene.bob, "", PASSWORD).await.unwrap();
        assert!(!scene.lives(&scene.bob).await);
        let token = NewToken::generate("lk_").unwrap();
        let id = Text(scene.bob.caller.person().unwrap().0);
        let bearer = Bearer::User { id, name: "bob".into() };
        let record = Token { bearer, expires_at: None, sign_in: None, used_at: None };
        let key = keys::token(token.digest.as_bytes());
        let batch = Batch::new().put(key, Expect::Absent, encode(&record));
        scene.fixture.store.commit(batch).await.unwrap();
        scene.bob = scene.fixture.app.prove(&token.secret).await.unwrap();
        scene
    }

    async fn set(&self, proof: &Proof, current: &str, new: &str) -> Result<usize> {
        self.fixture.app.set_password(proof, current.into(), new.into(), None).await
    }

    async fn try_sign_in(&self, name: &str, password: &str) -> Result<Proof> {
        let app = &self.fixture.app;
        let (token, _) = app.sign_in(name, password.into(), "laptop", None).await?;
        assert!(token.expose_secret().starts_with("lki_"));
        app.prove(&token).await
    }

    async fn sign_in(&self) -> Proof {
        self.try_sign_in("bob", PASSWORD).await.unwrap()
    }

    async fn lives(&self, proof: &Proof) -> bool {
        self.fixture.app.live_token(proof.token).await.is_ok()
    }
}

#[tokio::test]
async fn a_password_opens_a_session_for_twelve_hours() {
    let scene = Scene::with_password().await;
    let proof = scene.sign_in().await;
    assert_eq!(proof.caller, scene.bob.caller);
    scene.fixture.clock.advance(LIFETIME - Duration::from_secs(1));
    assert!(scene.lives(&proof).await);
    scene.fixture.clock.advance(Duration::from_secs(1));
    assert!(!scene.lives(&proof).await);
    assert!(scene.lives(&scene.bob).await);
    let app = &scene.fixture.app;
    assert!(app.list_sessions(&scene.bob).await.unwrap().is_empty());
    app.prune_sessions().await.unwrap();
    assert!(app.list(keys::all(Kind::SignIn)).await.unwrap().is_empty());
    assert!(app.store.fetch(&keys::token(proof.token.as_bytes())).await.unwrap().is_none());
}

#[tokio::test]
async fn unknown_passwordless_and_wrong_are_told_alike_and_throttled_alike() {
    let scene = Scene::with_password().await;
    // Ada has no password, and nobody is called eve.
    let mut told = vec![];
    for name in ["bob", "ada", "eve"] {
        let mut answers = vec![];
        for _ in 0..6 {
            let error = scene.try_sign_in(name, OTHER).await.unwrap_err();
            answers.push((error.reason(), error.to_string(), error.metadata().to_vec()));
        }
        told.push(answers);
    }
    assert_eq!(told[0], told[1]);
    assert_eq!(told[0], told[2]);
    assert_eq!(told[0][4].0, Reason::SignInRejected);
    assert_eq!(told[0][5].0, Reason::SignInThrottled);
    assert_eq!(told[0][5].2[0].0, "retry_at");
    // The right one is not looked at either, until the time has come.
    let error = scene.try_sign_in("bob", PASSWORD).await.unwrap_err();
    assert_eq!(error.reason(), Reason::SignInThrottled);
    scene.fixture.app.tell_guesses().await.unwrap();
    scene.try_sign_in("bob", PASSWORD).await.unwrap_err();
    scene.fixture.app.tell_guesses().await.unwrap();
    scene.fixture.clock.advance(Duration::from_secs(30));
    scene.sign_in().await;
    let owner = &scene.fixture.owner;
    let page = crate::app::PageRequest::default();
    let records = scene
        .fixture
        .app
        .list_audit(owner, ORGANIZATION, AuditFilter::default(), page)
        .await
        .unwrap();
    // Of bob and of ada, once each.
    let throttled = |record: &&crate::audit::Record| record.draft.action == "sign_in_throttled";
    let told: Vec<_> = records.items.iter().filter(throttled).collect();
    assert_eq!(told.len(), 2);
    assert_eq!(told[0].draft.details["refused"], 5);
    let signed_in = records.items.last().unwrap();
    assert_eq!(signed_in.draft.action, "sign_in");
    assert_eq!(signed_in.draft.details["refused_before"], 5);
}

#[tokio::test]
async fn a_session_sets_the_password_only_with_the_current_one_and_ends_the_others() {
    let scene = Scene::with_password().await;
    let (one, two) = (scene.sign_in().await, scene.sign_in().await);
    let error = scene.set(&one, OTHER, OTHER).await.unwrap_err();
    assert_eq!(error.field_name(), Some("current_password"));
    let error = scene.set(&one, PASSWORD, "short").await.unwrap_err();
    assert_eq!(error.field_name(), Some("new_password"));
    assert!(scene.lives(&two).await);
    assert_eq!(scene.set(&one, PASSWORD, OTHER).await.unwrap(), 1);
    assert!(scene.lives(&one).await && !scene.lives(&two).await);
    assert!(scene.try_sign_in("bob", PASSWORD).await.is_err());
    // Whoever else may know a token that no password opened is out.
    assert!(!scene.lives(&scene.bob).await);
}

#[tokio::test]
async fn guessing_the_current_password_from_an_open_session_is_throttled() {
    let scene = Scene::with_password().await;
    let session = scene.sign_in().await;
    for _ in 0..5 {
        let error = scene.set(&session, OTHER, OTHER).await.unwrap_err();
        assert_eq!(error.reason(), Reason::FieldInvalid);
    }
    let error = scene.set(&session, PASSWORD, OTHER).await.unwrap_err();
    assert_eq!(error.reason(), Reason::SignInThrottled);
    // Strangers are held up elsewhere.
    scene.sign_in().await;
}

#[tokio::test]
async fn sessions_are_listed_and_a_revoked_one_is_refused_with_its_streams() {
    let scene = Scene::with_password().await;
    let app = &scene.fixture.app;
    let (one, two) = (scene.sign_in().await, scene.sign_in().await);
    let run = scene.fixture.queue("one").await;
    let lost = app.hold(&one, Ground::Run(run.id)).await.unwrap();
    let listed = app.list_sessions(&two).await.unwrap();
    assert_eq!(listed.iter().map(|view| view.is_current).collect::<Vec<_>>(), [true, false]);
    assert_eq!(listed[1].client, "laptop");

    app.revoke_session(&two, one.sign_in.unwrap()).await.unwrap();
    assert!(!scene.lives(&one).await && scene.lives(&two).await);
    assert_eq!(lost.await.reason(), Reason::IdentityRequired);
    let again = app.revoke_session(&two, one.sign_in.unwrap()).await.unwrap_err();
    assert_eq!(again.reason(), Reason::NotFound);
    app.sign_out(&two).await.unwrap();
    assert!(!scene.lives(&two).await);
    let kept = app.sign_out(&scene.bob).await.unwrap_err();
    assert_eq!(kept.reason(), Reason::NotFound);
}

#[tokio::test]
async fn nobody_reaches_another_ones_sessions() {
    let scene = Scene::with_password().await;
    let app = &scene.fixture.app;
    let session = scene.sign_in().await;
    let eve = scene.fixture.create_user("eve", Role::Owner, Access::Admin).await;
    let eve = app.prove(&eve).await.unwrap();
    assert!(app.list_sessions(&eve).await.unwrap().is_empty());
    let error = app.revoke_session(&eve, session.sign_in.unwrap()).await.unwrap_err();
    assert_eq!(error.reason(), Reason::NotFound);

    let scope = TokenScope::default();
    let owner = &scene.fixture.owner;
    let made = app.create_service_token(owner, ORGANIZATION, "ci", None, scope, "ci").await;
    let ci = app.prove(&made.unwrap().0).await.unwrap();
    let error = app.list_sessions(&ci).await.unwrap_err();
    assert_eq!(error.reason(), Reason::PersonRequired);
    let error = scene.set(&ci, "", PASSWORD).await.unwrap_err();
    assert_eq!(error.reason(), Reason::PersonRequired);
}

#[tokio::test]
async fn the_last_use_is_known_to_the_hour() {
    let scene = Scene::with_password().await;
    let app = &scene.fixture.app;
    let (token, _) = app.sign_in("bob", PASSWORD.into(), "", None).await.unwrap();
    let used = async || app.list_sessions(&scene.bob).await.unwrap()[0].used_at.unwrap();
    let first = used().await;
    assert_eq!(first.as_millis() % HOUR, 0);
    scene.fixture.clock.advance(Duration::from_secs(3 * 3600));
    assert_eq!(used().await, first);
    app.prove(&token).await.unwrap();
    assert_eq!(used().await.since(first), Duration::from_secs(3 * 3600));
}

#[tokio::test]
async fn the_hundred_and_first_session_ends_the_first() {
    let scene = Scene::with_password().await;
    let app = &scene.fixture.app;
    let first = scene.sign_in().await;
    for _ in 0..MOST_SESSIONS {
        let user = app.user_named("bob").await.unwrap().unwrap();
        let (password, _) = app.password_of(user.value.id.0).await.unwrap().unwrap();
        app.begin_session(&user, &password, "", 0).await.unwrap();
    }
    assert_eq!(app.list_sessions(&scene.bob).await.unwrap().len(), MOST_SESSIONS);
    assert!(!scene.lives(&first).await);
}

#[tokio::test]
async fn a_password_that_changes_while_it_is_checked_opens_nothing() {
    let scene = Scene::with_password().await;
    let app = &scene.fixture.app;
    let user = app.user_named("bob").await.unwrap().unwrap();
    let (password, _) = app.password_of(user.value.id.0).await.unwrap().unwrap();
    scene.set(&scene.bob, "", OTHER).await.unwrap();
    let error = app.begin_session(&user, &password, "", 0).await.unwrap_err();
    assert_eq!(error.reason(), Reason::ChangedMeanwhile);
}

#[tokio::test]
async fn a_stored_password_is_sealed() {
    let scene = Scene::with_password().await;
    let stored = scene.fixture.app.list(keys::all(Kind::Password)).await.unwrap();
    let text = String::from_utf8_lossy(&stored[0].1.value).into_owned();
    assert!(!text.contains("argon2id") && !text.contains(PASSWORD), "{text}");
}

#[tokio::test]
async fn who_guesses_from_afar_does_not_keep_a_person_from_changing_their_password() {
    let scene = Scene::with_password().await;
    let session = scene.sign_in().await;
    for _ in 0..6 {
        scene.try_sign_in("bob", OTHER).await.unwrap_err();
    }
    scene.set(&session, PASSWORD, OTHER).await.unwrap();
}

#[tokio::test]
async fn a_session_that_crosses_a_change_of_password_or_a_reset_does_not_survive_it() {
    let scene = Scene::with_password().await;
    let app = scene.fixture.in_twos().await;
    let user = app.user_named("bob").await.unwrap().unwrap();
    let (password, _) = app.password_of(user.value.id.0).await.unwrap().unwrap();
    // Prepared before and committed at once: the store makes one of them the first.
    let changed = Batch::new();
    let (opened, set) = tokio::join!(
        app.begin_session(&user, &password, "", 0),
        app.commit_password(&scene.bob, (user.value.id.0, "bob"), changed),
    );
    assert!(opened.is_ok() != set.is_ok(), "{set:?}");
}

#[tokio::test]
async fn a_token_that_was_handed_over_ends_after_a_week() {
    let scene = scene().await;
    scene.fixture.clock.advance(Duration::from_secs(7 * 86_400 - 1));
    assert!(scene.lives(&scene.bob).await);
    scene.fixture.clock.advance(Duration::from_secs(1));
    assert!(!scene.lives(&scene.bob).await);
}

#[tokio::test]
async fn work_that_nobody_waits_for_any_more_keeps_its_place() {
    let gate = Gate::default();
    let place = || Arc::new(Arc::clone(&gate.waiting).try_acquire_owned().unwrap());
    let (release, held) = std::sync::mpsc::channel::<()>();
    let one = place();
    let mut work = Box::pin(gate.hash(&one, move || {
        let _ = held.recv();
        Ok(())
    }));
    assert!(polled_once(&mut work).await.is_none());
    drop(work);
    drop(one);
    assert_eq!(gate.hashing.available_permits(), HASHING - 1);
    assert_eq!(gate.waiting.available_permits(), WAITING - 1);
    drop(release);
    let turns = gate.hashing.acquire_many(2).await.unwrap();
    drop(turns);
}

/// Polls something once.
async fn polled_once<F: Future + Unpin>(future: &mut F) -> Option<F::Output> {
    std::future::poll_fn(|context| {
        std::task::Poll::Ready(match std::pin::Pin::new(&mut *future).poll(context) {
            std::task::Poll::Ready(done) => Some(done),
            std::task::Poll::Pending => None,
        })
    })
    .await
}
