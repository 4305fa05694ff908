//! gRPC: parses, asks a use case, translates the answer; decides nothing.
//!
//! Two listeners. The people's carries every service but the runners', with health and
//! reflection; the runners' carries `RunnerService` alone. A layer in front of each proves who
//! is calling, by the table in [`crate::auth::rules`], before any service sees the request.

mod account;
mod audit;
#[cfg(test)]
mod audited_tests;
mod convert;
mod enrolling;
mod environment;
#[cfg(test)]
mod health_tests;
mod identity;
mod introduction;
mod member;
mod notice;
mod organization;
mod places;
mod pool;
mod quarantine;
mod revocable;
mod run;
mod runner;
mod session;
mod settings;
mod state;
pub mod status;
#[cfg(test)]
mod tenants_tests;
mod variable;

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio_stream::{Stream, StreamExt};
use tonic::server::NamedService;
use tonic::service::Routes;
use tonic::transport::Server;
use tonic::{Request, Status, Streaming};

use latchkey_proto::v1::account_service_server::AccountServiceServer;
use latchkey_proto::v1::audit_service_server::AuditServiceServer;
use latchkey_proto::v1::environment_service_server::EnvironmentServiceServer;
use latchkey_proto::v1::member_service_server::MemberServiceServer;
use latchkey_proto::v1::notice_service_server::NoticeServiceServer;
use latchkey_proto::v1::organization_service_server::OrganizationServiceServer;
use latchkey_proto::v1::pool_service_server::PoolServiceServer;
use latchkey_proto::v1::quarantine_service_server::QuarantineServiceServer;
use latchkey_proto::v1::run_service_server::RunServiceServer;
use latchkey_proto::v1::runner_service_server::RunnerServiceServer;
use latchkey_proto::v1::session_service_server::SessionServiceServer;
use latchkey_proto::v1::state_service_server::StateServiceServer;
use latchkey_proto::v1::variable_service_server::VariableServiceServer;

use crate::app::App;
use crate::app::guarded_change::GivenCode;
use crate::app::open_streams::{self, Lost};
use crate::auth::{Caller, Proof};
use crate::blobs::BlobReader;
use crate::error::Error;

pub use self::identity::{PeopleLayer, RunnersLayer};

/// The largest message that either side may send; bulk data comes in parts.
const LARGEST_MESSAGE: usize = 4 << 20;

/// The largest message of a runner: a part of an artifact. Half a message is kept until the other
/// half comes, on each of a connection's streams.
const LARGEST_OF_RUNNERS: usize = (1 << 20) + (64 << 10);

/// The largest message of whoever shows no more than a secret in it.
const LARGEST_WITH_SECRET: usize = 64 << 10;

/// What streaming rpcs answer.
type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// The part of every service: the use cases.
#[derive(Clone, Debug)]
struct Service {
    app: Arc<App>,
}

macro_rules! limited {
    ($server:ident, $service:expr) => {
        $server::new($service.clone())
            .max_decoding_message_size(LARGEST_MESSAGE)
            .max_encoding_message_size(LARGEST_MESSAGE)
    };
}

/// The services of the people's listener.
///
/// Health tells two things apart, since a probe must not make things worse. The process as a
/// whole (the empty name) serves as long as it answers: a restart would not mend an old copy of
/// the data, and people must be able to look. `latchkey.v1.RunnerService` stops serving when the
/// history is lost: for readiness of the runners' port, and for whoever watches.
pub async fn people(app: Arc<App>) -> Routes {
    let service = Service { app };
    let (health, serving) = tonic_health::server::health_reporter();
    health.set_service_status("", tonic_health::ServingStatus::Serving).await;
    let runners = RunnerServiceServer::<Service>::NAME;
    health.set_service_status(runners, tonic_health::ServingStatus::Serving).await;
    let history = service.app.history.clone();
    tokio::spawn(async move {
        loop {
            history.lost().await;
            health.set_service_status(runners, tonic_health::ServingStatus::NotServing).await;
            history.found().await;
            health.set_service_status(runners, tonic_health::ServingStatus::Serving).await;
        }
    });
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(latchkey_proto::DESCRIPTOR_SET)
        .build_v1()
        .expect("the descriptor set was made by this build");
    Routes::new(serving)
        .add_service(reflection)
        .add_service(
            limited!(AccountServiceServer, service).max_decoding_message_size(LARGEST_WITH_SECRET),
        )
        .add_service(
            limited!(SessionServiceServer, service).max_decoding_message_size(LARGEST_WITH_SECRET),
        )
        .add_service(limited!(MemberServiceServer, service))
        .add_service(limited!(OrganizationServiceServer, service))
        .add_service(limited!(EnvironmentServiceServer, service))
        .add_service(limited!(VariableServiceServer, service))
        .add_service(limited!(RunServiceServer, service))
        .add_service(limited!(PoolServiceServer, service))
        .add_service(limited!(QuarantineServiceServer, service))
        .add_service(limited!(StateServiceServer, service))
        .add_service(limited!(AuditServiceServer, service))
        .add_service(limited!(NoticeServiceServer, service))
}

/// The service of the runners' listener.
pub fn runners(app: Arc<App>) -> Routes {
    Routes::new(enrolling::Runners::new(app))
}

/// How many streams one connection of a person or program has.
const MOST_STREAMS: u32 = 256;

/// How many streams one connection of a runner has: what all its slots may need. How many of them
/// are let in is decided for each runner.
const MOST_STREAMS_OF_RUNNER: u32 = 1024;

/// A transport with the bounds that both listeners have. Its pings end a connection that leaves
/// a frame or a block of headers half sent, since no answer to a ping fits in between.
pub fn server() -> Server {
    Server::builder()
        .http2_keepalive_interval(Some(Duration::from_secs(20)))
        .http2_keepalive_timeout(Some(Duration::from_secs(20)))
        .max_concurrent_streams(MOST_STREAMS)
        .http2_max_header_list_size(16 * 1024)
        .http2_max_pending_accept_reset_streams(Some(64))
        .concurrency_limit_per_connection(MOST_STREAMS as usize)
}

/// A transport for runners.
pub(crate) fn runners_server() -> Server {
    server()
        .max_concurrent_streams(MOST_STREAMS_OF_RUNNER)
        .concurrency_limit_per_connection(MOST_STREAMS_OF_RUNNER as usize)
}

/// Takes the code that may come with a change out of its request.
fn given_code(token_code: &mut String, request_id: &mut String) -> Option<GivenCode> {
    let code = std::mem::take(token_code);
    let request_id = std::mem::take(request_id);
    (!code.is_empty()).then(|| GivenCode { code: code.into(), request_id })
}

/// The caller that the layer proved.
fn caller<T>(request: &Request<T>) -> Result<Caller, Status> {
    proof(request).map(|proof| proof.caller)
}

/// The same with what it was proved by: for who asks about it, and for open streams.
fn proof<T>(request: &Request<T>) -> Result<Proof, Status> {
    let proof = request.extensions().get::<Proof>().cloned();
    proof.ok_or_else(|| Error::internal("the layer let an unproved caller pass").into())
}

/// Sends a blob part by part, until the right to it ends.
fn parts<T: 'static>(
    reader: BlobReader,
    lost: Lost,
    part: impl Fn(Vec<u8>) -> T + Send + 'static,
) -> Answers<T> {
    Box::pin(open_streams::parts(reader, lost).map(move |data| Ok(part(data?))))
}

/// How long the sender of a stream of parts may be silent, if nothing else is set; and the whole
/// of a request that is a single message.
const PART_TIMEOUT: Duration = Duration::from_secs(60);

/// Reads the next part of an upload; a sender that has gone quiet does not keep its place.
async fn next_part<T>(parts: &mut Streaming<T>) -> Result<Option<T>, Status> {
    next_part_within(PART_TIMEOUT, parts).await
}

async fn next_part_within<T>(
    patience: Duration,
    parts: &mut Streaming<T>,
) -> Result<Option<T>, Status> {
    tokio::time::timeout(patience, parts.message()).await.map_err(|_| silent_for(patience))?
}

fn silent_for(patience: Duration) -> Status {
    Status::deadline_exceeded(format!(
        "no whole message came for {} s; go on from what was acknowledged",
        patience.as_secs()
    ))
}

/// Sends what a caller has to take; one that has stopped reading does not keep its place.
async fn send_within<T>(
    patience: Duration,
    answers: &mpsc::Sender<Result<T, Status>>,
    answer: Result<T, Status>,
) -> Result<(), Status> {
    match tokio::time::timeout(patience, answers.send(answer)).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(_)) => Err(Status::cancelled("the caller is gone")),
        Err(_) => Err(Status::deadline_exceeded("the answers were not read")),
    }
}
