//! A receiver of webhooks, over TLS: it answers as it is told and keeps what it heard, byte by
//! byte, since signatures are over bytes.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Context;
use rustls::ServerConfig;
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpListener;
use tokio::task::{JoinHandle, JoinSet};
use tokio_rustls::TlsAcceptor;

use crate::wait::{LIMIT, wait_for};

/// A request as it came.
#[derive(Debug, Clone)]
pub struct Hook {
    /// Request line and headers.
    pub head: String,
    pub body: Vec<u8>,
    pub answered: u16,
}

impl Hook {
    /// The value of a header; empty when it is not there.
    pub fn header(&self, name: &str) -> &str {
        let found = self.head.lines().find_map(|line| {
            let (own, value) = line.split_once(": ")?;
            own.eq_ignore_ascii_case(name).then_some(value)
        });
        found.unwrap_or_default()
    }

    /// The body as JSON; null when it is none.
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap_or_default()
    }
}

/// A running receiver; dropping it ends it.
#[derive(Debug)]
pub struct Hooks {
    address: SocketAddr,
    answer: Arc<AtomicU16>,
    heard: Arc<Mutex<Vec<Hook>>>,
    serving: JoinHandle<()>,
}

impl Hooks {
    /// Starts one that takes everything.
    pub async fn start(tls: Arc<ServerConfig>) -> anyhow::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await.context("failed to listen")?;
        let address = listener.local_addr()?;
        let answer = Arc::new(AtomicU16::new(200));
        let heard = Arc::new(Mutex::new(Vec::new()));
        let (its_answer, its_heard) = (Arc::clone(&answer), Arc::clone(&heard));
        let serving = tokio::spawn(async move {
            let mut open = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let acceptor = TlsAcceptor::from(Arc::clone(&tls));
                let (answer, heard) = (Arc::clone(&its_answer), Arc::clone(&its_heard));
                open.spawn(async move {
                    // Who does not trust the certificate goes away again.
                    let mut stream = BufReader::new(acceptor.accept(stream).await.ok()?);
                    let (head, body) = read(&mut stream).await?;
                    let answered = answer.load(Ordering::SeqCst);
                    heard.lock().unwrap_or_else(PoisonError::into_inner).push(Hook {
                        head,
                        body,
                        answered,
                    });
                    let text = format!("HTTP/1.1 {answered} x\r\ncontent-length: 5\r\n\r\nheard");
                    stream.write_all(text.as_bytes()).await.ok()?;
                    stream.shutdown().await.ok()
                });
                while open.try_join_next().is_some() {}
            }
        });
        Ok(Self { address, answer, heard, serving })
    }

    pub fn url(&self) -> String {
        format!("https://localhost:{}/hook", self.address.port())
    }

    /// Changes what it answers from now on.
    pub fn answer(&self, status: u16) {
        self.answer.store(status, Ordering::SeqCst);
    }

    /// Everything that it heard, oldest first.
    pub fn heard(&self) -> Vec<Hook> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits for a request that is as wanted, and returns the first.
    pub async fn wait_for(
        &self,
        what: &str,
        wanted: impl Fn(&Hook) -> bool,
    ) -> anyhow::Result<Hook> {
        wait_for(what, LIMIT, async || {
            let heard = self.heard();
            let told = || heard.iter().map(|hook| hook.header("x-latchkey-event"));
            heard
                .iter()
                .find(|hook| wanted(hook))
                .cloned()
                .ok_or_else(|| format!("heard of {}", told().collect::<Vec<_>>().join(", ")))
        })
        .await
    }
}

impl Drop for Hooks {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

async fn read(stream: &mut BufReader<impl AsyncRead + Unpin>) -> Option<(String, Vec<u8>)> {
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        if stream.read_line(&mut head).await.ok()? == 0 {
            return None;
        }
    }
    let hook = Hook { head, body: Vec::new(), answered: 0 };
    let mut body = vec![0; hook.header("content-length").parse().ok()?];
    stream.read_exact(&mut body).await.ok()?;
    Some((hook.head, body))
}
