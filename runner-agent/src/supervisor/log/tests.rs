//! The log from outside, over its thread.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::MetadataExt;

use super::line::LONGEST as LONGEST_LINE;
use super::*;
use crate::job::Phase;
use crate::job_directory::tests as samples;

pub(super) const BOUNDLESS: spool::Limits = spool::Limits { spool: u64::MAX, low_water: 0 };

pub(super) const CAP_OF_TESTS: Limits = Limits { cap: 256 << 20, host: BOUNDLESS };

fn directory() -> (tempfile::TempDir, JobDirectory) {
    let jobs = tempfile::tempdir().unwrap();
    let lease = samples::lease("r1", Phase::Plan);
    let directory =
        JobDirectory::create(jobs.path(), &lease, &samples::spec(), &samples::settings()).unwrap();
    (jobs, directory)
}

fn start(directory: &JobDirectory, masker: Masker, told: watch::Sender<u64>) -> Result<Log, Error> {
    Log::start(directory, masker, told, CAP_OF_TESTS)
}

fn append(directory: &JobDirectory, bytes: &[u8]) {
    let path = directory.join("raw");
    OpenOptions::new().append(true).create(true).open(path).unwrap().write_all(bytes).unwrap();
}

fn messages(directory: &JobDirectory) -> Vec<String> {
    let log = std::fs::read_to_string(directory.join("log")).unwrap();
    log.lines()
        .map(|line| {
            let line: Value = serde_json::from_str(line).unwrap();
            line["@message"].as_str().unwrap().to_owned()
        })
        .collect()
}

#[tokio::test]
async fn lines_are_held_until_they_end_and_ours_go_behind() {
    let (_jobs, directory) = directory();
    let (told, mut length) = watch::channel(0);
    let log = start(&directory, Masker::default(), told).unwrap();
    append(&directory, b"one\ntw");
    log.own("phase", "info", "between", Value::Null);
    let ours_is_in = |_: &u64| messages(&directory).contains(&"between".to_owned());
    length.wait_for(ours_is_in).await.unwrap();
    append(&directory, b"o\nthree");
    let drained = log.drain().await.unwrap();
    assert_eq!(messages(&directory), ["one", "between", "two", "three"]);
    assert_eq!(drained.length, *length.borrow());
}

#[tokio::test]
async fn a_successor_goes_on_at_the_checkpoint() {
    let (_jobs, directory) = directory();
    let (length_to, mut length) = watch::channel(0);
    let first = start(&directory, Masker::default(), length_to).unwrap();
    append(&directory, b"one\n");
    let told = first.drain().await.unwrap().length;
    drop(first);
    // Its thread has ended when nobody tells the length any more.
    while length.changed().await.is_ok() {}
    // As if the first had died between writing the log and the checkpoint.
    let path = directory.join("log");
    let mut log = OpenOptions::new().append(true).open(&path).unwrap();
    log.write_all(b"half a li").unwrap();
    append(&directory, b"two\n");
    let before = std::fs::read(&path).unwrap()[..told as usize].to_vec();
    let second = start(&directory, Masker::default(), watch::channel(0).0).unwrap();
    second.drain().await.unwrap();
    assert_eq!(messages(&directory), ["one", "two"]);
    assert!(std::fs::read(&path).unwrap().starts_with(&before));
}

#[tokio::test]
async fn a_flood_leaves_raw_small_and_the_log_whole() {
    let (_jobs, directory) = directory();
    let log = start(&directory, Masker::default(), watch::channel(0).0).unwrap();
    for n in 0..40 {
        let text: String = (0..1000).map(|m| format!("{n}-{m} {}\n", "x".repeat(100))).collect();
        append(&directory, text.as_bytes());
    }
    log.drain().await.unwrap();
    let found = messages(&directory);
    assert_eq!(found.len(), 40_000);
    assert!(found[12_345].starts_with("12-345 "));
    let raw = std::fs::metadata(directory.join("raw")).unwrap();
    assert!(raw.blocks() * 512 < raw.len() / 2, "{} of {}", raw.blocks() * 512, raw.len());
}

#[tokio::test]
async fn beyond_the_cap_only_our_lines_are_taken_and_raw_is_read_on() {
    let (_jobs, directory) = directory();
    let cap = 1 << 20;
    let told = watch::channel(0).0;
    let log =
        Log::start(&directory, Masker::default(), told, Limits { cap, host: BOUNDLESS }).unwrap();
    for _ in 0..20 {
        append(&directory, format!("{}\n", "x".repeat(100)).repeat(1000).as_bytes());
    }
    append(&directory, "y".repeat(3 << 20).as_bytes());
    let outputs = r#"{"@level":"info","@message":"o","@module":"t","type":"outputs","outputs":{}}"#;
    append(&directory, format!("\n{outputs}\n").as_bytes());
    log.drain().await.unwrap();
    log.own("diagnostic", "error", "how it ended", Value::Null);
    let drained = log.drain().await.unwrap();
    assert!(drained.length <= cap && drained.length > cap / 2, "{}", drained.length);
    assert!(drained.outputs.is_some());
    let text = std::fs::read_to_string(directory.join("log")).unwrap();
    assert_eq!(text.matches(r#""type":"gap""#).count(), 1);
    let found = messages(&directory);
    assert!(found[found.len() - 2].contains("left out"), "{:?}", found[found.len() - 2]);
    assert_eq!(found[found.len() - 1], "how it ended");
}

#[tokio::test]
async fn a_line_without_end_is_cut_and_its_secrets_are_masked() {
    let (_jobs, directory) = directory();
    let mut masker = Masker::default();
    masker.add(&SecretString::from("canary-canary"));
    let log = start(&directory, masker, watch::channel(0).0).unwrap();
    let text = "canary-canary ".repeat(200_000);
    append(&directory, text.as_bytes());
    log.drain().await.unwrap();
    let lines = std::fs::read_to_string(directory.join("log")).unwrap();
    assert!(lines.lines().all(|line| line.len() < LONGEST_LINE), "a line is too long");
    assert_eq!(messages(&directory).concat(), "*** ".repeat(200_000));
}

/// What hooks and plans print does not take the place of how the job ended.
#[tokio::test]
async fn what_is_printed_through_us_is_held_to_the_cap_too() {
    let (_jobs, directory) = directory();
    let cap = 1 << 20;
    let limits = Limits { cap, host: BOUNDLESS };
    let log = Log::start(&directory, Masker::default(), watch::channel(0).0, limits).unwrap();
    log.own_text("plan_text", &format!("{}\n", "x".repeat(1000)).repeat(3000));
    log.printed("hook", &vec!["y".repeat(1000); 100], &Value::Null);
    log.printed("hook", &["short".to_owned()], &Value::Null);
    log.own("diagnostic", "error", "how it ended", Value::Null);
    let drained = log.drain().await.unwrap();
    assert!(drained.length <= cap && drained.length > cap / 2, "{}", drained.length);
    let found = messages(&directory);
    assert_eq!(found[found.len() - 1], "how it ended");
    assert!(found[found.len() - 2].contains("left out"), "{:?}", found[found.len() - 2]);
    assert!(found.iter().all(|line| line != "short"));
}

#[tokio::test]
async fn a_successor_says_once_that_the_log_is_at_its_limit() {
    let (_jobs, directory) = directory();
    let limits = Limits { cap: 1 << 20, host: BOUNDLESS };
    for round in ["first", "second"] {
        let (told, mut length) = watch::channel(0);
        let log = Log::start(&directory, Masker::default(), told, limits).unwrap();
        append(&directory, format!("{}\n", "x".repeat(1000)).repeat(2000).as_bytes());
        append(&directory, format!("short line of the {round}\n").as_bytes());
        log.drain().await.unwrap();
        drop(log);
        while length.changed().await.is_ok() {}
    }
    let found = messages(&directory);
    assert_eq!(found.iter().filter(|line| line.contains("left out")).count(), 1);
    assert!(found.iter().all(|line| !line.contains("short line")));
}

/// As while there is no agent: the spool is full of what another job has kept.
#[tokio::test]
async fn a_log_stops_where_the_spool_of_all_jobs_ends() {
    let (jobs, directory) = directory();
    let sibling = jobs.path().join("r0-apply-1-g1/state");
    std::fs::create_dir_all(&sibling).unwrap();
    std::fs::write(sibling.join("0001"), vec![1; 3 << 20]).unwrap();
    let host = spool::Limits { spool: 6 << 20, low_water: 0 };
    let limits = Limits { cap: 256 << 20, host };
    let log = Log::start(&directory, Masker::default(), watch::channel(0).0, limits).unwrap();
    for _ in 0..20 {
        append(&directory, format!("{}\n", "x".repeat(999)).repeat(1000).as_bytes());
        log.drain().await.unwrap();
    }
    log.own("diagnostic", "error", "how it ended", Value::Null);
    let drained = log.drain().await.unwrap();
    assert!(((1 << 20)..(4 << 20)).contains(&drained.length), "{drained:?}");
    let found = messages(&directory);
    assert!(found.iter().any(|line| line.contains("the spool of this host is full")));
    assert!(found.iter().any(|line| line.contains("bytes of output were left out")));
    assert_eq!(found[found.len() - 1], "how it ended");
}

/// A disk that is nearly full: nothing of it enters the log, and `raw` does not grow with it.
#[tokio::test]
async fn without_room_output_is_passed_over_and_counted() {
    let (_jobs, directory) = directory();
    let host = spool::Limits { low_water: u64::MAX / 2, ..BOUNDLESS };
    let limits = Limits { cap: 256 << 20, host };
    let log = Log::start(&directory, Masker::default(), watch::channel(0).0, limits).unwrap();
    for _ in 0..20 {
        append(&directory, format!("{}\n", "x".repeat(999)).repeat(1000).as_bytes());
    }
    let outputs = r#"{"@level":"info","@message":"o","@module":"t","type":"outputs","outputs":{}}"#;
    append(&directory, format!("{outputs}\n").as_bytes());
    let drained = log.drain().await.unwrap();
    assert!(drained.length < 4096 && drained.outputs.is_some(), "{drained:?}");
    let found = messages(&directory);
    let bytes = 20_000_000 + outputs.len() + 1;
    assert!(found[1].contains(&format!("{bytes} bytes of output were left out")), "{found:?}");
    let raw = std::fs::metadata(directory.join("raw")).unwrap();
    assert!(raw.blocks() * 512 < raw.len() / 2, "{} of {}", raw.blocks() * 512, raw.len());
}

#[test]
fn what_fails_is_said_once_and_tried_again_after_a_rest() {
    let (_jobs, directory) = directory();
    let told = watch::channel(0).0;
    let mut writer = Writer::open(&directory, Masker::default(), told, CAP_OF_TESTS).unwrap();
    append(&directory, b"one\n");
    let good = writer.replace_log(File::open(directory.join("log")).unwrap());
    assert!(!writer.tick(false));
    // Whatever is there by now, it is not looked at again at once.
    writer.replace_log(good);
    assert!(!writer.tick(false));
    writer.end_rest();
    assert!(writer.tick(false));
    assert_eq!(messages(&directory), ["one"]);
}
