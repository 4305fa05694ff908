//! What one runner can have open, and for how long it can keep it without a word.

use std::pin::Pin;
use std::time::Duration;

use latchkey_harness::simulated_runner::SimulatedRunner;
use latchkey_harness::{LIMIT, wait_for};
use latchkey_proto::v1::runner_service_client::RunnerServiceClient;
use latchkey_proto::v1::{self, Phase, RunState};
use prost::Message;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::codegen::Body;
use tonic::transport::Channel;
use tonic::{Code, Status, Streaming};

use super::scene::{Raw, Scene, chunk};

/// How many streams of bulk data a runner of one slot has.
const BULK: usize = 64;

/// How many connections a runner has.
const CONNECTIONS: usize = 16;

/// A stream that never says a word, until it is dropped.
struct Silent {
    _chunks: mpsc::Sender<v1::AppendLogRequest>,
    answers: Streaming<v1::AppendLogResponse>,
}

async fn silent(client: &RunnerServiceClient<Channel>) -> Result<Silent, Status> {
    let (chunks, nothing) = mpsc::channel(1);
    let answers = client.clone().append_log(ReceiverStream::new(nothing)).await?.into_inner();
    Ok(Silent { _chunks: chunks, answers })
}

#[tokio::test]
async fn the_65th_stream_of_one_runner_is_refused_and_others_go_on() {
    let mut scene = Scene::new().await.unwrap();
    let second = Scene::connect(&scene.listener, &scene.identity).await.unwrap();
    let mut open = vec![];
    for number in 0..BULK {
        let client = if number % 2 == 0 { &scene.client } else { &second };
        open.push(silent(client).await.unwrap());
    }
    for client in [&scene.client, &second] {
        let refused = silent(client).await.err().expect("one too many was let in");
        assert_eq!(refused.code(), Code::ResourceExhausted, "{refused:?}");
        assert!(refused.message().contains("64 streams of bulk data"), "{refused:?}");
    }
    // Its lease stream is counted apart, and others' streams are theirs.
    Raw::welcomed(&second).await.unwrap();
    scene.honest_goes_on().await.unwrap();
    drop(open.pop());
    let mut again = None;
    wait_for("a place to be free", LIMIT, async || {
        again = Some(silent(&second).await.map_err(|status| status.to_string())?);
        Ok::<_, String>(())
    })
    .await
    .unwrap();
    assert_eq!(scene.honest_finishes().await.unwrap().state(), RunState::AwaitingConfirmation);
}

#[tokio::test]
async fn a_runner_with_many_slots_has_streams_for_all_of_them() {
    let scene = Scene::new().await.unwrap();
    let mut runner = SimulatedRunner::connect(&scene.listener, &scene.identity, 256).await.unwrap();
    let mut open = vec![];
    for _ in 0..3 * 256 {
        open.push(silent(&runner.client).await.unwrap());
    }
    // Its heartbeats have room beside them.
    let beat = v1::lease_request::Frame::Heartbeat(v1::Heartbeat { held: vec![] });
    runner.send(beat).await.unwrap();
    timeout(LIMIT, runner.next()).await.unwrap().unwrap();
}

#[tokio::test]
async fn the_oldest_connection_of_one_runner_gives_way_to_the_newest() {
    // Its silence is not what ends the first.
    let mut scene = Scene::with(&["--stream-patience", "3600"]).await.unwrap();
    let mut clients = vec![];
    let mut first = silent(&scene.client).await.unwrap();
    for _ in 0..CONNECTIONS {
        let client = Scene::connect(&scene.listener, &scene.identity).await.unwrap();
        drop(silent(&client).await.unwrap());
        clients.push(client);
    }
    let ended = timeout(LIMIT, first.answers.message()).await.unwrap();
    assert!(ended.is_err(), "{ended:?}");
    Raw::welcomed(clients.last().unwrap()).await.unwrap();
    silent(&clients[0]).await.unwrap();
    scene.honest_goes_on().await.unwrap();
    assert_eq!(scene.honest_finishes().await.unwrap().state(), RunState::AwaitingConfirmation);
}

#[tokio::test]
async fn a_connection_that_never_asks_for_anything_is_ended() {
    let mut scene = Scene::new().await.unwrap();
    let address = |url: String| url.rsplit('/').next().unwrap_or_default().to_owned();
    let plane = &scene.stage.plane;
    for address in [address(plane.runners_url()), address(plane.people_url())] {
        let mut half = TcpStream::connect(&address).await.unwrap();
        // The beginning of a `ClientHello`.
        half.write_all(&[0x16, 3, 1]).await.unwrap();
        let read = timeout(LIMIT, half.read(&mut [0; 64])).await.unwrap();
        assert_eq!(read.unwrap_or(0), 0);
    }
    scene.honest_goes_on().await.unwrap();
}

/// A message as it is framed.
fn framed(message: &impl Message) -> Vec<u8> {
    let length = u32::try_from(message.encoded_len()).unwrap();
    let mut framed = vec![0];
    framed.extend_from_slice(&length.to_be_bytes());
    framed.extend_from_slice(&message.encode_to_vec());
    framed
}

/// Sends bytes, then nothing, and answers the code that ends the stream, wherever it comes.
async fn code_after(mut channel: Channel, method: &str, bytes: Vec<u8>) -> Code {
    let parts = tokio_stream::iter([Ok::<_, std::io::Error>(bytes)]).chain(tokio_stream::pending());
    let request = tonic::codegen::http::Request::builder()
        .method("POST")
        .uri(format!("https://runners/latchkey.v1.RunnerService/{method}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(tonic::body::Body::new(axum::body::Body::from_stream(parts)))
        .unwrap();
    let ready = tower::ServiceExt::ready(&mut channel).await.unwrap();
    let answer = tower::Service::call(ready, request).await.unwrap();
    let code = |headers: &tonic::codegen::http::HeaderMap| {
        let code = headers.get("grpc-status")?.to_str().ok()?.parse::<i32>().ok()?;
        Some(Code::from_i32(code))
    };
    if let Some(code) = code(answer.headers()) {
        return code;
    }
    let mut body = answer.into_body();
    loop {
        let frame = std::future::poll_fn(|context| Pin::new(&mut body).poll_frame(context)).await;
        let frame = frame.expect("the stream ended without a code").unwrap();
        if let Some(code) = frame.trailers_ref().and_then(code) {
            return code;
        }
    }
}

#[tokio::test]
async fn a_stream_that_is_silent_in_the_middle_of_a_frame_is_ended_and_others_go_on() {
    // Time enough that nobody is taken for silent on a machine that is busy.
    let mut scene = Scene::with(&["--stream-patience", "5"]).await.unwrap();
    let (lease, mut client) = (scene.lease.clone(), scene.honest.client.clone());
    // Half a message at the start, by one that has no lease at all.
    let channel = Scene::channel(&scene.listener, &scene.identity).await.unwrap();
    let half = [&[0, 0, 1, 0, 0][..], &[b'x'; 1 << 10]].concat();
    let code = |method| timeout(LIMIT, code_after(channel.clone(), method, half.clone()));
    let (append, upload, lease_stream) =
        tokio::join!(code("AppendLog"), code("UploadArtifact"), code("Lease"));
    for code in [append, upload, lease_stream] {
        assert_eq!(code.unwrap(), Code::DeadlineExceeded);
    }
    scene.honest_goes_on().await.unwrap();
    // Half a message behind a whole one, by one that has.
    let line = b"{\"@message\":\"honest\"}\n";
    let first = chunk(Some(&lease), 0, &line[..10]);
    let bytes = [framed(&first), half].concat();
    let honest = Scene::channel(&scene.listener, &scene.honest_identity).await.unwrap();
    let code = timeout(LIMIT, code_after(honest, "AppendLog", bytes)).await.unwrap();
    assert_eq!(code, Code::DeadlineExceeded);
    // Nothing at all behind a whole message; what was acknowledged stays, and it goes on from there.
    let (chunks, outgoing) = mpsc::channel(4);
    chunks.send(chunk(Some(&lease), 10, &line[10..])).await.unwrap();
    let mut answers = client.append_log(ReceiverStream::new(outgoing)).await.unwrap().into_inner();
    assert_eq!(answers.message().await.unwrap().unwrap().durable_length, line.len() as u64);
    let ended = timeout(LIMIT, answers.message()).await.unwrap().unwrap_err();
    assert_eq!(ended.code(), Code::DeadlineExceeded, "{ended:?}");
    drop(chunks);
    assert_eq!(scene.stage.owner.read_log(&lease.run_id, Phase::Plan).await.unwrap(), line);
    scene.honest_goes_on().await.unwrap();
    // A stream that says something now and then lives on.
    let (chunks, outgoing) = mpsc::channel(4);
    let mut answers = client.append_log(ReceiverStream::new(outgoing)).await.unwrap().into_inner();
    let mut beat = tokio::time::interval(Duration::from_secs(1));
    for _ in 0..7 {
        beat.tick().await;
        chunks.send(chunk(Some(&lease), 0, line)).await.unwrap();
        let answer = timeout(LIMIT, answers.message()).await.unwrap().unwrap().unwrap();
        assert_eq!(answer.durable_length, line.len() as u64);
    }
    assert_eq!(scene.honest_finishes().await.unwrap().state(), RunState::AwaitingConfirmation);
}
