//! Passwords as they are kept: argon2id, with what it was made with.
//!
//! Parameters: 19 MiB, two passes, one lane. They are the first of the settings of equal strength
//! that OWASP's Password Storage Cheat Sheet gives for argon2id (m=19456, t=2, p=1); the function
//! is that of RFC 9106. Each record says its own parameters, so that these can be raised: a
//! password keeps the old ones until it is set again.
//!
//! The only rule for a password is its length. The longest bounds the work that a stranger can
//! cause; rules about kinds of characters would make passwords worse (NIST SP 800-63B).

use argon2::{Algorithm, Argon2, Params, Version};
use aws_lc_rs::rand::{SecureRandom, SystemRandom};
use base64::Engine;
use base64::engine::general_purpose::STANDARD_NO_PAD;
use secrecy::{ExposeSecret, SecretString};
use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

use crate::error::{Error, Result};

const SHORTEST: usize = 12;
const LONGEST: usize = 256;

const MEMORY_KIB: u32 = 19 * 1024;
const PASSES: u32 = 2;
const LANES: u32 = 1;

const SALT: usize = 16;
const HASH: usize = 32;

/// Checks the length, in characters.
pub fn check(field: &'static str, password: &SecretString) -> Result<()> {
    // Bytes first: characters are not counted in what is far too long.
    let text = password.expose_secret();
    if text.len() <= 4 * LONGEST && (SHORTEST..=LONGEST).contains(&text.chars().count()) {
        return Ok(());
    }
    Err(Error::field(field, "a password has 12 to 256 characters"))
}

/// What a password is checked against.
#[derive(Clone)]
pub struct Hashed {
    memory_kib: u32,
    passes: u32,
    lanes: u32,
    salt: [u8; SALT],
    hash: Zeroizing<[u8; HASH]>,
}

impl Hashed {
    /// Hashes a password under a salt of its own. Takes a while and 19 MiB.
    pub fn of(password: &SecretString) -> Result<Self> {
        let mut salt = [0; SALT];
        SystemRandom::new()
            .fill(&mut salt)
            .map_err(|_| Error::internal("the system has no random bytes"))?;
        let mut made = Self { salt, ..Self::nobodys() };
        made.hash = made.compute(password)?;
        Ok(made)
    }

    /// What a password is checked against where there is none: as much work, and never right.
    pub fn nobodys() -> Self {
        Self {
            memory_kib: MEMORY_KIB,
            passes: PASSES,
            lanes: LANES,
            salt: [0; SALT],
            hash: Zeroizing::new([0; HASH]),
        }
    }

    /// Tells whether it is this password. Takes as long either way.
    pub fn is_of(&self, password: &SecretString) -> Result<bool> {
        let given = self.compute(password)?;
        Ok(self.hash.as_slice().ct_eq(given.as_slice()).into())
    }

    fn compute(&self, password: &SecretString) -> Result<Zeroizing<[u8; HASH]>> {
        let failed = |error: argon2::Error| Error::internal(error.to_string());
        let params = Params::new(self.memory_kib, self.passes, self.lanes, Some(HASH));
        let argon2 = Argon2::new(Algorithm::Argon2id, Version::V0x13, params.map_err(failed)?);
        let mut hash = Zeroizing::new([0; HASH]);
        let password = password.expose_secret().as_bytes();
        argon2.hash_password_into(password, &self.salt, hash.as_mut_slice()).map_err(failed)?;
        Ok(hash)
    }

    /// The form that is sealed and stored.
    pub fn to_text(&self) -> SecretString {
        let Self { memory_kib, passes, lanes, salt, hash } = self;
        let (salt, hash) = (STANDARD_NO_PAD.encode(salt), STANDARD_NO_PAD.encode(hash.as_slice()));
        format!("argon2id${memory_kib}${passes}${lanes}${salt}${hash}").into()
    }

    pub fn parse(text: &SecretString) -> Result<Self> {
        Self::read(text.expose_secret())
            .ok_or_else(|| Error::internal("a stored password is malformed"))
    }

    fn read(text: &str) -> Option<Self> {
        let mut parts = text.split('$');
        let mut next = || parts.next();
        if next()? != "argon2id" {
            return None;
        }
        let (memory_kib, passes, lanes) =
            (next()?.parse().ok()?, next()?.parse().ok()?, next()?.parse().ok()?);
        let salt = STANDARD_NO_PAD.decode(next()?).ok()?.try_into().ok()?;
        let hash = Zeroizing::new(STANDARD_NO_PAD.decode(next()?).ok()?.try_into().ok()?);
        next().is_none().then_some(Self { memory_kib, passes, lanes, salt, hash })
    }
}

impl std::fmt::Debug for Hashed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Hashed([hidden])")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_password_is_known_again_from_what_is_stored_and_no_other_is() {
        let password = SecretString::from("correct horse battery");
        let hashed = Hashed::of(&password).unwrap();
        let stored = Hashed::parse(&hashed.to_text()).unwrap();
        assert!(stored.is_of(&password).unwrap());
        assert!(!stored.is_of(&"correct horse batterz".into()).unwrap());
        assert!(!Hashed::nobodys().is_of(&password).unwrap());
        let again = Hashed::of(&password).unwrap();
        assert_ne!(again.to_text().expose_secret(), hashed.to_text().expose_secret());
        assert!(!format!("{stored:?}").contains("argon2id"));
    }

    #[test]
    fn the_reference_implementation_answers_the_same() {
        // `echo -n password | argon2 somesaltsomesalt -id -k 19456 -t 2 -p 1 -l 32 -r`
        let known = Hashed { salt: *b"somesaltsomesalt", ..Hashed::nobodys() };
        let hash = known.compute(&"password".into()).unwrap();
        assert_eq!(hex::encode(hash.as_slice()), KNOWN);
    }

    const KNOWN: &str = "2b5dc4054886ec957ef59c73b661c54dd6fb274590b278f657c6d96aac8fa6d1";

    #[test]
    fn the_length_is_the_only_rule() {
        let check = |text: &str| check("password", &SecretString::from(text)).is_ok();
        assert!(!check("eleven char"));
        assert!(check("            "));
        assert!(check(&"ü".repeat(12)) && check(&"ü".repeat(256)));
        assert!(!check(&"ü".repeat(257)) && !check(&"x".repeat(1 << 20)));
    }
}
