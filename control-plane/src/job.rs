//! Jobs as they are leased: what names a lease, and what a runner is told of its job.

use latchkey_domain::id::{Digest, Epoch, Generation, JobId};
use latchkey_domain::run::{PlanDigests, RunKind};

/// Names one lease, as frames do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LeaseRef {
    pub job: JobId,
    pub epoch: Epoch,
    pub generation: Generation,
}

/// All that preparing a job needs. No secret.
#[derive(Clone, Debug)]
pub struct JobSpec {
    pub organization: String,
    pub environment: String,
    pub kind: RunKind,
    pub archive: Digest,
    pub working_directory: String,
    pub target: Vec<String>,
    pub replace: Vec<String>,
    pub has_state: bool,
    pub terraform_version: String,
    pub approved: Option<PlanDigests>,
    pub queued_by: String,
    pub message: String,
    pub region: String,
}
