//! Notices on their way out: to webhooks by HTTP, to people by mail.
//!
//! ```text
//! transition ──same commit──► outbox ──► worker ──claim, send, settle──► webhook | mail
//! ```
//!
//! What to tell and whom is decided where a run moves, in one commit with the move
//! ([`crate::app::notices`]). Here is what follows: [`worker`] takes what is due from the outbox,
//! [`webhook`] and [`mail`] carry it. A delivery is attempted again, for a day, until it is
//! accepted, so it may arrive more than once, with the same id.
//!
//! The control plane connects to addresses that its tenants name. [`network`] says which it may:
//! public ones, and what the operator listed. The address that was checked is the one that is
//! connected to.

pub mod mail;
pub mod network;
pub mod options;
mod schedule;
pub mod webhook;
pub mod worker;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use rustls::{ClientConfig, RootCertStore};

use self::mail::Mailer;
use self::network::Networks;

/// How attempts are spread over time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pace {
    /// The longest wait after the first attempt; doubled by each.
    pub first: Duration,
    pub longest: Duration,
    /// How long a notice is worth delivering.
    pub life: Duration,
}

impl Pace {
    pub const USUAL: Pace = Pace {
        first: Duration::from_secs(10),
        longest: Duration::from_secs(3600),
        life: Duration::from_secs(24 * 3600),
    };

    /// Returns the wait after an attempt: anything up to the bound ("full jitter"), so that
    /// notices that failed together do not come back together. `chance` is evenly spread.
    pub fn wait(&self, attempts: u32, chance: u32) -> Duration {
        let doublings = attempts.saturating_sub(1).min(20);
        let bound = self.first.saturating_mul(1 << doublings).min(self.longest);
        bound.mul_f64(f64::from(chance) / f64::from(u32::MAX))
    }
}

impl Default for Pace {
    fn default() -> Self {
        Self::USUAL
    }
}

/// What deliveries go out through.
pub struct Outbound {
    /// Addresses that webhooks may go to besides public ones.
    pub networks: Networks,
    /// What webhooks' certificates are checked by.
    pub tls: Arc<ClientConfig>,
    /// Absent where the operator configured no server.
    pub mailer: Option<Mailer>,
    /// Where people reach the web pages, without a slash at the end.
    pub public_url: Option<String>,
    pub pace: Pace,
}

impl fmt::Debug for Outbound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Outbound").field("networks", &self.networks).finish_non_exhaustive()
    }
}

impl Outbound {
    /// Prepares what the operator configured, with the host's own certificates as roots besides
    /// what the operator trusts.
    pub fn open(options: &options::Options) -> Result<Self, options::Error> {
        let mut roots = RootCertStore::empty();
        // Some of a host's certificates may be beyond this library; the others serve.
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        roots.add_parsable_certificates(options.authorities.iter().cloned());
        let tls = tls(roots);
        let mailer = options.mail.as_ref().map(|mail| Mailer::open(mail, tls.clone()));
        Ok(Self {
            networks: options.networks.clone(),
            mailer: mailer.transpose()?,
            tls: Arc::new(tls),
            public_url: options.public_url.clone(),
            pace: options.pace,
        })
    }

    /// Reaches public addresses over TLS, by no root at all, and sends no mail: for tests.
    pub fn closed() -> Self {
        Self {
            networks: Networks::default(),
            tls: Arc::new(tls(RootCertStore::empty())),
            mailer: None,
            public_url: None,
            pace: Pace::USUAL,
        }
    }
}

/// Makes the client's side of TLS, with the one provider whether it is installed or not.
pub(crate) fn tls(roots: RootCertStore) -> ClientConfig {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("the provider has the ciphers of both versions")
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    config
}

/// What became of an attempt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attempt {
    pub accepted: bool,
    /// Of HTTP or SMTP; absent when there was no answer.
    pub status: Option<u16>,
    pub detail: String,
}

/// The most that is kept of an answer.
pub const DETAIL: usize = 200;

impl Attempt {
    pub(crate) fn failed(detail: impl AsRef<str>) -> Self {
        Self { accepted: false, status: None, detail: short(detail.as_ref()) }
    }
}

/// Cuts what others said to what is kept, in one line of visible characters.
pub(crate) fn short(text: &str) -> String {
    let visible = text.chars().map(|c| if c.is_control() { ' ' } else { c });
    let mut kept = String::new();
    for c in visible {
        if kept.len() + c.len_utf8() > DETAIL {
            break;
        }
        kept.push(c);
    }
    kept.trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_an_hour_and_may_be_anything_below() {
        let pace = Pace::USUAL;
        assert_eq!(pace.wait(1, u32::MAX), Duration::from_secs(10));
        assert_eq!(pace.wait(3, u32::MAX), Duration::from_secs(40));
        assert_eq!(pace.wait(9, u32::MAX), Duration::from_secs(2560));
        assert_eq!(pace.wait(400, u32::MAX), Duration::from_secs(3600));
        assert_eq!(pace.wait(400, 0), Duration::ZERO);
    }

    #[test]
    fn what_others_say_is_cut_and_harmless() {
        assert_eq!(short("a\r\nb\u{1b}[2J"), "a  b [2J");
        assert!(short(&"ü".repeat(300)).len() <= DETAIL);
    }
}
