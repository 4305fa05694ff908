//! A forced cancel, from the control plane to the last program of terraform's.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::Value;

use super::*;
use crate::job_directory::JobDirectory;
use crate::supervisor::loopback::request;
use crate::supervisor::tests::forced::{
    ask, keep_the_supervisor, let_the_supervisor_go, terraform_is_gone,
};

/// Writes a state as the terraform of the job would, in the middle of its apply.
async fn write_state(directory: &JobDirectory, state: &str) {
    let endpoints: Value = directory.read("endpoints.json").unwrap();
    let lock: Value = directory.read("state-lock").unwrap();
    let host = format!("127.0.0.1:{}", endpoints["state_port"]);
    let login = format!("latchkey:{}", endpoints["state_password"].as_str().unwrap());
    let login = format!("Basic {}", STANDARD.encode(login));
    let path = format!("/state?ID={}", lock["ID"].as_str().unwrap());
    let headers = [("Host", host.as_str()), ("Authorization", &login)];
    let (status, _) = request(&host, "POST", &path, &headers, state.as_bytes()).await;
    assert_eq!(status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_forced_cancel_kills_terraform_and_ships_the_state_that_was_written_before() {
    let (plane, work_dir) = (Plane::start().await, tempfile::tempdir().unwrap());
    let _agent = Running::start(plane.config(work_dir.path()));
    ending::apply_begins(&plane, "600").await;
    let directory = JobDirectory::list(&work_dir.path().join("jobs")).unwrap().remove(0);
    let written = r#"{"version":4,"serial":1,"lineage":"of-this-test"}"#;
    write_state(&directory, written).await;
    {
        let mut world = plane.world();
        world.forces = true;
        world.cancel = true;
    }
    let finished = plane.finished().await;
    let Some(v1::finished::Result::Failed(failed)) = &finished.result else {
        panic!("{finished:?}");
    };
    assert_eq!(failed.kind(), v1::JobFailure::EndedUnknown, "{failed:?}");
    assert!(failed.reason.contains("by force"), "{failed:?}");
    let world = plane.world();
    let state = (v1::ArtifactKind::State.into(), 1);
    assert_eq!(world.artifacts[&state], written.as_bytes());
    assert_eq!(finished.log_length, world.log.len() as u64);
}

/// The supervisor is held at its end, where a program that survives so far would ask.
#[tokio::test(flavor = "multi_thread")]
async fn after_a_forced_cancel_the_job_gets_no_credentials() {
    let (plane, work_dir) = (Plane::start().await, tempfile::tempdir().unwrap());
    let agent = Running::start(plane.config(work_dir.path()));
    ending::apply_begins(&plane, "600").await;
    let directory = JobDirectory::list(&work_dir.path().join("jobs")).unwrap().remove(0);
    assert_eq!(ask(&directory).await.0, 200);
    keep_the_supervisor(&directory);
    {
        let mut world = plane.world();
        world.forces = true;
        world.cancel = true;
    }
    terraform_is_gone(&directory).await;
    let (status, body) = ask(&directory).await;
    assert!(status == 403 && body.contains("Withdrawn"), "{status} {body}");
    // A reconnect gives none back.
    plane.cut();
    let hellos =
        |world: &World| world.story.iter().filter(|said| said.starts_with("hello")).count();
    let before = hellos(&plane.world());
    plane.wait("a reconnect", |world| hellos(world) > before).await;
    assert_eq!(ask(&directory).await.0, 403);
    let_the_supervisor_go(&directory);
    let finished = plane.finished().await;
    assert!(matches!(finished.result, Some(v1::finished::Result::Failed(_))), "{finished:?}");
    agent.stop().await.unwrap();
}
