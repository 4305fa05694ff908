//! What phases are given, against the simulated AWS.

use std::time::Duration;

use latchkey_aws_simulator::{Account, MfaCondition, Role};
use latchkey_domain::policy::{MfaPolicy, Phase};
use latchkey_domain::run::RunState;
use latchkey_proto::v1::Reason;
use secrecy::ExposeSecret;

use crate::app::PageRequest;
use crate::app::audit_trail::AuditFilter;
use crate::app::fixture::{ENVIRONMENT, Fixture, ORGANIZATION};
use crate::app::settings::{SettingsChange, warnings};
use crate::app::start_job::Start;
use crate::store::record::encode;
use crate::store::record::environment::{
    CodeCredentials, EnvironmentRecord, PlainCredentials, RoleSettings, Roles,
};
use crate::store::{Batch, Expect};
use crate::sts::Credentials;

/// Of the account 123456789012.
fn role(name: &str) -> RoleSettings {
    let arn = format!("arn:aws:iam::123456789012:role/{name}");
    RoleSettings { arn, ..RoleSettings::default() }
}

async fn with(policy: MfaPolicy, change: SettingsChange) -> Fixture {
    Fixture::in_environment(SettingsChange { policy: Some(policy), ..change }).await
}

async fn given(fixture: &Fixture, phase: Phase, run: &latchkey_domain::run::Run) -> Credentials {
    let (_, _, start) = fixture.start(run, phase).await;
    let Start::Go(go) = start else { panic!("{start:?}") };
    go.session.expect("it gets credentials")
}

#[tokio::test]
async fn a_code_assumes_the_phases_role_marked_as_the_run_and_the_person() {
    let narrowed = RoleSettings {
        policy: r#"{"Version":"2012-10-17","Statement":[]}"#.into(),
        policy_arns: vec!["arn:aws:iam::aws:policy/ReadOnlyAccess".into()],
        ..role("read")
    };
    let fixture = with(
        MfaPolicy::PlansAndApplies,
        SettingsChange {
            code_credentials: Some(CodeCredentials::Role),
            roles: Some(Roles { plan: narrowed, apply: role("deploy") }),
            ..SettingsChange::default()
        },
    )
    .await;
    let run = fixture.queue("one").await;
    let run = fixture.submit(&run, &fixture.code(), "plan").await.unwrap();
    let run = fixture.plan(&run).await;
    assert_eq!(run.state, RunState::AwaitingApplyMfa);
    let view = fixture.app.show_run(&fixture.owner, run.id).await.unwrap();
    assert!(view.credentials.plan.packed_percent.is_some_and(|percent| percent > 0));
    assert_eq!(view.credentials.plan.role, Some(role("read").arn));
    let run = fixture.submit(&run, &fixture.code(), "apply").await.unwrap();
    let session = given(&fixture, Phase::Apply, &run).await;
    assert!(session.access_key_id.starts_with("ASIA"));

    let external_id =
        fixture.app.show_organization(&fixture.owner, ORGANIZATION).await.unwrap().external_id;
    assert!(external_id.starts_with("latchkey-"));
    let calls = fixture.aws.calls();
    let assumed: Vec<_> = calls.iter().filter(|call| call.action == "AssumeRole").collect();
    assert_eq!(assumed.len(), 2);
    for (call, phase, name) in [(assumed[0], "plan", "read"), (assumed[1], "apply", "deploy")] {
        assert!(call.had_code);
        let run = run.id.to_string();
        for (member, value) in [
            ("RoleArn", role(name).arn.as_str()),
            ("RoleSessionName", &format!("run-{run}")),
            ("SourceIdentity", "ada"),
            ("ExternalId", &external_id),
            ("Tags.member.1.Value", ORGANIZATION),
            ("Tags.member.2.Value", ENVIRONMENT),
            ("Tags.member.3.Value", &run),
            ("Tags.member.4.Key", "phase"),
            ("Tags.member.4.Value", phase),
        ] {
            assert_eq!(call.members.get(member).map(String::as_str), Some(value), "{member}");
        }
    }
    assert!(assumed[0].members.contains_key("Policy"));
    assert!(assumed[0].members.contains_key("PolicyArns.member.1.arn"));
    assert!(!assumed[1].members.contains_key("Policy"));
}

#[tokio::test]
async fn a_role_may_be_of_an_account_that_is_not_listed_and_of_no_other_than_its_own() {
    let far = RoleSettings {
        arn: "arn:aws:iam::210987654321:role/far".into(),
        ..RoleSettings::default()
    };
    let fixture = with(
        MfaPolicy::PlansAndApplies,
        SettingsChange {
            code_credentials: Some(CodeCredentials::Role),
            roles: Some(Roles { plan: far.clone(), apply: far }),
            ..SettingsChange::default()
        },
    )
    .await;
    fixture.aws.change_world(|world| {
        let mut account = Account::new("210987654321");
        let mut role = Role::new("far", MfaCondition::Demanded);
        role.trust.principals = vec!["123456789012".into()];
        account.roles.push(role);
        world.accounts.push(account);
    });
    let run = fixture.queue("one").await;
    let run = fixture.submit(&run, &fixture.code(), "plan").await.unwrap();
    assert_eq!(run.state, RunState::PlanQueued);
}

#[tokio::test]
async fn a_refused_role_names_both_arns_and_leaves_the_run_waiting() {
    let fixture = with(
        MfaPolicy::PlansAndApplies,
        SettingsChange {
            code_credentials: Some(CodeCredentials::Role),
            roles: Some(Roles { plan: role("missing"), apply: role("missing") }),
            ..SettingsChange::default()
        },
    )
    .await;
    let run = fixture.queue("one").await;
    let error = fixture.submit(&run, &fixture.code(), "plan").await.unwrap_err();
    assert_eq!(error.reason(), Reason::ExchangeRefused);
    for part in ["arn:aws:iam::123456789012:user/latchkey", "role/missing"] {
        assert!(error.message().contains(part), "{part}: {error}");
    }
    assert_eq!(fixture.run(&run).await.state, RunState::AwaitingPlanMfa);
}

#[tokio::test]
async fn without_a_code_the_role_is_assumed_with_the_organizations_keys() {
    let fixture = with(
        MfaPolicy::Never,
        SettingsChange {
            plain_credentials: Some(PlainCredentials::Role),
            roles: Some(Roles { plan: role("read"), apply: role("read") }),
            ..SettingsChange::default()
        },
    )
    .await;
    let run = fixture.queue("one").await;
    let session = given(&fixture, Phase::Plan, &run).await;
    assert!(session.expires_at.is_some());
    let calls = fixture.aws.calls();
    let call = calls.iter().find(|call| call.action == "AssumeRole").unwrap();
    assert!(!call.had_code && call.members["SourceIdentity"] == "ada");
}

#[tokio::test]
async fn a_role_that_demands_mfa_ends_a_run_without_a_code_with_the_reason() {
    let fixture = with(
        MfaPolicy::Never,
        SettingsChange {
            plain_credentials: Some(PlainCredentials::Role),
            roles: Some(Roles { plan: role("deploy"), apply: role("deploy") }),
            ..SettingsChange::default()
        },
    )
    .await;
    let run = fixture.queue("one").await;
    let (_, _, start) = fixture.start(&run, Phase::Plan).await;
    let Start::Revoked { reason } = start else { panic!("{start:?}") };
    assert!(reason.contains("role/deploy") && reason.contains("code"), "{reason}");
}

#[tokio::test]
async fn long_term_keys_go_out_as_they_are_and_are_recorded() {
    let fixture = with(
        MfaPolicy::Never,
        SettingsChange {
            plain_credentials: Some(PlainCredentials::Static),
            ..SettingsChange::default()
        },
    )
    .await;
    let run = fixture.queue("one").await;
    let keys = given(&fixture, Phase::Plan, &run).await;
    let facts = fixture.aws.facts();
    assert_eq!(keys.access_key_id, facts.access_key_id);
    assert_eq!(keys.secret_access_key.expose_secret(), facts.secret_access_key.expose());
    assert!(keys.session_token.is_none() && keys.expires_at.is_none());
    let page = PageRequest { size: 200, ..PageRequest::default() };
    let page = fixture
        .app
        .list_audit(&fixture.owner, ORGANIZATION, AuditFilter::default(), page)
        .await
        .unwrap();
    let records = format!("{:?}", page.items);
    assert!(records.contains("the organization's long-term keys themselves"), "{records}");
    assert!(!records.contains(facts.secret_access_key.expose()));
}

#[tokio::test]
async fn a_session_below_the_environments_floor_is_not_leased_out() {
    let fixture = with(
        MfaPolicy::PlansAndApplies,
        SettingsChange {
            session_floor: Some(Duration::from_secs(1800)),
            ..SettingsChange::default()
        },
    )
    .await;
    let run = fixture.queue("one").await;
    let run = fixture.submit(&run, &fixture.code(), "plan").await.unwrap();
    fixture.clock.advance(Duration::from_secs(2100));
    let runner = fixture.runner().await;
    let error = fixture.app.grant(run.job_id(Phase::Plan), runner.id).await.unwrap_err();
    assert_eq!(error.reason(), Reason::WrongState);
    let run = fixture.run(&run).await;
    assert_eq!(run.state, RunState::AwaitingPlanMfa);
    assert_eq!(run.plan.epoch.get(), 0, "no lease was granted");
    assert!(run.reason.unwrap().contains("1800 s"));
}

#[tokio::test]
async fn a_floor_leaves_time_to_start_in_what_any_phase_may_get() {
    let hours = |hours: u64| Some(Duration::from_secs(hours * 3600));
    let sized = |session_duration, session_floor| SettingsChange {
        session_duration,
        session_floor,
        ..SettingsChange::default()
    };
    let fixture = with(MfaPolicy::PlansAndApplies, sized(hours(36), hours(12))).await;
    // A role's session lives up to 12 hours, however long others may.
    let roles = || Some(Roles { plan: role("read"), apply: role("deploy") });
    let by_code = CodeCredentials::Role;
    let change =
        SettingsChange { code_credentials: Some(by_code), roles: roles(), ..sized(None, None) };
    let plain = PlainCredentials::Role;
    let other =
        SettingsChange { plain_credentials: Some(plain), roles: roles(), ..sized(None, None) };
    for change in [change.clone(), other, sized(hours(1), hours(1)), sized(hours(1), None)] {
        let refused = fixture.try_settings(change, None).await.unwrap_err();
        assert_eq!(refused.field_name(), Some("session_floor"), "{refused}");
    }
    let five_minutes_less = Some(Duration::from_secs(55 * 60));
    fixture.settings(sized(hours(1), five_minutes_less)).await;
    fixture.settings(change).await;
}

#[tokio::test]
async fn a_code_whose_session_would_be_below_the_floor_is_not_spent() {
    let fixture = Fixture::new(MfaPolicy::PlansAndApplies).await;
    let run = fixture.queue("one").await;
    // As settings of before it was refused may be.
    let request = &run.request;
    let found = fixture.app.environment(request.organization, request.environment).await.unwrap();
    let mut environment = found.value;
    environment.settings.session_floor = environment.settings.session_duration;
    let record = encode(&EnvironmentRecord::from(&environment));
    fixture.store.commit(Batch::new().put(found.key, Expect::Anything, record)).await.unwrap();
    let code = fixture.code();
    let refused = fixture.submit(&run, &code, "one").await.unwrap_err();
    assert_eq!(refused.reason(), Reason::ExchangeRefused, "{refused}");
    assert_eq!(fixture.aws.requests_with_code(&code), 0);
}

#[tokio::test]
async fn a_sessions_duration_has_bounds_and_a_refusal_names_them() {
    let fixture = Fixture::new(MfaPolicy::PlansAndApplies).await;
    let duration = |seconds| SettingsChange {
        session_duration: Some(Duration::from_secs(seconds)),
        ..SettingsChange::default()
    };
    for seconds in [899, 36 * 3600 + 1] {
        let error = fixture.try_settings(duration(seconds), None).await.unwrap_err();
        let said = (error.reason(), error.field_name());
        assert_eq!(said, (Reason::FieldInvalid, Some("session_duration")), "{seconds}");
        for part in ["15 minutes to 36 hours", "--session-duration 1h"] {
            assert!(error.message().contains(part), "{part}: {error}");
        }
    }
    for seconds in [36 * 3600, 900] {
        fixture.settings(duration(seconds)).await;
        let settings = fixture.environment().await.environment.settings;
        assert_eq!(settings.session_duration, Duration::from_secs(seconds));
    }
}

#[tokio::test]
async fn who_sets_more_than_a_role_may_live_is_told_what_it_will() {
    let day = Duration::from_secs(24 * 3600);
    let fixture = with(
        MfaPolicy::PlansAndApplies,
        SettingsChange { session_duration: Some(day), ..SettingsChange::default() },
    )
    .await;
    let told = async || warnings(&fixture.environment().await.environment.settings).join("\n");
    assert_eq!(told().await, "", "a session may live a day");
    let change = SettingsChange {
        code_credentials: Some(CodeCredentials::Role),
        roles: Some(Roles { plan: role("read"), apply: role("long") }),
        ..SettingsChange::default()
    };
    fixture.settings(change).await;
    let warned = told().await;
    for part in ["12 h", "24 h", "role"] {
        assert!(warned.contains(part), "{part}: {warned}");
    }
    // And so it is.
    fixture.aws.change_world(|world| {
        let mut role = Role::new("read", MfaCondition::Demanded);
        role.max_session_seconds = 43_200;
        world.put_role("123456789012", role).unwrap();
    });
    let run = fixture.queue("one").await;
    fixture.submit(&run, &fixture.code(), "plan").await.unwrap();
    let calls = fixture.aws.calls();
    let asked = calls.iter().find(|call| call.action == "AssumeRole").unwrap();
    assert_eq!(asked.members["DurationSeconds"], "43200");
    let shorter = SettingsChange {
        session_duration: Some(Duration::from_secs(12 * 3600)),
        ..SettingsChange::default()
    };
    fixture.settings(shorter).await;
    assert_eq!(told().await, "");
}

#[tokio::test]
async fn that_an_external_id_was_made_is_recorded_once() {
    let fixture = Fixture::new(MfaPolicy::Never).await;
    let organization = fixture.organization().await;
    // Made when it was first looked at, and the same ever after.
    let made = fixture.app.external_id(organization).await.unwrap();
    assert_eq!(fixture.app.external_id(organization).await.unwrap(), made);
    let page = PageRequest { size: 200, ..PageRequest::default() };
    let filter = AuditFilter::default();
    let page = fixture.app.list_audit(&fixture.owner, ORGANIZATION, filter, page).await.unwrap();
    let records: Vec<_> = page
        .items
        .iter()
        .map(|record| &record.draft)
        .filter(|draft| draft.action == "make_external_id")
        .collect();
    let [record] = records.as_slice() else { panic!("{records:?}") };
    assert_eq!(record.actor, "system");
    assert!(format!("{record:?}").contains(&made), "{record:?}");
}
