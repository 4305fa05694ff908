//! A real terraform that can write its state nowhere.

use std::os::unix::fs::PermissionsExt;

use super::*;
use crate::job_directory::STATE_DUMP;

#[tokio::test]
async fn a_state_that_terraform_prints_is_kept_and_never_logged() {
    // Neither a file of that name nor one in its place can be written, not even by root.
    let text = SLOW.replace("echo begun; sleep 2", "mkdir errored.tfstate; echo begun; sleep 1");
    let text = text.replace(
        "resource \"terraform_data\" \"after\" {",
        "resource \"terraform_data\" \"after\" {\n  input = sensitive(\"canary-in-state\")",
    );
    let mut apply = slow_apply(&text).await;
    // From here on the state endpoint refuses everything.
    std::fs::remove_dir_all(apply.directory.join("state")).unwrap();
    let result = apply.ended().await;
    let log = apply.log();
    let JobResult::Failed { kind: Failure::StateUndelivered, reason, exit_code: Some(1) } = &result
    else {
        panic!("{result:?}\n{log}");
    };
    assert!(reason.contains("printed it"), "{reason}");
    assert!(log.contains("go to quarantine"), "{log}");
    assert!(log.contains("Failed to persist state to backend"), "{log}");
    for absent in ["canary-in-state", "Emergency state dump", "lineage"] {
        assert!(!log.contains(absent), "{absent} in {log}");
    }
    let kept = apply.directory.join(STATE_DUMP);
    let state: Value = serde_json::from_slice(&std::fs::read(&kept).unwrap()).unwrap();
    assert_eq!(state["version"], 4);
    assert!(state.to_string().contains("canary-in-state"), "{state}");
    assert_eq!(std::fs::metadata(kept).unwrap().permissions().mode() & 0o777, 0o600);
}
