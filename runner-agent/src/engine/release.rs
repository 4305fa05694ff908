//! Which engine, in which version: parsed once, so that a name or a version from elsewhere can
//! never become a path or an address of its own making.

use std::env::consts;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize,
)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Name {
    #[default]
    Terraform,
    Tofu,
}

#[derive(Debug, thiserror::Error)]
#[error("understand {0:?}: it is neither `terraform` nor `tofu`")]
pub(crate) struct UnknownName(String);

#[derive(Debug, thiserror::Error)]
pub(crate) enum Malformed {
    #[error(transparent)]
    Name(#[from] UnknownName),
    #[error("understand {0:?}: it must be NAME@VERSION, as terraform@1.11.4")]
    Form(String),
    #[error("understand {0:?}: it is no exact version, as 1.11.4 is")]
    Version(String),
}

impl Name {
    pub(crate) const ALL: [Self; 2] = [Self::Terraform, Self::Tofu];

    /// Answers the program's name, which is also that of its folder in a cache.
    pub(crate) fn program(self) -> &'static str {
        match self {
            Self::Terraform => "terraform",
            Self::Tofu => "tofu",
        }
    }

    /// Answers where its publisher keeps the releases.
    pub(crate) fn publisher(self) -> &'static str {
        match self {
            Self::Terraform => "https://releases.hashicorp.com/terraform",
            Self::Tofu => "https://github.com/opentofu/opentofu/releases/download",
        }
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.program())
    }
}

impl FromStr for Name {
    type Err = UnknownName;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let named = Self::ALL.into_iter().find(|name| name.program() == text);
        named.ok_or_else(|| UnknownName(text.to_owned()))
    }
}

/// An exact version, without a `v` before it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Version(String);

impl Version {
    const LONGEST: usize = 64;

    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }

    /// Orders releases; what stands behind the three numbers comes before none.
    pub(crate) fn order(&self) -> (Vec<u64>, bool, &str) {
        let end = self.0.find(['-', '+']).unwrap_or(self.0.len());
        let numbers = self.0[..end].split('.').map(|part| part.parse().unwrap_or(0)).collect();
        (numbers, end == self.0.len(), &self.0[end..])
    }
}

impl FromStr for Version {
    type Err = Malformed;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (numbers, more) = match text.find(['-', '+']) {
            Some(at) => (&text[..at], &text[at + 1..]),
            None => (text, "x"),
        };
        let is_number = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
        let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'+');
        let good = text.len() <= Self::LONGEST
            && numbers.split('.').count() == 3
            && numbers.split('.').all(is_number)
            && !more.is_empty()
            && more.bytes().all(plain);
        if good { Ok(Self(text.to_owned())) } else { Err(Malformed::Version(text.to_owned())) }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Release {
    pub(crate) name: Name,
    pub(crate) version: Version,
}

impl Release {
    /// Answers the archive's name for this kind of machine.
    pub(crate) fn archive(&self) -> String {
        format!("{}_{}_{}.zip", self.name, self.version.as_str(), target())
    }

    /// Answers the name of the list of checksums.
    pub(crate) fn sums(&self) -> String {
        format!("{}_{}_SHA256SUMS", self.name, self.version.as_str())
    }

    /// Answers a file's path in a mirror that is laid out as the publisher's.
    pub(crate) fn in_mirror(&self, file: &str) -> String {
        let v = match self.name {
            Name::Terraform => "",
            Name::Tofu => "v",
        };
        format!("{v}{}/{file}", self.version.as_str())
    }
}

impl fmt::Display for Release {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.name, self.version.as_str())
    }
}

impl FromStr for Release {
    type Err = Malformed;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (name, version) = text.split_once('@').ok_or_else(|| Malformed::Form(text.into()))?;
        Ok(Self { name: name.parse()?, version: version.parse()? })
    }
}

/// Names this kind of machine as the publishers and provider packages do.
pub(crate) fn target() -> String {
    let machine = match consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        "x86" => "386",
        other => other,
    };
    format!("{}_{machine}", consts::OS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_exact_versions_are_taken() {
        for good in ["1.11.4", "0.12.31", "1.10.0-beta1", "1.9.0-rc.2", "1.6.0+ent"] {
            assert_eq!(good.parse::<Version>().unwrap().as_str(), good);
        }
        let long = format!("1.0.0-{}", "a".repeat(64));
        for bad in
            ["", "1", "1.2", "v1.2.3", "1.2.3-", "../../etc", "1.2.3-../x", "1.2.3/x", "*", &long]
        {
            assert!(bad.parse::<Version>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_mirror_is_laid_out_as_the_publishers() {
        let terraform: Release = "terraform@1.9.0".parse().unwrap();
        let archive = format!("terraform_1.9.0_{}.zip", target());
        assert_eq!(terraform.in_mirror(&terraform.archive()), format!("1.9.0/{archive}"));
        let tofu: Release = "tofu@1.9.1".parse().unwrap();
        assert_eq!(tofu.in_mirror(&tofu.sums()), "v1.9.1/tofu_1.9.1_SHA256SUMS");
        for bad in ["terraform", "terragrunt@1.0.0", "terraform@latest", "@1.0.0"] {
            assert!(bad.parse::<Release>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_release_comes_after_its_candidates() {
        let order = |text: &str| text.parse::<Version>().unwrap();
        let mut all = ["1.10.0", "1.9.9", "1.10.0-rc1"].map(order);
        all.sort_by(|a, b| a.order().cmp(&b.order()));
        assert_eq!(all.map(|version| version.0), ["1.9.9", "1.10.0-rc1", "1.10.0"]);
    }
}
