//! A forced cancel and the credentials: what survives it so far gets none from then on.

use super::*;
use crate::supervisor::loopback::request;

/// In the way of the result, so that the supervisor stays: it tries again for ever.
const OBSTACLE: &str = "result.json.new";

/// Asks for the credentials as a program of terraform's would that still lives.
pub(crate) async fn ask(directory: &JobDirectory) -> (u16, String) {
    let endpoints: Value = directory.read("endpoints.json").unwrap();
    let host = format!("127.0.0.1:{}", endpoints["credentials_port"]);
    let token = std::fs::read_to_string(directory.join(TOKEN_FILE)).unwrap();
    let headers = [("Host", host.as_str()), ("Authorization", &token)];
    let (status, body) = request(&host, "GET", "/credentials", &headers, b"").await;
    (status, String::from_utf8(body).unwrap())
}

/// Waits for the end of terraform itself.
pub(crate) async fn terraform_is_gone(directory: &JobDirectory) {
    let process = directory.read::<ProcessRecord>("process").unwrap();
    let gone = async {
        while process.is_alive() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(LIMIT, gone).await.expect("terraform is killed");
}

pub(crate) fn keep_the_supervisor(directory: &JobDirectory) {
    std::fs::create_dir(directory.join(OBSTACLE)).unwrap();
}

pub(crate) fn let_the_supervisor_go(directory: &JobDirectory) {
    std::fs::remove_dir(directory.join(OBSTACLE)).unwrap();
}

async fn begun() -> Driven {
    let text = SLOW.replace("sleep 2", "sleep 600");
    let mut plan = Driven::start(Phase::Plan, samples::spec(), configuration(&text)).await;
    plan.order(go(vec![])).await;
    let JobResult::Plan { digests, .. } = plan.ended().await else { panic!("{}", plan.log()) };
    let restored = restore(&plan.directory);
    let mut apply = Driven::start(Phase::Apply, apply_spec(digests), restored).await;
    apply.order(go(vec![])).await;
    apply.log_has("begun").await;
    assert_eq!(ask(&apply.directory).await.0, 200);
    keep_the_supervisor(&apply.directory);
    apply
}

#[tokio::test]
async fn after_a_forced_cancel_no_credentials_are_served() {
    let mut apply = begun().await;
    apply.order(Order::Cancel(true)).await;
    // Somebody authenticates again, too late: it gives nothing back.
    apply.order(go(vec![])).await;
    terraform_is_gone(&apply.directory).await;
    for _ in 0..10 {
        let (status, body) = ask(&apply.directory).await;
        assert!(status == 403 && body.contains("Withdrawn"), "{status} {body}");
    }
    let_the_supervisor_go(&apply.directory);
    let result = apply.ended().await;
    assert!(matches!(result, JobResult::Failed { kind: Failure::EndedUnknown, .. }), "{result:?}");
}

#[tokio::test]
async fn neither_by_a_successor() {
    let mut apply = begun().await;
    apply.order(Order::Cancel(true)).await;
    terraform_is_gone(&apply.directory).await;
    apply.process.kill().unwrap();
    apply.process.wait().unwrap();
    apply.process = spawn(&apply.directory);
    apply.stream = attach(&apply.directory).await;
    apply.wait("the question for secrets", |status| status.wants_secrets).await;
    assert_eq!(ask(&apply.directory).await.0, 403);
    apply.order(go(vec![])).await;
    apply.wait("the secrets", |status| !status.wants_secrets).await;
    assert_eq!(ask(&apply.directory).await.0, 403);
    let_the_supervisor_go(&apply.directory);
    apply.ended().await;
}

#[tokio::test]
async fn a_successor_that_is_told_refuses_too() {
    let mut apply = begun().await;
    apply.process.kill().unwrap();
    apply.process.wait().unwrap();
    apply.process = spawn(&apply.directory);
    apply.stream = attach(&apply.directory).await;
    apply.wait("the question for secrets", |status| status.wants_secrets).await;
    apply.order(go(vec![])).await;
    apply.wait("the secrets", |status| !status.wants_secrets).await;
    assert_eq!(ask(&apply.directory).await.0, 200);
    apply.order(Order::Cancel(true)).await;
    terraform_is_gone(&apply.directory).await;
    let (status, body) = ask(&apply.directory).await;
    assert!(status == 403 && body.contains("Withdrawn"), "{status} {body}");
    let_the_supervisor_go(&apply.directory);
    apply.ended().await;
}
