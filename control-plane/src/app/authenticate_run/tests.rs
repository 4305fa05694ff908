//! Codes against the simulated AWS: what reaches it, how often, and what the run becomes.

mod right;

use std::time::Duration;

use latchkey_aws_simulator::{Effect, Fault};
use latchkey_domain::policy::{MfaPolicy, Phase};
use latchkey_domain::run::RunState;
use latchkey_proto::v1::Reason;

use crate::app::fixture::{Fixture, ORGANIZATION};
use crate::app::service_tokens::TokenScope;
use crate::app::start_job::Start;
use crate::app::variables::{NewVariable, Scope};
use crate::app::view_runs::Lock;
use crate::store::record::authentication::Purpose;
use crate::store::record::people::{Access, Role};
use crate::store::record::variable::Category;

async fn waiting() -> (Fixture, latchkey_domain::run::Run) {
    let fixture = Fixture::new(MfaPolicy::PlansAndApplies).await;
    let run = fixture.queue("first").await;
    assert_eq!(run.state, RunState::AwaitingPlanMfa);
    (fixture, run)
}

async fn lock(fixture: &Fixture, run: &latchkey_domain::run::Run) -> Lock {
    fixture.app.show_run(&fixture.owner, run.id).await.unwrap().lock
}

#[tokio::test]
async fn a_right_code_moves_the_run_and_a_wrong_one_turns_the_lock_red() {
    let (fixture, run) = waiting().await;
    let error = fixture.submit(&run, "000000", "one").await.unwrap_err();
    assert_eq!(error.reason(), Reason::CodeRejected);
    assert_eq!(lock(&fixture, &run).await, Lock::Failed);
    let waiting = fixture.run(&run).await;
    assert_eq!(waiting.state, RunState::AwaitingPlanMfa);
    assert!(waiting.refused_code.unwrap().message.contains("Use the next code"));

    let moved = fixture.submit(&run, &fixture.code(), "two").await.unwrap();
    assert_eq!(moved.state, RunState::PlanQueued);
    assert_eq!(lock(&fixture, &run).await, Lock::Authenticated);
    assert_eq!(moved.plan.authenticated.unwrap().user, "ada");
}

#[tokio::test]
async fn plan_and_apply_each_get_the_session_of_their_own_code() {
    let (fixture, run) = waiting().await;
    let run = fixture.submit(&run, &fixture.code(), "plan").await.unwrap();
    let run = fixture.plan(&run).await;
    assert_eq!(run.state, RunState::AwaitingApplyMfa);
    let run = fixture.submit(&run, &fixture.code(), "apply").await.unwrap();
    assert_eq!(run.state, RunState::ApplyQueued);
    let (_, _, start) = fixture.start(&run, Phase::Apply).await;
    let Start::Go(go) = start else { panic!("{start:?}") };
    assert!(go.session.unwrap().access_key_id.starts_with("ASIA"));
    assert_eq!(fixture.aws.requests_for("GetSessionToken"), 2);
}

#[tokio::test]
async fn a_hundred_submissions_of_one_code_reach_aws_once() {
    let (fixture, run) = waiting().await;
    let code = fixture.code();
    let submissions = (0..100).map(|n| {
        let (app, owner, id, code) =
            (fixture.app.clone(), fixture.owner.clone(), run.id, code.clone());
        tokio::spawn(async move {
            let submission = super::Submission {
                run: id,
                phase: Phase::Plan,
                code: code.into(),
                seen: None,
                request_id: format!("r{n}"),
                purpose: Purpose::Phase,
            };
            app.authenticate_run(&owner, submission).await
        })
    });
    let mut accepted = 0;
    for submission in submissions.collect::<Vec<_>>() {
        match submission.await.unwrap() {
            Ok(_) => accepted += 1,
            Err(error) => assert!(
                matches!(error.reason(), Reason::CodeUsed | Reason::NotAwaitingCode),
                "{error}"
            ),
        }
    }
    assert_eq!(accepted, 1);
    assert_eq!(fixture.aws.requests_with_code(&code), 1);
}

#[tokio::test]
async fn what_is_no_code_costs_nothing() {
    let (fixture, run) = waiting().await;
    for bad in ["", "12345", "1234567", "12 456", "１２３４５６", "12345a"] {
        let error = fixture.submit(&run, bad, "bad").await.unwrap_err();
        assert_eq!(
            (error.reason(), error.field_name()),
            (Reason::FieldInvalid, Some("token_code"))
        );
        assert!(bad.is_empty() || !error.message().contains(bad));
    }
    assert_eq!(fixture.aws.calls().len(), 0);
    // The whole budget is still there.
    for n in 0..5 {
        let error = fixture.submit(&run, &format!("00000{n}"), &format!("w{n}")).await.unwrap_err();
        assert_eq!(error.reason(), Reason::CodeRejected);
    }
}

#[tokio::test]
async fn the_sixth_attempt_in_a_window_stays_here() {
    let (fixture, run) = waiting().await;
    for n in 0..5 {
        fixture.submit(&run, &format!("00000{n}"), &format!("w{n}")).await.unwrap_err();
    }
    let code = fixture.code();
    let error = fixture.submit(&run, &code, "sixth").await.unwrap_err();
    assert_eq!(error.reason(), Reason::DeviceBusy);
    assert!(error.metadata().iter().any(|(key, _)| *key == "retry_at"));
    assert_eq!(fixture.aws.requests_with_code(&code), 0);
    fixture.clock.advance(Duration::from_secs(180));
    fixture.submit(&run, &code, "after").await.unwrap();
}

#[tokio::test]
async fn a_repeated_request_is_answered_from_the_record() {
    let (fixture, run) = waiting().await;
    let first = fixture.submit(&run, "000000", "same").await.unwrap_err();
    let again = fixture.submit(&run, &fixture.code(), "same").await.unwrap_err();
    assert_eq!((first.reason(), first.message()), (again.reason(), again.message()));
    assert_eq!(fixture.aws.requests_for("GetSessionToken"), 1);
}

#[tokio::test]
async fn a_lost_answer_is_unknown_and_the_code_is_never_resent() {
    for fault in [
        Fault::new(Effect::Reset).on("GetSessionToken"),
        Fault::new(Effect::Reset).on("GetSessionToken").after_processing(),
        Fault::new(Effect::ServiceUnavailable).on("GetSessionToken"),
        Fault::new(Effect::InternalFailure).on("GetSessionToken"),
    ] {
        let (fixture, run) = waiting().await;
        fixture.aws.script(fault);
        let code = fixture.code();
        let error = fixture.submit(&run, &code, "one").await.unwrap_err();
        assert_eq!(error.reason(), Reason::ExchangeUnknown, "{error}");
        let error = fixture.submit(&run, &code, "two").await.unwrap_err();
        assert_eq!(error.reason(), Reason::CodeUsed);
        assert_eq!(fixture.aws.requests_with_code(&code), 1);
        assert_eq!(fixture.run(&run).await.state, RunState::AwaitingPlanMfa);
    }
}

#[tokio::test]
async fn a_throttled_code_is_spent_and_said_to_be_so() {
    let (fixture, run) = waiting().await;
    fixture.aws.script(Fault::new(Effect::Throttle).on("GetSessionToken"));
    let code = fixture.code();
    let error = fixture.submit(&run, &code, "one").await.unwrap_err();
    assert_eq!(error.reason(), Reason::Throttled);
    assert_eq!(fixture.aws.requests_with_code(&code), 1);
}

#[tokio::test]
async fn a_code_that_was_provably_not_sent_is_still_good() {
    let (fixture, run) = waiting().await;
    // Bound and dropped: nobody listens there.
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let cut_off = fixture.restarted(Some(&format!("http://{closed}"))).await;
    let code = fixture.code();
    let submission = super::Submission {
        run: run.id,
        phase: Phase::Plan,
        code: code.clone().into(),
        seen: None,
        request_id: "cut".into(),
        purpose: Purpose::Phase,
    };
    let error = cut_off.authenticate_run(&fixture.owner, submission).await.unwrap_err();
    assert_eq!(error.reason(), Reason::AwsUnreachable, "{error}");
    assert_eq!(lock(&fixture, &run).await, Lock::CodeRequired, "nobody refused this code");
    fixture.submit(&run, &code, "again").await.unwrap();
}

#[tokio::test]
async fn whose_session_it_is_may_be_asked_again_without_another_code() {
    let (fixture, run) = waiting().await;
    fixture.aws.script(Fault::new(Effect::ServiceUnavailable).on("GetCallerIdentity"));
    fixture.submit(&run, &fixture.code(), "one").await.unwrap();
    assert_eq!(fixture.aws.requests_for("GetSessionToken"), 1);
    assert_eq!(fixture.aws.requests_for("GetCallerIdentity"), 2);
}

#[tokio::test]
async fn keys_of_an_account_that_is_not_listed_spend_no_code() {
    let (fixture, run) = waiting().await;
    for accounts in [vec![], vec!["210987654321".to_owned()]] {
        fixture.list_accounts(accounts).await;
        let error = fixture.submit(&run, &fixture.code(), "one").await.unwrap_err();
        assert_eq!(error.reason(), Reason::AccountNotListed);
    }
    assert_eq!(fixture.aws.calls().len(), 0);
}

#[tokio::test]
async fn a_missing_part_of_the_triple_is_named() {
    let (fixture, run) = waiting().await;
    let name = "AWS_MFA_SERIAL_NUMBER";
    fixture.unset(name).await;
    let error = fixture.submit(&run, &fixture.code(), "one").await.unwrap_err();
    assert_eq!(error.reason(), Reason::TripleIncomplete);
    assert!(error.message().contains(name) && error.message().contains("latchkey var set"));
}

#[tokio::test]
async fn a_persons_own_keys_come_before_the_organizations() {
    let (fixture, run) = waiting().await;
    // One of the three is enough to mean them: a half-set triple never falls back in part.
    let own = NewVariable {
        name: "AWS_ACCESS_KEY_ID".into(),
        category: Category::Environment,
        value: fixture.aws.facts().access_key_id.into(),
        sensitive: true,
        hcl: false,
    };
    let scope = Scope::Personal;
    fixture.app.set_variable(&fixture.owner, ORGANIZATION, &scope, own, None).await.unwrap();
    let error = fixture.submit(&run, &fixture.code(), "one").await.unwrap_err();
    assert!(error.message().contains("your personal variables"), "{error}");
}

#[tokio::test]
async fn a_code_for_a_run_that_does_not_wait_is_refused_unspent() {
    let (fixture, run) = waiting().await;
    let run = fixture.submit(&run, &fixture.code(), "one").await.unwrap();
    let error = fixture.submit(&run, &fixture.code(), "two").await.unwrap_err();
    assert_eq!(error.reason(), Reason::NotAwaitingCode);
    assert_eq!(fixture.aws.requests_for("GetSessionToken"), 1);
}

#[tokio::test]
async fn a_service_token_queues_but_never_decides() {
    let (fixture, _) = waiting().await;
    let (app, owner) = (&fixture.app, &fixture.owner);
    let (token, _) = app
        .create_service_token(owner, ORGANIZATION, "ci", None, TokenScope::default(), "make-ci")
        .await
        .unwrap();
    let ci = app.caller(&token).await.unwrap();
    let run = fixture.try_queue(&ci, "by-ci").await.unwrap();
    let error = fixture.submit_as(&ci, &run, &fixture.code(), "one").await.unwrap_err();
    assert_eq!(error.reason(), Reason::PersonRequired);
    let digest = latchkey_domain::id::Digest::from_bytes([0; 32]);
    let error = app.confirm_run(&ci, run.id, digest).await.unwrap_err();
    assert_eq!(error.reason(), Reason::PersonRequired);
    assert_eq!(fixture.aws.calls().len(), 0);
}

#[tokio::test]
async fn a_stranger_is_told_that_the_run_does_not_exist() {
    let (fixture, run) = waiting().await;
    let app = &fixture.app;
    let token = app
        .create_user(&fixture.owner, ORGANIZATION, "bob", Role::Member, Access::Write, "make-bob")
        .await
        .unwrap();
    let bob = app.caller(&token).await.unwrap();
    fixture.submit_as(&bob, &run, "000000", "member").await.unwrap_err();
    let stranger = crate::auth::Caller::User {
        id: latchkey_domain::id::UserId::from_bytes([99; 16]),
        name: "eve".into(),
    };
    let error = fixture.submit_as(&stranger, &run, &fixture.code(), "one").await.unwrap_err();
    assert_eq!(error.reason(), Reason::NotFound);
    assert_eq!(fixture.aws.requests_for("GetSessionToken"), 1);
}

#[tokio::test]
async fn an_attempt_that_a_crash_cut_off_is_unknown_after_the_start() {
    let (fixture, run) = waiting().await;
    fixture.aws.script(Fault::delay(Duration::from_secs(600)).on("GetSessionToken"));
    let code = fixture.code();
    let submission = {
        let (app, owner, id, code) =
            (fixture.app.clone(), fixture.owner.clone(), run.id, code.clone());
        tokio::spawn(async move {
            let submission = super::Submission {
                run: id,
                phase: Phase::Plan,
                code: code.into(),
                seen: None,
                request_id: "cut".into(),
                purpose: Purpose::Phase,
            };
            app.authenticate_run(&owner, submission).await
        })
    };
    let limit = Duration::from_secs(10);
    fixture.aws.wait_for_calls(limit, |calls| calls.len() == 1).await.unwrap();
    submission.abort();
    let after = fixture.restarted(None).await;
    after.settle_authentications().await.unwrap();
    let view = after.show_run(&fixture.owner, run.id).await.unwrap();
    assert_eq!(view.lock, Lock::Failed);
    assert_eq!(view.run.refused_code.unwrap().reason, "EXCHANGE_UNKNOWN");
    assert_eq!(fixture.aws.requests_with_code(&code), 1);
}

#[tokio::test]
async fn a_run_canceled_while_aws_answers_gets_no_session() {
    let (fixture, run) = waiting().await;
    let pause = Duration::from_millis(300);
    fixture.aws.script(Fault::delay(pause).on("GetSessionToken"));
    let code = fixture.code();
    let submitted = fixture.submit(&run, &code, "one");
    let canceled = async {
        let limit = Duration::from_secs(10);
        fixture.aws.wait_for_calls(limit, |calls| !calls.is_empty()).await.unwrap();
        fixture.app.cancel_run(&fixture.owner, run.id).await.unwrap();
    };
    let (submitted, ()) = tokio::join!(submitted, canceled);
    assert_eq!(submitted.unwrap_err().reason(), Reason::NotAwaitingCode);
    assert_eq!(fixture.run(&run).await.state, RunState::Canceled);
    let key = crate::store::keys::session(run.id, Phase::Plan);
    assert!(fixture.store.fetch(&key).await.unwrap().is_none());
}

#[tokio::test]
async fn a_caller_who_hangs_up_at_any_moment_finds_the_outcome_by_asking_again() {
    for moments in 0..16 {
        let (fixture, run) = waiting().await;
        let hang_up = async {
            for _ in 0..moments {
                tokio::task::yield_now().await;
            }
        };
        tokio::select! {
            biased;
            _ = fixture.submit(&run, "000000", "same") => {}
            () = hang_up => {}
        }
        let again = fixture.submit(&run, "000000", "same");
        let again = tokio::time::timeout(Duration::from_secs(5), again).await;
        let again = again.unwrap_or_else(|_| panic!("no answer after {moments} moments"));
        assert_eq!(again.unwrap_err().reason(), Reason::CodeRejected);
        assert_eq!(fixture.aws.requests_with_code("000000"), 1);
    }
}

#[tokio::test]
async fn a_request_is_of_one_phase_and_one_plan() {
    let (fixture, run) = waiting().await;
    let run = fixture.submit(&run, &fixture.code(), "same").await.unwrap();
    let planned = fixture.plan(&run).await;
    let code = fixture.code();
    let error = fixture.submit(&planned, &code, "same").await.unwrap_err();
    assert_eq!(error.field_name(), Some("request_id"), "{error}");
    assert_eq!(fixture.run(&run).await.state, RunState::AwaitingApplyMfa);
    assert_eq!(fixture.aws.requests_with_code(&code), 0);

    fixture.submit(&planned, &code, "apply").await.unwrap();
    fixture.submit(&planned, &code, "apply").await.unwrap();
    let mut other = planned;
    other.planned.as_mut().unwrap().digest = latchkey_domain::id::Digest::from_bytes([9; 32]);
    let error = fixture.submit(&other, &code, "apply").await.unwrap_err();
    assert_eq!(error.field_name(), Some("request_id"), "{error}");
}
