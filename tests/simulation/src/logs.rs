//! What the canonical logs must be: per phase, for each lease in turn, what its host wrote from
//! its first byte on, with the control plane's own lines between.

use std::collections::BTreeMap;

use latchkey_domain::id::RunId;
use latchkey_domain::policy::Phase;

use crate::machine::Lease;

#[derive(Debug, Default)]
pub(crate) struct Logs {
    /// What each lease's host has on disk; survives the host.
    written: BTreeMap<Lease, Vec<u8>>,
    /// The canonical logs as they were seen last.
    seen: BTreeMap<(RunId, Phase), Vec<u8>>,
}

impl Logs {
    pub(crate) fn wrote(&mut self, lease: Lease, bytes: &[u8]) {
        self.written.entry(lease).or_default().extend_from_slice(bytes);
    }

    /// Judges a canonical log, and keeps it.
    pub(crate) fn check(&mut self, run: RunId, phase: Phase, bytes: Vec<u8>) -> Result<(), String> {
        let seen = self.seen.entry((run, phase)).or_default();
        if *seen == bytes {
            return Ok(());
        }
        if !bytes.starts_with(seen) {
            return Err("bytes that were there have changed".to_owned());
        }
        *seen = bytes.clone();
        for (epoch, part) in parts(&bytes)? {
            let lease = self.written.iter().find(|(lease, _)| {
                lease.run == run && lease.phase == phase && lease.epoch == epoch
            });
            let Some((_, written)) = lease else {
                return Err(format!("lines of epoch {epoch}, which wrote none"));
            };
            if !written.starts_with(&part) {
                return Err(format!("epoch {epoch} has not the lines that its host wrote"));
            }
        }
        Ok(())
    }

    /// Judges whether the last lease's log is there to its end.
    pub(crate) fn check_whole(&self, lease: Lease) -> Result<(), String> {
        let seen = self.seen.get(&(lease.run, lease.phase)).cloned().unwrap_or_default();
        let parts = parts(&seen)?;
        let part = parts.into_iter().find(|(epoch, _)| *epoch == lease.epoch);
        let part = part.map(|(_, part)| part).unwrap_or_default();
        let written = self.written.get(&lease).cloned().unwrap_or_default();
        if part == written {
            return Ok(());
        }
        Err(format!("{} of {} bytes of epoch {}", part.len(), written.len(), lease.epoch))
    }
}

/// Splits a log into what each epoch brought. An epoch's lines must not come again once those of
/// a later one have begun.
fn parts(bytes: &[u8]) -> Result<Vec<(u64, Vec<u8>)>, String> {
    let mut parts: Vec<(u64, Vec<u8>)> = vec![];
    for line in bytes.split_inclusive(|byte| *byte == b'\n') {
        if line == b"\n" {
            continue;
        }
        let parsed: serde_json::Value =
            serde_json::from_slice(line).map_err(|_| "a line that nobody wrote".to_owned())?;
        if parsed["@module"] == "latchkey" {
            continue;
        }
        let epoch = parsed["epoch"].as_u64().ok_or("a line without an epoch")?;
        match parts.last_mut() {
            Some((last, part)) if *last == epoch => part.extend_from_slice(line),
            Some((last, _)) if *last > epoch => {
                return Err(format!("lines of epoch {epoch} behind those of {last}"));
            }
            Some(_) | None => parts.push((epoch, line.to_vec())),
        }
    }
    Ok(parts)
}
