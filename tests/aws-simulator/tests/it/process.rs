//! The simulation as a process: how it says that it is ready, and when it ends.

use std::process::Stdio;
use std::time::Duration;

use latchkey_aws_simulator::Facts;
use tokio::process::Command;

use crate::support::control;

#[tokio::test]
async fn the_process_writes_its_facts_and_ends_with_its_standard_input() {
    let directory = tempfile::tempdir().unwrap();
    let (ready, world) = (directory.path().join("ready.json"), directory.path().join("world.json"));
    let json = r#"{"accounts": [{"id": "210987654321", "users": [{"name": "alice",
        "access_keys": [{}], "devices": [{"serial": "GAHT12345678"}]}]}]}"#;
    std::fs::write(&world, json).unwrap();
    let mut process = Command::new(env!("CARGO_BIN_EXE_latchkey-aws-simulator"))
        .args(["--exit-with-stdin", "--ready-file"])
        .arg(&ready)
        .arg("--world")
        .arg(&world)
        .stdin(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let appeared = tokio::time::timeout(Duration::from_secs(20), async {
        while !ready.exists() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    });
    appeared.await.expect("the ready file appears");
    let facts: Facts = serde_json::from_slice(&std::fs::read(&ready).unwrap()).unwrap();
    assert_eq!((facts.account_id.as_str(), facts.user.as_str()), ("210987654321", "alice"));
    let (status, code) = control(facts.address, "GET", "code?serial=GAHT12345678", "").await;
    assert_eq!((status, code["code"].as_str().unwrap().len()), (200, 6));
    drop(process.stdin.take());
    let ended = tokio::time::timeout(Duration::from_secs(20), process.wait()).await;
    assert!(ended.expect("it ends in time").unwrap().success());
}

#[tokio::test]
async fn an_address_that_others_can_reach_is_refused() {
    let output = Command::new(env!("CARGO_BIN_EXE_latchkey-aws-simulator"))
        .args(["--listen", "0.0.0.0:0"])
        .output()
        .await
        .unwrap();
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("must be loopback"));
}
