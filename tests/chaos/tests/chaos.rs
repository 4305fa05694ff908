//! The short selection of `cargo chaos`, and that it would see what it looks for.

use std::process::{Command, Output};

/// Plays rounds as `cargo chaos` does.
fn chaos(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_latchkey-chaos"));
    command.args(arguments).output().expect("the program was built with this test")
}

#[track_caller]
fn check_seen(arguments: &[&str], invariant: &str) {
    let output = chaos(arguments);
    let said = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains(&format!("violated: {invariant}")), "{said}");
    assert!(said.contains("again: cargo chaos --scenario"), "{said}");
}

#[test]
fn the_short_selection_finds_no_broken_promise() {
    let output = chaos(&["--short"]);
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}\n{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn a_supervisor_that_does_not_record_its_exec_is_seen_to_apply_twice() {
    // The point behind a state that was written: terraform has surely noted its start.
    let scenario = ["--scenario", "points", "--rounds", "1", "--seed", "54"];
    let planted = [&scenario[..], &["--plant", "exec.unrecorded"]].concat();
    check_seen(&planted, "one start of apply per approval");
}

#[test]
fn a_state_that_is_acknowledged_and_not_kept_is_seen_to_be_lost() {
    let planted =
        ["--scenario", "calm", "--rounds", "1", "--seed", "1", "--plant", "state.dropped"];
    check_seen(&planted, "no state is lost");
}

#[test]
fn a_log_that_is_acknowledged_and_not_kept_is_seen_to_have_a_gap() {
    let planted = ["--scenario", "calm", "--rounds", "1", "--seed", "1", "--plant", "line.dropped"];
    check_seen(&planted, "the log is what terraform printed");
}

/// Built alone, as they are for use, programs have every point empty.
#[test]
fn only_test_programs_contain_failpoints() {
    let enabled = |package: &str| {
        let mut cargo = Command::new(env!("CARGO"));
        cargo.args(["tree", "--offline", "--locked", "-e", "normal", "--format", "{p}|{f}"]);
        cargo.args(["-p", package]).current_dir(env!("CARGO_MANIFEST_DIR"));
        let tree = String::from_utf8(cargo.output().unwrap().stdout).unwrap();
        let points: Vec<&str> =
            tree.lines().filter(|line| line.contains("latchkey-failpoint ")).collect();
        assert!(!points.is_empty(), "{package}: {tree}");
        points.iter().any(|line| line.contains("|enabled"))
    };
    assert!(enabled("latchkey-chaos"), "or this test would see nothing");
    for package in ["latchkey-control-plane", "latchkey-runner", "latchkey-dev"] {
        assert!(!enabled(package), "{package} has failpoints");
    }
}
