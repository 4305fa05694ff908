//! A job as this runner knows it: lease, specification, result. Parsed once from the wire into
//! types that cannot be wrong, and kept as JSON records in the job directory.

use std::path::{Component, Path, PathBuf};

use latchkey_proto::v1;
use serde::{Deserialize, Serialize};

use crate::engine;

/// Why a frame's job is not one this runner can take.
#[derive(Debug, thiserror::Error)]
#[error("read the job: {field} {problem}")]
pub(crate) struct Malformed {
    field: &'static str,
    problem: &'static str,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Phase {
    Plan,
    Apply,
}

impl Phase {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Plan => "plan",
            Self::Apply => "apply",
        }
    }
}

/// A numbered right to a job. Every frame about the job carries it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(crate) struct Lease {
    pub(crate) run_id: String,
    pub(crate) phase: Phase,
    pub(crate) epoch: u64,
    pub(crate) generation: u64,
}

impl Lease {
    pub(crate) fn from_wire(lease: &v1::LeaseRef) -> Result<Self, Malformed> {
        // The id becomes part of a directory's name.
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        if lease.run_id.is_empty() || lease.run_id.len() > 64 || !lease.run_id.chars().all(plain) {
            return Err(Malformed { field: "run_id", problem: "is not a plain id" });
        }
        let phase = match lease.phase() {
            v1::Phase::Plan => Phase::Plan,
            v1::Phase::Apply => Phase::Apply,
            v1::Phase::Unspecified => {
                return Err(Malformed { field: "phase", problem: "is not given" });
            }
        };
        Ok(Self {
            run_id: lease.run_id.clone(),
            phase,
            epoch: lease.epoch,
            generation: lease.generation,
        })
    }

    pub(crate) fn to_wire(&self) -> v1::LeaseRef {
        let phase = match self.phase {
            Phase::Plan => v1::Phase::Plan,
            Phase::Apply => v1::Phase::Apply,
        };
        v1::LeaseRef {
            run_id: self.run_id.clone(),
            phase: phase.into(),
            epoch: self.epoch,
            generation: self.generation,
        }
    }

    /// Epochs are counted anew when a control plane is restored.
    pub(crate) fn directory_name(&self) -> String {
        let Self { run_id, phase, epoch, generation } = self;
        format!("{run_id}-{}-{epoch}-g{generation}", phase.name())
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Kind {
    PlanAndApply,
    PlanOnly,
    Destroy,
    RefreshOnly,
}

impl Kind {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::PlanAndApply => "plan-and-apply",
            Self::PlanOnly => "plan-only",
            Self::Destroy => "destroy",
            Self::RefreshOnly => "refresh-only",
        }
    }
}

/// What was approved, or what a plan asks approval for. Hex SHA-256 each; `lock_file` is empty
/// when there is none.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Digests {
    pub(crate) plan: String,
    pub(crate) workspace: String,
    pub(crate) lock_file: String,
    pub(crate) changes: String,
}

impl Digests {
    pub(crate) fn to_wire(&self) -> v1::ApprovedPlan {
        v1::ApprovedPlan {
            plan_digest: self.plan.clone(),
            workspace_digest: self.workspace.clone(),
            lock_file_digest: self.lock_file.clone(),
            changes_digest: self.changes.clone(),
        }
    }
}

/// All that preparing and running the job needs, but for secrets.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Spec {
    pub(crate) organization: String,
    pub(crate) environment: String,
    pub(crate) kind: Kind,
    pub(crate) archive_digest: String,
    /// Relative, without `..`; empty for the archive's root.
    pub(crate) working_directory: PathBuf,
    pub(crate) target: Vec<String>,
    pub(crate) replace: Vec<String>,
    pub(crate) has_state: bool,
    /// `None` takes the runner's own.
    #[serde(default)]
    pub(crate) engine: Option<engine::Name>,
    /// Exact; empty takes the runner's own.
    pub(crate) terraform_version: String,
    /// Set for an apply and only for it.
    pub(crate) approved: Option<Digests>,
    pub(crate) queued_by: String,
    pub(crate) message: String,
    pub(crate) region: String,
}

impl Spec {
    pub(crate) fn from_wire(phase: Phase, job: v1::JobSpec) -> Result<Self, Malformed> {
        let kind = match job.kind() {
            v1::RunKind::PlanAndApply => Kind::PlanAndApply,
            v1::RunKind::PlanOnly => Kind::PlanOnly,
            v1::RunKind::Destroy => Kind::Destroy,
            v1::RunKind::RefreshOnly => Kind::RefreshOnly,
            v1::RunKind::Unspecified => {
                return Err(Malformed { field: "kind", problem: "is not given" });
            }
        };
        let engine = match job.engine.as_str() {
            "" => None,
            name => Some(name.parse().map_err(|_| Malformed {
                field: "engine",
                problem: "is neither `terraform` nor `tofu`",
            })?),
        };
        let approved = job.approved.map(|approved| Digests {
            plan: approved.plan_digest,
            workspace: approved.workspace_digest,
            lock_file: approved.lock_file_digest,
            changes: approved.changes_digest,
        });
        match (phase, &approved) {
            (Phase::Plan, None) | (Phase::Apply, Some(_)) => {}
            (Phase::Plan, Some(_)) => {
                return Err(Malformed { field: "approved", problem: "is set for a plan" });
            }
            (Phase::Apply, None) => {
                return Err(Malformed { field: "approved", problem: "is absent for an apply" });
            }
        }
        Ok(Self {
            organization: job.organization,
            environment: job.environment,
            kind,
            archive_digest: job.archive_digest,
            working_directory: relative(&job.working_directory)?,
            target: job.target,
            replace: job.replace,
            has_state: job.has_state,
            engine,
            terraform_version: job.terraform_version,
            approved,
            queued_by: job.queued_by,
            message: job.message,
            region: job.region,
        })
    }
}

/// How a job ended: the record `result.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum JobResult {
    Plan {
        digests: Digests,
        applyable: bool,
        add: u32,
        change: u32,
        destroy: u32,
        import: u32,
        #[serde(default)]
        engine: engine::Name,
        terraform_version: String,
    },
    Apply {
        outputs_json: String,
    },
    Failed {
        kind: Failure,
        reason: String,
        exit_code: Option<i32>,
    },
}

impl JobResult {
    pub(crate) fn finished(&self, lease: &Lease, log_length: u64) -> v1::Finished {
        v1::Finished { lease: Some(lease.to_wire()), log_length, result: Some(self.to_wire()) }
    }

    pub(crate) fn failed(kind: Failure, reason: impl Into<String>) -> Self {
        Self::Failed { kind, reason: reason.into(), exit_code: None }
    }

    pub(crate) fn to_wire(&self) -> v1::finished::Result {
        match self {
            Self::Plan {
                digests,
                applyable,
                add,
                change,
                destroy,
                import,
                engine,
                terraform_version,
            } => v1::finished::Result::Plan(v1::PlanFinished {
                digests: Some(digests.to_wire()),
                applyable: *applyable,
                add: *add,
                change: *change,
                destroy: *destroy,
                import: *import,
                terraform_version: terraform_version.clone(),
                engine: engine.program().into(),
            }),
            Self::Apply { outputs_json } => v1::finished::Result::Apply(v1::ApplyFinished {
                outputs_json: outputs_json.clone(),
            }),
            Self::Failed { kind, reason, exit_code } => {
                v1::finished::Result::Failed(v1::JobFailed {
                    reason: reason.clone(),
                    kind: kind.to_wire().into(),
                    exit_code: *exit_code,
                })
            }
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Failure {
    Errored,
    Canceled,
    PlanChanged,
    EndedUnknown,
    StateUndelivered,
}

impl Failure {
    pub(crate) fn to_wire(self) -> v1::JobFailure {
        match self {
            Self::Errored => v1::JobFailure::Errored,
            Self::Canceled => v1::JobFailure::Canceled,
            Self::PlanChanged => v1::JobFailure::PlanChanged,
            Self::EndedUnknown => v1::JobFailure::EndedUnknown,
            Self::StateUndelivered => v1::JobFailure::StateUndelivered,
        }
    }

    pub(crate) fn from_wire(kind: v1::JobFailure) -> Self {
        match kind {
            v1::JobFailure::Unspecified | v1::JobFailure::Errored => Self::Errored,
            v1::JobFailure::Canceled => Self::Canceled,
            v1::JobFailure::PlanChanged => Self::PlanChanged,
            v1::JobFailure::EndedUnknown => Self::EndedUnknown,
            v1::JobFailure::StateUndelivered => Self::StateUndelivered,
        }
    }
}

fn relative(path: &str) -> Result<PathBuf, Malformed> {
    let mut out = PathBuf::new();
    for component in Path::new(path).components() {
        match component {
            Component::Normal(part) => out.push(part),
            Component::CurDir => {}
            Component::ParentDir | Component::RootDir | Component::Prefix(_) => {
                return Err(Malformed {
                    field: "working_directory",
                    problem: "leaves the archive",
                });
            }
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_working_directory_stays_inside_the_archive() {
        for (input, expect) in
            [("", Some("")), ("./a/b", Some("a/b")), ("/a", None), ("a/../..", None)]
        {
            assert_eq!(relative(input).ok(), expect.map(PathBuf::from), "{input}");
        }
    }

    #[test]
    fn an_id_that_could_leave_the_directory_is_refused() {
        for run_id in ["", "../x", "a/b", "a b"] {
            let wire = v1::LeaseRef {
                run_id: run_id.into(),
                phase: v1::Phase::Plan.into(),
                epoch: 1,
                generation: 1,
            };
            assert!(Lease::from_wire(&wire).is_err(), "{run_id}");
        }
    }

    #[test]
    fn an_apply_without_an_approval_is_refused() {
        let job = v1::JobSpec { kind: v1::RunKind::Destroy.into(), ..Default::default() };
        assert!(Spec::from_wire(Phase::Apply, job.clone()).is_err());
        assert!(Spec::from_wire(Phase::Plan, job).is_ok());
    }
}
