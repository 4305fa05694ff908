//! The socket for commands on the host, in the data directory: whoever may read the data may use
//! it, nobody else can. That is so by the modes of directory and socket, and, should somebody have
//! opened these, by the user that the kernel says is calling: the control plane's own, or root.
//!
//! One line of JSON each way, then the end. The socket is reached through an open descriptor of
//! the data directory, since a socket's own path may have 107 bytes only.

use std::fs::{self, File, Permissions};
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::UnixListener;

use super::{Manifest, Source};
use crate::app::App;
use crate::app::break_glass::{Broken, Glass};
use crate::app::organizations::FirstOwner;
use crate::durable;

const NAME: &str = "host.sock";

/// The longest command.
const LONGEST: u64 = 64 * 1024;

#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "snake_case")]
enum Command {
    Backup {
        to: PathBuf,
    },
    /// Whether the data were proved to be an old copy.
    Alarm {
        clear: bool,
    },
    BreakGlass {
        organization: String,
        glass: Glass,
        reason: String,
    },
    /// Makes an organization.
    Organization {
        name: String,
        owner: FirstOwner,
    },
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Answer {
    Backup(Manifest),
    /// Who proved what, if an alarm was raised.
    Alarm(Option<String>),
    BrokeGlass(Broken),
    /// The token of an owner who was made for it.
    Organization(Option<Token>),
    /// Reads after "failed to".
    Failed(String),
}

/// A token on its way to the terminal of whoever commands the host.
#[derive(Serialize, Deserialize)]
#[serde(transparent)]
struct Token(String);

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Token([hidden])")
    }
}

/// Why the control plane that runs did not do it.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    #[error("ask the control plane that runs")]
    Io(#[source] io::Error),
    #[error("understand the control plane's answer")]
    Malformed(#[source] serde_json::Error),
    #[error("understand the control plane's answer: it is to another question")]
    Unexpected,
    #[error("{0}")]
    Refused(String),
}

/// Opens the socket. What a stopped control plane left is replaced: whoever calls this has the
/// database.
pub fn listen(data_dir: &Path) -> io::Result<UnixListener> {
    let path = data_dir.join(NAME);
    match fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        Ok(()) | Err(_) => {}
    }
    let directory = File::open(data_dir)?;
    let listener = UnixListener::bind(through(&directory))?;
    fs::set_permissions(&path, Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Serves one command after the other.
pub async fn serve(listener: UnixListener, app: Arc<App>, data_dir: PathBuf) {
    loop {
        let answered = match listener.accept().await {
            Ok((stream, _)) => answer(stream, &app, &data_dir).await,
            Err(error) => Err(error),
        };
        if let Err(error) = answered {
            tracing::warn!(error = %error, "a command on the host was not answered");
            // Not in a hurry, should accepting fail for lack of descriptors.
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        }
    }
}

async fn answer(
    mut stream: tokio::net::UnixStream,
    app: &Arc<App>,
    data_dir: &Path,
) -> io::Result<()> {
    let user = stream.peer_cred()?.uid();
    let (read, mut write) = stream.split();
    let mut line = String::new();
    let mut lines = tokio::io::BufReader::new(read.take(LONGEST));
    tokio::time::timeout(std::time::Duration::from_secs(10), lines.read_line(&mut line))
        .await
        .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "no command came"))??;
    if user != 0 && user != durable::own_user()? {
        tracing::warn!(user, "another user's command on the host was refused");
        let why = "command the host: only the control plane's own user may";
        return tell(&mut write, &Answer::Failed(why.to_owned())).await;
    }
    let answer = match serde_json::from_str(&line) {
        Ok(Command::Backup { to }) => backup(app, data_dir, to).await,
        Ok(Command::Alarm { clear }) => alarm(app, clear).await,
        Ok(Command::BreakGlass { organization, glass, reason }) => {
            match app.break_glass(&organization, &glass, &reason).await {
                Ok(broken) => Answer::BrokeGlass(broken),
                Err(error) => Answer::Failed(format!("break the glass: {error}")),
            }
        }
        Ok(Command::Organization { name, owner }) => organization(app, &name, owner).await,
        Err(error) => Answer::Failed(format!("understand the command: {error}")),
    };
    tell(&mut write, &answer).await
}

async fn tell(to: &mut (impl AsyncWrite + Unpin), answer: &Answer) -> io::Result<()> {
    let mut text = serde_json::to_vec(answer)?;
    text.push(b'\n');
    to.write_all(&text).await
}

/// Takes the backup on a thread of its own: most of it is work on files.
async fn backup(app: &Arc<App>, data_dir: &Path, to: PathBuf) -> Answer {
    let (app, data_dir) = (Arc::clone(app), data_dir.to_path_buf());
    let shown = to.clone();
    let taken = tokio::task::spawn_blocking(move || {
        let source = Source {
            data_dir: &data_dir,
            store: &*app.store,
            logs: &app.logs,
            blobs: Some(&app.blobs),
            master: &app.master,
        };
        tokio::runtime::Handle::current().block_on(super::take(source, &to, app.now()))
    });
    match taken.await {
        Ok(Ok(manifest)) => {
            tracing::info!(to = %shown.display(), records = manifest.records.count,
                files = manifest.files.count, version = manifest.version, "took a backup");
            Answer::Backup(manifest)
        }
        Ok(Err(error)) => {
            let error = format!("{:#}", anyhow::Error::from(error));
            tracing::warn!(to = %shown.display(), error, "took no backup");
            Answer::Failed(error)
        }
        Err(error) => Answer::Failed(format!("take the backup: {error}")),
    }
}

async fn alarm(app: &Arc<App>, clear: bool) -> Answer {
    let found = match clear {
        true => app.clear_alarm().await,
        false => app.alarm().await.map(|kept| kept.map(|kept| kept.value)),
    };
    match found {
        Ok(found) => Answer::Alarm(found.map(|proof| proof.to_string())),
        Err(error) => Answer::Failed(format!("read the alarm: {error}")),
    }
}

async fn organization(app: &Arc<App>, name: &str, owner: FirstOwner) -> Answer {
    match app.create_organization(name, owner).await {
        Ok(token) => {
            tracing::info!(organization = name, "the host made an organization");
            let token = token.map(|token| Token(token.expose_secret().to_owned()));
            Answer::Organization(token)
        }
        Err(error) => Answer::Failed(format!("make the organization: {error}")),
    }
}

/// Asks the control plane that runs on these data for a backup; answers nothing when none runs.
pub fn ask_backup(data_dir: &Path, to: &Path) -> Result<Option<Manifest>, AskError> {
    match ask(data_dir, &Command::Backup { to: to.to_path_buf() })? {
        None => Ok(None),
        Some(Answer::Backup(manifest)) => Ok(Some(manifest)),
        Some(Answer::Failed(why)) => Err(AskError::Refused(why)),
        Some(Answer::Alarm(_) | Answer::BrokeGlass(_) | Answer::Organization(_)) => {
            Err(AskError::Unexpected)
        }
    }
}

/// Asks the control plane that runs on these data for its alarm; answers nothing when none runs.
pub fn ask_alarm(data_dir: &Path, clear: bool) -> Result<Option<Option<String>>, AskError> {
    match ask(data_dir, &Command::Alarm { clear })? {
        None => Ok(None),
        Some(Answer::Alarm(found)) => Ok(Some(found)),
        Some(Answer::Failed(why)) => Err(AskError::Refused(why)),
        Some(Answer::Backup(_) | Answer::BrokeGlass(_) | Answer::Organization(_)) => {
            Err(AskError::Unexpected)
        }
    }
}

/// Asks the control plane that runs on these data to break the glass; answers nothing when none
/// runs.
pub fn ask_break_glass(
    data_dir: &Path,
    organization: String,
    glass: Glass,
    reason: String,
) -> Result<Option<Broken>, AskError> {
    match ask(data_dir, &Command::BreakGlass { organization, glass, reason })? {
        None => Ok(None),
        Some(Answer::BrokeGlass(broken)) => Ok(Some(broken)),
        Some(Answer::Failed(why)) => Err(AskError::Refused(why)),
        Some(Answer::Backup(_) | Answer::Alarm(_) | Answer::Organization(_)) => {
            Err(AskError::Unexpected)
        }
    }
}

/// Asks the control plane that runs on these data for an organization, and answers the token of
/// an owner who is new; answers nothing when none runs.
pub fn ask_organization(
    data_dir: &Path,
    name: String,
    owner: FirstOwner,
) -> Result<Option<Option<SecretString>>, AskError> {
    match ask(data_dir, &Command::Organization { name, owner })? {
        None => Ok(None),
        Some(Answer::Organization(token)) => Ok(Some(token.map(|token| token.0.into()))),
        Some(Answer::Failed(why)) => Err(AskError::Refused(why)),
        Some(Answer::Backup(_) | Answer::Alarm(_) | Answer::BrokeGlass(_)) => {
            Err(AskError::Unexpected)
        }
    }
}

fn ask(data_dir: &Path, command: &Command) -> Result<Option<Answer>, AskError> {
    let connected = File::open(data_dir).and_then(|directory| {
        let stream = UnixStream::connect(through(&directory))?;
        Ok((directory, stream))
    });
    let mut stream = match connected {
        Ok((_, stream)) => stream,
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
            ) =>
        {
            return Ok(None);
        }
        Err(error) => return Err(AskError::Io(error)),
    };
    let mut text = serde_json::to_vec(command).map_err(AskError::Malformed)?;
    text.push(b'\n');
    stream.write_all(&text).map_err(AskError::Io)?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).map_err(AskError::Io)?;
    if line.is_empty() {
        let error = io::Error::new(io::ErrorKind::UnexpectedEof, "it stopped before it was done");
        return Err(AskError::Io(error));
    }
    serde_json::from_str(&line).map(Some).map_err(AskError::Malformed)
}

fn through(directory: &File) -> PathBuf {
    Path::new("/proc/self/fd").join(directory.as_raw_fd().to_string()).join(NAME)
}
