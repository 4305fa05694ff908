//! A runner without a host: the real protocol, and nothing behind it. Thousands fit in a process.
//!
//! It enrolls with a key of its own, holds one `Lease` stream over its own TLS connection with
//! the keep-alives of the real one, and appends logs over the same connection. It starts no
//! process and keeps no files.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use latchkey_proto::v1;
use latchkey_proto::v1::lease_request::Frame as Request;
use latchkey_proto::v1::lease_response::Frame as Response;
use latchkey_proto::v1::runner_service_client::RunnerServiceClient;
use rcgen::{CertificateParams, KeyPair, PKCS_ECDSA_P256_SHA256};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};

/// The most bytes of one message of a log.
const CHUNK: usize = 256 * 1024;

/// What a runner proves itself with.
#[derive(Clone)]
pub struct Identity {
    certificate_pem: String,
    key_pem: String,
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity").finish_non_exhaustive()
    }
}

impl Identity {
    /// Buys a certificate over any channel to the runners' listener. `pool_token` is as people
    /// are shown it.
    pub async fn enroll(channel: Channel, pool_token: &str, name: &str) -> anyhow::Result<Self> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let request = CertificateParams::default().serialize_request(&key)?;
        let secret = pool_token.split_once('.').map_or(pool_token, |(secret, _)| secret);
        let request = v1::EnrollRequest {
            pool_token: secret.to_owned(),
            certificate_request: request.der().to_vec(),
            name: name.to_owned(),
        };
        let answer = RunnerServiceClient::new(channel).enroll(request).await;
        let answer = answer.context("enroll a simulated runner")?.into_inner();
        Ok(Self {
            certificate_pem: certificate_pem(&answer.certificate),
            key_pem: key.serialize_pem(),
        })
    }
}

fn certificate_pem(der: &[u8]) -> String {
    let text = STANDARD.encode(der);
    format!("-----BEGIN CERTIFICATE-----\n{text}\n-----END CERTIFICATE-----\n")
}

/// Where runners connect, and whom they trust there.
#[derive(Clone, Debug)]
pub struct Listener {
    pub url: String,
    pub ca_pem: Arc<str>,
}

impl Listener {
    /// Prepares a connection of its own, with a certificate or as a stranger.
    pub fn endpoint(&self, identity: Option<&Identity>) -> anyhow::Result<Endpoint> {
        let mut tls =
            ClientTlsConfig::new().ca_certificate(Certificate::from_pem(self.ca_pem.as_bytes()));
        if let Some(identity) = identity {
            let pem = (&identity.certificate_pem, &identity.key_pem);
            tls = tls.identity(tonic::transport::Identity::from_pem(pem.0, pem.1));
        }
        Ok(Endpoint::from_shared(self.url.clone())?
            .http2_keep_alive_interval(Duration::from_secs(20))
            .keep_alive_timeout(Duration::from_secs(20))
            .keep_alive_while_idle(true)
            .tcp_nodelay(true)
            .tls_config(tls)?)
    }
}

/// A connected runner.
pub struct SimulatedRunner {
    pub client: RunnerServiceClient<Channel>,
    pub heartbeat_interval: Duration,
    frames: mpsc::Sender<v1::LeaseRequest>,
    incoming: Streaming<v1::LeaseResponse>,
}

impl fmt::Debug for SimulatedRunner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SimulatedRunner").finish_non_exhaustive()
    }
}

impl SimulatedRunner {
    /// Connects, introduces itself, and returns when it is welcome.
    pub async fn connect(
        listener: &Listener,
        identity: &Identity,
        slots: u32,
    ) -> anyhow::Result<Self> {
        Self::returning(listener, identity, slots, vec![]).await
    }

    /// As [`SimulatedRunner::connect`], of one that holds jobs.
    pub async fn returning(
        listener: &Listener,
        identity: &Identity,
        slots: u32,
        held: Vec<v1::LeaseRef>,
    ) -> anyhow::Result<Self> {
        let channel = listener.endpoint(Some(identity))?.connect().await?;
        let mut client = RunnerServiceClient::new(channel);
        let (frames, outgoing) = mpsc::channel(8);
        let hello = v1::Hello {
            slots,
            held,
            engines: vec![v1::Engine { name: "terraform".into(), version: "1.11.4".into() }],
            version: env!("CARGO_PKG_VERSION").into(),
            ..Default::default()
        };
        frames.send(frame(Request::Hello(hello))).await.context("say hello")?;
        let opened = client.lease(ReceiverStream::new(outgoing)).await.context("open a lease")?;
        let mut incoming = opened.into_inner();
        let first = incoming.message().await?.and_then(|message| message.frame);
        let Some(Response::Welcome(welcome)) = first else {
            anyhow::bail!("be welcome: the first frame was another");
        };
        let interval = welcome.heartbeat_interval.and_then(|it| Duration::try_from(it).ok());
        let heartbeat_interval = interval.unwrap_or(Duration::from_secs(10));
        Ok(Self { client, heartbeat_interval, frames, incoming })
    }

    /// Sends a frame.
    pub async fn send(&self, request: Request) -> anyhow::Result<()> {
        self.frames.send(frame(request)).await.context("send a frame: the stream is over")
    }

    /// Waits for the next frame.
    pub async fn next(&mut self) -> anyhow::Result<Response> {
        let message = self.incoming.message().await?.context("wait for a frame: the end came")?;
        message.frame.context("understand a frame")
    }

    /// Waits for an offer.
    pub async fn offer(&mut self) -> anyhow::Result<(v1::LeaseRef, v1::JobSpec)> {
        loop {
            if let Response::Offer(v1::Offer { lease: Some(lease), job }) = self.next().await? {
                return Ok((lease, job.unwrap_or_default()));
            }
        }
    }

    /// Accepts a job and starts it: returns with the `Go`.
    pub async fn start(&mut self, lease: &v1::LeaseRef) -> anyhow::Result<v1::Go> {
        self.send(Request::Accept(v1::Accept { lease: Some(lease.clone()) })).await?;
        self.send(Request::Starting(v1::Starting { lease: Some(lease.clone()) })).await?;
        loop {
            match self.next().await? {
                Response::Go(go) => return Ok(go),
                Response::Revoke(revoke) => anyhow::bail!("start a job: {}", revoke.reason),
                Response::Welcome(_)
                | Response::Offer(_)
                | Response::Renewed(_)
                | Response::Cancel(_)
                | Response::Recorded(_)
                | Response::Drain(_)
                | Response::Resume(_) => {}
            }
        }
    }

    /// Heartbeats until the stream ends, the first after `phase` of the interval.
    pub async fn idle(mut self, phase: f64) -> anyhow::Result<()> {
        let mut next = tokio::time::Instant::now() + self.heartbeat_interval.mul_f64(phase);
        loop {
            tokio::select! {
                message = self.incoming.message() => {
                    message?.context("stay connected")?;
                }
                () = tokio::time::sleep_until(next) => {
                    next += self.heartbeat_interval;
                    self.send(Request::Heartbeat(v1::Heartbeat { held: vec![] })).await?;
                }
            }
        }
    }
}

fn frame(frame: Request) -> v1::LeaseRequest {
    v1::LeaseRequest { frame: Some(frame) }
}

/// Appends a log of so many messages, as fast as they are taken, and returns how many bytes were
/// acknowledged as durable.
pub async fn append_log(
    mut client: RunnerServiceClient<Channel>,
    lease: v1::LeaseRef,
    messages: u64,
) -> anyhow::Result<u64> {
    let chunk = chunk();
    let length = chunk.len() as u64;
    let mut lease = Some(lease);
    let sent = (0..messages).map(move |number| v1::AppendLogRequest {
        lease: lease.take(),
        offset: number * length,
        data: chunk.clone(),
    });
    let mut answers = client.append_log(tokio_stream::iter(sent)).await?.into_inner();
    let mut durable = 0;
    while durable < messages * length {
        let answer = answers.message().await?.context("append to a log: the stream ended")?;
        durable = answer.durable_length;
    }
    Ok(durable)
}

/// A message full of lines as terraform writes them.
fn chunk() -> Vec<u8> {
    const LINE: &str = "{\"@level\":\"info\",\"@message\":\"aws_instance.web[17]: Still creating... \
        [10s elapsed]\",\"@module\":\"terraform.ui\",\"@timestamp\":\"2026-01-01T00:00:00.000000Z\",\
        \"type\":\"apply_progress\"}\n";
    LINE.as_bytes().repeat(CHUNK / LINE.len())
}
