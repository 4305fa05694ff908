//! The runner's identity: a key made here, and the client certificate it bought.
//!
//! 1. The pool token carries the fingerprint of the control plane's CA. One TLS handshake is
//!    made that finds the certificate with this fingerprint in the presented chain and verifies
//!    the server against it. It becomes the only trust root.
//! 2. The key is written before it is used: a repeat of `Enroll` with the same key and token
//!    answers the same runner, so a crash in between spends no second token.
//! 3. `Enroll` spends the token. The certificate is written last; where it is, the identity is
//!    whole, and no token is needed again.

use std::fs;
use std::io::{self, Write};
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use aws_lc_rs::digest::{SHA256, digest};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair, PKCS_ECDSA_P256_SHA256};
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use secrecy::{ExposeSecret, SecretString};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};

use latchkey_proto::v1;
use latchkey_proto::v1::runner_service_client::RunnerServiceClient;

use crate::config::{Config, PoolToken};
use crate::job_directory::{self, create_private, private_directory, sync_directory};

const HANDSHAKE: Duration = Duration::from_secs(20);

#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error(
        "enrol: the runner has no certificate yet; give it a pool token with --pool-token-file"
    )]
    NoToken,
    #[error("reach the control plane at {0}")]
    Unreachable(String, #[source] io::Error),
    #[error("reach the control plane at {0}: it did not answer in time")]
    Silent(String),
    #[error("enrol: the control plane presented no CA with the token's fingerprint")]
    WrongCa,
    #[error("dial the control plane")]
    Transport(#[from] tonic::transport::Error),
    #[error("enrol: {}", .0.message())]
    Refused(#[source] Box<tonic::Status>),
    #[error("enrol: make a key")]
    Key(#[source] rcgen::Error),
    #[error("enrol: prepare the TLS handshake")]
    Tls(#[source] rustls::Error),
    #[error("keep the identity")]
    Keep(#[source] io::Error),
    #[error("keep the identity")]
    Directory(#[from] job_directory::Error),
}

/// What this runner proves itself with.
#[derive(Debug)]
pub(crate) struct Identity {
    pub(crate) runner_id: String,
    certificate: String,
    key: SecretString,
    ca: String,
}

impl Identity {
    /// Loads the identity, or buys one.
    pub(crate) async fn obtain(config: &Config) -> Result<Self, Error> {
        let directory = config.work_dir.join("identity");
        if let Some(identity) = Self::load(&directory)? {
            return Ok(identity);
        }
        let token = config.pool_token.as_ref().ok_or(Error::NoToken)?;
        private_directory(&directory)?;
        let key = load_or_make_key(&directory)?;
        let ca = find_ca(config, token).await?;
        let ca_pem = pem("CERTIFICATE", &ca);
        let tls = ClientTlsConfig::new()
            .ca_certificate(Certificate::from_pem(&ca_pem))
            .domain_name(&config.host);
        let channel = endpoint(config).tls_config(tls)?.connect().await?;
        let request = v1::EnrollRequest {
            pool_token: token.secret.expose_secret().to_owned(),
            certificate_request: certificate_request(config, &key)?,
            name: config.name.clone(),
        };
        let answer = RunnerServiceClient::new(channel)
            .enroll(request)
            .await
            .map_err(|status| Error::Refused(Box::new(status)))?
            .into_inner();
        // The CA was verified by its fingerprint; what the answer says about it adds nothing.
        let certificate = pem("CERTIFICATE", &answer.certificate);
        for (name, text) in [
            ("ca.pem", &ca_pem),
            ("runner-id", &answer.runner_id),
            ("certificate.pem", &certificate),
        ] {
            keep(&directory, name, text).map_err(Error::Keep)?;
        }
        sync_directory(&directory)?;
        tracing::info!(runner_id = %answer.runner_id, "enrolled");
        let key = SecretString::from(key.serialize_pem());
        Ok(Self { runner_id: answer.runner_id, certificate, key, ca: ca_pem })
    }

    /// Answers a channel that dials when it is used, and again when it broke.
    pub(crate) fn channel(&self, config: &Config) -> Result<Channel, Error> {
        let identity =
            tonic::transport::Identity::from_pem(&self.certificate, self.key.expose_secret());
        let tls = ClientTlsConfig::new()
            .ca_certificate(Certificate::from_pem(&self.ca))
            .identity(identity)
            .domain_name(&config.host);
        Ok(endpoint(config).tls_config(tls)?.connect_lazy())
    }

    fn load(directory: &Path) -> Result<Option<Self>, Error> {
        let read = |name: &str| match fs::read_to_string(directory.join(name)) {
            Ok(text) => Ok(Some(text)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::Keep(error)),
        };
        let (Some(certificate), Some(key), Some(ca), Some(runner_id)) =
            (read("certificate.pem")?, read("key.pem")?, read("ca.pem")?, read("runner-id")?)
        else {
            return Ok(None);
        };
        Ok(Some(Self { runner_id, certificate, key: key.into(), ca }))
    }
}

fn endpoint(config: &Config) -> Endpoint {
    Channel::builder(config.control_plane.clone())
        .connect_timeout(HANDSHAKE)
        .http2_keep_alive_interval(Duration::from_secs(20))
        .keep_alive_timeout(Duration::from_secs(20))
        .keep_alive_while_idle(true)
        .tcp_nodelay(true)
}

fn load_or_make_key(directory: &Path) -> Result<KeyPair, Error> {
    match fs::read_to_string(directory.join("key.pem")) {
        Ok(text) => {
            let text = SecretString::from(text);
            KeyPair::from_pem(text.expose_secret()).map_err(Error::Key)
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(Error::Key)?;
            let text = SecretString::from(key.serialize_pem());
            keep(directory, "key.pem", text.expose_secret()).map_err(Error::Keep)?;
            sync_directory(directory)?;
            Ok(key)
        }
        Err(error) => Err(Error::Keep(error)),
    }
}

fn keep(directory: &Path, name: &str, text: &str) -> io::Result<()> {
    let new = directory.join(format!("{name}.new"));
    let mut file = create_private(&new)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    fs::rename(new, directory.join(name))
}

fn certificate_request(config: &Config, key: &KeyPair) -> Result<Vec<u8>, Error> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, config.name.as_str());
    let request = params.serialize_request(key).map_err(Error::Key)?;
    Ok(request.der().to_vec())
}

fn pem(label: &str, der: &[u8]) -> String {
    let text = STANDARD.encode(der);
    let lines: Vec<&str> =
        text.as_bytes().chunks(64).filter_map(|line| std::str::from_utf8(line).ok()).collect();
    format!("-----BEGIN {label}-----\n{}\n-----END {label}-----\n", lines.join("\n"))
}

/// Makes one handshake and answers the CA that the token names.
async fn find_ca(config: &Config, token: &PoolToken) -> Result<Vec<u8>, Error> {
    let address = format!("{}:{}", config.host, config.control_plane.port_u16().unwrap_or(443));
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let verifier = Arc::new(ByFingerprint {
        fingerprint: token.fingerprint,
        provider: Arc::clone(&provider),
        found: OnceLock::new(),
    });
    let mut tls = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(Error::Tls)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::clone(&verifier) as Arc<dyn ServerCertVerifier>)
        .with_no_client_auth();
    tls.alpn_protocols = vec![b"h2".to_vec()];
    let name = ServerName::try_from(config.host.clone())
        .map_err(|error| Error::Unreachable(address.clone(), io::Error::other(error)))?;
    let handshake = async {
        let stream = TcpStream::connect((
            config.host.as_str(),
            config.control_plane.port_u16().unwrap_or(443),
        ))
        .await?;
        TlsConnector::from(Arc::new(tls)).connect(name, stream).await
    };
    let done = tokio::time::timeout(HANDSHAKE, handshake).await;
    match (verifier.found.get(), done) {
        (_, Err(_)) => Err(Error::Silent(address)),
        // A server that insists on a client certificate may still end the handshake: its own
        // side was verified by then.
        (Some(ca), Ok(_)) => Ok(ca.clone()),
        (None, Ok(Ok(_))) => Err(Error::WrongCa),
        (None, Ok(Err(error))) if error.kind() == io::ErrorKind::InvalidData => Err(Error::WrongCa),
        (None, Ok(Err(error))) => Err(Error::Unreachable(address, error)),
    }
}

#[derive(Debug)]
struct ByFingerprint {
    fingerprint: [u8; 32],
    provider: Arc<CryptoProvider>,
    /// The CA, once the server was verified against it.
    found: OnceLock<Vec<u8>>,
}

impl ServerCertVerifier for ByFingerprint {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let unknown = || rustls::CertificateError::UnknownIssuer;
        let ca = intermediates
            .iter()
            .find(|certificate| digest(&SHA256, certificate).as_ref() == self.fingerprint)
            .ok_or_else(unknown)?;
        let mut roots = RootCertStore::empty();
        roots.add(ca.clone().into_owned())?;
        let verified = WebPkiServerVerifier::builder_with_provider(
            Arc::new(roots),
            Arc::clone(&self.provider),
        )
        .build()
        .map_err(|_| unknown())?
        .verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)?;
        let _ = self.found.set(ca.to_vec());
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

impl Error {
    /// Tells whether trying again can help without a person.
    pub(crate) fn may_pass(&self) -> bool {
        match self {
            Self::Unreachable(..) | Self::Silent(_) | Self::Transport(_) => true,
            Self::Refused(status) => status.code() == tonic::Code::Unavailable,
            Self::NoToken
            | Self::WrongCa
            | Self::Key(_)
            | Self::Tls(_)
            | Self::Keep(_)
            | Self::Directory(_) => false,
        }
    }
}
