//! The supervisor as a process of its own, driven through its socket, with a real terraform.
//!
//! The test binary is the supervisor's program: `supervisor_process` below is what it runs.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::Value;
use tokio::net::UnixStream;

use super::control::{OrderFrame, connect, receive, send};
use super::terraform::ProcessRecord;
use super::*;
use crate::Program;
use crate::engine::tests::at_hand_engine;
use crate::extract;
use crate::job::{Digests, Kind};
use crate::job_directory::tests as samples;

mod confined;
mod dumped;
pub(crate) mod forced;
mod hooked;
mod providers;
mod spooling;
mod succeeded;

const LIMIT: Duration = Duration::from_secs(60);

/// How to start this test binary as a supervisor.
pub(crate) fn program() -> Program {
    let name = "supervisor::tests::supervisor_process";
    let prefix = ["--exact", name, "--ignored", "--nocapture", "--test-threads=1"];
    Program { exe: std::env::current_exe().unwrap(), prefix: prefix.map(OsString::from).to_vec() }
}

#[test]
#[ignore = "not a test: the process that other tests start"]
fn supervisor_process() {
    let arguments: Vec<String> = std::env::args().collect();
    match arguments.as_slice() {
        [.., verb, directory] if verb == "supervise" => {
            supervise(Path::new(directory)).unwrap();
        }
        [.., verb, directory] if verb == "probe" => {
            isolation::attempt(Path::new(directory)).unwrap();
        }
        _ => {}
    }
}

struct Driven {
    jobs: tempfile::TempDir,
    directory: JobDirectory,
    process: Child,
    stream: UnixStream,
    status: Status,
}

impl Driven {
    async fn start(phase: Phase, spec: Spec, prepare: impl FnOnce(&JobDirectory)) -> Self {
        Self::start_with(phase, spec, |_| {}, prepare).await
    }

    async fn start_with(
        phase: Phase,
        spec: Spec,
        set: impl FnOnce(&mut Settings),
        prepare: impl FnOnce(&JobDirectory),
    ) -> Self {
        let engine = at_hand_engine();
        let jobs = tempfile::tempdir().unwrap();
        let mut settings = Settings {
            engine: engine.name,
            terraform: engine.path,
            terraform_version: engine.version,
            ..samples::settings()
        };
        set(&mut settings);
        let lease = samples::lease("run1", phase);
        let directory = JobDirectory::create(jobs.path(), &lease, &spec, &settings).unwrap();
        prepare(&directory);
        directory.record("starting", &lease).unwrap();
        let process = spawn(&directory);
        let stream = attach(&directory).await;
        let mut driven = Self { jobs, directory, process, stream, status: Status::default() };
        driven.wait("the first status", |_| true).await;
        driven
    }

    async fn order(&mut self, order: Order) {
        send(&mut self.stream, &OrderFrame { order: Some(order) }).await.unwrap();
    }

    async fn wait(&mut self, what: &str, reached: impl Fn(&Status) -> bool) {
        let wait = async {
            loop {
                match receive::<Status>(&mut self.stream).await.unwrap() {
                    Some(status) => self.status = status,
                    None => {
                        panic!("the supervisor left while waiting for {what}: {:?}", self.status)
                    }
                }
                if reached(&self.status) {
                    return;
                }
            }
        };
        if tokio::time::timeout(LIMIT, wait).await.is_err() {
            let log = self.log();
            panic!("waited too long for {what}: {:?}\n{log}", self.status);
        }
    }

    async fn ended(&mut self) -> JobResult {
        self.wait("the end", |status| status.stage() == Stage::Ended).await;
        let log = self.log();
        assert_eq!(self.status.log_length, log.len() as u64);
        for line in log.lines() {
            serde_json::from_str::<Value>(line).unwrap();
        }
        self.directory.result().unwrap()
    }

    async fn gone(&mut self) {
        let gone = async { while receive::<Status>(&mut self.stream).await.unwrap().is_some() {} };
        tokio::time::timeout(LIMIT, gone).await.expect("the supervisor leaves");
        self.process.wait().unwrap();
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.directory.join("log")).unwrap_or_default()
    }

    /// Waits until the log holds a text.
    async fn log_has(&mut self, text: &str) {
        if !self.log().contains(text) {
            let directory = self.directory.clone();
            let reached = |_: &Status| {
                std::fs::read_to_string(directory.join("log")).is_ok_and(|log| log.contains(text))
            };
            self.wait(text, reached).await;
        }
    }
}

impl Drop for Driven {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn spawn(directory: &JobDirectory) -> Child {
    let program = program();
    let mut command = Command::new(program.exe);
    command.args(program.prefix).arg("supervise").arg(directory.path());
    command.arg0("latchkey-runner").stdin(Stdio::null()).stdout(Stdio::null());
    command.spawn().unwrap()
}

async fn attach(directory: &JobDirectory) -> UnixStream {
    let attached = async {
        loop {
            match connect(directory.path()).await {
                Ok(stream) => return stream,
                Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
            }
        }
    };
    tokio::time::timeout(LIMIT, attached).await.expect("the supervisor listens")
}

fn configuration(text: &str) -> impl FnOnce(&JobDirectory) {
    let text = text.to_owned();
    move |directory| {
        std::fs::write(directory.join("work/main.tf"), text).unwrap();
        crate::root_module::prepare(&directory.join("work"), Path::new("terraform")).unwrap();
    }
}

fn variable(name: &str, value: &str) -> v1::JobVariable {
    v1::JobVariable { name: name.into(), value: value.into(), ..Default::default() }
}

fn go(variables: Vec<v1::JobVariable>) -> Order {
    let credentials = v1::SessionCredentials {
        access_key_id: "ASIACANARYKEY".into(),
        secret_access_key: "canary-secret-key".into(),
        session_token: "canary-session-token".into(),
        expire_time: None,
    };
    Order::Go(v1::Go { lease: None, credentials: Some(credentials), variables, history: None })
}

/// Restores what a plan sealed, as the agent does for the apply.
fn restore(planned: &JobDirectory) -> impl FnOnce(&JobDirectory) {
    let archive = std::fs::read(planned.join("workspace.tar.gz")).unwrap();
    move |directory| {
        std::fs::remove_dir(directory.join("work")).unwrap();
        extract::extract(archive.as_slice(), directory.path(), extract::WORKSPACE).unwrap();
    }
}

const MAIN: &str = r#"
variable "greeting" {}
variable "unusual" {}
variable "secret" { sensitive = true }
resource "terraform_data" "one" {
  count = 3
  input = "${var.greeting} ${count.index}"
  provisioner "local-exec" {
    command = "echo says ${var.greeting}; echo key $AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE; echo mine $MINE; cat $AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE; env | grep -c AWS_ACCESS_KEY_ID || true"
  }
}
output "unusual" { value = var.unusual }
output "hidden" {
  value = var.secret
  sensitive = true
}
"#;

/// Would be an interpolation, an escape or an end of string if it were not escaped well.
const UNUSUAL: &str = "a\"b\\ ${x} $${y} %{z} %%{z}\n\ttab $";

fn variables() -> Vec<v1::JobVariable> {
    let mut secret = variable("secret", "canary-variable");
    secret.sensitive = true;
    let mut mine = variable("MINE", "own-value");
    mine.environment = true;
    let mut reserved = variable("AWS_ACCESS_KEY_ID", "canary-reserved");
    reserved.environment = true;
    let undeclared = variable("undeclared", "x");
    let unusual = variable("unusual", UNUSUAL);
    vec![variable("greeting", "hello"), unusual, secret, mine, reserved, undeclared]
}

async fn planned() -> (Driven, Digests) {
    let mut plan = Driven::start(Phase::Plan, samples::spec(), configuration(MAIN)).await;
    plan.order(go(variables())).await;
    match plan.ended().await {
        JobResult::Plan { digests, applyable: true, add: 3, change: 0, destroy: 0, .. } => {
            (plan, digests)
        }
        other => panic!("{other:?}\n{}", plan.log()),
    }
}

fn apply_spec(approved: Digests) -> Spec {
    Spec { approved: Some(approved), ..samples::spec() }
}

#[tokio::test]
async fn a_plan_is_applied_in_a_new_directory() {
    let (mut plan, digests) = planned().await;
    let log = plan.log();
    assert!(
        log.contains(r#""type":"plan_text""#) && log.contains("terraform_data.one[0]"),
        "{log}"
    );
    assert!(log.contains(r#""type":"change_summary""#), "{log}");
    let changes = std::fs::read_to_string(plan.directory.join("changes.json")).unwrap();
    assert_eq!(crate::digest::of_bytes(changes.as_bytes()), digests.changes);
    assert!(!changes.contains("canary"), "{changes}");
    plan.gone().await;

    let restored = restore(&plan.directory);
    let mut apply = Driven::start(Phase::Apply, apply_spec(digests), restored).await;
    apply.order(go(variables())).await;
    let result = apply.ended().await;
    let log = apply.log();
    let JobResult::Apply { outputs_json } = result else { panic!("{result:?}\n{log}") };
    let outputs: Value = serde_json::from_str(&outputs_json).unwrap();
    assert_eq!(outputs["unusual"]["value"], UNUSUAL);
    assert!(outputs["hidden"].get("value").is_none());
    assert!(log.contains("says hello") && log.contains("mine own-value"), "{log}");
    // `grep -c` found no key in the environment, and the token's file is masked.
    assert!(log.contains("local-exec): ***0\""), "{log}");
    for canary in ["canary", "ASIACANARYKEY"] {
        assert!(!log.contains(canary), "{canary} in {log}");
        assert!(!outputs_json.contains(canary));
    }
    let states = apply.directory.states().unwrap();
    assert_eq!(apply.status.states, *states.last().expect("a state was written"));
    assert!(apply.directory.join("exec").exists());
}

#[tokio::test]
async fn a_plan_whose_changes_were_not_approved_is_refused_before_it_starts() {
    let (plan, mut digests) = planned().await;
    digests.changes = "0".repeat(64);
    let mut apply =
        Driven::start(Phase::Apply, apply_spec(digests), restore(&plan.directory)).await;
    apply.order(go(variables())).await;
    let result = apply.ended().await;
    assert!(matches!(result, JobResult::Failed { kind: Failure::PlanChanged, .. }), "{result:?}");
    assert!(!apply.directory.join("exec").exists());
    assert!(apply.log().contains("not those that were approved"));
}

#[tokio::test]
async fn a_configuration_that_terraform_rejects_ends_errored_with_the_reason() {
    let text = "resource \"terraform_data\" \"x\" {\n  input = nothing.here\n}\n";
    let mut plan = Driven::start(Phase::Plan, samples::spec(), configuration(text)).await;
    plan.order(go(Vec::new())).await;
    let result = plan.ended().await;
    let JobResult::Failed { kind: Failure::Errored, exit_code: Some(1), reason } = &result else {
        panic!("{result:?}");
    };
    assert!(reason.contains("terraform plan"), "{reason}");
    assert!(plan.log().contains("Reference to undeclared resource"), "{}", plan.log());
}

const SLOW: &str = r#"
resource "terraform_data" "slow" {
  provisioner "local-exec" {
    command = "echo begun; sleep 2; echo done"
  }
}
resource "terraform_data" "after" {
  depends_on = [terraform_data.slow]
  provisioner "local-exec" {
    command = "echo the-second"
  }
}
"#;

async fn slow_apply(text: &str) -> Driven {
    slow_apply_with(text, |_| {}).await
}

async fn slow_apply_with(text: &str, set: impl FnOnce(&mut Settings)) -> Driven {
    let mut plan = Driven::start(Phase::Plan, samples::spec(), configuration(text)).await;
    plan.order(Order::Go(v1::Go::default())).await;
    let result = plan.ended().await;
    let JobResult::Plan { digests, .. } = result else { panic!("{result:?}\n{}", plan.log()) };
    let restored = restore(&plan.directory);
    let mut apply = Driven::start_with(Phase::Apply, apply_spec(digests), set, restored).await;
    apply.order(Order::Go(v1::Go::default())).await;
    apply.log_has("begun").await;
    apply
}

#[tokio::test]
async fn a_graceful_cancel_lets_terraform_write_its_state() {
    let mut apply = slow_apply(SLOW).await;
    apply.order(Order::Cancel(false)).await;
    let result = apply.ended().await;
    let log = apply.log();
    assert!(
        matches!(result, JobResult::Failed { kind: Failure::Canceled, exit_code: Some(_), .. }),
        "{result:?}\n{log}"
    );
    assert!(!log.contains("the-second"), "{log}");
    assert!(apply.status.states > 0, "the state was written");
}

#[tokio::test]
async fn a_forced_cancel_kills_grandchildren_too() {
    let text = SLOW.replace("sleep 2", "echo $$ > \\\"$TMPDIR/pid\\\"; echo begun; sleep 600");
    let text = text.replace("echo begun; echo", "echo");
    let mut apply = slow_apply(&text).await;
    let pid = std::fs::read_to_string(apply.directory.tmpdir().join("pid")).unwrap();
    let pid: i32 = pid.trim().parse().unwrap();
    let grandchild = ProcessRecord::of(pid).unwrap();
    apply.order(Order::Cancel(true)).await;
    let result = apply.ended().await;
    let JobResult::Failed { kind: Failure::EndedUnknown, reason, .. } = &result else {
        panic!("{result:?}");
    };
    assert!(reason.contains("by force"), "{reason}");
    let gone = async {
        // A zombie of init's, at most: its parent has been killed with it.
        while grandchild.is_alive() && !is_zombie(pid) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(LIMIT, gone).await.expect("the grandchild is gone");
}

fn is_zombie(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('Z'))
}

#[tokio::test]
async fn an_agent_that_comes_back_finds_everything() {
    let mut apply = slow_apply(SLOW).await;
    // The agent dies; terraform does not care.
    let before = apply.status;
    apply.stream = attach(&apply.directory).await;
    apply.wait("the status", |status| status.stage() == Stage::Executing).await;
    assert!(apply.status.log_length >= before.log_length);
    let result = apply.ended().await;
    assert!(matches!(result, JobResult::Apply { .. }), "{result:?}");
    let log = apply.log();
    for text in ["begun", "done", "the-second"] {
        let count = log.matches(&format!("local-exec): {text}\"")).count();
        assert_eq!(count, 1, "{text} in {log}");
    }
}

/// What a dead supervisor may leave of the record of terraform's process.
async fn succeed(spoil: impl FnOnce(&JobDirectory)) {
    succeed_with(|_| {}, spoil).await;
}

async fn succeed_with(set: impl FnOnce(&mut Settings), spoil: impl FnOnce(&JobDirectory)) {
    let mut apply = slow_apply_with(SLOW, set).await;
    let before = apply.log();
    let told = apply.status.log_length as usize;
    apply.process.kill().unwrap();
    apply.process.wait().unwrap();
    spoil(&apply.directory);
    apply.process = spawn(&apply.directory);
    let directory = apply.directory.clone();
    apply.stream = attach(&directory).await;
    apply.wait("the question for secrets", |status| status.wants_secrets).await;
    apply.order(Order::Go(v1::Go::default())).await;
    // The log goes on at once, not with terraform's end.
    apply.log_has("the-second").await;
    let result = apply.ended().await;
    let log = apply.log();
    assert!(
        matches!(result, JobResult::Failed { kind: Failure::EndedUnknown, .. }),
        "{result:?}\n{log}"
    );
    assert!(log.starts_with(&before[..told]), "told bytes have changed");
    for text in ["begun", "done", "the-second"] {
        assert_eq!(log.matches(&format!("local-exec): {text}\"")).count(), 1, "{log}");
    }
    // Terraform found the state where it was before.
    let newest = *directory.states().unwrap().last().unwrap();
    assert_eq!(apply.status.states, newest);
    let state = std::fs::read_to_string(directory.join(&JobDirectory::state_name(newest))).unwrap();
    assert!(state.contains("terraform_data"), "{state}");
    assert!(!directory.join("errored.tfstate").exists());
    assert!(log.contains("Apply complete"), "{log}");
    // It gave its lock back, too.
    assert!(!directory.join("state-lock").exists());
}

#[tokio::test]
async fn a_dead_supervisor_is_succeeded_while_terraform_lives() {
    succeed(|_| {}).await;
}

#[tokio::test]
async fn a_successor_knows_the_states_that_nobody_has_heard_of() {
    let mut apply = Driven::start(Phase::Apply, samples::spec(), |directory| {
        let state = r#"{"version":4,"serial":3,"lineage":"l"}"#;
        std::fs::write(directory.join("state/0003"), state).unwrap();
        directory.record("exec", &directory.lease().unwrap()).unwrap();
    })
    .await;
    assert_eq!(apply.status.states, 3);
    apply.order(Order::GiveUp(true)).await;
    apply.ended().await;
    assert_eq!(apply.status.states, 3);
}

#[tokio::test]
async fn terraform_is_found_without_the_record_of_its_process() {
    succeed(|directory| std::fs::remove_file(directory.join("process")).unwrap()).await;
    succeed(|directory| {
        let earlier = ProcessRecord { pid: i32::MAX, start_time: 1 };
        directory.record("process", &earlier).unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_successor_that_gets_no_secrets_leaves_the_rest_of_the_log_out() {
    let mut apply = slow_apply(SLOW).await;
    apply.process.kill().unwrap();
    apply.process.wait().unwrap();
    apply.process = spawn(&apply.directory);
    apply.stream = attach(&apply.directory).await;
    apply.wait("the question for secrets", |status| status.wants_secrets).await;
    // The lease is over: nobody will send them. That comes while terraform runs.
    apply.order(Order::GiveUp(true)).await;
    let result = apply.ended().await;
    assert!(matches!(result, JobResult::Failed { kind: Failure::EndedUnknown, .. }), "{result:?}");
    let log = apply.log();
    assert!(log.contains("left out") && !log.contains("the-second"), "{log}");
}

#[tokio::test]
async fn an_old_errored_state_does_not_spoil_a_good_apply() {
    let text = "resource \"terraform_data\" \"x\" {}";
    let mut plan = Driven::start(Phase::Plan, samples::spec(), |directory| {
        configuration(text)(directory);
        std::fs::write(directory.join("work/errored.tfstate"), "{}").unwrap();
    })
    .await;
    plan.order(go(Vec::new())).await;
    let result = plan.ended().await;
    let JobResult::Plan { digests, .. } = result else { panic!("{result:?}\n{}", plan.log()) };
    let mut apply =
        Driven::start(Phase::Apply, apply_spec(digests), restore(&plan.directory)).await;
    apply.order(go(Vec::new())).await;
    let result = apply.ended().await;
    assert!(matches!(result, JobResult::Apply { .. }), "{result:?}\n{}", apply.log());
}

#[tokio::test]
async fn a_pipe_in_place_of_an_errored_state_hangs_nothing() {
    let text = SLOW.replace("sleep 2", "mkfifo errored.tfstate");
    let mut apply = slow_apply(&text).await;
    let result = apply.ended().await;
    let JobResult::Failed { kind: Failure::EndedUnknown, reason, .. } = &result else {
        panic!("{result:?}");
    };
    let untaken = apply.directory.kept().join(job_directory::UNTAKEN);
    assert!(reason.contains(untaken.to_str().unwrap()), "{reason}");
    assert!(apply.log().contains(untaken.to_str().unwrap()), "{}", apply.log());
    assert!(apply.directory.join(job_directory::UNTAKEN).exists());
}

#[tokio::test]
async fn a_job_that_cannot_begin_has_a_result() {
    let mut plan = Driven::start(Phase::Plan, samples::spec(), |directory| {
        configuration(MAIN)(directory);
        std::fs::create_dir(directory.join("credentials-token")).unwrap();
    })
    .await;
    plan.order(go(variables())).await;
    let result = plan.ended().await;
    let JobResult::Failed { kind: Failure::Errored, reason, .. } = &result else {
        panic!("{result:?}");
    };
    assert!(reason.contains("failed to serve terraform"), "{reason}");
    assert!(plan.log().contains("failed to serve terraform"));
}

#[tokio::test]
async fn a_cancel_just_after_the_start_is_not_a_kill() {
    for _ in 0..3 {
        let (plan, digests) = planned().await;
        let restored = restore(&plan.directory);
        let mut apply = Driven::start(Phase::Apply, apply_spec(digests), restored).await;
        apply.order(go(variables())).await;
        apply.wait("exec", |status| status.stage() >= Stage::Executing).await;
        let directory = apply.directory.clone();
        let applies = || {
            let process = directory.read::<ProcessRecord>("process").unwrap();
            let command = std::fs::read(format!("/proc/{}/cmdline", process.pid));
            String::from_utf8_lossy(&command.unwrap_or_default()).contains("apply")
        };
        let started = async {
            while !applies() && directory.stage() != job_directory::Stage::Ended {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(LIMIT, started).await.expect("terraform starts");
        apply.order(Order::Cancel(false)).await;
        let result = apply.ended().await;
        match result {
            JobResult::Failed { kind: Failure::Canceled, .. } | JobResult::Apply { .. } => {}
            other => panic!("{other:?}\n{}", apply.log()),
        }
    }
}

#[tokio::test]
async fn without_go_nothing_is_left_behind() {
    let mut plan = Driven::start(Phase::Plan, samples::spec(), configuration(MAIN)).await;
    plan.order(Order::GiveUp(true)).await;
    plan.gone().await;
    assert_eq!(plan.directory.stage(), job_directory::Stage::Starting);
    assert!(!plan.directory.join("log").exists());
}

#[tokio::test]
async fn a_cancel_before_go_and_a_refusal_end_with_a_result() {
    let mut plan = Driven::start(Phase::Plan, samples::spec(), configuration(MAIN)).await;
    plan.order(Order::Cancel(false)).await;
    let result = plan.ended().await;
    assert!(matches!(result, JobResult::Failed { kind: Failure::Canceled, .. }), "{result:?}");

    let mut plan = Driven::start(Phase::Plan, samples::spec(), configuration(MAIN)).await;
    let refused = v1::JobFailed { reason: "failed to like it".into(), ..Default::default() };
    plan.order(Order::Refuse(refused)).await;
    let result = plan.ended().await;
    assert_eq!(result, JobResult::failed(Failure::Errored, "failed to like it"));
    assert!(plan.log().contains("failed to like it"));
    assert!(!plan.directory.join("exec").exists());
}

#[tokio::test]
async fn a_variable_that_is_no_single_expression_is_refused_by_name() {
    let mut plan = Driven::start(Phase::Plan, samples::spec(), configuration(MAIN)).await;
    let mut bad = variable("greeting", "1)\nsecret = (2");
    bad.hcl = true;
    plan.order(go(vec![bad])).await;
    let result = plan.ended().await;
    let JobResult::Failed { reason, .. } = &result else { panic!("{result:?}") };
    assert!(reason.contains("greeting"), "{reason}");
}

#[tokio::test]
async fn kinds_targets_and_working_directories_reach_terraform() {
    let mut spec = samples::spec();
    spec.kind = Kind::Destroy;
    spec.working_directory = "envs/prod".into();
    spec.target = vec!["terraform_data.x".into()];
    spec.has_state = true;
    let state = r#"{"version":4,"terraform_version":"1.0.0","serial":3,"lineage":"l","outputs":{},
        "resources":[{"mode":"managed","type":"terraform_data","name":"x",
        "provider":"provider[\"terraform.io/builtin/terraform\"]","instances":[{"schema_version":0,
        "attributes":{"id":"i","input":null,"output":null,"triggers_replace":null}}]}]}"#;
    let mut plan = Driven::start(Phase::Plan, spec, |directory| {
        let root = directory.join("work/envs/prod");
        std::fs::create_dir_all(&root).unwrap();
        std::fs::write(root.join("m.tf"), "resource \"terraform_data\" \"x\" {}").unwrap();
        std::fs::write(directory.join("state/base"), state).unwrap();
        crate::root_module::prepare(&root, Path::new("terraform")).unwrap();
    })
    .await;
    plan.order(Order::Go(v1::Go::default())).await;
    let result = plan.ended().await;
    assert!(
        matches!(result, JobResult::Plan { add: 0, destroy: 1, applyable: true, .. }),
        "{result:?}\n{}",
        plan.log()
    );
    assert!(plan.jobs.path().exists());
}

#[tokio::test]
async fn a_sensitive_variable_that_terraform_shows_is_masked_in_all_its_forms() {
    let text = r#"
variable "shown" {}
resource "terraform_data" "x" {
  input = { plain = var.shown, json = jsonencode([var.shown]), twice = jsonencode(jsonencode([var.shown])) }
  provisioner "local-exec" {
    command = "echo ${base64encode(var.shown)} | base64 -d; echo; printf '%s\\n' \"$JSON\""
    environment = { JSON = jsonencode(jsonencode({ a = var.shown })) }
  }
}
output "plain" { value = var.shown }
output "json" { value = jsonencode([var.shown]) }
output "large" { value = SIZE }
"#;
    let mut shown = variable("shown", "pa\"ss<w>&rd");
    shown.sensitive = true;
    for (size, dropped) in [
        ("\"small\"", false),
        ("join(\"\", [for n in range(1000) : \"forty characters and more in every line\"])", true),
    ] {
        let text = text.replace("SIZE", size);
        let mut plan = Driven::start(Phase::Plan, samples::spec(), configuration(&text)).await;
        plan.order(go(vec![shown.clone()])).await;
        let result = plan.ended().await;
        let JobResult::Plan { digests, .. } = result else { panic!("{result:?}\n{}", plan.log()) };
        let changes = std::fs::read_to_string(plan.directory.join("changes.json")).unwrap();
        let restored = restore(&plan.directory);
        let mut apply = Driven::start(Phase::Apply, apply_spec(digests), restored).await;
        apply.order(go(vec![shown.clone()])).await;
        let result = apply.ended().await;
        let JobResult::Apply { outputs_json } = result else {
            panic!("{result:?}\n{}", apply.log())
        };
        for text in [plan.log(), changes, apply.log(), outputs_json.clone()] {
            for part in ["ss<w", "ss\\u003cw", "u003cw", "u0026rd", "&rd"] {
                assert!(!text.contains(part), "{part} in {text}");
            }
        }
        assert_eq!(outputs_json.is_empty(), dropped, "{outputs_json}");
        assert_eq!(apply.log().contains("they are in the state only"), dropped);
    }
}
