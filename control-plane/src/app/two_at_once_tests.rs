//! Two persons at once on one run: exactly one wins, and the other is told who did what.

use std::sync::Arc;

use latchkey_aws_simulator::User;
use latchkey_domain::policy::MfaPolicy;
use latchkey_domain::run::{Run, RunState};
use latchkey_proto::v1::Reason;

use super::fixture::{Fixture, ORGANIZATION};
use super::variables::{NewVariable, Scope};
use crate::auth::Caller;
use crate::error::{Error, Result, rfc3339};
use crate::store::record::people::Access;
use crate::store::record::variable::Category;

/// Ada and Bob, and a run that waits for either to approve its apply.
struct Two {
    fixture: Arc<Fixture>,
    bob: Caller,
    /// Serial of the device that is Bob's alone.
    device: String,
}

impl Two {
    async fn new(policy: MfaPolicy) -> Self {
        let fixture = Fixture::new(policy).await;
        let bob = fixture.member("bob", Access::Write).await;
        let account = fixture.aws.facts().account_id;
        let (key, secret, device) = fixture.aws.change_world(|world| {
            world.add_user(&account, User::with_key_and_device("aws", &account, "bob")).unwrap();
            let users = world.accounts.iter().flat_map(|account| &account.users);
            let user = users.into_iter().find(|user| user.name == "bob").unwrap();
            let key = &user.access_keys[0];
            (key.id.clone(), key.secret.expose().to_owned(), user.devices[0].serial.clone())
        });
        for (name, value) in [
            ("AWS_ACCESS_KEY_ID", &key),
            ("AWS_SECRET_ACCESS_KEY", &secret),
            ("AWS_MFA_SERIAL_NUMBER", &device),
        ] {
            let variable = NewVariable {
                name: name.into(),
                category: Category::Environment,
                value: value.as_str().into(),
                sensitive: true,
                hcl: false,
            };
            let scope = Scope::Personal;
            fixture.app.set_variable(&bob, ORGANIZATION, &scope, variable, None).await.unwrap();
        }
        Self { fixture: Arc::new(fixture), bob, device }
    }

    /// A run whose plan has changes.
    async fn planned(&self, request_id: &str) -> Run {
        let run = self.fixture.queue(request_id).await;
        self.fixture.plan(&run).await
    }

    fn bobs_code(&self) -> String {
        self.fixture.aws.unused_code(&self.device).unwrap()
    }

    /// What whoever comes second is told.
    #[track_caller]
    fn assert_told(&self, loser: &Error, winner: &str, verb: &str, decision: &str, run: &Run) {
        let at = rfc3339(self.fixture.app.now());
        let told = format!("{winner} {verb} at {at}; the run is {}", run.state);
        assert!(loser.message().starts_with(&told), "{loser} is not {told}");
        let metadata: std::collections::BTreeMap<_, _> =
            loser.metadata().iter().map(|(key, value)| (*key, value.as_str())).collect();
        assert_eq!(metadata["state"], run.state.as_str());
        assert_eq!(metadata["decision"], decision);
        assert_eq!(metadata["decided_by"], winner);
        assert_eq!(metadata["decide_time"], at);
    }
}

/// Runs two calls in tasks of their own, begun in either order.
async fn at_once<A, B>(round: usize, one: A, other: B) -> (Result<Run>, Result<Run>)
where
    A: Future<Output = Result<Run>> + Send + 'static,
    B: Future<Output = Result<Run>> + Send + 'static,
{
    let (one, other) = if round.is_multiple_of(2) {
        let one = tokio::spawn(one);
        (one, tokio::spawn(other))
    } else {
        let other = tokio::spawn(other);
        (tokio::spawn(one), other)
    };
    (one.await.unwrap(), other.await.unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_who_confirm_one_wins_and_the_other_is_told_who_did() {
    let two = Two::new(MfaPolicy::Never).await;
    for round in 0..8 {
        let run = two.planned(&format!("run-{round}")).await;
        let seen = run.planned.as_ref().unwrap().digest;
        let confirm = |caller: &Caller| {
            let (app, caller) = (Arc::clone(&two.fixture.app), caller.clone());
            async move { app.confirm_run(&caller, run.id, seen).await }
        };
        let answers = at_once(round, confirm(&two.fixture.owner), confirm(&two.bob)).await;
        let now = two.fixture.run(&run).await;
        assert_eq!(now.state, RunState::ApplyQueued);
        let (winner, loser) = match answers {
            (Ok(_), Err(loser)) => ("ada", loser),
            (Err(loser), Ok(_)) => ("bob", loser),
            other => panic!("{other:?}"),
        };
        assert_eq!(loser.reason(), Reason::WrongState);
        assert_eq!(now.approval.as_ref().unwrap().by, winner);
        two.assert_told(&loser, winner, "approved the apply", "approved_apply", &now);
        two.fixture.app.cancel_run(&two.fixture.owner, run.id).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn of_a_confirmation_and_a_discard_one_wins_and_the_other_is_told() {
    let two = Two::new(MfaPolicy::Never).await;
    for round in 0..8 {
        let run = two.planned(&format!("run-{round}")).await;
        let seen = run.planned.as_ref().unwrap().digest;
        let (app, ada) = (Arc::clone(&two.fixture.app), two.fixture.owner.clone());
        let confirmed = async move { app.confirm_run(&ada, run.id, seen).await };
        let (app, bob) = (Arc::clone(&two.fixture.app), two.bob.clone());
        let discarded = async move { app.discard_run(&bob, run.id).await };
        let answers = at_once(round, confirmed, discarded).await;
        let now = two.fixture.run(&run).await;
        match answers {
            (Ok(_), Err(loser)) => {
                assert_eq!(now.state, RunState::ApplyQueued);
                two.assert_told(&loser, "ada", "approved the apply", "approved_apply", &now);
                two.fixture.app.cancel_run(&two.fixture.owner, run.id).await.unwrap();
            }
            (Err(loser), Ok(_)) => {
                assert_eq!(now.state, RunState::Discarded);
                assert!(now.approval.is_none());
                two.assert_told(&loser, "bob", "discarded the run", "discarded", &now);
            }
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_codes_of_two_devices_one_moves_the_run_and_the_other_is_told() {
    let two = Two::new(MfaPolicy::PlansAndApplies).await;
    let run = two.fixture.queue("run").await;
    let submit = |caller: &Caller, code: String| {
        let (fixture, caller, run) = (Arc::clone(&two.fixture), caller.clone(), run.clone());
        async move { fixture.submit_as(&caller, &run, &code, "code").await }
    };
    let (adas, bobs) = (two.fixture.code(), two.bobs_code());
    let ada = submit(&two.fixture.owner, adas.clone());
    let answers = at_once(0, ada, submit(&two.bob, bobs.clone())).await;
    let now = two.fixture.run(&run).await;
    assert_eq!(now.state, RunState::PlanQueued);
    let (winner, loser) = match answers {
        (Ok(_), Err(loser)) => ("ada", loser),
        (Err(loser), Ok(_)) => ("bob", loser),
        other => panic!("{other:?}"),
    };
    assert_eq!(loser.reason(), Reason::NotAwaitingCode);
    assert_eq!(now.plan.authenticated.as_ref().unwrap().user, winner);
    two.assert_told(&loser, winner, "authenticated the plan", "authenticated_plan", &now);
    // Neither was sent twice.
    for code in [adas, bobs] {
        assert!(two.fixture.aws.requests_with_code(&code) <= 1);
    }
    // What a repeat of the loser's request is answered is the same.
    let (caller, code) = match winner {
        "ada" => (&two.bob, "000000"),
        _ => (&two.fixture.owner, "000000"),
    };
    let again = two.fixture.submit_as(caller, &run, code, "code").await.unwrap_err();
    assert_eq!(again.reason(), Reason::NotAwaitingCode);
    two.assert_told(&again, winner, "authenticated the plan", "authenticated_plan", &now);
}

#[tokio::test(flavor = "multi_thread")]
async fn of_a_code_and_a_cancel_the_run_is_canceled_and_a_code_that_came_late_is_told() {
    let two = Two::new(MfaPolicy::PlansAndApplies).await;
    for round in 0..2 {
        let run = two.fixture.queue(&format!("run-{round}")).await;
        let (fixture, ada) = (Arc::clone(&two.fixture), two.fixture.owner.clone());
        let (code, of) = (fixture.code(), run.clone());
        let submitted =
            async move { fixture.submit_as(&ada, &of, &code, &format!("{round}")).await };
        let (app, bob, id) = (Arc::clone(&two.fixture.app), two.bob.clone(), run.id);
        let canceled = async move { app.cancel_run(&bob, id).await };
        let (submitted, canceled) = at_once(round, submitted, canceled).await;
        // A cancel has its way before and after a code.
        canceled.unwrap();
        let now = two.fixture.run(&run).await;
        assert_eq!(now.state, RunState::Canceled);
        if let Err(loser) = submitted {
            assert_eq!(loser.reason(), Reason::NotAwaitingCode);
            two.assert_told(&loser, "bob", "canceled the run", "canceled", &now);
        }
        let seen = latchkey_domain::id::Digest::from_bytes([0; 32]);
        let late = two.fixture.app.confirm_run(&two.bob, run.id, seen).await.unwrap_err();
        two.assert_told(&late, "bob", "canceled the run", "canceled", &now);
    }
}
