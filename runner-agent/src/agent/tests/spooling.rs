//! What happens when this host has no room for what jobs write.

use super::*;

const CHATTY: &str = r#"
resource "terraform_data" "x" {
  input = "value"
  provisioner "local-exec" {
    command = "echo begun; head -c 700000 /dev/zero | tr '\\0' x | fold -w 1000; sleep 2; echo unheard; sleep 0.2; echo the end"
  }
}
"#;

#[tokio::test(flavor = "multi_thread")]
async fn a_full_spool_cuts_the_log_and_nothing_else() {
    let (plane, work_dir) = (Plane::start().await, tempfile::tempdir().unwrap());
    let mut config = plane.config(work_dir.path());
    config.spool = spool::Limits { spool: 400 << 10, low_water: 0 };
    let agent = Running::start(config);
    let configuration = archive(&[("main.tf", CHATTY)]);
    plane.put(v1::ArtifactKind::Configuration, configuration.clone());
    plane.offer(v1::Phase::Plan, 1, plan_job(&configuration));
    let Some(v1::finished::Result::Plan(plan)) = plane.finished().await.result else {
        panic!("that is a plan")
    };
    plane.offer(v1::Phase::Apply, 2, apply_job(plan.digests.unwrap()));
    let finished = plane.finished().await;
    let log = String::from_utf8(plane.world().log.clone()).unwrap();
    assert!(matches!(finished.result, Some(v1::finished::Result::Apply(_))), "{finished:?}");
    assert_eq!(finished.log_length, log.len() as u64);
    assert!(!plane.artifact(v1::ArtifactKind::State, 1).is_empty());
    assert!(log.contains("local-exec): begun"));
    assert!(!log.contains("local-exec): unheard"), "it was not left out");
    let tail: Vec<&str> = log.lines().rev().take(4).collect();
    assert!(log.contains("the spool of this host is full"), "{tail:?}");
    assert!(log.contains("bytes of output were left out"), "{tail:?}");
    agent.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_without_room_hands_offers_back() {
    let (plane, work_dir) = (Plane::start().await, tempfile::tempdir().unwrap());
    let mut config = plane.config(work_dir.path());
    config.spool = spool::Limits { spool: 4 << 30, low_water: u64::MAX / 2 };
    let agent = Running::start(config);
    plane.wait("a heartbeat", |world| world.story.contains(&"heartbeat".to_owned())).await;
    plane.offer(v1::Phase::Plan, 1, plan_job(&[]));
    plane.wait("the hand back", |world| world.story.contains(&"never started".to_owned())).await;
    assert!(!plane.story().contains(&"accept".to_owned()));
    agent.stop().await.unwrap();
}
