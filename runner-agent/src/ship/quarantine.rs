//! What a lost lease left, brought to be kept beside the run.

use std::path::Path;

use latchkey_proto::v1;
use prost::Message;

use super::attempts::Attempts;
use super::{Error, Failure, Shipper};
use crate::job_directory::{ERRORED_STATE, JobDirectory, STATE_DUMP};

/// What became of what a lost lease left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Quarantined {
    Whole,
    /// Of a part at least, this host has the only copy.
    Refused,
}

impl Shipper {
    /// Brings all that a job has left, which has ended and whose lease is lost: to be kept beside
    /// the run. Safe to repeat.
    pub(crate) async fn quarantine(&self) -> Result<Quarantined, Error> {
        use v1::ArtifactKind::{ErroredState, Log, Result, State, StateDump};
        let log = std::fs::metadata(self.directory.join("log")).map_or(0, |log| log.len());
        let finished = self.directory.result()?.finished(&self.lease, log);
        self.directory.note("finished", &finished.encode_to_vec())?;
        let newest = self.directory.states()?.last().copied().unwrap_or(0);
        let mut whole = if self.has_untaken() { Quarantined::Refused } else { Quarantined::Whole };
        // What matters most goes first.
        for (kind, name, sequence) in [
            (State, JobDirectory::state_name(newest), newest),
            (ErroredState, ERRORED_STATE.to_owned(), 0),
            (StateDump, STATE_DUMP.to_owned(), 0),
            (Result, "finished".to_owned(), 0),
            (Log, "log".to_owned(), 0),
        ] {
            let path = self.directory.join(&name);
            if std::fs::metadata(&path).map_or(0, |found| found.len()) == 0 {
                continue;
            }
            if let Some(reason) = self.bring(kind, &path, sequence).await? {
                let run_id = &self.lease.run_id;
                let kind = kind.as_str_name();
                tracing::warn!(%run_id, epoch = self.lease.epoch, kind, %reason, "not quarantined");
                whole = Quarantined::Refused;
            }
        }
        Ok(whole)
    }

    /// Answers why it is not taken.
    async fn bring(
        &self,
        kind: v1::ArtifactKind,
        path: &Path,
        sequence: u64,
    ) -> Result<Option<String>, Error> {
        let header = self.header(kind, path, sequence).await?;
        let mut attempts = Attempts::at("bring something to quarantine");
        loop {
            match self.upload_once(&header, path).await {
                Ok(()) => return Ok(None),
                Err(Failure::LeaseLost) => return Ok(Some("the lease was never known".into())),
                Err(Failure::Refused(reason)) => return Ok(Some(reason)),
                Err(Failure::Local(error)) => return Err(error),
                Err(failure @ (Failure::Again(_) | Failure::Offset(_))) => {
                    self.pause(&mut attempts, &failure).await;
                }
            }
        }
    }
}
