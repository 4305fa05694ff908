//! Topping an apply up, against the simulated AWS.

use std::time::Duration;

use latchkey_domain::policy::{MfaPolicy, Phase};
use latchkey_domain::run::{Run, RunState};
use latchkey_proto::v1::Reason;

use crate::app::finish_job::JobResult;
use crate::app::fixture::{ENVIRONMENT, Fixture, ORGANIZATION};
use crate::app::settings::SettingsChange;
use crate::app::start_job::Start;
use crate::auth::RunnerIdentity;
use crate::error::Result;
use crate::job::LeaseRef;
use crate::store::record::environment::{CodeCredentials, RoleSettings, Roles};
use crate::store::record::people::Access;

async fn top_up(fixture: &Fixture, run: &Run, code: &str, id: &str) -> Result<Run> {
    let top_up = fixture.app.top_up(&fixture.owner, run.id, code.into(), id.into());
    top_up.await.map(|(run, _)| run)
}

/// A run whose apply was released.
async fn applying() -> (Fixture, Run, RunnerIdentity, LeaseRef, String) {
    let fixture = Fixture::new(MfaPolicy::AppliesOnly).await;
    let run = fixture.queue("one").await;
    let run = fixture.plan(&run).await;
    let run = fixture.submit(&run, &fixture.code(), "apply").await.unwrap();
    let (runner, lease, start) = fixture.start(&run, Phase::Apply).await;
    let Start::Go(go) = start else { panic!("{start:?}") };
    let first = go.session.unwrap().access_key_id;
    let run = fixture.run(&run).await;
    assert_eq!(run.state, RunState::Applying);
    (fixture, run, runner, lease, first)
}

#[tokio::test]
async fn the_holder_is_given_the_session_of_another_code() {
    let (fixture, run, runner, lease, first) = applying().await;
    fixture.clock.advance(Duration::from_secs(1200));
    let code = fixture.code();
    let topped = top_up(&fixture, &run, &code, "two").await.unwrap();
    assert_eq!(topped.state, RunState::Applying);
    let evidence = |run: &Run| run.apply.evidence.as_ref().unwrap().authentication;
    assert_ne!(evidence(&topped), evidence(&run));
    // Who approved stays who did; the clock of the simulated AWS did not move.
    let (before, after) =
        (run.apply.authenticated.clone().unwrap(), topped.apply.authenticated.clone().unwrap());
    assert!(after.at == before.at && after.expires_at >= before.expires_at);
    let Start::Go(go) = fixture.app.start_again(&runner, lease).await.unwrap() else { panic!() };
    assert_ne!(go.session.unwrap().access_key_id, first);
    let view = fixture.app.show_run(&fixture.owner, topped.id).await.unwrap();
    let top_ups = &view.credentials.apply.top_ups;
    assert_eq!((top_ups.len(), top_ups[0].user.as_str()), (1, "ada"));
    // A repeat spends nothing, and the code is of no further use.
    top_up(&fixture, &run, &code, "two").await.unwrap();
    let error = top_up(&fixture, &run, &code, "three").await.unwrap_err();
    assert_eq!(error.reason(), Reason::CodeUsed);
    assert_eq!(fixture.aws.requests_with_code(&code), 1);
}

#[tokio::test]
async fn a_refused_code_takes_nothing_away() {
    let (fixture, run, runner, lease, first) = applying().await;
    let error = top_up(&fixture, &run, "000000", "two").await.unwrap_err();
    assert_eq!(error.reason(), Reason::CodeRejected);
    let Start::Go(go) = fixture.app.start_again(&runner, lease).await.unwrap() else { panic!() };
    assert_eq!(go.session.unwrap().access_key_id, first);
    assert_eq!(fixture.run(&run).await.state, RunState::Applying);
}

#[tokio::test]
async fn no_other_kind_of_credentials_takes_the_place_of_the_first() {
    let (fixture, run, ..) = applying().await;
    let role = RoleSettings {
        arn: "arn:aws:iam::123456789012:role/deploy".into(),
        ..RoleSettings::default()
    };
    let change = SettingsChange {
        code_credentials: Some(CodeCredentials::Role),
        roles: Some(Roles { plan: role.clone(), apply: role }),
        ..SettingsChange::default()
    };
    let (app, owner) = (&fixture.app, &fixture.owner);
    app.update_environment(owner, ORGANIZATION, ENVIRONMENT, change, None).await.unwrap();
    let code = fixture.code();
    let error = top_up(&fixture, &run, &code, "two").await.unwrap_err();
    assert_eq!(error.reason(), Reason::WrongState);
    assert!(error.message().contains("role/deploy"), "{error}");
    assert_eq!(fixture.aws.requests_with_code(&code), 0);
}

#[tokio::test]
async fn only_a_running_apply_is_topped_up() {
    let (fixture, run, runner, lease, _) = applying().await;
    fixture.clock.advance(Duration::from_secs(90));
    let result = JobResult::Applied { outputs: None };
    fixture.app.finish_job(&runner, lease, 0, result).await.unwrap();
    let code = fixture.code();
    let error = top_up(&fixture, &run, &code, "two").await.unwrap_err();
    assert_eq!(error.reason(), Reason::WrongState);
    assert_eq!(fixture.aws.requests_with_code(&code), 0);

    // What that apply took is told to whoever approves the next.
    let next = fixture.queue("next").await;
    let next = fixture.plan(&next).await;
    let view = fixture.app.show_run(&fixture.owner, next.id).await.unwrap();
    let forecast = view.credentials.forecast.unwrap();
    assert_eq!((forecast.samples, forecast.duration), (1, Some(Duration::from_secs(90))));
    assert_eq!(forecast.session, Some(Duration::from_secs(3600)));
    assert_eq!(forecast.warning, None);
}

#[tokio::test]
async fn who_queued_tops_nothing_up_where_a_second_person_is_demanded() {
    let (fixture, run, ..) = applying().await;
    let bob = fixture.member("bob", Access::Write).await;
    // Demanded since it was approved: the stricter of the two holds.
    let change = SettingsChange { second_person: Some(true), ..SettingsChange::default() };
    fixture.settings(change).await;
    let code = fixture.code();
    let error = top_up(&fixture, &run, &code, "own").await.unwrap_err();
    assert_eq!(error.reason(), Reason::SecondPersonRequired);
    assert_eq!(fixture.aws.requests_with_code(&code), 0);
    let (topped, _) = fixture.app.top_up(&bob, run.id, code.into(), "bobs".into()).await.unwrap();
    assert_eq!(topped.apply.evidence.unwrap().user, "bob");
}

#[tokio::test]
async fn a_role_is_replaced_by_the_same_role_of_another_code() {
    let fixture = Fixture::new(MfaPolicy::AppliesOnly).await;
    let role = RoleSettings {
        arn: "arn:aws:iam::123456789012:role/deploy".into(),
        ..RoleSettings::default()
    };
    fixture
        .settings(SettingsChange {
            code_credentials: Some(CodeCredentials::Role),
            roles: Some(Roles { plan: role.clone(), apply: role }),
            ..SettingsChange::default()
        })
        .await;
    let run = fixture.queue("one").await;
    let run = fixture.plan(&run).await;
    let run = fixture.submit(&run, &fixture.code(), "apply").await.unwrap();
    let (runner, lease, start) = fixture.start(&run, Phase::Apply).await;
    let Start::Go(go) = start else { panic!("{start:?}") };
    let first = go.session.unwrap().access_key_id;
    let run = top_up(&fixture, &run, &fixture.code(), "two").await.unwrap();
    let Start::Go(go) = fixture.app.start_again(&runner, lease).await.unwrap() else { panic!() };
    assert_ne!(go.session.unwrap().access_key_id, first);
    let view = fixture.app.show_run(&fixture.owner, run.id).await.unwrap();
    let apply = &view.credentials.apply;
    assert!(apply.role.as_ref().is_some_and(|role| role.ends_with("role/deploy")), "{apply:?}");
    assert_eq!(apply.top_ups.len(), 1);
    let with_code = fixture.aws.calls().into_iter().filter(|call| call.had_code);
    assert!(with_code.map(|call| call.action).eq(["AssumeRole", "AssumeRole"]));
}
