//! The apply phase: compare with what was approved, then apply exactly that.

use std::io;
use std::sync::Arc;

use serde_json::{Map, Value};

use super::errored_state::{self, ErroredState};
use super::hooks::Step;
use super::log::Drained;
use super::plan::{show_json, words};
use super::terraform::Ended;
use super::{Error, Running, record_at_last};
use crate::job::{Failure, JobResult};
use crate::root_module;
use crate::untrusted::{self, Folder};

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

/// How terraform's apply ended: the record of the result to be. It is written before the hook
/// after the apply, and is for a successor.
pub(super) const OUTCOME: &str = "outcome.json";

impl Running {
    pub(super) async fn apply(&mut self) -> Result<JobResult, Error> {
        let lock_file = self.lock_file().await?.unwrap_or_default();
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
        let shown = self.terraform.capture(&arguments).await?;
        let changes = match self.changes(&shown)? {
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

        let root = match self.without_stale_state().await? {
            Ok(root) => root,
            Err(source) => return Ok(self.refused(Failure::Errored, &Stale { source })),
        };
        self.applying = true;
        self.apply_step();
        // The point of no return: after this, the job is never started again.
        self.executing()?;
        let mut arguments = words(&["apply", "-input=false", "-no-color", "-json"]);
        let var_file = self.variables.of_apply(&root_module::declared(&self.terraform.root));
        if var_file.is_some() {
            arguments.push("-var-file=/dev/stdin".into());
        }
        arguments.push(self.directory.join("plan.bin").into());
        let ended = self.terraform.run(&arguments, var_file.as_ref()).await?;
        let drained = self.log.drain().await?;
        let (directory, spec) = (&self.directory, &self.spec);
        let errored = errored_state::take(directory, spec, Some(root), &self.log).await?;
        let result = self.outcome(ended, errored, &drained);
        // The hook may take long, and whoever comes after us cannot ask terraform again.
        record_at_last(&self.directory, OUTCOME, &result).await;
        self.after(Step::Apply, ended).await?;
        Ok(result)
    }

    /// Answers the directory terraform is about to run in: its `errored.tfstate` will be there,
    /// wherever the job moves it.
    async fn without_stale_state(&self) -> Result<io::Result<Arc<Folder>>, Error> {
        let directory = self.directory.clone();
        let below = self.spec.working_directory.clone();
        let remove = move || {
            let root = Folder::open(&directory.join("work"), &below)?;
            errored_state::remove_stale(&directory, &root)?;
            Ok(Arc::new(root))
        };
        tokio::task::spawn_blocking(remove).await.map_err(Error::Task)
    }

    fn outcome(&self, ended: Ended, errored: ErroredState, drained: &Drained) -> JobResult {
        let exit_code = match ended {
            Ended::Exited(code) => Some(code),
            Ended::Killed(_) | Ended::NeverStarted => None,
        };
        let undelivered =
            |kind, reason: &str| JobResult::Failed { kind, reason: reason.to_owned(), exit_code };
        match (errored, ended) {
            (ErroredState::Kept, _) => undelivered(
                Failure::StateUndelivered,
                "terraform could not write its state and saved errored.tfstate",
            ),
            // What looks like one is none where the state was written.
            (ErroredState::Absent | ErroredState::Untaken(_), _)
                if drained.dumped && exit_code != Some(0) =>
            {
                undelivered(
                    Failure::StateUndelivered,
                    "terraform could write its state nowhere and printed it",
                )
            }
            (ErroredState::Untaken(reason), _) => undelivered(Failure::EndedUnknown, &reason),
            (ErroredState::Absent, Ended::Exited(0)) => {
                JobResult::Apply { outputs_json: self.outputs(drained) }
            }
            // Perhaps known not to have run: a cancel came between the record and the start.
            (ErroredState::Absent, Ended::Exited(_) | Ended::Killed(_) | Ended::NeverStarted) => {
                self.failed("terraform apply", ended)
            }
        }
    }

    fn outputs(&self, drained: &Drained) -> String {
        let outputs = outputs_json(drained.outputs.as_ref());
        if outputs.len() <= LARGEST_OUTPUTS {
            return outputs;
        }
        let message = format!(
            "the outputs have {} bytes, more than {LARGEST_OUTPUTS}: they are in the state only",
            outputs.len()
        );
        self.log.own("diagnostic", "warn", &message, Value::Null);
        String::new()
    }
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
