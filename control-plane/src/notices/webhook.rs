//! Carries a notice to a webhook: one HTTP/1.1 request on a connection of its own.
//!
//! 1. Resolve the host; keep the addresses that [`Networks`](super::network::Networks) admits.
//! 2. Connect to one of these very addresses: a name that resolves to something else a moment
//!    later changes nothing.
//! 3. TLS for the host's name, where the URL says https.
//! 4. POST, signed; read the status and the first bytes of the answer. A redirect is an answer
//!    like any other that is not 2xx: following it would be another host, unchecked.
//!
//! Signature: the header `X-Latchkey-Signature` is `t=SECONDS,v1=HEX`, the HMAC-SHA256 over
//! `SECONDS.BODY`, keyed with the secret's text. The time is that of the attempt.

use std::future::poll_fn;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use aws_lc_rs::hmac;
use hyper::Request;
use hyper::body::{Body, Incoming};
use hyper::header::{CONNECTION, CONTENT_TYPE, HOST, USER_AGENT};
use hyper_util::rt::TokioIo;
use latchkey_domain::id::DeliveryId;
use latchkey_domain::time::Timestamp;
use rustls_pki_types::ServerName;
use secrecy::{ExposeSecret, SecretString};
use serde::Serialize;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use super::{Attempt, DETAIL, Outbound, short};
use crate::error::rfc3339;
use crate::store::record::notice::{Notice, RunFacts};

/// The longest URL that is kept.
const LONGEST_URL: usize = 1000;

const RESOLVE: Duration = Duration::from_secs(5);
const CONNECT: Duration = Duration::from_secs(5);

/// All of an attempt.
pub const TOTAL: Duration = Duration::from_secs(20);

/// Addresses of one host that are tried.
const MOST_ADDRESSES: usize = 3;

/// The most that is read of an answer's head.
const LARGEST_HEAD: usize = 16 << 10;

/// A URL that a webhook may have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    scheme: Scheme,
    /// Without brackets.
    host: String,
    port: u16,
    /// As the header `Host` names it.
    authority: String,
    path: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Scheme {
    Https,
    Http,
}

impl Target {
    /// Reads a URL; the error says what a URL must be. Whether plain http goes to loopback is
    /// seen when the host is resolved.
    pub fn parse(url: &str) -> Result<Self, &'static str> {
        if url.len() > LONGEST_URL || !url.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err("a URL has up to 1,000 visible ASCII characters");
        }
        let uri: http::Uri = url.parse().map_err(|_| "it is not a URL")?;
        let scheme = match uri.scheme_str() {
            Some("https") => Scheme::Https,
            Some("http") => Scheme::Http,
            Some(_) | None => return Err("a URL begins with https://"),
        };
        let authority = uri.authority().ok_or("the URL names no host")?;
        let host = authority.host().trim_matches(['[', ']']).to_owned();
        if host.is_empty() || url.contains('#') || authority.as_str().contains('@') {
            return Err("a URL names a host, no user and no fragment");
        }
        let usual = if scheme == Scheme::Https { 443 } else { 80 };
        Ok(Self {
            scheme,
            host,
            port: authority.port_u16().unwrap_or(usual),
            authority: authority.as_str().to_owned(),
            path: uri.path_and_query().map_or("/", |path| path.as_str()).to_owned(),
        })
    }

    /// Tells what can be told of a URL before its host is resolved.
    pub fn check(&self, outbound: &Outbound) -> Result<(), &'static str> {
        let address = match self.host.parse::<IpAddr>() {
            Ok(address) => Some(address),
            Err(_) if self.host == "localhost" => Some(IpAddr::from([127, 0, 0, 1])),
            Err(_) => None,
        };
        let networks = &outbound.networks;
        match (self.scheme, address) {
            (Scheme::Https, Some(address)) if !networks.admit(address) => Err(REFUSED),
            (Scheme::Https, Some(_) | None) => Ok(()),
            (Scheme::Http, Some(address)) if networks.admit_loopback(address) => Ok(()),
            (Scheme::Http, Some(_) | None) => {
                Err("use https://; plain http goes to loopback only, where the operator allows it")
            }
        }
    }

    /// Writes where it goes, without the path, which may be a secret.
    pub fn origin(&self) -> String {
        let scheme = match self.scheme {
            Scheme::Https => "https",
            Scheme::Http => "http",
        };
        format!("{scheme}://{}", self.authority)
    }

    async fn addresses(&self, outbound: &Outbound) -> Result<Vec<SocketAddr>, Attempt> {
        let found: Vec<SocketAddr> = match self.host.parse::<IpAddr>() {
            Ok(address) => vec![SocketAddr::new(address, self.port)],
            Err(_) => {
                let lookup = tokio::net::lookup_host((self.host.as_str(), self.port));
                match timeout(RESOLVE, lookup).await {
                    Ok(Ok(found)) => found.collect(),
                    Ok(Err(_)) => return Err(Attempt::failed("the host's name is not known")),
                    Err(_) => return Err(Attempt::failed("the host's name was not found in time")),
                }
            }
        };
        let networks = &outbound.networks;
        let admitted = |address: &SocketAddr| match self.scheme {
            Scheme::Https => networks.admit(address.ip()),
            Scheme::Http => networks.admit_loopback(address.ip()),
        };
        let admitted: Vec<_> = found.into_iter().filter(admitted).take(MOST_ADDRESSES).collect();
        if admitted.is_empty() { Err(Attempt::failed(REFUSED)) } else { Ok(admitted) }
    }
}

const REFUSED: &str =
    "the host's address is not public; the operator may list its network (--webhook-network)";

/// Delivers a notice, once.
pub async fn deliver(
    outbound: &Outbound,
    url: &str,
    secret: &SecretString,
    (delivery, notice): (DeliveryId, &Notice),
    now: Timestamp,
) -> Attempt {
    let target = match Target::parse(url) {
        Ok(target) => target,
        Err(problem) => return Attempt::failed(problem),
    };
    let body = body(delivery, notice, outbound.public_url.as_deref());
    let request = Request::post(&target.path)
        .header(HOST, &target.authority)
        .header(CONTENT_TYPE, "application/json")
        .header(USER_AGENT, concat!("latchkey/", env!("CARGO_PKG_VERSION")))
        .header(CONNECTION, "close")
        .header("x-latchkey-event", notice.event.as_str())
        .header("x-latchkey-delivery", delivery.to_string())
        .header("x-latchkey-signature", signature(secret, now, &body))
        .body(body);
    let Ok(request) = request else { return Attempt::failed("the URL makes no request") };
    let attempt = async {
        let stream = connect(&target, outbound).await?;
        match target.scheme {
            Scheme::Http => post(stream, request).await,
            Scheme::Https => {
                let name = ServerName::try_from(target.host.clone())
                    .map_err(|_| Attempt::failed("the host is no name for a certificate"))?;
                let connector = TlsConnector::from(Arc::clone(&outbound.tls));
                let stream = connector.connect(name, stream).await;
                let failed = |error| Attempt::failed(format!("TLS failed: {error}"));
                post(stream.map_err(failed)?, request).await
            }
        }
    };
    match timeout(TOTAL, attempt).await {
        Ok(Ok(attempt) | Err(attempt)) => attempt,
        Err(_) => Attempt::failed("no answer within 20 seconds"),
    }
}

async fn connect(target: &Target, outbound: &Outbound) -> Result<TcpStream, Attempt> {
    let mut last = Attempt::failed("the connection was not made in time");
    for address in target.addresses(outbound).await? {
        match timeout(CONNECT, TcpStream::connect(address)).await {
            Ok(Ok(stream)) => return Ok(stream),
            Ok(Err(error)) => last = Attempt::failed(format!("no connection: {error}")),
            Err(_) => {}
        }
    }
    Err(last)
}

async fn post<S>(stream: S, request: Request<String>) -> Result<Attempt, Attempt>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let failed = |error: hyper::Error| Attempt::failed(format!("no answer: {error}"));
    let mut client = hyper::client::conn::http1::Builder::new();
    client.max_buf_size(LARGEST_HEAD);
    let (mut sender, connection) = client.handshake(TokioIo::new(stream)).await.map_err(failed)?;
    // Ends with this function, whatever the other side would still send.
    let mut driving = JoinSet::new();
    driving.spawn(connection);
    let response = sender.send_request(request).await.map_err(failed)?;
    let status = response.status();
    let said = beginning(response.into_body()).await;
    let detail = match status.is_redirection() {
        true => "redirects are not followed; give the URL that they lead to".to_owned(),
        false => short(&String::from_utf8_lossy(&said)),
    };
    Ok(Attempt { accepted: status.is_success(), status: Some(status.as_u16()), detail })
}

/// Reads what is kept of an answer, and no more.
async fn beginning(mut body: Incoming) -> Vec<u8> {
    let mut said = Vec::new();
    while said.len() < DETAIL {
        let frame = poll_fn(|context| Pin::new(&mut body).poll_frame(context)).await;
        // An answer that breaks off was still an answer.
        let Some(Ok(frame)) = frame else { break };
        if let Ok(data) = frame.into_data() {
            let room = data.len().min(DETAIL - said.len());
            said.extend_from_slice(&data[..room]);
        }
    }
    said
}

/// Writes the header that proves who sent a body, and when.
pub fn signature(secret: &SecretString, now: Timestamp, body: &str) -> String {
    let seconds = now.as_millis().div_euclid(1000);
    let key = hmac::Key::new(hmac::HMAC_SHA256, secret.expose_secret().as_bytes());
    let tag = hmac::sign(&key, format!("{seconds}.{body}").as_bytes());
    format!("t={seconds},v1={}", hex::encode(tag))
}

#[derive(Serialize)]
struct NoticeBody<'a> {
    delivery: String,
    event: &'static str,
    time: String,
    organization: &'a str,
    environment: Option<&'a str>,
    run: Option<RunBody<'a>>,
    reason: Option<&'a str>,
    links: Links,
}

#[derive(Serialize)]
struct RunBody<'a> {
    run_id: String,
    kind: &'a str,
    state: &'a str,
    message: &'a str,
    queued_by: &'a str,
}

#[derive(Serialize)]
struct Links {
    run: Option<String>,
    command: Option<String>,
}

/// Writes what a webhook is told. Names what it may hold, so that nothing else ever does.
pub fn body(delivery: DeliveryId, notice: &Notice, public_url: Option<&str>) -> String {
    let run = notice.run.as_ref();
    let body = NoticeBody {
        delivery: delivery.to_string(),
        event: notice.event.as_str(),
        time: rfc3339(notice.at.into()),
        organization: &notice.organization,
        environment: notice.environment.as_deref(),
        run: run.map(|run| RunBody {
            run_id: run.id.0.to_string(),
            kind: &run.kind,
            state: &run.state,
            message: &run.message,
            queued_by: &run.queued_by,
        }),
        reason: notice.reason.as_deref(),
        links: Links {
            run: run.and_then(|run| link(run, public_url)),
            command: run.map(|run| format!("latchkey run show {}", run.id.0)),
        },
    };
    serde_json::to_string(&body).expect("strings serialize")
}

/// Writes where a run's page is.
pub(super) fn link(run: &RunFacts, public_url: Option<&str>) -> Option<String> {
    public_url.map(|url| format!("{url}/runs/{}", run.id.0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::notices::network::Networks;

    fn outbound(networks: &[&str]) -> Outbound {
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let networks = Networks(networks.iter().map(|text| text.parse().unwrap()).collect());
        Outbound { networks, ..Outbound::closed() }
    }

    #[test]
    fn a_url_is_https_to_a_public_host_unless_the_operator_says_more() {
        let closed = outbound(&[]);
        let open = outbound(&["127.0.0.0/8"]);
        let check = |url: &str, closed_ok: bool, open_ok: bool| {
            let ok = |outbound| Target::parse(url).is_ok_and(|t| t.check(outbound).is_ok());
            assert_eq!((ok(&closed), ok(&open)), (closed_ok, open_ok), "{url}");
        };
        check("https://hooks.example.com/a?b=c", true, true);
        check("https://hooks.example.com:8443", true, true);
        check("https://1.1.1.1/", true, true);
        check("https://127.0.0.1/", false, true);
        check("https://localhost/", false, true);
        check("https://[::ffff:127.0.0.1]/", false, true);
        check("http://127.0.0.1:8080/hook", false, true);
        check("https://10.0.0.1/", false, false);
        check("https://169.254.169.254/latest/meta-data", false, false);
        check("https://[::1]/", false, false);
        check("http://hooks.example.com/", false, false);
        check("http://10.0.0.1/", false, false);
        check("https://user:secret@example.com/", false, false);
        check("https://example.com/#a", false, false);
        check("https://example.com/a b", false, false);
        check("file:///etc/passwd", false, false);
        check("/hook", false, false);
        check("", false, false);
    }

    #[test]
    fn a_signature_is_over_time_and_body() {
        let secret = SecretString::from("lkw_secret");
        // printf '1700000000.{"a":1}' | openssl dgst -sha256 -hmac lkw_secret
        assert_eq!(
            signature(&secret, Timestamp::from_millis(1_700_000_000_999), r#"{"a":1}"#),
            "t=1700000000,v1=7821c7653dc835de856630fe1369111f006896e9c1da7d5fece21a63fb00332a"
        );
    }
}
