//! However terraform's output arrives, and wherever it ends: no secret and no state in the log.

use std::fs::OpenOptions;
use std::io::Write;

use proptest::prelude::*;
use proptest::test_runner::Config;

use super::tests::CAP_OF_TESTS;
use super::*;
use crate::job::Phase;
use crate::job_directory::STATE_DUMP;
use crate::job_directory::tests as samples;

struct Written {
    _jobs: tempfile::TempDir,
    directory: JobDirectory,
    writer: Writer,
}

impl Written {
    fn start(secrets: &[&str]) -> Self {
        let jobs = tempfile::tempdir().unwrap();
        let lease = samples::lease("r1", Phase::Apply);
        let directory =
            JobDirectory::create(jobs.path(), &lease, &samples::spec(), &samples::settings())
                .unwrap();
        let writer = open(&directory, secrets);
        Self { _jobs: jobs, directory, writer }
    }

    fn print(&mut self, chunk: &[u8]) {
        let mut raw = OpenOptions::new().append(true).open(self.directory.join("raw")).unwrap();
        raw.write_all(chunk).unwrap();
        assert!(self.writer.tick(false));
    }

    /// A successor in place of a supervisor that was killed.
    fn succeed(&mut self, secrets: &[&str]) {
        self.writer = open(&self.directory, secrets);
    }

    fn end(&mut self) -> String {
        assert!(self.writer.tick(true));
        let log = std::fs::read_to_string(self.directory.join("log")).unwrap();
        for line in log.lines() {
            serde_json::from_str::<Value>(line).unwrap();
        }
        log
    }

    fn dump(&self) -> Option<String> {
        std::fs::read_to_string(self.directory.join(STATE_DUMP)).ok()
    }
}

fn open(directory: &JobDirectory, secrets: &[&str]) -> Writer {
    let mut masker = Masker::default();
    secrets.iter().for_each(|secret| masker.add(&SecretString::from(*secret)));
    Writer::open(directory, masker, watch::channel(0).0, CAP_OF_TESTS).unwrap()
}

const BEFORE: &str =
    "{\"@level\":\"info\",\"@message\":\"before\",\"@module\":\"terraform.ui\",\"type\":\"log\"}\n";
const AFTER: &str = "{\"@level\":\"error\",\"@message\":\"after\",\"@module\":\"terraform.ui\",\"type\":\"diagnostic\"}\n";

fn state(size: usize) -> String {
    format!(
        r#"{{"version":4,"terraform_version":"1.11.4","serial":7,"lineage":"l","outputs":{{}},"resources":[{{"x":"{}"}}],"check_results":null}}"#,
        "canary } ".repeat(size / 9)
    )
}

fn line(state: &str) -> String {
    format!(
        r#"{{"@level":"info","@message":"Emergency state dump","@module":"terraform.ui","@timestamp":"2026-01-02T03:04:05Z","state":{state},"type":"log"}}"#
    ) + "\n"
}

fn indented(state: &str) -> String {
    let mut value: Value = serde_json::from_str(state).unwrap();
    for first in ["version", "terraform_version"] {
        value.as_object_mut().unwrap().remove(first);
    }
    // As terraform writes it: in the order of its own fields.
    let rest = serde_json::to_string_pretty(&value).unwrap();
    let rest = rest.strip_prefix("{\n").unwrap();
    format!("{{\n  \"version\": 4,\n  \"terraform_version\": \"1.11.4\",\n{rest}\n")
}

#[test]
fn a_dumped_state_is_kept_apart_whatever_its_size_and_form() {
    for size in [0, 100, 70_000, 20 << 20] {
        let state = state(size);
        for (printed, expect) in [(line(&state), state.clone()), (indented(&state), String::new())]
        {
            let mut written = Written::start(&[]);
            let text = [BEFORE, &printed, AFTER].concat();
            let chunk = (text.len() / 7).max(50);
            text.as_bytes().chunks(chunk).for_each(|chunk| written.print(chunk));
            let log = written.end();
            assert!(!log.contains("canary") && !log.contains("lineage"), "{size}");
            assert!(log.contains("before") && log.contains("after"), "{log}");
            assert!(log.contains("go to quarantine"), "{log}");
            let dump = written.dump().unwrap();
            if expect.is_empty() {
                assert_eq!(dump.trim_end(), printed.trim_end(), "{size}");
            } else {
                assert!(dump == expect, "{size}: {} bytes", dump.len());
            }
            serde_json::from_str::<Value>(&dump).unwrap();
        }
    }
}

#[test]
fn a_dump_that_is_cut_is_kept_as_far_as_it_goes() {
    let state = state(100_000);
    for printed in [line(&state), indented(&state)] {
        for at in [1_500, 60_000, printed.len() - 20] {
            let mut written = Written::start(&[]);
            written.print(BEFORE.as_bytes());
            written.print(&printed.as_bytes()[..at]);
            let log = written.end();
            assert!(!log.contains("canary") && log.contains("go to quarantine"), "{at}: {log}");
            assert!(written.dump().unwrap().contains("lineage"), "{at}");
        }
    }
}

#[test]
fn a_successor_finds_a_dump_again_from_its_begin() {
    let state = state(100_000);
    for printed in [line(&state), indented(&state)] {
        let mut written = Written::start(&[]);
        written.print([BEFORE, &printed[..50_000]].concat().as_bytes());
        written.succeed(&[]);
        written.print([&printed[50_000..], AFTER].concat().as_bytes());
        let log = written.end();
        assert!(!log.contains("canary") && log.contains("after"), "{log}");
        assert_eq!(log.matches("go to quarantine").count(), 1);
        serde_json::from_str::<Value>(&written.dump().unwrap()).unwrap();
    }
}

#[test]
fn a_state_in_what_is_left_out_of_the_log_is_kept() {
    let mut written = Written::start(&[]);
    let mut raw = OpenOptions::new().append(true).open(written.directory.join("raw")).unwrap();
    raw.write_all([BEFORE, &line(&state(100)), AFTER].concat().as_bytes()).unwrap();
    written.writer.leave_out();
    let log = written.end();
    assert!(!log.contains("before") && !log.contains("after") && !log.contains("canary"), "{log}");
    assert!(log.contains("left out") && log.contains("go to quarantine"), "{log}");
    assert_eq!(written.dump().unwrap(), state(100));
}

#[test]
fn what_only_looks_like_a_dump_stays_in_the_log() {
    let other = r#"{"@level":"info","@message":"Emergency state dump","@module":"t","state":"x"}"#;
    for text in ["{\n", "{\n}\n", "{\n  \"version\": 4\n}\n", "{\n  \"a\": 1\n}\n", other] {
        let mut written = Written::start(&[]);
        written.print(text.as_bytes());
        let log = written.end();
        let lines = text.lines().count();
        assert_eq!(log.lines().count(), lines, "{text}: {log}");
        assert!(written.dump().is_none());
    }
}

const SECRET: &str = "sEcr3t/value+of \"some\" length";

/// Every form a secret is known in, in text and in terraform's JSON.
fn forms() -> String {
    use base64::Engine;
    use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
    let json = serde_json::json!({
        "@level": "info",
        "@message": format!("says {SECRET} and {}", serde_json::to_string(SECRET).unwrap()),
        "@module": "terraform.ui",
        "type": "log",
    });
    let mut text = format!("{json}\nplain {SECRET} text\n");
    text += "percent sEcr3t%2Fvalue%2Bof%20%22some%22%20length and more\n";
    for before in ["", "x", "xy"] {
        text += &format!("std {}\n", STANDARD.encode(format!("{before}{SECRET}zz")));
        text += &format!("url {}\n", URL_SAFE_NO_PAD.encode(format!("{before}{SECRET}zz")));
    }
    text += &format!("colours {}\x1b[1m{}\x1b[0m\n", &SECRET[..9], &SECRET[9..]);
    text + &format!("\x1b[31m{SECRET}\x1b[0m without an end {SECRET}")
}

proptest! {
    #![proptest_config(Config::with_cases(48))]
    #[test]
    fn the_log_is_the_same_and_without_secrets_however_the_output_is_cut(
        cuts in prop::collection::btree_set(1usize..900, 0..12),
        succeeds in prop::option::of(0usize..12),
    ) {
        let text = forms();
        let shown = |log: &str| -> Vec<String> {
            let lines = log.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
            lines.map(|line| line["@message"].as_str().unwrap().to_owned()).collect()
        };
        let mut whole = Written::start(&[SECRET]);
        whole.print(text.as_bytes());
        let expect = whole.end();
        let parts = ["sEcr3t", "c0VjcjN0", "value", "some", "length", "dmFsdW"];
        for part in parts {
            prop_assert!(!expect.contains(part), "{} in {}", part, expect);
        }
        let mut written = Written::start(&[SECRET]);
        let mut from = 0;
        for (n, to) in cuts.iter().map(|cut| (*cut).min(text.len())).chain([text.len()]).enumerate() {
            written.print(&text.as_bytes()[from..to]);
            if succeeds == Some(n) {
                written.succeed(&[SECRET]);
            }
            from = to;
        }
        prop_assert_eq!(shown(&written.end()), shown(&expect));
    }
}
