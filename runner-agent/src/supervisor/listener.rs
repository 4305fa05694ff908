//! A listener on loopback that strangers cannot use up.
//!
//! Its port can be found by every job of the host. Whoever connects is a stranger until a request
//! shows that it may ask here; of strangers only so many are kept, and the oldest goes when there
//! are more. So nobody can take the descriptors that terraform needs to deliver its state.

use std::collections::VecDeque;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::extract::connect_info::Connected;
use axum::serve::{IncomingStream, Listener};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;

/// Terraform asks within moments of connecting.
const MOST_STRANGERS: usize = 128;

#[derive(Debug)]
pub(super) struct Loopback {
    listener: TcpListener,
    strangers: Strangers,
    /// Of the next connection.
    number: u64,
}

type Strangers = Arc<Mutex<VecDeque<(u64, oneshot::Sender<End>)>>>;

#[derive(Debug)]
struct End;

/// Who is at the other end of a connection.
#[derive(Debug, Clone)]
pub(super) struct Guest {
    number: u64,
    strangers: Strangers,
}

/// Ends when it is told to.
#[derive(Debug)]
pub(super) struct Connection {
    stream: TcpStream,
    /// Absent when it is a stranger's no more.
    ends: Option<oneshot::Receiver<End>>,
}

impl Loopback {
    /// Listens on a port, or on any for 0; with SO_REUSEADDR, so that connections of a
    /// predecessor do not keep it out.
    pub(super) async fn bind(port: u16) -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).await?;
        Ok(Self { listener, strangers: Strangers::default(), number: 0 })
    }

    pub(super) fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Serves for ever.
    pub(super) async fn serve(self, router: Router) -> io::Result<()> {
        axum::serve(self, router.into_make_service_with_connect_info::<Guest>()).await
    }
}

impl Guest {
    /// Is called for a request that may be answered.
    pub(super) fn is_known(&self) {
        let mut strangers = self.strangers.lock().unwrap_or_else(PoisonError::into_inner);
        strangers.retain(|(number, _)| *number != self.number);
    }
}

impl Listener for Loopback {
    type Io = Connection;
    type Addr = Guest;

    async fn accept(&mut self) -> (Connection, Guest) {
        let stream = loop {
            match self.listener.accept().await {
                Ok((stream, _)) => break stream,
                Err(error) => {
                    tracing::warn!(%error, "failed to accept a connection of the job's");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        };
        let (end, ends) = oneshot::channel();
        self.number += 1;
        let mut strangers = self.strangers.lock().unwrap_or_else(PoisonError::into_inner);
        strangers.push_back((self.number, end));
        if strangers.len() > MOST_STRANGERS
            && let Some((_, oldest)) = strangers.pop_front()
        {
            // It may have ended by itself.
            let _ = oldest.send(End);
        }
        let guest = Guest { number: self.number, strangers: Arc::clone(&self.strangers) };
        (Connection { stream, ends: Some(ends) }, guest)
    }

    fn local_addr(&self) -> io::Result<Guest> {
        Ok(Guest { number: 0, strangers: Arc::clone(&self.strangers) })
    }
}

impl Connected<IncomingStream<'_, Loopback>> for Guest {
    fn connect_info(stream: IncomingStream<'_, Loopback>) -> Self {
        stream.remote_addr().clone()
    }
}

impl Connection {
    fn look(&mut self, context: &mut Context<'_>) -> io::Result<()> {
        let Some(ends) = &mut self.ends else { return Ok(()) };
        match Pin::new(ends).poll(context) {
            Poll::Ready(Ok(End)) => Err(io::ErrorKind::ConnectionAborted.into()),
            Poll::Ready(Err(_)) => {
                self.ends = None;
                Ok(())
            }
            Poll::Pending => Ok(()),
        }
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.look(context)?;
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.look(context)?;
        Pin::new(&mut self.stream).poll_write(context, buffer)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use axum::extract::ConnectInfo;
    use axum::routing::get;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    const LIMIT: Duration = Duration::from_secs(20);

    async fn ask(stream: &mut TcpStream) -> String {
        stream.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
        let mut answer = [0; 15];
        stream.read_exact(&mut answer).await.unwrap();
        let mut rest = vec![0; 1024];
        let _ = stream.read(&mut rest).await.unwrap();
        String::from_utf8_lossy(&answer).into_owned()
    }

    #[tokio::test]
    async fn strangers_are_only_so_many_and_the_known_stay() {
        let listener = Loopback::bind(0).await.unwrap();
        let address = listener.address().unwrap();
        let answer = async |ConnectInfo(guest): ConnectInfo<Guest>| {
            guest.is_known();
            "hello"
        };
        tokio::spawn(listener.serve(Router::new().route("/", get(answer))));
        let mut known = TcpStream::connect(address).await.unwrap();
        assert_eq!(ask(&mut known).await, "HTTP/1.1 200 OK");
        let mut strangers = Vec::new();
        for _ in 0..3 * MOST_STRANGERS {
            strangers.push(TcpStream::connect(address).await.unwrap());
        }
        for gone in &mut strangers[..2 * MOST_STRANGERS] {
            let mut byte = [0];
            let read = gone.read(&mut byte);
            // Closed, or reset.
            let read = tokio::time::timeout(LIMIT, read).await.expect("it is turned away");
            assert!(matches!(read, Ok(0) | Err(_)), "{read:?}");
        }
        assert_eq!(ask(&mut known).await, "HTTP/1.1 200 OK");
        let mut new = TcpStream::connect(address).await.unwrap();
        assert_eq!(ask(&mut new).await, "HTTP/1.1 200 OK");
        let last = strangers.last_mut().unwrap();
        assert_eq!(ask(last).await, "HTTP/1.1 200 OK");
    }
}
