//! Enrolment with one token by many hosts at once.

use latchkey_domain::policy::MfaPolicy;
use latchkey_proto::v1::Reason;
use rcgen::{CertificateParams, KeyPair};
use secrecy::{ExposeSecret, SecretString};

use crate::app::fixture::{Fixture, ORGANIZATION};

fn request() -> Vec<u8> {
    let key = KeyPair::generate().unwrap();
    CertificateParams::default().serialize_request(&key).unwrap().der().to_vec()
}

async fn token(fixture: &Fixture, uses: u32) -> SecretString {
    let (app, owner) = (&fixture.app, &fixture.owner);
    app.create_pool(owner, ORGANIZATION, "build", "pool").await.unwrap();
    let (token, _) =
        app.create_pool_token(owner, ORGANIZATION, "build", None, uses, "token").await.unwrap();
    token.expose_secret().split('.').next().unwrap().into()
}

#[tokio::test]
async fn a_token_serves_as_many_hosts_at_once_as_it_has_uses() {
    let fixture = Fixture::new(MfaPolicy::Never).await;
    let token = token(&fixture, 40).await;
    let enrolling = (0..41).map(|n| {
        let (app, token) = (fixture.app.clone(), token.clone());
        tokio::spawn(async move { app.enroll(&token, &request(), &format!("host-{n}")).await })
    });
    let mut enrolled = std::collections::BTreeSet::new();
    let mut refused = 0;
    for ended in enrolling.collect::<Vec<_>>() {
        match ended.await.unwrap() {
            Ok(runner) => assert!(enrolled.insert(runner.runner)),
            Err(error) => {
                assert_eq!(error.reason(), Reason::PoolTokenRejected);
                refused += 1;
            }
        }
    }
    assert_eq!((enrolled.len(), refused), (40, 1));
}

#[tokio::test]
async fn a_repeat_by_the_same_key_is_the_same_runner_and_costs_nothing() {
    let fixture = Fixture::new(MfaPolicy::Never).await;
    let token = token(&fixture, 1).await;
    let request = request();
    let first = fixture.app.enroll(&token, &request, "host").await.unwrap();
    let again = fixture.app.enroll(&token, &request, "host").await.unwrap();
    assert_eq!(first.runner, again.runner);
    let other = fixture.app.enroll(&token, &self::request(), "other").await.unwrap_err();
    assert_eq!(other.reason(), Reason::PoolTokenRejected);
}
