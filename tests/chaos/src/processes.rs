//! Finding the processes that a runner leaves alone in the world.

use std::fs;
use std::path::Path;

use rustix::process::{Pid, Signal, kill_process};

/// The supervisors of jobs below a directory.
pub(crate) fn supervisors(directory: &Path) -> Vec<Pid> {
    let needle = directory.display().to_string();
    find(|words, _| {
        words.iter().any(|word| word == "supervise")
            && words.last().is_some_and(|word| word.starts_with(&needle))
    })
}

/// Terraform itself, stub or real, at work below a directory.
pub(crate) fn terraforms(directory: &Path) -> Vec<Pid> {
    find(|words, at| {
        words.first().is_some_and(|word| word.ends_with("/terraform")) && at.starts_with(directory)
    })
}

/// Kills them all; answers how many there were.
pub(crate) fn kill(doomed: &[Pid]) -> usize {
    doomed.iter().filter(|pid| kill_process(**pid, Signal::KILL).is_ok()).count()
}

fn find(wanted: impl Fn(&[String], &Path) -> bool) -> Vec<Pid> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    let pids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(|pid: &i32| {
        let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let command = String::from_utf8_lossy(&command).into_owned();
        let words: Vec<String> =
            command.split('\0').filter(|word| !word.is_empty()).map(str::to_owned).collect();
        let at = fs::read_link(format!("/proc/{pid}/cwd")).unwrap_or_default();
        wanted(&words, &at)
    })
    .filter_map(Pid::from_raw)
    .collect()
}
