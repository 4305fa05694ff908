//! Members: who may change what of whom, and what ends with a membership.

use latchkey_domain::policy::MfaPolicy;
use secrecy::SecretString;

use super::*;
use crate::app::audit_trail::AuditFilter;
use crate::app::fixture::{ENVIRONMENT, Fixture, ORGANIZATION};
use crate::app::open_streams::Ground;
use crate::app::queue_run::NewRun;
use crate::app::settings::SettingsChange;
use crate::app::variables::{NewVariable, Scope};
use crate::store::record::variable::Category;

fn role(role: Role) -> MemberChange {
    MemberChange { role: Some(role), ..MemberChange::default() }
}

fn access(access: Access) -> MemberChange {
    MemberChange { access: Some(access), ..MemberChange::default() }
}

fn only(environment: &str, access: Option<Access>) -> MemberChange {
    MemberChange { environments: vec![(environment.into(), access)], ..MemberChange::default() }
}

async fn fixture() -> Fixture {
    Fixture::new(MfaPolicy::Never).await
}

async fn names(fixture: &Fixture, caller: &Caller) -> Vec<String> {
    let page = fixture.app.list_members(caller, ORGANIZATION, PageRequest::default()).await;
    page.unwrap().items.into_iter().map(|member| member.user).collect()
}

async fn save(fixture: &Fixture, caller: &Caller, scope: Scope, name: &str) -> Result<()> {
    let variable = NewVariable {
        name: name.into(),
        category: Category::Terraform,
        value: SecretString::from("value"),
        sensitive: false,
        hcl: false,
    };
    fixture.app.set_variable(caller, ORGANIZATION, &scope, variable, None).await.map(drop)
}

/// What an owner would do alone; each is refused with this reason.
#[track_caller]
fn refused<T: std::fmt::Debug>(answer: Result<T>, reason: Reason) {
    assert_eq!(answer.unwrap_err().reason(), reason);
}

#[tokio::test]
async fn owners_see_everybody_and_a_member_itself_alone() {
    let fixture = fixture().await;
    let bob = fixture.member("bob", Access::Read).await;
    fixture.member("eve", Access::Read).await;
    assert_eq!(names(&fixture, &fixture.owner).await, ["ada", "bob", "eve"]);
    assert_eq!(names(&fixture, &bob).await, ["bob"]);
    let page = PageRequest { size: 2, token: String::new() };
    let first = fixture.app.list_members(&fixture.owner, ORGANIZATION, page).await.unwrap();
    assert_eq!(first.items.len(), 2);
    let page = PageRequest { size: 2, token: first.next.unwrap() };
    let second = fixture.app.list_members(&fixture.owner, ORGANIZATION, page).await.unwrap();
    assert_eq!((second.items[0].user.as_str(), second.next), ("eve", None));
}

#[tokio::test]
async fn nobody_but_an_owner_changes_members() {
    let fixture = fixture().await;
    let bob = fixture.member("bob", Access::Admin).await;
    let app = &fixture.app;
    let mine = role(Role::Owner);
    refused(app.update_member(&bob, ORGANIZATION, "bob", mine).await, Reason::NotAllowed);
    refused(app.remove_member(&bob, ORGANIZATION, "ada").await, Reason::NotAllowed);
    let added = app.add_member(&bob, ORGANIZATION, "ada", MemberChange::default()).await;
    refused(added, Reason::NotAllowed);
}

#[tokio::test]
async fn access_is_changed_by_environment_and_taken_off_the_list_again() {
    let fixture = fixture().await;
    let bob = fixture.member("bob", Access::Read).await;
    let (app, owner) = (&fixture.app, &fixture.owner);
    let change = async |change| app.update_member(owner, ORGANIZATION, "bob", change).await;
    let may_queue = async |n: &str| fixture.try_queue(&bob, n).await.map(drop);
    refused(may_queue("1").await, Reason::NotAllowed);
    let view = change(only(ENVIRONMENT, Some(Access::Write))).await.unwrap();
    assert_eq!(view.environments[ENVIRONMENT], Access::Write);
    may_queue("2").await.unwrap();
    change(only(ENVIRONMENT, Some(Access::None))).await.unwrap();
    refused(may_queue("3").await, Reason::NotFound);
    let shown = app.show_environment(&bob, ORGANIZATION, ENVIRONMENT).await;
    refused(shown, Reason::NotFound);
    let view = change(only(ENVIRONMENT, None)).await.unwrap();
    assert!(view.environments.is_empty());
    refused(may_queue("4").await, Reason::NotAllowed);
    refused(change(only("nowhere", Some(Access::Read))).await, Reason::FieldInvalid);
    refused(
        app.update_member(owner, ORGANIZATION, "eve", access(Access::Read)).await,
        Reason::NotFound,
    );
    let records = app
        .list_audit(owner, ORGANIZATION, AuditFilter::default(), PageRequest::default())
        .await
        .unwrap();
    let updates =
        records.items.iter().filter(|record| record.draft.action == "update_member").count();
    assert_eq!(updates, 3);
}

#[tokio::test]
async fn a_membership_names_a_hundred_environments_at_most() {
    let fixture = fixture().await;
    fixture.member("bob", Access::Read).await;
    let (app, owner) = (&fixture.app, &fixture.owner);
    let mut environments = vec![(ENVIRONMENT.to_owned(), Some(Access::Write))];
    for n in 1..MOST_ENVIRONMENTS {
        let (name, settings) = (format!("env-{n}"), SettingsChange::default());
        app.create_environment(owner, ORGANIZATION, &name, settings, &name, None).await.unwrap();
        environments.push((name, Some(Access::Read)));
    }
    let all = MemberChange { environments, ..MemberChange::default() };
    app.update_member(owner, ORGANIZATION, "bob", all).await.unwrap();
    let settings = SettingsChange::default();
    app.create_environment(owner, ORGANIZATION, "more", settings, "more", None).await.unwrap();
    let one_more = only("more", Some(Access::Read));
    refused(app.update_member(owner, ORGANIZATION, "bob", one_more).await, Reason::LimitReached);
}

#[tokio::test]
async fn the_last_owner_stays() {
    let fixture = fixture().await;
    fixture.member("bob", Access::Admin).await;
    let (app, owner) = (&fixture.app, &fixture.owner);
    let demoted = app.update_member(owner, ORGANIZATION, "ada", role(Role::Member)).await;
    refused(demoted, Reason::LastOwner);
    refused(app.remove_member(owner, ORGANIZATION, "ada").await, Reason::LastOwner);
    app.update_member(owner, ORGANIZATION, "bob", role(Role::Owner)).await.unwrap();
    app.update_member(owner, ORGANIZATION, "ada", role(Role::Member)).await.unwrap();
    refused(app.remove_member(owner, ORGANIZATION, "bob").await, Reason::NotAllowed);
}

#[tokio::test]
async fn of_two_owners_who_demote_each_other_one_stays() {
    let fixture = fixture().await;
    let token = fixture.create_user("bob", Role::Owner, Access::Admin).await;
    let (app, ada) = (fixture.in_twos().await, &fixture.owner);
    let bob = fixture.app.caller(&token).await.unwrap();
    let (one, other) = tokio::join!(
        app.update_member(ada, ORGANIZATION, "bob", role(Role::Member)),
        app.remove_member(&bob, ORGANIZATION, "ada"),
    );
    assert!(one.is_ok() != other.is_ok(), "{one:?} {other:?}");
    let lost = one.err().or(other.err()).unwrap();
    assert_eq!(lost.reason(), Reason::ChangedMeanwhile);
}

#[tokio::test]
async fn of_two_owners_who_leave_at_once_one_stays() {
    let fixture = fixture().await;
    let token = fixture.create_user("bob", Role::Owner, Access::Admin).await;
    let (app, ada) = (fixture.in_twos().await, &fixture.owner);
    let bob = fixture.app.caller(&token).await.unwrap();
    let (one, other) = tokio::join!(
        app.update_member(ada, ORGANIZATION, "ada", role(Role::Member)),
        app.remove_member(&bob, ORGANIZATION, "bob"),
    );
    assert!(one.is_ok() != other.is_ok(), "{one:?} {other:?}");
    let lost = one.err().or(other.err()).unwrap();
    assert_eq!(lost.reason(), Reason::ChangedMeanwhile);
}

#[tokio::test]
async fn a_personal_variable_is_not_left_behind_by_who_is_removed_meanwhile() {
    let fixture = fixture().await;
    let bob = fixture.member("bob", Access::Write).await;
    let app = fixture.in_twos().await;
    let variable = NewVariable {
        name: "mine".into(),
        category: Category::Terraform,
        value: SecretString::from("value"),
        sensitive: false,
        hcl: false,
    };
    let (removed, set) = tokio::join!(
        app.remove_member(&fixture.owner, ORGANIZATION, "bob"),
        app.set_variable(&bob, ORGANIZATION, &Scope::Personal, variable, None),
    );
    assert!(removed.is_ok() != set.is_ok(), "{removed:?} {set:?}");
}

#[tokio::test]
async fn removing_somebody_takes_their_personal_variables_and_their_streams() {
    let fixture = fixture().await;
    let token = fixture.create_user("bob", Role::Member, Access::Write).await;
    let (app, owner) = (&fixture.app, &fixture.owner);
    let proof = app.prove(&token).await.unwrap();
    let bob = &proof.caller;
    save(&fixture, bob, Scope::Personal, "mine").await.unwrap();
    save(&fixture, owner, Scope::Personal, "hers").await.unwrap();
    let run = fixture.try_queue(bob, "one").await.unwrap();
    let lost = app.hold(&proof, Ground::Run(run.id)).await.unwrap();

    app.remove_member(owner, ORGANIZATION, "bob").await.unwrap();
    assert_eq!(lost.await.reason(), Reason::NotFound);
    refused(app.show_run(bob, run.id).await, Reason::NotFound);
    refused(save(&fixture, bob, Scope::Personal, "mine").await, Reason::NotFound);
    refused(app.remove_member(owner, ORGANIZATION, "bob").await, Reason::NotFound);

    app.add_member(owner, ORGANIZATION, "bob", access(Access::Read)).await.unwrap();
    let twice = app.add_member(owner, ORGANIZATION, "bob", access(Access::Read)).await;
    refused(twice, Reason::NameTaken);
    let list = async |caller: &Caller| {
        let page = PageRequest::default();
        app.list_variables(caller, ORGANIZATION, &Scope::Personal, page).await.unwrap().items.len()
    };
    assert_eq!((list(bob).await, list(owner).await), (0, 1));
}

#[tokio::test]
async fn large_personal_values_go_with_who_is_removed_or_reset() {
    let fixture = fixture().await;
    let (app, owner) = (&fixture.app, &fixture.owner);
    let bob = fixture.member("bob", Access::Write).await;
    let needed = async || {
        let uses = keys::all(crate::store::keys::Kind::BlobUse);
        app.list(uses).await.unwrap().len()
    };
    let large = async || {
        let variable = NewVariable {
            name: "large".into(),
            category: Category::Terraform,
            value: SecretString::from("v".repeat(100_000)),
            sensitive: true,
            hcl: false,
        };
        app.set_variable(&bob, ORGANIZATION, &Scope::Personal, variable, None).await.unwrap();
        assert_eq!(needed().await, 1);
    };
    assert_eq!(needed().await, 0);
    large().await;
    app.reset_user(owner, ORGANIZATION, "bob", "first-reset-of-bob").await.unwrap();
    assert_eq!(needed().await, 0);
    large().await;
    app.remove_member(owner, ORGANIZATION, "bob").await.unwrap();
    assert_eq!(needed().await, 0);
}

#[tokio::test]
async fn a_stream_outlives_a_change_that_leaves_its_right() {
    let fixture = fixture().await;
    let token = fixture.create_user("bob", Role::Member, Access::Write).await;
    let (app, owner) = (&fixture.app, &fixture.owner);
    let proof = app.prove(&token).await.unwrap();
    let run = fixture.queue("one").await;
    let mut lost = app.hold(&proof, Ground::Run(run.id)).await.unwrap();
    app.update_member(owner, ORGANIZATION, "bob", access(Access::Read)).await.unwrap();
    let quiet = tokio::time::timeout(std::time::Duration::from_millis(50), &mut lost).await;
    assert!(quiet.is_err(), "{quiet:?}");
    app.update_member(owner, ORGANIZATION, "bob", access(Access::None)).await.unwrap();
    assert_eq!(lost.await.reason(), Reason::NotFound);
    refused(app.hold(&proof, Ground::Run(run.id)).await.map(drop), Reason::NotFound);
}

#[tokio::test]
async fn members_leave_by_themselves_but_the_last_owner() {
    let fixture = fixture().await;
    let bob = fixture.member("bob", Access::Read).await;
    let app = &fixture.app;
    app.remove_member(&bob, ORGANIZATION, "bob").await.unwrap();
    refused(app.remove_member(&bob, ORGANIZATION, "bob").await, Reason::NotFound);
    let added = app.add_member(&fixture.owner, ORGANIZATION, "ada", role(Role::Owner)).await;
    refused(added, Reason::NameTaken);
    refused(app.remove_member(&fixture.owner, ORGANIZATION, "ada").await, Reason::LastOwner);
}

#[tokio::test]
async fn an_owner_who_is_demoted_meanwhile_changes_nothing_by_what_they_were() {
    let fixture = fixture().await;
    let token = fixture.create_user("bob", Role::Owner, Access::Admin).await;
    let (app, bob) = (&fixture.app, fixture.app.caller(&token).await.unwrap());
    let standing = app.owner(&bob, ORGANIZATION).await.unwrap();
    let demoted = role(Role::Member);
    app.update_member(&fixture.owner, ORGANIZATION, "bob", demoted).await.unwrap();
    let own = app.member_to_change(&standing, "bob").await.map(drop);
    refused(own, Reason::ChangedMeanwhile);
    let batch =
        app.resting_on_an_owner(Batch::new(), &standing, UserId::from_bytes([9; 16]), false);
    let stale = app.store.commit(batch.await.unwrap()).await;
    assert!(matches!(stale, Err(CommitError::Conflict { .. })), "{stale:?}");
}

#[tokio::test]
async fn what_is_hidden_from_a_member_is_not_named_to_them() {
    let fixture = fixture().await;
    let bob = fixture.member("bob", Access::Read).await;
    let (app, owner) = (&fixture.app, &fixture.owner);
    let hide = only(ENVIRONMENT, Some(Access::None));
    app.update_member(owner, ORGANIZATION, "bob", hide).await.unwrap();
    let own = app.list_members(&bob, ORGANIZATION, PageRequest::default()).await.unwrap();
    assert!(own.items[0].environments.is_empty());
    let change = SettingsChange { policy: Some(MfaPolicy::Never), ..SettingsChange::default() };
    // "web" is behind the only one that bob sees.
    app.create_environment(owner, ORGANIZATION, "app", change.clone(), "app", None).await.unwrap();
    let page = PageRequest { size: 1, token: String::new() };
    let page = app.list_environments(&bob, ORGANIZATION, page).await.unwrap();
    assert_eq!((page.items[0].environment.name.as_str(), page.next), ("app", None));
    let page = PageRequest { size: 1, token: String::new() };
    let page = app.list_environments(owner, ORGANIZATION, page).await.unwrap();
    assert_eq!(page.next.as_deref(), Some("app"));
    for name in [ENVIRONMENT, "nowhere"] {
        let set = app.update_environment(&bob, ORGANIZATION, name, change.clone(), None).await;
        refused(set.map(drop), Reason::NotFound);
    }
}

#[tokio::test]
async fn a_known_request_id_shows_no_run_of_another_environment() {
    let fixture = fixture().await;
    let bob = fixture.member("bob", Access::Write).await;
    let (app, owner) = (&fixture.app, &fixture.owner);
    let run = fixture.try_queue(&bob, "known").await.unwrap();
    assert_eq!(fixture.try_queue(&bob, "known").await.unwrap().id, run.id);
    let settings = SettingsChange::default();
    app.create_environment(owner, ORGANIZATION, "dev", settings, "dev", None).await.unwrap();
    let hide = only(ENVIRONMENT, Some(Access::None));
    app.update_member(owner, ORGANIZATION, "bob", hide).await.unwrap();
    let new = NewRun {
        organization: ORGANIZATION.into(),
        environment: "dev".into(),
        configuration: run.request.configuration,
        kind: run.request.kind,
        message: String::new(),
        target: vec![],
        replace: vec![],
        auto_apply: None,
        destroy_confirmation: String::new(),
        variables: vec![],
        request_id: "known".into(),
    };
    let error = app.queue_run(&bob, new).await.unwrap_err();
    assert_eq!(error.field_name(), Some("request_id"));
    let page = PageRequest::default();
    let listed = app.list_quarantined(&bob, ORGANIZATION, Some(run.id), page).await.map(drop);
    refused(listed, Reason::NotFound);
    let unknown = Some(latchkey_domain::id::RunId::from_bytes([9; 16]));
    let page = PageRequest::default();
    let listed = app.list_quarantined(&bob, ORGANIZATION, unknown, page).await.map(drop);
    refused(listed, Reason::NotFound);
    let nothing = MemberChange {
        access: Some(Access::None),
        environments: vec![(ENVIRONMENT.into(), None)],
        ..MemberChange::default()
    };
    app.update_member(owner, ORGANIZATION, "bob", nothing).await.unwrap();
    let page = PageRequest::default();
    let listed = app.list_variables(&bob, ORGANIZATION, &Scope::Organization, page).await;
    refused(listed.map(drop), Reason::NotAllowed);
}
