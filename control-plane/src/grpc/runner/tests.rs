//! The runners' streams over a real connection; the layer's proof is stood in for.

use std::time::Duration;

use latchkey_domain::id::{Digest, RunnerId};
use latchkey_domain::policy::MfaPolicy;
use latchkey_proto::v1::lease_response::Frame as Out;
use latchkey_proto::v1::runner_service_client::RunnerServiceClient;
use latchkey_proto::v1::runner_service_server::RunnerServiceServer;
use latchkey_proto::v1::upload_artifact_request::Part;
use tokio::net::TcpListener;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::Code;
use tonic::transport::{Channel, Server};

use super::*;
use crate::app::fixture::{ENVIRONMENT, Fixture, ORGANIZATION};
use crate::app::settings::SettingsChange;
use crate::store::record::runner::Runner;
use crate::store::record::{Text, encode};
use crate::store::{Batch, Expect, keys};

const LIMIT: Duration = Duration::from_secs(20);

struct Connected {
    fixture: Fixture,
    runner: RunnerIdentity,
    client: RunnerServiceClient<Channel>,
}

/// A control plane with an enrolled runner, and a way for that runner to call it.
async fn connected() -> Connected {
    let fixture = Fixture::new(MfaPolicy::Never).await;
    fixture.dispatch();
    let (app, owner) = (&fixture.app, &fixture.owner);
    let pool = app.create_pool(owner, ORGANIZATION, "build", "pool").await.unwrap().id;
    let change = SettingsChange { pool: Some("build".into()), ..SettingsChange::default() };
    app.update_environment(owner, ORGANIZATION, ENVIRONMENT, change, None).await.unwrap();
    let runner = RunnerIdentity {
        id: RunnerId::from_bytes([7; 16]),
        name: "builder".into(),
        organization: fixture.organization().await,
        pool: pool.0,
    };
    let record = Runner {
        id: Text(runner.id),
        name: runner.name.clone(),
        pool,
        organization: Text(runner.organization),
        key: Text(Digest::from_bytes([7; 32])),
        enrolled_at: app.now().into(),
        said: None,
        drained_at: None,
        revoked_at: None,
        fought_at: None,
    };
    let batch = Batch::new().put(keys::runner(runner.id), Expect::Absent, encode(&record));
    fixture.store.commit(batch).await.unwrap();

    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let service = Service { app: std::sync::Arc::clone(app) };
    let proved = runner.clone();
    let server = RunnerServiceServer::with_interceptor(service, move |mut request: Request<()>| {
        request.extensions_mut().insert(proved.clone());
        Ok(request)
    });
    let serving =
        Server::builder().add_service(server).serve_with_incoming(TcpListenerStream::new(listener));
    tokio::spawn(serving);
    let client = RunnerServiceClient::connect(format!("http://{address}")).await.unwrap();
    Connected { fixture, runner, client }
}

fn hello() -> v1::LeaseRequest {
    let hello = v1::Hello {
        slots: 2,
        engines: vec![v1::Engine { name: "terraform".into(), version: "1.11.4".into() }],
        ..v1::Hello::default()
    };
    v1::LeaseRequest { frame: Some(In::Hello(hello)) }
}

async fn next(stream: &mut Streaming<v1::LeaseResponse>) -> Result<Out, Status> {
    let frame = tokio::time::timeout(LIMIT, stream.message()).await.expect("a frame was due");
    frame.map(|frame| frame.expect("the stream ended").frame.expect("the frame is not empty"))
}

async fn send_hello(
    client: &mut RunnerServiceClient<Channel>,
) -> (mpsc::Sender<v1::LeaseRequest>, Streaming<v1::LeaseResponse>) {
    let (sender, frames) = mpsc::channel(8);
    sender.send(hello()).await.unwrap();
    let stream = client.lease(ReceiverStream::new(frames)).await.unwrap().into_inner();
    (sender, stream)
}

#[tokio::test]
async fn a_revocation_ends_every_open_stream_at_once() {
    let Connected { fixture, runner, mut client } = connected().await;
    let (frames, mut leases) = send_hello(&mut client).await;
    assert!(matches!(next(&mut leases).await.unwrap(), Out::Welcome(_)));
    let run = fixture.queue("first").await;
    let Out::Offer(offer) = next(&mut leases).await.unwrap() else { panic!("no offer") };
    let lease = offer.lease.unwrap();
    let starting = v1::Starting { lease: Some(lease.clone()) };
    frames.send(v1::LeaseRequest { frame: Some(In::Starting(starting)) }).await.unwrap();
    assert!(matches!(next(&mut leases).await.unwrap(), Out::Go(_)));

    let (log, chunks) = mpsc::channel(8);
    let chunk =
        v1::AppendLogRequest { lease: Some(lease.clone()), offset: 0, data: b"line\n".to_vec() };
    log.send(chunk).await.unwrap();
    let appends = client.append_log(ReceiverStream::new(chunks)).await.unwrap();
    let mut appends = appends.into_inner();
    assert_eq!(appends.message().await.unwrap().unwrap().durable_length, 5);

    let (parts, uploading) = mpsc::channel(8);
    let header = v1::ArtifactHeader {
        lease: Some(lease),
        kind: v1::ArtifactKind::Workspace.into(),
        digest: "00".repeat(32),
        size: 1 << 20,
        ..v1::ArtifactHeader::default()
    };
    parts.send(v1::UploadArtifactRequest { part: Some(Part::Header(header)) }).await.unwrap();
    let mut uploader = client.clone();
    let upload =
        tokio::spawn(async move { uploader.upload_artifact(ReceiverStream::new(uploading)).await });
    let data = v1::UploadArtifactRequest { part: Some(Part::Data(vec![0; 1024])) };
    parts.send(data).await.unwrap();

    fixture.app.revoke_runner(&fixture.owner, runner.id).await.unwrap();
    assert_eq!(next(&mut leases).await.unwrap_err().code(), Code::Unauthenticated);
    let appended = tokio::time::timeout(LIMIT, appends.message()).await.unwrap();
    assert_eq!(appended.unwrap_err().code(), Code::Unauthenticated);
    let uploaded = tokio::time::timeout(LIMIT, upload).await.unwrap().unwrap();
    assert_eq!(uploaded.unwrap_err().code(), Code::Unauthenticated);
    // Should a later call pass the layer at the very moment, it ends as well.
    let (_frames, mut leases) = send_hello(&mut client).await;
    assert_eq!(next(&mut leases).await.unwrap_err().code(), Code::Unauthenticated);
    let waits = fixture.run(&run).await.reason.unwrap();
    assert_eq!(waits, "waits for a runner of pool build: none is connected");
}

#[tokio::test]
async fn a_drain_is_told_at_once_and_again_after_each_welcome() {
    let Connected { fixture, runner, mut client } = connected().await;
    let (_first, mut leases) = send_hello(&mut client).await;
    assert!(matches!(next(&mut leases).await.unwrap(), Out::Welcome(_)));
    // Registered once it is seen to be connected.
    let (app, owner) = (&fixture.app, &fixture.owner);
    let seen = async {
        while !app.show_runner(owner, runner.id).await.unwrap().seen.connected {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(LIMIT, seen).await.unwrap();
    app.drain_runner(owner, runner.id).await.unwrap();
    assert!(matches!(next(&mut leases).await.unwrap(), Out::Drain(_)));
    let (_second, mut again) = send_hello(&mut client).await;
    assert!(matches!(next(&mut again).await.unwrap(), Out::Welcome(_)));
    assert!(matches!(next(&mut again).await.unwrap(), Out::Drain(_)));
    // The stream that was there before gave way.
    assert_eq!(next(&mut leases).await.unwrap_err().code(), Code::Aborted);
    fixture.queue("first").await;
    app.resume_runner(owner, runner.id).await.unwrap();
    assert!(matches!(next(&mut again).await.unwrap(), Out::Resume(_)));
    assert!(matches!(next(&mut again).await.unwrap(), Out::Offer(_)));
}

#[tokio::test]
async fn a_runner_that_says_it_drains_is_offered_nothing() {
    let Connected { fixture, runner, mut client } = connected().await;
    let (frames, mut leases) = send_hello(&mut client).await;
    assert!(matches!(next(&mut leases).await.unwrap(), Out::Welcome(_)));
    frames.send(v1::LeaseRequest { frame: Some(In::Draining(v1::Draining {})) }).await.unwrap();
    let (app, owner) = (&fixture.app, &fixture.owner);
    let seen = async {
        while !app.show_runner(owner, runner.id).await.unwrap().seen.draining {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(LIMIT, seen).await.unwrap();
    let run = fixture.queue("first").await;
    let waits = "waits for a runner of pool build: all suitable runners are busy or draining";
    assert_eq!(fixture.run(&run).await.reason.unwrap(), waits);
    let (_frames, mut leases) = send_hello(&mut client).await;
    assert!(matches!(next(&mut leases).await.unwrap(), Out::Welcome(_)));
    assert!(matches!(next(&mut leases).await.unwrap(), Out::Offer(_)));
}
