//! The way to the operator's mail server: a connection over which mail may be said.
//!
//! With STARTTLS, in this order:
//!
//! 1. Greeting and EHLO in clear. A server that does not offer STARTTLS gets nothing more.
//! 2. STARTTLS. Whatever stands behind its answer was said by who knows whom, before anybody
//!    proved anything: it would be read as answers under TLS. So it ends the attempt.
//! 3. TLS, for the server's name, and all over again: what was learned in clear counts for
//!    nothing.
//!
//! The library speaks SMTP from there on. It cannot do the first steps: it keeps what stands
//! behind the answer of step 2.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use lettre::transport::smtp::client::{AsyncSmtpConnection, AsyncTokioStream};
use lettre::transport::smtp::extension::ClientId;
use rustls::ClientConfig;
use rustls_pki_types::ServerName;
use tokio::io::{
    AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader, ReadBuf,
};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::failed;
use crate::notices::Attempt;
use crate::notices::options::{Error, MailOptions, SmtpTls};

/// The most that a server says in clear in one answer.
const LONGEST_ANSWER: u64 = 8 << 10;

/// Where it is, and how the way there is protected.
pub(super) struct Server {
    host: String,
    port: u16,
    /// As its certificate names it.
    name: ServerName<'static>,
    protection: SmtpTls,
    tls: TlsConnector,
    /// As we name ourselves.
    own: String,
}

impl Server {
    pub(super) fn new(options: &MailOptions, mut tls: ClientConfig) -> Result<Self, Error> {
        tls.alpn_protocols.clear();
        Ok(Self {
            host: options.host.clone(),
            port: options.port,
            name: ServerName::try_from(options.host.clone()).map_err(|_| Error::Server)?,
            protection: options.tls,
            tls: TlsConnector::from(Arc::new(tls)),
            own: options.from.email.domain().to_owned(),
        })
    }

    /// Connects and greets.
    pub(super) async fn connect(&self) -> Result<AsyncSmtpConnection, Attempt> {
        let stream = TcpStream::connect((self.host.as_str(), self.port)).await;
        let stream = stream.map_err(|error| Attempt::failed(format!("no connection: {error}")))?;
        let stream: Box<dyn AsyncTokioStream> = match self.protection {
            SmtpTls::None => Box::new(stream),
            SmtpTls::Implicit => Box::new(self.protect(stream, b"").await?),
            SmtpTls::Starttls => {
                let stream = self.start_tls(stream).await?;
                // Under TLS a server does not greet again, and the library waits for it.
                Box::new(self.protect(stream, b"220 greeted\r\n").await?)
            }
        };
        let own = ClientId::Domain(self.own.clone());
        AsyncSmtpConnection::connect_with_transport(stream, &own).await.map_err(failed)
    }

    async fn protect(
        &self,
        stream: TcpStream,
        before: &'static [u8],
    ) -> Result<Protected, Attempt> {
        let stream = self.tls.connect(self.name.clone(), stream).await;
        let stream = stream.map_err(|error| Attempt::failed(format!("TLS failed: {error}")))?;
        Ok(Protected { before, stream })
    }

    async fn start_tls(&self, stream: TcpStream) -> Result<TcpStream, Attempt> {
        let mut stream = BufReader::new(stream);
        answer(&mut stream, "220").await?;
        say(&mut stream, &format!("EHLO {}", self.own)).await?;
        let features = answer(&mut stream, "250").await?;
        if !features.iter().any(|feature| feature.eq_ignore_ascii_case("STARTTLS")) {
            return Err(Attempt::failed("the server does not offer STARTTLS; it got no mail"));
        }
        say(&mut stream, "STARTTLS").await?;
        answer(&mut stream, "220").await?;
        if !stream.buffer().is_empty() {
            return Err(Attempt::failed("the server spoke on in clear before TLS; it got no mail"));
        }
        Ok(stream.into_inner())
    }
}

fn broken(error: &io::Error) -> Attempt {
    Attempt::failed(format!("the connection broke before TLS: {error}"))
}

async fn say(stream: &mut BufReader<TcpStream>, line: &str) -> Result<(), Attempt> {
    let line = format!("{line}\r\n");
    stream.write_all(line.as_bytes()).await.map_err(|error| broken(&error))
}

/// Reads one answer, and returns its lines without their code.
async fn answer(stream: &mut BufReader<TcpStream>, code: &str) -> Result<Vec<String>, Attempt> {
    let mut stream = stream.take(LONGEST_ANSWER);
    let mut lines = vec![];
    loop {
        let mut line = String::new();
        stream.read_line(&mut line).await.map_err(|error| broken(&error))?;
        let Some(line) = line.strip_suffix('\n') else {
            return Err(Attempt::failed("the server gave no whole answer before TLS"));
        };
        let line = line.trim_end_matches('\r');
        let Some(rest) = line.strip_prefix(code) else {
            let status = line.get(..3).and_then(|code| code.parse().ok());
            return Err(Attempt { status, ..Attempt::failed(line) });
        };
        lines.push(rest.get(1..).unwrap_or_default().to_owned());
        if !rest.starts_with('-') {
            return Ok(lines);
        }
    }
}

/// A connection under TLS, with words of our own before what comes from it.
struct Protected {
    before: &'static [u8],
    stream: TlsStream<TcpStream>,
}

impl fmt::Debug for Protected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Protected").finish_non_exhaustive()
    }
}

impl AsyncTokioStream for Protected {
    fn peer_addr(&self) -> io::Result<SocketAddr> {
        self.stream.get_ref().0.peer_addr()
    }
}

impl AsyncRead for Protected {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.before.is_empty() {
            return Pin::new(&mut self.stream).poll_read(context, buffer);
        }
        let (now, later) = self.before.split_at(self.before.len().min(buffer.remaining()));
        buffer.put_slice(now);
        self.before = later;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Protected {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
