//! How much of the host one process of a job may take.
//!
//! There is no limit for the size of files: terraform's output is one, and it must not die of it.

use std::io;
use std::str::FromStr;

use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit, setrlimit};
use serde::{Deserialize, Serialize};

/// A limit that is not given stays as the host has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Limits {
    /// Open files of one process.
    pub(crate) nofile: Option<u64>,
    /// Processes and threads of the runner's user, all jobs together.
    pub(crate) nproc: Option<u64>,
    /// Address space of one process, in bytes. Go programs reserve far more than they use.
    #[serde(rename = "as")]
    pub(crate) address_space: Option<u64>,
}

impl Default for Limits {
    /// Stops what runs away, and no provider.
    fn default() -> Self {
        Self { nofile: Some(65_536), nproc: Some(16_384), address_space: None }
    }
}

/// One `name=value` of `--job-limit`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Limit {
    name: Name,
    value: Option<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Name {
    Nofile,
    Nproc,
    AddressSpace,
}

#[derive(Debug, thiserror::Error)]
#[error("use the limit {0:?}: it is nofile, nproc or as, =, and a number or unlimited")]
pub(crate) struct Malformed(String);

impl FromStr for Limit {
    type Err = Malformed;

    fn from_str(text: &str) -> Result<Self, Malformed> {
        let malformed = || Malformed(text.to_owned());
        let (name, value) = text.split_once('=').ok_or_else(malformed)?;
        let name = match name.trim() {
            "nofile" => Name::Nofile,
            "nproc" => Name::Nproc,
            "as" => Name::AddressSpace,
            _ => return Err(malformed()),
        };
        let value = match value.trim() {
            "unlimited" => None,
            number => Some(bytes(number).filter(|value| *value > 0).ok_or_else(malformed)?),
        };
        Ok(Self { name, value })
    }
}

fn bytes(text: &str) -> Option<u64> {
    let (number, unit) = match text.char_indices().next_back()? {
        (at, 'k' | 'K') => (&text[..at], 1 << 10),
        (at, 'm' | 'M') => (&text[..at], 1 << 20),
        (at, 'g' | 'G') => (&text[..at], 1 << 30),
        _ => (text, 1),
    };
    number.parse::<u64>().ok()?.checked_mul(unit)
}

impl Limits {
    /// Answers the defaults with these in their place.
    pub(crate) fn with(given: &[Limit]) -> Self {
        let mut limits = Self::default();
        for Limit { name, value } in given {
            match name {
                Name::Nofile => limits.nofile = *value,
                Name::Nproc => limits.nproc = *value,
                Name::AddressSpace => limits.address_space = *value,
            }
        }
        limits
    }

    /// Sets the limits of a process and of all it will start. What the host limits further stays.
    pub(super) fn set(self, process: Pid) {
        let all = [
            (Resource::Nofile, self.nofile),
            (Resource::Nproc, self.nproc),
            (Resource::As, self.address_space),
            (Resource::Core, Some(0)),
        ];
        for (resource, value) in all {
            let Some(value) = value else { continue };
            let value = getrlimit(resource).maximum.map_or(value, |hard| hard.min(value));
            let new = Rlimit { current: Some(value), maximum: Some(value) };
            if let Err(error) = prlimit(Some(process), resource, new) {
                tracing::warn!(%error, ?resource, "failed to limit a process of the job");
            }
        }
    }
}

/// Lets this process open as many files as the host allows: what it must not run out of is the
/// way for terraform's state.
pub(super) fn raise_open_files() -> io::Result<()> {
    let maximum = getrlimit(Resource::Nofile).maximum;
    Ok(setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum })?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_parsed_over_the_defaults() {
        let given = ["nofile=1024", "as=8g", "nproc=unlimited"].map(|text| text.parse().unwrap());
        let limits = Limits::with(&given);
        let expect = Limits { nofile: Some(1024), nproc: None, address_space: Some(8 << 30) };
        assert_eq!(limits, expect);
        for bad in ["", "nofile", "core=1", "fsize=1", "as=-1", "as=0", "as=1t", "as=99999999999g"]
        {
            assert!(bad.parse::<Limit>().is_err(), "{bad}");
        }
    }
}
