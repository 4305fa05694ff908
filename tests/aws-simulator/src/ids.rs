//! AWS's identifiers: access key ids that encode their account, unique ids of users and roles,
//! secrets and session tokens.
//!
//! An access key id is four letters and 80 bits in base32; bits 1 to 40 of these are the account
//! number. Clients decode it (to name the account without a call), so ours must be decodable.

use aws_lc_rs::{digest, rand};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;

const ALPHABET: &[u8; 32] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567";

/// The four letters that say what kind of key an id names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum KeyKind {
    LongTerm,
    Session,
}

impl KeyKind {
    fn prefix(self) -> &'static str {
        match self {
            Self::LongTerm => "AKIA",
            Self::Session => "ASIA",
        }
    }
}

/// Makes a new access key id of `account`.
pub(crate) fn access_key_id(kind: KeyKind, account: &str) -> String {
    let mut bytes = random::<10>();
    // Seven random bits remain below the account, and the top bit is set as in today's real ids.
    let low = u64::from(bytes[0] & 0x7f);
    let head = (1 << 47) | (account.parse::<u64>().unwrap_or_default() << 7) | low;
    bytes[..6].copy_from_slice(&head.to_be_bytes()[2..]);
    format!("{}{}", kind.prefix(), base32(&bytes))
}

/// Reads the account number out of an access key id.
pub fn account_of(access_key_id: &str) -> Option<String> {
    let bytes = from_base32(access_key_id.get(4..)?)?;
    let head: [u8; 6] = bytes.get(..6)?.try_into().ok()?;
    let mut wide = [0; 8];
    wide[2..].copy_from_slice(&head);
    Some(format!("{:012}", (u64::from_be_bytes(wide) & 0x7fff_ffff_ff80) >> 7))
}

/// Derives the unique id (`AIDA…`, `AROA…`) of what `arn` names.
pub(crate) fn unique_id(prefix: &str, arn: &str) -> String {
    let digest = digest::digest(&digest::SHA256, arn.as_bytes());
    format!("{prefix}{}", &base32(digest.as_ref())[..17])
}

/// Makes a secret access key: forty characters, as AWS's are.
pub(crate) fn secret_key() -> String {
    STANDARD.encode(random::<30>())
}

/// Makes an opaque session token of at least `minimum` characters.
pub(crate) fn session_token(minimum: usize) -> String {
    let mut token = format!("IQoJb3JpZ2luX2Vj{}", STANDARD.encode(random::<180>()));
    while token.len() < minimum {
        token.push_str(&STANDARD.encode(random::<48>()));
    }
    token
}

/// Makes the seed of a TOTP device, in base32 as an authenticator takes it.
pub(crate) fn device_seed() -> String {
    base32(&random::<40>())
}

pub(crate) fn base32(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len() * 8 / 5 + 1);
    let (mut held, mut bits) = (0u32, 0);
    for byte in bytes {
        held = (held << 8) | u32::from(*byte);
        bits += 8;
        while bits >= 5 {
            bits -= 5;
            text.push(char::from(ALPHABET[((held >> bits) & 31) as usize]));
        }
    }
    if bits > 0 {
        text.push(char::from(ALPHABET[((held << (5 - bits)) & 31) as usize]));
    }
    text
}

pub(crate) fn from_base32(text: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len() * 5 / 8);
    let (mut held, mut bits) = (0u32, 0);
    for letter in text.trim_end_matches('=').bytes() {
        let value = ALPHABET.iter().position(|known| *known == letter.to_ascii_uppercase())?;
        held = (held << 5) | u32::try_from(value).ok()?;
        bits += 5;
        if bits >= 8 {
            bits -= 8;
            bytes.push(((held >> bits) & 0xff) as u8);
        }
    }
    Some(bytes)
}

fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    rand::fill(&mut bytes).expect("the system's random source does not fail once it is up");
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_id_tells_its_account() {
        for account in ["000000000001", "123456789012", "999999999999"] {
            for kind in [KeyKind::LongTerm, KeyKind::Session] {
                let id = access_key_id(kind, account);
                assert_eq!(id.len(), 20);
                assert_eq!(account_of(&id).as_deref(), Some(account));
            }
        }
    }

    #[test]
    fn a_published_key_id_is_decoded() {
        // The worked example that is passed around with the decoding rule.
        assert_eq!(account_of("ASIAQNZGKIQY56JQ7WML").as_deref(), Some("029608264753"));
    }

    #[test]
    fn base32_agrees_with_rfc_4648() {
        for (plain, coded) in [("f", "MY"), ("fo", "MZXQ"), ("foobar", "MZXW6YTBOI")] {
            assert_eq!(base32(plain.as_bytes()), coded);
            assert_eq!(from_base32(coded).unwrap(), plain.as_bytes());
        }
        assert_eq!(from_base32("not base32!"), None);
    }

    #[test]
    fn a_token_is_as_long_as_was_asked() {
        assert!(session_token(0).len() > 200);
        assert!(session_token(4096).len() >= 4096);
    }
}
