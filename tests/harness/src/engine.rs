//! The terraform (or OpenTofu) of this host. The main stories are told with a real one; a
//! missing one is a failure that says what to install, never a silent pass.

use std::env;
use std::path::PathBuf;

/// Says what to do when there is none.
pub const MISSING: &str = "there is neither terraform nor tofu on PATH. Install one: \
    https://developer.hashicorp.com/terraform/install or \
    https://opentofu.org/docs/intro/install/";

/// Finds `terraform`, else `tofu`.
pub fn find() -> anyhow::Result<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let on_path = |name: &str| {
        env::split_paths(&path).map(|directory| directory.join(name)).find(|file| file.is_file())
    };
    on_path("terraform").or_else(|| on_path("tofu")).ok_or_else(|| anyhow::anyhow!(MISSING))
}
