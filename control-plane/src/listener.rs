//! Connections, from the first byte to the first request: accepted, their TLS handshake done,
//! counted, and ended when they come to nothing.
//!
//! Whoever reaches a port can open connections, and needs no certificate to leave a handshake
//! half done. So there is a time for it, a number of those that are not done, and a number of
//! connections for each who has proved something. Of all these the oldest gives way and never the
//! newest. Who is honest opens a connection in milliseconds, while one that is silent takes all
//! its time; and an honest runner whose network broke is the one that has just come back, while
//! what it had before hangs half open until its keep-alive ends it.

use std::collections::{HashMap, VecDeque};
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use latchkey_domain::id::Digest;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, oneshot};
use tokio::time::Sleep;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::Connected;

use crate::authority::{ServerIdentity, key_of};
use crate::seldom::Seldom;

/// How long a connection may take until its first bytes of HTTP/2 are here.
const OPENING: Duration = Duration::from_secs(10);

/// The preface that every client begins with.
const PREFACE: usize = 24;

/// How many connections of a listener may be that far: when a thousand runners come back at once,
/// none of them ends another's handshake. A test opens that many and has few files.
const MOST_OPENING: usize = if cfg!(test) { 32 } else { 1024 };

/// How many connections one runner has; an honest one has one.
const MOST_OF_RUNNER: usize = 16;

/// How many connections those have together who show no certificate, which is needed to enrol
/// alone.
const MOST_OF_STRANGERS: usize = 1024;

/// How long before it is tried again when the system has no file or memory for a connection.
const EXHAUSTED: Duration = Duration::from_millis(50);

#[derive(Debug, thiserror::Error)]
pub(crate) enum TlsError {
    #[error("read a listener's certificate or key")]
    Pem(#[source] rustls::pki_types::pem::Error),
    #[error("use a listener's certificate or key")]
    Unusable(#[source] rustls::Error),
    #[error("trust the CA of runners")]
    Verifier(#[source] rustls::server::VerifierBuilderError),
}

/// How a listener's connections are made.
#[derive(Clone)]
pub(crate) enum Security {
    /// On loopback only.
    Plaintext,
    Tls(Arc<ServerConfig>),
    /// With a certificate of the caller's, if it has one.
    MutualTls(Arc<ServerConfig>),
}

impl Security {
    pub(crate) fn tls(identity: &ServerIdentity) -> Result<Self, TlsError> {
        let builder = ServerConfig::builder().with_no_client_auth();
        Ok(Self::Tls(finished(builder, identity)?))
    }

    /// Optional, because Enroll is how a runner gets its certificate; the layer demands it of
    /// every other call.
    pub(crate) fn mutual_tls(identity: &ServerIdentity, ca_pem: &str) -> Result<Self, TlsError> {
        let ca = CertificateDer::from_pem_slice(ca_pem.as_bytes()).map_err(TlsError::Pem)?;
        let mut roots = RootCertStore::empty();
        roots.add(ca).map_err(TlsError::Unusable)?;
        let verifier = WebPkiClientVerifier::builder(Arc::new(roots))
            .allow_unauthenticated()
            .build()
            .map_err(TlsError::Verifier)?;
        let builder = ServerConfig::builder().with_client_cert_verifier(verifier);
        Ok(Self::MutualTls(finished(builder, identity)?))
    }
}

fn finished(
    builder: rustls::ConfigBuilder<ServerConfig, rustls::server::WantsServerCert>,
    identity: &ServerIdentity,
) -> Result<Arc<ServerConfig>, TlsError> {
    let chain = CertificateDer::pem_slice_iter(identity.chain_pem.as_bytes())
        .collect::<Result<Vec<_>, _>>()
        .map_err(TlsError::Pem)?;
    let key = PrivateKeyDer::from_pem_slice(identity.key_pem.as_bytes()).map_err(TlsError::Pem)?;
    let mut config = builder.with_single_cert(chain, key).map_err(TlsError::Unusable)?;
    config.alpn_protocols.push(b"h2".to_vec());
    Ok(Arc::new(config))
}

/// Accepts until the stream is dropped, which closes the listener.
pub(crate) fn incoming(
    listener: TcpListener,
    security: Security,
) -> ReceiverStream<io::Result<Connection>> {
    let (ready, connections) = mpsc::channel(64);
    tokio::spawn(accept(listener, security, ready));
    ReceiverStream::new(connections)
}

type Ready = mpsc::Sender<io::Result<Connection>>;

async fn accept(listener: TcpListener, security: Security, ready: Ready) {
    let (callers, exhausted) = (Callers::default(), Seldom::default());
    loop {
        let accepted = tokio::select! {
            () = ready.closed() => return,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, address)) => {
                let (security, callers) = (security.clone(), callers.clone());
                let place = callers.enter(Who::Opening);
                let ready = ready.clone();
                tokio::spawn(async move {
                    match Connection::open(stream, address, security, &callers, place).await {
                        // A server that stops takes no more.
                        Ok(connection) => drop(ready.send(Ok(connection)).await),
                        Err(error) => tracing::debug!(%error, "a connection came to nothing"),
                    }
                });
            }
            Err(error) if is_of_the_connection(&error) => {}
            Err(error) => {
                if let Some(times) = exhausted.count() {
                    tracing::warn!(%error, times, "no connection can be accepted; trying again");
                }
                tokio::time::sleep(EXHAUSTED).await;
            }
        }
    }
}

/// Tells a connection that broke while it waited from a system that has no room for any.
fn is_of_the_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionReset, Interrupted, TimedOut};
    [ConnectionAborted, ConnectionReset, Interrupted, TimedOut].contains(&error.kind())
}

/// Who is on the other side of a connection, and what they proved in its handshake.
#[derive(Clone, Debug)]
pub(crate) struct Peer {
    /// A proxy's, where one stands between.
    pub(crate) address: SocketAddr,
    pub(crate) certificate: Option<CertificateDer<'static>>,
}

/// A connection that the server reads requests from.
pub(crate) struct Connection {
    transport: Transport,
    peer: Peer,
    /// Until the preface is here.
    opening: Option<Opening>,
    caller: Option<Caller>,
}

enum Transport {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

struct Opening {
    left: usize,
    deadline: Pin<Box<Sleep>>,
    place: Caller,
}

impl Connection {
    async fn open(
        stream: TcpStream,
        address: SocketAddr,
        security: Security,
        callers: &Callers,
        mut place: Caller,
    ) -> io::Result<Self> {
        // Small frames would wait for the peer's delayed acknowledgement: 40 ms each.
        stream.set_nodelay(true)?;
        let deadline = tokio::time::Instant::now() + OPENING;
        let (transport, certificate, caller) = match security {
            Security::Plaintext => (Transport::Plain(stream), None, None),
            Security::Tls(config) => {
                let stream = shake_hands(stream, config, deadline, &mut place).await?;
                (Transport::Tls(Box::new(stream)), None, None)
            }
            Security::MutualTls(config) => {
                let stream = shake_hands(stream, config, deadline, &mut place).await?;
                let chain = stream.get_ref().1.peer_certificates();
                let certificate = chain.and_then(|chain| chain.first()).cloned();
                let key = certificate.as_ref().and_then(|leaf| key_of(leaf).ok());
                let caller = callers.enter(key.map_or(Who::Stranger, Who::Runner));
                (Transport::Tls(Box::new(stream)), certificate, Some(caller))
            }
        };
        let deadline = Box::pin(tokio::time::sleep_until(deadline));
        let opening = Some(Opening { left: PREFACE, deadline, place });
        Ok(Self { transport, peer: Peer { address, certificate }, opening, caller })
    }

    /// Fails a connection that has to give way.
    fn stand(&mut self, context: &mut Context<'_>) -> io::Result<()> {
        let opening = self.opening.as_mut().map(|opening| &mut opening.place);
        for place in [opening, self.caller.as_mut()].into_iter().flatten() {
            if place.poll_give_way(context).is_ready() {
                return Err(given_way());
            }
        }
        Ok(())
    }
}

async fn shake_hands(
    stream: TcpStream,
    config: Arc<ServerConfig>,
    deadline: tokio::time::Instant,
    place: &mut Caller,
) -> io::Result<TlsStream<TcpStream>> {
    let shaken = tokio::time::timeout_at(deadline, TlsAcceptor::from(config).accept(stream));
    tokio::select! {
        biased;
        () = std::future::poll_fn(|context| place.poll_give_way(context)) => Err(given_way()),
        shaken = shaken => shaken.map_err(|_| late())?,
    }
}

fn given_way() -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionAborted, "newer connections took over")
}

fn late() -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, "the first request did not begin in time")
}

impl Connected for Connection {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.stand(context)?;
        if let Some(opening) = &mut self.opening
            && opening.deadline.as_mut().poll(context).is_ready()
        {
            return Poll::Ready(Err(late()));
        }
        let before = buffer.filled().len();
        let read = match &mut self.transport {
            Transport::Plain(stream) => Pin::new(stream).poll_read(context, buffer),
            Transport::Tls(stream) => Pin::new(stream).poll_read(context, buffer),
        };
        if let Some(opening) = &mut self.opening {
            opening.left = opening.left.saturating_sub(buffer.filled().len() - before);
            if opening.left == 0 {
                self.opening = None;
            }
        }
        read
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.stand(context)?;
        match &mut self.transport {
            Transport::Plain(stream) => Pin::new(stream).poll_write(context, data),
            Transport::Tls(stream) => Pin::new(stream).poll_write(context, data),
        }
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        data: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.stand(context)?;
        match &mut self.transport {
            Transport::Plain(stream) => Pin::new(stream).poll_write_vectored(context, data),
            Transport::Tls(stream) => Pin::new(stream).poll_write_vectored(context, data),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match &self.transport {
            Transport::Plain(stream) => stream.is_write_vectored(),
            Transport::Tls(stream) => stream.is_write_vectored(),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.transport {
            Transport::Plain(stream) => Pin::new(stream).poll_flush(context),
            Transport::Tls(stream) => Pin::new(stream).poll_flush(context),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.transport {
            Transport::Plain(stream) => Pin::new(stream).poll_shutdown(context),
            Transport::Tls(stream) => Pin::new(stream).poll_shutdown(context),
        }
    }
}

/// Whose a connection is, by its handshake; it has one more place until it has begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Who {
    /// By the key of the certificate.
    Runner(Digest),
    Stranger,
    Opening,
}

impl Who {
    const fn most(self) -> usize {
        match self {
            Who::Runner(_) => MOST_OF_RUNNER,
            Who::Stranger => MOST_OF_STRANGERS,
            Who::Opening => MOST_OPENING,
        }
    }
}

/// The connections of each, oldest first.
#[derive(Clone, Default)]
struct Callers(Arc<Mutex<Known>>);

#[derive(Default)]
struct Known {
    entered: u64,
    of: HashMap<Who, Theirs>,
}

#[derive(Default)]
struct Theirs {
    connections: VecDeque<(u64, oneshot::Sender<()>)>,
    ended: Seldom,
}

/// One connection's place among its caller's, until it is dropped.
struct Caller {
    callers: Callers,
    who: Who,
    number: u64,
    /// Resolves when a newer connection takes the place; absent from then on.
    gives_way: Option<oneshot::Receiver<()>>,
}

impl Callers {
    fn enter(&self, who: Who) -> Caller {
        let (give_way, gives_way) = oneshot::channel();
        let mut known = self.known();
        known.entered += 1;
        let number = known.entered;
        let theirs = known.of.entry(who).or_default();
        theirs.connections.push_back((number, give_way));
        let mut told = None;
        if theirs.connections.len() > who.most()
            && let Some((_, oldest)) = theirs.connections.pop_front()
        {
            let _ = oldest.send(());
            told = theirs.ended.count();
        }
        drop(known);
        if let Some(times) = told {
            let most = who.most();
            tracing::warn!(?who, most, times, "too many connections; the oldest is ended");
        }
        Caller { callers: self.clone(), who, number, gives_way: Some(gives_way) }
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        // Nothing that holds it can panic halfway.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Caller {
    fn poll_give_way(&mut self, context: &mut Context<'_>) -> Poll<()> {
        if let Some(gives_way) = &mut self.gives_way
            && Pin::new(gives_way).poll(context).is_pending()
        {
            return Poll::Pending;
        }
        self.gives_way = None;
        Poll::Ready(())
    }
}

impl Drop for Caller {
    fn drop(&mut self) {
        let mut known = self.callers.known();
        if let Some(theirs) = known.of.get_mut(&self.who) {
            theirs.connections.retain(|(number, _)| *number != self.number);
            if theirs.connections.is_empty() {
                known.of.remove(&self.who);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio_stream::StreamExt;

    use super::*;

    fn is_over(caller: &mut Caller) -> bool {
        caller.gives_way.as_mut().is_some_and(|gives_way| gives_way.try_recv().is_ok())
    }

    #[test]
    fn the_oldest_connection_of_a_caller_gives_way_to_the_newest() {
        let callers = Callers::default();
        let (one, other) =
            (Who::Runner(Digest::from_bytes([1; 32])), Who::Runner(Digest::from_bytes([2; 32])));
        let mut theirs = callers.enter(other);
        let mut own: Vec<_> = (0..MOST_OF_RUNNER).map(|_| callers.enter(one)).collect();
        assert!(!own.iter_mut().any(is_over));
        own.push(callers.enter(one));
        let over: Vec<_> = own.iter_mut().map(is_over).collect();
        assert_eq!(over.iter().position(|over| *over), Some(0));
        assert_eq!(over.iter().filter(|over| **over).count(), 1);
        // A place that was left is free again.
        own.truncate(4);
        own.extend((0..MOST_OF_RUNNER - 3).map(|_| callers.enter(one)));
        assert!(!own[1..].iter_mut().any(is_over));
        assert!(!is_over(&mut theirs));
        drop((own, theirs));
        assert!(callers.known().of.is_empty());
    }

    fn tls() -> Security {
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let certified = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        let identity = ServerIdentity {
            chain_pem: certified.cert.pem(),
            key_pem: certified.signing_key.serialize_pem().into(),
        };
        Security::tls(&identity).unwrap()
    }

    async fn listening(security: Security) -> (TcpStream, ReceiverStream<io::Result<Connection>>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let connections = incoming(listener, security);
        (TcpStream::connect(address).await.unwrap(), connections)
    }

    #[tokio::test]
    async fn a_connection_that_leaves_its_first_bytes_half_sent_is_ended() {
        let (mut client, mut connections) = listening(Security::Plaintext).await;
        let mut connection = connections.next().await.unwrap().unwrap();
        client.write_all(b"PRI * HTTP").await.unwrap();
        let mut read = [0; 64];
        assert_eq!(connection.read(&mut read).await.unwrap(), 10);
        tokio::time::pause();
        let error = connection.read(&mut read).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }

    #[tokio::test]
    async fn a_connection_tells_where_it_comes_from() {
        let (client, mut connections) = listening(Security::Plaintext).await;
        let connection = connections.next().await.unwrap().unwrap();
        assert_eq!(connection.connect_info().address, client.local_addr().unwrap());
    }

    #[tokio::test]
    async fn one_that_has_begun_may_be_silent() {
        let (mut client, mut connections) = listening(Security::Plaintext).await;
        let mut connection = connections.next().await.unwrap().unwrap();
        client.write_all(&[b'x'; PREFACE]).await.unwrap();
        let mut read = [0; 64];
        assert_eq!(connection.read(&mut read).await.unwrap(), PREFACE);
        tokio::time::pause();
        let silent = tokio::time::timeout(OPENING * 9, connection.read(&mut read)).await;
        assert!(silent.is_err());
    }

    #[tokio::test]
    async fn a_handshake_that_is_not_done_is_ended() {
        let (mut client, _connections) = listening(tls()).await;
        // The beginning of a `ClientHello`.
        client.write_all(&[0x16, 3, 1]).await.unwrap();
        tokio::time::pause();
        assert_eq!(client.read(&mut [0; 64]).await.unwrap_or(0), 0);
    }

    #[tokio::test]
    async fn who_opens_one_too_many_ends_the_oldest_that_is_silent_and_is_served() {
        for security in [tls(), Security::Plaintext] {
            let is_plain = matches!(security, Security::Plaintext);
            let (mut oldest, mut connections) = listening(security).await;
            let address = oldest.peer_addr().unwrap();
            // A server takes what is ready; over TLS none of these is.
            let mut taken = vec![];
            let mut silent = vec![];
            for _ in 0..MOST_OPENING {
                silent.push(TcpStream::connect(address).await.unwrap());
                if is_plain {
                    taken.push(connections.next().await.unwrap().unwrap());
                }
            }
            let ended = async {
                if is_plain {
                    let error = taken[0].read(&mut [0; 64]).await.unwrap_err();
                    assert_eq!(error.kind(), io::ErrorKind::ConnectionAborted);
                } else {
                    assert_eq!(oldest.read(&mut [0; 64]).await.unwrap_or(0), 0);
                }
            };
            tokio::time::timeout(OPENING / 2, ended).await.unwrap();
            let last = silent.last_mut().unwrap().read_u8();
            assert!(tokio::time::timeout(OPENING / 100, last).await.is_err());
        }
    }
}
