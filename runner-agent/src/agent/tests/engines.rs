//! Runners that have no engine, and jobs that want another one.

use super::*;
use crate::engine::tests::at_hand_engine;
use crate::engine::{MirrorOfTests, archive_of_tests};

/// A runner whose PATH is empty.
fn config(plane: &Plane, work_dir: &Path, engines: &[&str]) -> Config {
    let mut engines = EngineSettings::of(engines, work_dir);
    engines.path.clear();
    Config { engines, ..plane.config(work_dir) }
}

fn told(plane: &Plane) -> Vec<String> {
    let hello = plane.world().hellos.last().cloned().unwrap();
    hello.engines.iter().map(|engine| format!("{}@{}", engine.name, engine.version)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_runner_without_an_engine_installs_one_from_a_mirror_and_applies() {
    let (plane, work_dir) = (Plane::start().await, tempfile::tempdir().unwrap());
    let engine = at_hand_engine();
    let release = format!("{}@{}", engine.name, engine.version);
    let mirror = MirrorOfTests::start();
    let program = std::fs::read(&engine.path).unwrap();
    mirror.put_release(&release, archive_of_tests(&[(engine.name.program(), &program)]));
    let arguments = ["--engine-mirror", &mirror.base, "--engine-default-version", &release];
    let agent = Running::start(config(&plane, work_dir.path(), &arguments));

    let configuration = archive(&[("main.tf", MAIN), ("seconds", "0")]);
    plane.put(v1::ArtifactKind::Configuration, configuration.clone());
    plane.offer(v1::Phase::Plan, 1, plan_job(&configuration));
    let finished = plane.finished().await;
    let Some(v1::finished::Result::Plan(plan)) = finished.result else { panic!("{finished:?}") };
    assert_eq!(
        (plan.engine.as_str(), &plan.terraform_version),
        (engine.name.program(), &engine.version)
    );
    assert_eq!(told(&plane)[0], release);
    assert!(told(&plane).contains(&format!("{}@*", engine.name)), "{:?}", told(&plane));
    let log = String::from_utf8_lossy(&plane.world().log).into_owned();
    assert!(log.contains(&format!("was installed from {}", mirror.base)), "{log}");

    // Exactly the engine of the plan, which is there now.
    let job = v1::JobSpec {
        engine: plan.engine,
        terraform_version: plan.terraform_version,
        ..apply_job(plan.digests.unwrap())
    };
    plane.offer(v1::Phase::Apply, 2, job);
    let finished = plane.finished().await;
    assert!(matches!(finished.result, Some(v1::finished::Result::Apply(_))), "{finished:?}");
    assert!(!String::from_utf8_lossy(&plane.world().log).contains("was installed"));
    assert_eq!(mirror.downloads(&release), 1);
    let installed = work_dir.path().join("engines").join(engine.name.program());
    assert!(installed.join(&engine.version).join(engine.name.program()).is_file());
    agent.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_engine_that_cannot_be_had_ends_the_run_with_the_reason() {
    let (plane, work_dir) = (Plane::start().await, tempfile::tempdir().unwrap());
    let mirror = MirrorOfTests::start();
    mirror.put_release("terraform@1.9.0", archive_of_tests(&[("terraform", b"forged")]));
    let pin = format!("terraform@1.9.0={}", "ab".repeat(32));
    let arguments = ["--engine-mirror", &mirror.base, "--engine-checksum", &pin];
    let agent = Running::start(config(&plane, work_dir.path(), &arguments));
    for (epoch, version, expect) in
        [(1, "1.9.0", "checksum differs"), (2, "1.9.1", "the mirror does not have it")]
    {
        plane.world().story.clear();
        let configuration = archive(&[("main.tf", MAIN), ("seconds", "0")]);
        plane.put(v1::ArtifactKind::Configuration, configuration.clone());
        let job = v1::JobSpec {
            engine: "terraform".into(),
            terraform_version: version.into(),
            ..plan_job(&configuration)
        };
        plane.offer(v1::Phase::Plan, epoch, job);
        let reason = plane.declined().await;
        let begins = format!("failed to install terraform {version} from {}", mirror.base);
        assert!(reason.starts_with(&begins) && reason.contains(expect), "{reason}");
    }
    agent.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_whose_mirror_cannot_be_reached_is_handed_back() {
    let (plane, work_dir) = (Plane::start().await, tempfile::tempdir().unwrap());
    let arguments = ["--engine-mirror", "http://127.0.0.1:1"];
    let agent = Running::start(config(&plane, work_dir.path(), &arguments));
    let configuration = archive(&[("main.tf", MAIN), ("seconds", "0")]);
    plane.put(v1::ArtifactKind::Configuration, configuration.clone());
    plane.offer(v1::Phase::Plan, 1, plan_job(&configuration));
    plane.wait("the hand back", |world| world.story.contains(&"never started".to_owned())).await;
    assert!(plane.world().finished.is_none());
    agent.stop().await.unwrap();
}
