//! Jobs as they are leased: what names a lease, and what a runner is told of its job.

use latchkey_domain::id::{Digest, Epoch, Generation, JobId};
use latchkey_domain::run::{PlanDigests, RunKind};

/// The engine that is meant where none is named.
pub const TERRAFORM: &str = "terraform";

/// The engines that Latchkey knows.
pub const ENGINES: &[&str] = &[TERRAFORM, "tofu"];

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
    /// Empty takes the runner's own.
    pub engine: String,
    /// Version of the engine; empty takes the runner's own.
    pub terraform_version: String,
    pub approved: Option<PlanDigests>,
    pub queued_by: String,
    pub message: String,
    pub region: String,
}

/// Tells whether this can be a label: both parts plain, short and not empty.
pub fn is_label(name: &str, value: &str) -> bool {
    let plain = |text: &str| {
        let allowed = |b: u8| b.is_ascii_alphanumeric() || b"._-/".contains(&b);
        (1..=63).contains(&text.len()) && text.bytes().all(allowed)
    };
    plain(name) && plain(value)
}
