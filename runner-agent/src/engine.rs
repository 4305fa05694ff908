//! The engines of this host, terraform and OpenTofu: which are found, which may be installed, and
//! which one a job gets.
//!
//! A job that names an engine and a version gets exactly that or none. What is found on PATH, or
//! where `--terraform` says, comes first; then what the cache has; then the mirror.

mod archive;
mod arguments;
mod at_hand;
mod cache;
mod checksum;
mod mirror;
mod release;
mod version;

use std::io;
use std::path::{Path, PathBuf};

use latchkey_proto::v1;

pub(crate) use self::arguments::{EngineArguments, EngineSettings, Error as ArgumentError};
pub use self::at_hand::at_hand;
pub(crate) use self::release::{Name, target};
pub(crate) use self::version::GiveUp;

use self::arguments::Installing;
use self::cache::{Cache, Installed, Source};
use self::release::Release;
use crate::supervisor::confine::Confinement;

/// What a control plane is told, at most.
const MOST_TOLD: usize = 8;

/// The version of an engine that may be installed in any.
const ANY: &str = "*";

#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error(
        "find terraform or tofu on PATH, and --no-engine-install forbids to install one: install \
         it (https://developer.hashicorp.com/terraform/install or \
         https://opentofu.org/docs/intro/install/), or name it with --terraform"
    )]
    Missing,
    #[error("ask {path} for its version")]
    Start {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("ask {path} for its version: it answered something else")]
    Version { path: PathBuf },
    #[error("ask {path} for its version: it was silent for too long")]
    Silent { path: PathBuf },
}

/// Why a job does not get its engine.
#[derive(Debug, thiserror::Error)]
#[error("install {release} from {mirror}")]
pub(crate) struct InstallError {
    release: Release,
    mirror: String,
    #[source]
    source: Box<cache::Error>,
}

impl InstallError {
    /// Tells a fault of this host from one of the job or the mirror's content.
    pub(crate) fn is_of_this_host(&self) -> bool {
        self.source.is_of_this_host()
    }
}

/// An engine that was found, and what it says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Engine {
    pub(crate) path: PathBuf,
    pub(crate) name: Name,
    pub(crate) version: String,
}

/// All engines of this host.
#[derive(Debug)]
pub(crate) struct Engines {
    /// At most one of each; the first is the runner's own.
    found: Vec<Engine>,
    cache: Cache,
    settings: EngineSettings,
}

impl Engine {
    /// Asks the program at `path` who it is, confined as a job's. Blocks until it answers, or a
    /// minute, or nobody waits any more.
    pub(crate) fn ask(
        path: PathBuf,
        confinement: &Confinement,
        give_up: &GiveUp,
    ) -> Result<Self, Error> {
        let version = version::of(&path, confinement, give_up)?;
        let name = if is_tofu(&path) { Name::Tofu } else { Name::Terraform };
        Ok(Self { path, name, version })
    }
}

impl Engines {
    /// Finds what is there. Blocks for as long as the programs take to answer.
    pub(crate) fn find(settings: EngineSettings, give_up: &GiveUp) -> Result<Self, Error> {
        let mut found = Vec::new();
        if let Some(path) = &settings.terraform {
            found.push(Engine::ask(path.clone(), &settings.confinement, give_up)?);
        }
        for name in Name::ALL {
            if found.iter().any(|engine| engine.name == name) {
                continue;
            }
            let Some(path) = settings.on_path(name) else { continue };
            match Engine::ask(path, &settings.confinement, give_up) {
                Ok(engine) => found.push(engine),
                // A wrapper that wants a project's directory, perhaps. There may be others.
                Err(error) => {
                    let error = &error as &dyn std::error::Error;
                    tracing::warn!(error, "an engine on PATH is not used");
                }
            }
        }
        let engines = Self { found, ..Self::without_looking(settings) };
        let may_install = engines.settings.installing == Installing::Allowed;
        if !may_install && engines.to_wire().is_empty() {
            return Err(Error::Missing);
        }
        Ok(engines)
    }

    /// Takes only what is installed or may be.
    pub(crate) fn without_looking(settings: EngineSettings) -> Self {
        let cache = Cache::new(settings.cache.clone(), settings.confinement.clone());
        Self { found: Vec::new(), cache, settings }
    }

    /// Says what this host can run: what it has, what it may install, what it has installed.
    pub(crate) fn to_wire(&self) -> Vec<v1::Engine> {
        let engine = |name: Name, version: &str| v1::Engine {
            name: name.program().into(),
            version: version.into(),
        };
        let mut all: Vec<_> =
            self.found.iter().map(|found| engine(found.name, &found.version)).collect();
        let own = self.choose(None, "").ok();
        all.extend(own.map(|own| engine(own.name, &own.version)));
        if self.settings.installing == Installing::Allowed {
            all.extend(Name::ALL.map(|name| engine(name, ANY)));
        }
        let installed = Name::ALL.iter().flat_map(|name| self.cache.list(*name));
        all.extend(installed.map(|release| engine(release.name, release.version.as_str())));
        let mut told: Vec<v1::Engine> = Vec::new();
        for engine in all {
            if !told.contains(&engine) && told.len() < MOST_TOLD {
                told.push(engine);
            }
        }
        told
    }

    /// Chooses the engine for a job; its path may have to be filled by [`Engines::provide`].
    /// Answers why there is none, for people.
    pub(crate) fn choose(&self, name: Option<Name>, version: &str) -> Result<Engine, String> {
        let fits = |name: Option<Name>, engine: &Engine| {
            name.is_none_or(|name| engine.name == name)
                && (version.is_empty() || engine.version == version)
        };
        if let Some(engine) = self.found.iter().find(|engine| fits(name, engine)) {
            return Ok(engine.clone());
        }
        let release = if version.is_empty() {
            self.default_of(name)?
        } else {
            let own = self.found.first().map_or(self.settings.default.name, |found| found.name);
            let version = version.parse().map_err(|error| format!("failed to {error}"))?;
            Release { name: name.unwrap_or(own), version }
        };
        let installed = || self.cache.path(&release).is_file();
        if self.settings.installing == Installing::Forbidden && !installed() {
            return Err(format!(
                "the run needs {release}; this runner has {} and installs nothing \
                 (--no-engine-install)",
                self.names()
            ));
        }
        let path = self.cache.path(&release);
        let (name, version) = (release.name, release.version.as_str().to_owned());
        Ok(Engine { path, name, version })
    }

    /// Makes sure that the chosen engine is there and undamaged; installs it when it is not, and
    /// then answers what to say in the job's log. Blocks, perhaps for minutes.
    pub(crate) fn provide(
        &self,
        name: Name,
        version: &str,
        path: &Path,
    ) -> Result<Option<String>, InstallError> {
        // What was found is the host's own affair.
        let release = version.parse().ok().map(|version| Release { name, version });
        let Some(release) = release.filter(|release| self.cache.path(release) == path) else {
            return Ok(None);
        };
        let mirror = self.settings.mirror(name);
        let installed = match self.settings.installing {
            Installing::Allowed => {
                let pin = self.settings.pin(&release);
                self.cache.install(&release, Source { mirror: &mirror, pin: pin.as_ref() })
            }
            Installing::Forbidden if self.cache.has(&release) => Ok(Installed::Before),
            Installing::Forbidden => Err(cache::Error::Forbidden),
        };
        match installed {
            Ok(Installed::Before) => Ok(None),
            Ok(Installed::Now) => {
                tracing::info!(%release, %mirror, "installed an engine");
                Ok(Some(format!("{release} was installed from {mirror}")))
            }
            Err(source) => {
                let (mirror, source) = (mirror.to_string(), Box::new(source));
                Err(InstallError { release, mirror, source })
            }
        }
    }

    /// The release for a job that names no version and for which none was found.
    fn default_of(&self, name: Option<Name>) -> Result<Release, String> {
        let default = &self.settings.default;
        let may_be =
            self.settings.installing == Installing::Allowed || self.cache.path(default).is_file();
        if may_be && name.is_none_or(|name| name == default.name) {
            return Ok(default.clone());
        }
        let wanted = name.unwrap_or(default.name);
        self.cache.list(wanted).into_iter().next().ok_or_else(|| {
            format!(
                "the run needs {wanted} and names no version; this runner has {}: give the \
                 version, or start the runner with --engine-default-version {wanted}@VERSION",
                self.names()
            )
        })
    }

    /// Names what there is, for people.
    pub(crate) fn names(&self) -> String {
        let found = self.found.iter().map(|engine| format!("{} {}", engine.name, engine.version));
        let installed = Name::ALL.iter().flat_map(|name| self.cache.list(*name));
        let names: Vec<_> = found.chain(installed.map(|release| release.to_string())).collect();
        if names.is_empty() { "no engine".into() } else { names.join(", ") }
    }
}

/// Tells OpenTofu by the name of its program.
pub(crate) fn is_tofu(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name.to_string_lossy().contains("tofu"))
}

#[cfg(test)]
pub(crate) use self::archive::tests::packed as archive_of_tests;
#[cfg(test)]
pub(crate) use self::mirror::tests::Server as MirrorOfTests;

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// The engine of the tests, as a runner finds it.
    pub(crate) fn at_hand_engine() -> Engine {
        let path = at_hand().expect("the tests need a real engine");
        Engine::ask(path, &Confinement::default(), &GiveUp::default()).unwrap()
    }

    pub(crate) fn engines(found: &[(Name, &str)], more: &[&str]) -> (tempfile::TempDir, Engines) {
        let dir = tempfile::tempdir().unwrap();
        let found = found.iter().map(|(name, version)| Engine {
            path: Path::new("/found").join(name.program()),
            name: *name,
            version: (*version).to_owned(),
        });
        let settings = EngineSettings::of(more, dir.path());
        let cache = Cache::new(settings.cache.clone(), Confinement::default());
        (dir, Engines { found: found.collect(), cache, settings })
    }

    #[test]
    fn the_engine_of_this_host_answers() {
        let engine = at_hand_engine();
        assert!(engine.version.starts_with("1."), "{engine:?}");
    }

    #[test]
    fn another_program_is_no_engine() {
        let found = Engine::ask("/bin/true".into(), &Confinement::default(), &GiveUp::default());
        assert!(matches!(found, Err(Error::Version { .. })), "{found:?}");
    }

    #[test]
    fn a_job_gets_what_it_asks_for_or_a_reason() {
        use Name::{Terraform, Tofu};
        let both: &[(Name, &str)] = &[(Terraform, "1.11.4"), (Tofu, "1.9.0")];
        let check = |found: &[(Name, &str)], more: &[&str], name, version: &str, expect: &str| {
            let (dir, engines) = engines(found, more);
            let chosen = match engines.choose(name, version) {
                Ok(engine) => {
                    let path = engine.path.display().to_string();
                    path.replace(&dir.path().display().to_string(), "")
                }
                Err(reason) => reason,
            };
            assert!(chosen.contains(expect), "{name:?} {version}: {chosen}");
        };
        let never = "--no-engine-install";
        check(both, &[], None, "", "/found/terraform");
        check(both, &[], Some(Tofu), "", "/found/tofu");
        check(both, &[], None, "1.9.0", "/found/tofu");
        check(both, &[], Some(Terraform), "1.9.0", "/engines/terraform/1.9.0/terraform");
        check(both, &[], None, "1.10.1", "/engines/terraform/1.10.1/terraform");
        check(both, &[never], None, "1.10.1", "the run needs terraform 1.10.1");
        check(both, &[], None, "../../x", "no exact version");
        check(&[], &[], None, "", "/engines/terraform/1.11.4/terraform");
        let of_tofu = ["--engine-default-version", "tofu@1.9.1"];
        check(&[], &of_tofu, None, "", "/engines/tofu/1.9.1/tofu");
        check(&[], &of_tofu, Some(Terraform), "", "names no version");
        check(&both[..1], &of_tofu, Some(Tofu), "", "/engines/tofu/1.9.1/tofu");
    }

    #[test]
    fn a_control_plane_is_told_what_there_is_and_what_may_be() {
        let told = |found: &[(Name, &str)], more: &[&str]| {
            let (_dir, engines) = engines(found, more);
            let all = engines.to_wire().into_iter();
            all.map(|engine| format!("{} {}", engine.name, engine.version)).collect::<Vec<_>>()
        };
        let found = [(Name::Terraform, "1.10.0")];
        assert_eq!(told(&found, &[]), ["terraform 1.10.0", "terraform *", "tofu *"]);
        assert_eq!(told(&found, &["--no-engine-install"]), ["terraform 1.10.0"]);
        assert_eq!(told(&[], &[]), ["terraform 1.11.4", "terraform *", "tofu *"]);
    }
}
