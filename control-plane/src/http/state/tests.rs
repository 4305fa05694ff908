//! The answers that terraform's `http` backend gets, byte for byte where it reads them.

use std::future::{Ready, ready};
use std::task::{Context, Poll};

use http::HeaderMap;
use latchkey_domain::policy::MfaPolicy;
use secrecy::ExposeSecret;
use serde_json::Value;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tower::{Layer, Service, ServiceExt};

use super::*;
use crate::app::fixture::Fixture;
use crate::app::service_tokens::TokenScope;
use crate::http::StateLayer;
use crate::store::record::people::{Access, Role};

const PATH: &str = "/state/acme/web";

/// What is behind the layer.
#[derive(Clone)]
struct Behind;

impl Service<Request<Body>> for Behind {
    type Response = Response<Body>;
    type Error = std::convert::Infallible;
    type Future = Ready<std::result::Result<Response<Body>, Self::Error>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<std::result::Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Request<Body>) -> Self::Future {
        ready(Ok(text(StatusCode::IM_A_TEAPOT, "behind")))
    }
}

/// A fixture and the tokens of people, by name.
struct Scene {
    fixture: Fixture,
}

struct Answer {
    status: u16,
    headers: HeaderMap,
    body: Vec<u8>,
}

impl Answer {
    fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap()
    }
}

impl Scene {
    async fn new() -> Self {
        Self { fixture: Fixture::new(MfaPolicy::Never).await }
    }

    async fn person(&self, name: &str, access: Access) -> String {
        let (app, owner) = (&self.fixture.app, &self.fixture.owner);
        let made = app.create_user(owner, "acme", name, Role::Member, access, name).await;
        made.unwrap().expose_secret().to_owned()
    }

    async fn ask(
        &self,
        token: &str,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> Answer {
        let body = Body::new(Full::new(Bytes::from(body.to_vec())));
        let (head, body) = self.begin(token, method, path, headers, body).await.into_parts();
        let body = body.collect().await.unwrap().to_bytes().to_vec();
        Answer { status: head.status.as_u16(), headers: head.headers, body }
    }

    /// Asks, and leaves the answer's body to be read.
    async fn begin(
        &self,
        token: &str,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: Body,
    ) -> Response<Body> {
        let mut request = Request::builder().method(method).uri(path);
        if !token.is_empty() {
            let basic = format!("Basic {}", STANDARD.encode(format!("anything:{token}")));
            request = request.header("authorization", basic);
        }
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let layer = StateLayer { app: Arc::clone(&self.fixture.app) };
        layer.layer(Behind).oneshot(request.body(body).unwrap()).await.unwrap()
    }

    async fn status(&self, token: &str, method: &str, path: &str, body: &[u8]) -> u16 {
        self.ask(token, method, path, &[], body).await.status
    }
}

fn state(serial: u64) -> Vec<u8> {
    format!(r#"{{"version":4,"serial":{serial},"lineage":"l","outputs":{{}},"resources":[]}}"#)
        .into_bytes()
}

/// A state of many parts.
fn large() -> Vec<u8> {
    let value = "x".repeat(2 << 20);
    format!(
        r#"{{"version":4,"serial":1,"lineage":"l","outputs":{{"n":{{"value":"{value}"}}}},"resources":[]}}"#
    )
    .into_bytes()
}

/// A body that is sent as it goes.
fn sent() -> (mpsc::Sender<std::result::Result<Frame<Bytes>, Error>>, Body) {
    let (sender, frames) = mpsc::channel(1);
    (sender, Body::new(StreamBody::new(ReceiverStream::new(frames))))
}

fn lock(id: &str) -> Vec<u8> {
    format!(
        r#"{{"ID":"{id}","Operation":"OperationTypeApply","Info":"","Who":"ann@desk","Version":"1.11.4","Created":"2026-11-24T12:38:15.473428783Z","Path":""}}"#
    )
    .into_bytes()
}

#[tokio::test]
async fn terraform_reads_locks_writes_and_unlocks() {
    let scene = Scene::new().await;
    let ann = scene.person("ann", Access::Admin).await;
    let none = scene.ask(&ann, "GET", PATH, &[], b"").await;
    assert_eq!((none.status, none.body.len()), (204, 0));
    assert_eq!(scene.status(&ann, "LOCK", PATH, &lock("id-1")).await, 200);

    let held = scene.ask(&ann, "LOCK", PATH, &[], &lock("id-2")).await;
    assert_eq!(held.status, 423);
    let info = held.json();
    assert_eq!(info["ID"], "id-1 of ann (ann@desk)");
    assert_eq!(
        (&info["Operation"], &info["Version"]),
        (&"OperationTypeApply".into(), &"1.11.4".into())
    );
    let created: jiff::Timestamp = info["Created"].as_str().unwrap().parse().unwrap();
    assert_eq!(created.as_millisecond(), scene.fixture.app.now().as_millis());

    let with_id = format!("{PATH}?ID=id-1");
    let md5 = STANDARD.encode(Md5::digest(state(1)));
    let headers = [("content-md5", md5.as_str())];
    assert_eq!(scene.ask(&ann, "POST", &with_id, &headers, &state(1)).await.status, 200);
    let wrong = scene.ask(&ann, "POST", &with_id, &headers, &state(2)).await;
    assert_eq!(wrong.status, 400);
    assert!(String::from_utf8(wrong.body).unwrap().contains("Content-MD5"));
    assert_eq!(scene.status(&ann, "POST", &with_id, &state(2)).await, 200);
    // Without the lock, with another's, of before, and no state at all.
    assert_eq!(scene.status(&ann, "POST", PATH, &state(3)).await, 423);
    assert_eq!(scene.status(&ann, "POST", &format!("{PATH}?ID=id-2"), &state(3)).await, 423);
    assert_eq!(scene.status(&ann, "POST", &with_id, &state(1)).await, 409);
    assert_eq!(scene.status(&ann, "POST", &with_id, b"no state").await, 400);

    let read = scene.ask(&ann, "GET", PATH, &[], b"").await;
    assert_eq!((read.status, read.body), (200, state(2)));
    assert_eq!(read.headers["cache-control"], "no-store");
    assert_eq!(read.headers["x-content-type-options"], "nosniff");
    assert_eq!(read.headers["content-length"], state(2).len().to_string());

    assert_eq!(scene.status(&ann, "UNLOCK", PATH, &lock("id-2")).await, 409);
    let nothing = scene.ask(&ann, "UNLOCK", PATH, &[], b"").await;
    assert_eq!(nothing.status, 400);
    assert!(String::from_utf8(nothing.body).unwrap().contains("latchkey state unlock"));
    assert_eq!(scene.status(&ann, "UNLOCK", PATH, &lock("id-1")).await, 200);
    assert_eq!(scene.status(&ann, "POST", &with_id, &state(3)).await, 409);
    let refused = scene.ask(&ann, "DELETE", PATH, &[], b"").await;
    assert_eq!(
        (refused.status, &refused.headers["allow"]),
        (405, &HeaderValue::from_static(METHODS))
    );
}

#[tokio::test]
async fn what_a_caller_may_not_see_does_not_exist_and_is_never_an_empty_state() {
    let scene = Scene::new().await;
    let app = &scene.fixture.app;
    let scope = TokenScope { access: Access::Write, environments: vec![] };
    let (service, _) = app
        .create_service_token(&scene.fixture.owner, "acme", "ci", None, scope, "ci")
        .await
        .unwrap();
    let service = service.expose_secret();
    let eve = scene.person("eve", Access::None).await;
    let bob = scene.person("bob", Access::Write).await;
    let ann = scene.person("ann", Access::Admin).await;
    let other = "/state/other/web";
    let absent = "/state/acme/absent";
    for method in ["GET", "POST", "LOCK", "UNLOCK", "DELETE"] {
        for path in [PATH, other, absent, "/state/", "/state/a/b/c"] {
            let answer = scene.ask("", method, path, &[], b"{}").await;
            assert_eq!(answer.status, 401, "{method} {path}");
            assert!(answer.headers.contains_key("www-authenticate"));
            assert_eq!(answer.headers["cache-control"], "no-store");
            assert_eq!(scene.status("lk_unknown", method, path, b"{}").await, 401);
        }
    }
    for (method, hidden) in [("GET", 403), ("POST", 404), ("LOCK", 404), ("UNLOCK", 404)] {
        let known = [(&eve, PATH), (&eve, absent), (&bob, other), (&bob, absent), (&ann, other)];
        let mut bodies = std::collections::BTreeSet::new();
        for (token, path) in known {
            let answer = scene.ask(token, method, path, &[], &lock("id")).await;
            assert_eq!(answer.status, hidden, "{method} {path}");
            if token == &eve {
                bodies.insert(answer.body);
            }
        }
        assert_eq!(bodies.len(), 1, "{method}: what exists is not told from what does not");
        for token in [bob.as_str(), service] {
            assert_eq!(scene.status(token, method, PATH, &lock("id")).await, 403, "{method}");
        }
        assert_eq!(scene.status(&ann, method, "/state/acme/web/x", b"{}").await, hidden);
    }
    // Nobody got in.
    assert_eq!(scene.status(&ann, "LOCK", PATH, &lock("id")).await, 200);
}

#[tokio::test]
async fn a_run_keeps_a_workstation_out_and_is_named() {
    let scene = Scene::new().await;
    let ann = scene.person("ann", Access::Admin).await;
    let run = scene.fixture.queue("first").await;
    let held = scene.ask(&ann, "LOCK", PATH, &[], &lock("id")).await;
    assert_eq!(held.status, 423);
    let told = held.json()["ID"].as_str().unwrap().to_owned();
    assert!(told.starts_with(&format!("run {} of ada (", run.id)), "{told}");
    assert_eq!(scene.status(&ann, "POST", &format!("{PATH}?ID=id"), &state(1)).await, 423);
}

#[tokio::test]
async fn an_old_copy_of_the_data_gives_no_state_away_to_be_worked_on() {
    let scene = Scene::new().await;
    let ann = scene.person("ann", Access::Admin).await;
    assert_eq!(scene.status(&ann, "LOCK", PATH, &lock("id")).await, 200);
    let fixture = &scene.fixture;
    let (runner, later) = (fixture.runner().await, fixture.told_later().await);
    fixture.app.greet(&runner, Some(&later)).await.unwrap_err();
    assert_eq!(scene.status(&ann, "POST", &format!("{PATH}?ID=id"), &state(1)).await, 409);
    // Terraform shows the ID alone, also of a lock that nobody has.
    let refused = scene.ask(&ann, "LOCK", PATH, &[], &lock("id")).await;
    assert_eq!(refused.status, 409);
    let told = refused.json()["ID"].as_str().unwrap().to_owned();
    assert!(told.starts_with("none: a runner has seen a later history"), "{told}");
    let app = &fixture.app;
    let lost = app.rollback_state(&fixture.owner, "acme", "web", 1, "web").await.unwrap_err();
    assert_eq!(lost.reason(), Reason::HistoryLost);
    assert_eq!(scene.status(&ann, "GET", PATH, b"").await, 204, "people can still look");
}

#[tokio::test]
async fn bodies_are_bounded_and_all_else_is_left_to_grpc() {
    let scene = Scene::new().await;
    let ann = scene.person("ann", Access::Admin).await;
    let large = vec![b' '; LARGEST_INFO + 1];
    assert_eq!(scene.status(&ann, "LOCK", PATH, &large).await, 413);
    assert_eq!(scene.status(&ann, "LOCK", PATH, &lock("a b")).await, 400);
    assert_eq!(scene.status(&ann, "LOCK", PATH, &lock("id")).await, 200);
    let announced = (LARGEST_STATE + 1).to_string();
    let headers = [("content-length", announced.as_str())];
    let with_id = format!("{PATH}?ID=id");
    assert_eq!(scene.ask(&ann, "POST", &with_id, &headers, b"").await.status, 413);
    let headers = [("content-length", "7")];
    assert_eq!(scene.ask(&ann, "POST", &with_id, &headers, &state(1)).await.status, 400);
    for path in ["/latchkey.v1.RunService/GetRun", "/", "/states", "/state"] {
        assert_eq!(scene.status(&ann, "POST", path, b"").await, 418, "{path}");
    }
}

#[tokio::test]
async fn a_state_that_comes_too_slowly_loses_its_place() {
    let scene = Scene::new().await;
    let ann = scene.person("ann", Access::Admin).await;
    assert_eq!(scene.status(&ann, "LOCK", PATH, &lock("id")).await, 200);
    tokio::time::pause();
    for part in [b" ".as_slice(), b""] {
        let (sender, body) = sent();
        let trickle = tokio::spawn(async move {
            let mut taken = 0;
            let part = Bytes::from_static(part);
            while taken < 50 && sender.send(Ok(Frame::data(part.clone()))).await.is_ok() {
                taken += 1;
                tokio::time::sleep(Duration::from_secs(50)).await;
            }
            taken
        });
        let answer = scene.begin(&ann, "POST", &format!("{PATH}?ID=id"), &[], body).await;
        assert_eq!(answer.status().as_u16(), 400);
        assert!(trickle.await.unwrap() <= 4);
    }
}

#[tokio::test]
async fn a_token_that_ends_takes_the_state_with_it_that_comes() {
    let scene = Scene::new().await;
    let ann = scene.person("ann", Access::Admin).await;
    assert_eq!(scene.status(&ann, "LOCK", PATH, &lock("id")).await, 200);
    let (sender, body) = sent();
    let path = format!("{PATH}?ID=id");
    let answer = scene.begin(&ann, "POST", &path, &[], body);
    let revoked = async {
        // The third waits for the first to be taken.
        for _ in 0..3 {
            sender.send(Ok(Frame::data(Bytes::from_static(b" ")))).await.unwrap();
        }
        let (app, owner) = (&scene.fixture.app, &scene.fixture.owner);
        app.reset_user(owner, "acme", "ann", "reset").await.unwrap();
        // It is not ended by its sender.
        sender
    };
    let both = async { tokio::join!(answer, revoked) };
    let (answer, _sender) = tokio::time::timeout(Duration::from_secs(20), both).await.unwrap();
    assert_eq!(answer.status().as_u16(), 401);
}

#[tokio::test]
async fn what_is_read_of_a_state_ends_with_the_right_to_it() {
    let scene = Scene::new().await;
    let ann = scene.person("ann", Access::Admin).await;
    assert_eq!(scene.status(&ann, "LOCK", PATH, &lock("id")).await, 200);
    assert_eq!(scene.status(&ann, "POST", &format!("{PATH}?ID=id"), &large()).await, 200);
    let mut body = scene.begin(&ann, "GET", PATH, &[], Body::empty()).await.into_body();
    assert!(body.frame().await.unwrap().is_ok());
    let (app, owner) = (&scene.fixture.app, &scene.fixture.owner);
    app.remove_member(owner, "acme", "ann").await.unwrap();
    assert!(body.frame().await.unwrap().is_err());
    assert!(body.frame().await.is_none());
}

#[tokio::test]
async fn a_state_that_nobody_goes_on_reading_is_closed() {
    let scene = Scene::new().await;
    let ann = scene.person("ann", Access::Admin).await;
    assert_eq!(scene.status(&ann, "LOCK", PATH, &lock("id")).await, 200);
    assert_eq!(scene.status(&ann, "POST", &format!("{PATH}?ID=id"), &large()).await, 200);
    tokio::time::pause();
    let mut body = scene.begin(&ann, "GET", PATH, &[], Body::empty()).await.into_body();
    assert!(body.frame().await.unwrap().is_ok());
    assert_eq!(scene.fixture.open_blobs(), 1);
    tokio::time::sleep(Duration::from_secs(120)).await;
    assert_eq!(scene.fixture.open_blobs(), 0);
    // What came is not taken for the whole.
    while body.frame().await.expect("more than it is sent").is_ok() {}
}
