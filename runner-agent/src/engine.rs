//! The terraform (or OpenTofu) of this host: where it is and which version it says it is.

use std::env;
use std::io;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use tokio::process::Command;

#[derive(Debug, Clone)]
pub(crate) struct Engine {
    pub(crate) path: PathBuf,
    pub(crate) name: &'static str,
    pub(crate) version: String,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error(
        "find terraform or tofu on PATH: install one \
         (https://developer.hashicorp.com/terraform/install or https://opentofu.org/docs/intro/install/), \
         or name it with --terraform"
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
}

#[derive(Deserialize)]
struct VersionAnswer {
    terraform_version: String,
}

impl Engine {
    /// Finds the engine, and asks it once.
    pub(crate) async fn find(configured: Option<&Path>) -> Result<Self, Error> {
        let path = match configured {
            Some(path) => path.to_owned(),
            None => on_path("terraform").or_else(|| on_path("tofu")).ok_or(Error::Missing)?,
        };
        let output = Command::new(&path)
            .args(["version", "-json"])
            .env_clear()
            .envs([("CHECKPOINT_DISABLE", "1"), ("HOME", "/nonexistent")])
            .env("PATH", env::var_os("PATH").unwrap_or_default())
            .output()
            .await
            .map_err(|source| Error::Start { path: path.clone(), source })?;
        let answer: VersionAnswer = serde_json::from_slice(&output.stdout)
            .map_err(|_| Error::Version { path: path.clone() })?;
        let name = if is_tofu(&path) { "tofu" } else { "terraform" };
        Ok(Self { path, name, version: answer.terraform_version })
    }
}

/// Tells OpenTofu by the name of its program.
pub(crate) fn is_tofu(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name.to_string_lossy().contains("tofu"))
}

fn on_path(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH")?;
    env::split_paths(&path).map(|dir| dir.join(name)).find(|file| file.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_engine_of_this_host_answers() {
        let engine = Engine::find(None).await.expect("terraform must be installed for the tests");
        assert!(engine.version.starts_with("1."), "{engine:?}");
    }

    #[tokio::test]
    async fn another_program_is_no_engine() {
        let found = Engine::find(Some(Path::new("/bin/true"))).await;
        assert!(matches!(found, Err(Error::Version { .. })), "{found:?}");
    }
}
