use std::path::Path;
use std::sync::Arc;

use latchkey_domain::id::{Epoch, Generation, JobId, RunId};
use latchkey_domain::policy::{MfaPolicy, Phase};
use latchkey_domain::run::{Run, RunState};
use latchkey_proto::v1::Reason;

use super::Mark;
use crate::app::App;
use crate::app::artifacts::Made;
use crate::app::fixture::{Fixture, ORGANIZATION};
use crate::app::lease_job::Held;
use crate::app::run_output::Piece;
use crate::auth::RunnerIdentity;
use crate::job::LeaseRef;
use crate::store::sled::{Options, Sled};
use crate::store::{Batch, Expect, Store, keys};

async fn leased() -> (Fixture, Run, RunnerIdentity, LeaseRef) {
    let fixture = Fixture::new(MfaPolicy::Never).await;
    let run = fixture.queue("first").await;
    let runner = fixture.runner().await;
    let (lease, _) = fixture.app.grant(run.job_id(Phase::Plan), runner.id).await.unwrap();
    (fixture, run, runner, lease)
}

/// What the control plane tells its runners now.
fn told(app: &App) -> Mark {
    app.mark().unwrap()
}

async fn alarms(fixture: &Fixture, action: &str) -> usize {
    let organization = fixture.organization().await;
    let trail = crate::store::list(&*fixture.store, keys::audit_of(organization)).await.unwrap();
    trail.iter().filter(|(_, found)| String::from_utf8_lossy(&found.value).contains(action)).count()
}

#[tokio::test]
async fn what_was_told_here_proves_nothing_also_after_starts() {
    let (fixture, _, runner, lease) = leased().await;
    let app = &fixture.app;
    app.greet(&runner, None).await.unwrap();
    app.greet(&runner, Some(&told(app))).await.unwrap();
    let mut marks = vec![told(app)];
    for _ in 0..3 {
        let after = fixture.restarted(None).await;
        marks.push(told(&after));
        for mark in &marks {
            after.greet(&runner, Some(mark)).await.unwrap();
        }
    }
    // Of another history, whose numbers say nothing of this one.
    let old = LeaseRef { generation: Generation::new(0), epoch: Epoch::new(99), ..lease };
    assert_eq!(app.take_up(&runner, old).await.unwrap_err().reason(), Reason::LeaseLost);
    assert!(!app.history.is_lost());
    app.start_job(&runner, lease).await.unwrap();
}

#[tokio::test]
async fn a_runner_that_lies_stops_nobody_but_itself() {
    let (fixture, run, runner, lease) = leased().await;
    let app = &fixture.app;
    let honest = told(app);
    for lie in [
        Mark { generation: Generation::new(u64::MAX), ..honest.clone() },
        Mark { history: u64::MAX, ..honest.clone() },
        Mark { incarnation: "0".repeat(32), history: u64::MAX, ..honest.clone() },
    ] {
        app.greet(&runner, Some(&lie)).await.unwrap();
    }
    assert_eq!(alarms(&fixture, "bring_false_history").await, 1);
    // Leases that were never granted prove nothing either: they are given up.
    let elsewhere = JobId { run: RunId::from_bytes([9; 16]), ..lease.job };
    for held in [LeaseRef { epoch: Epoch::new(99), ..lease }, LeaseRef { job: elsewhere, ..lease }]
    {
        assert_eq!(app.take_up(&runner, held).await.unwrap(), Held::GiveUp);
    }
    // One that is said to be of a later history is left to its runner.
    let later = LeaseRef { generation: Generation::new(2), ..lease };
    let error = app.take_up(&runner, later).await.unwrap_err();
    assert_eq!(error.reason(), Reason::HistoryLost);
    assert!(!app.history.is_lost());
    assert_eq!(fixture.run(&run).await.state, RunState::Planning);
    app.start_job(&runner, lease).await.unwrap();
}

#[tokio::test]
async fn an_old_copy_grants_nothing_spends_nothing_and_changes_nothing() {
    let fixture = Fixture::new(MfaPolicy::PlansAndApplies).await;
    let app = &fixture.app;
    let waiting = fixture.queue("waiting").await;
    let run = fixture.queue("queued").await;
    let run = fixture.submit(&run, &fixture.code(), "one").await.unwrap();
    let runner = fixture.runner().await;
    let (lease, _) = app.grant(run.job_id(Phase::Plan), runner.id).await.unwrap();

    let later = fixture.told_later().await;
    let error = app.greet(&runner, Some(&later)).await.unwrap_err();
    assert_eq!(error.reason(), Reason::HistoryLost);
    app.history.lost().await;
    let lost = |error: crate::error::Error| assert_eq!(error.reason(), Reason::HistoryLost);
    lost(app.grant(run.job_id(Phase::Plan), runner.id).await.unwrap_err());
    lost(app.start_job(&runner, lease).await.unwrap_err());
    lost(app.start_again(&runner, lease).await.unwrap_err());
    lost(app.take_up(&runner, lease).await.unwrap_err());
    lost(app.hand_back(&runner, lease).await.unwrap_err());
    lost(app.expire(lease.job, lease.epoch).await.unwrap_err());
    let code = fixture.code();
    lost(fixture.submit(&waiting, &code, "two").await.unwrap_err());
    assert_eq!(fixture.aws.requests_with_code(&code), 0);

    // For everybody, and told in the audit trail, once. People can look.
    lost(app.greet(&runner, None).await.unwrap_err());
    lost(app.greet(&runner, Some(&later)).await.unwrap_err());
    assert_eq!(fixture.run(&run).await.state, RunState::Planning);
    assert_eq!(alarms(&fixture, "prove_old_copy").await, 1);
    assert!(app.show_organization(&fixture.owner, ORGANIZATION).await.is_ok());

    // It stands at the next start, until a person on the host takes it back.
    let after = fixture.restarted(None).await;
    after.recall_alarm().await.unwrap();
    lost(after.check_history().unwrap_err());
    let proof = after.clear_alarm().await.unwrap().unwrap().to_string();
    assert!(proof.contains("--above 2"), "{proof}");
    after.check_history().unwrap();
    assert!(after.clear_alarm().await.unwrap().is_none());
    lost(after.greet(&runner, Some(&later)).await.unwrap_err());
}

#[tokio::test]
async fn an_old_copy_acknowledges_nothing_that_is_under_way() {
    let (fixture, _, runner, lease) = leased().await;
    let app = &fixture.app;
    let appender = app.append_log(&runner, lease).await.unwrap();
    let line = |offset| vec![Piece { offset, data: b"{}\n".to_vec() }];
    assert_eq!(appender.append(line(0)).await.unwrap(), 3);
    // The lease is lost while a state of it is on its way: it would go to quarantine.
    app.expire(lease.job, lease.epoch).await.unwrap();
    let data = br#"{"version":4,"serial":1,"lineage":"x"}"#;
    let header = crate::app::artifacts::ArtifactHeader {
        lease,
        kind: Made::Changes,
        digest: crate::auth::sha256(data),
        size: data.len() as u64,
        sequence: 0,
    };
    let mut upload = app.upload_artifact(&runner, header).await.unwrap();
    upload.write(data).await.unwrap();

    let later = fixture.told_later().await;
    app.greet(&runner, Some(&later)).await.unwrap_err();
    assert_eq!(appender.append(line(3)).await.unwrap_err().reason(), Reason::HistoryLost);
    assert_eq!(upload.finish().await.unwrap_err().reason(), Reason::HistoryLost);
    let organization = fixture.organization().await;
    let kept = keys::quarantined_of(organization);
    assert!(crate::store::list(&*fixture.store, kept).await.unwrap().is_empty());
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        match entry.file_type().unwrap().is_dir() {
            true => copy(&entry.path(), &to.join(entry.file_name())),
            false => drop(std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap()),
        }
    }
}

/// Two lines of one control plane's data, the second begun as a copy of the first.
struct Lines {
    fixture: Fixture,
    runner: RunnerIdentity,
    root: tempfile::TempDir,
}

impl Lines {
    async fn new() -> Self {
        let fixture = Fixture::new(MfaPolicy::Never).await;
        let runner = fixture.runner().await;
        Self { fixture, runner, root: tempfile::tempdir().unwrap() }
    }

    async fn open(&self, name: &str) -> Arc<App> {
        let data = self.root.path().join(name);
        let store: Arc<dyn Store> =
            Arc::new(Sled::open(&Options::new(data.join("store"))).unwrap());
        let app = self.fixture.on(&data, &store).await;
        app.recall_alarm().await.unwrap();
        app
    }

    fn copy(&self) {
        copy(&self.root.path().join("data"), &self.root.path().join("old"));
    }

    async fn commit(app: &App, count: u8) {
        for number in 0..count {
            let batch = Batch::new().put(keys::setting("x"), Expect::Anything, [number]);
            app.store.commit(batch).await.unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_raw_old_copy_is_found_out_however_far_it_has_grown() {
    let lines = Lines::new().await;
    let runner = &lines.runner;
    let app = lines.open("data").await;
    Lines::commit(&app, 3).await;
    let before = told(&app);
    drop(app);
    lines.copy();
    // The original goes on: told at its next start, and by a still later one.
    let app = lines.open("data").await;
    Lines::commit(&app, 3).await;
    let second = told(&app);
    drop(app);
    let app = lines.open("data").await;
    let third = told(&app);
    drop(app);

    for mark in [&second, &third] {
        let app = lines.open("old").await;
        Lines::commit(&app, 20).await;
        assert!(told(&app).history > mark.history, "the copy has not grown: the test is void");
        // What was told before the copy was made, both lines know.
        app.greet(runner, Some(&before)).await.unwrap();
        let error = app.greet(runner, Some(mark)).await.unwrap_err();
        assert_eq!(error.reason(), Reason::HistoryLost);
        drop(app);
        let app = lines.open("old").await;
        assert_eq!(app.check_history().unwrap_err().reason(), Reason::HistoryLost);
        app.clear_alarm().await.unwrap();
    }
    let app = lines.open("data").await;
    for mark in [&before, &second, &third] {
        app.greet(runner, Some(mark)).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_made_in_the_middle_of_a_start_knows_where_that_start_ended() {
    let lines = Lines::new().await;
    let app = lines.open("data").await;
    Lines::commit(&app, 1).await;
    let before = told(&app);
    // The database is not written to: its files are whole.
    lines.copy();
    Lines::commit(&app, 3).await;
    let after = told(&app);
    assert_eq!(before.incarnation, after.incarnation);
    drop(app);
    let app = lines.open("old").await;
    Lines::commit(&app, 20).await;
    app.greet(&lines.runner, Some(&before)).await.unwrap();
    let error = app.greet(&lines.runner, Some(&after)).await.unwrap_err();
    assert_eq!(error.reason(), Reason::HistoryLost);
}
