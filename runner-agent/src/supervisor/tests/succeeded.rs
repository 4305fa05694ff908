//! Supervisors in place of dead ones, where it is hard to tell what still runs.

use std::os::unix::fs::PermissionsExt;

use super::*;

fn script(directory: &Path, name: &str, text: &str) -> std::path::PathBuf {
    let path = directory.join(name);
    std::fs::write(&path, text).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    path
}

#[tokio::test]
async fn terraform_behind_a_wrapper_is_known_without_a_record_and_not_killed() {
    let scripts = tempfile::tempdir().unwrap();
    let engine = at_hand_engine().path;
    let text = format!("#!/bin/bash\nexec -a tf {} \"$@\"\n", engine.display());
    let wrapper = script(scripts.path(), "terraform", &text);
    succeed_with(
        |settings| settings.terraform = wrapper,
        |directory| std::fs::remove_file(directory.join("process")).unwrap(),
    )
    .await;
}

#[tokio::test]
async fn what_only_looks_like_terraform_is_not_waited_for() {
    // In a session of its own, or below a command of the job's.
    let text = SLOW.replace("echo begun;", "setsid sleep 600 >/dev/null 2>&1 & echo begun;");
    let mut apply = slow_apply(&text).await;
    apply.process.kill().unwrap();
    apply.process.wait().unwrap();
    std::fs::remove_file(apply.directory.join("process")).unwrap();
    apply.process = spawn(&apply.directory);
    apply.stream = attach(&apply.directory).await;
    apply.wait("the question for secrets", |status| status.wants_secrets).await;
    apply.order(Order::Go(v1::Go::default())).await;
    apply.log_has("the-second").await;
    let result = apply.ended().await;
    assert!(matches!(result, JobResult::Failed { kind: Failure::EndedUnknown, .. }), "{result:?}");
    assert!(apply.log().contains("behind: killed (sleep)"), "{}", apply.log());
}

#[tokio::test]
async fn a_supervisor_that_dies_in_the_hook_after_the_apply_hides_no_success() {
    let hooks = tempfile::tempdir().unwrap();
    script(hooks.path(), "after-apply", "#!/bin/sh\necho hook-waits; sleep 600\n");
    let directory = hooks.path().to_owned();
    let set = move |settings: &mut Settings| settings.hooks.directory = Some(directory);
    let text = format!("{SLOW}\noutput \"said\" {{ value = \"this\" }}\n");
    let mut apply = slow_apply_with(&text, set).await;
    apply.log_has("hook-waits").await;
    apply.process.kill().unwrap();
    apply.process.wait().unwrap();
    apply.process = spawn(&apply.directory);
    apply.stream = attach(&apply.directory).await;
    apply.wait("the question for secrets", |status| status.wants_secrets).await;
    apply.order(Order::Go(v1::Go::default())).await;
    let result = apply.ended().await;
    let JobResult::Apply { outputs_json } = &result else { panic!("{result:?}\n{}", apply.log()) };
    assert!(outputs_json.contains("\"this\""), "{outputs_json}");
    assert!(apply.log().contains("the supervisor was lost"), "{}", apply.log());
}
