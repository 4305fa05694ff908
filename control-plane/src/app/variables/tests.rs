//! What jobs are given, who learns of it, and what is left of it.

use latchkey_domain::policy::{MfaPolicy, Phase};
use latchkey_domain::run::{Run, RunState};
use latchkey_proto::v1::Reason;
use secrecy::{ExposeSecret, SecretString};

use super::value::length;
use super::{EffectiveVariable, NewVariable, Origin, Scope};
use crate::app::PageRequest;
use crate::app::fixture::{ENVIRONMENT, Fixture, ORGANIZATION};
use crate::error::Result;
use crate::store::keys::{self, Kind, VariableScope};
use crate::store::record::decode;
use crate::store::record::people::Role;
use crate::store::record::variable::{Category, Variable};

const LARGEST: usize = 256 * 1024;

fn here() -> Scope {
    Scope::Environment(ENVIRONMENT.into())
}

fn variable(name: &str, value: &str) -> NewVariable {
    NewVariable {
        name: name.into(),
        category: Category::Terraform,
        value: value.into(),
        sensitive: false,
        hcl: false,
    }
}

async fn set(fixture: &Fixture, scope: &Scope, new: NewVariable) -> Result<()> {
    let app = &fixture.app;
    app.set_variable(&fixture.owner, ORGANIZATION, scope, new, None).await.map(drop)
}

/// What a job of the run would be given, by name.
async fn given(fixture: &Fixture, run: &Run) -> Vec<(String, String)> {
    let found = fixture.app.job_variables(run).await;
    let shown = |value: &SecretString| value.expose_secret().to_owned();
    found.unwrap().iter().map(|one| (one.name.clone(), shown(&one.value))).collect()
}

/// How many blobs anybody is said to need.
async fn uses(fixture: &Fixture) -> usize {
    fixture.app.list(keys::all(Kind::BlobUse)).await.unwrap().len()
}

async fn files(fixture: &Fixture) -> usize {
    let organization = hex::encode(fixture.organization().await.as_bytes());
    let directory = fixture.directory().join("blobs").join(organization);
    std::fs::read_dir(directory).map_or(0, Iterator::count)
}

#[tokio::test]
async fn a_large_value_is_a_blob_that_goes_with_its_record() {
    let fixture = Fixture::new(MfaPolicy::Never).await;
    let value = "ü\"\n".repeat(LARGEST / 4);
    set(&fixture, &here(), variable("large", &value)).await.unwrap();
    let records = fixture.app.list(keys::all(Kind::Variable)).await.unwrap();
    assert!(records.iter().all(|(_, found)| found.value.len() < 8 * 1024));
    let run = fixture.queue("one").await;
    assert_eq!(given(&fixture, &run).await, [("large".to_owned(), value.clone())]);
    let page = PageRequest::default();
    let page = fixture.app.list_variables(&fixture.owner, ORGANIZATION, &here(), page).await;
    assert_eq!(page.unwrap().items[0].value.as_deref(), Some(value.as_str()));
    assert_eq!((uses(&fixture).await, files(&fixture).await), (1, 1));

    // The same value again is another blob: its name does not tell that they are equal.
    set(&fixture, &here(), variable("large", &value)).await.unwrap();
    set(&fixture, &here(), variable("other", &value)).await.unwrap();
    fixture.app.collect_garbage().await.unwrap();
    assert_eq!((uses(&fixture).await, files(&fixture).await), (2, 2));

    set(&fixture, &here(), variable("large", "small")).await.unwrap();
    let app = &fixture.app;
    app.delete_variable(
        &fixture.owner,
        ORGANIZATION,
        &here(),
        (Category::Terraform, "other"),
        None,
    )
    .await
    .unwrap();
    fixture.app.collect_garbage().await.unwrap();
    assert_eq!((uses(&fixture).await, files(&fixture).await), (0, 0));
    assert_eq!(given(&fixture, &run).await, [("large".to_owned(), "small".to_owned())]);
    let longer = set(&fixture, &here(), variable("large", &"x".repeat(LARGEST + 1))).await;
    assert_eq!(longer.unwrap_err().field_name(), Some("value"));
    assert_eq!(files(&fixture).await, 0);
}

#[tokio::test]
async fn a_run_keeps_what_it_was_queued_with_until_it_ends() {
    let fixture = Fixture::new(MfaPolicy::PlansAndApplies).await;
    let (mine, only) = ("p".repeat(100_000), "o".repeat(LARGEST));
    set(&fixture, &Scope::Personal, variable("mine", &mine)).await.unwrap();
    let run = fixture.queue_giving("one", vec![variable("only", &only)]).await.unwrap();
    let app = &fixture.app;
    app.delete_variable(
        &fixture.owner,
        ORGANIZATION,
        &Scope::Personal,
        (Category::Terraform, "mine"),
        None,
    )
    .await
    .unwrap();
    app.collect_garbage().await.unwrap();
    let expect = [("mine".to_owned(), mine), ("only".to_owned(), only)];
    assert_eq!(given(&fixture, &run).await, expect);
    assert_eq!(run.request.given[0].name, "only");

    app.cancel_run(&fixture.owner, run.id).await.unwrap();
    assert_eq!(given(&fixture, &run).await, []);
    app.collect_garbage().await.unwrap();
    assert_eq!((uses(&fixture).await, files(&fixture).await), (0, 0));
}

#[tokio::test]
async fn the_narrower_scope_wins_and_the_list_says_which() {
    let fixture = Fixture::new(MfaPolicy::Never).await;
    let scopes = [Scope::Organization, here(), Scope::Personal];
    for (number, scope) in scopes.iter().enumerate() {
        for name in &["a", "b", "c", "d"][number..] {
            set(&fixture, scope, variable(name, &format!("{name}{number}"))).await.unwrap();
        }
    }
    let run = fixture.queue_giving("one", vec![variable("d", "run")]).await.unwrap();
    let expect = [("a", "a0"), ("b", "b1"), ("c", "c2"), ("d", "run")];
    let found = given(&fixture, &run).await;
    assert_eq!(found, expect.map(|(name, value)| (name.to_owned(), value.to_owned())));

    let of_c = |variables: Vec<EffectiveVariable>| {
        let mut of_c = variables;
        of_c.retain(|variable| variable.name == "c");
        of_c.iter().map(|variable| (variable.origin, variable.shadowed)).collect::<Vec<_>>()
    };
    let app = &fixture.app;
    let mine = app.effective_variables(&fixture.owner, ORGANIZATION, ENVIRONMENT).await.unwrap();
    assert_eq!(mine.len(), 9, "the triple reaches no job: {mine:?}");
    let (organization, environment) = (Origin::Organization, Origin::Environment);
    let expect = [(organization, true), (environment, true), (Origin::Personal, false)];
    assert_eq!(of_c(mine), expect);
    let bob = fixture.user("bob", Role::Owner).await;
    let theirs = app.effective_variables(&bob, ORGANIZATION, ENVIRONMENT).await.unwrap();
    assert_eq!(of_c(theirs), [(organization, true), (environment, false)]);
}

#[tokio::test]
async fn a_personal_variable_is_nobody_elses_to_know() {
    let fixture = Fixture::new(MfaPolicy::Never).await;
    let personal = NewVariable { sensitive: false, ..variable("canary-name", "canary-value") };
    set(&fixture, &Scope::Personal, personal).await.unwrap();
    let run = fixture.queue("one").await;
    // To its log, which others read, it is a secret.
    let app = &fixture.app;
    let found = app.job_variables(&run).await.unwrap();
    assert!(found[0].sensitive);
    app.delete_variable(
        &fixture.owner,
        ORGANIZATION,
        &Scope::Personal,
        (Category::Terraform, "canary-name"),
        None,
    )
    .await
    .unwrap();
    let audit = app.list(keys::all(Kind::Audit)).await.unwrap();
    let told = audit.iter().map(|(_, found)| String::from_utf8_lossy(&found.value).into_owned());
    let told = told.collect::<Vec<_>>().join("\n");
    assert!(told.contains("a personal variable") && !told.contains("canary"), "{told}");
    let bob = fixture.user("bob", Role::Owner).await;
    let page = PageRequest::default();
    let page = app.list_variables(&bob, ORGANIZATION, &Scope::Personal, page).await.unwrap();
    assert!(page.items.is_empty(), "{page:?}");
}

#[tokio::test]
async fn the_budget_of_a_scope_holds_for_those_who_save_at_once() {
    let fixture = Fixture::new(MfaPolicy::Never).await;
    let value = "x".repeat(LARGEST);
    let saving = (0..5).map(|number| {
        let app = fixture.app.clone();
        let (owner, new) = (fixture.owner.clone(), variable(&format!("v{number}"), &value));
        tokio::spawn(async move {
            app.set_variable(&owner, ORGANIZATION, &here(), new, None).await.map(drop)
        })
    });
    let mut refused = 0;
    for saved in saving.collect::<Vec<_>>() {
        if let Err(error) = saved.await.unwrap() {
            assert_eq!(error.reason(), Reason::LimitReached, "{error}");
            refused += 1;
        }
    }
    assert_eq!(refused, 2);
    fixture.app.collect_garbage().await.unwrap();
    assert_eq!((uses(&fixture).await, files(&fixture).await), (3, 3));
    // Environment variables have less: a process takes no more of them.
    let environment = |name: &str| NewVariable {
        category: Category::Environment,
        ..variable(name, &"x".repeat(120 * 1024))
    };
    for name in ["A", "B"] {
        set(&fixture, &Scope::Personal, environment(name)).await.unwrap();
    }
    let third = set(&fixture, &Scope::Personal, environment("C")).await;
    assert_eq!(third.unwrap_err().reason(), Reason::LimitReached);
    let scope =
        VariableScope::Personal(fixture.organization().await, fixture.owner.person().unwrap().0);
    let kept = fixture.app.list(keys::variables_of(scope)).await.unwrap();
    let lengths = kept.iter().map(|(key, found)| length(&decode::<Variable>(key, found).unwrap()));
    assert_eq!(lengths.sum::<u64>(), 240 * 1024);
}

#[tokio::test]
async fn what_is_given_for_a_run_is_bounded_and_leaves_nothing_when_refused() {
    let fixture = Fixture::new(MfaPolicy::Never).await;
    let many = |count: usize, value: &str| {
        (0..count).map(|number| variable(&format!("v{number}"), value)).collect::<Vec<_>>()
    };
    let large = "x".repeat(LARGEST);
    let reserved = NewVariable { category: Category::Environment, ..variable("AWS_PROFILE", "x") };
    let triple =
        NewVariable { category: Category::Environment, ..variable("AWS_ACCESS_KEY_ID", "x") };
    let bad = NewVariable { hcl: true, ..variable("list", "[1,\n var.x]") };
    for (given, reason, says) in [
        (many(65, "x"), Reason::FieldInvalid, "64 variables"),
        (many(4, &large), Reason::FieldInvalid, "1 MiB"),
        ([many(1, "x"), many(1, "y")].concat(), Reason::FieldInvalid, "twice"),
        (vec![variable("large", &large), reserved], Reason::VariableReserved, "AWS_PROFILE"),
        (vec![triple], Reason::VariableReserved, "organization or personal scope"),
        (vec![bad], Reason::FieldInvalid, "\"list\" cannot be given: it is no HCL value at line 2"),
    ] {
        let error = fixture.queue_giving("one", given).await.unwrap_err();
        assert_eq!(error.reason(), reason, "{error}");
        assert!(error.message().contains(says), "{error}");
    }
    // A service token may give them. A repeat of the request leaves nothing of its own.
    let ci = fixture.service_token("ci").await;
    for _ in 0..2 {
        let given = vec![variable("large", &large)];
        let run = fixture.queue_giving_as(&ci, "two", given).await.unwrap();
        assert_eq!(run.state, RunState::PlanQueued);
        fixture.app.collect_garbage().await.unwrap();
        assert_eq!((uses(&fixture).await, files(&fixture).await), (1, 1));
    }
    let run = fixture.queue_giving_as(&ci, "two", vec![]).await.unwrap();
    let (.., start) = fixture.start(&run, Phase::Plan).await;
    let crate::app::start_job::Start::Go(go) = start else { panic!("{start:?}") };
    assert_eq!(go.variables[0].value.expose_secret(), large);
}
