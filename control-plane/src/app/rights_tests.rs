//! Who may change what, and what a service token reaches: read, write, admin, owner, program.

use std::collections::BTreeMap;
use std::time::Duration;

use latchkey_domain::policy::{MfaPolicy, PlanRule};
use latchkey_proto::v1::Reason;
use secrecy::SecretString;

use super::PageRequest;
use super::fixture::{ENVIRONMENT, Fixture, ORGANIZATION};
use super::queue_run::NewRun;
use super::service_tokens::TokenScope;
use super::settings::SettingsChange;
use super::variables::{NewVariable, Scope};
use crate::auth::Caller;
use crate::error::Result;
use crate::store::record::environment::{CodeCredentials, PlainCredentials, Roles};
use crate::store::record::people::Access;
use crate::store::record::variable::Category;

type Named = (&'static str, SettingsChange);

/// Every setting, by the name of its field: the owners' and the others. A field that is added to
/// [`SettingsChange`] does not compile until it stands in one of them.
fn settings() -> (Vec<Named>, Vec<Named>) {
    let SettingsChange {
        policy: _,
        auto_apply: _,
        working_directory: _,
        pool: _,
        session_duration: _,
        plain_credentials: _,
        region: _,
        runner_labels: _,
        engine: _,
        engine_version: _,
        second_person: _,
        plan_rule: _,
        code_credentials: _,
        roles: _,
        session_floor: _,
        limits: _,
    } = SettingsChange::default();
    let none = SettingsChange::default;
    let rule = PlanRule { destructive: true, ..PlanRule::default() };
    let owners = vec![
        ("policy", SettingsChange { policy: Some(MfaPolicy::AppliesOnly), ..none() }),
        ("auto_apply", SettingsChange { auto_apply: Some(true), ..none() }),
        (
            "plain_credentials",
            SettingsChange { plain_credentials: Some(PlainCredentials::Static), ..none() },
        ),
        ("second_person", SettingsChange { second_person: Some(true), ..none() }),
        ("plan_rule", SettingsChange { plan_rule: Some(rule), ..none() }),
        (
            "code_credentials",
            SettingsChange { code_credentials: Some(CodeCredentials::Session), ..none() },
        ),
        ("roles", SettingsChange { roles: Some(Roles::default()), ..none() }),
    ];
    let labels = BTreeMap::from([("zone".to_owned(), "x".to_owned())]);
    let hour = Duration::from_secs(3600);
    let others = vec![
        ("working_directory", SettingsChange { working_directory: Some("live".into()), ..none() }),
        ("pool", SettingsChange { pool: Some("build".into()), ..none() }),
        ("session_duration", SettingsChange { session_duration: Some(hour * 2), ..none() }),
        ("region", SettingsChange { region: Some("eu-west-1".into()), ..none() }),
        ("runner_labels", SettingsChange { runner_labels: Some(labels), ..none() }),
        ("engine", SettingsChange { engine: Some("tofu".into()), ..none() }),
        ("engine_version", SettingsChange { engine_version: Some("1.11.4".into()), ..none() }),
        ("session_floor", SettingsChange { session_floor: Some(hour / 4), ..none() }),
        ("limits", SettingsChange { limits: Some(Default::default()), ..none() }),
    ];
    (owners, others)
}

/// Those of the organization, beside its owner.
struct Callers {
    fixture: Fixture,
    reader: Caller,
    writer: Caller,
    admin: Caller,
    program: Caller,
}

impl Callers {
    async fn new() -> Self {
        let fixture = Fixture::new(MfaPolicy::Never).await;
        fixture.app.create_pool(&fixture.owner, ORGANIZATION, "build", "pool").await.unwrap();
        Self {
            reader: fixture.member("reader", Access::Read).await,
            writer: fixture.member("writer", Access::Write).await,
            admin: fixture.member("admin", Access::Admin).await,
            program: fixture.service_token("program").await,
            fixture,
        }
    }

    async fn change(&self, caller: &Caller, change: SettingsChange) -> Result<()> {
        let app = &self.fixture.app;
        let done = app.update_environment(caller, ORGANIZATION, ENVIRONMENT, change, None).await;
        done.map(drop)
    }

    /// With a code where the change takes one.
    async fn change_by_owner(&self, name: &str, change: SettingsChange) {
        match self.fixture.try_settings(change.clone(), None).await {
            Err(error) if error.reason() == Reason::MfaRequired => {
                let proof = self.fixture.proof(name);
                drop(self.fixture.try_settings(change, proof).await.expect(name));
            }
            done => drop(done.expect(name)),
        }
    }

    async fn set(&self, caller: &Caller, scope: &Scope, name: &str) -> Result<()> {
        let variable = NewVariable {
            name: name.into(),
            category: Category::Terraform,
            value: "1".into(),
            sensitive: false,
            hcl: false,
        };
        let done = self.fixture.app.set_variable(caller, ORGANIZATION, scope, variable, None).await;
        done.map(drop)
    }

    async fn delete(&self, caller: &Caller, scope: &Scope, name: &str) -> Result<()> {
        let name = (Category::Terraform, name);
        self.fixture.app.delete_variable(caller, ORGANIZATION, scope, name, None).await
    }
}

#[track_caller]
fn refused<T: std::fmt::Debug>(done: Result<T>, reason: Reason, what: &str) {
    assert_eq!(done.expect_err(what).reason(), reason, "{what}");
}

#[tokio::test]
async fn an_admin_changes_each_setting_but_the_owners_and_nobody_below_changes_any() {
    let callers = Callers::new().await;
    let (owners, others) = settings();
    for (name, change) in &others {
        let before = callers.fixture.environment().await.environment.settings;
        refused(callers.change(&callers.reader, change.clone()).await, Reason::NotAllowed, name);
        refused(callers.change(&callers.writer, change.clone()).await, Reason::NotAllowed, name);
        refused(
            callers.change(&callers.program, change.clone()).await,
            Reason::PersonRequired,
            name,
        );
        assert_eq!(callers.fixture.environment().await.environment.settings, before, "{name}");
        callers.change(&callers.admin, change.clone()).await.expect(name);
        if *name != "limits" {
            assert_ne!(callers.fixture.environment().await.environment.settings, before, "{name}");
        }
    }
    for (name, change) in &owners {
        let before = callers.fixture.environment().await.environment.settings;
        for person in [&callers.reader, &callers.writer, &callers.admin] {
            refused(callers.change(person, change.clone()).await, Reason::NotAllowed, name);
        }
        refused(
            callers.change(&callers.program, change.clone()).await,
            Reason::PersonRequired,
            name,
        );
        // Not even beside one that is theirs to change.
        let beside = SettingsChange { region: Some("us-west-2".into()), ..change.clone() };
        refused(callers.change(&callers.admin, beside).await, Reason::NotAllowed, name);
        assert_eq!(callers.fixture.environment().await.environment.settings, before, "{name}");
        callers.change_by_owner(name, change.clone()).await;
    }
}

#[tokio::test]
async fn an_admin_sets_an_environments_variables_and_owners_alone_the_organizations() {
    let callers = Callers::new().await;
    let here = Scope::Environment(ENVIRONMENT.into());
    callers.set(&callers.admin, &here, "size").await.unwrap();
    callers.set(&callers.fixture.owner, &Scope::Organization, "size").await.unwrap();
    for person in [&callers.reader, &callers.writer] {
        refused(callers.set(person, &here, "size").await, Reason::NotAllowed, "set");
        refused(callers.delete(person, &here, "size").await, Reason::NotAllowed, "delete");
    }
    for person in [&callers.reader, &callers.writer, &callers.admin] {
        let all = &Scope::Organization;
        refused(callers.set(person, all, "size").await, Reason::NotAllowed, "set");
        refused(callers.delete(person, all, "size").await, Reason::NotAllowed, "delete");
    }
    for scope in [&here, &Scope::Organization, &Scope::Personal] {
        let program = &callers.program;
        refused(callers.set(program, scope, "size").await, Reason::PersonRequired, "set");
        refused(callers.delete(program, scope, "size").await, Reason::PersonRequired, "delete");
    }
    let page = PageRequest::default();
    let app = &callers.fixture.app;
    let kept = app.list_variables(&callers.reader, ORGANIZATION, &here, page).await.unwrap();
    assert_eq!(kept.items.len(), 1);
    callers.delete(&callers.admin, &here, "size").await.unwrap();
}

/// Another environment than the one that a token is for.
const OTHER: &str = "other";

async fn program(
    fixture: &Fixture,
    access: Access,
    environments: &[&str],
    lifetime: Option<Duration>,
) -> SecretString {
    let environments = environments.iter().map(|name| (*name).to_owned()).collect();
    let scope = TokenScope { access, environments };
    let (app, owner) = (&fixture.app, &fixture.owner);
    let name = format!("{access:?}").to_lowercase();
    let made = app.create_service_token(owner, ORGANIZATION, &name, lifetime, scope, &name).await;
    made.unwrap().0
}

#[tokio::test]
async fn a_scoped_token_reaches_its_environments_alone_and_does_no_more_than_its_access() {
    let fixture = Fixture::new(MfaPolicy::Never).await;
    let (app, owner) = (&fixture.app, &fixture.owner);
    let none = SettingsChange::default();
    app.create_environment(owner, ORGANIZATION, OTHER, none, "other", None).await.unwrap();
    let writer = program(&fixture, Access::Write, &[ENVIRONMENT], None).await;
    let writer = app.caller(&writer).await.unwrap();
    let reader = program(&fixture, Access::Read, &[ENVIRONMENT], None).await;
    let reader = app.caller(&reader).await.unwrap();
    let there = NewRun { environment: OTHER.into(), ..fixture.new_run(app, "there").await };
    let hidden = app.queue_run(owner, there.clone()).await.unwrap();

    for token in [&writer, &reader] {
        app.show_environment(token, ORGANIZATION, ENVIRONMENT).await.unwrap();
        let shown = app.show_environment(token, ORGANIZATION, OTHER).await;
        refused(shown, Reason::NotFound, "show");
        let again = NewRun { request_id: "again".into(), ..there.clone() };
        refused(app.queue_run(token, again).await, Reason::NotFound, "queue elsewhere");
        refused(app.show_run(token, hidden.id).await, Reason::NotFound, "a run elsewhere");
        refused(app.cancel_run(token, hidden.id).await, Reason::NotFound, "cancel elsewhere");
        let page = PageRequest::default();
        let listed = app.list_environments(token, ORGANIZATION, page).await.unwrap();
        assert_eq!(listed.items.len(), 1);
    }
    let run = fixture.try_queue(&writer, "here").await.unwrap();
    refused(fixture.try_queue(&reader, "read").await, Reason::NotAllowed, "queue");
    refused(app.cancel_run(&reader, run.id).await, Reason::NotAllowed, "cancel");
    app.show_run(&reader, run.id).await.unwrap();
    app.cancel_run(&writer, run.id).await.unwrap();
}

#[tokio::test]
async fn a_service_token_ends_when_it_was_said_to() {
    let fixture = Fixture::new(MfaPolicy::Never).await;
    let hour = Duration::from_secs(3600);
    let token = program(&fixture, Access::Write, &[], Some(hour)).await;
    fixture.clock.advance(hour - Duration::from_secs(1));
    let caller = fixture.app.caller(&token).await.unwrap();
    fixture.try_queue(&caller, "in time").await.unwrap_err();
    fixture.try_queue(&caller, "in-time").await.unwrap();
    fixture.clock.advance(Duration::from_secs(1));
    refused(fixture.app.caller(&token).await, Reason::IdentityRequired, "ended");
    let page = PageRequest::default();
    let (app, owner) = (&fixture.app, &fixture.owner);
    let listed = app.list_service_tokens(owner, ORGANIZATION, page).await.unwrap();
    assert_eq!(listed.items.len(), 1, "it is listed still");

    // Neither none nor for ever.
    for lifetime in [Duration::ZERO, Duration::from_secs(367 * 86_400)] {
        let scope = TokenScope::default();
        let made = app
            .create_service_token(owner, ORGANIZATION, "long", Some(lifetime), scope, "long")
            .await;
        assert_eq!(made.unwrap_err().field_name(), Some("lifetime"));
    }
}
