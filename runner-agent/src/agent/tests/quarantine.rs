//! What becomes of a job whose lease is lost, or seems to be.

use prost::Message;

use super::ending::apply_begins;
use super::*;

fn lose(plane: &Plane) {
    let mut world = plane.world();
    (world.loses_leases, world.quarantines, world.give_up) = (true, true, true);
    world.offer = None;
    drop(world);
    plane.cut();
}

fn beats(world: &World) -> usize {
    world.story.iter().filter(|what| *what == "heartbeat").count()
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
async fn an_apply_whose_lease_is_given_up_ends_and_all_it_has_goes_to_quarantine() {
    let (plane, work_dir) = (Plane::start().await, tempfile::tempdir().unwrap());
    let agent = Running::start(plane.config(work_dir.path()));
    apply_begins(&plane, "1").await;
    lose(&plane);
    wiped(&plane, work_dir.path()).await;
    assert!(!plane.artifact(v1::ArtifactKind::State, 1).is_empty());
    let log = String::from_utf8(plane.artifact(v1::ArtifactKind::Log, 0)).unwrap();
    for text in ["begun", "line 1", "line 9"] {
        assert_eq!(log.matches(&format!("local-exec): {text}\"")).count(), 1, "{log}");
    }
    let result = plane.artifact(v1::ArtifactKind::Result, 0);
    let result = v1::Finished::decode(result.as_slice()).unwrap();
    assert!(matches!(result.result, Some(v1::finished::Result::Apply(_))), "{result:?}");
    assert_eq!((result.log_length, result.lease.unwrap().epoch), (log.len() as u64, 2));
    assert_eq!(plane.story().iter().filter(|what| *what == "finished").count(), 1, "of the plan");
    assert!(!work_dir.path().join("kept").exists());
    agent.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plan_whose_lease_is_given_up_is_stopped_at_once() {
    let (plane, work_dir) = (Plane::start().await, tempfile::tempdir().unwrap());
    let script = work_dir.path().join("terraform");
    std::fs::write(&script, ENDLESS_PLAN).unwrap();
    std::fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
    let mut config = plane.config(work_dir.path());
    let script = script.to_str().unwrap();
    config.engines = EngineSettings::of(&["--terraform", script], work_dir.path());
    let agent = Running::start(config);
    let configuration = archive(&[("main.tf", "")]);
    plane.put(v1::ArtifactKind::Configuration, configuration.clone());
    plane.offer(v1::Phase::Plan, 1, plan_job(&configuration));
    plane
        .wait("the plan to start", |world| String::from_utf8_lossy(&world.log).contains("endless"))
        .await;
    lose(&plane);
    wiped(&plane, work_dir.path()).await;
    let log = String::from_utf8(plane.artifact(v1::ArtifactKind::Log, 0)).unwrap();
    assert!(log.contains("interrupted"), "{log}");
    let result = plane.artifact(v1::ArtifactKind::Result, 0);
    let result = v1::Finished::decode(result.as_slice()).unwrap();
    assert!(matches!(result.result, Some(v1::finished::Result::Failed(_))), "{result:?}");
    agent.stop().await.unwrap();
}

const ENDLESS_PLAN: &str = r#"#!/bin/sh
case "$1" in
version) echo '{"terraform_version":"1.9.9"}' ;;
plan)
    trap 'echo interrupted; exit 1' INT
    echo endless
    while :; do sleep 0.05; done
    ;;
esac
"#;

#[tokio::test(flavor = "multi_thread")]
async fn that_a_lease_is_lost_is_not_believed_of_an_upload_alone() {
    let (plane, work_dir) = (Plane::start().await, tempfile::tempdir().unwrap());
    let agent = Running::start(plane.config(work_dir.path()));
    apply_begins(&plane, "0").await;
    {
        let mut world = plane.world();
        (world.loses_leases, world.renews_lost_leases) = (true, true);
    }
    plane.cut();
    let result = work_dir.path().join("jobs/run1-apply-2-g1/result.json");
    plane.wait("the end of terraform", |_| result.exists()).await;
    plane.wait("a refusal", |world| world.story.iter().any(|what| what.starts_with("lost "))).await;
    plane.world().loses_leases = false;
    let finished = plane.finished().await;
    assert!(matches!(finished.result, Some(v1::finished::Result::Apply(_))), "{finished:?}");
    assert_eq!(finished.log_length, plane.world().log.len() as u64);
    agent.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_control_plane_on_an_old_copy_makes_nobody_forget_anything() {
    let (plane, work_dir) = (Plane::start().await, tempfile::tempdir().unwrap());
    let agent = Running::start(plane.config(work_dir.path()));
    apply_begins(&plane, "0").await;
    {
        let mut world = plane.world();
        (world.loses_leases, world.is_old) = (true, true);
    }
    plane.cut();
    let result = work_dir.path().join("jobs/run1-apply-2-g1/result.json");
    plane.wait("the end of terraform", |_| result.exists()).await;
    let refusals = |world: &World| world.story.iter().filter(|what| *what == "refused").count();
    plane.wait("three refusals", |world| refusals(world) >= 3).await;
    assert!(result.exists() && !work_dir.path().join("kept").exists());
    {
        let mut world = plane.world();
        (world.loses_leases, world.is_old) = (false, false);
    }
    let finished = plane.finished().await;
    assert!(matches!(finished.result, Some(v1::finished::Result::Apply(_))), "{finished:?}");
    assert!(!plane.artifact(v1::ArtifactKind::State, 1).is_empty());
    agent.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_result_that_comes_too_late_goes_to_quarantine_with_the_rest() {
    let (plane, work_dir) = (Plane::start().await, tempfile::tempdir().unwrap());
    let agent = Running::start(plane.config(work_dir.path()));
    apply_begins(&plane, "0").await;
    plane.world().revokes_finished = true;
    wiped(&plane, work_dir.path()).await;
    assert!(!plane.artifact(v1::ArtifactKind::Log, 0).is_empty());
    assert!(!plane.artifact(v1::ArtifactKind::Result, 0).is_empty());
    agent.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_nobody_takes_is_kept_for_a_person() {
    let (plane, work_dir) = (Plane::start().await, tempfile::tempdir().unwrap());
    let agent = Running::start(plane.config(work_dir.path()));
    apply_begins(&plane, "1").await;
    plane.world().loses_leases = true;
    let kept = work_dir.path().join("kept/run1-apply-2-g1");
    plane.wait("the state to be kept", |_| kept.join("state/0001").exists()).await;
    assert!(plane.story().contains(&"lost ARTIFACT_KIND_STATE".to_owned()));
    let log = std::fs::read_to_string(kept.join("log")).unwrap();
    assert!(log.contains("line 9") && kept.join("result.json").exists());
    assert!(!kept.join("work").exists());
    agent.stop().await.unwrap();

    // When there is room for it after all, the next start finds that out.
    plane.world().artifacts.clear();
    plane.world().quarantines = true;
    let agent = Running::start(plane.config(work_dir.path()));
    let left = || std::fs::read_dir(work_dir.path().join("kept")).unwrap().count();
    plane
        .wait("the offer", |world| {
            world.story.last().is_some_and(|w| w == "heartbeat") && left() == 0
        })
        .await;
    assert!(!plane.artifact(v1::ArtifactKind::State, 1).is_empty());
    assert!(!plane.artifact(v1::ArtifactKind::Result, 0).is_empty());
    agent.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_waits_for_its_quarantine_costs_the_others_no_connection() {
    let (plane, work_dir) = (Plane::start().await, tempfile::tempdir().unwrap());
    let agent = Running::start(plane.config(work_dir.path()));
    apply_begins(&plane, "0").await;
    plane.world().is_full = true;
    lose(&plane);
    plane.wait("an upload that fails", |world| world.story.contains(&"full".to_owned())).await;
    let hellos = plane.world().hellos.len();
    let beats = beats(&plane.world());
    plane.wait("many heartbeats", |world| self::beats(world) >= beats + 40).await;
    assert_eq!(plane.world().hellos.len(), hellos, "{:?}", plane.story());
    plane.world().is_full = false;
    wiped(&plane, work_dir.path()).await;
    assert!(!plane.artifact(v1::ArtifactKind::State, 1).is_empty());
    agent.stop().await.unwrap();
}
