//! What the command line says about engines, checked.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::Args;

use super::checksum::{self, Pin, Sha256};
use super::mirror::{self, Mirror};
use super::release::{Malformed, Name, Release, UnknownName};
use crate::supervisor::confine::Confinement;

/// What a host without any engine installs.
pub(super) const DEFAULT: &str = "terraform@1.11.4";

#[derive(Debug, Args)]
pub(crate) struct EngineArguments {
    /// The terraform (or tofu) to run; looked for on PATH by default.
    #[arg(long, env = "LATCHKEY_RUNNER_TERRAFORM", value_name = "PATH")]
    terraform: Option<PathBuf>,
    /// Where engines are installed from, laid out as the publishers' own: an https address, http
    /// on loopback, or a directory; with `terraform=` or `tofu=` before it, for that engine only.
    #[arg(
        long,
        env = "LATCHKEY_RUNNER_ENGINE_MIRROR",
        value_name = "[NAME=]URL-OR-DIR",
        value_delimiter = ','
    )]
    engine_mirror: Vec<String>,
    /// The engine of jobs that name no version, on a host that has none.
    #[arg(long, env = "LATCHKEY_RUNNER_ENGINE_DEFAULT_VERSION", value_name = "NAME@VERSION",
          default_value = DEFAULT)]
    engine_default_version: String,
    /// The digest that an engine's archive must have, whatever its mirror says; may be repeated.
    #[arg(
        long,
        env = "LATCHKEY_RUNNER_ENGINE_CHECKSUM",
        value_name = "NAME@VERSION=SHA256",
        value_delimiter = ','
    )]
    engine_checksum: Vec<String>,
    /// Where installed engines are kept; runners of the same user may share it. In the work
    /// directory by default.
    #[arg(long, env = "LATCHKEY_RUNNER_ENGINE_CACHE", value_name = "DIR")]
    engine_cache: Option<PathBuf>,
    /// Installs no engine: jobs get what is found, or are refused.
    #[arg(long, env = "LATCHKEY_RUNNER_NO_ENGINE_INSTALL")]
    no_engine_install: bool,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("use --engine-mirror")]
    Mirror(#[from] mirror::Malformed),
    #[error("use --engine-mirror")]
    MirrorName(#[from] UnknownName),
    #[error("use --engine-default-version")]
    Default(#[source] Malformed),
    #[error("use --engine-checksum")]
    Checksum(#[from] checksum::Error),
    #[error("find {0} in the present directory")]
    Absolute(PathBuf, #[source] std::io::Error),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Installing {
    Allowed,
    Forbidden,
}

#[derive(Debug, Clone)]
pub(crate) struct EngineSettings {
    pub(super) terraform: Option<PathBuf>,
    /// Where else engines are looked for.
    pub(crate) path: OsString,
    /// The later ones win.
    pub(super) mirrors: Vec<(Name, Mirror)>,
    pub(super) default: Release,
    pub(super) pins: Vec<Pin>,
    pub(crate) cache: PathBuf,
    pub(super) installing: Installing,
    /// Of a program that is asked for its version.
    pub(crate) confinement: Confinement,
}

impl EngineArguments {
    pub(crate) fn check(self, work_dir: &Path) -> Result<EngineSettings, Error> {
        let absolute = |path: PathBuf| {
            std::path::absolute(&path).map_err(|source| Error::Absolute(path, source))
        };
        let mut mirrors = Vec::new();
        for text in &self.engine_mirror {
            mirrors.extend(parse_mirror(text)?);
        }
        let mut pins = Vec::new();
        for text in &self.engine_checksum {
            pins.push(text.parse::<Pin>()?);
        }
        Ok(EngineSettings {
            terraform: self.terraform.map(absolute).transpose()?,
            path: env::var_os("PATH").unwrap_or_default(),
            mirrors,
            default: self.engine_default_version.parse().map_err(Error::Default)?,
            pins,
            cache: absolute(self.engine_cache.unwrap_or_else(|| work_dir.join("engines")))?,
            installing: match self.no_engine_install {
                true => Installing::Forbidden,
                false => Installing::Allowed,
            },
            confinement: Confinement::default(),
        })
    }
}

/// Reads `[NAME=]URL-or-directory`; without a name it serves every engine.
pub(super) fn parse_mirror(text: &str) -> Result<Vec<(Name, Mirror)>, Error> {
    // A directory may have the sign in its name; an address without one begins with its scheme.
    let named = text.split_once('=').filter(|(name, _)| !name.contains(['/', ':']));
    match named {
        Some((name, mirror)) => Ok(vec![(name.parse()?, Mirror::parse(mirror)?)]),
        None => {
            let mirror = Mirror::parse(text)?;
            Ok(Name::ALL.map(|name| (name, mirror.clone())).into())
        }
    }
}

impl EngineSettings {
    /// Answers the file that the host's users run by this name.
    pub(super) fn on_path(&self, name: Name) -> Option<PathBuf> {
        let mut files = env::split_paths(&self.path).map(|dir| dir.join(name.program()));
        files.find(|file| file.is_file())
    }

    /// Lists where engines are that jobs may get.
    pub(crate) fn places(&self) -> Vec<PathBuf> {
        let found = Name::ALL.iter().filter_map(|name| self.on_path(*name));
        found.chain(self.terraform.clone()).chain([self.cache.clone()]).collect()
    }

    pub(super) fn mirror(&self, name: Name) -> Mirror {
        let given = self.mirrors.iter().rev().find(|(of, _)| *of == name);
        given.map(|(_, mirror)| mirror.clone()).unwrap_or_else(|| {
            Mirror::parse(name.publisher()).expect("the publishers' addresses are https")
        })
    }

    /// Answers the digest that a release's archive must have, where one is known.
    pub(super) fn pin(&self, release: &Release) -> Option<Sha256> {
        let given = self.pins.iter().rev().find(|pin| pin.release == *release);
        let given = given.map(|pin| pin.archive.clone());
        // Another mirror may have packed its own archives.
        let is_publishers = !self.mirrors.iter().any(|(name, _)| *name == release.name);
        given.or_else(|| is_publishers.then(|| checksum::built_in(release)).flatten())
    }
}

#[cfg(test)]
impl EngineSettings {
    /// What a command line gives.
    pub(crate) fn of(arguments: &[&str], work_dir: &Path) -> Self {
        use clap::Parser;

        #[derive(Debug, Parser)]
        struct Alone {
            #[command(flatten)]
            engines: EngineArguments,
        }

        let all = std::iter::once("test").chain(arguments.iter().copied());
        Alone::try_parse_from(all).unwrap().engines.check(work_dir).unwrap()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mirror_serves_one_engine_or_all() {
        let of = |arguments: &[&str]| EngineSettings::of(arguments, Path::new("/work"));
        let shown =
            |settings: &EngineSettings| Name::ALL.map(|name| settings.mirror(name).to_string());
        let publishers = Name::ALL.map(|name| name.publisher().to_owned());
        assert_eq!(shown(&of(&[])), publishers);
        let all = of(&["--engine-mirror", "/srv/engines"]);
        assert_eq!(shown(&all), ["/srv/engines", "/srv/engines"]);
        let one = of(&["--engine-mirror", "tofu=https://mirror.example/tofu/"]);
        assert_eq!(shown(&one), [publishers[0].as_str(), "https://mirror.example/tofu"]);
        assert!(parse_mirror("terragrunt=/srv").is_err());
        assert!(parse_mirror("terraform=http://mirror.example").is_err());
    }

    #[test]
    fn the_built_in_digest_is_of_the_publishers_archive_only() {
        let of = |arguments: &[&str]| EngineSettings::of(arguments, Path::new("/work"));
        let release: Release = DEFAULT.parse().unwrap();
        assert_eq!(of(&[]).pin(&release), checksum::built_in(&release));
        assert_eq!(of(&["--engine-mirror", "/srv"]).pin(&release), None);
        let pin = format!("{DEFAULT}={}", "ab".repeat(32));
        let pinned = of(&["--engine-mirror", "/srv", "--engine-checksum", &pin]);
        assert_eq!(pinned.pin(&release).unwrap().as_str(), "ab".repeat(32));
        assert_eq!(of(&[]).cache, Path::new("/work/engines"));
    }
}
