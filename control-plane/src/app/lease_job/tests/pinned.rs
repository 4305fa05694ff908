//! What an apply runs with is what its plan was made with, whatever was set since.

use std::time::Duration;

use latchkey_domain::policy::{MfaPolicy, Phase};
use latchkey_domain::run::{Run, RunState};
use latchkey_proto::v1::Reason;
use secrecy::ExposeSecret;

use crate::app::finish_job::JobResult;
use crate::app::fixture::{ENVIRONMENT, Fixture, ORGANIZATION};
use crate::app::settings::SettingsChange;
use crate::app::start_job::{Go, Start};
use crate::app::variables::{NewVariable, Scope};
use crate::store::keys::{self, Kind};
use crate::store::record::environment::{CodeCredentials, RoleSettings, Roles};
use crate::store::record::variable::Category;

fn variable(name: &str, category: Category, value: &str) -> NewVariable {
    NewVariable { name: name.into(), category, value: value.into(), sensitive: true, hcl: false }
}

async fn set(fixture: &Fixture, scope: &Scope, new: NewVariable) {
    let app = &fixture.app;
    app.set_variable(&fixture.owner, ORGANIZATION, scope, new, None).await.unwrap();
}

async fn delete(fixture: &Fixture, scope: &Scope, category: Category, name: &str) {
    let app = &fixture.app;
    app.delete_variable(&fixture.owner, ORGANIZATION, scope, (category, name), None).await.unwrap();
}

async fn confirmed(fixture: &Fixture, run: &Run) -> Run {
    let seen = run.planned.as_ref().unwrap().digest;
    fixture.app.confirm_run(&fixture.owner, run.id, seen).await.unwrap()
}

fn given(start: Start) -> Vec<(String, String)> {
    let Start::Go(Go { variables, .. }) = start else { panic!("{start:?}") };
    let shown = |value: &secrecy::SecretString| value.expose_secret().to_owned();
    variables.iter().map(|one| (one.name.clone(), shown(&one.value))).collect()
}

fn set_in(region: &str, directory: &str) -> SettingsChange {
    SettingsChange {
        region: Some(region.into()),
        working_directory: Some(directory.into()),
        ..SettingsChange::default()
    }
}

#[tokio::test]
async fn an_apply_runs_in_the_region_and_the_directory_of_its_plan() {
    let fixture = Fixture::in_environment(set_in("eu-central-1", "stage")).await;
    let run = fixture.queue("one").await;
    let run = fixture.plan(&run).await;
    fixture.settings(set_in("us-west-2", "prod")).await;
    let run = confirmed(&fixture, &run).await;
    let runner = fixture.runner().await;
    let (lease, spec) = fixture.app.grant(run.job_id(Phase::Apply), runner.id).await.unwrap();
    assert_eq!((spec.region.as_str(), spec.working_directory.as_str()), ("eu-central-1", "stage"));
    // The next lease, too; and the next run runs by what is set now.
    fixture.app.expire(lease.job, lease.epoch).await.unwrap();
    let (_, spec) = fixture.app.grant(run.job_id(Phase::Apply), runner.id).await.unwrap();
    assert_eq!((spec.region.as_str(), spec.working_directory.as_str()), ("eu-central-1", "stage"));
    fixture.app.cancel_run(&fixture.owner, run.id).await.unwrap();
    let run = fixture.queue("two").await;
    let (_, spec) = fixture.app.grant(run.job_id(Phase::Plan), runner.id).await.unwrap();
    assert_eq!((spec.region.as_str(), spec.working_directory.as_str()), ("us-west-2", "prod"));
}

#[tokio::test]
async fn a_code_that_could_buy_nothing_for_the_plans_region_is_not_spent() {
    let fixture = Fixture::new(MfaPolicy::AppliesOnly).await;
    let run = fixture.queue("one").await;
    let run = fixture.plan(&run).await;
    assert_eq!(run.state, RunState::AwaitingApplyMfa);
    let role = RoleSettings {
        arn: "arn:aws-cn:iam::123456789012:role/deploy".into(),
        ..RoleSettings::default()
    };
    let change = SettingsChange {
        region: Some("cn-north-1".into()),
        code_credentials: Some(CodeCredentials::Role),
        roles: Some(Roles { plan: role.clone(), apply: role }),
        ..SettingsChange::default()
    };
    fixture.settings(change).await;
    let code = fixture.code();
    let error = fixture.submit(&run, &code, "apply").await.unwrap_err();
    assert_eq!(error.reason(), Reason::ExchangeRefused, "{error}");
    assert!(error.message().contains("us-east-1"), "{error}");
    assert_eq!(fixture.aws.requests_with_code(&code), 0);
}

#[tokio::test]
async fn an_apply_gets_the_variables_that_its_plan_had() {
    use Category::{Environment, Terraform};
    let fixture = Fixture::new(MfaPolicy::Never).await;
    let (here, large) = (Scope::Environment(ENVIRONMENT.into()), "l".repeat(10_000));
    set(&fixture, &Scope::Organization, variable("shared", Terraform, "1")).await;
    set(&fixture, &Scope::Organization, variable("size", Terraform, "1")).await;
    set(&fixture, &here, variable("size", Terraform, "2")).await;
    set(&fixture, &here, variable("large", Terraform, &large)).await;
    set(&fixture, &here, variable("ZONE", Environment, "a")).await;
    set(&fixture, &Scope::Personal, variable("mine", Terraform, "ada")).await;
    let own = vec![variable("given", Terraform, "once")];
    let run = fixture.queue_giving("one", own).await.unwrap();
    let (runner, lease, start) = fixture.start(&run, Phase::Plan).await;
    let expect = given(start);
    assert_eq!(expect.len(), 6, "{expect:?}");
    fixture.end_plan(&runner, lease, b"{}").await;

    set(&fixture, &here, variable("size", Terraform, "3")).await;
    set(&fixture, &here, variable("AWS_REGION", Environment, "us-west-2")).await;
    set(&fixture, &Scope::Organization, variable("mine", Terraform, "theirs")).await;
    delete(&fixture, &Scope::Organization, Terraform, "shared").await;
    delete(&fixture, &here, Terraform, "large").await;
    delete(&fixture, &here, Environment, "ZONE").await;
    fixture.app.collect_garbage().await.unwrap();
    let run = confirmed(&fixture, &fixture.run(&run).await).await;
    let (runner, lease, start) = fixture.start(&run, Phase::Apply).await;
    assert_eq!(given(start), expect);
    assert_eq!(given(fixture.app.start_again(&runner, lease).await.unwrap()), expect);

    // They end with the run.
    let result = JobResult::Applied { outputs: None };
    fixture.app.finish_job(&runner, lease, 0, result).await.unwrap();
    fixture.app.collect_garbage().await.unwrap();
    assert!(fixture.app.list(keys::variables_of_runs()).await.unwrap().is_empty());
    let shown = fixture.run(&run).await.planned.unwrap().digests.changes;
    let shown = keys::blob_uses(fixture.organization().await, &shown);
    let needed = fixture.app.list(keys::all(Kind::BlobUse)).await.unwrap();
    assert_eq!(needed.len(), fixture.app.list(shown).await.unwrap().len());
}

#[tokio::test]
async fn a_plan_that_starts_over_takes_the_variables_of_then() {
    use Category::Terraform;
    let fixture = Fixture::new(MfaPolicy::Never).await;
    let here = Scope::Environment(ENVIRONMENT.into());
    set(&fixture, &here, variable("gone", Terraform, "1")).await;
    set(&fixture, &here, variable("large", Terraform, &"l".repeat(10_000))).await;
    set(&fixture, &here, variable("size", Terraform, "1")).await;
    let run = fixture.queue("one").await;
    let (_, lease, start) = fixture.start(&run, Phase::Plan).await;
    assert_eq!(given(start).len(), 3);
    fixture.app.expire(lease.job, lease.epoch).await.unwrap();
    delete(&fixture, &here, Terraform, "gone").await;
    set(&fixture, &here, variable("size", Terraform, "2")).await;
    set(&fixture, &here, variable("large", Terraform, "small")).await;
    fixture.clock.advance(Duration::from_secs(1));
    let (runner, lease, start) = fixture.start(&run, Phase::Plan).await;
    let expect = [("large", "small"), ("size", "2")]
        .map(|(name, value)| (name.to_owned(), value.to_owned()));
    assert_eq!(given(start), expect);
    fixture.end_plan(&runner, lease, b"{}").await;
    let run = confirmed(&fixture, &fixture.run(&run).await).await;
    let (.., start) = fixture.start(&run, Phase::Apply).await;
    assert_eq!(given(start), expect);
}
