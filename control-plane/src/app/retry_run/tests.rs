//! A run that is done again.

use latchkey_domain::policy::MfaPolicy;
use latchkey_domain::run::{Run, RunKind, RunState};
use latchkey_proto::v1::Reason;

use super::Retry;
use crate::app::fixture::{ENVIRONMENT, Fixture, ORGANIZATION};
use crate::app::queue_run::NewRun;
use crate::app::settings::SettingsChange;
use crate::app::variables::NewVariable;
use crate::store::record::variable::Category;

fn retry(first: &Run, request_id: &str) -> Retry {
    Retry {
        run: first.id,
        variables: vec![],
        destroy_confirmation: String::new(),
        request_id: request_id.into(),
    }
}

fn size() -> NewVariable {
    NewVariable {
        name: "size".into(),
        category: Category::Terraform,
        value: "3".into(),
        sensitive: false,
        hcl: true,
    }
}

#[tokio::test]
async fn a_retry_asks_for_the_same_under_the_policy_of_now() {
    let fixture = Fixture::new(MfaPolicy::Never).await;
    let first = fixture.queue("first").await;
    let early = fixture.app.retry_run(&fixture.owner, retry(&first, "a")).await.unwrap_err();
    assert_eq!(early.reason(), Reason::WrongState);

    fixture.app.cancel_run(&fixture.owner, first.id).await.unwrap();
    let tighter =
        SettingsChange { policy: Some(MfaPolicy::PlansAndApplies), ..SettingsChange::default() };
    let app = &fixture.app;
    app.update_environment(&fixture.owner, ORGANIZATION, ENVIRONMENT, tighter, None).await.unwrap();
    let second = app.retry_run(&fixture.owner, retry(&first, "a")).await.unwrap();
    assert_eq!(second.state, RunState::AwaitingPlanMfa);
    assert_eq!(second.request.retry_of, Some(first.id));
    assert_eq!(second.request.configuration, first.request.configuration);
    assert_eq!(second.request.message, format!("retry of {}", first.id));

    // The same request is the same run; another is another.
    let again = app.retry_run(&fixture.owner, retry(&first, "a")).await.unwrap();
    assert_eq!(again.id, second.id);
    let third = app.retry_run(&fixture.owner, retry(&first, "b")).await.unwrap();
    assert_ne!(third.id, second.id);
}

#[tokio::test]
async fn what_was_given_for_the_first_run_has_to_be_given_again() {
    let fixture = Fixture::new(MfaPolicy::Never).await;
    let first = fixture.queue_giving("first", vec![size()]).await.unwrap();
    fixture.app.cancel_run(&fixture.owner, first.id).await.unwrap();
    let refused = fixture.app.retry_run(&fixture.owner, retry(&first, "a")).await.unwrap_err();
    assert_eq!(refused.field_name(), Some("variables"));
    assert!(refused.message().contains("give them again: size"), "{refused}");
    let whole = Retry { variables: vec![size()], ..retry(&first, "a") };
    let second = fixture.app.retry_run(&fixture.owner, whole).await.unwrap();
    assert_eq!(second.request.given[0].name, "size");
}

#[tokio::test]
async fn a_destroy_is_named_again_and_strangers_learn_nothing() {
    let fixture = Fixture::new(MfaPolicy::Never).await;
    let first = fixture.queue_kind(RunKind::Destroy, "first").await;
    fixture.app.cancel_run(&fixture.owner, first.id).await.unwrap();
    let refused = fixture.app.retry_run(&fixture.owner, retry(&first, "a")).await.unwrap_err();
    assert_eq!(refused.field_name(), Some("destroy_confirmation"));
    let named = Retry { destroy_confirmation: ENVIRONMENT.into(), ..retry(&first, "a") };
    let second = fixture.app.retry_run(&fixture.owner, named).await.unwrap();
    assert_eq!(second.request.kind, RunKind::Destroy);

    let stranger = fixture.stranger();
    let refused = fixture.app.retry_run(&stranger, retry(&first, "a")).await.unwrap_err();
    assert_eq!(refused.reason(), Reason::NotFound);
    assert!(refused.message().starts_with("no such run,"), "{refused}");
}

#[tokio::test]
async fn what_was_queued_not_to_apply_by_itself_does_not_when_it_is_done_again() {
    let automatic = SettingsChange { auto_apply: Some(true), ..SettingsChange::default() };
    let fixture = Fixture::in_environment(automatic).await;
    for (asked, expect) in [(Some(false), false), (None, true)] {
        let id = format!("{asked:?}");
        let new = NewRun { auto_apply: asked, ..fixture.new_run(&fixture.app, &id).await };
        let first = fixture.app.queue_run(&fixture.owner, new).await.unwrap();
        fixture.app.cancel_run(&fixture.owner, first.id).await.unwrap();
        let second = fixture.app.retry_run(&fixture.owner, retry(&first, &id)).await.unwrap();
        assert_eq!(second.request.auto_apply, expect, "{asked:?}");
        fixture.app.cancel_run(&fixture.owner, second.id).await.unwrap();
    }
}

#[tokio::test]
async fn a_variable_of_another_category_is_not_the_one_that_was_given() {
    let fixture = Fixture::new(MfaPolicy::Never).await;
    let other = NewVariable { category: Category::Environment, hcl: false, ..size() };
    for (given, again) in [(size(), other.clone()), (other, size())] {
        let first =
            fixture.queue_giving(&format!("{:?}", given.category), vec![given]).await.unwrap();
        fixture.app.cancel_run(&fixture.owner, first.id).await.unwrap();
        let odd = Retry { variables: vec![again], ..retry(&first, "a") };
        let refused = fixture.app.retry_run(&fixture.owner, odd).await.unwrap_err();
        assert_eq!(refused.field_name(), Some("variables"));
    }
}
