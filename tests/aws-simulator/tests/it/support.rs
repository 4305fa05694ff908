//! A small signing client, so that a test can send what no SDK would.

use std::fmt::Write as _;
use std::net::SocketAddr;

use axum::http::{HeaderMap, HeaderName, HeaderValue};
use jiff::{SignedDuration, Timestamp};
use latchkey_aws_simulator::sigv4::{self, Scope};
use latchkey_aws_simulator::{Clock, Simulator, World};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

/// The start of an attempt window, at which manual clocks begin.
pub(crate) const START: &str = "2027-01-15T08:00:00Z";
pub(crate) const ACCOUNT: &str = "123456789012";
pub(crate) const SERIAL: &str = "arn:aws:iam::123456789012:mfa/latchkey";
pub(crate) const USER_ARN: &str = "arn:aws:iam::123456789012:user/latchkey";
pub(crate) const DEPLOY: &str = "arn:aws:iam::123456789012:role/deploy";
pub(crate) const READ: &str = "arn:aws:iam::123456789012:role/read";

/// Starts the example world with a clock that stands still.
pub(crate) async fn start() -> Simulator {
    Simulator::start(World::example(), Clock::manual(START.parse().unwrap())).await.unwrap()
}

/// A key and how it signs.
#[derive(Clone)]
pub(crate) struct Client {
    pub(crate) address: SocketAddr,
    pub(crate) key: String,
    pub(crate) secret: String,
    pub(crate) token: Option<String>,
    pub(crate) region: String,
    pub(crate) now: Timestamp,
}

/// What came back.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) head: String,
    pub(crate) body: String,
}

impl Client {
    /// A client with the long-term key of the world's first user.
    pub(crate) fn of(simulator: &Simulator) -> Self {
        let facts = simulator.facts();
        Self {
            address: simulator.address(),
            key: facts.access_key_id,
            secret: facts.secret_access_key.expose().to_owned(),
            token: None,
            region: "eu-central-1".to_owned(),
            now: simulator.clock().now(),
        }
    }

    /// The same client with the credentials of an answer.
    pub(crate) fn with_session(&self, answer: &Answer) -> Self {
        assert_eq!(answer.status, 200, "{answer:?}");
        Self {
            key: answer.text("AccessKeyId"),
            secret: answer.text("SecretAccessKey"),
            token: Some(answer.text("SessionToken")),
            ..self.clone()
        }
    }

    /// The same client, signing as if its clock were off by this much.
    pub(crate) fn off_by(&self, minutes: i64) -> Self {
        Self { now: self.now + SignedDuration::from_mins(minutes), ..self.clone() }
    }

    /// Calls STS with a POST.
    pub(crate) async fn sts(&self, action: &str, members: &[(&str, &str)]) -> Answer {
        self.try_sts(action, members).await.expect("an answer")
    }

    /// Calls STS; nothing when the connection ends without an answer.
    pub(crate) async fn try_sts(&self, action: &str, members: &[(&str, &str)]) -> Option<Answer> {
        let mut form = format!("Action={action}&Version=2011-06-15");
        for (name, value) in members {
            write!(form, "&{name}={}", escape(value)).unwrap();
        }
        let form_type = [("content-type", "application/x-www-form-urlencoded; charset=utf-8")];
        self.send("sts", "POST", "/", &form_type, form.as_bytes()).await
    }

    /// Asks for a session with a code.
    pub(crate) async fn session(&self, code: &str) -> Answer {
        self.sts("GetSessionToken", &[("SerialNumber", SERIAL), ("TokenCode", code)]).await
    }

    /// Assumes a role with no more than is required.
    pub(crate) async fn assume(&self, role: &str) -> Answer {
        self.sts("AssumeRole", &[("RoleArn", role), ("RoleSessionName", "run-1")]).await
    }

    /// Signs a request and sends it on a connection of its own.
    pub(crate) async fn send(
        &self,
        service: &str,
        method: &str,
        target: &str,
        extra: &[(&str, &str)],
        body: &[u8],
    ) -> Option<Answer> {
        let time = self.now.strftime("%Y%m%dT%H%M%SZ").to_string();
        let hash = sigv4::sha256_hex(body);
        let mut lines = vec![("host".to_owned(), self.address.to_string())];
        lines.extend(extra.iter().map(|(name, value)| ((*name).into(), (*value).into())));
        lines.push(("x-amz-content-sha256".to_owned(), hash.clone()));
        lines.push(("x-amz-date".to_owned(), time.clone()));
        if let Some(token) = &self.token {
            lines.push(("x-amz-security-token".to_owned(), token.clone()));
        }
        lines.sort();
        let headers: HeaderMap = lines
            .iter()
            .map(|(name, value)| {
                (name.parse::<HeaderName>().unwrap(), value.parse::<HeaderValue>().unwrap())
            })
            .collect();
        let names: Vec<String> = lines.iter().map(|(name, _)| name.clone()).collect();
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        let canonical = sigv4::canonical_request(method, path, query, &headers, &names, &hash);
        let scope = Scope {
            date: time[..8].to_owned(),
            region: self.region.clone(),
            service: service.to_owned(),
        };
        let key = sigv4::signing_key(&self.secret, &scope);
        let signature = sigv4::sign(&key, &sigv4::string_to_sign(&time, &scope, &canonical));
        let authorization = format!(
            "AWS4-HMAC-SHA256 Credential={}/{}/{}/{service}/aws4_request, SignedHeaders={}, \
             Signature={signature}",
            self.key,
            scope.date,
            scope.region,
            names.join(";"),
        );
        lines.push(("authorization".to_owned(), authorization));
        exchange(self.address, method, target, &lines, body).await
    }
}

/// Sends a request as it is.
pub(crate) async fn exchange(
    address: SocketAddr,
    method: &str,
    target: &str,
    headers: &[(String, String)],
    body: &[u8],
) -> Option<Answer> {
    let mut head = format!("{method} {target} HTTP/1.1\r\n");
    for (name, value) in headers {
        write!(head, "{name}: {value}\r\n").unwrap();
    }
    write!(head, "connection: close\r\ncontent-length: {}\r\n\r\n", body.len()).unwrap();
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(head.as_bytes()).await.unwrap();
    stream.write_all(body).await.unwrap();
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).await.ok()?;
    let text = String::from_utf8_lossy(&bytes).into_owned();
    let (head, body) = text.split_once("\r\n\r\n")?;
    let status = head.split(' ').nth(1)?.parse().ok()?;
    Some(Answer { status, head: head.to_ascii_lowercase(), body: body.to_owned() })
}

/// Talks JSON with the control API.
pub(crate) async fn control(
    address: SocketAddr,
    method: &str,
    path: &str,
    body: &str,
) -> (u16, serde_json::Value) {
    let headers = [
        ("host".to_owned(), address.to_string()),
        ("content-type".to_owned(), "application/json".to_owned()),
    ];
    let target = format!("/_simulator/{path}");
    let answer = exchange(address, method, &target, &headers, body.as_bytes()).await.unwrap();
    (answer.status, serde_json::from_str(&answer.body).unwrap_or_default())
}

impl Answer {
    /// The text of the first element of this name.
    #[track_caller]
    pub(crate) fn text(&self, element: &str) -> String {
        let (open, close) = (format!("<{element}>"), format!("</{element}>"));
        let rest = self.body.split_once(&open).unwrap_or_else(|| panic!("no {open}: {self:?}")).1;
        let text = rest.split_once(&close).unwrap().0;
        text.replace("&apos;", "'").replace("&quot;", "\"").replace("&amp;", "&")
    }

    #[track_caller]
    pub(crate) fn assert_refused(&self, status: u16, code: &str, message: &str) {
        assert_eq!((self.status, self.text("Code").as_str()), (status, code), "{self:?}");
        assert_eq!(self.text("Message"), message);
        assert!(!self.text("RequestId").is_empty());
    }
}

fn escape(text: &str) -> String {
    text.bytes()
        .map(|byte| {
            if byte.is_ascii_alphanumeric() {
                char::from(byte).to_string()
            } else {
                format!("%{byte:02X}")
            }
        })
        .collect()
}
