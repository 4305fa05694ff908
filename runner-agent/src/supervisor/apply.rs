//! The apply phase: compare with what was approved, then apply exactly that.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::hooks::Step;
use super::plan::{show_json, words};
use super::terraform::Ended;
use super::{Error, Running};
use crate::job::{Failure, JobResult, Spec};
use crate::job_directory::JobDirectory;
use crate::untrusted;

/// The control plane keeps them in the run's record.
const LARGEST_OUTPUTS: usize = 24 * 1024;

#[derive(Debug, thiserror::Error)]
#[error("apply the plan: its changes are not those that were approved; plan again")]
struct NotApproved;

#[derive(Debug, thiserror::Error)]
#[error("remove an old errored.tfstate")]
struct Stale {
    #[source]
    source: io::Error,
}

const ERRORED_STATE: &str = "errored.tfstate";

/// What became of a state that terraform could not deliver.
#[derive(Debug)]
pub(super) enum ErroredState {
    Absent,
    /// It is in the job directory, to be brought.
    Kept,
    Unreadable(io::Error),
}

/// Takes `errored.tfstate` out of terraform's directory, if there is one.
pub(super) async fn keep_errored_state(
    directory: &JobDirectory,
    root: &Path,
) -> Result<ErroredState, Error> {
    let (directory, errored) = (directory.clone(), root.join(ERRORED_STATE));
    let keep = move || match untrusted::read(&errored) {
        Ok(None) => Ok(ErroredState::Absent),
        Ok(Some(state)) => {
            directory.record_bytes(ERRORED_STATE, &state).map(|()| ErroredState::Kept)
        }
        Err(error) => Ok(ErroredState::Unreadable(error)),
    };
    Ok(tokio::task::spawn_blocking(keep).await.map_err(Error::Task)??)
}

fn remove(path: &Path) -> io::Result<()> {
    let removed = match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        Ok(()) | Err(_) => Ok(()),
    }
}

impl Running {
    pub(super) async fn apply(&mut self) -> Result<JobResult, Error> {
        let lock_file = lock_file(&self.directory, &self.spec);
        let read = move || untrusted::read(&lock_file);
        let lock_file = tokio::task::spawn_blocking(read)
            .await
            .map_err(Error::Task)?
            .map_err(Error::Digest)?
            .unwrap_or_default();
        let lock_file = String::from_utf8_lossy(&lock_file);
        let names_providers = lock_file.lines().any(|line| line.starts_with("provider "));
        // The sealed workspace has everything but the providers.
        if names_providers && let Some(failed) = self.init(&["-lockfile=readonly"]).await? {
            return Ok(failed);
        }
        if let Some(failed) = self.before(Step::Apply).await? {
            return Ok(failed);
        }
        // A hook may have touched it, and what is applied is what was approved.
        let plan = self.directory.join("plan.bin");
        let found = tokio::task::spawn_blocking(move || untrusted::digest(&plan))
            .await
            .map_err(Error::Task)?
            .map_err(Error::Digest)?;
        if self.spec.approved.as_ref().map(|approved| &approved.plan) != Some(&found) {
            return Ok(self.refused(Failure::PlanChanged, &NotApproved));
        }
        let arguments = show_json(&self.directory);
        let (ended, shown, stderr) = self.terraform.capture(&arguments).await?;
        let changes = match self.changes(ended, &shown, &stderr)? {
            Ok(changes) => changes,
            Err(failed) => return Ok(failed),
        };
        let approved = self.spec.approved.as_ref().map(|approved| approved.changes.as_str());
        if approved != Some(changes.digest.as_str()) {
            return Ok(self.refused(Failure::PlanChanged, &NotApproved));
        }
        if *self.terraform.cancel.borrow() != super::terraform::Cancel::No {
            return Ok(self.failed("terraform apply", Ended::NeverStarted));
        }

        // One that came with the configuration would be taken for this apply's.
        let stale = self.terraform.root.join(ERRORED_STATE);
        if let Err(source) = remove(&stale) {
            return Ok(self.refused(Failure::Errored, &Stale { source }));
        }
        self.applying = true;
        self.apply_step();
        // The point of no return: after this, the job is never started again.
        self.executing()?;
        let mut arguments = words(&["apply", "-input=false", "-no-color", "-json"]);
        if self.variables.file.is_some() {
            arguments.push("-var-file=/dev/stdin".into());
        }
        arguments.push(self.directory.join("plan.bin").into());
        let var_file = self.variables.file.clone();
        let ended = self.terraform.run(&arguments, var_file.as_ref()).await?;
        let drained = self.log.drain().await?;
        self.after(Step::Apply, ended).await?;

        let errored = keep_errored_state(&self.directory, &self.terraform.root).await?;
        let undelivered = match errored {
            ErroredState::Absent | ErroredState::Unreadable(_) if drained.dumped => {
                let reason = "terraform could write its state nowhere and printed it";
                Some((Failure::StateUndelivered, reason.to_owned()))
            }
            ErroredState::Absent => None,
            ErroredState::Kept => {
                let reason = "terraform could not write its state and saved errored.tfstate";
                Some((Failure::StateUndelivered, reason.to_owned()))
            }
            ErroredState::Unreadable(error) => {
                let reason = format!("errored.tfstate is there and cannot be read: {error}");
                Some((Failure::EndedUnknown, reason))
            }
        };
        if let Some((kind, reason)) = undelivered {
            let exit_code = match ended {
                Ended::Exited(code) => Some(code),
                Ended::Killed(_) | Ended::NeverStarted => None,
            };
            return Ok(JobResult::Failed { kind, reason, exit_code });
        }
        match ended {
            Ended::Exited(0) => {
                let mut outputs_json = outputs_json(drained.outputs.as_ref());
                if outputs_json.len() > LARGEST_OUTPUTS {
                    let bytes = outputs_json.len();
                    let message = format!(
                        "the outputs have {bytes} bytes, more than {LARGEST_OUTPUTS}: they are \
                         in the state only"
                    );
                    self.log.own("diagnostic", "warn", &message, Value::Null);
                    outputs_json.clear();
                }
                Ok(JobResult::Apply { outputs_json })
            }
            // Known not to have run: a cancel came between the record and the start.
            other => Ok(self.failed("terraform apply", other)),
        }
    }
}

pub(super) fn lock_file(directory: &JobDirectory, spec: &Spec) -> PathBuf {
    directory.root(spec).join(".terraform.lock.hcl")
}

/// Answers the outputs as terraform's JSON, without the values of sensitive ones.
fn outputs_json(line: Option<&Value>) -> String {
    let mut outputs = Map::new();
    let all = line.and_then(|line| line.get("outputs")).and_then(Value::as_object);
    for (name, output) in all.into_iter().flatten() {
        let Some(output) = output.as_object() else { continue };
        let mut output = output.clone();
        output.remove("action");
        if output.get("sensitive") != Some(&Value::Bool(false)) {
            output.remove("value");
        }
        outputs.insert(name.clone(), Value::Object(output));
    }
    Value::Object(outputs).to_string()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn sensitive_outputs_lose_their_value() {
        let line = json!({"type": "outputs", "outputs": {
            "a": {"sensitive": false, "type": "string", "value": "x"},
            "b": {"sensitive": true, "type": "string", "value": "canary"},
        }});
        assert_eq!(
            outputs_json(Some(&line)),
            r#"{"a":{"sensitive":false,"type":"string","value":"x"},"b":{"sensitive":true,"type":"string"}}"#
        );
        assert_eq!(outputs_json(None), "{}");
    }
}
