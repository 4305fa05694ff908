//! A mail server that speaks STARTTLS, or does not, and keeps what it was told in clear and what
//! under TLS.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::Context;
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use rustls::ServerConfig;
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinHandle, JoinSet};
use tokio_rustls::TlsAcceptor;

use crate::wait::{LIMIT, wait_for};

/// What a server does when somebody wants TLS.
#[derive(Debug, Clone)]
pub enum Offer {
    /// It knows no TLS, and takes mail in clear.
    Nothing,
    /// STARTTLS with this.
    StartTls(Arc<ServerConfig>),
    /// The same, with answers in clear behind the one to STARTTLS: what somebody on the way puts
    /// there so that they are taken for answers under TLS.
    Injecting(Arc<ServerConfig>),
}

/// A mail that was taken.
#[derive(Debug, Clone, Default)]
pub struct Mail {
    pub encrypted: bool,
    /// User and password, where somebody signed in.
    pub signed_in: Option<(String, String)>,
    pub from: String,
    pub to: Vec<String>,
    pub head: String,
    pub body: String,
}

/// A running server; dropping it ends it.
#[derive(Debug)]
pub struct MailServer {
    port: u16,
    shared: Arc<Mutex<Shared>>,
    serving: JoinHandle<()>,
}

#[derive(Debug)]
struct Shared {
    offer: Offer,
    in_clear: Vec<String>,
    mails: Vec<Mail>,
}

impl MailServer {
    pub async fn start(offer: Offer) -> anyhow::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await.context("failed to listen")?;
        let port = listener.local_addr()?.port();
        let shared = Shared { offer, in_clear: Vec::new(), mails: Vec::new() };
        let shared = Arc::new(Mutex::new(shared));
        let its = Arc::clone(&shared);
        let serving = tokio::spawn(async move {
            let mut open = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                open.spawn(serve(stream, Arc::clone(&its)));
                while open.try_join_next().is_some() {}
            }
        });
        Ok(Self { port, shared, serving })
    }

    /// As `--smtp-server` takes it.
    pub fn address(&self) -> String {
        format!("localhost:{}", self.port)
    }

    /// Changes what it does from the next connection on.
    pub fn set(&self, offer: Offer) {
        lock(&self.shared).offer = offer;
    }

    /// Every line that came without TLS.
    pub fn in_clear(&self) -> Vec<String> {
        lock(&self.shared).in_clear.clone()
    }

    /// All mails, oldest first.
    pub fn mails(&self) -> Vec<Mail> {
        lock(&self.shared).mails.clone()
    }

    /// Waits for a mail that is as wanted, and returns the first.
    pub async fn wait_for(
        &self,
        what: &str,
        wanted: impl Fn(&Mail) -> bool,
    ) -> anyhow::Result<Mail> {
        wait_for(what, LIMIT, async || {
            let mails = self.mails();
            mails.iter().find(|mail| wanted(mail)).cloned().ok_or_else(|| format!("{mails:?}"))
        })
        .await
    }
}

impl Drop for MailServer {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

fn lock(shared: &Mutex<Shared>) -> MutexGuard<'_, Shared> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn serve(stream: TcpStream, shared: Arc<Mutex<Shared>>) -> Option<()> {
    let offer = lock(&shared).offer.clone();
    let mut stream = BufReader::new(stream);
    stream.write_all(b"220 test\r\n").await.ok()?;
    let (features, go, tls) = match offer {
        Offer::Nothing => ("250-test\r\n250 AUTH PLAIN\r\n", "", None),
        Offer::StartTls(tls) => ("250-test\r\n250 STARTTLS\r\n", "220 go\r\n", Some(tls)),
        Offer::Injecting(tls) => {
            let injected = "220 go\r\n250-test\r\n250 AUTH LOGIN\r\n235 in\r\n250 ok\r\n";
            ("250-test\r\n250 STARTTLS\r\n", injected, Some(tls))
        }
    };
    let mut session = Session { shared, features, encrypted: false, mail: Mail::default() };
    if !session.talk(&mut stream).await? {
        return Some(());
    }
    stream.write_all(go.as_bytes()).await.ok()?;
    let stream = TlsAcceptor::from(tls?).accept(stream.into_inner()).await.ok()?;
    session.features = "250-test\r\n250 AUTH PLAIN\r\n";
    session.encrypted = true;
    session.talk(&mut BufReader::new(stream)).await.map(|_| ())
}

struct Session {
    shared: Arc<Mutex<Shared>>,
    features: &'static str,
    encrypted: bool,
    mail: Mail,
}

impl Session {
    /// Talks until the end, or answers true when TLS is to begin.
    async fn talk<S: AsyncRead + AsyncWrite + Unpin>(
        &mut self,
        stream: &mut BufReader<S>,
    ) -> Option<bool> {
        loop {
            let line = self.line(stream).await?;
            let upper = line.to_ascii_uppercase();
            let answer = if upper.starts_with("EHLO") {
                self.features
            } else if upper == "STARTTLS" {
                return Some(true);
            } else if let Some(proof) = upper.strip_prefix("AUTH PLAIN ").map(|_| &line[11..]) {
                self.mail.signed_in = plain(proof);
                "235 in\r\n"
            } else if let Some(from) = upper.strip_prefix("MAIL FROM:").map(|_| &line[10..]) {
                let signed_in = self.mail.signed_in.take();
                self.mail = Mail { from: from.to_owned(), signed_in, ..Mail::default() };
                "250 ok\r\n"
            } else if upper.starts_with("RCPT TO:") {
                self.mail.to.push(line[8..].to_owned());
                "250 ok\r\n"
            } else if upper == "DATA" {
                stream.write_all(b"354 go\r\n").await.ok()?;
                let mut data = String::new();
                loop {
                    match self.line(stream).await?.as_str() {
                        "." => break,
                        line => data = data + line.strip_prefix('.').unwrap_or(line) + "\r\n",
                    }
                }
                let (head, body) = data.split_once("\r\n\r\n").unwrap_or((&data, ""));
                let mail = Mail {
                    encrypted: self.encrypted,
                    head: head.to_owned(),
                    body: body.to_owned(),
                    ..self.mail.clone()
                };
                lock(&self.shared).mails.push(mail);
                "250 taken\r\n"
            } else if upper == "QUIT" {
                stream.write_all(b"221 bye\r\n").await.ok()?;
                return Some(false);
            } else {
                "500 what\r\n"
            };
            stream.write_all(answer.as_bytes()).await.ok()?;
        }
    }

    async fn line<S: AsyncRead + Unpin>(&self, stream: &mut BufReader<S>) -> Option<String> {
        let mut line = String::new();
        if stream.read_line(&mut line).await.ok()? == 0 {
            return None;
        }
        let line = line.trim_end_matches("\r\n").to_owned();
        if !self.encrypted {
            lock(&self.shared).in_clear.push(line.clone());
        }
        Some(line)
    }
}

fn plain(proof: &str) -> Option<(String, String)> {
    let text = String::from_utf8(BASE64_STANDARD.decode(proof).ok()?).ok()?;
    let (user, password) = text.strip_prefix('\0')?.split_once('\0')?;
    Some((user.to_owned(), password.to_owned()))
}
