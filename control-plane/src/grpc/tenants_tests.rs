//! Two organizations with everything alike but the ids: nobody of one reaches into the other, by
//! any rpc of the descriptor set, over real gRPC. Both are filled by the same code, so that
//! whatever is looked up by a name alone finds the wrong one.
//!
//! What cannot be told apart from what does not exist is not reached: people are answered
//! NOT_FOUND, a runner as one that holds no such lease.

pub(in crate::grpc) mod filling;
mod raw;
pub(in crate::grpc) mod tenants;

use std::collections::BTreeSet;

use latchkey_domain::id::Digest;
use latchkey_proto::v1;
use latchkey_proto::v1::lease_response::Frame as Out;
use prost::Message;
use prost_reflect::{DynamicMessage, MethodDescriptor};
use rcgen::{CertificateParams, KeyPair};
use secrecy::{ExposeSecret, SecretString};
use tonic::Code;
use uuid::Uuid;

use self::filling::{Aim, is_of_runners, methods, name, requests};
use self::tenants::{CANARY, OWN, Tenants, only_theirs};
use crate::store::keys;

/// The rpcs about nothing that an organization has: a person's own sign-ins are theirs alone, as
/// the tests of sessions show.
const ABOUT_NOTHING: [&str; 6] = [
    "AccountService/WhoAmI",
    "SessionService/SignIn",
    "SessionService/SignOut",
    "SessionService/ListSessions",
    "SessionService/RevokeSession",
    "SessionService/SetPassword",
];

/// What carries its proof in the request, and tells nothing without it.
const WITH_SECRET: [&str; 1] = ["AccountService/Bootstrap"];

#[tokio::test(flavor = "multi_thread")]
async fn nobody_reaches_into_another_organization_by_any_rpc() {
    let tenants = Tenants::new().await;
    let before = tenants.records().await;
    for method in methods().into_iter().filter(|method| !is_of_runners(method)) {
        let rpc = name(&method);
        let requests = requests(&method, &tenants.theirs);
        let requests = requests.into_iter().filter(|aimed| {
            aimed.names.contains("organization")
                || ["run", "runner"].iter().any(|thing| aimed.names.contains(thing))
        });
        let requests: Vec<_> = requests.collect();
        assert_eq!(requests.is_empty(), ABOUT_NOTHING.contains(&rpc.as_str()), "{rpc}");
        let expect = if WITH_SECRET.contains(&rpc.as_str()) {
            Code::Unauthenticated
        } else {
            Code::NotFound
        };
        for aimed in requests {
            for token in [&tenants.owner, &tenants.member, &tenants.program] {
                let answer = tenants.call(&method, token, &aimed.request).await;
                let status = answer.expect_err(&rpc);
                assert_eq!(status.code(), expect, "{rpc} {}: {status}", aimed.request);
                let told = format!("{} {:?}", status.message(), status.details());
                tenants.assert_untold(&rpc, told.as_bytes(), &tenants.theirs);
            }
        }
    }
    assert!(before == tenants.records().await, "a refusal wrote something");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_another_organization_has_is_answered_as_what_nobody_has() {
    let tenants = Tenants::new().await;
    let before = tenants.records().await;
    // Within the own organization, what only the other has, and what nobody has.
    let only = |name: &str, configuration: Digest, other: &Aim| {
        let names = Aim::of([
            ("organization", OWN.into()),
            ("environment", name.into()),
            ("pool", name.into()),
            ("configuration", configuration.to_string()),
        ]);
        other.with(&["organization", "environment", "pool", "configuration"], &names)
    };
    let nobodys = nobodys();
    let theirs = only("only-theirs", only_theirs(), &tenants.theirs);
    let unknown = only("only-nobodys", Digest::from_bytes([3; 32]), &nobodys);
    for method in methods().into_iter().filter(|method| !is_of_runners(method)) {
        tenants.tells_apart(&method, &theirs, &unknown, &BTreeSet::new()).await;
        // One id of theirs among all that is the own.
        for thing in [
            "run",
            "runner",
            "quarantined",
            "glass",
            "lock",
            "user",
            "token",
            "subscriber",
            "delivery",
            "configuration",
        ] {
            let theirs = tenants.own.with(&[thing], &theirs);
            let unknown = tenants.own.with(&[thing], &unknown);
            tenants.tells_apart(&method, &theirs, &unknown, &[thing].into()).await;
        }
    }
    let organization = tenants.fixture.organization().await;
    let after = tenants.records().await;
    for (key, version) in
        before.iter().filter(|(key, _)| key.windows(16).any(|part| part == organization.as_bytes()))
    {
        assert_eq!(after.get(key), Some(version), "{}", hex::encode(key));
    }
}

impl Tenants {
    /// Asks the same about what another organization has and about what nobody has: the answers
    /// are alike. Only of requests that name all of `about`.
    async fn tells_apart(
        &self,
        method: &MethodDescriptor,
        theirs: &Aim,
        nobodys: &Aim,
        about: &BTreeSet<&'static str>,
    ) {
        let rpc = name(method);
        let pairs = requests(method, theirs).into_iter().zip(requests(method, nobodys));
        // What names its organization alone has nothing to be mixed up.
        let pairs = pairs.filter(|(aimed, _)| {
            aimed.names.is_superset(about) && aimed.names.iter().any(|name| *name != "organization")
        });
        for (of_theirs, of_nobodys) in pairs {
            for token in [&self.owner, &self.member, &self.program] {
                let mut answers = vec![];
                for (aim, aimed) in [(theirs, &of_theirs), (nobodys, &of_nobodys)] {
                    answers.push(match self.call(method, token, &aimed.request).await {
                        Ok(told) => {
                            // A name that was asked for may be said again.
                            if !aimed.request.to_string().contains(CANARY) {
                                self.assert_untold(&rpc, &told, aim);
                            }
                            (Code::Ok, String::new())
                        }
                        Err(status) => (status.code(), neutral(status.message(), aim)),
                    });
                }
                assert_eq!(answers[0], answers[1], "{rpc} {}", of_theirs.request);
            }
        }
    }
}

/// What nobody has.
fn nobodys() -> Aim {
    let id = || Uuid::now_v7().to_string();
    Aim::of([
        ("organization", "nobodys".into()),
        ("environment", "no-environment".into()),
        ("pool", "no-pool".into()),
        ("run", id()),
        ("epoch", "1".into()),
        ("generation", "1".into()),
        ("runner", id()),
        ("quarantined", id()),
        ("glass", id()),
        ("configuration", "ab".repeat(32)),
        ("plan", "cd".repeat(32)),
        ("lock", "no-lock".into()),
        ("variable", "no-variable".into()),
        ("user", "no-user".into()),
        ("token", "no-token".into()),
        ("subscriber", id()),
        ("delivery", id()),
        ("pool_token", "lkp_none".into()),
    ])
}

/// A message without the words that the request brought.
fn neutral(message: &str, aim: &Aim) -> String {
    aim.words()
        .filter(|word| word.len() > 4)
        .fold(message.to_owned(), |message, word| message.replace(word, "_"))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_runner_of_one_organization_has_no_lease_of_another() {
    let tenants = Tenants::new().await;
    let before = tenants.records().await;
    let (theirs, own) = (&tenants.theirs, &tenants.runner);
    let nobodys = theirs.with(&["run"], &nobodys());
    for method in methods().into_iter().filter(is_of_runners) {
        let rpc = name(&method);
        let pairs: Vec<_> =
            requests(&method, theirs).into_iter().zip(requests(&method, &nobodys)).collect();
        assert!(!pairs.is_empty(), "{rpc} names nothing");
        let pairs = pairs.iter().map(|(one, other)| (&one.request, &other.request));
        match method.name() {
            "Enroll" => tenants.enrolls_nowhere(&method).await,
            "Lease" => {
                let mut frames = BTreeSet::new();
                for (of_theirs, of_nobodys) in pairs {
                    frames.extend(tenants.leases_nothing(of_theirs, of_nobodys).await);
                }
                let arms = method.input().oneofs().next().unwrap().fields().count();
                // `Hello` is in each, and a runner that drains names no lease.
                assert_eq!(frames.len(), arms - 2, "{frames:?}");
            }
            "FetchArtifact" | "UploadArtifact" | "AppendLog" => {
                let mut lost = 0;
                for (of_theirs, of_nobodys) in pairs {
                    let mut answers = vec![];
                    for request in [of_theirs, of_nobodys] {
                        let messages = messages(&method, request);
                        let answer = tenants.call_as(&method, Some(own), messages.clone()).await;
                        let status = answer.expect_err(&rpc);
                        answers.push((status.code(), neutral(status.message(), theirs)));
                        let unproved = tenants.call_as(&method, None, messages).await;
                        assert_eq!(unproved.unwrap_err().code(), Code::Unauthenticated, "{rpc}");
                    }
                    assert_eq!(answers[0], answers[1], "{rpc} {of_theirs}");
                    match answers[0].0 {
                        Code::FailedPrecondition => lost += 1,
                        // A kind that no job makes or needs.
                        Code::InvalidArgument => {}
                        code => panic!("{rpc} {of_theirs}: {code:?}"),
                    }
                }
                assert!(lost > 1, "{rpc} was refused for its form alone");
            }
            unknown => panic!("say here how RunnerService/{unknown} is kept apart"),
        }
    }
    // What it says of itself is recorded, in its own organization.
    let (mut before, mut after) = (before, tenants.records().await);
    let said = keys::runner(tenants.own.get("runner").parse().unwrap());
    for records in [&mut before, &mut after] {
        assert!(records.remove(said.as_bytes()).is_some());
    }
    assert!(before == after, "a refusal wrote something");
}

/// What one sends: an upload is a header, then data.
fn messages(method: &MethodDescriptor, request: &DynamicMessage) -> Vec<Vec<u8>> {
    let first = request.encode_to_vec();
    if method.name() != "UploadArtifact" {
        return vec![first];
    }
    let part = Some(v1::upload_artifact_request::Part::Data(b"x".to_vec()));
    vec![first, v1::UploadArtifactRequest { part }.encode_to_vec()]
}

impl Tenants {
    /// Nothing is bought with a token that is spent or unknown, nor with the own one for the key
    /// of another's runner; and nothing is told of it.
    async fn enrolls_nowhere(&self, method: &MethodDescriptor) {
        let key = KeyPair::generate().unwrap();
        let new = CertificateParams::default().serialize_request(&key).unwrap().der().to_vec();
        let theirs = self.their_runner.request.clone();
        let (spent, own) = (self.theirs.get("pool_token"), self.own.get("pool_token"));
        let tries = [(spent, new), (own, theirs.clone()), ("lkp_none", theirs)];
        for (pool_token, certificate_request) in tries {
            let request = v1::EnrollRequest {
                pool_token: pool_token.to_owned(),
                certificate_request,
                name: "builder".into(),
            };
            let request = vec![request.encode_to_vec()];
            for host in [None, Some(&self.runner)] {
                let status = self.call_as(method, host, request.clone()).await.unwrap_err();
                assert_eq!(status.code(), Code::Unauthenticated, "{status}");
                let told = format!("{} {:?}", status.message(), status.details());
                self.assert_untold("Enroll", told.as_bytes(), &self.own);
            }
        }
    }

    /// Names the frame that was tried, if it is about a lease.
    async fn leases_nothing(
        &self,
        of_theirs: &DynamicMessage,
        of_nobodys: &DynamicMessage,
    ) -> Option<String> {
        let mut all = vec![];
        for (request, aim) in [(of_theirs, &self.theirs), (of_nobodys, &self.theirs)] {
            let request = v1::LeaseRequest::decode(request.encode_to_vec().as_slice()).unwrap();
            let frame = request.frame?;
            if matches!(frame, v1::lease_request::Frame::Hello(_)) {
                return None;
            }
            let text = format!("{frame:?}");
            let lease = v1::LeaseRef {
                run_id: aim.get("run").to_owned(),
                phase: v1::Phase::Apply.into(),
                epoch: aim.get("epoch").parse().unwrap(),
                generation: aim.get("generation").parse().unwrap(),
            };
            let told = self.lease(&self.runner, lease, frame).await;
            let mut kinds = vec![];
            for frame in told.unwrap_or_else(|status| panic!("{text}: {status}")) {
                kinds.push(match frame {
                    Out::Welcome(welcome) => {
                        assert_eq!((welcome.keep.len(), welcome.give_up.len()), (0, 1));
                        assert_eq!(welcome.runner_id, self.own.get("runner"));
                        "welcome"
                    }
                    Out::Renewed(renewed) => {
                        assert_eq!(renewed.lease, [], "{text}");
                        "renewed"
                    }
                    Out::Revoke(_) => "revoke",
                    Out::Offer(_)
                    | Out::Go(_)
                    | Out::Cancel(_)
                    | Out::Recorded(_)
                    | Out::Drain(_)
                    | Out::Resume(_) => panic!("{text} was answered {frame:?}"),
                });
            }
            kinds.sort_unstable();
            all.push((kinds, text));
        }
        assert_eq!(all[0].0, all[1].0, "{}", all[0].1);
        all[0].1.split('(').next().map(str::to_owned)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_pool_token_buys_belongs_to_its_organization_alone() {
    let tenants = Tenants::new().await;
    let app = &tenants.fixture.app;
    let bob = app.caller(&tenants.owner).await.unwrap();
    let made = app.create_pool_token(&bob, OWN, "build", None, 1, "another").await;
    let token: SecretString = made.unwrap().0.expose_secret().split('.').next().unwrap().into();
    let before = tenants.records().await;
    let key = KeyPair::generate().unwrap();
    let request = CertificateParams::default().serialize_request(&key).unwrap();
    let enrolled = app.enroll(&token, request.der(), "builder").await.unwrap();
    let after = tenants.records().await;
    let organization = tenants.fixture.organization().await;
    for (key, version) in
        before.iter().filter(|(key, _)| key.windows(16).any(|part| part == organization.as_bytes()))
    {
        assert_eq!(after.get(key), Some(version), "{}", hex::encode(key));
    }
    let record = keys::runner(enrolled.runner);
    assert!(after.contains_key(record.as_bytes()));
    assert!(app.show_runner(&tenants.fixture.owner, enrolled.runner).await.is_err());
    assert!(app.show_runner(&bob, enrolled.runner).await.is_ok());
}
