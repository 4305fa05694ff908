//! From one agent to the next, of the same program or of another.

use super::ending::apply_begins;
use super::*;
use crate::job::{Failure, JobResult, Phase};
use crate::job_directory::SHIPPED;
use crate::ship::{Remains, Shipped};
use crate::supervisor::control::{self, Order};

fn left_over(work_dir: &Path, phase: Phase, records: &[&str]) -> (JobDirectory, Lease) {
    let lease = Lease { run_id: "run1".into(), phase, epoch: 1, generation: 1 };
    let jobs = work_dir.join("jobs");
    private_directory(&jobs).unwrap();
    let spec = crate::job_directory::tests::spec();
    let settings = crate::job_directory::tests::settings();
    let directory = JobDirectory::create(&jobs, &lease, &spec, &settings).unwrap();
    for name in records {
        directory.record(name, &lease).unwrap();
    }
    (directory, lease)
}

/// As an agent leaves it that died when terraform had ended.
fn ended(work_dir: &Path) -> (JobDirectory, Lease, JobResult) {
    let (directory, lease) = left_over(work_dir, Phase::Apply, &["starting", "exec"]);
    directory.record_bytes("log", b"{\"@message\":\"one\"}\n").unwrap();
    directory.record_bytes("state/0001", b"{}").unwrap();
    let result = JobResult::failed(Failure::Errored, "it did not work");
    directory.record("result.json", &result).unwrap();
    (directory, lease, result)
}

fn knows(plane: &Plane, lease: &Lease) {
    plane.world().offer =
        Some(v1::Offer { lease: Some(lease.to_wire()), job: Some(v1::JobSpec::default()) });
}

async fn wiped(plane: &Plane, work_dir: &Path) {
    plane
        .wait("the wipe", |world| {
            world.story.last().is_some_and(|what| what == "heartbeat")
                && jobs_left(work_dir).is_empty()
        })
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_was_only_accepted_is_wiped_at_start() {
    let (plane, work_dir) = (Plane::start().await, tempfile::tempdir().unwrap());
    left_over(work_dir.path(), Phase::Plan, &[]);
    let agent = Running::start(plane.config(work_dir.path()));
    wiped(&plane, work_dir.path()).await;
    assert!(!plane.story().iter().any(|what| what == "starting" || what == "finished"));
    agent.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_had_asked_is_handed_back_when_nobody_can_start_it_any_more() {
    let (plane, work_dir) = (Plane::start().await, tempfile::tempdir().unwrap());
    let (_, lease) = left_over(work_dir.path(), Phase::Apply, &["starting"]);
    knows(&plane, &lease);
    let agent = Running::start(plane.config(work_dir.path()));
    plane.wait("the hand back", |world| world.story.contains(&"never started".to_owned())).await;
    wiped(&plane, work_dir.path()).await;
    agent.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_behind_exec_ends_unknown_and_is_never_started_again() {
    let (plane, work_dir) = (Plane::start().await, tempfile::tempdir().unwrap());
    let (_, lease) = left_over(work_dir.path(), Phase::Apply, &["starting", "exec"]);
    knows(&plane, &lease);
    let agent = Running::start(plane.config(work_dir.path()));
    let finished = plane.finished().await;
    let Some(v1::finished::Result::Failed(failed)) = finished.result else {
        panic!("{finished:?}")
    };
    assert_eq!(failed.kind(), v1::JobFailure::EndedUnknown);
    assert!(!plane.story().contains(&"starting".to_owned()));
    wiped(&plane, work_dir.path()).await;
    agent.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_ended_job_has_not_sent_is_sent() {
    let (plane, work_dir) = (Plane::start().await, tempfile::tempdir().unwrap());
    let (_, lease, result) = ended(work_dir.path());
    knows(&plane, &lease);
    let agent = Running::start(plane.config(work_dir.path()));
    let finished = plane.finished().await;
    assert_eq!(finished.result, Some(result.to_wire()));
    assert_eq!(finished.log_length, plane.world().log.len() as u64);
    assert_eq!(plane.artifact(v1::ArtifactKind::State, 1), b"{}");
    wiped(&plane, work_dir.path()).await;
    agent.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_had_sent_everything_only_says_so_though_its_lease_is_over() {
    let (plane, work_dir) = (Plane::start().await, tempfile::tempdir().unwrap());
    let (directory, ..) = ended(work_dir.path());
    let shipped = Shipped { log_length: 19, instead: None, remains: Remains::Nothing };
    directory.record(SHIPPED, &shipped).unwrap();
    (plane.world().give_up, plane.world().loses_leases) = (true, true);
    let agent = Running::start(plane.config(work_dir.path()));
    plane.wait("the end", |world| world.story.contains(&"finished".to_owned())).await;
    wiped(&plane, work_dir.path()).await;
    assert!(!plane.story().iter().any(|what| what.starts_with("lost ")), "{:?}", plane.story());
    agent.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_program_takes_up_an_apply_of_the_old_one() {
    let (plane, work_dir) = (Plane::start().await, tempfile::tempdir().unwrap());
    let old = work_dir.path().join("old-program");
    std::fs::copy(std::env::current_exe().unwrap(), &old).unwrap();
    let mut config = plane.config(work_dir.path());
    config.program.exe.clone_from(&old);
    let agent = Running::start(config);
    apply_begins(&plane, "1").await;
    agent.stop().await.unwrap();
    // As a package manager does it: the old one is gone from the disk.
    std::fs::remove_file(&old).unwrap();
    let agent = Running::start(plane.config(work_dir.path()));
    let finished = plane.finished().await;
    let log = String::from_utf8(plane.world().log.clone()).unwrap();
    assert!(matches!(finished.result, Some(v1::finished::Result::Apply(_))), "{finished:?}\n{log}");
    assert_eq!(log.matches("local-exec): line 9\"").count(), 1, "{log}");
    let starts = plane.story().iter().filter(|what| *what == "starting").count();
    assert_eq!(starts, 2, "one for the plan, one for the apply");
    agent.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_supervisor_that_speaks_otherwise_is_left_alone_until_its_result_is_there() {
    let (plane, work_dir) = (Plane::start().await, tempfile::tempdir().unwrap());
    let (directory, lease) = left_over(work_dir.path(), Phase::Apply, &["starting", "exec"]);
    let lock = directory.claim().unwrap().unwrap();
    let status = control::Status { protocol: 999, ..Default::default() };
    let (_status_to, status) = watch::channel(status);
    let (orders_to, mut orders) = mpsc::channel(4);
    let listener = control::listen(directory.path()).unwrap();
    let supervisor = tokio::spawn(control::serve(listener, orders_to, status));
    knows(&plane, &lease);
    let agent = Running::start(plane.config(work_dir.path()));
    plane.world().cancel = true;
    let beats = |world: &World| world.story.iter().filter(|what| *what == "heartbeat").count();
    plane.wait("some heartbeats", |world| beats(world) >= 5).await;
    assert!(orders.try_recv().is_err(), "it was told something it does not understand");
    assert!(plane.world().finished.is_none());
    let result = JobResult::Apply { outputs_json: "{}".into() };
    directory.record("result.json", &result).unwrap();
    supervisor.abort();
    std::fs::remove_file(directory.join("control")).unwrap();
    drop(lock);
    let finished = plane.finished().await;
    assert_eq!(finished.result, Some(result.to_wire()));
    agent.stop().await.unwrap();
}

/// What a supervisor is told next.
#[track_caller]
fn next(orders: &mut mpsc::Receiver<Order>) -> impl Future<Output = Order> {
    let asked = std::panic::Location::caller();
    async move {
        let told = tokio::time::timeout(LIMIT, orders.recv()).await;
        told.unwrap_or_else(|_| panic!("no order in time, at {asked}")).expect("a supervisor")
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_wanted_of_a_dead_supervisor_is_wanted_of_the_next() {
    let (plane, work_dir) = (Plane::start().await, tempfile::tempdir().unwrap());
    let (directory, lease) = left_over(work_dir.path(), Phase::Apply, &["starting", "exec"]);
    // Held for all that follow.
    let _lock = directory.claim().unwrap().unwrap();
    let mut status = control::Status { protocol: 1, ..Default::default() };
    status.set_stage(control::Stage::Executing);
    let supervisor = || {
        let (orders_to, orders) = mpsc::channel(16);
        // Without it, open connections end as well: they are served by tasks of their own.
        let (alive, status) = watch::channel(status);
        let listener = control::listen(directory.path()).unwrap();
        (tokio::spawn(control::serve(listener, orders_to, status)), alive, orders)
    };
    let (first, alive, mut orders) = supervisor();
    knows(&plane, &lease);
    (plane.world().cancel, plane.world().forces) = (true, true);
    let agent = Running::start(plane.config(work_dir.path()));
    assert_eq!(next(&mut orders).await, Order::Cancel(true));
    plane.world().cancel = false;
    plane.world().give_up = true;
    plane.cut();
    while next(&mut orders).await != Order::GiveUp(true) {}
    plane.world().offer = None;
    first.abort();
    drop((alive, orders));
    let (_second, _alive, mut orders) = supervisor();
    let mut told = vec![next(&mut orders).await, next(&mut orders).await];
    told.sort_by_key(|order| *order != Order::GiveUp(true));
    assert_eq!(told, [Order::GiveUp(true), Order::Cancel(true)]);
    agent.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_job_that_ended_before_exec_says_that_it_never_started() {
    let (plane, work_dir) = (Plane::start().await, tempfile::tempdir().unwrap());
    let (directory, _) = left_over(work_dir.path(), Phase::Apply, &["starting"]);
    // Nobody takes it: so the job does not come to its `Finished`.
    directory.record_bytes("log", b"{\"@message\":\"one\"}\n").unwrap();
    let result = JobResult::failed(Failure::Errored, "no room for its variables");
    directory.record("result.json", &result).unwrap();
    plane.world().give_up = true;
    plane.world().loses_leases = true;
    let agent = Running::start(plane.config(work_dir.path()));
    plane.wait("the word", |world| world.story.contains(&"never started".to_owned())).await;
    wiped(&plane, work_dir.path()).await;
    assert!(!plane.story().contains(&"finished".to_owned()), "{:?}", plane.story());
    agent.stop().await.unwrap();
}
