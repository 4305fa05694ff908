//! Plan rules and the second person, through the use cases.

use std::time::Duration;

use latchkey_aws_simulator::Fault;
use latchkey_domain::policy::{MfaPolicy, Phase, PlanRule};
use latchkey_domain::run::{Run, RunState};
use latchkey_proto::v1::Reason;
use serde_json::json;

use super::fixture::Fixture;
use super::settings::SettingsChange;
use super::start_job::Start;
use super::view_runs::Lock;
use crate::auth::Caller;
use crate::error::Result;
use crate::store::keys;
use crate::store::record::people::Access;

fn changes(action: &str) -> Vec<u8> {
    let one = json!({"address": "aws_iam_role.admin", "action": action, "type": "aws_iam_role"});
    json!({"format": 1, "truncated": false, "resource_changes": [one]}).to_string().into_bytes()
}

fn destructive() -> SettingsChange {
    let plan_rule = Some(PlanRule { destructive: true, ..PlanRule::default() });
    SettingsChange { plan_rule, ..SettingsChange::default() }
}

fn two_persons() -> SettingsChange {
    SettingsChange { second_person: Some(true), ..SettingsChange::default() }
}

async fn confirm(fixture: &Fixture, by: &Caller, run: &Run) -> Result<Run> {
    let seen = run.planned.as_ref().unwrap().digest;
    fixture.app.confirm_run(by, run.id, seen).await
}

#[tokio::test]
async fn a_plan_that_replaces_something_takes_a_code_under_never_and_says_why() {
    let fixture = Fixture::new(MfaPolicy::Never).await;
    fixture.settings(destructive()).await;
    let run = fixture.queue_automatic(&fixture.owner, "one").await.unwrap();
    // The runner says of it that it adds one thing.
    let run = fixture.plan_with(&run, &changes("replace")).await;
    assert_eq!(run.state, RunState::AwaitingApplyMfa);
    let counts = run.planned.as_ref().unwrap().counts;
    assert_eq!((counts.add, counts.destroy, counts.replace), (1, 1, 1));
    let view = fixture.app.show_run(&fixture.owner, run.id).await.unwrap();
    let why = view.code_reason.unwrap();
    assert!(why.starts_with("the plan replaces aws_iam_role.admin: the environment"), "{why}");
    assert_eq!(view.lock, Lock::CodeRequired);
    let refused = confirm(&fixture, &fixture.owner, &run).await.unwrap_err();
    assert_eq!(refused.reason(), Reason::MfaRequired);
    let run = fixture.submit(&run, &fixture.code(), "code").await.unwrap();
    assert_eq!(run.state, RunState::ApplyQueued);
    let (_, _, start) = fixture.start(&run, Phase::Apply).await;
    assert!(matches!(start, Start::Go(go) if go.session.is_some()));
    // Kept, and stored.
    let view = fixture.app.show_run(&fixture.owner, run.id).await.unwrap();
    assert_eq!(view.code_reason, Some(why));
}

#[tokio::test]
async fn a_harmless_plan_is_confirmed_and_one_that_cannot_be_read_is_not() {
    let fixture = Fixture::new(MfaPolicy::Never).await;
    fixture.settings(destructive()).await;
    let run = fixture.queue("one").await;
    let run = fixture.plan_with(&run, &changes("update")).await;
    assert_eq!(run.state, RunState::AwaitingConfirmation);
    fixture.app.discard_run(&fixture.owner, run.id).await.unwrap();
    for (number, odd) in [&b"{}"[..], &changes("conjure")].into_iter().enumerate() {
        let run = fixture.queue(&format!("odd-{number}")).await;
        let run = fixture.plan_with(&run, odd).await;
        assert_eq!(run.state, RunState::AwaitingApplyMfa);
        assert!(run.code_reason.unwrap().contains("cannot be told in full"));
        fixture.app.discard_run(&fixture.owner, run.id).await.unwrap();
    }
}

#[tokio::test]
async fn a_rule_set_while_the_plan_is_read_is_shown_and_holds() {
    let fixture = Fixture::new(MfaPolicy::Never).await;
    let run = fixture.queue("one").await;
    let run = fixture.plan_with(&run, &changes("delete")).await;
    assert_eq!(run.state, RunState::AwaitingConfirmation);
    fixture.settings(destructive()).await;
    let view = fixture.app.show_run(&fixture.owner, run.id).await.unwrap();
    assert!(view.code_reason.unwrap().contains("destroys aws_iam_role.admin"));
    assert_eq!(view.lock, Lock::CodeRequired);
    let refused = confirm(&fixture, &fixture.owner, &run).await.unwrap_err();
    assert_eq!(refused.reason(), Reason::MfaRequired);
    fixture.submit(&run, &fixture.code(), "code").await.unwrap();
}

#[tokio::test]
async fn a_rule_set_after_the_confirmation_stops_the_release() {
    let fixture = Fixture::new(MfaPolicy::Never).await;
    let run = fixture.queue("one").await;
    let run = fixture.plan_with(&run, &changes("delete")).await;
    let run = confirm(&fixture, &fixture.owner, &run).await.unwrap();
    fixture.settings(destructive()).await;
    let (_, _, start) = fixture.start(&run, Phase::Apply).await;
    assert!(
        matches!(&start, Start::Revoked { reason } if reason.contains("destroys")),
        "{start:?}"
    );
    assert_eq!(fixture.run(&run).await.state, RunState::AwaitingApplyMfa);
}

#[tokio::test]
async fn who_queued_does_not_confirm_where_a_second_person_is_demanded() {
    let fixture = Fixture::new(MfaPolicy::Never).await;
    fixture.settings(two_persons()).await;
    let bob = fixture.member("bob", Access::Write).await;
    let run = fixture.queue_automatic(&fixture.owner, "one").await.unwrap();
    let run = fixture.plan(&run).await;
    assert_eq!(run.state, RunState::AwaitingConfirmation, "nothing applies by itself");
    let refused = confirm(&fixture, &fixture.owner, &run).await.unwrap_err();
    assert_eq!(refused.reason(), Reason::SecondPersonRequired);
    let run = confirm(&fixture, &bob, &run).await.unwrap();
    assert_eq!((run.state, run.approval.unwrap().by.as_str()), (RunState::ApplyQueued, "bob"));
}

#[tokio::test]
async fn who_queued_spends_no_code_where_a_second_person_is_demanded() {
    let fixture = Fixture::new(MfaPolicy::AppliesOnly).await;
    let bob = fixture.member("bob", Access::Write).await;
    let run = fixture.queue("one").await;
    let run = fixture.plan(&run).await;
    // Demanded since the run was queued: the stricter of the two holds.
    fixture.settings(two_persons()).await;
    let code = fixture.code();
    let refused = fixture.submit(&run, &code, "own").await.unwrap_err();
    assert_eq!(refused.reason(), Reason::SecondPersonRequired);
    assert_eq!(fixture.aws.requests_with_code(&code), 0);
    let run = fixture.submit_as(&bob, &run, &code, "bobs").await.unwrap();
    assert_eq!(run.approval.unwrap().by, "bob");
}

/// What is kept for an apply, and which actions were recorded of releases.
async fn released(fixture: &Fixture, run: &Run) -> (bool, Vec<String>) {
    let place = keys::session(run.id, Phase::Apply);
    let kept = fixture.store.fetch(&place).await.unwrap().is_some();
    let told = fixture.audited().await.into_iter().map(|(action, _)| action);
    (kept, told.filter(|action| action.contains("release")).collect())
}

/// A run whose apply is queued, confirmed by who queued it.
async fn self_confirmed(fixture: &Fixture) -> Run {
    let run = fixture.queue("one").await;
    let run = fixture.plan(&run).await;
    confirm(fixture, &fixture.owner, &run).await.unwrap()
}

#[tokio::test]
async fn a_release_that_is_denied_for_want_of_a_second_person_asks_aws_for_nothing() {
    let fixture = Fixture::new(MfaPolicy::Never).await;
    let run = self_confirmed(&fixture).await;
    fixture.settings(two_persons()).await;
    let asked = fixture.aws.requests_for("GetSessionToken");
    let (_, _, start) = fixture.start(&run, Phase::Apply).await;
    assert!(matches!(start, Start::Revoked { .. }), "{start:?}");
    assert_eq!(fixture.run(&run).await.state, RunState::AwaitingConfirmation);
    assert_eq!(fixture.aws.requests_for("GetSessionToken"), asked);
    let (kept, told) = released(&fixture, &run).await;
    assert!(!kept);
    assert_eq!(told, ["release_credentials", "deny_release"]);
}

#[tokio::test]
async fn credentials_that_were_got_for_a_denied_release_are_not_kept() {
    let fixture = Fixture::new(MfaPolicy::Never).await;
    let run = self_confirmed(&fixture).await;
    let runner = fixture.runner().await;
    let (lease, _) = fixture.app.grant(run.job_id(Phase::Apply), runner.id).await.unwrap();
    // The policy is tightened while AWS answers.
    let slow = Fault::delay(Duration::from_millis(300)).on("GetSessionToken");
    fixture.aws.script(slow);
    let asked = fixture.aws.requests_for("GetSessionToken");
    let tightened = async {
        let is_asked = async {
            while fixture.aws.requests_for("GetSessionToken") == asked {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), is_asked).await.expect("AWS is asked");
        fixture.settings(two_persons()).await;
    };
    let (start, ()) = tokio::join!(fixture.app.start_job(&runner, lease), tightened);
    assert!(matches!(start.unwrap(), Start::Revoked { .. }));
    let (kept, told) = released(&fixture, &run).await;
    assert!(!kept);
    assert_eq!(told, ["release_credentials", "deny_release"]);
}
