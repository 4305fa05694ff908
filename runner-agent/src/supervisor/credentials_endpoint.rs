//! The credentials endpoint: AWS's container-credentials protocol on loopback.
//!
//! Whoever has the address and the token in the 0600 file gets the session; anything that looks
//! like a browser (another `Host`, any `Origin`) does not. The announced expiry is never more
//! than 15 minutes away, so that the SDK comes back and a withdrawal bites; the session can be
//! replaced at any time.

use std::io::{self, Write};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use axum::Router;
use axum::extract::{ConnectInfo, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use jiff::{SignedDuration, Timestamp};
use latchkey_proto::v1;
use secrecy::{ExposeSecret, SecretString};
use serde_json::json;
use subtle::ConstantTimeEq;

use super::listener::{Guest, Loopback};
use crate::job_directory::create_private;
use crate::{clock, random};

const ANNOUNCED: SignedDuration = SignedDuration::from_mins(15);

/// What STS gave for this phase. Lives in memory only.
#[derive(Debug, Clone)]
pub(super) struct Session {
    access_key_id: String,
    secret_access_key: SecretString,
    session_token: SecretString,
    expire_time: Timestamp,
}

impl Session {
    pub(super) fn from_wire(credentials: v1::SessionCredentials) -> Self {
        let expire_time = credentials
            .expire_time
            .and_then(|time| Timestamp::new(time.seconds, time.nanos).ok())
            // Without an expiry (long-term keys, by explicit opt-in) it never passes.
            .unwrap_or(Timestamp::MAX);
        Self {
            access_key_id: credentials.access_key_id,
            secret_access_key: credentials.secret_access_key.into(),
            session_token: credentials.session_token.into(),
            expire_time,
        }
    }

    /// Answers what the log must not show.
    pub(super) fn secrets(&self) -> Vec<SecretString> {
        vec![
            self.access_key_id.as_str().into(),
            self.secret_access_key.clone(),
            self.session_token.clone(),
        ]
    }
}

#[derive(Debug)]
enum Holding {
    /// A successor has none until the control plane has sent one.
    Awaited,
    Session(Session),
    Withdrawn,
    /// For good: by a forced cancel. What survives it gets nothing, whoever authenticates again.
    Closed,
}

#[derive(Debug, Clone)]
pub(super) struct CredentialsEndpoint {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    address: SocketAddr,
    token: SecretString,
    /// Replaced by the orders of the agent; read by every request.
    holding: Mutex<Holding>,
}

impl CredentialsEndpoint {
    /// Starts serving, and writes the token's file.
    pub(super) async fn start(session: Session, token_file: &Path) -> io::Result<Self> {
        let token = SecretString::from(random::token());
        // No newline: the SDK refuses it.
        create_private(token_file)?.write_all(token.expose_secret().as_bytes())?;
        Self::serve(0, token, Holding::Session(session)).await
    }

    /// Goes on for a dead predecessor, on its port and with the token in the file.
    pub(super) async fn take_over(port: u16, token_file: &Path) -> io::Result<Self> {
        let token = SecretString::from(std::fs::read_to_string(token_file)?);
        if token.expose_secret().is_empty() {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the token is empty"));
        }
        Self::serve(port, token, Holding::Awaited).await
    }

    async fn serve(port: u16, token: SecretString, holding: Holding) -> io::Result<Self> {
        let listener = Loopback::bind(port).await?;
        let address = listener.address()?;
        let shared = Arc::new(Shared { address, token, holding: Mutex::new(holding) });
        let router =
            Router::new().route("/credentials", get(answer)).with_state(Arc::clone(&shared));
        tokio::spawn(async move {
            if let Err(error) = listener.serve(router).await {
                tracing::error!(%error, "failed to serve credentials");
            }
        });
        Ok(Self { shared })
    }

    pub(super) fn uri(&self) -> String {
        format!("http://{}/credentials", self.shared.address)
    }

    pub(super) fn port(&self) -> u16 {
        self.shared.address.port()
    }

    pub(super) fn token(&self) -> &SecretString {
        &self.shared.token
    }

    pub(super) fn replace(&self, session: Session) {
        self.hold(Holding::Session(session));
    }

    pub(super) fn withdraw(&self) {
        self.hold(Holding::Withdrawn);
    }

    pub(super) fn close(&self) {
        self.hold(Holding::Closed);
    }

    fn hold(&self, holding: Holding) {
        let mut held = self.shared.holding.lock().unwrap_or_else(PoisonError::into_inner);
        if !matches!(*held, Holding::Closed) {
            *held = holding;
        }
    }
}

async fn answer(
    State(shared): State<Arc<Shared>>,
    ConnectInfo(guest): ConnectInfo<Guest>,
    headers: HeaderMap,
) -> Response {
    let host = headers.get(header::HOST).map(|value| value.as_bytes());
    if host != Some(shared.address.to_string().as_bytes()) || headers.contains_key(header::ORIGIN) {
        return refuse(StatusCode::FORBIDDEN, "NotForBrowsers", "only terraform may ask here");
    }
    let given = headers.get(header::AUTHORIZATION).map_or(&b""[..], |value| value.as_bytes());
    if !bool::from(given.ct_eq(shared.token.expose_secret().as_bytes())) {
        return refuse(StatusCode::UNAUTHORIZED, "BadToken", "the authorization token is wrong");
    }
    guest.is_known();
    let now = clock::now();
    let holding = shared.holding.lock().unwrap_or_else(PoisonError::into_inner);
    match &*holding {
        // The SDK asks again.
        Holding::Awaited => refuse(
            StatusCode::SERVICE_UNAVAILABLE,
            "Awaited",
            "the supervisor was replaced and waits for the credentials of this run",
        ),
        Holding::Withdrawn | Holding::Closed => refuse(
            StatusCode::FORBIDDEN,
            "Withdrawn",
            "Latchkey has withdrawn the credentials of this run",
        ),
        Holding::Session(session) if session.expire_time <= now => refuse(
            StatusCode::FORBIDDEN,
            "Expired",
            "the session of this run has expired; submit another code to go on",
        ),
        Holding::Session(session) => {
            let soon = now.checked_add(ANNOUNCED).unwrap_or(session.expire_time);
            let expiration = session.expire_time.min(soon);
            json_answer(
                StatusCode::OK,
                &json!({
                    "AccessKeyId": session.access_key_id,
                    "SecretAccessKey": session.secret_access_key.expose_secret(),
                    "Token": session.session_token.expose_secret(),
                    "Expiration": expiration.strftime("%Y-%m-%dT%H:%M:%SZ").to_string(),
                }),
            )
        }
    }
}

fn refuse(status: StatusCode, code: &str, message: &str) -> Response {
    json_answer(status, &json!({"code": code, "message": message}))
}

fn json_answer(status: StatusCode, body: &serde_json::Value) -> Response {
    let headers = [(header::CONTENT_TYPE, "application/json"), (header::CACHE_CONTROL, "no-store")];
    (status, headers, body.to_string()).into_response()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::super::loopback::request;
    use super::*;

    fn session(key: &str, expire_time: Timestamp) -> Session {
        Session {
            access_key_id: key.into(),
            secret_access_key: "canary".into(),
            session_token: "token".into(),
            expire_time,
        }
    }

    #[tokio::test]
    async fn long_term_keys_are_served_with_an_empty_token_and_looked_at_again() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("token");
        let keys = Session::from_wire(v1::SessionCredentials {
            access_key_id: "AKIA1".into(),
            secret_access_key: "canary".into(),
            ..Default::default()
        });
        let endpoint = CredentialsEndpoint::start(keys, &file).await.unwrap();
        let host = endpoint.shared.address.to_string();
        let token = std::fs::read_to_string(&file).unwrap();
        let headers = [("Host", host.as_str()), ("Authorization", token.as_str())];
        let (status, body) = request(&host, "GET", "/credentials", &headers, b"").await;
        assert_eq!(status, 200);
        let body: serde_json::Value = serde_json::from_slice(&body).unwrap();
        // Some SDKs demand the field, and each takes an empty one for none.
        assert_eq!(body["Token"], "");
        let announced: Timestamp = body["Expiration"].as_str().unwrap().parse().unwrap();
        assert!(announced <= clock::now() + ANNOUNCED);
    }

    #[tokio::test]
    async fn only_the_holder_of_the_token_gets_the_session() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("token");
        let later = clock::now() + SignedDuration::from_hours(1);
        let endpoint = CredentialsEndpoint::start(session("AKIA1", later), &file).await.unwrap();
        let token = std::fs::read_to_string(&file).unwrap();
        assert_eq!(token.len(), 64);
        assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
        let host = endpoint.shared.address.to_string();
        let ask = async |headers: &[(&str, &str)]| {
            request(&host, "GET", "/credentials", headers, b"").await
        };
        let auth = ("Authorization", token.as_str());
        let (status, body) = ask(&[("Host", &host), auth]).await;
        assert_eq!(status, 200);
        let body: serde_json::Value = serde_json::from_slice(&body).unwrap();
        assert_eq!(body["AccessKeyId"], "AKIA1");
        let announced: Timestamp = body["Expiration"].as_str().unwrap().parse().unwrap();
        assert!(announced <= clock::now() + ANNOUNCED);

        assert_eq!(ask(&[("Host", &host)]).await.0, 401);
        assert_eq!(ask(&[("Host", &host), ("Authorization", "wrong")]).await.0, 401);
        assert_eq!(ask(&[("Host", "evil.example"), auth]).await.0, 403);
        assert_eq!(ask(&[("Host", &host), ("Origin", "http://x"), auth]).await.0, 403);

        let successor = CredentialsEndpoint::take_over(0, &file).await.unwrap();
        let its_host = successor.shared.address.to_string();
        let ask_it = async || {
            request(&its_host, "GET", "/credentials", &[("Host", &its_host), auth], b"").await
        };
        assert_eq!(ask_it().await.0, 503);
        successor.replace(session("AKIA9", later));
        assert_eq!(ask_it().await.0, 200);

        endpoint.replace(session("AKIA2", later));
        let (_, body) = ask(&[("Host", &host), auth]).await;
        assert!(String::from_utf8(body).unwrap().contains("AKIA2"));
        endpoint.replace(session("AKIA3", clock::now()));
        assert_eq!(ask(&[("Host", &host), auth]).await.0, 403);
        endpoint.withdraw();
        let (status, body) = ask(&[("Host", &host), auth]).await;
        assert_eq!(status, 403);
        assert!(String::from_utf8(body).unwrap().contains("withdrawn"));
        endpoint.replace(session("AKIA4", later));
        assert_eq!(ask(&[("Host", &host), auth]).await.0, 200);
        endpoint.close();
        endpoint.replace(session("AKIA5", later));
        assert_eq!(ask(&[("Host", &host), auth]).await.0, 403);
        assert!(!format!("{endpoint:?}").contains("canary"));
    }
}
