//! A TCP proxy between two programs, for what networks do: cut, stall, delay, trickle.
//!
//! It listens on one port for its whole life, so that whoever dials it comes back to it. What it
//! does to bytes it does to those of all its connections, from the moment it is told.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Context;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};

const PIECE: usize = 16 * 1024;

/// What happens to bytes in one direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flow {
    Open,
    /// Nothing passes, and nobody is told: the connection is half open.
    Stalled,
    /// Each piece waits.
    Delayed(Duration),
    /// A few bytes at a time, with a pause after each.
    Trickle {
        bytes: usize,
        pause: Duration,
    },
}

/// What the network does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Network {
    /// From those who dial, and back to them.
    Up { there: Flow, back: Flow },
    /// Connections are ended and none is made.
    Cut,
}

impl Network {
    /// As it should be.
    pub const FINE: Self = Self::Up { there: Flow::Open, back: Flow::Open };
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Direction {
    There,
    Back,
}

/// A running proxy; dropping it ends its connections.
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    network: watch::Sender<Network>,
    target: watch::Sender<SocketAddr>,
    serving: JoinHandle<()>,
}

impl Proxy {
    /// Listens on a free port of loopback and passes on to `target`.
    pub async fn start(target: SocketAddr) -> anyhow::Result<Self> {
        let listener = TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0)))
            .await
            .context("failed to listen as a proxy")?;
        let address = listener.local_addr().context("failed to learn the proxy's port")?;
        let (network, told) = watch::channel(Network::FINE);
        let (to, target) = watch::channel(target);
        let serving = tokio::spawn(serve(listener, target, told));
        Ok(Self { address, network, target: to, serving })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Changes what the network does.
    pub fn set(&self, network: Network) {
        self.network.send_replace(network);
    }

    /// Connects those who come from now on with another.
    pub fn redirect(&self, target: SocketAddr) {
        self.target.send_replace(target);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

async fn serve(
    listener: TcpListener,
    target: watch::Receiver<SocketAddr>,
    network: watch::Receiver<Network>,
) {
    // With this task, all its connections end.
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = connections.join_next() => continue,
        };
        let Ok((near, _)) = accepted else { continue };
        let (target, network) = (*target.borrow(), network.clone());
        connections.spawn(async move {
            // Its end is known to both sides, and to nobody else.
            let _ = connect(near, target, network).await;
        });
    }
}

async fn connect(
    near: TcpStream,
    target: SocketAddr,
    mut network: watch::Receiver<Network>,
) -> std::io::Result<()> {
    if *network.borrow() == Network::Cut {
        return Ok(());
    }
    let far = TcpStream::connect(target).await?;
    near.set_nodelay(true)?;
    far.set_nodelay(true)?;
    let ((near_from, near_to), (far_from, far_to)) = (near.into_split(), far.into_split());
    let there = pass(near_from, far_to, Direction::There, network.clone());
    let back = pass(far_from, near_to, Direction::Back, network.clone());
    tokio::select! {
        _ = async { tokio::join!(there, back) } => {}
        _ = network.wait_for(|network| *network == Network::Cut) => {}
    }
    Ok(())
}

async fn pass(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    direction: Direction,
    mut network: watch::Receiver<Network>,
) -> std::io::Result<()> {
    let mut piece = vec![0; PIECE];
    loop {
        let length = from.read(&mut piece).await?;
        if length == 0 {
            return to.shutdown().await;
        }
        let mut rest = &piece[..length];
        while !rest.is_empty() {
            let stalled = |network: &Network| flow(network, direction) == Flow::Stalled;
            if network.wait_for(|network| !stalled(network)).await.is_err() {
                return Ok(());
            }
            let now = flow(&network.borrow(), direction);
            let (count, pause) = match now {
                Flow::Open | Flow::Stalled => (rest.len(), Duration::ZERO),
                Flow::Delayed(by) => {
                    tokio::time::sleep(by).await;
                    (rest.len(), Duration::ZERO)
                }
                Flow::Trickle { bytes, pause } => (bytes.clamp(1, rest.len()), pause),
            };
            to.write_all(&rest[..count]).await?;
            rest = &rest[count..];
            if !pause.is_zero() {
                tokio::time::sleep(pause).await;
            }
        }
    }
}

fn flow(network: &Network, direction: Direction) -> Flow {
    match (network, direction) {
        (Network::Up { there, .. }, Direction::There) => *there,
        (Network::Up { back, .. }, Direction::Back) => *back,
        // The connection is being ended.
        (Network::Cut, Direction::There | Direction::Back) => Flow::Stalled,
    }
}

/// Echoes and proxies, for this file's tests.
#[cfg(test)]
mod tests {
    use super::*;

    async fn echo() -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                tokio::spawn(async move {
                    let (mut from, mut to) = stream.split();
                    let _ = tokio::io::copy(&mut from, &mut to).await;
                });
            }
        });
        address
    }

    #[tokio::test]
    async fn a_stall_holds_bytes_back_and_a_cut_ends_the_connection() {
        let proxy = Proxy::start(echo().await).await.unwrap();
        let mut stream = TcpStream::connect(proxy.address()).await.unwrap();
        let mut answer = [0; 4];
        stream.write_all(b"ping").await.unwrap();
        stream.read_exact(&mut answer).await.unwrap();
        proxy.set(Network::Up { there: Flow::Open, back: Flow::Stalled });
        stream.write_all(b"pong").await.unwrap();
        let waited = Duration::from_millis(50);
        assert!(tokio::time::timeout(waited, stream.read_exact(&mut answer)).await.is_err());
        proxy.set(Network::FINE);
        stream.read_exact(&mut answer).await.unwrap();
        assert_eq!(&answer, b"pong");
        proxy.set(Network::Cut);
        assert_eq!(stream.read(&mut answer).await.unwrap_or(0), 0);
    }
}
