//! The private socket between agent and supervisor.
//!
//! The agent sends orders; the supervisor answers with its whole status, at once and after every
//! change, so an agent that attaches again knows where things stand from the first frame.
//! Frames are protobuf behind a length; `Go` crosses as the control plane's own message, whose
//! `Debug` hides the secrets. A connection that breaks costs nothing: the next one is accepted.
//!
//! Jobs have the agent's user, and could find the socket. So the agent shows what is in a file
//! beside it first, which jobs do not see; until then nothing is answered and nothing obeyed.
//!
//! Socket paths may have 107 bytes, job directories more: both sides name the socket through a
//! handle of the directory.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use latchkey_proto::v1;
use prost::Message;
use secrecy::{ExposeSecret, SecretString};
use subtle::ConstantTimeEq;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, watch};
use tokio::task::AbortHandle;
use zeroize::Zeroizing;

use crate::job_directory::create_private;
use crate::random;

const SOCKET: &str = "control";

/// What an agent must show; new for each supervisor.
const TOKEN: &str = "control-token";

/// How long it may take to.
const PATIENCE: Duration = Duration::from_secs(5);

/// Who has not shown it yet is turned away when there are more.
const MOST_STRANGERS: usize = 64;

/// Variables and credentials are the bulk of the largest frame.
const LARGEST: usize = 16 << 20;

/// What the agent wants.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct OrderFrame {
    #[prost(oneof = "Order", tags = "1, 2, 3, 4, 5, 6")]
    pub(crate) order: Option<Order>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
pub(crate) enum Order {
    /// Starts the job; later, replaces its credentials.
    #[prost(message, tag = "1")]
    Go(v1::Go),
    /// Asks terraform to stop; true: kills its process group.
    #[prost(bool, tag = "2")]
    Cancel(bool),
    /// Gives out no more credentials.
    #[prost(bool, tag = "3")]
    Withdraw(bool),
    /// Ends without a trace, unless terraform may have run.
    #[prost(bool, tag = "4")]
    GiveUp(bool),
    /// Ends with this failure: the agent could not prepare the job.
    #[prost(message, tag = "5")]
    Refuse(v1::JobFailed),
    /// Says this in the log.
    #[prost(string, tag = "6")]
    Note(String),
}

/// How far the supervisor is.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub(crate) struct Status {
    #[prost(enumeration = "Stage", tag = "1")]
    pub(crate) stage: i32,
    /// Durable length of `log`.
    #[prost(uint64, tag = "2")]
    pub(crate) log_length: u64,
    /// Number of the newest durable state; 0 when none was written.
    #[prost(uint64, tag = "3")]
    pub(crate) states: u64,
    /// A replacement waits for `Go`: what it must mask died with its predecessor.
    #[prost(bool, tag = "4")]
    pub(crate) wants_secrets: bool,
    /// Which of these protocols it speaks; 0 for the first, which did not say.
    #[prost(uint32, tag = "5")]
    pub(crate) protocol: u32,
}

/// What a supervisor of this program speaks. An agent takes up supervisors of older programs, and
/// of newer ones: frames may gain orders and fields, which the other side passes over. This grows
/// only when that is not enough.
pub(super) const PROTOCOL: u32 = 1;

impl Status {
    /// Says whether an agent of this program understands its sender.
    pub(crate) fn is_understood(&self) -> bool {
        self.protocol <= PROTOCOL
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub(crate) enum Stage {
    /// For `Go`.
    Waiting = 0,
    /// `Go` has arrived; terraform provably has not changed anything.
    Preparing = 1,
    /// `exec` is synced.
    Executing = 2,
    /// `result.json` is synced.
    Ended = 3,
}

/// Opens the socket, in place of a dead predecessor's.
pub(crate) fn listen(directory: &Path) -> io::Result<Listener> {
    match std::fs::remove_file(directory.join(SOCKET)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        Ok(()) | Err(_) => {}
    }
    let token = random::token();
    create_private(&directory.join(TOKEN))?.write_all(token.as_bytes())?;
    let (_handle, path) = short_path(directory)?;
    Ok(Listener { socket: UnixListener::bind(path)?, token: token.into() })
}

/// The socket, and what opens it.
#[derive(Debug)]
pub(crate) struct Listener {
    socket: UnixListener,
    token: SecretString,
}

impl Listener {
    async fn is_agent(token: &SecretString, stream: &mut UnixStream) -> bool {
        let expect = token.expose_secret().as_bytes();
        let mut shown = Zeroizing::new(vec![0u8; expect.len()]);
        let read = tokio::time::timeout(PATIENCE, stream.read_exact(&mut shown)).await;
        matches!(read, Ok(Ok(_))) && bool::from(shown.ct_eq(expect))
    }
}

/// Serves one connection after the other, for ever. A newer one takes over.
pub(crate) async fn serve(
    listener: Listener,
    orders: mpsc::Sender<Order>,
    status: watch::Receiver<Status>,
) {
    let current: Arc<Mutex<Option<AbortHandle>>> = Arc::default();
    let mut strangers = VecDeque::new();
    loop {
        match listener.socket.accept().await {
            Ok((mut stream, _)) => {
                let (orders, status) = (orders.clone(), status.clone());
                let (token, current) = (listener.token.clone(), Arc::clone(&current));
                let stranger = tokio::spawn(async move {
                    if !Listener::is_agent(&token, &mut stream).await {
                        tracing::warn!("somebody who is not the agent was turned away");
                        return;
                    }
                    let agent = tokio::spawn(async move {
                        if let Err(error) = connection(stream, &orders, status).await {
                            tracing::debug!(%error, "the agent's connection ended");
                        }
                    });
                    let mut current = current.lock().unwrap_or_else(PoisonError::into_inner);
                    if let Some(older) = current.replace(agent.abort_handle()) {
                        older.abort();
                    }
                });
                strangers.push_back(stranger.abort_handle());
                if strangers.len() > MOST_STRANGERS
                    && let Some(oldest) = strangers.pop_front()
                {
                    oldest.abort();
                }
            }
            Err(error) => {
                tracing::warn!(%error, "failed to accept the agent's connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn connection(
    stream: UnixStream,
    orders: &mpsc::Sender<Order>,
    mut status: watch::Receiver<Status>,
) -> io::Result<()> {
    let (mut from, mut to) = stream.into_split();
    let read = async {
        while let Some(frame) = receive::<OrderFrame>(&mut from).await? {
            if let Some(order) = frame.order
                && orders.send(order).await.is_err()
            {
                break;
            }
        }
        Ok(())
    };
    let write = async {
        loop {
            let now = *status.borrow_and_update();
            send(&mut to, &now).await?;
            if status.changed().await.is_err() {
                return Ok(());
            }
        }
    };
    tokio::select! {
        done = read => done,
        done = write => done,
    }
}

/// Attaches to a living supervisor.
pub(crate) async fn connect(directory: &Path) -> io::Result<UnixStream> {
    let (_handle, path) = short_path(directory)?;
    let mut stream = UnixStream::connect(path).await?;
    // A supervisor of an older program has none and asks for none.
    match std::fs::read(directory.join(TOKEN)) {
        Ok(token) => stream.write_all(&Zeroizing::new(token)).await?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    Ok(stream)
}

fn short_path(directory: &Path) -> io::Result<(File, PathBuf)> {
    let handle = File::open(directory)?;
    let path = PathBuf::from(format!("/proc/self/fd/{}/{SOCKET}", handle.as_raw_fd()));
    Ok((handle, path))
}

pub(crate) async fn send<M: Message>(
    to: &mut (impl AsyncWrite + Unpin),
    message: &M,
) -> io::Result<()> {
    let length = u32::try_from(message.encoded_len()).map_err(io::Error::other)?;
    let mut frame = Zeroizing::new(Vec::with_capacity(4 + message.encoded_len()));
    frame.extend_from_slice(&length.to_be_bytes());
    message.encode(&mut *frame).map_err(io::Error::other)?;
    to.write_all(&frame).await
}

/// Answers `None` at the end of the stream.
pub(crate) async fn receive<M: Message + Default>(
    from: &mut (impl AsyncRead + Unpin),
) -> io::Result<Option<M>> {
    let length = match from.read_u32().await {
        Ok(length) => length as usize,
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(error),
    };
    if length > LARGEST {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "the frame is too large"));
    }
    let mut frame = Zeroizing::new(vec![0u8; length]);
    from.read_exact(&mut frame).await?;
    M::decode(frame.as_slice()).map(Some).map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_second_connection_learns_the_status_and_takes_over() {
        let base = tempfile::tempdir().unwrap();
        // Longer than a socket's path may be.
        let directory = base.path().join("x".repeat(120));
        std::fs::create_dir(&directory).unwrap();
        let (orders_to, mut orders) = mpsc::channel(4);
        let (status_to, status) = watch::channel(Status::default());
        tokio::spawn(serve(listen(&directory).unwrap(), orders_to, status));

        let mut first = connect(&directory).await.unwrap();
        assert_eq!(receive::<Status>(&mut first).await.unwrap(), Some(Status::default()));
        let go = OrderFrame { order: Some(Order::Go(v1::Go::default())) };
        send(&mut first, &go).await.unwrap();
        assert_eq!(orders.recv().await, go.order);

        let later = Status {
            stage: Stage::Executing.into(),
            log_length: 7,
            states: 1,
            wants_secrets: false,
            protocol: PROTOCOL,
        };
        status_to.send_replace(later);
        assert_eq!(receive::<Status>(&mut first).await.unwrap(), Some(later));
        let mut second = connect(&directory).await.unwrap();
        assert_eq!(receive::<Status>(&mut second).await.unwrap(), Some(later));
        assert_eq!(receive::<Status>(&mut first).await.unwrap(), None);
        send(&mut second, &OrderFrame { order: Some(Order::Cancel(true)) }).await.unwrap();
        assert_eq!(orders.recv().await, Some(Order::Cancel(true)));
    }

    #[tokio::test]
    async fn without_the_token_nothing_is_answered_and_nothing_is_obeyed() {
        let base = tempfile::tempdir().unwrap();
        let directory = base.path();
        let (orders_to, mut orders) = mpsc::channel(4);
        let (_status_to, status) = watch::channel(Status::default());
        tokio::spawn(serve(listen(directory).unwrap(), orders_to, status));
        let mut agent = connect(directory).await.unwrap();
        assert!(receive::<Status>(&mut agent).await.unwrap().is_some());

        let mut stranger = UnixStream::connect(directory.join(SOCKET)).await.unwrap();
        let kill = OrderFrame { order: Some(Order::Cancel(true)) };
        for _ in 0..20 {
            // It may be closed by then.
            let _ = send(&mut stranger, &kill).await;
        }
        let heard = receive::<Status>(&mut stranger).await;
        assert!(matches!(heard, Ok(None) | Err(_)), "{heard:?}");
        // The agent is still heard, and first.
        let cancel = OrderFrame { order: Some(Order::Cancel(false)) };
        send(&mut agent, &cancel).await.unwrap();
        assert_eq!(orders.recv().await, cancel.order);
    }
}
