//! What a person is told before an apply, as functions and of whole runs.

use std::time::Duration;

use latchkey_domain::policy::{MfaPolicy, Phase};
use latchkey_domain::run::{Run, RunState};

use super::{PACKED_WARNING, chained, forecast, is_temporary, long_roles, percentile_95};
use crate::app::finish_job::JobResult;
use crate::app::fixture::{Fixture, narrowed_by};
use crate::app::settings::SettingsChange;
use crate::store::record::environment::{CodeCredentials, PlainCredentials, Roles, Settings};

const HOUR: Duration = Duration::from_secs(3600);

#[test]
fn the_percentile_is_a_value_that_was_seen() {
    assert_eq!(percentile_95(&[]), None);
    assert_eq!(percentile_95(&[7]), Some(7));
    let hundred: Vec<u64> = (1..=100).rev().collect();
    assert_eq!(percentile_95(&hundred), Some(95));
    let fifty: Vec<u64> = (1..=50).collect();
    assert_eq!(percentile_95(&fifty), Some(48));
}

#[test]
fn a_session_that_may_be_too_short_is_told_with_what_to_do() {
    let forecast = |seconds: &[u64], session, by_code| forecast(seconds, session, HOUR, by_code);
    let warned = forecast(&[4000], Some(HOUR), true).warning.unwrap();
    assert!(warned.contains("1 h 6 min") && warned.contains("latchkey top-up"), "{warned}");
    let plain = forecast(&[4000], Some(HOUR), false).warning.unwrap();
    assert!(!plain.contains("top-up"), "{plain}");
    assert_eq!(forecast(&[3000], Some(HOUR), true).warning, None);
    assert_eq!(forecast(&[4000], None, false).warning, None);
    assert_eq!(forecast(&[], Some(HOUR), true).samples, 0);
}

#[test]
fn a_floor_is_too_low_only_for_a_session_that_may_have_waited() {
    let minutes = |minutes: u64| Duration::from_secs(60 * minutes);
    let warned = |floor, by_code| forecast(&[3590], Some(HOUR), minutes(floor), by_code).warning;
    assert!(warned(5, true).unwrap().contains("--session-floor 55m"));
    assert_eq!(warned(55, true), None);
    assert_eq!(warned(5, false), None, "that of no code is issued when the apply starts");
    assert_eq!(forecast(&[299], Some(HOUR), minutes(5), true).warning, None);
    // No floor may come within 5 minutes of a session's life, nor be longer than 12 h.
    let session = Some(Duration::from_secs(3595));
    let warned = forecast(&[3590], session, minutes(5), true).warning.unwrap();
    assert!(warned.contains("--session-floor 3295s"), "{warned}");
    let long = |floor| forecast(&[13 * 3600], Some(36 * HOUR), floor, true).warning;
    assert!(long(HOUR).unwrap().contains("--session-floor 720m"));
    assert_eq!(long(12 * HOUR), None);
}

#[test]
fn only_what_is_over_an_hour_is_read_as_too_long() {
    let changes = serde_json::json!({"assumed_roles": [
        {"provider": "aws", "seconds": 3600},
        {"provider": "aws.far", "seconds": 7200},
        {"provider": 5, "seconds": 7200},
    ]});
    assert_eq!(long_roles(&changes), [("aws.far".to_owned(), 2 * HOUR)]);
    assert!(long_roles(&serde_json::json!({})).is_empty());
    assert!(chained("aws.far", 2 * HOUR).contains("2 h"));
}

#[test]
fn long_term_keys_chain_nothing() {
    let settings = |plain| Settings { plain_credentials: plain, ..Settings::default() };
    assert!(is_temporary(&settings(PlainCredentials::Session), false));
    assert!(!is_temporary(&settings(PlainCredentials::Static), false));
    assert!(is_temporary(&settings(PlainCredentials::Static), true));
}

/// Plays a run whose apply takes so long.
async fn applied_in(fixture: &Fixture, seconds: u64, id: &str) {
    let run = fixture.queue(id).await;
    let run = fixture.plan(&run).await;
    let run = fixture.submit(&run, &fixture.code(), id).await.unwrap();
    let (runner, lease, _) = fixture.start(&run, Phase::Apply).await;
    fixture.clock.advance(Duration::from_secs(seconds));
    let result = JobResult::Applied { outputs: None };
    fixture.app.finish_job(&runner, lease, 0, result).await.unwrap();
    assert_eq!(fixture.run(&run).await.state, RunState::Applied);
}

async fn warned(fixture: &Fixture, run: &Run) -> Option<String> {
    let view = fixture.app.show_run(&fixture.owner, run.id).await.unwrap();
    view.credentials.forecast.unwrap().warning
}

#[tokio::test]
async fn who_is_about_to_submit_is_told_of_a_floor_below_what_applies_take() {
    let fixture = Fixture::new(MfaPolicy::AppliesOnly).await;
    applied_in(&fixture, 1000, "first").await;
    let run = fixture.queue("next").await;
    let run = fixture.plan(&run).await;
    assert_eq!(run.state, RunState::AwaitingApplyMfa);
    let told = warned(&fixture, &run).await.expect("the floor is 5 min");
    for part in ["16 min 40 s", "5 min", "latchkey env set --session-floor 17m"] {
        assert!(told.contains(part), "{part}: {told}");
    }
    // As told.
    let floor = |seconds| SettingsChange {
        session_floor: Some(Duration::from_secs(seconds)),
        ..SettingsChange::default()
    };
    fixture.settings(floor(17 * 60)).await;
    assert_eq!(warned(&fixture, &run).await, None);
}

#[tokio::test]
async fn who_is_about_to_submit_is_told_of_a_session_shorter_than_what_applies_take() {
    // Plans get nothing: the clock of the simulated AWS does not move along.
    let change = SettingsChange {
        policy: Some(MfaPolicy::AppliesOnly),
        plain_credentials: Some(PlainCredentials::None),
        ..SettingsChange::default()
    };
    let fixture = Fixture::in_environment(change).await;
    applied_in(&fixture, 4000, "first").await;
    let run = fixture.queue("next").await;
    let run = fixture.plan(&run).await;
    let told = warned(&fixture, &run).await.expect("a session lives 1 h");
    assert!(told.contains("1 h 6 min") && told.contains("--session-duration"), "{told}");
    let longer = SettingsChange {
        session_duration: Some(Duration::from_secs(7200)),
        session_floor: Some(Duration::from_secs(4500)),
        ..SettingsChange::default()
    };
    fixture.settings(longer).await;
    assert_eq!(warned(&fixture, &run).await, None);
}

#[tokio::test]
async fn policies_that_nearly_fill_their_space_are_told_before_they_are_too_many() {
    for (characters, expected) in [(700, false), (860, true)] {
        let role = narrowed_by(characters);
        let change = SettingsChange {
            policy: Some(MfaPolicy::PlansAndApplies),
            code_credentials: Some(CodeCredentials::Role),
            roles: Some(Roles { plan: role.clone(), apply: role }),
            ..SettingsChange::default()
        };
        let fixture = Fixture::in_environment(change).await;
        let run = fixture.queue("one").await;
        let run = fixture.submit(&run, &fixture.code(), "plan").await.unwrap();
        let facts = fixture.app.show_run(&fixture.owner, run.id).await.unwrap().credentials;
        let percent = facts.plan.packed_percent.unwrap();
        assert_eq!(percent > PACKED_WARNING, expected, "{percent}");
        match facts.warnings.as_slice() {
            [] => assert!(!expected, "{percent}"),
            [warning] => {
                assert!(expected && warning.contains(&format!("{percent} %")), "{warning}");
                assert!(warning.contains("the plan's role"), "{warning}");
            }
            more => panic!("{more:?}"),
        }
    }
}
