//! The simulation as part of `cargo test`: a bounded set of seeds, the sameness of a seed's runs,
//! and that a defect would be seen. More seeds: `cargo simulate --seeds 100000 --from 1000`.

use std::process::{Command, Output};

/// Says how many seeds to run; a default that takes half a minute otherwise.
const SEEDS: &str = "LATCHKEY_SIMULATION_SEEDS";

fn simulate(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_latchkey-simulate"));
    command.args(arguments).output().expect("the program of this crate was built")
}

fn text(output: &Output) -> String {
    let error = String::from_utf8_lossy(&output.stderr);
    format!("{}{error}", String::from_utf8_lossy(&output.stdout))
}

#[test]
fn no_seed_breaks_a_promise() {
    let seeds = std::env::var(SEEDS).unwrap_or_else(|_| "60".to_owned());
    let output = simulate(&["--seeds", &seeds, "--jobs", "2"]);
    assert!(output.status.success(), "{}", text(&output));
}

#[test]
fn one_seed_gives_one_trace() {
    for seed in ["1", "14"] {
        let (once, again) =
            (simulate(&["--one", seed, "--trace"]), simulate(&["--one", seed, "--trace"]));
        let once = text(&once);
        assert!(once.lines().count() > 20, "{once}");
        assert_eq!(once, text(&again), "seed {seed} gave two traces");
    }
    let other = simulate(&["--one", "2", "--trace"]);
    assert_ne!(text(&simulate(&["--one", "1", "--trace"])), text(&other));
}

#[track_caller]
fn check_is_seen(plant: &str, invariants: &[&str]) {
    let output = simulate(&["--plant", plant, "--seeds", "200", "--jobs", "2", "--first"]);
    let told = text(&output);
    assert!(!output.status.success(), "{plant} was not seen: {told}");
    let names = |invariant: &&str| told.contains(&format!("VIOLATION {invariant} "));
    assert!(invariants.iter().any(names), "{plant}: {told}");
}

#[test]
fn an_apply_that_is_granted_again_is_seen() {
    check_is_seen("apply-again", &["I2"]);
}

#[test]
fn a_grant_without_a_compare_and_swap_is_seen() {
    check_is_seen("blind-grant", &["I13", "I9"]);
}

#[test]
fn a_code_that_is_sent_twice_is_seen() {
    check_is_seen("code-twice", &["I5"]);
}

#[test]
fn an_exec_before_its_record_is_seen() {
    check_is_seen("exec-unsynced", &["I2"]);
}
