//! The terraform (or OpenTofu) of this host. The main stories are told with a real one: that on
//! PATH, else one that the runner's own installer brings, once, into the user's cache.

use std::path::PathBuf;

/// Finds `terraform`, else `tofu`, else installs one; what to do when that fails is in the error.
pub fn find() -> anyhow::Result<PathBuf> {
    latchkey_runner::engine_at_hand()
}
