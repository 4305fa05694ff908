//! Scripted faults, and what the counts say about them.

use std::time::Duration;

use latchkey_aws_simulator::{Effect, Fault, Outcome};

use crate::support::{Client, SERIAL, start};

#[tokio::test]
async fn a_reset_before_processing_leaves_the_code_good() {
    let simulator = start().await;
    let user = Client::of(&simulator);
    let code = simulator.code(SERIAL, 0).unwrap();
    simulator.script(Fault::new(Effect::Reset));
    let members = [("SerialNumber", SERIAL), ("TokenCode", code.as_str())];
    assert!(user.try_sts("GetSessionToken", &members).await.is_none());
    assert_eq!(simulator.requests_with_code(&code), 1);
    let call = &simulator.calls()[0];
    assert_eq!((&call.outcome, call.answered), (&Outcome::Pending, false));
    assert_eq!(user.session(&code).await.status, 200);
    assert_eq!(simulator.requests_with_code(&code), 2);
}

#[tokio::test]
async fn a_reset_after_processing_has_spent_the_code() {
    let simulator = start().await;
    let user = Client::of(&simulator);
    let code = simulator.code(SERIAL, 0).unwrap();
    simulator.script(Fault::new(Effect::Reset).after_processing().on("GetSessionToken"));
    let members = [("SerialNumber", SERIAL), ("TokenCode", code.as_str())];
    assert!(user.try_sts("GetSessionToken", &members).await.is_none());
    let call = &simulator.calls()[0];
    assert_eq!((&call.outcome, call.answered), (&Outcome::Accepted, false));
    assert_eq!(user.session(&code).await.text("Code"), "AccessDenied");
}

#[tokio::test]
async fn server_errors_and_throttling_are_answered_as_scripted() {
    let simulator = start().await;
    let user = Client::of(&simulator);
    let refuse = Effect::Refuse {
        status: 403,
        code: "AccessDenied".to_owned(),
        message: "explicit deny".to_owned(),
    };
    for (effect, status, code) in [
        (Effect::ServiceUnavailable, 503, "ServiceUnavailable"),
        (Effect::InternalFailure, 500, "InternalFailure"),
        (Effect::Throttle, 400, "Throttling"),
        (refuse, 403, "AccessDenied"),
    ] {
        simulator.script(Fault::new(effect));
        let answer = user.sts("GetCallerIdentity", &[]).await;
        assert_eq!((answer.status, answer.text("Code").as_str()), (status, code));
    }
    assert_eq!(user.sts("GetCallerIdentity", &[]).await.status, 200);
}

#[tokio::test]
async fn a_delayed_request_can_be_seen_while_it_waits() {
    let simulator = start().await;
    let user = Client::of(&simulator);
    let code = simulator.code(SERIAL, 0).unwrap();
    simulator.script(Fault::delay(Duration::from_secs(3600)));
    let sent = tokio::spawn({
        let code = code.clone();
        async move {
            let members = [("SerialNumber", SERIAL), ("TokenCode", code.as_str())];
            user.try_sts("GetSessionToken", &members).await.is_some()
        }
    });
    let seen = simulator.wait_for_calls(Duration::from_secs(10), |calls| calls.len() == 1).await;
    assert_eq!(seen.unwrap()[0].outcome, Outcome::Pending);
    assert_eq!(simulator.requests_with_code(&code), 1);
    // Stopping the simulation ends the wait.
    drop(simulator);
    let answered = tokio::time::timeout(Duration::from_secs(10), sent).await.unwrap().unwrap();
    assert!(!answered);
}

#[tokio::test]
async fn a_hundred_parallel_requests_with_one_code_yield_one_session() {
    let simulator = start().await;
    let code = simulator.code(SERIAL, 0).unwrap();
    let tasks: Vec<_> = (0..100)
        .map(|_| {
            let (user, code) = (Client::of(&simulator), code.clone());
            tokio::spawn(async move { user.session(&code).await.status })
        })
        .collect();
    let mut accepted = 0;
    for task in tasks {
        accepted += usize::from(task.await.unwrap() == 200);
    }
    assert_eq!((accepted, simulator.requests_with_code(&code)), (1, 100));
}
