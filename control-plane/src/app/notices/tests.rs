//! Notices over the whole path: a run moves, a real server on loopback hears of it.

mod dead;
mod receivers;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use aws_lc_rs::hmac;
use latchkey_domain::id::RunnerId;
use latchkey_domain::policy::MfaPolicy;
use latchkey_domain::run::Run;
use serde_json::Value;
use tokio::task::JoinHandle;

use self::receivers::{Http, Smtp};
use super::*;
use crate::app::audit_trail::AuditFilter;
use crate::app::break_glass::{Glass, Level};
use crate::app::fixture::{ENVIRONMENT, Fixture, ORGANIZATION};
use crate::app::{PageRequest, finish_job::JobResult};
use crate::notices::mail::Mailer;
use crate::notices::network::Networks;
use crate::notices::options::{MailOptions, SmtpTls};
use crate::notices::{Outbound, Pace, worker};
use crate::store::keys::Kind;
use crate::store::record::notice::Outcome;

const LIMIT: Duration = Duration::from_secs(20);

/// Loopback is allowed; waits are short.
fn outbound() -> Outbound {
    let pace = Pace {
        first: Duration::from_millis(20),
        longest: Duration::from_millis(50),
        ..Pace::USUAL
    };
    Outbound {
        networks: Networks(vec!["127.0.0.0/8".parse().unwrap()]),
        public_url: Some("https://latchkey.example.com".into()),
        pace,
        ..Outbound::closed()
    }
}

/// A worker that ends with the test.
struct Worker(JoinHandle<()>);

impl Worker {
    fn of(app: &Arc<App>) -> Self {
        Self(tokio::spawn(worker::run(Arc::clone(app))))
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.0.abort();
    }
}

fn wish(events: &[Event]) -> Wish {
    Wish { events: events.iter().copied().collect(), environments: vec![] }
}

async fn hook(app: &App, fixture: &Fixture, url: &str, events: &[Event]) -> SubscriberId {
    let made = app.create_webhook(&fixture.owner, ORGANIZATION, url, wish(events), url).await;
    made.unwrap().0.id
}

/// Waits until all but `left` deliveries have ended.
async fn settled(app: &App, fixture: &Fixture, subscriber: SubscriberId) -> Vec<Delivery> {
    let wait = async {
        loop {
            let listed =
                app.list_deliveries(&fixture.owner, ORGANIZATION, subscriber, 200).await.unwrap();
            let ended = |delivery: &Delivery| delivery.state != DeliveryState::Pending;
            if !listed.is_empty() && listed.iter().all(ended) {
                return listed;
            }
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(LIMIT, wait).await.expect("not all deliveries have ended in time")
}

/// Waits until the only delivery was attempted, and answers how that went.
async fn attempted(app: &App, fixture: &Fixture, subscriber: SubscriberId) -> Outcome {
    let wait = async {
        loop {
            let listed =
                app.list_deliveries(&fixture.owner, ORGANIZATION, subscriber, 1).await.unwrap();
            if let Some(last) = listed.into_iter().next().and_then(|delivery| delivery.last) {
                return last;
            }
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(LIMIT, wait).await.expect("nothing was attempted in time")
}

async fn waiting(fixture: &Fixture) -> usize {
    fixture.app.list(keys::all(Kind::Outbox)).await.unwrap().len()
}

async fn audited(fixture: &Fixture, action: &str) -> Vec<crate::audit::Record> {
    let filter = AuditFilter { action: action.into(), ..AuditFilter::default() };
    let page = PageRequest { size: 200, token: String::new() };
    fixture.app.list_audit(&fixture.owner, ORGANIZATION, filter, page).await.unwrap().items
}

/// Checks a signature as a receiver does.
#[track_caller]
fn check_signature(secret: &str, header: &str, body: &str) {
    let parts: BTreeMap<&str, &str> =
        header.split(',').map(|part| part.split_once('=').unwrap()).collect();
    let key = hmac::Key::new(hmac::HMAC_SHA256, secret.as_bytes());
    let signed = format!("{}.{body}", parts["t"]);
    let tag = hex::decode(parts["v1"]).unwrap();
    hmac::verify(&key, signed.as_bytes(), &tag).unwrap();
}

#[tokio::test]
async fn a_webhook_hears_of_a_run_signed_and_again_until_it_accepts() {
    let fixture = Fixture::new(MfaPolicy::PlansAndApplies).await;
    let server = Http::start(&[500, 503]).await;
    let app = fixture.telling_through(outbound()).await;
    let url = server.url("/hook?token=canary-url");
    let events = wish(&[Event::WaitingForCode, Event::Errored]);
    let make = async || {
        let made = app.create_webhook(&fixture.owner, ORGANIZATION, &url, events.clone(), "make");
        made.await.unwrap()
    };
    let (view, secret) = make().await;
    let (again, same) = make().await;
    assert_eq!((again.id, again.target.as_str()), (view.id, url.as_str()));
    let secret = secret.expose_secret().to_owned();
    assert_eq!(same.expose_secret(), secret);
    let _worker = Worker::of(&app);

    // Queued, it waits for a code at once.
    let run = fixture.queue("one").await;
    let heard = server.next(3).await;
    for request in &heard {
        assert_eq!(request.head.lines().next(), Some("POST /hook?token=canary-url HTTP/1.1"));
        check_signature(&secret, request.header("x-latchkey-signature"), &request.body);
        assert_eq!(request.body, heard[0].body, "attempts tell the same");
    }
    let body: Value = serde_json::from_str(&heard[0].body).unwrap();
    assert_eq!(body["event"], "waiting_for_code");
    assert_eq!(
        (&body["organization"], &body["environment"]),
        (&ORGANIZATION.into(), &ENVIRONMENT.into())
    );
    assert_eq!(
        (&body["run"]["run_id"], &body["run"]["state"]),
        (&run.id.to_string().into(), &"AwaitingPlanMfa".into())
    );
    let page = format!("https://latchkey.example.com/runs/{}", run.id);
    assert_eq!(body["links"]["run"], page);
    assert_eq!(body["delivery"], heard[0].header("x-latchkey-delivery"));
    let ended = settled(&app, &fixture, view.id).await;
    assert_eq!((ended.len(), ended[0].attempts, ended[0].state), (1, 3, DeliveryState::Delivered));
    assert_eq!(ended[0].last.as_ref().unwrap().status, Some(200));
    assert_eq!(waiting(&fixture).await, 0);

    // A move tells, too; what nobody asked for does not.
    let code = fixture.code();
    fixture.submit(&run, &code, "code").await.unwrap();
    let run = fixture.plan(&run).await;
    let body: Value = serde_json::from_str(&server.next(1).await[0].body).unwrap();
    assert_eq!(body["run"]["state"], run.state.as_str());
    assert!(!body.to_string().contains(&code));
    settled(&app, &fixture, view.id).await;
    assert_eq!(server.heard(), 4);

    // Neither secret is anywhere in the records.
    for kind in Kind::ALL {
        for (key, found) in fixture.app.list(keys::all(*kind)).await.unwrap() {
            let text = String::from_utf8_lossy(&found.value);
            assert!(!text.contains("canary-url") && !text.contains(&secret), "{key}");
        }
    }
    assert_eq!(audited(&fixture, "create_webhook").await.len(), 1);

    // What ended can be sent again; a deleted webhook gets nothing more.
    let again = app.redeliver(&fixture.owner, ORGANIZATION, view.id, ended[0].id.0).await.unwrap();
    let repeated = server.next(1).await.remove(0);
    assert_eq!(repeated.header("x-latchkey-delivery"), again.to_string());
    app.delete_webhook(&fixture.owner, ORGANIZATION, view.id).await.unwrap();
    fixture.app.cancel_run(&fixture.owner, run.id).await.unwrap();
    assert_eq!(waiting(&fixture).await, 0);
    let gone = app.list_deliveries(&fixture.owner, ORGANIZATION, view.id, 9).await.unwrap_err();
    assert_eq!(gone.reason(), Reason::NotFound);
}

#[tokio::test]
async fn notices_survive_the_process_also_in_the_middle_of_an_attempt() {
    let fixture = Fixture::new(MfaPolicy::PlansAndApplies).await;
    let server = Http::start(&[]).await;
    let app = fixture.telling_through(outbound()).await;
    let id = hook(&app, &fixture, &server.url("/"), &[Event::WaitingForCode]).await;
    fixture.queue("one").await;
    // It dies after the claim.
    let (place, wait) = app.outbox().await.unwrap()[0];
    assert_eq!(wait, Duration::ZERO);
    assert!(app.claim_delivery(place).await.unwrap().is_some());
    drop(app);
    let app = fixture.telling_through(outbound()).await;
    assert!(app.outbox().await.unwrap()[0].1 > Duration::from_secs(20));
    fixture.clock.advance(Duration::from_secs(30));
    let _worker = Worker::of(&app);
    assert_eq!(server.next(1).await.len(), 1);
    let ended = settled(&app, &fixture, id).await;
    assert_eq!((ended.len(), ended[0].attempts), (1, 2));
}

#[tokio::test]
async fn a_redirect_is_not_followed_and_a_private_address_not_reached() {
    let fixture = Fixture::new(MfaPolicy::PlansAndApplies).await;
    let elsewhere = Http::start(&[]).await;
    let server = Http::redirecting(&elsewhere.url("/stolen")).await;
    let open = fixture.telling_through(outbound()).await;
    let id = hook(&open, &fixture, &server.url("/"), &[Event::WaitingForCode]).await;
    fixture.queue("one").await;
    {
        let _worker = Worker::of(&open);
        let outcome = attempted(&open, &fixture, id).await;
        assert_eq!(outcome.status, Some(302));
        assert!(outcome.detail.contains("redirects are not followed"), "{outcome:?}");
    }
    assert_eq!(elsewhere.heard(), 0);

    // Without the operator's word neither is it taken, nor is one that was taken before reached.
    let pace = outbound().pace;
    let closed = fixture.telling_through(Outbound { pace, ..Outbound::closed() }).await;
    for url in [server.url("/"), server.url("/").replace("http://", "https://")] {
        let made =
            closed.create_webhook(&fixture.owner, ORGANIZATION, &url, wish(&[Event::Errored]), "x");
        let error = made.await.unwrap_err();
        assert_eq!((error.reason(), error.field_name()), (Reason::FieldInvalid, Some("url")));
    }
    let id = hook(&open, &fixture, &elsewhere.url("/"), &[Event::Errored]).await;
    let port = elsewhere.url("/").rsplit(':').next().unwrap().trim_matches('/').to_owned();
    // A name is taken as it is, and looked at when it is resolved.
    let name = format!("https://localhost.:{port}/");
    let named = hook(&closed, &fixture, &name, &[Event::Errored]).await;
    let _worker = Worker::of(&closed);
    for id in [id, named] {
        closed.send_test(&fixture.owner, ORGANIZATION, id).await.unwrap();
        let outcome = attempted(&closed, &fixture, id).await;
        assert_eq!(outcome.status, None);
        assert!(
            outcome.detail.contains("not public") || outcome.detail.contains("name"),
            "{outcome:?}"
        );
    }
    assert_eq!(elsewhere.heard(), 0);
}

#[tokio::test]
async fn each_hears_what_they_chose_and_without_anybody_nothing_is_kept() {
    let fixture = Fixture::new(MfaPolicy::Never).await;
    let app = fixture.telling_through(outbound()).await;
    let run = fixture.queue("none").await;
    assert_eq!(waiting(&fixture).await, 0);
    fixture.app.cancel_run(&fixture.owner, run.id).await.unwrap();

    let all =
        [Event::NeedsConfirmation, Event::Errored, Event::RunnerLost, Event::EnvironmentFrozen];
    let everything = hook(&app, &fixture, "https://hooks.example.com/a", &all).await;
    let elsewhere = Wish { environments: vec!["db".into()], ..wish(&all) };
    let url = "https://hooks.example.com/b";
    let refused = app.create_webhook(&fixture.owner, ORGANIZATION, url, elsewhere.clone(), "b");
    assert_eq!(refused.await.unwrap_err().field_name(), Some("environments"));
    let settings = crate::app::settings::SettingsChange::default();
    fixture
        .app
        .create_environment(&fixture.owner, ORGANIZATION, "db", settings, "db", None)
        .await
        .unwrap();
    app.create_webhook(&fixture.owner, ORGANIZATION, url, elsewhere, "b").await.unwrap();

    let run = fixture.queue("one").await;
    let run = fixture.plan(&run).await;
    fixture
        .app
        .confirm_run(&fixture.owner, run.id, run.planned.as_ref().unwrap().digest)
        .await
        .unwrap();
    fail_apply(&fixture, &run).await;
    let told: Vec<(Event, SubscriberId)> = told(&fixture).await;
    assert_eq!(told, [(Event::NeedsConfirmation, everything), (Event::Errored, everything),]);
    for events in [&[][..], &[Event::Test]] {
        let refused =
            app.create_webhook(&fixture.owner, ORGANIZATION, url, wish(events), "c").await;
        assert_eq!(refused.unwrap_err().field_name(), Some("events"));
    }
}

#[tokio::test]
async fn broken_glass_is_told_to_everybody_whatever_they_chose() {
    let fixture = Fixture::new(MfaPolicy::AppliesOnly).await;
    let app = fixture.telling_through(outbound()).await;
    let settings = crate::app::settings::SettingsChange::default();
    let owner = &fixture.owner;
    fixture.app.create_environment(owner, ORGANIZATION, "db", settings, "db", None).await.unwrap();
    let narrow = Wish { environments: vec!["db".into()], ..wish(&[Event::Applied]) };
    let url = "https://hooks.example.com/a";
    let made = app.create_webhook(owner, ORGANIZATION, url, narrow, "a").await.unwrap();
    let glass = Glass::Policy { environment: Some(ENVIRONMENT.into()), level: Level::Never };
    let broken = app.break_glass(ORGANIZATION, &glass, "lost it").await.unwrap();
    assert_eq!(broken.told, 1);
    let broken = app.break_glass(ORGANIZATION, &Glass::Triple { user: None }, "lost it").await;
    assert_eq!(broken.unwrap().told, 1);
    assert_eq!(told(&fixture).await, [(Event::BreakGlass, made.0.id); 2]);
}

/// What is in the outbox, oldest first.
async fn told(fixture: &Fixture) -> Vec<(Event, SubscriberId)> {
    let mut all: Vec<Delivery> = vec![];
    for (key, found) in fixture.app.list(keys::all(Kind::Outbox)).await.unwrap() {
        all.push(decode(&key, &found).unwrap());
    }
    all.sort_by_key(|delivery| delivery.id);
    all.into_iter().map(|delivery| (delivery.notice.event, delivery.subscriber.0)).collect()
}

async fn fail_apply(fixture: &Fixture, run: &Run) -> RunnerId {
    let phase = latchkey_domain::policy::Phase::Apply;
    let (runner, lease, _) = fixture.start(&fixture.run(run).await, phase).await;
    let failed = JobResult::Failed {
        kind: latchkey_domain::run::FailureKind::Errored,
        reason: "terraform exited with code 1".into(),
    };
    fixture.app.finish_job(&runner, lease, 0, failed).await.unwrap();
    runner.id
}

#[tokio::test]
async fn a_recipient_gets_mail_and_again_until_the_server_takes_it() {
    let fixture = Fixture::new(MfaPolicy::PlansAndApplies).await;
    let owner = &fixture.owner;
    let set = async |app: &App, address: &str| {
        let wish = wish(&[Event::WaitingForCode]);
        app.set_mail_recipient(owner, ORGANIZATION, address, wish).await
    };
    let without = set(&fixture.app, "ops@example.com").await.unwrap_err();
    assert_eq!(without.reason(), Reason::MailUnavailable);

    let server = Smtp::start(&["451 later"]).await;
    let options = MailOptions {
        host: "127.0.0.1".into(),
        port: server.port(),
        tls: SmtpTls::None,
        from: "Latchkey <latchkey@example.com>".parse().unwrap(),
        credentials: None,
    };
    let tls = crate::notices::tls(rustls::RootCertStore::empty());
    let mailer = Mailer::open(&options, tls).unwrap();
    let app = fixture.telling_through(Outbound { mailer: Some(mailer), ..outbound() }).await;
    let evil = set(&app, "ops@example.com\r\nBcc: eve@example.com").await.unwrap_err();
    assert_eq!(evil.field_name(), Some("address"));
    let view = set(&app, "ops@example.com").await.unwrap();
    assert_eq!(set(&app, "ops@example.com").await.unwrap().id, view.id);
    let _worker = Worker::of(&app);
    let run = fixture.queue("one").await;
    let mail = server.next().await;
    assert_eq!(mail.from, "<latchkey@example.com>");
    assert_eq!(mail.to, ["<ops@example.com>"]);
    let (head, body) = mail.data.split_once("\r\n\r\n").unwrap();
    assert!(head.contains("Subject: [latchkey] acme/web: a run waits for a token code"), "{head}");
    assert!(body.contains(&format!("latchkey run show {}", run.id)), "{body}");
    let ended = settled(&app, &fixture, view.id).await;
    assert_eq!((ended[0].attempts, ended[0].state), (2, DeliveryState::Delivered));
    app.delete_mail_recipient(owner, ORGANIZATION, view.id).await.unwrap();
    assert_eq!(audited(&fixture, "delete_mail_recipient").await.len(), 1);
}

#[tokio::test]
async fn a_notice_is_given_up_after_a_day() {
    let fixture = Fixture::new(MfaPolicy::PlansAndApplies).await;
    let server = Http::start(&[500; 64]).await;
    let app = fixture.telling_through(outbound()).await;
    let id = hook(&app, &fixture, &server.url("/"), &[Event::WaitingForCode]).await;
    fixture.queue("one").await;
    let _worker = Worker::of(&app);
    server.next(2).await;
    assert_eq!(waiting(&fixture).await, 1);
    fixture.clock.advance(Duration::from_secs(24 * 3600));
    let ended = settled(&app, &fixture, id).await;
    assert_eq!(ended[0].state, DeliveryState::GivenUp);
    assert_eq!(ended[0].last.as_ref().unwrap().status, Some(500));
}
