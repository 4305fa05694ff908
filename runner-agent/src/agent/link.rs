//! The agent's end of a supervisor: starting one, attaching to one, noticing its death.

use std::env;
use std::ffi::OsString;
use std::fs::OpenOptions;
use std::io;
use std::mem::discriminant;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{ChildStdout, Command};
use tokio::sync::watch;

use super::mailbox::{self, Kinds, mailbox};
use crate::Program;
use crate::job_directory::{self, JobDirectory};
use crate::supervisor::READY;
use crate::supervisor::control::{self, Order, OrderFrame, Status};

const PATIENCE: Duration = Duration::from_secs(20);

const FAREWELL: Duration = Duration::from_secs(5);

#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("start a supervisor")]
    Start(#[source] io::Error),
    #[error("attach to the supervisor")]
    Attach(#[source] io::Error),
    #[error(transparent)]
    Directory(#[from] job_directory::Error),
    #[error("attach to the supervisor: it did not answer in time")]
    Silent,
    /// It is of a program that this one does not understand, and is left alone: its result will
    /// be found on disk.
    #[error("attach to the supervisor: it speaks protocol {0}, which this program does not")]
    Protocol(u32),
}

/// A supervisor that has been started and may not listen yet.
pub(crate) struct Started {
    stdout: ChildStdout,
}

/// An attached supervisor. When it or the connection ends, `status` closes.
pub(crate) struct Link {
    orders: mailbox::Sender<Order>,
    pub(crate) status: watch::Receiver<Status>,
}

/// What a supervisor gets of our environment besides what jobs get.
const OWN: &[&str] = &["PATH", "HOME", "LATCHKEY_RUNNER_LOG"];

/// Starts a supervisor. Nothing here ends it with us: it makes a session of its own.
pub(crate) fn start(program: &Program, directory: &JobDirectory) -> Result<Started, Error> {
    let passed = directory.settings()?.pass_env;
    let passed = OWN.iter().copied().chain(passed.iter().map(String::as_str));
    let environment: Vec<(&str, OsString)> =
        passed.filter_map(|name| Some((name, env::var_os(name)?))).collect();
    let complaints = OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(directory.join("supervisor.log"))
        .map_err(Error::Start)?;
    let mut child = Command::new(&program.exe)
        .args(&program.prefix)
        .arg("supervise")
        .arg(directory.path())
        // It serves the jobs of others: what else we were given is not for it.
        .env_clear()
        .envs(environment)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(complaints)
        .spawn()
        .map_err(Error::Start)?;
    let stdout =
        child.stdout.take().ok_or_else(|| Error::Start(io::ErrorKind::BrokenPipe.into()))?;
    Ok(Started { stdout })
}

impl Started {
    /// Waits until it listens, and attaches.
    pub(crate) async fn attach(self, directory: &Path) -> Result<Link, Error> {
        let ready = async {
            let mut lines = BufReader::new(self.stdout).lines();
            while let Some(line) = lines.next_line().await.map_err(Error::Start)? {
                if line.ends_with(READY) {
                    return Ok(());
                }
            }
            Err(Error::Start(io::ErrorKind::UnexpectedEof.into()))
        };
        tokio::time::timeout(PATIENCE, ready).await.map_err(|_| Error::Silent)??;
        attach(directory).await
    }
}

/// Attaches to a supervisor that lives.
pub(crate) async fn attach(directory: &Path) -> Result<Link, Error> {
    let stream = control::connect(directory).await.map_err(Error::Attach)?;
    let (mut from, mut to) = stream.into_split();
    let first = tokio::time::timeout(PATIENCE, control::receive::<Status>(&mut from));
    let first = match first.await {
        Ok(Ok(Some(status))) if !status.is_understood() => {
            return Err(Error::Protocol(status.protocol));
        }
        Ok(Ok(Some(status))) => status,
        Ok(Ok(None)) => return Err(Error::Attach(io::ErrorKind::UnexpectedEof.into())),
        Ok(Err(error)) => return Err(Error::Attach(error)),
        Err(_) => return Err(Error::Silent),
    };
    let (status_to, status) = watch::channel(first);
    let (orders, mut inbox) = mailbox::<Order>();
    tokio::spawn(async move {
        let read = async {
            while let Ok(Some(status)) = control::receive::<Status>(&mut from).await {
                status_to.send_replace(status);
            }
        };
        let write = async {
            loop {
                let frame = OrderFrame { order: Some(inbox.next().await) };
                if control::send(&mut to, &frame).await.is_err() {
                    break;
                }
            }
            // The reading side learns of the end, and tells what came before it.
            std::future::pending::<()>().await;
        };
        tokio::select! {
            () = read => {}
            () = write => {}
        }
    });
    Ok(Link { orders, status })
}

impl Link {
    /// Passes an order on. One that cannot be passed any more shows as a closed status.
    pub(crate) fn send(&self, order: Order) {
        self.orders.send(order);
    }

    /// Sends a supervisor away that has nothing to do yet, and waits until it is gone.
    pub(crate) async fn dismiss(mut self) {
        self.send(Order::GiveUp(true));
        let gone = async { while self.status.changed().await.is_ok() {} };
        if tokio::time::timeout(FAREWELL, gone).await.is_err() {
            tracing::warn!("a supervisor that was sent away is still there");
        }
    }
}

impl Kinds for Order {
    fn replaces(&self, earlier: &Self) -> bool {
        match (self, earlier) {
            (Self::Cancel(force), Self::Cancel(earlier)) => force == earlier,
            (order, earlier) => discriminant(order) == discriminant(earlier),
        }
    }
}
