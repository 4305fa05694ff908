//! What every command is given: where to write, whom to ask, and how to reach the control plane
//! as the person who signed in.

use std::path::PathBuf;

use secrecy::ExposeSecret;

use crate::client::{Client, Target};
use crate::config::{self, Credentials};
use crate::failure::Failure;
use crate::input::Input;
use crate::output::Output;

/// How tokens begin that a password opened.
const SIGN_IN: &str = "lki_";

pub(crate) struct Context {
    pub(crate) output: Output,
    pub(crate) input: Input,
    /// As named by flag or environment.
    pub(crate) config: Option<PathBuf>,
    pub(crate) organization: Option<String>,
}

/// A connection as somebody.
pub(crate) struct Session {
    pub(crate) client: Client,
    pub(crate) address: String,
    /// Whether a password opened it, rather than a token that an owner handed over.
    pub(crate) is_sign_in: bool,
    organization: Option<String>,
}

impl Context {
    pub(crate) fn config_path(&self) -> Result<PathBuf, Failure> {
        Ok(config::path(self.config.clone())?)
    }

    /// Prepares a connection with the stored credentials.
    pub(crate) fn session(&self) -> Result<Session, Failure> {
        let stored = config::load(&self.config_path()?)?;
        let client = connect(&stored)?;
        let organization = self.organization.clone().or(stored.organization);
        let is_sign_in = stored.token.expose_secret().starts_with(SIGN_IN);
        Ok(Session { client, address: stored.address, is_sign_in, organization })
    }
}

impl Session {
    /// Returns the organization to work in.
    pub(crate) fn organization(&self) -> Result<String, Failure> {
        self.organization.clone().ok_or_else(|| Failure::Usage {
            message: "no organization is named and none is the default".into(),
            hint: "add --organization NAME, or sign in again with it".into(),
        })
    }

    pub(crate) fn default_organization(&self) -> Option<&str> {
        self.organization.as_deref()
    }
}

fn connect(stored: &Credentials) -> Result<Client, Failure> {
    let target = Target {
        address: stored.address.clone(),
        ca_pem: stored.ca_pem.clone(),
        insecure_plaintext: stored.insecure_plaintext,
    };
    Client::new(&target, Some(&stored.token))
}
