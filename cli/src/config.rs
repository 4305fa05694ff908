//! The credentials file: where the control plane is, whom to trust, and the token. Readable by
//! its owner alone, replaced as a whole.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use etcetera::{AppStrategy, AppStrategyArgs, choose_app_strategy};
use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Serialize};

#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("not signed in: there is no {}", .path.display())]
    SignedOut { path: PathBuf },
    #[error("find the home directory")]
    Home(#[source] etcetera::HomeDirError),
    #[error("trust {}: others than its owner can read or write it", .path.display())]
    Open { path: PathBuf },
    #[error("read {}", .path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("understand {}", .path.display())]
    Parse { path: PathBuf, source: serde_json::Error },
    #[error("write {}", .path.display())]
    Write { path: PathBuf, source: io::Error },
}

impl Error {
    pub(crate) fn hint(&self) -> Option<String> {
        match self {
            Error::SignedOut { .. } => Some("sign in with `latchkey login ADDRESS`".into()),
            Error::Open { path } => Some(format!("`chmod 600 {}`", path.display())),
            Error::Home(_) => Some("name the file with --config or LATCHKEY_CONFIG".into()),
            Error::Parse { .. } => Some("sign in again with `latchkey login ADDRESS`".into()),
            Error::Read { .. } | Error::Write { .. } => None,
        }
    }
}

/// What `login` learned.
#[derive(Debug)]
pub(crate) struct Credentials {
    pub(crate) address: String,
    /// The only root that is trusted; the platform's when absent.
    pub(crate) ca_pem: Option<String>,
    pub(crate) token: SecretString,
    pub(crate) organization: Option<String>,
    /// Allows `http://` to loopback.
    pub(crate) insecure_plaintext: bool,
}

/// The file's own shape. It has no `Debug`, since it holds the token in clear.
#[derive(Serialize, Deserialize)]
struct Stored {
    address: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    ca_pem: Option<String>,
    token: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    organization: Option<String>,
    #[serde(default)]
    insecure_plaintext: bool,
}

/// Returns the file to use: the one that was named, else the one in the configuration directory.
pub(crate) fn path(named: Option<PathBuf>) -> Result<PathBuf, Error> {
    if let Some(named) = named {
        return Ok(named);
    }
    let strategy = choose_app_strategy(AppStrategyArgs {
        top_level_domain: "dev".into(),
        author: "latchkey".into(),
        app_name: "latchkey".into(),
    })
    .map_err(Error::Home)?;
    Ok(strategy.in_config_dir("credentials.json"))
}

pub(crate) fn load(path: &Path) -> Result<Credentials, Error> {
    let failed = |source| Error::Read { path: path.to_owned(), source };
    let mut file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(Error::SignedOut { path: path.to_owned() });
        }
        Err(error) => return Err(failed(error)),
    };
    if file.metadata().map_err(failed)?.mode() & 0o077 != 0 {
        return Err(Error::Open { path: path.to_owned() });
    }
    let mut text = String::new();
    file.read_to_string(&mut text).map_err(failed)?;
    let stored: Stored = serde_json::from_str(&text)
        .map_err(|source| Error::Parse { path: path.to_owned(), source })?;
    Ok(Credentials {
        address: stored.address,
        ca_pem: stored.ca_pem,
        token: stored.token.into(),
        organization: stored.organization,
        insecure_plaintext: stored.insecure_plaintext,
    })
}

pub(crate) fn save(path: &Path, credentials: &Credentials) -> Result<(), Error> {
    let stored = Stored {
        address: credentials.address.clone(),
        ca_pem: credentials.ca_pem.clone(),
        token: credentials.token.expose_secret().to_owned(),
        organization: credentials.organization.clone(),
        insecure_plaintext: credentials.insecure_plaintext,
    };
    write_whole(path, &stored).map_err(|source| Error::Write { path: path.to_owned(), source })
}

/// Removes the file. Tells whether there was one.
pub(crate) fn remove(path: &Path) -> Result<bool, Error> {
    match fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(source) => Err(Error::Write { path: path.to_owned(), source }),
    }
}

fn write_whole(path: &Path, stored: &Stored) -> io::Result<()> {
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        Some(_) | None => Path::new("."),
    };
    fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
    // A temporary file is born 0600, so the token is never readable by others.
    let mut file = tempfile::NamedTempFile::new_in(directory)?;
    serde_json::to_writer_pretty(&mut file, stored)?;
    file.write_all(b"\n")?;
    file.as_file().sync_all()?;
    file.persist(path).map_err(|error| error.error)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn credentials() -> Credentials {
        Credentials {
            address: "https://127.0.0.1:1".into(),
            ca_pem: Some("pem".into()),
            token: "lku_canary".into(),
            organization: Some("acme".into()),
            insecure_plaintext: false,
        }
    }

    #[test]
    fn what_was_saved_is_loaded_and_only_ours_to_read() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("deep/credentials.json");
        save(&path, &credentials()).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        let loaded = load(&path).unwrap();
        assert_eq!(loaded.token.expose_secret(), "lku_canary");
        assert_eq!(loaded.organization.as_deref(), Some("acme"));
        assert!(!format!("{loaded:?}").contains("canary"));
    }

    #[test]
    fn a_file_that_others_can_read_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("credentials.json");
        save(&path, &credentials()).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        assert!(matches!(load(&path), Err(Error::Open { .. })));
    }

    #[test]
    fn no_file_means_signed_out() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("none");
        assert!(matches!(load(&path), Err(Error::SignedOut { .. })));
        assert!(!remove(&path).unwrap());
    }
}
