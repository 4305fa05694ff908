//! Encryption at rest, under the control plane's master key.
//!
//! The master key is 32 random bytes in a file of its own, so that a backup of the data
//! directory alone tells nothing. Every use has a key derived from it (HKDF-SHA-256), so no two
//! uses can be mistaken for each other:
//!
//! - [`MasterKey::seal`]: small secrets within records, AES-256-GCM with a random nonce. The
//!   *context* (kind of record and its key) is authenticated: a sealed value moved to another
//!   record doesn't open.
//! - [`stream`]: blobs, in segments, with a key per blob.
//! - [`MasterKey::digest`]: keyed digests, to recognise a value without keeping it.
//!
//! Sealed: key version (1 byte), nonce (12), ciphertext, tag (16). The key version leaves room
//! for rotation; there is one so far.

pub mod stream;

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use aws_lc_rs::hkdf::{HKDF_SHA256, Prk, Salt};
use aws_lc_rs::{hmac, rand};
use zeroize::{Zeroize, Zeroizing};

use crate::durable;
use crate::store::Key;

const KEY_LEN: usize = 32;
const KEY_VERSION: u8 = 1;

/// Key version, nonce and tag: what sealing adds to a plaintext.
pub const OVERHEAD: usize = 1 + NONCE_LEN + 16;

/// Plaintext that is wiped when it is dropped, and that no `Debug` shows.
#[derive(Clone)]
pub struct SecretBytes(Zeroizing<Vec<u8>>);

impl SecretBytes {
    pub fn new(bytes: Vec<u8>) -> Self {
        Self(Zeroizing::new(bytes))
    }

    pub fn expose_secret(&self) -> &[u8] {
        &self.0
    }

    /// Turns it into text, if it is UTF-8.
    pub fn into_text(mut self) -> Option<secrecy::SecretString> {
        match String::from_utf8(std::mem::take(&mut *self.0)) {
            Ok(text) => Some(secrecy::SecretString::from(text)),
            Err(error) => {
                error.into_bytes().zeroize();
                None
            }
        }
    }
}

impl fmt::Debug for SecretBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SecretBytes([REDACTED])")
    }
}

/// What to do when there is no key file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IfMissing {
    /// Right whenever a database exists: its secrets would be lost behind a new key.
    Refuse,
    /// Right at the first start only.
    Create,
}

/// Why there is no master key.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    #[error(
        "find the master key {path}; without it the sealed records can't be read: restore the \
         file from where it was kept"
    )]
    Missing { path: PathBuf },
    #[error(
        "use the master key {path}: others than its owner may use the file (mode {mode:03o}); \
         set mode 600"
    )]
    Exposed { path: PathBuf, mode: u32 },
    #[error("use the master key {path}: it must be a file of exactly 32 bytes")]
    Malformed { path: PathBuf },
    #[error("read the master key {path}")]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("create the master key {path}")]
    Create {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// Why something sealed does not open. Doesn't say more, on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    #[error("open a sealed value: it was sealed with key version {version}, which is not here")]
    UnknownKey { version: u8 },
    #[error("open a sealed value: it was changed, moved, or sealed under another master key")]
    Rejected,
}

/// The control plane's master key, and the keys derived from it.
pub struct MasterKey {
    /// Parent of the keys of blobs.
    blobs: Prk,
    records: LessSafeKey,
    digests: hmac::Key,
}

impl MasterKey {
    /// Loads the key from its file. Blocks.
    pub fn open(path: &Path, missing: IfMissing) -> Result<Self, KeyError> {
        match (File::open(path), missing) {
            (Ok(file), IfMissing::Refuse | IfMissing::Create) => Self::read(path, file),
            (Err(error), IfMissing::Create) if error.kind() == io::ErrorKind::NotFound => {
                Self::create(path)
            }
            (Err(error), IfMissing::Refuse) if error.kind() == io::ErrorKind::NotFound => {
                Err(KeyError::Missing { path: path.to_path_buf() })
            }
            (Err(source), IfMissing::Refuse | IfMissing::Create) => {
                Err(KeyError::Read { path: path.to_path_buf(), source })
            }
        }
    }

    /// Makes a key that is kept nowhere, for tests.
    pub fn ephemeral() -> Self {
        Self::derive(&random::<KEY_LEN>())
    }

    fn create(path: &Path) -> Result<Self, KeyError> {
        let bytes = Zeroizing::new(random::<KEY_LEN>());
        let failed = |source| KeyError::Create { path: path.to_path_buf(), source };
        // Under another name first: a kill midway must not leave a short key.
        durable::replace(path, bytes.as_slice()).map_err(failed)?;
        Ok(Self::derive(&bytes))
    }

    fn read(path: &Path, file: File) -> Result<Self, KeyError> {
        let failed = |source| KeyError::Read { path: path.to_path_buf(), source };
        let metadata = file.metadata().map_err(failed)?;
        let mode = metadata.permissions().mode() & 0o777;
        if !metadata.is_file() {
            return Err(KeyError::Malformed { path: path.to_path_buf() });
        }
        if mode & 0o077 != 0 {
            return Err(KeyError::Exposed { path: path.to_path_buf(), mode });
        }
        // One byte more than wanted, to notice a longer file; never grown, so never copied.
        let mut bytes = Zeroizing::new(Vec::with_capacity(KEY_LEN + 1));
        file.take(KEY_LEN as u64 + 1).read_to_end(&mut bytes).map_err(failed)?;
        match <&[u8; KEY_LEN]>::try_from(bytes.as_slice()) {
            Ok(bytes) => Ok(Self::derive(bytes)),
            Err(_) => Err(KeyError::Malformed { path: path.to_path_buf() }),
        }
    }

    fn derive(master: &[u8; KEY_LEN]) -> Self {
        let root = Salt::new(HKDF_SHA256, b"latchkey master key 1").extract(master);
        let short = "HKDF gives short keys";
        let records = root.expand(&[b"records"], &AES_256_GCM).expect(short);
        let digests = root.expand(&[b"digests"], hmac::HMAC_SHA256).expect(short);
        let blobs = root.expand(&[b"blobs"], HKDF_SHA256).expect(short);
        Self {
            blobs: Prk::from(blobs),
            records: LessSafeKey::new(UnboundKey::from(records)),
            digests: hmac::Key::from(digests),
        }
    }

    /// Seals a small secret for one place; see [`context`].
    pub fn seal(&self, context: &[u8], plaintext: &[u8]) -> Vec<u8> {
        let nonce = random::<NONCE_LEN>();
        let mut body = Vec::with_capacity(plaintext.len() + OVERHEAD);
        body.extend_from_slice(plaintext);
        self.records
            .seal_in_place_append_tag(
                Nonce::assume_unique_for_key(nonce),
                Aad::from(authenticated(context)),
                &mut body,
            )
            .expect("AES-GCM seals any record: records are far below its limit");
        let mut sealed = Vec::with_capacity(body.len() + 1 + NONCE_LEN);
        sealed.push(KEY_VERSION);
        sealed.extend_from_slice(&nonce);
        sealed.extend_from_slice(&body);
        sealed
    }

    /// Opens what was sealed for the same place.
    pub fn open_sealed(&self, context: &[u8], sealed: &[u8]) -> Result<SecretBytes, OpenError> {
        let (&version, rest) = sealed.split_first().ok_or(OpenError::Rejected)?;
        if version != KEY_VERSION {
            return Err(OpenError::UnknownKey { version });
        }
        let (nonce, body) = rest.split_first_chunk::<NONCE_LEN>().ok_or(OpenError::Rejected)?;
        let mut body = Zeroizing::new(body.to_vec());
        let length = self
            .records
            .open_in_place(
                Nonce::assume_unique_for_key(*nonce),
                Aad::from(authenticated(context)),
                &mut body,
            )
            .map_err(|_| OpenError::Rejected)?
            .len();
        body.truncate(length);
        Ok(SecretBytes(body))
    }

    /// Returns a keyed digest: equal for equal bytes, and of no use without the key, not even
    /// for a million possible token codes.
    pub fn digest(&self, context: &[u8], bytes: &[u8]) -> [u8; 32] {
        let mut digest = hmac::Context::with_key(&self.digests);
        digest.update(&(context.len() as u64).to_be_bytes());
        digest.update(context);
        digest.update(bytes);
        digest.sign().as_ref().try_into().expect("HMAC-SHA-256 has 32 bytes")
    }
}

impl fmt::Debug for MasterKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("MasterKey([REDACTED])")
    }
}

/// Names the one place where a sealed value opens: a field of a record.
pub fn context(field: &str, record: &Key) -> Vec<u8> {
    let length = u32::try_from(field.len()).expect("names of fields are short");
    [&length.to_be_bytes()[..], field.as_bytes(), record.as_bytes()].concat()
}

fn authenticated(context: &[u8]) -> Vec<u8> {
    [&[KEY_VERSION], context].concat()
}

pub(crate) fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    rand::fill(&mut bytes).expect("the system has randomness");
    bytes
}

#[cfg(test)]
mod tests {
    use std::fs;

    use proptest::collection::vec;
    use proptest::prelude::{any, prop_assert, prop_assert_eq, proptest};
    use proptest::sample::Index;
    use secrecy::ExposeSecret;

    use super::*;

    proptest! {
        #[test]
        fn what_is_sealed_opens_in_its_place(
            place in vec(any::<u8>(), 0..40), plaintext in vec(any::<u8>(), 0..300)
        ) {
            let key = MasterKey::ephemeral();
            let sealed = key.seal(&place, &plaintext);
            prop_assert_eq!(sealed.len(), plaintext.len() + OVERHEAD);
            let opened = key.open_sealed(&place, &sealed).unwrap();
            prop_assert_eq!(opened.expose_secret(), &plaintext);
        }

        #[test]
        fn any_flipped_bit_is_rejected(
            plaintext in vec(any::<u8>(), 0..100), at in any::<Index>(), bit in 0..8_u32
        ) {
            let key = MasterKey::ephemeral();
            let mut sealed = key.seal(b"place", &plaintext);
            let at = at.index(sealed.len());
            sealed[at] ^= 1_u8 << bit;
            prop_assert!(key.open_sealed(b"place", &sealed).is_err());
        }

        #[test]
        fn any_bytes_are_rejected_without_a_panic(bytes in vec(any::<u8>(), 0..100)) {
            prop_assert!(MasterKey::ephemeral().open_sealed(b"place", &bytes).is_err());
        }
    }

    #[test]
    fn a_sealed_value_opens_nowhere_else() {
        let key = MasterKey::ephemeral();
        let sealed = key.seal(b"here", b"secret");
        assert_eq!(key.open_sealed(b"there", &sealed).unwrap_err(), OpenError::Rejected);
        let other = MasterKey::ephemeral();
        assert_eq!(other.open_sealed(b"here", &sealed).unwrap_err(), OpenError::Rejected);
        assert_ne!(key.seal(b"here", b"secret"), sealed);
    }

    #[test]
    fn a_keyed_digest_depends_on_key_context_and_bytes() {
        let (key, other) = (MasterKey::ephemeral(), MasterKey::ephemeral());
        let digest = key.digest(b"code", b"123456");
        assert_eq!(digest, key.digest(b"code", b"123456"));
        assert_ne!(digest, other.digest(b"code", b"123456"));
        assert_ne!(digest, key.digest(b"code", b"123457"));
        assert_ne!(digest, key.digest(b"code1", b"23456"));
    }

    #[test]
    fn nothing_secret_is_shown() {
        let secret = SecretBytes::new(b"canary".to_vec());
        assert!(!format!("{secret:?} {:?}", MasterKey::ephemeral()).contains("canary"));
        assert_eq!(secret.into_text().unwrap().expose_secret(), "canary");
        assert!(SecretBytes::new(vec![0xff]).into_text().is_none());
    }

    #[test]
    fn a_key_is_created_once_and_then_found() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("master.key");
        let missing = MasterKey::open(&path, IfMissing::Refuse).unwrap_err();
        assert!(matches!(missing, KeyError::Missing { .. }), "{missing}");
        assert!(!path.exists());
        let sealed = MasterKey::open(&path, IfMissing::Create).unwrap().seal(b"x", b"secret");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        for missing in [IfMissing::Refuse, IfMissing::Create] {
            let key = MasterKey::open(&path, missing).unwrap();
            assert_eq!(key.open_sealed(b"x", &sealed).unwrap().expose_secret(), b"secret");
        }
    }

    #[test]
    fn a_key_that_others_may_read_or_that_is_short_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("master.key");
        MasterKey::open(&path, IfMissing::Create).unwrap();
        for mode in [0o640, 0o604, 0o610] {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            let error = MasterKey::open(&path, IfMissing::Create).unwrap_err();
            assert!(matches!(error, KeyError::Exposed { .. }), "{error}");
        }
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        for length in [0, 31, 33] {
            fs::write(&path, vec![1; length]).unwrap();
            let error = MasterKey::open(&path, IfMissing::Create).unwrap_err();
            assert!(matches!(error, KeyError::Malformed { .. }), "{error}");
        }
    }
}
