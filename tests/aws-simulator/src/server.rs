//! The HTTP front: one listener, requests for STS and S3 judged in the order they were read.
//!
//! ```text
//! read ─► entered in the journal ─► fault before? ─► judged and performed ─► fault after? ─► answer
//! ```
//!
//! A reset is a real one: the connection is closed with pending data discarded, so that the
//! caller sees what a broken network path shows it and not a tidy end of stream.

use std::collections::BTreeMap;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::connect_info::{ConnectInfo, Connected};
use axum::extract::{Request, State as Extract};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::serve::{IncomingStream, Listener};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};

use crate::credentials::{Incoming, claimed_key, claimed_service};
use crate::errors::Refusal;
use crate::faults::{Effect, Fault, Service, Stage};
use crate::journal::{Call, Outcome};
use crate::state::{Shared, State};
use crate::{control, s3, sts};

/// More than any state file of a test.
const LARGEST_BODY: usize = 32 << 20;
/// How long to rest after the system refused to accept a connection.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Serves until the handle is stopped.
pub(crate) async fn serve(listener: TcpListener, shared: Shared) -> io::Result<()> {
    let stop = shared.stop.clone();
    let app = Router::new()
        .nest("/_simulator", control::router())
        .fallback(front)
        .with_state(shared)
        .into_make_service_with_connect_info::<Peer>();
    axum::serve(ResettableListener(listener), app)
        .with_graceful_shutdown(async move { stop.cancelled().await })
        .await
}

/// What a request asks for, before anything is known about its sender.
struct Asked {
    service: Service,
    action: String,
    code: Option<String>,
    members: BTreeMap<String, String>,
}

/// What came of performing a request.
struct Performed {
    caller: Option<String>,
    outcome: Outcome,
    response: Response,
}

async fn front(
    Extract(shared): Extract<Shared>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    request: Request,
) -> Response {
    let (parts, body) = request.into_parts();
    let Ok(body) = axum::body::to_bytes(body, LARGEST_BODY).await else {
        return StatusCode::BAD_REQUEST.into_response();
    };
    let request = Incoming { method: parts.method, uri: parts.uri, headers: parts.headers, body };
    let asked = asked(&request);
    let call = Call {
        service: asked.service,
        action: asked.action.clone(),
        access_key_id: claimed_key(&request.headers),
        had_code: asked.code.is_some(),
        members: asked.members.clone(),
        caller: None,
        outcome: Outcome::Pending,
        answered: false,
    };
    let (place, fault) = {
        let mut state = shared.lock();
        let place = state.journal.enter(call, asked.code.as_deref());
        (place, state.script.take(asked.service, &asked.action))
    };
    shared.changed();
    let answer = answer(&shared, &request, &asked, fault, place).await;
    if let Some(call) = shared.lock().journal.call_mut(place) {
        call.answered = answer.is_some();
    }
    shared.changed();
    tracing::debug!(action = asked.action, answered = answer.is_some(), "request handled");
    match answer {
        Some(response) => response,
        None => {
            peer.reset();
            StatusCode::INTERNAL_SERVER_ERROR.into_response()
        }
    }
}

fn asked(request: &Incoming) -> Asked {
    if request.uri.path() == "/" {
        let form = sts::form_of(request);
        let text = |name| form.value(name).map(str::to_owned);
        Asked {
            service: Service::Sts,
            action: text("Action").unwrap_or_default(),
            code: text("TokenCode"),
            members: form.members(&["TokenCode"]),
        }
    } else {
        Asked {
            service: Service::S3,
            action: s3::Operation::of(request).name().to_owned(),
            code: None,
            members: BTreeMap::new(),
        }
    }
}

/// Answers a request, or returns nothing when the connection is to be reset.
async fn answer(
    shared: &Shared,
    request: &Incoming,
    asked: &Asked,
    fault: Option<Fault>,
    place: usize,
) -> Option<Response> {
    let (before, after) = match fault {
        Some(fault) if fault.stage == Stage::BeforeProcessing => (Some(fault), None),
        after => (None, after),
    };
    match strike(shared, asked.service, before).await {
        Strike::None => {}
        Strike::Answer(refusal) => {
            record(shared, place, None, Outcome::Refused(refusal.row().code.into_owned()));
            return Some(refuse(asked.service, &refusal));
        }
        Strike::Reset => return None,
    }
    let performed = perform(&mut shared.lock(), request, asked, shared.clock.now());
    record(shared, place, performed.caller, performed.outcome);
    match strike(shared, asked.service, after).await {
        Strike::None => Some(performed.response),
        Strike::Answer(refusal) => Some(refuse(asked.service, &refusal)),
        Strike::Reset => None,
    }
}

/// What a fault does to the request at hand.
enum Strike {
    None,
    Answer(Refusal),
    Reset,
}

async fn strike(shared: &Shared, service: Service, fault: Option<Fault>) -> Strike {
    let Some(fault) = fault else { return Strike::None };
    tracing::debug!(?service, effect = ?fault.effect, stage = ?fault.stage, "fault strikes");
    if fault.delay_ms > 0 {
        tokio::select! {
            () = tokio::time::sleep(Duration::from_millis(fault.delay_ms)) => {}
            () = shared.stop.cancelled() => return Strike::Reset,
        }
    }
    match fault.effect {
        Effect::Proceed => Strike::None,
        Effect::ServiceUnavailable => Strike::Answer(Refusal::ServiceUnavailable),
        Effect::InternalFailure => Strike::Answer(Refusal::InternalFailure),
        Effect::Throttle => Strike::Answer(Refusal::Throttled),
        Effect::Reset => Strike::Reset,
        Effect::Refuse { status, code, message } => {
            Strike::Answer(Refusal::Scripted { status, code, message })
        }
    }
}

fn record(shared: &Shared, place: usize, caller: Option<String>, outcome: Outcome) {
    if let Some(call) = shared.lock().journal.call_mut(place) {
        call.caller = caller;
        call.outcome = outcome;
    }
    shared.changed();
}

fn perform(
    state: &mut State,
    request: &Incoming,
    asked: &Asked,
    now: jiff::Timestamp,
) -> Performed {
    match asked.service {
        Service::Sts => {
            // IAM shares the protocol and the path; only the signature tells them apart.
            let iam = claimed_service(&request.headers).as_deref() == Some("iam");
            let service = if iam { "iam" } else { "sts" };
            let form = sts::form_of(request);
            let judged = sts::judge(state, request, &form, service, now);
            let (outcome, response) = match judged.answer {
                Ok(result) => {
                    let id = request_id();
                    let body = sts::body(&asked.action, &result, &id);
                    (Outcome::Accepted, xml(StatusCode::OK, body, "x-amzn-requestid", &id))
                }
                Err(refusal) => (
                    Outcome::Refused(refusal.row().code.into_owned()),
                    refuse(asked.service, &refusal),
                ),
            };
            Performed { caller: judged.caller, outcome, response }
        }
        Service::S3 => {
            let judged = s3::judge(state, request, now);
            let (outcome, response) = match judged.reply {
                Ok(reply) => (Outcome::Accepted, reply.into_response(&request_id())),
                Err(denied) => (Outcome::Refused(denied.code().into_owned()), s3_refusal(&denied)),
            };
            Performed { caller: judged.caller, outcome, response }
        }
    }
}

fn refuse(service: Service, refusal: &Refusal) -> Response {
    match service {
        Service::Sts => {
            let (row, id) = (refusal.row(), request_id());
            xml(status(row.status), row.sts_body(&id), "x-amzn-requestid", &id)
        }
        Service::S3 => s3_refusal(&s3::Denied::Signature(refusal.clone())),
    }
}

fn s3_refusal(denied: &s3::Denied) -> Response {
    let id = request_id();
    xml(status(denied.status()), denied.body(&id), "x-amz-request-id", &id)
}

fn xml(status: StatusCode, body: String, id_header: &'static str, id: &str) -> Response {
    let mut response = Response::new(Body::from(body));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/xml"));
    if let Ok(id) = HeaderValue::from_str(id) {
        headers.insert(id_header, id);
    }
    response
}

fn status(code: u16) -> StatusCode {
    StatusCode::from_u16(code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR)
}

fn request_id() -> String {
    uuid::Uuid::new_v4().to_string()
}

/// A listener whose connections can be reset by who answers on them.
struct ResettableListener(TcpListener);

/// The handler's end of a connection.
#[derive(Debug, Clone, Default)]
struct Peer {
    /// Set by the handler; read before the answer is written.
    reset: Arc<AtomicBool>,
}

/// The transport's end of a connection.
struct ResettableStream {
    stream: TcpStream,
    peer: Peer,
}

impl Peer {
    fn reset(&self) {
        self.reset.store(true, Ordering::Release);
    }
}

impl Listener for ResettableListener {
    type Io = ResettableStream;
    type Addr = Peer;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        loop {
            match self.0.accept().await {
                Ok((stream, _)) => {
                    let peer = Peer::default();
                    // Without this, small answers wait for the caller's acknowledgements.
                    if stream.set_nodelay(true).is_ok() {
                        return (ResettableStream { stream, peer: peer.clone() }, peer);
                    }
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    fn local_addr(&self) -> io::Result<Self::Addr> {
        Ok(Peer::default())
    }
}

impl Connected<IncomingStream<'_, ResettableListener>> for Peer {
    fn connect_info(stream: IncomingStream<'_, ResettableListener>) -> Self {
        stream.remote_addr().clone()
    }
}

impl AsyncRead for ResettableStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for ResettableStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        if self.peer.reset.load(Ordering::Acquire) {
            // Nobody lingers over the rest, so closing sends a reset at once.
            self.stream.set_zero_linger()?;
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        }
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
