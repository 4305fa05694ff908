//! Hooks with a real terraform.

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use super::*;
use crate::supervisor::hooks::AfterFailure;

struct Hooked {
    directory: tempfile::TempDir,
}

impl Hooked {
    fn with(hooks: &[(&str, &str)]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        for (name, script) in hooks {
            let path = directory.path().join(name);
            std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        }
        Self { directory }
    }

    fn set(&self) -> impl FnOnce(&mut Settings) + use<> {
        let directory: PathBuf = self.directory.path().to_owned();
        move |settings| settings.hooks.directory = Some(directory)
    }

    async fn plan(&self, set: impl FnOnce(&mut Settings)) -> Driven {
        let hooks = self.set();
        let set = |settings: &mut Settings| {
            hooks(settings);
            set(settings);
        };
        let mut plan =
            Driven::start_with(Phase::Plan, samples::spec(), set, configuration(MAIN)).await;
        plan.order(go(variables())).await;
        plan
    }

    async fn apply(&self, set: impl FnOnce(&mut Settings)) -> Driven {
        let (plan, digests) = planned().await;
        let hooks = self.set();
        let set = |settings: &mut Settings| {
            hooks(settings);
            set(settings);
        };
        let restored = restore(&plan.directory);
        let mut apply = Driven::start_with(Phase::Apply, apply_spec(digests), set, restored).await;
        apply.order(go(variables())).await;
        apply
    }
}

fn lines(driven: &Driven, kind: &str) -> Vec<Value> {
    let lines = driven.log();
    let lines = lines.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    lines.filter(|line| line["type"] == kind).collect()
}

const SAYS: &str = "echo \"$LATCHKEY_HOOK in $LATCHKEY_PHASE of $LATCHKEY_RUN_ID, code ${LATCHKEY_EXIT_CODE-none}\"; \
    cat \"$AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE\" >&2; test -e main.tf && echo here";

#[tokio::test]
async fn hooks_run_around_every_step_and_their_lines_are_masked() {
    let names = ["before-init", "after-init", "before-plan", "after-plan"];
    let hooks = Hooked::with(&names.map(|name| (name, SAYS)));
    let mut plan = hooks.plan(|_| {}).await;
    let result = plan.ended().await;
    assert!(matches!(result, JobResult::Plan { add: 3, .. }), "{result:?}\n{}", plan.log());
    let said = lines(&plan, "hook");
    for (name, code) in names.into_iter().zip(["none", "0", "none", "2"]) {
        let text = format!("{name} in plan of run1, code {code}");
        let line = said.iter().find(|line| line["@message"] == text);
        assert_eq!(line.expect(&text)["hook"], name);
        let of_it = said.iter().filter(|line| line["hook"] == name);
        let messages: Vec<&str> = of_it.filter_map(|line| line["@message"].as_str()).collect();
        // The token that the endpoint wants is a secret of the job.
        assert!(messages.contains(&"***") && messages.contains(&"here"), "{messages:?}");
    }
}

#[tokio::test]
async fn a_failing_hook_before_the_apply_changes_nothing() {
    let hooks = Hooked::with(&[("before-apply", "echo no; exit 3")]);
    let mut apply = hooks.apply(|_| {}).await;
    let result = apply.ended().await;
    let JobResult::Failed { kind: Failure::Errored, reason, exit_code: Some(3) } = &result else {
        panic!("{result:?}");
    };
    assert!(reason.contains("before-apply exited with code 3; nothing was changed"), "{reason}");
    assert!(!apply.directory.join("exec").exists());
    assert!(!apply.log().contains("says hello"), "{}", apply.log());
}

#[tokio::test]
async fn a_hook_that_changes_the_plan_is_found_out() {
    let hooks = Hooked::with(&[("before-apply", "echo x >> \"$LATCHKEY_PLAN_FILE\"")]);
    let mut apply = hooks.apply(|_| {}).await;
    let result = apply.ended().await;
    assert!(matches!(result, JobResult::Failed { kind: Failure::PlanChanged, .. }), "{result:?}");
    assert!(!apply.directory.join("exec").exists());
}

#[tokio::test]
async fn a_failing_hook_after_a_step_warns_or_fails_as_the_operator_wants() {
    let hooks = Hooked::with(&[("after-plan", "exit 7")]);
    let mut plan = hooks.plan(|_| {}).await;
    let result = plan.ended().await;
    assert!(matches!(result, JobResult::Plan { .. }), "{result:?}");
    let warned = lines(&plan, "diagnostic");
    let sentence = "the hook after-plan exited with code 7";
    let warned = warned.iter().find(|line| line["@message"] == sentence).expect("a warning");
    assert_eq!(warned["@level"], "warn");

    let mut plan = hooks.plan(|settings| settings.hooks.after = AfterFailure::Fail).await;
    let result = plan.ended().await;
    let JobResult::Failed { kind: Failure::Errored, reason, exit_code: Some(7) } = &result else {
        panic!("{result:?}");
    };
    assert!(reason.contains("after-plan"), "{reason}");
}

#[tokio::test]
async fn a_hook_after_the_apply_never_hides_that_it_succeeded() {
    let hooks = Hooked::with(&[("after-apply", "exit 7")]);
    let mut apply = hooks.apply(|settings| settings.hooks.after = AfterFailure::Fail).await;
    let result = apply.ended().await;
    assert!(matches!(result, JobResult::Apply { .. }), "{result:?}");
    assert!(apply.log().contains("the hook after-apply exited with code 7"));
}

#[tokio::test]
async fn a_hook_that_takes_too_long_is_stopped_with_all_it_started() {
    let script = "setsid sleep 600 & echo waits; while :; do sleep 1; done";
    let hooks = Hooked::with(&[("before-plan", script)]);
    let mut plan = hooks.plan(|settings| settings.hooks.timeout = Duration::from_millis(300)).await;
    let result = plan.ended().await;
    let JobResult::Failed { kind: Failure::Errored, reason, .. } = &result else {
        panic!("{result:?}");
    };
    assert!(reason.contains("the hook before-plan was stopped"), "{reason}");
    assert!(plan.log().contains("behind: killed (sleep)"), "{}", plan.log());
    assert!(!plan.log().contains("\"step\":\"plan\""), "{}", plan.log());
}

#[tokio::test]
async fn a_cancel_stops_a_hook() {
    for force in [false, true] {
        let trap = if force { "trap '' INT; " } else { "" };
        let script = format!("{trap}echo waits; sleep 600; sleep 600");
        let hooks = Hooked::with(&[("before-apply", script.as_str())]);
        let mut apply = hooks.apply(|_| {}).await;
        apply.log_has("waits").await;
        apply.order(Order::Cancel(force)).await;
        let result = apply.ended().await;
        let JobResult::Failed { kind: Failure::Canceled, reason, .. } = &result else {
            panic!("{result:?}");
        };
        assert!(reason.contains("before-apply"), "{reason}");
        assert!(!apply.directory.join("exec").exists());
    }
}

#[tokio::test]
async fn a_hook_that_cannot_be_run_fails_the_phase_and_a_flood_is_cut() {
    let hooks = Hooked::with(&[("before-init", "exit 0")]);
    let path = hooks.directory.path().join("before-init");
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o644)).unwrap();
    let mut plan = hooks.plan(|_| {}).await;
    let result = plan.ended().await;
    let JobResult::Failed { reason, .. } = &result else { panic!("{result:?}") };
    assert!(reason.contains("not executable"), "{reason}");

    let flood = "yes 0123456789 | head -c 3000000; yes x | tr -d '\\n' | head -c 100000; echo end";
    let hooks = Hooked::with(&[("before-init", flood)]);
    let mut plan = hooks.plan(|_| {}).await;
    let result = plan.ended().await;
    assert!(matches!(result, JobResult::Plan { .. }), "{result:?}");
    assert!(plan.log().contains("of the hook before-init's output are left out"));
    assert!(plan.log().len() < 20 << 20);
}

#[tokio::test]
async fn a_hook_whose_output_somebody_else_holds_ends_all_the_same() {
    let hooks = Hooked::with(&[("before-plan", "echo \"pid $$ .\"; sleep 600")]);
    let mut plan = hooks.plan(|_| {}).await;
    plan.log_has("\"pid ").await;
    let log = plan.log();
    let pid = log.split("\"pid ").nth(1).and_then(|rest| rest.split(' ').next()).unwrap();
    // Nobody of the job, so nobody who is killed with it.
    let held = std::fs::OpenOptions::new().write(true).open(format!("/proc/{pid}/fd/1")).unwrap();
    plan.order(Order::Cancel(true)).await;
    let result = plan.ended().await;
    assert!(matches!(result, JobResult::Failed { kind: Failure::Canceled, .. }), "{result:?}");
    drop(held);
}

#[tokio::test]
async fn a_chain_of_processes_that_start_each_other_is_ended() {
    // It ends by itself, if nobody does it.
    let chain = "link() { i=$1; [ $i -gt 0 ] && { setsid sh \"$0\" $((i - 1)) & }; }\n\
                 [ -n \"$1\" ] || { echo chained; set -- 20000; }\nlink $1";
    let hooks = Hooked::with(&[("before-plan", chain)]);
    let mut plan = hooks.plan(|_| {}).await;
    let result = plan.ended().await;
    assert!(matches!(result, JobResult::Plan { .. }), "{result:?}\n{}", plan.log());
    let log = plan.log();
    assert!(log.contains("left ") && !log.contains("cannot be killed"), "{log}");
    let home = plan.directory.join("home");
    let lives = std::fs::read_dir("/proc").unwrap().flatten().any(|entry| {
        let environment = std::fs::read(entry.path().join("environ")).unwrap_or_default();
        String::from_utf8_lossy(&environment).contains(home.to_str().unwrap())
    });
    assert!(!lives);
}
