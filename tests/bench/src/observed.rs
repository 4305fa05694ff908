//! What the kernel says of a process, and of files.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Says in a line what was measured on, without naming the machine.
pub(crate) fn machine() -> String {
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let field = |file: &str, name: &str| {
        let text = fs::read_to_string(file).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.split_once(':'));
        line.map_or_else(|| "unknown".to_owned(), |(_, value)| value.trim().to_owned())
    };
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let kernel = kernel.split('-').next().unwrap_or_default().trim().to_owned();
    let memory = field("/proc/meminfo", "MemTotal");
    let kibibytes = memory.split_whitespace().next().and_then(|text| text.parse::<u64>().ok());
    let gibibytes = kibibytes.map_or(0, |kibibytes| (kibibytes + (1 << 19)) >> 20);
    let processor = field("/proc/cpuinfo", "model name");
    format!("{cores} cores ({processor}), {gibibytes} GiB of memory, Linux {kernel}")
}

/// Returns the resident memory of a process in bytes.
pub(crate) fn resident(pid: i32) -> anyhow::Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).context("read its status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kibibytes = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    Ok(kibibytes.context("find VmRSS in a status")? * 1024)
}

/// Returns the time that the living threads of a process have run, to the nanosecond: `utime`
/// and `stime` of `stat` are whole ticks of 10 ms.
pub(crate) fn processor_time(pid: i32) -> anyhow::Result<Duration> {
    let mut nanos = 0;
    for task in fs::read_dir(format!("/proc/{pid}/task")).context("list its threads")? {
        let Ok(text) = fs::read_to_string(task?.path().join("schedstat")) else { continue };
        let ran = text.split_whitespace().next().and_then(|text| text.parse::<u64>().ok());
        nanos += ran.context("understand a schedstat")?;
    }
    Ok(Duration::from_nanos(nanos))
}

/// Returns the bytes that the files under a path take on the disk.
pub(crate) fn on_disk(path: &Path) -> anyhow::Result<u64> {
    let metadata = fs::symlink_metadata(path).context("look at a file")?;
    let mut bytes = metadata.blocks() * 512;
    if metadata.is_dir() {
        for entry in fs::read_dir(path).context("list a directory")? {
            bytes += on_disk(&entry?.path())?;
        }
    }
    Ok(bytes)
}

/// Raises how many files this process, and those it starts from now on, may have open. Returns
/// the limit before and after.
pub(crate) fn raise_open_files(wanted: u64) -> anyhow::Result<(u64, u64)> {
    let before = getrlimit(Resource::Nofile);
    let now = before.current.unwrap_or(u64::MAX);
    if now >= wanted {
        return Ok((now, now));
    }
    let raised = before.maximum.map_or(wanted, |most| most.min(wanted));
    setrlimit(Resource::Nofile, Rlimit { current: Some(raised), maximum: before.maximum })
        .context("raise the limit of open files")?;
    anyhow::ensure!(raised >= wanted, "open {wanted} files: the hard limit is {raised}");
    Ok((now, raised))
}
