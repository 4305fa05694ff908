//! Who has waited longest is next, even where nobody has given the turn yet.

use latchkey_domain::environment::Hold;
use latchkey_domain::policy::MfaPolicy;
use latchkey_domain::run::{Run, RunState};

use crate::app::fixture::Fixture;
use crate::app::settings::SettingsChange;
use crate::store::record::encode;
use crate::store::record::environment::EnvironmentRecord;
use crate::store::{Batch, Expect};

/// Frees the environment as an end does whose turn nobody gives.
async fn free(fixture: &Fixture, run: &Run) {
    let request = &run.request;
    let found = fixture.app.environment(request.organization, request.environment).await.unwrap();
    let mut environment = found.value;
    environment.hold = Hold::default();
    let record = encode(&EnvironmentRecord::from(&environment));
    fixture.store.commit(Batch::new().put(found.key, Expect::Anything, record)).await.unwrap();
}

async fn turn_of(fixture: &Fixture, run: &Run, others: &[&Run]) {
    let request = &run.request;
    fixture.app.give_turns(request.organization, request.environment).await.unwrap();
    assert_eq!(fixture.run(run).await.state, RunState::PlanQueued);
    for other in others {
        assert_eq!(fixture.run(other).await.state, RunState::Pending);
    }
}

#[tokio::test]
async fn a_new_run_does_not_pass_one_that_waits_for_its_turn() {
    let fixture = Fixture::new(MfaPolicy::Never).await;
    let first = fixture.queue("first").await;
    let second = fixture.queue("second").await;
    assert_eq!(second.state, RunState::Pending);
    free(&fixture, &first).await;
    let third = fixture.queue("third").await;
    assert_eq!(third.state, RunState::Pending);
    turn_of(&fixture, &second, &[&third]).await;
}

#[tokio::test]
async fn a_code_does_not_carry_a_run_past_one_that_waits_for_its_turn() {
    let fixture = Fixture::new(MfaPolicy::Never).await;
    let first = fixture.queue("first").await;
    let second = fixture.queue("second").await;
    let policy = Some(MfaPolicy::PlansAndApplies);
    fixture.settings(SettingsChange { policy, ..SettingsChange::default() }).await;
    let third = fixture.queue("third").await;
    free(&fixture, &first).await;
    let third = fixture.submit(&third, &fixture.code(), "third").await.unwrap();
    assert_eq!(third.state, RunState::Pending);
    turn_of(&fixture, &second, &[&third]).await;
}

#[tokio::test]
async fn the_oldest_has_its_turn_with_its_code() {
    let fixture = Fixture::new(MfaPolicy::PlansAndApplies).await;
    let first = fixture.queue("first").await;
    let second = fixture.queue("second").await;
    let holder = fixture.submit(&second, &fixture.code(), "second").await.unwrap();
    assert_eq!(holder.state, RunState::PlanQueued);
    let third = fixture.queue("third").await;
    let third = fixture.submit(&third, &fixture.code(), "third").await.unwrap();
    assert_eq!(third.state, RunState::Pending);
    free(&fixture, &holder).await;
    let first = fixture.submit(&first, &fixture.code(), "first").await.unwrap();
    assert_eq!(first.state, RunState::PlanQueued);
}
