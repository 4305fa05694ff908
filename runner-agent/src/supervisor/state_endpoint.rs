//! The state endpoint: terraform's `http` backend protocol on loopback.
//!
//! LOCK and UNLOCK are answered here: the run's hold on the environment is the exclusion. Every
//! POST is written to the job directory and synced before it is acknowledged, then told, so that
//! the agent sends it up. GET answers the newest state written, else the one of the lease.

use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::extract::{ConnectInfo, Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use md5::{Digest, Md5};
use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;
use subtle::ConstantTimeEq;
use tokio::sync::watch;

use super::listener::{Guest, Loopback};
use crate::job::Phase;
use crate::job_directory::JobDirectory;
use crate::random;

pub(super) const USER: &str = "latchkey";

/// The largest state that is taken.
const LARGEST: usize = 256 << 20;

#[derive(Debug)]
pub(super) struct StateEndpoint {
    shared: Arc<Shared>,
    address: SocketAddr,
}

/// Where the state is served, and to whom.
#[derive(Debug)]
pub(super) struct Access {
    /// 0 for any.
    pub(super) port: u16,
    pub(super) password: SecretString,
}

impl Access {
    pub(super) fn new() -> Self {
        Self { port: 0, password: random::token().into() }
    }
}

/// Keeps the lock for a successor.
const LOCK: &str = "state-lock";

#[derive(Debug)]
struct Shared {
    directory: JobDirectory,
    phase: Phase,
    password: SecretString,
    inner: Mutex<Inner>,
    /// Serializes writers: a number is taken, written and told before the next.
    writing: tokio::sync::Mutex<()>,
    written: watch::Sender<u64>,
}

#[derive(Debug)]
struct Inner {
    lock: Option<Lock>,
    current: Option<Current>,
}

#[derive(Debug)]
struct Lock {
    id: String,
    info: Vec<u8>,
}

/// The state that GET answers.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Current {
    name: String,
    sequence: u64,
    identity: Identity,
}

/// What of a state the protocol is judged by.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
struct Identity {
    serial: u64,
    lineage: String,
}

#[derive(Deserialize)]
struct LockInfo {
    #[serde(rename = "ID", default)]
    id: String,
}

impl StateEndpoint {
    /// Starts serving, or goes on for a dead predecessor; the number of the newest state is told
    /// as it becomes durable.
    pub(super) async fn start(
        directory: &JobDirectory,
        phase: Phase,
        written: watch::Sender<u64>,
        access: Access,
    ) -> io::Result<Self> {
        let current = current(directory)?;
        written.send_replace(current.as_ref().map_or(0, |current| current.sequence));
        let shared = Arc::new(Shared {
            directory: directory.clone(),
            phase,
            password: access.password,
            inner: Mutex::new(Inner { lock: kept_lock(directory)?, current }),
            writing: tokio::sync::Mutex::new(()),
            written,
        });
        let listener = Loopback::bind(access.port).await?;
        let address = listener.address()?;
        let router = Router::new().fallback(answer).with_state(Arc::clone(&shared));
        tokio::spawn(async move {
            if let Err(error) = listener.serve(router).await {
                tracing::error!(%error, "failed to serve the state");
            }
        });
        Ok(Self { shared, address })
    }

    pub(super) fn address(&self) -> String {
        format!("http://{}/state", self.address)
    }

    pub(super) fn port(&self) -> u16 {
        self.address.port()
    }

    pub(super) fn password(&self) -> &SecretString {
        &self.shared.password
    }
}

fn kept_lock(directory: &JobDirectory) -> io::Result<Option<Lock>> {
    match std::fs::read(directory.join(LOCK)) {
        Ok(info) => {
            let LockInfo { id } = serde_json::from_slice(&info)?;
            Ok(Some(Lock { id, info }))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Finds where a predecessor left off.
fn current(directory: &JobDirectory) -> io::Result<Option<Current>> {
    let newest = directory.states().map_err(io::Error::other)?.last().copied();
    let (name, sequence) = match newest {
        Some(sequence) => (JobDirectory::state_name(sequence), sequence),
        None => ("state/base".to_owned(), 0),
    };
    match std::fs::read(directory.join(&name)) {
        Ok(bytes) => {
            let identity = serde_json::from_slice(&bytes)?;
            Ok(Some(Current { name, sequence, identity }))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

async fn answer(
    State(shared): State<Arc<Shared>>,
    ConnectInfo(guest): ConnectInfo<Guest>,
    request: Request,
) -> Response {
    let (parts, body) = request.into_parts();
    if !authorized(&shared, &parts.headers) {
        return (StatusCode::UNAUTHORIZED, "the password is wrong").into_response();
    }
    guest.is_known();
    let lock_id = parts.uri.query().and_then(|query| {
        query.split('&').find_map(|pair| pair.strip_prefix("ID=")).map(str::to_owned)
    });
    match parts.method.as_str() {
        "GET" => shared.get(),
        "LOCK" => match small(body).await {
            Ok(info) => shared.lock(info),
            Err(response) => response,
        },
        "UNLOCK" => match small(body).await {
            Ok(info) => shared.unlock(&info),
            Err(response) => response,
        },
        "POST" => shared.post(lock_id, &parts.headers, body).await,
        _ => (StatusCode::METHOD_NOT_ALLOWED, "the state of a run is not deleted here")
            .into_response(),
    }
}

fn authorized(shared: &Shared, headers: &HeaderMap) -> bool {
    let expect = format!("{USER}:{}", shared.password.expose_secret());
    let given = headers
        .get(header::AUTHORIZATION)
        .and_then(|value| value.to_str().ok())
        .and_then(|value| value.strip_prefix("Basic "))
        .and_then(|value| STANDARD.decode(value).ok())
        .unwrap_or_default();
    given.ct_eq(expect.as_bytes()).into()
}

async fn small(body: Body) -> Result<Vec<u8>, Response> {
    match to_bytes(body, 64 * 1024).await {
        Ok(bytes) => Ok(bytes.to_vec()),
        Err(_) => Err((StatusCode::PAYLOAD_TOO_LARGE, "that is no lock").into_response()),
    }
}

impl Shared {
    fn inner(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn get(&self) -> Response {
        let Some(current) = self.inner().current.clone() else {
            return StatusCode::NO_CONTENT.into_response();
        };
        match std::fs::read(self.directory.join(&current.name)) {
            Ok(bytes) => ([(header::CONTENT_TYPE, "application/json")], bytes).into_response(),
            Err(error) => failed(&error),
        }
    }

    fn lock(&self, info: Vec<u8>) -> Response {
        let Ok(LockInfo { id }) = serde_json::from_slice(&info) else {
            return (StatusCode::BAD_REQUEST, "that is no lock").into_response();
        };
        let mut inner = self.inner();
        match &inner.lock {
            Some(held) if held.id != id => (StatusCode::LOCKED, held.info.clone()).into_response(),
            Some(_) | None => {
                // Synced by nobody: with a reboot, terraform is gone as well.
                if let Err(error) = self.directory.note(LOCK, &info) {
                    return failed(&error);
                }
                inner.lock = Some(Lock { id, info });
                StatusCode::OK.into_response()
            }
        }
    }

    fn unlock(&self, info: &[u8]) -> Response {
        let id = serde_json::from_slice(info).map(|LockInfo { id }| id).unwrap_or_default();
        let mut inner = self.inner();
        match &inner.lock {
            Some(held) if held.id != id && !id.is_empty() => {
                (StatusCode::CONFLICT, "another lock is held").into_response()
            }
            Some(_) | None => {
                // At worst a successor finds a lock of the same terraform's.
                let _ = std::fs::remove_file(self.directory.join(LOCK));
                inner.lock = None;
                StatusCode::OK.into_response()
            }
        }
    }

    async fn post(&self, lock_id: Option<String>, headers: &HeaderMap, body: Body) -> Response {
        if self.phase == Phase::Plan {
            return (StatusCode::FORBIDDEN, "a plan does not write state").into_response();
        }
        let Ok(bytes) = to_bytes(body, LARGEST).await else {
            return (StatusCode::PAYLOAD_TOO_LARGE, "the state is too large").into_response();
        };
        if let Some(sum) = headers.get("Content-MD5")
            && sum.as_bytes() != STANDARD.encode(Md5::digest(&bytes)).as_bytes()
        {
            return (StatusCode::BAD_REQUEST, "the state differs from its Content-MD5")
                .into_response();
        }
        let Ok(identity) = serde_json::from_slice::<Identity>(&bytes) else {
            return (StatusCode::BAD_REQUEST, "that is no state").into_response();
        };

        let _turn = self.writing.lock().await;
        let sequence = {
            let inner = self.inner();
            if inner.lock.as_ref().map(|lock| &lock.id) != lock_id.as_ref() {
                return (StatusCode::CONFLICT, "the lock is not held").into_response();
            }
            if let Some(current) = &inner.current
                && identity.lineage != current.identity.lineage
                && identity.serial < current.identity.serial
            {
                return (StatusCode::CONFLICT, "the state has another lineage and goes back")
                    .into_response();
            }
            inner.current.as_ref().map_or(0, |current| current.sequence) + 1
        };
        if latchkey_failpoint::defect("state.dropped") {
            return StatusCode::OK.into_response();
        }
        let name = JobDirectory::state_name(sequence);
        let recorded = {
            let (directory, name) = (self.directory.clone(), name.clone());
            tokio::task::spawn_blocking(move || directory.record_bytes(&name, &bytes)).await
        };
        latchkey_failpoint::reach("sup.state.synced");
        match recorded {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return failed(&error),
            Err(error) => return failed(&error),
        }
        self.inner().current = Some(Current { name, sequence, identity });
        self.written.send_replace(sequence);
        StatusCode::OK.into_response()
    }
}

fn failed(error: &(dyn std::error::Error + 'static)) -> Response {
    tracing::error!(error, "failed to keep the state");
    (StatusCode::INTERNAL_SERVER_ERROR, "the runner could not keep the state").into_response()
}

#[cfg(test)]
mod tests {
    use super::super::loopback::request;
    use super::*;
    use crate::job_directory::tests as samples;

    struct Client {
        _jobs: tempfile::TempDir,
        directory: JobDirectory,
        endpoint: StateEndpoint,
        written: watch::Receiver<u64>,
    }

    impl Client {
        async fn start(phase: Phase, base: Option<&str>) -> Self {
            let jobs = tempfile::tempdir().unwrap();
            let lease = samples::lease("r1", phase);
            let directory =
                JobDirectory::create(jobs.path(), &lease, &samples::spec(), &samples::settings())
                    .unwrap();
            if let Some(base) = base {
                std::fs::write(directory.join("state/base"), base).unwrap();
            }
            let (written_to, written) = watch::channel(0);
            let endpoint =
                StateEndpoint::start(&directory, phase, written_to, Access::new()).await.unwrap();
            Self { _jobs: jobs, directory, endpoint, written }
        }

        async fn ask(&self, method: &str, query: &str, body: &str) -> (u16, String) {
            let sum = STANDARD.encode(Md5::digest(body));
            self.ask_with(method, query, body, &sum).await
        }

        async fn ask_with(
            &self,
            method: &str,
            query: &str,
            body: &str,
            sum: &str,
        ) -> (u16, String) {
            let login =
                STANDARD.encode(format!("{USER}:{}", self.endpoint.password().expose_secret()));
            let host = self.endpoint.address.to_string();
            let auth = format!("Basic {login}");
            let headers = [("Host", host.as_str()), ("Authorization", &auth), ("Content-MD5", sum)];
            let path = format!("/state{query}");
            let (status, body) = request(&host, method, &path, &headers, body.as_bytes()).await;
            (status, String::from_utf8(body).unwrap())
        }
    }

    fn state(serial: u64, lineage: &str) -> String {
        format!(r#"{{"version":4,"serial":{serial},"lineage":"{lineage}"}}"#)
    }

    #[tokio::test]
    async fn an_apply_locks_writes_and_reads_back() {
        let client = Client::start(Phase::Apply, None).await;
        assert_eq!(client.ask("GET", "", "").await.0, 204);
        assert_eq!(client.ask("LOCK", "", r#"{"ID":"a"}"#).await.0, 200);
        let held = client.ask("LOCK", "", r#"{"ID":"b"}"#).await;
        assert_eq!(held, (423, r#"{"ID":"a"}"#.to_owned()));
        assert_eq!(client.ask("POST", "?ID=b", &state(1, "x")).await.0, 409);
        assert_eq!(client.ask("POST", "", &state(1, "x")).await.0, 409);
        assert_eq!(client.ask("POST", "?ID=a", &state(1, "x")).await.0, 200);
        assert_eq!(client.ask("POST", "?ID=a", &state(2, "x")).await.0, 200);
        assert_eq!(client.ask("GET", "", "").await, (200, state(2, "x")));
        assert_eq!(*client.written.borrow(), 2);
        assert_eq!(client.directory.states().unwrap(), [1, 2]);
        assert_eq!(client.ask("UNLOCK", "", r#"{"ID":"b"}"#).await.0, 409);
        assert_eq!(client.ask("UNLOCK", "", r#"{"ID":"a"}"#).await.0, 200);
        assert_eq!(client.ask("LOCK", "", r#"{"ID":"b"}"#).await.0, 200);
    }

    #[tokio::test]
    async fn a_successor_goes_on_with_the_same_lock_password_and_state() {
        let client = Client::start(Phase::Apply, None).await;
        assert_eq!(client.ask("LOCK", "", r#"{"ID":"a"}"#).await.0, 200);
        assert_eq!(client.ask("POST", "?ID=a", &state(1, "x")).await.0, 200);
        let access = Access { port: 0, password: client.endpoint.password().clone() };
        let written = watch::channel(0).0;
        let endpoint =
            StateEndpoint::start(&client.directory, Phase::Apply, written, access).await.unwrap();
        let client = Client { endpoint, ..client };
        assert_eq!(client.ask("LOCK", "", r#"{"ID":"b"}"#).await.0, 423);
        assert_eq!(client.ask("GET", "", "").await, (200, state(1, "x")));
        assert_eq!(client.ask("POST", "?ID=a", &state(2, "x")).await.0, 200);
        assert_eq!(client.directory.states().unwrap(), [1, 2]);
        assert_eq!(client.ask("UNLOCK", "", r#"{"ID":"a"}"#).await.0, 200);
        assert!(!client.directory.join(LOCK).exists());
    }

    #[tokio::test]
    async fn a_foreign_or_damaged_state_is_refused() {
        let client = Client::start(Phase::Apply, Some(&state(7, "x"))).await;
        assert_eq!(client.ask("GET", "", "").await, (200, state(7, "x")));
        client.ask("LOCK", "", r#"{"ID":"a"}"#).await;
        assert_eq!(client.ask("POST", "?ID=a", &state(3, "y")).await.0, 409);
        assert_eq!(client.ask_with("POST", "?ID=a", &state(8, "x"), "wrong").await.0, 400);
        assert_eq!(client.ask("POST", "?ID=a", "no state").await.0, 400);
        assert_eq!(client.ask("DELETE", "", "").await.0, 405);
        assert_eq!(*client.written.borrow(), 0);
    }

    #[tokio::test]
    async fn a_plan_reads_only() {
        let client = Client::start(Phase::Plan, Some(&state(7, "x"))).await;
        client.ask("LOCK", "", r#"{"ID":"a"}"#).await;
        assert_eq!(client.ask("POST", "?ID=a", &state(8, "x")).await.0, 403);
    }

    #[tokio::test]
    async fn without_the_password_nothing_is_answered() {
        let client = Client::start(Phase::Plan, Some(&state(7, "canary"))).await;
        let host = &client.endpoint.address.to_string();
        for header in
            [("X", "y"), ("Authorization", "Basic bGF0Y2hrZXk6eA=="), ("Authorization", "x")]
        {
            let (status, body) =
                request(host, "GET", "/state", &[("Host", host), header], b"").await;
            assert_eq!(status, 401);
            assert!(!String::from_utf8(body).unwrap().contains("canary"));
        }
    }
}
