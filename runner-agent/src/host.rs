//! What is said of this host to people: shown, never trusted, and never decided by.

use std::env::consts::ARCH;
use std::fs;
use std::thread;

use latchkey_proto::v1;

use crate::supervisor::isolation;

/// Looks at the host. What cannot be learned is left out.
pub(crate) fn facts(isolation: &isolation::Facts) -> v1::HostFacts {
    let read = |path| fs::read_to_string(path).unwrap_or_default();
    let release = read("/proc/sys/kernel/osrelease");
    let cpus = thread::available_parallelism().map_or(0, |cpus| cpus.get());
    v1::HostFacts {
        kernel: match release.trim() {
            "" => String::new(),
            release => format!("Linux {release}"),
        },
        architecture: ARCH.into(),
        cpus: u32::try_from(cpus).unwrap_or(u32::MAX),
        memory_bytes: memory(&read("/proc/meminfo")),
        isolation: isolation.holds.clone(),
        isolation_missing: isolation.missing.clone(),
    }
}

fn memory(meminfo: &str) -> u64 {
    let total = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let kibibytes = total.and_then(|rest| rest.trim().strip_suffix("kB")).map(str::trim);
    kibibytes.and_then(|number| number.parse::<u64>().ok()).map_or(0, |number| number * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_host_has_a_kernel_and_memory() {
        let isolation = isolation::Facts { holds: vec!["x".into()], missing: Vec::new() };
        let facts = facts(&isolation);
        assert_eq!(facts.isolation, ["x"]);
        assert!(facts.kernel.starts_with("Linux ") && facts.cpus > 0);
        assert!(facts.memory_bytes > 1 << 20, "{facts:?}");
    }

    #[test]
    fn memory_is_read_in_bytes() {
        assert_eq!(memory("MemTotal:       16384 kB\nMemFree: 1 kB\n"), 16384 * 1024);
        assert_eq!(memory("nonsense"), 0);
    }
}
