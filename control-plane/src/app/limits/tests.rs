//! Limits against a manual clock: nothing happens before, once at, and again after a restart.

use std::sync::Arc;
use std::time::Duration;

use latchkey_domain::policy::{MfaPolicy, Phase};
use latchkey_domain::run::RunState;

use crate::app::fixture::Fixture;
use crate::app::settings::SettingsChange;
use crate::store::keys;
use crate::store::record::environment::Limits;

fn limits(person: Option<u64>, plan: Option<u64>, apply: Option<u64>) -> SettingsChange {
    SettingsChange { limits: Some(Limits { person, plan, apply }), ..SettingsChange::default() }
}

#[tokio::test]
async fn a_run_that_waits_too_long_for_a_person_is_canceled_with_the_reason() {
    let fixture = Fixture::new(MfaPolicy::PlansAndApplies).await;
    fixture.settings(limits(Some(600), None, None)).await;
    let run = fixture.queue("one").await;
    fixture.clock.advance(Duration::from_secs(599));
    fixture.submit(&run, "000000", "wrong").await.unwrap_err();
    fixture.app.enforce_limits().await;
    assert_eq!(fixture.run(&run).await.state, RunState::AwaitingPlanMfa);
    fixture.clock.advance(Duration::from_secs(1));
    fixture.app.enforce_limits().await;
    let run = fixture.run(&run).await;
    assert_eq!(run.state, RunState::Canceled);
    let reason = run.reason.unwrap();
    assert!(reason.contains("no person decided") && reason.contains("600 s"), "{reason}");
    assert!(fixture.audited().await.contains(&("enforce_limit".into(), "system".into())));
}

#[tokio::test]
async fn a_phase_that_runs_too_long_is_asked_to_stop_and_the_next_process_knows() {
    let fixture = Fixture::new(MfaPolicy::Never).await;
    fixture.settings(limits(None, None, Some(60))).await;
    let run = fixture.queue("one").await;
    let run = fixture.plan(&run).await;
    let seen = run.planned.as_ref().unwrap().digest;
    let run = fixture.app.confirm_run(&fixture.owner, run.id, seen).await.unwrap();
    // It counts from the start of terraform, not from the approval.
    fixture.clock.advance(Duration::from_secs(600));
    fixture.app.enforce_limits().await;
    fixture.start(&run, Phase::Apply).await;
    let after = fixture.restarted(None).await;
    after.note_all_limits().await.unwrap();
    after.enforce_limits().await;
    assert!(fixture.run(&run).await.cancel_requested_by.is_none());
    fixture.clock.advance(Duration::from_secs(60));
    after.enforce_limits().await;
    let asked = fixture.run(&run).await;
    assert_eq!(asked.state, RunState::Applying);
    assert!(asked.cancel_requested_by.unwrap().starts_with("system (the apply ran longer"));
    assert!(asked.reason.unwrap().contains("asked it to stop"));
}

#[tokio::test]
async fn a_limit_that_was_moved_holds_as_it_is_now() {
    let fixture = Fixture::new(MfaPolicy::PlansAndApplies).await;
    fixture.settings(limits(Some(60), None, None)).await;
    let run = fixture.queue("one").await;
    fixture.settings(limits(Some(6_000), None, None)).await;
    fixture.clock.advance(Duration::from_secs(60));
    fixture.app.enforce_limits().await;
    assert_eq!(fixture.run(&run).await.state, RunState::AwaitingPlanMfa);
    fixture.settings(limits(None, None, None)).await;
    fixture.clock.advance(Duration::from_secs(60_000));
    fixture.app.enforce_limits().await;
    assert_eq!(fixture.run(&run).await.state, RunState::AwaitingPlanMfa);
}

#[tokio::test]
async fn the_timer_wakes_for_a_limit_that_is_set_while_it_sleeps() {
    let fixture = Fixture::new(MfaPolicy::PlansAndApplies).await;
    let run = fixture.queue("one").await;
    let timer = tokio::spawn(Arc::clone(&fixture.app).keep_limits());
    fixture.clock.advance(Duration::from_secs(3_600));
    let mut feed = fixture.store.watch(keys::exactly(&keys::run(run.id)));
    fixture.settings(limits(Some(60), None, None)).await;
    let canceled = async {
        while fixture.run(&run).await.state != RunState::Canceled {
            feed.next().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), canceled).await.unwrap();
    timer.abort();
}
