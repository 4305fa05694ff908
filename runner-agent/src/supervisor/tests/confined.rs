//! A hostile configuration: what it tries, and that it gets nothing.

use std::os::unix::fs::symlink;

use super::*;
use crate::supervisor::confine::Confinement;
use crate::supervisor::isolation::{Facts, probe};

/// One provisioner that tries everything and says what it got. `JOBS` is the hidden directory.
const HOSTILE: &str = r#"
resource "terraform_data" "hostile" {
  provisioner "local-exec" {
    command = <<-EOT
      try() { name=$1; shift; if "$@" >/dev/null 2>&1; then echo "got $name;"; else echo "denied $name;"; fi; }
      T=$PPID
      S=$(awk '/^PPid/ { print $2 }' /proc/$T/status)
      JOB=$(dirname "$HOME")
      try another-job cat JOBS/other-plan-1/secret
      try list ls JOBS
      try key cat JOBS/identity.key
      ln -s JOBS/other-plan-1 sneaky
      try link cat sneaky/secret
      try overwrite sh -c 'echo x > JOBS/identity.key'
      try create touch JOBS/new
      try records cat "$JOB/lease.json"
      try control-token cat "$JOB/control-token"
      try states ls "$JOB/state"
      try environ cat /proc/$S/environ
      try secrets-of-environ grep -q 'can[a]ry' /proc/$S/environ
      try memory sh -c ": < /proc/$S/mem"
      try open-files ls -l /proc/$S/fd/
      try root ls /proc/$S/root/
      try signal kill -0 $S
      try forged-log sh -c "echo forged-line >> /proc/$T/fd/1"
      try core sh -c '[ "$(ulimit -Hc)" != 0 ]'
      try privileges grep -q '^NoNewPrivs:.*0$' /proc/self/status
      try unlimited-files sh -c '[ "$(ulimit -Hn)" = unlimited ]'
      try own-home sh -c 'echo x > "$HOME/x" && cat "$HOME/x"'
      try own-tmp sh -c 'echo x > "$TMPDIR/x" && mv "$TMPDIR/x" "$HOME/y"'
      try own-work sh -c 'mkdir a && echo x > a/b && ln -s b a/c && cat a/c && rm -r a'
      try null sh -c 'echo x > /dev/null'
      try programs cat /etc/passwd
    EOT
  }
}
"#;

/// What no host lets a job do, and what only Landlock keeps from it.
const ALWAYS: &[&str] = &["core", "privileges", "unlimited-files", "secrets-of-environ"];
const BY_LANDLOCK: &[&str] = &[
    "another-job",
    "list",
    "key",
    "link",
    "overwrite",
    "create",
    "records",
    "control-token",
    "states",
    "memory",
    "open-files",
    "root",
    "signal",
    "forged-log",
];
const ITS_OWN: &[&str] = &["own-home", "own-tmp", "own-work", "null", "programs"];

async fn applied(text: &str, around: impl FnOnce(&Path)) -> (Driven, JobResult) {
    let mut plan = Driven::start(Phase::Plan, samples::spec(), configuration(text)).await;
    plan.order(go(Vec::new())).await;
    let result = plan.ended().await;
    let JobResult::Plan { digests, .. } = result else { panic!("{result:?}\n{}", plan.log()) };
    let restored = restore(&plan.directory);
    let mut apply = Driven::start(Phase::Apply, apply_spec(digests), |directory| {
        let jobs = directory.path().parent().unwrap();
        around(jobs);
        std::fs::create_dir(jobs.join("other-plan-1")).unwrap();
        std::fs::write(jobs.join("other-plan-1/secret"), "canary").unwrap();
        std::fs::write(jobs.join("identity.key"), "canary").unwrap();
        restored(directory);
        // The place of the jobs is known only now.
        let script = jobs.join("script");
        std::fs::write(script, jobs.as_os_str().as_encoded_bytes()).unwrap();
    })
    .await;
    apply.order(go(Vec::new())).await;
    let result = apply.ended().await;
    (apply, result)
}

async fn facts() -> Facts {
    let base = tempfile::tempdir().unwrap();
    probe(&program(), base.path(), &Confinement::default()).await
}

fn holds(facts: &Facts, phrase: &str) -> bool {
    facts.holds.iter().any(|fact| fact.contains(phrase))
}

#[tokio::test]
async fn a_hostile_configuration_gets_nothing_or_the_host_says_that_it_can() {
    let facts = facts().await;
    // Both phases look for the directory of the jobs above their own.
    let text = HOSTILE.replace("JOBS", "$JOBS");
    let text = text.replace(
        "JOB=$(dirname",
        "JOBS=$(dirname \"$(dirname \"$HOME\")\"); export JOBS\n      JOB=$(dirname",
    );
    let (apply, result) = applied(&text, |_| {}).await;
    let log = apply.log();
    assert!(matches!(result, JobResult::Apply { .. }), "{result:?}\n{log}");
    let says = |word: &str, name: &str| log.contains(&format!("local-exec): {word} {name};"));
    let check = |name: &str, word: &str| assert!(says(word, name), "{word} {name}: {log}");
    ITS_OWN.iter().for_each(|name| check(name, "got"));
    ALWAYS.iter().for_each(|name| check(name, "denied"));
    if holds(&facts, "are hidden") {
        BY_LANDLOCK.iter().for_each(|name| check(name, "denied"));
        // Newer kernels let root read it (as one who may watch performance): it has no secrets.
        if holds(&facts, "jobs are not root") {
            check("environ", "denied");
        }
        assert!(!log.contains("\"@message\":\"forged-line"), "{log}");
        assert!(!apply.jobs.path().join("new").exists());
    } else {
        assert!(facts.missing.iter().any(|fact| fact.contains("runner's key")), "{facts:?}");
    }
    let key = std::fs::read_to_string(apply.jobs.path().join("identity.key")).unwrap();
    assert!(key == "canary" || !holds(&facts, "are hidden"), "{key}");
    assert!(!log.contains("canary"), "{log}");
}

#[tokio::test]
async fn the_supervisor_dumps_no_core_and_gains_nothing() {
    let plan = Driven::start(Phase::Plan, samples::spec(), configuration(MAIN)).await;
    let read = |name: &str| {
        std::fs::read_to_string(format!("/proc/{}/{name}", plan.process.id())).unwrap()
    };
    let limits = read("limits");
    let core = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap();
    assert_eq!(core.split_whitespace().skip(4).take(2).collect::<Vec<_>>(), ["0", "0"]);
    let files = limits.lines().find(|line| line.starts_with("Max open files")).unwrap();
    let files: Vec<_> = files.split_whitespace().skip(3).take(2).collect();
    assert_eq!(files[0], files[1]);
    // Here the supervisor is a thread of the test's program.
    let threads = std::fs::read_dir(format!("/proc/{}/task", plan.process.id())).unwrap();
    let mut threads = threads.map(|thread| {
        std::fs::read_to_string(thread.unwrap().path().join("status")).unwrap_or_default()
    });
    assert!(threads.any(|status| status.contains("NoNewPrivs:\t1")));
    // What is not dumpable belongs to root, whoever runs it.
    let owner = std::os::unix::fs::MetadataExt::uid(
        &std::fs::metadata(format!("/proc/{}/environ", plan.process.id())).unwrap(),
    );
    assert_eq!(owner, 0);
}

/// T15: what terraform leaves under a name of ours is a link to what it must not have.
#[tokio::test]
async fn a_link_in_place_of_an_errored_state_brings_nothing() {
    let text = SLOW.replace(
        "echo begun; sleep 2",
        "ln -s $(dirname $(dirname $HOME))/other-plan-1/secret errored.tfstate; echo begun",
    );
    let (apply, result) = applied(&text, |_| {}).await;
    assert!(matches!(result, JobResult::Failed { kind: Failure::EndedUnknown, .. }), "{result:?}");
    assert!(!apply.directory.join("errored.tfstate").exists());
    // Links that it left are not followed when all is cleared.
    symlink(apply.jobs.path().join("other-plan-1"), apply.directory.join("work/link")).unwrap();
    apply.directory.wipe().unwrap();
    let secret = std::fs::read_to_string(apply.jobs.path().join("other-plan-1/secret")).unwrap();
    assert_eq!(secret, "canary");
}

const LEAVES: &str = r#"
resource "terraform_data" "leaves" {
  provisioner "local-exec" {
    command = <<-EOT
      setsid sh -c 'trap "" INT TERM HUP; echo $$ > "$TMPDIR/pid"; while :; do sleep 600; done' >/dev/null 2>&1 </dev/null &
      while [ ! -s "$TMPDIR/pid" ]; do :; done
      echo begun
      MORE
    EOT
  }
}
"#;

async fn grandchild(apply: &Driven) -> (i32, ProcessRecord) {
    let pid = std::fs::read_to_string(apply.directory.tmpdir().join("pid")).unwrap();
    let pid = pid.trim().parse().unwrap();
    (pid, ProcessRecord::of(pid).unwrap_or(ProcessRecord { pid, start_time: 0 }))
}

async fn gone((pid, record): (i32, ProcessRecord)) {
    let gone = async {
        while record.is_alive() && !is_zombie(pid) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(LIMIT, gone).await.expect("the grandchild is gone");
}

#[tokio::test]
async fn a_grandchild_in_a_session_of_its_own_is_ended_after_terraform() {
    let mut apply = slow_apply(&LEAVES.replace("MORE", "")).await;
    let result = apply.ended().await;
    assert!(matches!(result, JobResult::Apply { .. }), "{result:?}\n{}", apply.log());
    gone(grandchild(&apply).await).await;
    assert!(apply.log().contains("terraform apply left"), "{}", apply.log());
}

#[tokio::test]
async fn a_forced_cancel_ends_what_left_the_group() {
    let text = LEAVES.replace("MORE", "sleep 600");
    let mut apply = slow_apply(&text).await;
    let left = grandchild(&apply).await;
    apply.order(Order::Cancel(false)).await;
    apply.order(Order::Cancel(true)).await;
    let result = apply.ended().await;
    assert!(matches!(result, JobResult::Failed { kind: Failure::EndedUnknown, .. }), "{result:?}");
    gone(left).await;
    assert!(apply.log().contains("behind: killed"), "{}", apply.log());
}

#[tokio::test]
async fn a_successor_ends_what_terraform_left_behind() {
    let mut apply = slow_apply(&LEAVES.replace("MORE", "sleep 1")).await;
    let left = grandchild(&apply).await;
    apply.process.kill().unwrap();
    apply.process.wait().unwrap();
    apply.process = spawn(&apply.directory);
    apply.stream = attach(&apply.directory).await;
    apply.wait("the question for secrets", |status| status.wants_secrets).await;
    apply.order(Order::Go(v1::Go::default())).await;
    let result = apply.ended().await;
    assert!(matches!(result, JobResult::Failed { kind: Failure::EndedUnknown, .. }), "{result:?}");
    gone(left).await;
    assert!(apply.log().contains("behind: killed"), "{}", apply.log());
}

#[tokio::test]
async fn what_is_required_and_cannot_be_kept_starts_nothing() {
    let set = |settings: &mut Settings| {
        settings.confinement.isolation = confine::Isolation::Required;
        settings.confinement.hidden = Some("/dev/null/of/latchkey".into());
    };
    let mut plan = Driven::start_with(Phase::Plan, samples::spec(), set, configuration(MAIN)).await;
    plan.order(go(variables())).await;
    let result = plan.ended().await;
    let JobResult::Failed { kind: Failure::Errored, reason, .. } = &result else {
        panic!("{result:?}");
    };
    assert!(reason.contains("keep the job apart"), "{reason}");
    assert!(!plan.directory.join("exec").exists());
}
