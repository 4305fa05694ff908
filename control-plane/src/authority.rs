//! The built-in certificate authority: the listeners' certificates and the runners'.
//!
//! Made at the first start; its key is sealed under the master key. People and runners trust
//! the CA's certificate, runners at first by the fingerprint in their pool token. A client
//! certificate proves nothing but its key: who a runner is stands in the store, under the
//! SHA-256 of that key (SPKI), so no name in a certificate is ever parsed.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use latchkey_domain::id::{Digest, RunnerId};
use rcgen::string::Ia5String;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256,
    SanType,
};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, CertificateSigningRequestDer, PrivatePkcs8KeyDer};

use crate::auth::sha256;
use crate::clock::Clock;
use crate::durable;
use crate::error::{Error, Result};
use crate::seal::MasterKey;

const CA_LIFETIME: Duration = Duration::from_secs(20 * 365 * 86_400);
const LEAF_LIFETIME: Duration = Duration::from_secs(397 * 86_400);
/// Certificates begin this long ago, for peers whose clocks are behind.
const BACKDATE: Duration = Duration::from_secs(3600);
const LARGEST_REQUEST: usize = 8 * 1024;
const KEY_CONTEXT: &[u8] = b"authority key";

pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    certificate: CertificateDer<'static>,
    certificate_pem: String,
    clock: std::sync::Arc<dyn Clock>,
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Authority({})", self.fingerprint())
    }
}

/// Why the authority cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    #[error("read or write {path}")]
    Io {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(
        "unseal the CA's key: it was sealed under another master key; give the key file that \
         belongs to this data directory"
    )]
    OtherMasterKey,
    #[error("use the CA's certificate or key")]
    Unusable(#[source] rcgen::Error),
}

/// A certificate request whose signature was checked.
pub struct CheckedRequest {
    params: CertificateSigningRequestParams,
    key: Digest,
}

impl std::fmt::Debug for CheckedRequest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "CheckedRequest({})", self.key)
    }
}

impl CheckedRequest {
    /// SHA-256 of the public key (SPKI).
    pub fn key(&self) -> Digest {
        self.key
    }
}

#[derive(Clone, Debug)]
pub struct Issued {
    pub certificate: CertificateDer<'static>,
    pub ca_certificate: CertificateDer<'static>,
}

/// A listener's certificate chain and key, PEM.
pub struct ServerIdentity {
    pub chain_pem: String,
    pub key_pem: zeroize::Zeroizing<String>,
}

impl std::fmt::Debug for ServerIdentity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ServerIdentity").field("chain_pem", &self.chain_pem).finish_non_exhaustive()
    }
}

impl Authority {
    /// Opens the authority in `directory`, making it at the first start.
    pub fn open(
        directory: &Path,
        master: &MasterKey,
        clock: std::sync::Arc<dyn Clock>,
    ) -> Result<Self, AuthorityError> {
        let (certificate_path, key_path) = (directory.join("ca.pem"), directory.join("ca.key"));
        let io = |path: &Path| {
            let path = path.to_owned();
            move |source| AuthorityError::Io { path, source }
        };
        if !certificate_path.exists() {
            durable::create_private_directory(directory).map_err(io(directory))?;
            let (pem, key) = make(&*clock).map_err(AuthorityError::Unusable)?;
            let sealed = master.seal(KEY_CONTEXT, &key);
            durable::replace(&key_path, &sealed).map_err(io(&key_path))?;
            durable::replace(&certificate_path, pem.as_bytes()).map_err(io(&certificate_path))?;
        }
        let certificate_pem =
            std::fs::read_to_string(&certificate_path).map_err(io(&certificate_path))?;
        let sealed = std::fs::read(&key_path).map_err(io(&key_path))?;
        let key =
            master.open_sealed(KEY_CONTEXT, &sealed).map_err(|_| AuthorityError::OtherMasterKey)?;
        let key = PrivatePkcs8KeyDer::from(key.expose_secret());
        let key = KeyPair::from_pkcs8_der_and_sign_algo(&key, &PKCS_ECDSA_P256_SHA256)
            .map_err(AuthorityError::Unusable)?;
        let certificate = CertificateDer::from_pem_slice(certificate_pem.as_bytes())
            .map_err(|_| AuthorityError::Unusable(rcgen::Error::CouldNotParseCertificate))?;
        let issuer =
            Issuer::from_ca_cert_der(&certificate, key).map_err(AuthorityError::Unusable)?;
        Ok(Self { issuer, certificate, certificate_pem, clock })
    }

    /// SHA-256 of the CA's certificate: what pool tokens carry.
    pub fn fingerprint(&self) -> Digest {
        sha256(&self.certificate)
    }

    pub fn certificate_pem(&self) -> &str {
        &self.certificate_pem
    }

    /// Makes a listener's certificate for these names, new at every start.
    pub fn server_identity(&self, names: &[String]) -> Result<ServerIdentity> {
        let key = KeyPair::generate().map_err(Error::internal)?;
        let mut params = self.leaf(ExtendedKeyUsagePurpose::ServerAuth);
        for name in names {
            params.subject_alt_names.push(match name.parse() {
                Ok(address) => SanType::IpAddress(address),
                Err(_) => {
                    SanType::DnsName(Ia5String::try_from(name.as_str()).map_err(Error::internal)?)
                }
            });
        }
        let certificate = params.signed_by(&key, &self.issuer).map_err(Error::internal)?;
        Ok(ServerIdentity {
            // The CA goes along, so that a runner can find it by its fingerprint.
            chain_pem: format!("{}{}", certificate.pem(), self.certificate_pem),
            key_pem: key.serialize_pem().into(),
        })
    }

    /// Reads a PKCS #10 request and checks that its sender has the key.
    pub fn read_request(&self, der: &[u8]) -> Result<CheckedRequest> {
        let bad = || {
            let message = "it is no PKCS #10 request in DER, signed by its own ECDSA P-256 key";
            Error::field("certificate_request", message)
        };
        if der.len() > LARGEST_REQUEST {
            return Err(bad());
        }
        let der = CertificateSigningRequestDer::from(der);
        let params = CertificateSigningRequestParams::from_der(&der).map_err(|_| bad())?;
        let key = sha256(&rcgen::PublicKeyData::subject_public_key_info(&params.public_key));
        Ok(CheckedRequest { params, key })
    }

    /// Signs a client certificate for the request's key. Of the request, nothing else is used.
    pub fn issue(&self, request: CheckedRequest, runner: RunnerId) -> Result<Issued> {
        let mut params = self.leaf(ExtendedKeyUsagePurpose::ClientAuth);
        params.distinguished_name.push(DnType::CommonName, format!("runner {runner}"));
        let certificate =
            params.signed_by(&request.params.public_key, &self.issuer).map_err(Error::internal)?;
        Ok(Issued {
            certificate: certificate.der().clone(),
            ca_certificate: self.certificate.clone(),
        })
    }

    fn leaf(&self, usage: ExtendedKeyUsagePurpose) -> CertificateParams {
        let mut params = CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.use_authority_key_identifier_extension = true;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![usage];
        validity(&mut params, &*self.clock, LEAF_LIFETIME);
        params
    }
}

/// Returns the key of a peer's certificate, as the store knows it.
pub fn key_of(certificate: &CertificateDer<'_>) -> Result<Digest> {
    let unusable = || {
        use latchkey_proto::v1::Reason;
        Error::refused(Reason::IdentityRequired, "the client certificate cannot be read")
    };
    let certificate = webpki::EndEntityCert::try_from(certificate).map_err(|_| unusable())?;
    Ok(sha256(&certificate.subject_public_key_info()))
}

fn make(clock: &dyn Clock) -> Result<(String, zeroize::Zeroizing<Vec<u8>>), rcgen::Error> {
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, "Latchkey control plane CA");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    validity(&mut params, clock, CA_LIFETIME);
    let certificate = params.self_signed(&key)?;
    Ok((certificate.pem(), key.serialize_der().into()))
}

fn validity(params: &mut CertificateParams, clock: &dyn Clock, lifetime: Duration) {
    let seconds = clock.now().as_millis().div_euclid(1000);
    let at = |offset: i64| {
        let date = jiff::Timestamp::from_second(seconds.saturating_add(offset))
            .unwrap_or(jiff::Timestamp::UNIX_EPOCH)
            .to_zoned(jiff::tz::TimeZone::UTC);
        let (month, day) = (date.month().unsigned_abs(), date.day().unsigned_abs());
        rcgen::date_time_ymd(i32::from(date.year()), month, day)
    };
    // Whole days: an hour's grace before, and the last day in full.
    params.not_before = at(-i64::try_from(BACKDATE.as_secs()).unwrap_or(0));
    params.not_after = at(i64::try_from(lifetime.as_secs()).unwrap_or(0) + 86_400);
}
