//! What an operator says about notices: where webhooks may go, and which server takes mail.

use std::fs;
use std::io;
use std::net::IpAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::ValueEnum;
use lettre::message::Mailbox;
use rustls::RootCertStore;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use secrecy::SecretString;
use zeroize::Zeroizing;

use super::network::{Network, Networks};
use super::{Pace, mail};

/// Flags about notices.
#[derive(Clone, Debug, Default, clap::Args)]
#[group(id = "notices")]
pub struct Args {
    /// Network that webhooks may go to although it is not public, such as 10.0.0.0/8; may be
    /// repeated. With a loopback network, webhooks on it may use plain http
    #[arg(
        long = "webhook-network",
        env = "LATCHKEY_WEBHOOK_NETWORKS",
        value_delimiter = ',',
        value_name = "CIDR"
    )]
    webhook_networks: Vec<Network>,
    /// Where people reach the web pages, for links in notices
    #[arg(long, env = "LATCHKEY_PUBLIC_URL", value_name = "URL")]
    public_url: Option<String>,
    /// File with certificates (PEM) of authorities that webhooks and the mail server may be
    /// certified by, besides those that this host trusts
    #[arg(long, env = "LATCHKEY_NOTICE_CA", value_name = "FILE")]
    notice_ca: Option<PathBuf>,
    /// Seconds within which a notice that was not taken is sent again: 1 to 3600. The wait may be
    /// twice as long after each attempt, up to an hour, for a day
    #[arg(long, env = "LATCHKEY_NOTICE_RETRY", value_name = "SECONDS", default_value_t = 10)]
    notice_retry: u64,
    /// Server that takes mail for people; without it there is none. The port is 587 if absent, or
    /// 465 with `--smtp-tls implicit`
    #[arg(long, env = "LATCHKEY_SMTP_SERVER", value_name = "HOST[:PORT]", requires = "smtp_from")]
    smtp_server: Option<String>,
    /// Address that mail comes from
    #[arg(long, env = "LATCHKEY_SMTP_FROM", value_name = "ADDRESS", requires = "smtp_server")]
    smtp_from: Option<String>,
    /// How the connection to the server is protected; `none` is for loopback only
    #[arg(long, env = "LATCHKEY_SMTP_TLS", value_enum, default_value_t, value_name = "MODE")]
    smtp_tls: SmtpTls,
    /// File with the user and the password for the server, one a line; only its owner may read it
    #[arg(
        long,
        env = "LATCHKEY_SMTP_CREDENTIALS_FILE",
        value_name = "FILE",
        requires = "smtp_server"
    )]
    smtp_credentials_file: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum SmtpTls {
    /// Plain at first, then TLS before anything is said
    #[default]
    Starttls,
    /// TLS from the first byte
    Implicit,
    /// None
    None,
}

/// Notices as they can be started.
#[derive(Clone, Debug, Default)]
pub struct Options {
    pub networks: Networks,
    pub public_url: Option<String>,
    /// Authorities to trust besides the host's own.
    pub authorities: Vec<CertificateDer<'static>>,
    pub pace: Pace,
    pub mail: Option<MailOptions>,
}

#[derive(Clone, Debug)]
pub struct MailOptions {
    pub host: String,
    pub port: u16,
    pub tls: SmtpTls,
    pub from: Mailbox,
    pub credentials: Option<(String, SecretString)>,
}

/// Why notices cannot be started.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("--public-url is an http:// or https:// URL")]
    PublicUrl,
    #[error("--notice-retry is 1 to 3600 seconds")]
    Retry,
    #[error("use the file of --notice-ca, {path}: it holds no certificates in PEM")]
    NoAuthority { path: PathBuf },
    #[error("read the file of --notice-ca, {path}")]
    Authority {
        path: PathBuf,
        #[source]
        source: rustls_pki_types::pem::Error,
    },
    #[error("trust a certificate of --notice-ca, {path}")]
    Untrustworthy {
        path: PathBuf,
        #[source]
        source: rustls::Error,
    },
    #[error("--smtp-server is HOST or HOST:PORT")]
    Server,
    #[error("--smtp-from is one plain address, such as latchkey@example.com")]
    From,
    #[error("--smtp-tls none is for a server on a loopback address only")]
    PlaintextBeyondLoopback,
    #[error("read the file of --smtp-credentials-file, {path}")]
    Credentials {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("use {path}: only its owner may read it, and it holds two lines, user and password")]
    CredentialsForm { path: PathBuf },
}

impl TryFrom<Args> for Options {
    type Error = Error;

    fn try_from(args: Args) -> Result<Self, Error> {
        let public_url = args.public_url.map(|url| url.trim_end_matches('/').to_owned());
        let is_url = |url: &String| {
            let uri = url.parse::<http::Uri>().ok();
            uri.is_some_and(|uri| matches!(uri.scheme_str(), Some("http" | "https")))
        };
        if !public_url.as_ref().is_none_or(is_url) {
            return Err(Error::PublicUrl);
        }
        if !(1..=3600).contains(&args.notice_retry) {
            return Err(Error::Retry);
        }
        let pace = Pace { first: Duration::from_secs(args.notice_retry), ..Pace::USUAL };
        let authorities = args.notice_ca.as_deref().map(authorities).transpose()?;
        let authorities = authorities.unwrap_or_default();
        let mail = match (args.smtp_server, args.smtp_from) {
            (Some(server), Some(from)) => {
                let (host, port) = server_of(&server, args.smtp_tls)?;
                let loopback = host == "localhost"
                    || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback());
                if args.smtp_tls == SmtpTls::None && !loopback {
                    return Err(Error::PlaintextBeyondLoopback);
                }
                let from = mail::address(&from).ok_or(Error::From)?;
                let credentials =
                    args.smtp_credentials_file.as_deref().map(credentials).transpose()?;
                let from = Mailbox::new(Some("Latchkey".into()), from);
                Some(MailOptions { host, port, tls: args.smtp_tls, from, credentials })
            }
            // clap lets neither stand alone.
            (Some(_) | None, _) => None,
        };
        let networks = Networks(args.webhook_networks);
        Ok(Self { networks, public_url, authorities, pace, mail })
    }
}

fn server_of(server: &str, tls: SmtpTls) -> Result<(String, u16), Error> {
    let usual = if tls == SmtpTls::Implicit { 465 } else { 587 };
    let authority: http::uri::Authority = server.parse().map_err(|_| Error::Server)?;
    let host = authority.host().trim_matches(['[', ']']).to_owned();
    if host.is_empty() || server.contains('@') {
        return Err(Error::Server);
    }
    Ok((host, authority.port_u16().unwrap_or(usual)))
}

/// Reads certificates, each of which can be trusted.
fn authorities(path: &Path) -> Result<Vec<CertificateDer<'static>>, Error> {
    let unreadable = |source| Error::Authority { path: path.to_owned(), source };
    let found = CertificateDer::pem_file_iter(path).map_err(unreadable)?;
    let found: Vec<_> = found.collect::<Result<_, _>>().map_err(unreadable)?;
    if found.is_empty() {
        return Err(Error::NoAuthority { path: path.to_owned() });
    }
    let mut roots = RootCertStore::empty();
    for certificate in &found {
        let untrustworthy = |source| Error::Untrustworthy { path: path.to_owned(), source };
        roots.add(certificate.clone()).map_err(untrustworthy)?;
    }
    Ok(found)
}

fn credentials(path: &Path) -> Result<(String, SecretString), Error> {
    let failed = |source| Error::Credentials { path: path.to_owned(), source };
    let malformed = || Error::CredentialsForm { path: path.to_owned() };
    let mode = fs::metadata(path).map_err(failed)?.permissions().mode();
    let text = Zeroizing::new(fs::read_to_string(path).map_err(failed)?);
    let mut lines = text.lines();
    match (lines.next(), lines.next(), lines.next()) {
        (Some(user), Some(password), None) if mode & 0o077 == 0 && !user.is_empty() => {
            Ok((user.to_owned(), SecretString::from(password)))
        }
        _ => Err(malformed()),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Program {
        #[command(flatten)]
        args: Args,
    }

    fn options(args: &[&str]) -> Result<Options, Error> {
        let args = ["latchkey-control-plane"].iter().chain(args);
        Options::try_from(Program::try_parse_from(args).unwrap().args)
    }

    #[test]
    fn mail_is_protected_but_on_loopback() {
        let from = ["--smtp-from", "latchkey@example.com", "--smtp-server"];
        let with = |more: &[&'static str]| options(&[&from[..], more].concat());
        let mail = with(&["mail.example.com"]).unwrap().mail.unwrap();
        assert_eq!(
            (mail.host.as_str(), mail.port, mail.tls),
            ("mail.example.com", 587, SmtpTls::Starttls)
        );
        let mail = with(&["[::1]:2525", "--smtp-tls", "none"]).unwrap().mail.unwrap();
        assert_eq!((mail.host.as_str(), mail.port), ("::1", 2525));
        let beyond = with(&["mail.example.com", "--smtp-tls", "none"]).unwrap_err();
        assert!(matches!(beyond, Error::PlaintextBeyondLoopback));
        assert!(matches!(with(&["a@b"]).unwrap_err(), Error::Server));
        let bad = options(&["--smtp-server", "m", "--smtp-from", "a\r\nb@example.com"]);
        assert!(matches!(bad.unwrap_err(), Error::From));
    }

    #[test]
    fn authorities_are_certificates_that_can_be_trusted() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("ca.pem");
        let read = || options(&["--notice-ca", path.to_str().unwrap()]);
        assert!(matches!(read().unwrap_err(), Error::Authority { .. }));
        let own = rcgen::generate_simple_self_signed(["ca".to_owned()]).unwrap();
        let pem = own.cert.pem();
        fs::write(&path, own.signing_key.serialize_pem()).unwrap();
        assert!(matches!(read().unwrap_err(), Error::NoAuthority { .. }));
        fs::write(&path, "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n").unwrap();
        assert!(matches!(read().unwrap_err(), Error::Untrustworthy { .. }));
        fs::write(&path, pem.replace("-----END", "-----OUT")).unwrap();
        assert!(matches!(read().unwrap_err(), Error::Authority { .. }));
        fs::write(&path, format!("{pem}{pem}")).unwrap();
        assert_eq!(read().unwrap().authorities.len(), 2);
    }

    #[test]
    fn a_notice_is_sent_again_within_seconds_to_an_hour() {
        assert_eq!(options(&[]).unwrap().pace, Pace::USUAL);
        let pace = options(&["--notice-retry", "3"]).unwrap().pace;
        assert_eq!((pace.first, pace.life), (Duration::from_secs(3), Pace::USUAL.life));
        for bad in ["0", "3601"] {
            assert!(matches!(options(&["--notice-retry", bad]).unwrap_err(), Error::Retry));
        }
    }

    #[test]
    fn credentials_are_two_lines_that_nobody_else_may_read() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("smtp");
        let check = |text: &str, mode: u32, expect: bool| {
            fs::write(&path, text).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            assert_eq!(credentials(&path).is_ok(), expect, "{text:?} {mode:o}");
        };
        check("ada\nsecret\n", 0o600, true);
        check("ada\nsecret\n", 0o644, false);
        check("ada\n", 0o600, false);
        check("ada\nsecret\nmore\n", 0o600, false);
    }
}
