//! Which digest an archive must have: what the mirror's list says and, where one is pinned, what
//! the operator or this program says. The list comes from where the archive comes from; only a
//! pinned digest protects from a mirror that lies.

use std::str::FromStr;

use super::release::{Malformed, Release, target};

/// Digests of the publishers' own archives.
const BUILT_IN: &[(&str, &str, &str)] = &[
    (
        "terraform@1.11.4",
        "linux_amd64",
        "1ce994251c00281d6845f0f268637ba50c0005657eb3cf096b92f753b42ef4dc",
    ),
    (
        "terraform@1.11.4",
        "linux_arm64",
        "a43d1d0da9b9bab214a8305a39db0e40869572594ccf50c416a7756499143633",
    ),
];

#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("understand the checksum {0:?}: it must be NAME@VERSION=SHA256")]
    Form(String),
    #[error(transparent)]
    Release(#[from] Malformed),
}

/// SHA-256 as lower-case hex.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Sha256(String);

impl Sha256 {
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let good = text.len() == 64 && text.bytes().all(|b| b.is_ascii_hexdigit());
        good.then(|| Self(text.to_ascii_lowercase()))
    }

    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

/// A digest that the operator vouches for: that of a release's archive for this kind of machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Pin {
    pub(crate) release: Release,
    pub(crate) archive: Sha256,
}

impl FromStr for Pin {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let form = || Error::Form(text.to_owned());
        let (release, digest) = text.split_once('=').ok_or_else(form)?;
        let archive = Sha256::parse(digest).ok_or_else(form)?;
        Ok(Self { release: release.parse()?, archive })
    }
}

/// Answers the digest that this program knows of the publisher's archive.
pub(crate) fn built_in(release: &Release) -> Option<Sha256> {
    let wanted = format!("{}@{}", release.name, release.version.as_str());
    let target = target();
    let known = BUILT_IN.iter().find(|(name, on, _)| *name == wanted && *on == target);
    known.and_then(|(_, _, digest)| Sha256::parse(digest))
}

/// Finds a file in the text of a `SHA256SUMS`.
pub(crate) fn listed(sums: &[u8], file: &str) -> Option<Sha256> {
    let text = String::from_utf8_lossy(sums);
    text.lines().find_map(|line| {
        let (digest, name) = line.trim().split_once([' ', '\t'])?;
        // A star marks a file that was read as bytes.
        let name = name.trim_start().trim_start_matches('*');
        (name == file).then(|| Sha256::parse(digest)).flatten()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_is_read_as_sha256sum_writes_it() {
        let digest = "ab".repeat(32);
        let list = format!(
            "{0}  other.zip\nnonsense\n{1}  a.zip\n{0} *b.zip\n",
            "cd".repeat(32),
            digest.to_uppercase()
        );
        assert_eq!(listed(list.as_bytes(), "a.zip").unwrap().as_str(), digest);
        assert_eq!(listed(list.as_bytes(), "b.zip").unwrap().as_str(), "cd".repeat(32));
        for absent in ["zip", "nonsense", "c.zip", ""] {
            assert_eq!(listed(list.as_bytes(), absent), None, "{absent}");
        }
    }

    #[test]
    fn what_is_built_in_is_well_formed() {
        for (release, _, digest) in BUILT_IN {
            assert!(format!("{release}={digest}").parse::<Pin>().is_ok(), "{release}");
        }
        for bad in ["terraform@1.11.4", "terraform@1.11.4=ab", "terraform=ab", "x@1.0.0=ab"] {
            assert!(bad.parse::<Pin>().is_err(), "{bad}");
        }
    }
}
