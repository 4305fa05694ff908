//! Terraform's `http` backend: `GET` and `POST` of a state, `LOCK` and `UNLOCK` with the
//! information that terraform gives of itself as JSON.
//!
//! Terraform takes a 404 to its `GET` for "no state yet" and would make everything anew. So there
//! a thing that is not there, or not the caller's to see, is answered 403; and 404 elsewhere. An
//! environment without a state is answered 204. Of a refused lock it shows the `ID` alone, so that
//! says who the holder is.

use std::sync::Arc;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use http::header::{
    ALLOW, CACHE_CONTROL, CONTENT_LENGTH, CONTENT_TYPE, WWW_AUTHENTICATE, X_CONTENT_TYPE_OPTIONS,
};
use http::{HeaderValue, Request, Response, StatusCode};
use http_body::Frame;
use http_body_util::{BodyExt, Full, StreamBody};
use latchkey_proto::v1::Reason;
use md5::{Digest, Md5};
use prost::bytes::Bytes;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use tokio_stream::StreamExt;
use tonic::Code;
use tonic::body::Body;

use super::proof;
use crate::app::App;
use crate::app::open_streams::{Ground, parts, unless_lost};
use crate::app::state_lock::{Holder, LockAnswer, LockRequest};
use crate::app::states::push::{Sending, StateUpload};
use crate::auth::Proof;
use crate::error::{Error, Result, rfc3339};
use crate::grpc::status::code;

pub(super) const PREFIX: &str = "/state/";

const METHODS: &str = "GET, POST, LOCK, UNLOCK";

/// The most that a lock's information takes.
const LARGEST_INFO: usize = 64 << 10;

const LARGEST_STATE: u64 = 256 << 20;

/// How long a sender may be silent.
const PART_TIMEOUT: Duration = Duration::from_secs(60);

/// What is still taken of a body that was refused, so that its sender gets to read why.
const DRAINED: usize = 4 << 20;
const DRAIN: Duration = Duration::from_secs(5);

/// What terraform sends with `LOCK` and `UNLOCK`, and is told of a holder.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct LockInfo {
    #[serde(rename = "ID")]
    id: String,
    operation: String,
    info: String,
    who: String,
    version: String,
    #[serde(skip_deserializing)]
    created: String,
    path: String,
}

/// Whose state it is, as the path names it.
#[derive(Clone)]
struct Place {
    organization: String,
    environment: String,
}

impl Place {
    fn ground(&self) -> Ground {
        let Self { organization, environment } = self.clone();
        Ground::State { organization, environment }
    }
}

pub(super) async fn answer(app: &Arc<App>, request: Request<Body>) -> Response<Body> {
    let is_read = request.method() == http::Method::GET;
    let (head, mut body) = request.into_parts();
    let request = Request::from_parts(head, ());
    match handle(app, &request, &mut body).await {
        Ok(response) => response,
        Err(error) => {
            let _ = tokio::time::timeout(DRAIN, drain(&mut body)).await;
            refusal(&error, is_read)
        }
    }
}

async fn handle(app: &Arc<App>, request: &Request<()>, body: &mut Body) -> Result<Response<Body>> {
    let proof = app.prove(&proof::token(request.headers())?).await?;
    let caller = &proof.caller;
    let place = place(request.uri().path())?;
    match request.method().as_str() {
        "GET" => read(app, &proof, &place).await,
        "POST" => write(app, &proof, &place, request, body).await,
        "LOCK" => {
            let LockInfo { id, operation, info, who, version, .. } = lock_info(body).await?;
            let wish =
                LockRequest { id, operation, workstation: who, info, engine_version: version };
            let Place { organization, environment } = &place;
            match app.lock_state(caller, organization, environment, wish).await {
                Ok(answer) => Ok(locked(answer, StatusCode::LOCKED)),
                Err(error) => not_now(app, error),
            }
        }
        "UNLOCK" => {
            let LockInfo { id, .. } = lock_info(body).await?;
            let Place { organization, environment } = &place;
            let answer = app.unlock_state(caller, organization, environment, &id).await?;
            Ok(locked(answer, StatusCode::CONFLICT))
        }
        _ => {
            let mut response = text(StatusCode::METHOD_NOT_ALLOWED, "a state is never deleted\n");
            response.headers_mut().insert(ALLOW, HeaderValue::from_static(METHODS));
            Ok(response)
        }
    }
}

async fn read(app: &Arc<App>, proof: &Proof, place: &Place) -> Result<Response<Body>> {
    let Place { organization, environment } = place;
    let Some(reader) = app.read_newest_state(&proof.caller, organization, environment).await?
    else {
        return Ok(finished(StatusCode::NO_CONTENT, None, Bytes::new()));
    };
    let length = reader.length();
    let lost = app.hold(proof, place.ground()).await?;
    // The sender of too few bytes is cut off: a state is never taken in part.
    let frames = parts(reader, lost)
        .map(|part| part.map(|data| Frame::data(Bytes::from(data))).inspect_err(Error::log));
    let mut response = with_headers(Body::new(StreamBody::new(frames)));
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(CONTENT_LENGTH, HeaderValue::from(length));
    Ok(response)
}

async fn write(
    app: &Arc<App>,
    proof: &Proof,
    place: &Place,
    request: &Request<()>,
    body: &mut Body,
) -> Result<Response<Body>> {
    let announced = request
        .headers()
        .get(CONTENT_LENGTH)
        .and_then(|length| length.to_str().ok().and_then(|length| length.parse::<u64>().ok()));
    let lock = request.uri().query().unwrap_or_default().split('&').find_map(|pair| {
        let (name, value) = pair.split_once('=')?;
        (name == "ID").then(|| value.to_owned())
    });
    let sending = Sending::Push { lock: lock.unwrap_or_default() };
    let Place { organization, environment } = place;
    let upload = app.send_state(proof, organization, environment, sending).await?;
    if announced.is_some_and(|announced| announced > LARGEST_STATE) {
        return Err(too_large("a state has up to 256 MiB"));
    }
    let lost = app.hold(proof, place.ground()).await?;
    unless_lost(lost, take(upload, announced, request, body)).await?;
    Ok(finished(StatusCode::OK, None, Bytes::new()))
}

async fn take(
    mut upload: StateUpload,
    announced: Option<u64>,
    request: &Request<()>,
    body: &mut Body,
) -> Result<()> {
    let (mut digest, mut received) = (Md5::new(), 0);
    while let Some(data) = next_by(upload.due(), body).await? {
        digest.update(&data);
        received += data.len() as u64;
        upload.write(&data).await?;
    }
    if announced.is_some_and(|announced| announced != received) {
        return Err(Error::field("body", "it is shorter than announced; send it again"));
    }
    if let Some(expected) = request.headers().get("content-md5")
        && STANDARD.decode(expected.as_bytes()).ok().as_deref() != Some(&digest.finalize()[..])
    {
        let message = "the body has not the Content-MD5 that was announced; send it again";
        return Err(Error::refused(Reason::DigestMismatch, message));
    }
    upload.finish().await.map(drop)
}

fn place(path: &str) -> Result<Place> {
    let none = || {
        let message = "no such state; the path is /state/ORGANIZATION/ENVIRONMENT";
        Error::refused(Reason::NotFound, message)
    };
    let rest = path.strip_prefix(PREFIX).ok_or_else(none)?;
    let (organization, environment) = rest.split_once('/').ok_or_else(none)?;
    if environment.contains('/') {
        return Err(none());
    }
    Ok(Place { organization: organization.to_owned(), environment: environment.to_owned() })
}

async fn lock_info(body: &mut Body) -> Result<LockInfo> {
    let mut text = Vec::new();
    while let Some(data) = next(body).await? {
        if text.len() + data.len() > LARGEST_INFO {
            return Err(too_large("a lock's information has up to 64 KiB"));
        }
        text.extend_from_slice(&data);
    }
    serde_json::from_slice(&text).map_err(|_| {
        let message = "send what Terraform says of its lock, as JSON with an ID; a lock that was \
                       left behind ends with `latchkey state unlock`";
        Error::field("body", message)
    })
}

/// Takes the next bytes of a body; a sender that has gone quiet does not keep its place.
async fn next(body: &mut Body) -> Result<Option<Bytes>> {
    next_by(Instant::now() + PART_TIMEOUT, body).await
}

async fn next_by(due: Instant, body: &mut Body) -> Result<Option<Bytes>> {
    let broken = || Error::field("body", "it broke off, or came too slowly; send it again");
    tokio::time::timeout_at(due, bytes(body)).await.map_err(|_| broken())?.map_err(|()| broken())
}

/// Trailers say nothing here, nor does what has no bytes.
async fn bytes(body: &mut Body) -> std::result::Result<Option<Bytes>, ()> {
    while let Some(frame) = body.frame().await {
        match frame.map_err(drop)?.into_data() {
            Ok(data) if !data.is_empty() => return Ok(Some(data)),
            Ok(_) | Err(_) => {}
        }
    }
    Ok(None)
}

async fn drain(body: &mut Body) {
    let mut left = DRAINED;
    while let Some(Ok(frame)) = body.frame().await {
        let length = frame.data_ref().map_or(0, Bytes::len);
        match left.checked_sub(length) {
            Some(rest) => left = rest,
            None => return,
        }
    }
}

fn too_large(message: &str) -> Error {
    Error::refused(Reason::LimitReached, message)
}

fn locked(answer: LockAnswer, refused: StatusCode) -> Response<Body> {
    match answer {
        LockAnswer::Done => finished(StatusCode::OK, None, Bytes::new()),
        LockAnswer::Held(holder) => info_of(refused, holder),
    }
}

/// Answers a lock that cannot be had, so that terraform shows why.
fn not_now(app: &App, error: Error) -> Result<Response<Body>> {
    match code(error.reason()) {
        Code::FailedPrecondition | Code::Aborted => {
            let id = format!("none: {error}");
            let (operation, who) = (String::new(), String::new());
            let (info, version, since) = (String::new(), String::new(), app.now());
            let holder = Holder { id, operation, who, info, version, since };
            Ok(info_of(StatusCode::CONFLICT, holder))
        }
        _ => Err(error),
    }
}

fn info_of(status: StatusCode, holder: Holder) -> Response<Body> {
    let Holder { id, operation, who, info, version, since } = holder;
    let created = rfc3339(since);
    let info = LockInfo { id, operation, info, who, version, created, path: String::new() };
    let body = serde_json::to_vec(&info).expect("it has text only");
    finished(status, Some("application/json"), Bytes::from(body))
}

fn refusal(error: &Error, is_read: bool) -> Response<Body> {
    error.log();
    let holder = error.metadata().iter().find(|(name, _)| *name == "holder");
    let status = match code(error.reason()) {
        Code::Unauthenticated => StatusCode::UNAUTHORIZED,
        Code::PermissionDenied => StatusCode::FORBIDDEN,
        Code::NotFound if is_read => StatusCode::FORBIDDEN,
        Code::NotFound => StatusCode::NOT_FOUND,
        Code::InvalidArgument => StatusCode::BAD_REQUEST,
        Code::ResourceExhausted => StatusCode::PAYLOAD_TOO_LARGE,
        Code::FailedPrecondition if holder.is_some() => StatusCode::LOCKED,
        Code::FailedPrecondition | Code::Aborted => StatusCode::CONFLICT,
        Code::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        _ => StatusCode::INTERNAL_SERVER_ERROR,
    };
    let mut response = text(status, &format!("{error}\n"));
    if status == StatusCode::UNAUTHORIZED {
        let challenge = HeaderValue::from_static("Basic realm=\"latchkey\", charset=\"UTF-8\"");
        response.headers_mut().insert(WWW_AUTHENTICATE, challenge);
    }
    response
}

fn text(status: StatusCode, text: &str) -> Response<Body> {
    finished(status, Some("text/plain; charset=utf-8"), Bytes::from(text.to_owned()))
}

fn finished(status: StatusCode, kind: Option<&'static str>, body: Bytes) -> Response<Body> {
    let mut response = with_headers(Body::new(Full::new(body)));
    *response.status_mut() = status;
    if let Some(kind) = kind {
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    }
    response
}

fn with_headers(body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    let headers = response.headers_mut();
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

#[cfg(test)]
mod tests;
