//! What an agent does when something is wrong: with the host, the lease, the state, the engine.

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn another_version_is_declined_and_a_wrong_ca_is_not_trusted() {
    let (plane, work_dir) = (Plane::start().await, tempfile::tempdir().unwrap());
    let mut config = plane.config(work_dir.path());
    config.pool_token = Some(PoolToken { secret: "lkp_secret".into(), fingerprint: [7; 32] });
    let refused = Running::start(config).task.await.unwrap();
    assert!(matches!(refused, Err(Error::Enroll(enroll::Error::WrongCa))), "{refused:?}");
    assert!(plane.story().is_empty());

    let mut config = plane.config(work_dir.path());
    config.pool_token.as_mut().unwrap().secret = "lkp_other".into();
    let refused = Running::start(config).task.await.unwrap();
    assert!(matches!(refused, Err(Error::Enroll(enroll::Error::Refused(_)))), "{refused:?}");

    let agent = Running::start(plane.config(work_dir.path()));
    let job = v1::JobSpec { terraform_version: "0.1.0".into(), ..plan_job(&[]) };
    plane.offer(v1::Phase::Plan, 1, job);
    plane
        .wait("the decline", |world| {
            world.story.iter().any(|what| what.contains(" 0.1.0; this runner has "))
        })
        .await;
    agent.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_canceled_before_go_is_handed_back() {
    let (plane, work_dir) = (Plane::start().await, tempfile::tempdir().unwrap());
    plane.world().silent = true;
    let agent = Running::start(plane.config(work_dir.path()));
    let configuration = archive(&[("main.tf", MAIN), ("seconds", "0")]);
    plane.put(v1::ArtifactKind::Configuration, configuration.clone());
    plane.offer(v1::Phase::Plan, 1, plan_job(&configuration));
    plane.wait("the question", |world| world.story.contains(&"starting".to_owned())).await;
    plane.world().cancel = true;
    plane.wait("the hand back", |world| world.story.contains(&"never started".to_owned())).await;
    plane
        .wait("the wipe", |world| {
            world.story.last().is_some_and(|what| what == "heartbeat")
                && jobs_left(work_dir.path()).is_empty()
        })
        .await;
    assert!(plane.world().finished.is_none());
    agent.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_state_that_is_refused_is_brought_as_undelivered() {
    let (plane, work_dir) = (Plane::start().await, tempfile::tempdir().unwrap());
    let agent = Running::start(plane.config(work_dir.path()));
    let digests = plan(&plane, "0").await;
    plane.world().refuses_state = true;
    plane.offer(v1::Phase::Apply, 2, apply_job(digests));
    let finished = plane.finished().await;
    let Some(v1::finished::Result::Failed(failed)) = finished.result else {
        panic!("{finished:?}")
    };
    assert_eq!(failed.kind(), v1::JobFailure::StateUndelivered);
    assert!(failed.reason.contains("does not continue"), "{}", failed.reason);
    assert!(!plane.artifact(v1::ArtifactKind::ErroredState, 0).is_empty());
    agent.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn never_started_is_said_only_when_no_supervisor_can_live() {
    let (plane, work_dir) = (Plane::start().await, tempfile::tempdir().unwrap());
    let lease =
        Lease { run_id: "run1".into(), phase: crate::job::Phase::Plan, epoch: 1, generation: 1 };
    let jobs = work_dir.path().join("jobs");
    private_directory(&jobs).unwrap();
    let spec = crate::job_directory::tests::spec();
    let settings = crate::job_directory::tests::settings();
    let directory = JobDirectory::create(&jobs, &lease, &spec, &settings).unwrap();
    directory.record("starting", &lease).unwrap();
    // A supervisor that lives but cannot be reached.
    let lock = directory.claim().unwrap().unwrap();
    plane.world().offer =
        Some(v1::Offer { lease: Some(lease.to_wire()), job: Some(plan_job(&[])) });
    let agent = Running::start(plane.config(work_dir.path()));
    let beats = |world: &World| world.story.iter().filter(|what| *what == "heartbeat").count();
    plane.wait("some heartbeats", |world| beats(world) >= 5).await;
    assert!(!plane.story().contains(&"never started".to_owned()), "{:?}", plane.story());
    drop(lock);
    plane.wait("the hand back", |world| world.story.contains(&"never started".to_owned())).await;
    plane
        .wait("the wipe", |world| {
            world.story.last().is_some_and(|what| what == "heartbeat")
                && jobs_left(work_dir.path()).is_empty()
        })
        .await;
    agent.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fault_of_this_host_hands_the_job_back() {
    let (plane, work_dir) = (Plane::start().await, tempfile::tempdir().unwrap());
    // The job's directory cannot get its name.
    std::fs::create_dir(work_dir.path().join("jobs")).unwrap();
    std::fs::write(work_dir.path().join("jobs/run1-plan-1-g1"), "in the way").unwrap();
    let mut config = plane.config(work_dir.path());
    let agent = Running::start(config);
    plane.offer(v1::Phase::Plan, 1, plan_job(&[]));
    let handed_back =
        |world: &World| world.story.iter().filter(|what| *what == "never started").count();
    plane.wait("the hand back", |world| handed_back(world) == 1).await;
    agent.stop().await.unwrap();

    // No supervisor can be started.
    config = plane.config(work_dir.path());
    config.program.exe = "/nonexistent".into();
    let agent = Running::start(config);
    plane.offer(v1::Phase::Plan, 2, plan_job(&[]));
    plane.wait("the second hand back", |world| handed_back(world) == 2).await;
    assert!(!plane.story().iter().any(|what| what.starts_with("decline")), "{:?}", plane.story());
    agent.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_download_takes_nothing_of_the_time_to_wait_for_go() {
    let (plane, work_dir) = (Plane::start().await, tempfile::tempdir().unwrap());
    let agent = Running::start(plane.config(work_dir.path()));
    plane.world().holds_back = true;
    let configuration = archive(&[("main.tf", MAIN), ("seconds", "0")]);
    plane.put(v1::ArtifactKind::Configuration, configuration.clone());
    plane.offer(v1::Phase::Plan, 1, plan_job(&configuration));
    plane.wait("the download", |world| world.story.contains(&"fetch".to_owned())).await;
    let beats = |world: &World| world.story.iter().filter(|what| *what == "heartbeat").count();
    let so_far = beats(&plane.world());
    plane.wait("some heartbeats", |world| beats(world) >= so_far + 5).await;
    // A supervisor that waits has a lock.
    let directory = jobs_left(work_dir.path()).remove(0);
    assert!(!directory.join("supervisor.lock").exists());
    plane.world().holds_back = false;
    plane.changed.notify_waiters();
    let finished = plane.finished().await;
    assert!(matches!(finished.result, Some(v1::finished::Result::Plan(_))), "{finished:?}");
    agent.stop().await.unwrap();
}

/// What was welcomed comes back within a heartbeat, however often it has failed: well before the
/// leases lapse that it has renewed. Otherwise these tries would take minutes.
#[tokio::test(flavor = "multi_thread")]
async fn a_runner_that_was_welcomed_never_waits_longer_than_a_heartbeat() {
    let (plane, work_dir) = (Plane::start().await, tempfile::tempdir().unwrap());
    let agent = Running::start(plane.config(work_dir.path()));
    plane.wait("a heartbeat", |world| world.story.contains(&"heartbeat".to_owned())).await;
    plane.world().is_old = true;
    plane.cut();
    let begun = Instant::now();
    let refusals = |world: &World| world.story.iter().filter(|what| *what == "refused").count();
    plane.wait("many refusals", |world| refusals(world) >= 40).await;
    // Full jitter: half of it on average.
    assert!(begun.elapsed() < 40 * HEARTBEAT + LIMIT / 4, "{:?}", begun.elapsed());
    agent.stop().await.unwrap();
}

/// Of a control plane, and of a runner that was not welcomed yet.
#[test]
fn no_wait_outlasts_the_term_of_a_lease() {
    const DEFAULT_TERM: Duration = Duration::from_secs(45);
    let mut backoff = Backoff::new(FIRST_WAIT, LONGEST_WAIT);
    let longest = (0..40).map(|_| backoff.next(1.0)).max().unwrap();
    assert!(longest * 2 < DEFAULT_TERM, "{longest:?}");
}
