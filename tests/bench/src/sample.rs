//! Records as real runs leave them.

use latchkey_control_plane::audit::Draft;
use latchkey_control_plane::store::record::environment::{Environment, Settings};
use latchkey_domain::environment::Hold;
use latchkey_domain::id::{Digest, EnvironmentId, Epoch, OrganizationId, RunId, RunnerId, UserId};
use latchkey_domain::policy::MfaPolicy;
use latchkey_domain::run::{
    Actor, Approval, Authenticated, Counts, Job, PlanDigests, Planned, Request, Run, RunKind,
    RunState,
};
use latchkey_domain::time::Timestamp;
use uuid::Builder;

/// When the first sample run was queued.
const BEGINNING: u64 = 1_735_689_600_000;
/// Between a run and the next: a million in a year.
const PAUSE: u64 = 31_000;

/// What a plan and apply tells the audit trail, in order.
const ACTIONS: [(&str, &str, &str); 9] = [
    ("queue_run", "", "PlanQueued"),
    ("grant_lease", "PlanQueued", "Planning"),
    ("release_credentials", "Planning", "Planning"),
    ("finish_plan", "Planning", "AwaitingConfirmation"),
    ("confirm_run", "AwaitingConfirmation", "ApplyQueued"),
    ("grant_lease", "ApplyQueued", "Applying"),
    ("release_credentials", "Applying", "Applying"),
    ("write_state", "Applying", "Applying"),
    ("finish_apply", "Applying", "Applied"),
];

/// Returns the id of the sample run of this number; ids rise with their numbers.
pub(crate) fn run_id(number: u64) -> RunId {
    let mut random = [0; 10];
    // Spread over all bits, as random ones are.
    random[..8].copy_from_slice(&number.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_be_bytes());
    let millis = BEGINNING + number * PAUSE;
    RunId::from_uuid(Builder::from_unix_timestamp_millis(millis, &random).into_uuid())
}

fn at(number: u64) -> Timestamp {
    Timestamp::from_millis(i64::try_from(BEGINNING + number * PAUSE).unwrap_or(i64::MAX))
}

/// Returns a run that was planned, confirmed and applied.
pub(crate) fn finished_run(
    number: u64,
    organization: OrganizationId,
    environment: EnvironmentId,
) -> Run {
    let now = at(number);
    let mut bytes = [7; 32];
    bytes[..8].copy_from_slice(&number.to_be_bytes());
    let digest = Digest::from_bytes(bytes);
    let request = Request {
        organization,
        environment,
        kind: RunKind::PlanAndApply,
        configuration: digest,
        message: format!("Merge pull request #{number} from team/widen-the-subnets"),
        target: vec![],
        replace: vec![],
        auto_apply: false,
        policy: MfaPolicy::AppliesOnly,
        plan_rule: Default::default(),
        second_person: false,
        queued_by: Actor::User { id: UserId::from_bytes([4; 16]), name: "ada".into() },
        queued_at: now,
        retry_of: None,
        given: vec![],
    };
    let job = |epoch| Job {
        epoch: Epoch::new(epoch),
        lease: None,
        evidence: None,
        authenticated: Some(Authenticated { user: "ada".into(), at: now, expires_at: now }),
        queued_at: Some(now),
        started_at: Some(now),
        ended_at: Some(now),
        log_length: Some(12_345),
        holders: vec![(Epoch::new(epoch), RunnerId::from_bytes([5; 16]))],
    };
    let mut run = Run::queue(run_id(number), request);
    run.state = RunState::Applied;
    run.plan = job(1);
    run.apply = job(1);
    run.planned = Some(Planned {
        digests: PlanDigests {
            plan: digest,
            workspace: digest,
            lock_file: Some(digest),
            changes: digest,
        },
        digest,
        applyable: true,
        facts: None,
        counts: Counts { add: 3, change: 2, destroy: 1, import: 0, ..Counts::default() },
        engine: "terraform".into(),
        terraform_version: "1.11.4".into(),
    });
    run.approval = Some(Approval { by: "ada".into(), at: now, digest });
    run.outputs = Some(r#"{"url":{"sensitive":false,"type":"string","value":"https://e"}}"#.into());
    run
}

/// Returns what such a run told the audit trail.
pub(crate) fn audit_drafts(
    number: u64,
    organization: OrganizationId,
) -> impl Iterator<Item = Draft> {
    let (run, now) = (run_id(number), at(number));
    ACTIONS.iter().map(move |(action, from, to)| {
        Draft::new(organization, now, "user ada", *action, format!("run {run}"))
            .with("from", *from)
            .with("to", *to)
    })
}

/// How many audit records a sample run has.
pub(crate) const fn audit_records() -> usize {
    ACTIONS.len()
}

/// Returns an environment.
pub(crate) fn environment(id: EnvironmentId, organization: OrganizationId) -> Environment {
    Environment {
        break_glass: None,
        id,
        organization,
        name: "web".into(),
        settings: Settings::default(),
        hold: Hold::default(),
        state: None,
        created_at: at(0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sample_ids_rise() {
        assert!((0..1000).all(|number| run_id(number) < run_id(number + 1)));
    }
}
