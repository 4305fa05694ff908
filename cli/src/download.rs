//! Files that hold secrets, written from what a control plane streams.

use std::io::{self, Write};
use std::path::Path;

use secrecy::zeroize::Zeroizing;
use tonic::Streaming;

use crate::client::Client;
use crate::failure::Failure;

/// Writes the parts to a file that was not there; only its owner can read it. Written to a
/// temporary file first, so nothing is left of an answer that breaks off.
pub(crate) async fn to_new_file<T>(
    client: &Client,
    mut parts: Streaming<T>,
    data: impl Fn(T) -> Vec<u8>,
    path: &Path,
) -> Result<(), Failure> {
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        Some(_) | None => Path::new("."),
    };
    // A temporary file is born 0600, so the secrets of a state are never readable by others.
    let mut file = tempfile::NamedTempFile::new_in(directory).map_err(Failure::Output)?;
    while let Some(part) = parts.message().await.map_err(|status| client.failure(&status))? {
        file.write_all(&Zeroizing::new(data(part))).map_err(Failure::Output)?;
    }
    file.as_file().sync_all().map_err(Failure::Output)?;
    match file.persist_noclobber(path) {
        Ok(_) => Ok(()),
        Err(error) if error.error.kind() == io::ErrorKind::AlreadyExists => {
            Err(there_already(path))
        }
        Err(error) => Err(Failure::Output(error.error)),
    }
}

/// Refuses a file that is there before anything is asked for.
pub(crate) fn check_new(path: &Path) -> Result<(), Failure> {
    if path.symlink_metadata().is_ok() { Err(there_already(path)) } else { Ok(()) }
}

fn there_already(path: &Path) -> Failure {
    Failure::Usage {
        message: format!("{} is there already", path.display()),
        hint: "name a file that is not".into(),
    }
}
