//! Who loses the right while AWS answers approves nothing.

use std::sync::{Arc, Mutex};

use latchkey_domain::policy::{MfaPolicy, Phase};
use latchkey_domain::run::{Run, RunState};
use latchkey_proto::v1::Reason;

use super::lock;
use crate::app::App;
use crate::app::authenticate_run::Submission;
use crate::app::fixture::{Fixture, ORGANIZATION};
use crate::app::members::MemberChange;
use crate::app::view_runs::Lock;
use crate::auth::Caller;
use crate::error::Result;
use crate::store::keys;
use crate::store::record::authentication::{Purpose, Session};
use crate::store::record::people::Access;

async fn submit(app: &Arc<App>, who: &Caller, run: &Run, code: String) -> Result<()> {
    let submission = Submission {
        run: run.id,
        phase: if run.planned.is_some() { Phase::Apply } else { Phase::Plan },
        code: code.into(),
        seen: run.planned.as_ref().map(|planned| planned.digest),
        request_id: "late".into(),
        purpose: Purpose::Phase,
    };
    app.authenticate_run(who, submission).await.map(drop)
}

/// An apply that waits for a code, and a member who may give it.
async fn waiting() -> (Fixture, Run, Caller) {
    let fixture = Fixture::new(MfaPolicy::AppliesOnly).await;
    let bob = fixture.member("bob", Access::Write).await;
    let run = fixture.queue("one").await;
    let run = fixture.plan(&run).await;
    assert_eq!(run.state, RunState::AwaitingApplyMfa);
    (fixture, run, bob)
}

async fn check_refused(fixture: &Fixture, run: &Run, done: Result<()>) {
    let refused = done.unwrap_err();
    assert_eq!(refused.reason(), Reason::NotAllowed, "{refused}");
    assert!(refused.message().contains("The code is spent"), "{refused}");
    let now = fixture.run(run).await;
    assert_eq!(now.state, RunState::AwaitingApplyMfa);
    assert!(now.refused_code.unwrap().message.contains("may not decide here any more"));
    assert_eq!(lock(fixture, run).await, Lock::Failed);
    let session = keys::session(run.id, Phase::Apply);
    assert!(fixture.app.fetch::<Session>(session).await.unwrap().is_none());
    let open = keys::authentications_open();
    assert!(fixture.app.list(open).await.unwrap().is_empty());
    let (last, _) = fixture.audited().await.pop().unwrap();
    assert_eq!(last, "refuse_code");
}

#[tokio::test]
async fn a_code_approves_nothing_once_its_giver_was_removed() {
    let (fixture, run, bob) = waiting().await;
    let (app, owner) = (fixture.app.clone(), fixture.owner.clone());
    let late = fixture
        .with_late_answers(async move {
            app.remove_member(&owner, ORGANIZATION, "bob").await.unwrap();
        })
        .await;
    let done = submit(&late, &bob, &run, fixture.code()).await;
    check_refused(&fixture, &run, done).await;
    // Somebody else goes on.
    let run = fixture.submit(&run, &fixture.code(), "ada").await.unwrap();
    assert_eq!(run.state, RunState::ApplyQueued);
}

#[tokio::test]
async fn a_code_approves_nothing_once_its_giver_may_only_read() {
    let (fixture, run, bob) = waiting().await;
    let (app, owner) = (fixture.app.clone(), fixture.owner.clone());
    let late = fixture
        .with_late_answers(async move {
            let change = MemberChange { access: Some(Access::Read), ..MemberChange::default() };
            app.update_member(&owner, ORGANIZATION, "bob", change).await.unwrap();
        })
        .await;
    let done = submit(&late, &bob, &run, fixture.code()).await;
    check_refused(&fixture, &run, done).await;
}

#[tokio::test]
async fn no_run_is_moved_by_a_code_after_its_giver_was_removed() {
    // More requests than a submission makes of the store.
    for nth in 1..200 {
        let (fixture, run, bob) = waiting().await;
        let (app, owner, id) = (fixture.app.clone(), fixture.owner.clone(), run.id);
        let at_the_end: Arc<Mutex<Option<RunState>>> = Arc::default();
        let noted = Arc::clone(&at_the_end);
        let (between, store) = fixture
            .with_between(nth, async move {
                app.remove_member(&owner, ORGANIZATION, "bob").await.unwrap();
                *noted.lock().unwrap() = Some(app.run(id).await.unwrap().value.state);
            })
            .await;
        let _ = submit(&between, &bob, &run, fixture.code()).await;
        if !store.is_done() {
            return;
        }
        let state = fixture.run(&run).await.state;
        assert_eq!(*at_the_end.lock().unwrap(), Some(state), "before request {nth}");
    }
    panic!("a submission makes more requests than were tried");
}
