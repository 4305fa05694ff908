//! The points as test programs have them.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

use rustix::process::{Signal, getpid, kill_process};

/// A pause that nobody ends must not hang a test for ever.
const LONGEST_PAUSE: u32 = 30_000;

static DIRECTORY: OnceLock<PathBuf> = OnceLock::new();
/// How often this process came by each point since a test laid something there.
static HITS: Mutex<Option<HashMap<&'static str, u32>>> = Mutex::new(None);

/// Takes the directory from the environment. Called by test programs only.
pub fn arm() {
    if let Some(directory) = std::env::var_os(crate::VARIABLE) {
        // A second call changes nothing.
        let _ = DIRECTORY.set(directory.into());
    }
}

/// Says whether [`arm`] found a directory: what is rare by its size can then be made frequent.
pub fn is_armed() -> bool {
    DIRECTORY.get().is_some()
}

/// Comes by a point.
pub fn reach(name: &'static str) {
    let Some((directory, action)) = due(name) else { return };
    match action.as_str() {
        "kill" if fire(directory, name) => {
            let _ = kill_process(getpid(), Signal::KILL);
            // It has come before anything else can happen.
            loop {
                std::thread::park();
            }
        }
        "pause" if fire(directory, name) => {
            let go = directory.join(format!("{name}.go"));
            for _ in 0..LONGEST_PAUSE {
                if go.exists() {
                    return;
                }
                std::thread::park_timeout(Duration::from_millis(1));
            }
        }
        _ => {}
    }
}

/// Comes by a point that can fail.
///
/// # Errors
///
/// When a test wants it to.
pub fn check(name: &'static str) -> io::Result<()> {
    match due(name) {
        Some((directory, action)) if action == "enospc" => {
            let _ = fs::write(directory.join(format!("{name}.fired")), "");
            Err(rustix::io::Errno::NOSPC.into())
        }
        Some(_) | None => {
            reach(name);
            Ok(())
        }
    }
}

/// Says whether a defect is planted.
pub fn defect(name: &'static str) -> bool {
    let Some(directory) = DIRECTORY.get() else { return false };
    let planted = directory.join(format!("defect.{name}")).exists();
    if planted {
        let _ = fs::write(directory.join(format!("defect.{name}.fired")), "");
    }
    planted
}

/// How many milliseconds the wall clock is made to be off.
pub fn clock_offset() -> i64 {
    let Some(directory) = DIRECTORY.get() else { return 0 };
    let text = fs::read_to_string(directory.join("clock")).unwrap_or_default();
    text.trim().parse().unwrap_or(0)
}

/// Answers what was laid here, if this is the time for it.
fn due(name: &'static str) -> Option<(&'static Path, String)> {
    let directory = DIRECTORY.get()?;
    let text = fs::read_to_string(directory.join(name)).ok()?;
    let (action, wanted) = text.trim().split_once(' ')?;
    let wanted: u32 = wanted.parse().ok()?;
    let mut hits = HITS.lock().unwrap_or_else(PoisonError::into_inner);
    let hit = hits.get_or_insert_default().entry(name).or_default();
    *hit += 1;
    (*hit >= wanted).then(|| (directory.as_path(), action.to_owned()))
}

/// Takes what was laid, so that it happens once; false when another process was faster.
fn fire(directory: &Path, name: &str) -> bool {
    let fired = directory.join(format!("{name}.fired"));
    let mut hits = HITS.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(hits) = hits.as_mut() {
        hits.retain(|known, _| *known != name);
    }
    fs::rename(directory.join(name), fired).is_ok()
}
