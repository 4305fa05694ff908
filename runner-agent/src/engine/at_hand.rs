//! The engine for trying Latchkey out and for its tests: that of the host, else one that the
//! runner's own installer brings, once, into the user's cache.

use std::env;
use std::ffi::OsString;
use std::io::Write;
use std::path::PathBuf;

use anyhow::Context;

use super::Engines;
use super::arguments::{DEFAULT, EngineSettings, Installing, parse_mirror};
use super::mirror::Mirror;
use super::release::{Name, Release};
use crate::supervisor::confine::Confinement;

/// Another mirror, for whoever cannot reach the publisher's.
const MIRROR: &str = "LATCHKEY_ENGINE_MIRROR";

/// Finds terraform or tofu on PATH, else installs a pinned terraform into `$XDG_CACHE_HOME` or
/// `~/.cache`, from the publisher or from `$LATCHKEY_ENGINE_MIRROR`. Blocks meanwhile.
///
/// # Errors
///
/// Fails when there is none and none can be installed.
pub fn at_hand() -> anyhow::Result<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let on_path = |name: Name| {
        let mut files = env::split_paths(&path).map(|dir| dir.join(name.program()));
        files.find(|file| file.is_file())
    };
    match Name::ALL.into_iter().find_map(on_path) {
        Some(found) => Ok(found),
        None => {
            let mirrors = match env::var(MIRROR) {
                Ok(text) => {
                    parse_mirror(&text).with_context(|| format!("failed to use ${MIRROR}"))?
                }
                Err(_) => Vec::new(),
            };
            install(mirrors, user_cache()?.join("latchkey/engines"))
        }
    }
}

fn install(mirrors: Vec<(Name, Mirror)>, cache: PathBuf) -> anyhow::Result<PathBuf> {
    let release: Release = DEFAULT.parse().context("failed to read our own default")?;
    let settings = EngineSettings {
        terraform: None,
        path: OsString::new(),
        mirrors,
        default: release.clone(),
        pins: Vec::new(),
        cache,
        installing: Installing::Allowed,
        confinement: Confinement::default(),
    };
    let mirror = settings.mirror(release.name);
    let engines = Engines::without_looking(settings);
    let engine = engines.choose(None, "").map_err(anyhow::Error::msg)?;
    if !engine.path.is_file() {
        // Nobody may be there to read it.
        let _ = writeln!(
            std::io::stderr(),
            "There is neither terraform nor tofu on PATH: {release} is installed once from \
             {mirror} into {}",
            engine.path.display()
        );
    }
    let provided = engines.provide(engine.name, &engine.version, &engine.path);
    provided.with_context(|| {
        format!(
            "there is neither terraform nor tofu on PATH, and none could be installed. Install \
             one (https://developer.hashicorp.com/terraform/install or \
             https://opentofu.org/docs/intro/install/), or name a mirror or a directory in \
             ${MIRROR} (deploy/ENGINES.md)"
        )
    })?;
    Ok(engine.path)
}

fn user_cache() -> anyhow::Result<PathBuf> {
    let named = |name: &str| env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    named("XDG_CACHE_HOME")
        .or_else(|| Some(named("HOME")?.join(".cache")))
        .context("failed to find the user's cache: neither XDG_CACHE_HOME nor HOME is set")
}

#[cfg(test)]
mod tests {
    use super::super::{MirrorOfTests, archive_of_tests};
    use super::*;

    #[test]
    fn an_engine_is_installed_once_for_whoever_has_none() {
        let (mirror, cache) = (MirrorOfTests::start(), tempfile::tempdir().unwrap());
        let program = b"#!/bin/sh\necho '{\"terraform_version\":\"1.11.4\"}'\n";
        mirror.put_release(DEFAULT, archive_of_tests(&[("terraform", program)]));
        let mirrors = parse_mirror(&mirror.base).unwrap();
        for _ in 0..2 {
            let path = install(mirrors.clone(), cache.path().to_owned()).unwrap();
            assert_eq!(path, cache.path().join("terraform/1.11.4/terraform"));
            assert_eq!(std::fs::read(path).unwrap(), program);
        }
        assert_eq!(mirror.downloads(DEFAULT), 1);

        let nowhere = parse_mirror("http://127.0.0.1:1").unwrap();
        let empty = tempfile::tempdir().unwrap();
        let error = install(nowhere, empty.path().to_owned()).unwrap_err();
        let error = format!("{error:#}");
        for part in ["https://opentofu.org", MIRROR, "terraform 1.11.4 from http://127.0.0.1:1"] {
            assert!(error.contains(part), "{error}");
        }
    }
}
