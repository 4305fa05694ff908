//! What ends a stream of states, whoever is at its other end.

use std::convert::Infallible;
use std::time::Duration;

use http_body::Frame;
use http_body_util::StreamBody;
use latchkey_domain::policy::MfaPolicy;
use prost::Message;
use prost::bytes::{BufMut, Bytes, BytesMut};
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Code;
use tonic::codec::{DecodeBuf, Decoder};

use super::*;
use crate::app::fixture::{ENVIRONMENT, Fixture, ORGANIZATION};
use crate::auth::Proof;
use crate::store::record::people::{Access, Role};

struct Parts;

impl Decoder for Parts {
    type Item = v1::ImportStateRequest;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<Self::Item>, Status> {
        Ok(Some(Message::decode(buffer).unwrap()))
    }
}

struct Scene {
    fixture: Fixture,
    service: Service,
    proof: Proof,
}

/// What an import is sent.
#[derive(Clone)]
struct Sender(mpsc::Sender<Result<Frame<Bytes>, Infallible>>);

impl Sender {
    async fn send(&self, part: Part) -> bool {
        let message = v1::ImportStateRequest { part: Some(part) }.encode_to_vec();
        let mut framed = BytesMut::new();
        framed.put_u8(0);
        framed.put_u32(u32::try_from(message.len()).unwrap());
        framed.put_slice(&message);
        self.0.send(Ok(Frame::data(framed.freeze()))).await.is_ok()
    }

    async fn header(&self) {
        let (organization, environment) = (ORGANIZATION.into(), ENVIRONMENT.into());
        let header = v1::ImportStateHeader { organization, environment };
        assert!(self.send(Part::Header(header)).await);
    }
}

impl Scene {
    async fn new() -> Self {
        let fixture = Fixture::new(MfaPolicy::Never).await;
        let (app, owner) = (&fixture.app, &fixture.owner);
        let (role, access) = (Role::Member, Access::Admin);
        let token = app.create_user(owner, ORGANIZATION, "ann", role, access, "ann").await.unwrap();
        let proof = app.prove(&token).await.unwrap();
        let service = Service { app: std::sync::Arc::clone(app) };
        Self { fixture, service, proof }
    }

    fn by_ann<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.extensions_mut().insert(self.proof.clone());
        request
    }

    async fn import(
        &self,
        parts: mpsc::Receiver<Result<Frame<Bytes>, Infallible>>,
    ) -> Result<(), Status> {
        let body = StreamBody::new(ReceiverStream::new(parts));
        let parts = Streaming::new_request(Parts, body, None, None);
        self.service.import_state(self.by_ann(parts)).await.map(drop)
    }

    /// Imports a state of many parts, and begins to read it.
    async fn reading(&self) -> Answers<v1::ReadStateVersionResponse> {
        let (sender, parts) = mpsc::channel(8);
        let sender = Sender(sender);
        sender.header().await;
        let state = format!(
            r#"{{"version":4,"serial":1,"lineage":"l","check_results":["{}"]}}"#,
            " ".repeat(1000)
        );
        let padded = format!("{}{state}", " ".repeat(2 << 20)).into_bytes();
        assert!(sender.send(Part::Data(padded)).await);
        drop(sender);
        self.import(parts).await.unwrap();
        let request = v1::ReadStateVersionRequest {
            organization: ORGANIZATION.into(),
            environment: ENVIRONMENT.into(),
            version: 0,
        };
        let answers = self.service.read_state_version(self.by_ann(request)).await.unwrap();
        let mut answers = answers.into_inner();
        assert!(answers.next().await.unwrap().is_ok());
        answers
    }
}

#[tokio::test]
async fn an_import_that_comes_too_slowly_loses_its_place() {
    let scene = Scene::new().await;
    tokio::time::pause();
    for part in [b" ".as_slice(), b""] {
        let (sender, parts) = mpsc::channel(1);
        let sender = Sender(sender);
        let trickle = tokio::spawn(async move {
            sender.header().await;
            let mut taken = 0;
            while taken < 50 && sender.send(Part::Data(part.to_vec())).await {
                taken += 1;
                tokio::time::sleep(Duration::from_secs(50)).await;
            }
            taken
        });
        let ended = scene.import(parts).await.unwrap_err();
        assert_eq!(ended.code(), Code::DeadlineExceeded, "{ended}");
        assert!(trickle.await.unwrap() <= 4);
    }
}

#[tokio::test]
async fn a_token_that_ends_takes_the_import_with_it() {
    let scene = Scene::new().await;
    let (sender, parts) = mpsc::channel(1);
    let sender = Sender(sender);
    let revoked = async {
        sender.header().await;
        for _ in 0..3 {
            assert!(sender.send(Part::Data(b" ".to_vec())).await);
        }
        let (app, owner) = (&scene.fixture.app, &scene.fixture.owner);
        app.reset_user(owner, ORGANIZATION, "ann", "reset").await.unwrap();
    };
    let both = async { tokio::join!(scene.import(parts), revoked).0 };
    let ended = tokio::time::timeout(Duration::from_secs(20), both).await.unwrap();
    assert_eq!(ended.unwrap_err().code(), Code::Unauthenticated);
}

#[tokio::test]
async fn what_is_read_of_a_version_ends_with_the_right_to_it() {
    let scene = Scene::new().await;
    let mut answers = scene.reading().await;
    let (app, owner) = (&scene.fixture.app, &scene.fixture.owner);
    app.remove_member(owner, ORGANIZATION, "ann").await.unwrap();
    assert!(answers.next().await.unwrap().is_err());
    assert!(answers.next().await.is_none());
}

#[tokio::test]
async fn a_version_that_nobody_goes_on_reading_is_closed() {
    let scene = Scene::new().await;
    tokio::time::pause();
    let mut answers = scene.reading().await;
    assert_eq!(scene.fixture.open_blobs(), 1);
    tokio::time::sleep(Duration::from_secs(120)).await;
    assert_eq!(scene.fixture.open_blobs(), 0);
    // What came is not taken for the whole.
    while answers.next().await.expect("more than it is sent").is_ok() {}
}
