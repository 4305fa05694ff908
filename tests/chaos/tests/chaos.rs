//! The short selection of `cargo chaos`, and that it would see what it looks for.

use std::process::{Command, Output};

/// Plays rounds as `cargo chaos` does.
fn chaos(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_latchkey-chaos"));
    command.args(arguments).output().unwrap()
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
    // The point behind the start of terraform, in an apply.
    let scenario = ["--scenario", "points", "--rounds", "1", "--seed", "51"];
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

/// What the failpoints' feature compiles in has this text; what it leaves out, has not.
#[test]
fn only_test_programs_contain_failpoints() {
    let contains = |path: &std::path::Path| {
        let needle = latchkey_failpoint::VARIABLE.as_bytes();
        let bytes = std::fs::read(path).unwrap();
        bytes.windows(needle.len()).any(|piece| piece == needle)
    };
    let own = std::path::Path::new(env!("CARGO_BIN_EXE_latchkey-chaos"));
    assert!(contains(own), "or this test would see nothing");
    for manifest in ["control-plane", "runner-agent", "cli", "deploy/dev"] {
        let root = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");
        let text = std::fs::read_to_string(format!("{root}/{manifest}/Cargo.toml")).unwrap();
        let enabled =
            text.lines().any(|line| line.contains("failpoint") && line.contains("features"));
        assert!(!enabled, "{manifest} turns failpoints on");
    }
    let main = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/src/programs.rs"));
    assert!(main.unwrap().contains("latchkey_failpoint::arm()"));
}
