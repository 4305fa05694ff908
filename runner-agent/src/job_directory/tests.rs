//! Records, stages, and what is in the way of them; and samples for other tests.

use super::*;
use crate::job::{Failure, Kind, Phase};

pub(crate) fn lease(run_id: &str, phase: Phase) -> Lease {
    Lease { run_id: run_id.into(), phase, epoch: 1, generation: 1 }
}

pub(crate) fn spec() -> Spec {
    Spec {
        organization: "acme".into(),
        environment: "prod".into(),
        kind: Kind::PlanAndApply,
        archive_digest: String::new(),
        working_directory: PathBuf::new(),
        target: Vec::new(),
        replace: Vec::new(),
        has_state: false,
        engine: None,
        terraform_version: String::new(),
        approved: None,
        queued_by: "ada".into(),
        message: "first".into(),
        region: "eu-central-1".into(),
    }
}

pub(crate) fn settings() -> Settings {
    Settings {
        engine: engine::Name::Terraform,
        terraform: "terraform".into(),
        terraform_version: "1.0.0".into(),
        provider_cache: None,
        provider_cache_limit: 0,
        pass_env: Vec::new(),
        terraform_cli_config: None,
        longest_log: longest_log(),
        spool_limit: unbounded(),
        low_water: 0,
        confinement: Confinement::default(),
        hooks: Hooks::default(),
    }
}

#[test]
fn a_directory_tells_its_stage_by_its_records() {
    let jobs = tempfile::tempdir().unwrap();
    let lease = lease("r1", Phase::Plan);
    let dir = JobDirectory::create(jobs.path(), &lease, &spec(), &settings()).unwrap();
    assert_eq!(dir.stage(), Stage::Accepted);
    dir.record("starting", &lease).unwrap();
    assert_eq!(dir.stage(), Stage::Starting);
    dir.record("exec", &lease).unwrap();
    assert_eq!(dir.stage(), Stage::Executed);
    let result = JobResult::failed(Failure::Errored, "no");
    dir.record("result.json", &result).unwrap();
    assert_eq!(dir.stage(), Stage::Ended);

    let found = JobDirectory::list(jobs.path()).unwrap();
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].lease().unwrap(), lease);
    assert_eq!(found[0].spec().unwrap(), spec());
    assert_eq!(found[0].result().unwrap(), result);
    dir.wipe().unwrap();
    assert_eq!(fs::read_dir(jobs.path()).unwrap().count(), 0);
}

#[test]
fn drafts_and_half_removed_directories_are_no_jobs() {
    let jobs = tempfile::tempdir().unwrap();
    for name in [".new-r1-plan-1", ".gone-r1-plan-1"] {
        fs::create_dir(jobs.path().join(name)).unwrap();
        fs::write(jobs.path().join(name).join("lease.json"), "{}").unwrap();
    }
    assert!(JobDirectory::list(jobs.path()).unwrap().is_empty());
    assert_eq!(fs::read_dir(jobs.path()).unwrap().count(), 0);
}

#[test]
fn a_directory_that_cannot_be_made_leaves_no_draft() {
    let jobs = tempfile::tempdir().unwrap();
    let lease = lease("r1", Phase::Plan);
    // In the way of its name.
    fs::write(jobs.path().join(lease.directory_name()), "").unwrap();
    assert!(JobDirectory::create(jobs.path(), &lease, &spec(), &settings()).is_err());
    assert_eq!(fs::read_dir(jobs.path()).unwrap().count(), 1);
}

#[test]
fn a_directory_without_a_lease_is_no_job_and_does_not_stay() {
    let jobs = tempfile::tempdir().unwrap();
    fs::create_dir_all(jobs.path().join("r1-apply-1/restored")).unwrap();
    assert!(JobDirectory::list(jobs.path()).unwrap().is_empty());
    assert_eq!(fs::read_dir(jobs.path()).unwrap().count(), 0);
}

#[test]
fn a_leftover_that_cannot_be_removed_hides_no_job() {
    let jobs = tempfile::tempdir().unwrap();
    // No directory, so its removal as one fails.
    fs::write(jobs.path().join(".gone-r0-plan-1"), "").unwrap();
    let lease = lease("r1", Phase::Plan);
    JobDirectory::create(jobs.path(), &lease, &spec(), &settings()).unwrap();
    assert_eq!(JobDirectory::list(jobs.path()).unwrap().len(), 1);
}

#[test]
fn a_forged_record_of_temporary_files_is_not_followed() {
    let (jobs, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let lease = lease("r1", Phase::Plan);
    let dir = JobDirectory::create(jobs.path(), &lease, &spec(), &settings()).unwrap();
    let other = other.path();
    let climbing = format!("/tmp/latchkey-x/../..{}", other.display());
    for forged in [other.display().to_string(), climbing, "/tmp".into(), "/".into()] {
        fs::write(dir.join("tmpdir"), &forged).unwrap();
        assert_eq!(dir.tmpdir(), dir.join("tmp"), "{forged}");
    }
    dir.wipe().unwrap();
    assert!(other.exists());
}

#[test]
fn a_claim_fails_while_somebody_holds_the_lock() {
    let jobs = tempfile::tempdir().unwrap();
    let lease = lease("r1", Phase::Plan);
    let dir = JobDirectory::create(jobs.path(), &lease, &spec(), &settings()).unwrap();
    let held = dir.claim().unwrap().unwrap();
    assert!(dir.claim().unwrap().is_none());
    drop(held);
    assert!(dir.claim().unwrap().is_some());
}

#[test]
fn a_long_path_gets_a_short_directory_for_temporary_files() {
    let base = tempfile::tempdir().unwrap();
    let jobs = base.path().join("x".repeat(90));
    private_directory(&jobs).unwrap();
    let lease = lease("r1", Phase::Plan);
    let dir = JobDirectory::create(&jobs, &lease, &spec(), &settings()).unwrap();
    let tmp = dir.tmpdir();
    assert!(tmp.as_os_str().len() <= LONGEST_TMPDIR && tmp.is_dir());
    dir.wipe().unwrap();
    assert!(!tmp.exists());
}

#[test]
fn states_are_listed_in_order_without_the_base() {
    let jobs = tempfile::tempdir().unwrap();
    let lease = lease("r1", Phase::Apply);
    let dir = JobDirectory::create(jobs.path(), &lease, &spec(), &settings()).unwrap();
    for name in ["state/base", "state/0002", "state/0001", "state/0003.new"] {
        fs::write(dir.join(name), "{}").unwrap();
    }
    assert_eq!(dir.states().unwrap(), [1, 2]);
}
