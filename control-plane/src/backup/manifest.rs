//! What a backup says of itself: enough to tell a whole one from a damaged one, and ours from one
//! that somebody made up, without opening anything sealed.

use std::fs;
use std::io;
use std::path::Path;

use latchkey_domain::id::Generation;
use latchkey_domain::time::Timestamp;
use serde::{Deserialize, Serialize};
use subtle::ConstantTimeEq;

use crate::auth::sha256;
use crate::durable;
use crate::seal::MasterKey;
use crate::store::Version;

/// The format written here. A larger number is from a newer Latchkey.
pub(super) const FORMAT: u32 = 2;

pub(super) const NAME: &str = "manifest.json";
pub(super) const DIGEST: &str = "manifest.sha256";
pub(super) const MAC: &str = "manifest.mac";

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    pub format: u32,
    /// Version of the program that wrote it.
    pub program: String,
    pub generation: u64,
    /// The version that all records are as of.
    pub version: u64,
    /// RFC 3339, UTC.
    pub time: String,
    pub records: Sum,
    pub files: Sum,
}

/// How much there is, and the digest of the file that says it all.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sum {
    pub count: u64,
    pub bytes: u64,
    pub sha256: String,
}

/// Why a manifest is not one.
#[derive(Debug)]
pub(super) enum Unusable {
    Io(io::Error),
    /// What about it, and why.
    Damaged(&'static str, String),
    Newer(u32),
    /// Nobody who has this master key wrote it.
    Foreign,
}

impl Manifest {
    pub(super) fn new(
        generation: Generation,
        version: Version,
        now: Timestamp,
        records: Sum,
        files: Sum,
    ) -> Self {
        let time = jiff::Timestamp::from_millisecond(now.as_millis())
            .map_or_else(|_| String::new(), |time| time.to_string());
        Self {
            format: FORMAT,
            program: env!("CARGO_PKG_VERSION").to_owned(),
            generation: generation.get(),
            version: version.get(),
            time,
            records,
            files,
        }
    }

    pub(super) fn write(&self, directory: &Path, master: &MasterKey) -> io::Result<()> {
        let mut text = serde_json::to_vec_pretty(self)?;
        text.push(b'\n');
        let digest = format!("{}  {NAME}\n", sha256(&text));
        durable::replace(&directory.join(DIGEST), digest.as_bytes())?;
        let mac = format!("{}\n", mac(master, &text));
        durable::replace(&directory.join(MAC), mac.as_bytes())?;
        durable::replace(&directory.join(NAME), &text)
    }

    /// Reads a manifest that is whole, and that somebody with the master key wrote: a digest
    /// alone could be anybody's.
    pub(super) fn read(directory: &Path, master: &MasterKey) -> Result<Self, Unusable> {
        let text = fs::read(directory.join(NAME)).map_err(Unusable::Io)?;
        let manifest: Manifest = serde_json::from_slice(&text)
            .map_err(|error| Unusable::Damaged(NAME, format!("is malformed ({error})")))?;
        if manifest.format > FORMAT {
            return Err(Unusable::Newer(manifest.format));
        }
        let digest = fs::read_to_string(directory.join(DIGEST)).map_err(Unusable::Io)?;
        if digest.split_whitespace().next() != Some(sha256(&text).to_string().as_str()) {
            return Err(Unusable::Damaged(NAME, format!("has not the digest that {DIGEST} says")));
        }
        let found = fs::read_to_string(directory.join(MAC)).map_err(Unusable::Io)?;
        let expected = mac(master, &text);
        match bool::from(found.trim_end().as_bytes().ct_eq(expected.as_bytes())) {
            true => Ok(manifest),
            false => Err(Unusable::Foreign),
        }
    }
}

fn mac(master: &MasterKey, text: &[u8]) -> String {
    hex::encode(master.digest(b"backup manifest", text))
}
