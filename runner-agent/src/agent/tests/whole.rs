//! A job from its offer to its end, or to the word that refuses it.

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn a_run_is_planned_and_applied_over_faulty_connections() {
    let (plane, work_dir) = (Plane::start().await, tempfile::tempdir().unwrap());
    plane.world().faulty = true;
    let agent = Running::start(plane.config(work_dir.path()));
    let digests = plan(&plane, "0").await;
    plane.offer(v1::Phase::Apply, 2, apply_job(digests));
    plane
        .wait("the apply to start", |world| {
            String::from_utf8_lossy(&world.log).contains("local-exec): begun")
        })
        .await;
    plane.cut();
    let finished = plane.finished().await;
    let log = String::from_utf8(plane.world().log.clone()).unwrap();
    let Some(v1::finished::Result::Apply(apply)) = finished.result else {
        panic!("{finished:?}\n{log}");
    };
    assert_eq!(finished.log_length, log.len() as u64);
    assert_eq!(apply.outputs_json, r#"{"x":{"sensitive":false,"type":"string","value":"value"}}"#);
    for n in 1..=9 {
        assert_eq!(log.matches(&format!("local-exec): line {n}\"")).count(), 1, "{log}");
    }
    assert!(!plane.artifact(v1::ArtifactKind::State, 1).is_empty());
    plane.wait("the story to end", |world| world.story.last().unwrap() != "finished").await;
    agent.stop().await.unwrap();
    assert!(jobs_left(work_dir.path()).is_empty());
    let story = plane.story();
    assert_eq!(story.iter().filter(|what| *what == "enroll").count(), 1);
    let artifacts = story.iter().position(|what| what.contains("WORKSPACE")).unwrap();
    assert!(artifacts < story.iter().position(|what| what == "finished").unwrap(), "{story:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_is_replaced_in_mid_apply_brings_the_job_home() {
    let (plane, work_dir) = (Plane::start().await, tempfile::tempdir().unwrap());
    let agent = Running::start(plane.config(work_dir.path()));
    let digests = plan(&plane, "1").await;
    plane.offer(v1::Phase::Apply, 2, apply_job(digests));
    plane
        .wait("the apply to start", |world| {
            String::from_utf8_lossy(&world.log).contains("local-exec): begun")
        })
        .await;
    agent.stop().await.unwrap();
    let jobs = jobs_left(work_dir.path());
    assert_eq!(jobs.len(), 1);
    for name in names_in_the_environment_of_the_supervisor(&jobs[0]) {
        assert!(["PATH", "HOME", "LATCHKEY_RUNNER_LOG"].contains(&name.as_str()), "{name}");
    }

    // The second one has no token: it uses the identity of the first.
    let config = Config { pool_token: None, ..plane.config(work_dir.path()) };
    let agent = Running::start(config);
    let finished = plane.finished().await;
    let log = String::from_utf8(plane.world().log.clone()).unwrap();
    assert!(matches!(finished.result, Some(v1::finished::Result::Apply(_))), "{finished:?}\n{log}");
    for text in ["begun", "line 1", "line 9"] {
        assert_eq!(log.matches(&format!("local-exec): {text}\"")).count(), 1, "{log}");
    }
    let starts = plane.story().iter().filter(|what| *what == "starting").count();
    assert_eq!(starts, 2, "one for the plan, one for the apply");
    agent.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_not_approved_is_refused_before_it_is_asked_for() {
    let (plane, work_dir) = (Plane::start().await, tempfile::tempdir().unwrap());
    let agent = Running::start(plane.config(work_dir.path()));
    let digests = plan(&plane, "0").await;
    let starts = |plane: &Plane| plane.story().iter().filter(|w| *w == "starting").count();
    let refused = async |epoch, digests: v1::ApprovedPlan| {
        plane.world().story.clear();
        plane.offer(v1::Phase::Apply, epoch, apply_job(digests));
        plane.declined().await
    };
    let plan_changed = v1::ApprovedPlan { plan_digest: "0".repeat(64), ..digests.clone() };
    assert!(refused(2, plan_changed).await.contains("saved plan"));
    let lock_changed = v1::ApprovedPlan { lock_file_digest: "0".repeat(64), ..digests.clone() };
    assert!(refused(3, lock_changed).await.contains("lock file"));

    // A side file is changed: the saved plan alone would not notice.
    let sealed = plane.artifact(v1::ArtifactKind::Workspace, 0);
    let dir = tempfile::tempdir().unwrap();
    crate::extract::extract(sealed.as_slice(), dir.path(), crate::extract::WORKSPACE).unwrap();
    std::fs::write(dir.path().join("work/seconds"), "1").unwrap();
    let packed = dir.path().join("packed");
    crate::workspace::pack(dir.path(), Path::new(""), &packed).unwrap();
    plane.put(v1::ArtifactKind::Workspace, std::fs::read(packed).unwrap());
    assert!(refused(4, digests).await.contains("archive"));
    assert_eq!(starts(&plane), 0);
    assert!(plane.world().finished.is_none());
    agent.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_configuration_that_cannot_be_prepared_fails_with_the_reason() {
    let (plane, work_dir) = (Plane::start().await, tempfile::tempdir().unwrap());
    let agent = Running::start(plane.config(work_dir.path()));
    let backend = "terraform {\n backend \"s3\" {}\n}";
    let configuration = archive(&[("main.tf", MAIN), ("x_override.tf", backend)]);
    plane.put(v1::ArtifactKind::Configuration, configuration.clone());
    plane.offer(v1::Phase::Plan, 1, plan_job(&configuration));
    let reason = plane.declined().await;
    assert!(reason.contains("x_override.tf"), "{reason}");
    assert!(String::from_utf8_lossy(&plane.world().log).contains("x_override.tf"));
    assert!(!plane.story().contains(&"starting".to_owned()));
    agent.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lease_given_up_before_go_leaves_nothing() {
    let (plane, work_dir) = (Plane::start().await, tempfile::tempdir().unwrap());
    plane.world().silent = true;
    let agent = Running::start(plane.config(work_dir.path()));
    let configuration = archive(&[("main.tf", MAIN), ("seconds", "0")]);
    plane.put(v1::ArtifactKind::Configuration, configuration.clone());
    plane.offer(v1::Phase::Plan, 1, plan_job(&configuration));
    let count = |world: &World, what: &str| world.story.iter().filter(|w| *w == what).count();
    plane.wait("the question", |world| count(world, "starting") == 1).await;
    // It asks again after a reconnect.
    plane.cut();
    plane.wait("the question again", |world| count(world, "starting") == 2).await;
    plane.world().give_up = true;
    plane.world().offer = None;
    plane.cut();
    plane
        .wait("the wipe", |world| {
            world.story.last().is_some_and(|what| what == "heartbeat")
                && jobs_left(work_dir.path()).is_empty()
        })
        .await;
    assert!(plane.world().log.is_empty() && plane.world().finished.is_none());
    agent.stop().await.unwrap();
    assert!(jobs_left(work_dir.path()).is_empty());
}
