//! The engine for trying Latchkey out and for its tests: that of the host, else one that the
//! runner's own installer brings, once, into the user's cache.

use std::env;
use std::ffi::OsString;
use std::io::Write;
use std::path::PathBuf;

use anyhow::Context;

use super::Engines;
use super::arguments::{DEFAULT, EngineSettings, Installing, parse_mirror};
use super::release::{Name, Release};

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
        None => install(),
    }
}

fn install() -> anyhow::Result<PathBuf> {
    let mirrors = match env::var(MIRROR) {
        Ok(text) => parse_mirror(&text).with_context(|| format!("failed to use ${MIRROR}"))?,
        Err(_) => Vec::new(),
    };
    let release: Release = DEFAULT.parse().context("failed to read our own default")?;
    let settings = EngineSettings {
        terraform: None,
        path: OsString::new(),
        mirrors,
        default: release.clone(),
        pins: Vec::new(),
        cache: user_cache()?.join("latchkey/engines"),
        installing: Installing::Allowed,
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
