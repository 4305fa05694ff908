//! What the values of the store look like: JSON, private to this crate.
//!
//! Records, domain types and wire messages are three sets of types. Records are converted by
//! hand, so that a change of the domain that would change what is on disk does not compile
//! unnoticed. A field that is added later is optional or has a default.

pub mod authentication;
pub mod check;
pub mod environment;
pub mod glass;
pub mod notice;
pub mod people;
pub mod quarantine;
pub mod run;
pub mod runner;
pub mod variable;

use std::fmt;
use std::str::FromStr;

use latchkey_domain::time::Timestamp;
use serde::de::{DeserializeOwned, Error as _};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::{Key, StoreError, Version, Versioned};

pub fn encode<T: Serialize>(record: &T) -> Vec<u8> {
    serde_json::to_vec(record).expect("records have string keys and no failing parts")
}

pub fn decode<T: DeserializeOwned>(key: &Key, found: &Versioned) -> Result<T, StoreError> {
    serde_json::from_slice(&found.value).map_err(|_| StoreError::Damaged { key: key.clone() })
}

/// A record as it was read: what to write back over, and at which version.
#[derive(Clone, Debug)]
pub struct Loaded<T> {
    pub key: Key,
    pub version: Version,
    pub value: T,
}

/// Fetches a record and converts it.
pub async fn fetch<R, T>(
    store: &dyn super::Store,
    key: Key,
) -> Result<Option<Loaded<T>>, StoreError>
where
    R: DeserializeOwned,
    T: TryFrom<R>,
{
    let Some(found) = store.fetch(&key).await? else { return Ok(None) };
    let record: R = decode(&key, &found)?;
    match T::try_from(record) {
        Ok(value) => Ok(Some(Loaded { key, version: found.version, value })),
        Err(_) => Err(StoreError::Damaged { key }),
    }
}

/// A value that is stored as its text: ids and digests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Text<T>(pub T);

impl<T: fmt::Display> Serialize for Text<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&self.0)
    }
}

impl<'de, T: FromStr> Deserialize<'de> for Text<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = <std::borrow::Cow<'de, str>>::deserialize(deserializer)?;
        text.parse().map(Text).map_err(|_| D::Error::custom("malformed text"))
    }
}

/// A time, stored as milliseconds since the epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Millis(i64);

impl From<Timestamp> for Millis {
    fn from(time: Timestamp) -> Self {
        Self(time.as_millis())
    }
}

impl From<Millis> for Timestamp {
    fn from(millis: Millis) -> Self {
        Timestamp::from_millis(millis.0)
    }
}

/// Sealed bytes, stored as base64.
#[derive(Clone, PartialEq, Eq)]
pub struct SealedBytes(pub Vec<u8>);

impl fmt::Debug for SealedBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SealedBytes({} bytes)", self.0.len())
    }
}

impl Serialize for SealedBytes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        use base64::Engine;
        serializer.serialize_str(&base64::engine::general_purpose::STANDARD.encode(&self.0))
    }
}

impl<'de> Deserialize<'de> for SealedBytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        use base64::Engine;
        let text = <std::borrow::Cow<'de, str>>::deserialize(deserializer)?;
        base64::engine::general_purpose::STANDARD
            .decode(text.as_bytes())
            .map(SealedBytes)
            .map_err(D::Error::custom)
    }
}
