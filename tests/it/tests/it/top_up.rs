//! Another code in the middle of an apply: terraform's own AWS SDK takes the new session from the
//! container endpoint, without a restart, and writes the state to S3 with it.
//!
//! By the time of the simulated AWS the first session is over when the state is written, so nothing
//! but the second can have written it. The SDK looks at the endpoint again in the last five minutes
//! of a session, and a phase starts with no less than five: AWS's clock is set back so far that
//! the apply begins with a few seconds more than that.

use jiff::SignedDuration;
use latchkey_aws_simulator::{Call, Outcome};
use latchkey_harness::{Configuration, LIMIT, Stage, is_ended, wait_for};
use latchkey_proto::v1::{self, CodeCredentials, MfaPolicy, RunState};

use crate::gated::Gated;
use crate::support::{roles, settings, stage};
use crate::terminal::Terminal;

/// A session of the environment lives this long by AWS's clock.
const SESSION: i64 = 1200;
/// So far AWS's clock is behind: what it issues for [`SESSION`] lives [`LEFT`] by ours, and what
/// terraform assumes for its fifteen minutes as good as nothing.
const BEHIND: i64 = SESSION - LEFT;
/// The floor and a little more, which a machine under load needs to get from the code to the
/// release.
const LEFT: i64 = LEAST + 7;
const LEAST: i64 = 300;

#[tokio::test]
async fn the_session_of_another_code_is_what_terraform_assumes_its_role_with() {
    let stage = stage().await.unwrap();
    let gated = Gated::new(&stage);
    // The backend's role demands MFA: the mark travels with the second session, too.
    let configuration = gated.with_s3(&stage, "deploy");
    let (first, calls) = topped_up(&stage, &gated, &configuration, None).await;

    let assumed: Vec<_> = calls
        .iter()
        .filter(|call| call.action == "AssumeRole" && call.outcome == Outcome::Accepted)
        .collect();
    assert!(!assumed.is_empty(), "{calls:#?}");
    for call in assumed {
        let key = call.access_key_id.as_ref().unwrap();
        assert!(key.starts_with("ASIA") && !call.had_code && !first.contains(key), "{call:#?}");
    }
}

#[tokio::test]
async fn the_role_of_another_code_is_what_terraform_writes_its_state_as() {
    let stage = stage().await.unwrap();
    let gated = Gated::new(&stage);
    let configuration = gated.with_s3_as_given(&stage);
    let (_, calls) = topped_up(&stage, &gated, &configuration, roles("read", "deploy")).await;
    for call in calls.iter().filter(|call| call.action == "PutObject") {
        let caller = call.caller.as_ref().unwrap();
        assert!(caller.contains("assumed-role/deploy/run-"), "{call:#?}");
    }
}

/// Plays a run whose codes buy sessions, or the roles that are given. Answers the keys that signed
/// in its apply before the second code, and all calls after the first session was over.
async fn topped_up(
    stage: &Stage,
    gated: &Gated,
    configuration: &Configuration,
    roles: Option<v1::Roles>,
) -> (Vec<String>, Vec<Call>) {
    let (ada, aws) = (&stage.owner, stage.aws.simulator());
    let by_code = if roles.is_some() { CodeCredentials::Role } else { CodeCredentials::Session };
    let settings = v1::EnvironmentSettings {
        session_duration: Some(prost_types::Duration { seconds: SESSION, nanos: 0 }),
        code_credentials: by_code.into(),
        roles,
        ..settings(MfaPolicy::PlansAndApplies)
    };
    ada.create_environment_with("web", settings).await.unwrap();
    let run = ada.queue("web", configuration).await.unwrap();
    ada.authenticate(&run.run_id, &stage.aws.unused_code().await.unwrap()).await.unwrap();
    ada.wait_for_state(&run.run_id, RunState::AwaitingApplyMfa).await.unwrap();

    let move_clock = |seconds| aws.clock().advance(SignedDuration::from_secs(seconds));
    let planned = aws.calls().len();
    move_clock(-BEHIND);
    let expires = begin_apply(stage, &run.run_id).await;
    gated.wait_until_begun().await.unwrap();
    let begun = aws.calls().split_off(planned);
    assert!(begun.iter().any(|call| call.action == "PutObject"), "it took the lock: {begun:#?}");
    let first: Vec<String> = begun.into_iter().filter_map(|call| call.access_key_id).collect();
    move_clock(BEHIND);

    let terminal = Terminal::of_owner(stage).await;
    let code = stage.aws.unused_code().await.unwrap();
    let told = terminal.done(&format!("top-up {}", run.run_id), &format!("{code}\n")).await;
    assert!(told.contains("Topped up with MFA by ada (apply"), "{told}");
    assert!(told.contains("The apply's session lives until"), "{told}");
    assert_eq!(aws.requests_with_code(&code), 1);

    // The SDK may no longer rely on what it holds, and for AWS the first session is over.
    wait_for("the last minutes of the first session", LIMIT, async || {
        let left = expires - aws.clock().now().as_second();
        if left < LEAST { Ok(()) } else { Err(format!("it has {left} s left")) }
    })
    .await
    .unwrap();
    move_clock(LEFT + 1);
    let over = aws.calls().len();
    gated.open().unwrap();
    let run = ada.wait_for_run(&run.run_id, "the end", is_ended).await.unwrap();
    assert_eq!(run.state(), RunState::Applied, "{}", run.reason);
    assert_eq!((run.apply.unwrap().epoch, gated.starts()), (1, 1), "terraform went on");

    let calls = aws.calls().split_off(over);
    // That nothing was there is no refusal of who asks.
    let denied = |call: &&Call| match &call.outcome {
        Outcome::Refused(why) => why != "NoSuchKey",
        Outcome::Accepted | Outcome::Pending => false,
    };
    let denied: Vec<_> = calls.iter().filter(denied).collect();
    assert!(denied.is_empty(), "{denied:#?}");
    let written: Vec<_> = calls.iter().filter(|call| call.action == "PutObject").collect();
    assert!(!written.is_empty(), "{calls:#?}");
    for call in written {
        assert!(!first.contains(call.access_key_id.as_ref().unwrap()), "{call:#?}");
    }
    let state = aws.object("latchkey-state", "web/terraform.tfstate").expect("the state is there");
    assert!(String::from_utf8(state).unwrap().contains("kept in the state"));
    (first, calls)
}

/// Authenticates until the apply runs, and answers when its session is over by our clock. A
/// machine that is too slow for the floor is asked for another code.
async fn begin_apply(stage: &Stage, run_id: &str) -> i64 {
    for _ in 0..2 {
        let code = stage.aws.unused_code().await.unwrap();
        stage.owner.authenticate(run_id, &code).await.unwrap();
        let left = |run: &v1::Run| run.state() != RunState::ApplyQueued;
        let run = stage.owner.wait_for_run(run_id, "the release", left).await.unwrap();
        if run.state() == RunState::Applying {
            return run.apply.unwrap().authenticated.unwrap().expire_time.unwrap().seconds;
        }
    }
    panic!("the apply is not released");
}
