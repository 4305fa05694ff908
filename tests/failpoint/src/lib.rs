//! Named points where a test can make a process die, wait or fail.
//!
//! Nothing at all unless the feature `enabled` is on, and then still nothing until a program
//! calls [`arm`], as only the test programs do. Armed, a point looks for a file of its name in
//! the armed directory, so that a test can lay and lift faults while processes run, and for
//! processes that are yet to be started:
//!
//! | content of the file | what happens at the `n`-th time the process comes there |
//! |---|---|
//! | `kill N` | SIGKILL of the process, once over all processes |
//! | `pause N` | waits until `NAME.go` appears, once over all processes |
//! | `enospc N` | [`check`] fails, from then on, until the file is removed |
//!
//! `NAME.fired` appears when it does. [`clock_offset`] reads `clock`, [`defect`] looks for
//! `defect.NAME`: a fault planted to show that the tests see it.

#[cfg(feature = "enabled")]
mod armed;
#[cfg(feature = "enabled")]
pub use crate::armed::{arm, check, clock_offset, defect, is_armed, reach};

/// The variable that names the directory.
pub const VARIABLE: &str = "CHAOS_FAILPOINTS";

/// Comes by a point.
#[cfg(not(feature = "enabled"))]
#[inline(always)]
pub fn reach(_name: &'static str) {}

/// Comes by a point that can fail.
///
/// # Errors
///
/// Only when a test wants it to.
#[cfg(not(feature = "enabled"))]
#[inline(always)]
pub fn check(_name: &'static str) -> std::io::Result<()> {
    Ok(())
}

/// Says whether a defect is planted.
#[cfg(not(feature = "enabled"))]
#[inline(always)]
pub fn defect(_name: &'static str) -> bool {
    false
}

/// How many milliseconds the wall clock is made to be off.
#[cfg(not(feature = "enabled"))]
#[inline(always)]
pub fn clock_offset() -> i64 {
    0
}

/// Says whether a test may have laid something.
#[cfg(not(feature = "enabled"))]
#[inline(always)]
pub fn is_armed() -> bool {
    false
}

/// Takes the directory from the environment.
#[cfg(not(feature = "enabled"))]
pub fn arm() {}
