//! Takes a job's result. By then its log and all it made are durable here.

use std::sync::Arc;

use latchkey_domain::id::{Digest, JobId, OrganizationId};
use latchkey_domain::policy::Phase;
use latchkey_domain::run::{
    ApplyOutcome, Counts, Event, Failure, FailureKind, PlanDigests, PlanOutcome, Planned,
};
use latchkey_proto::v1::Reason;

use super::artifacts::{LARGEST_CHANGES, Made};
use super::configurations::blob_error;
use super::lease_job::lease_lost;
use super::settings::is_exact;
use super::{App, plan_facts};
use crate::auth::{RunnerIdentity, sha256};
use crate::error::{Error, Result};
use crate::job::{ENGINES, LeaseRef, TERRAFORM};
use crate::seal::SecretBytes;

pub(super) const LONGEST_REASON: usize = 1024;
/// Why no apply could be held to what made its plan.
const UNPINNED: &str = "the runner does not say which version of the engine made the plan, so that its apply could be \
     done by any";

const LARGEST_OUTPUTS: usize = 24 * 1024;

/// How a job ended.
#[derive(Clone, Debug)]
pub enum JobResult {
    Planned {
        digests: PlanDigests,
        applyable: bool,
        counts: Counts,
        /// Empty is terraform.
        engine: String,
        terraform_version: String,
    },
    Applied {
        outputs: Option<String>,
    },
    Failed {
        kind: FailureKind,
        reason: String,
    },
}

impl App {
    /// Records a result. A repeat after a lost answer is answered the same; a result of an old
    /// lease is refused and changes nothing.
    pub async fn finish_job(
        self: &Arc<Self>,
        runner: &RunnerIdentity,
        lease: LeaseRef,
        log_length: u64,
        result: JobResult,
    ) -> Result<()> {
        latchkey_failpoint::reach("cp.finished.received");
        if self.is_recorded(runner, lease).await? {
            return Ok(());
        }
        let subject = self.leased(runner, lease).await?;
        let LeaseRef { job, epoch, .. } = lease;
        let organization = subject.run.value.request.organization;
        let held = subject.run.value.job(job.phase).lease.as_ref().ok_or_else(lease_lost)?;
        let whole = self.stored_log_length(job.run, job.phase).await?;
        let stored = whole.saturating_sub(held.log_base);
        if stored != log_length {
            let message = format!("the log is not here whole: {stored} bytes are");
            return Err(
                Error::refused(Reason::LogOffset, message).with("expected", stored.to_string())
            );
        }
        let result = match job.phase {
            Phase::Apply if self.left_a_state(runner, lease).await? => undelivered(result),
            Phase::Plan | Phase::Apply => result,
        };
        let runner_id = runner.id;
        match (job.phase, result) {
            (
                Phase::Plan,
                JobResult::Planned { digests, applyable, counts, engine, terraform_version },
            ) => {
                for (kind, digest) in
                    [(Made::Workspace, digests.workspace), (Made::Changes, digests.changes)]
                {
                    if !self.was_made(lease, kind, digest).await? {
                        let message = "upload the workspace and the changes before the result";
                        return Err(Error::field("plan", message));
                    }
                }
                let changes = self.checked_changes(organization, digests.changes).await?;
                // What the runner says counts only where the changes say nothing.
                let (facts, counts) = match plan_facts::read(changes.expose_secret()) {
                    Some((facts, counts)) => (Some(facts), counts),
                    None => (None, counts),
                };
                let engine = engine_of(&engine)?;
                let outcome = if is_exact(&terraform_version) {
                    PlanOutcome::Planned(Box::new(Planned {
                        digest: digest_of(&digests),
                        digests,
                        applyable,
                        counts,
                        facts,
                        engine,
                        terraform_version,
                    }))
                } else {
                    PlanOutcome::Failed(failure(FailureKind::Errored, UNPINNED.to_owned()))
                };
                self.advance_by(runner, job.run, "finish_plan", |subject| {
                    Ok(Event::PlanEnded {
                        runner: runner_id,
                        epoch,
                        log_length: whole,
                        outcome: outcome.clone(),
                        current: subject.environment.value.settings.demands(),
                    })
                })
                .await?;
            }
            (Phase::Plan, JobResult::Failed { kind, reason }) => {
                let failure = failure(kind, reason);
                self.advance_by(runner, job.run, "fail_plan", |subject| {
                    Ok(Event::PlanEnded {
                        runner: runner_id,
                        epoch,
                        log_length: whole,
                        outcome: PlanOutcome::Failed(failure.clone()),
                        current: subject.environment.value.settings.demands(),
                    })
                })
                .await?;
            }
            (Phase::Apply, JobResult::Applied { outputs }) => {
                let outputs = outputs.filter(|outputs| fits(outputs));
                let event = Event::ApplyEnded {
                    runner: runner_id,
                    epoch,
                    log_length: whole,
                    outcome: ApplyOutcome::Applied { outputs },
                };
                self.end_apply(runner, job.run, "finish_apply", event).await?;
            }
            (Phase::Apply, JobResult::Failed { kind, reason }) => {
                let failure = failure(kind, reason);
                let event = Event::ApplyEnded {
                    runner: runner_id,
                    epoch,
                    log_length: whole,
                    outcome: ApplyOutcome::Failed(failure),
                };
                self.end_apply(runner, job.run, "fail_apply", event).await?;
            }
            (Phase::Plan, JobResult::Applied { .. })
            | (Phase::Apply, JobResult::Planned { .. }) => {
                return Err(Error::field("result", "it is the result of the other phase"));
            }
        }
        latchkey_failpoint::reach("cp.finished.committed");
        self.close_log(job).await
    }

    /// Refuses changes that nobody could be shown.
    async fn checked_changes(
        &self,
        organization: OrganizationId,
        digest: Digest,
    ) -> Result<SecretBytes> {
        let changes =
            self.blobs.get(organization, digest, LARGEST_CHANGES).await.map_err(blob_error)?;
        serde_json::from_slice::<serde::de::IgnoredAny>(changes.expose_secret())
            .map_err(|_| Error::field("changes", "they are not JSON"))?;
        Ok(changes)
    }

    async fn close_log(&self, job: JobId) -> Result<()> {
        self.logs.finish(job.run, job.phase).await.map_err(Error::internal)?;
        latchkey_failpoint::reach("cp.log.closed");
        Ok(())
    }

    /// Tells whether the lease's result is recorded already: the job has ended, and this runner
    /// with this epoch was the last to hold it.
    async fn is_recorded(&self, runner: &RunnerIdentity, lease: LeaseRef) -> Result<bool> {
        self.check_generation(lease)?;
        self.identity_guard(runner.id).await?;
        let run = match self.run(lease.job.run).await {
            Ok(run) => run.value,
            Err(error) if error.reason() == Reason::NotFound => return Err(lease_lost()),
            Err(error) => return Err(error),
        };
        let job = run.job(lease.job.phase);
        Ok(job.ended_at.is_some()
            && job.lease.is_none()
            && job.epoch == lease.epoch
            && job.last_holder() == Some(runner.id))
    }
}

/// Reads which engine made a plan: its apply will ask for the same.
fn engine_of(engine: &str) -> Result<String> {
    match engine {
        "" => Ok(TERRAFORM.to_owned()),
        name if ENGINES.contains(&name) => Ok(name.to_owned()),
        _ => Err(Error::field("engine", "it is terraform or tofu")),
    }
}

/// One digest over the four that an approval is bound to.
pub fn digest_of(digests: &PlanDigests) -> Digest {
    let PlanDigests { plan, workspace, lock_file, changes } = digests;
    let mut bytes = b"latchkey plan 1\0".to_vec();
    for digest in [Some(plan), Some(workspace), lock_file.as_ref(), Some(changes)] {
        match digest {
            Some(digest) => {
                bytes.push(1);
                bytes.extend_from_slice(digest.as_bytes());
            }
            None => bytes.push(0),
        }
    }
    sha256(&bytes)
}

/// Tells whether outputs are JSON and small enough to be part of the run's record, where they
/// stand as a string within JSON.
fn fits(outputs: &str) -> bool {
    serde_json::from_str::<serde::de::IgnoredAny>(outputs).is_ok()
        && serde_json::to_string(outputs).is_ok_and(|quoted| quoted.len() <= LARGEST_OUTPUTS)
}

/// Makes an end that leaves a state in quarantine one that a person must deal with, whatever the
/// runner calls it.
fn undelivered(result: JobResult) -> JobResult {
    let reason = match result {
        JobResult::Failed { kind: FailureKind::EndedUnknown, .. } | JobResult::Planned { .. } => {
            return result;
        }
        JobResult::Failed { reason, .. } => reason,
        JobResult::Applied { .. } => {
            "the apply says that it ended well, but it left a state that it could not deliver"
                .into()
        }
    };
    JobResult::Failed { kind: FailureKind::StateUndelivered, reason }
}

fn failure(kind: FailureKind, reason: String) -> Failure {
    Failure { kind, reason: printable(&reason, LONGEST_REASON) }
}

/// Takes text of a runner as far as it can be shown.
pub(super) fn printable(text: &str, limit: usize) -> String {
    let mut text: String = text.chars().filter(|c| !c.is_control()).collect();
    text.truncate(text.floor_char_boundary(limit));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_of_the_plan_changes_its_digest() {
        let d = |n| Digest::from_bytes([n; 32]);
        let base =
            PlanDigests { plan: d(1), workspace: d(2), lock_file: Some(d(3)), changes: d(4) };
        let digest = digest_of(&base);
        let variants = [
            PlanDigests { plan: d(9), ..base.clone() },
            PlanDigests { workspace: d(9), ..base.clone() },
            PlanDigests { lock_file: Some(d(9)), ..base.clone() },
            PlanDigests { lock_file: None, ..base.clone() },
            PlanDigests { changes: d(9), ..base },
        ];
        for variant in variants {
            assert_ne!(digest_of(&variant), digest, "{variant:?}");
        }
    }
}
