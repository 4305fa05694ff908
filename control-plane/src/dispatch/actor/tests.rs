//! The actor against a decider that grants all, on paused time.

use std::collections::BTreeMap;
use std::sync::Mutex;

use latchkey_domain::id::{Digest, Generation, OrganizationId, RunId};
use latchkey_domain::policy::Phase;
use latchkey_domain::run::RunKind;
use latchkey_domain::time::Timestamp;

use super::connections::MOST_TAKEOVERS;
use super::*;
use crate::auth::RunnerIdentity;
use crate::dispatch::{
    Abilities, Engine, Handle, Introduction, RUNNER_QUEUE, Waiting, Wanted, channel,
};
use crate::error::{Error, Result};
use crate::job::JobSpec;
use crate::store::{BoxFuture, Version};

const TERM: Duration = Duration::from_secs(30);
const POOL: PoolId = PoolId::from_bytes([8; 16]);
/// Longer than anything that is to happen takes; on paused time it costs nothing.
const LIMIT: Duration = Duration::from_secs(3600);

/// Grants every job, numbering its leases.
#[derive(Default)]
struct Decider {
    epochs: Mutex<HashMap<JobId, u64>>,
    expired: Mutex<Vec<(JobId, Instant)>>,
    alarms: Mutex<Vec<RunnerId>>,
    /// Holds grants up while it is taken.
    gate: Arc<tokio::sync::Mutex<()>>,
}

impl Leases for Decider {
    fn grant(
        self: Arc<Self>,
        job: JobId,
        _: RunnerId,
    ) -> BoxFuture<'static, Result<Option<(LeaseRef, JobSpec)>>> {
        let mut epochs = self.epochs.lock().unwrap();
        let epoch = epochs.entry(job).or_default();
        *epoch += 1;
        let lease = LeaseRef { job, epoch: Epoch::new(*epoch), generation: Generation::FIRST };
        let gate = Arc::clone(&self.gate);
        Box::pin(async move {
            drop(gate.lock().await);
            Ok(Some((lease, spec())))
        })
    }

    fn expire(self: Arc<Self>, job: JobId, _: Epoch) -> BoxFuture<'static, Result<()>> {
        self.expired.lock().unwrap().push((job, Instant::now()));
        Box::pin(async { Ok(()) })
    }

    fn offer_if_open(self: Arc<Self>, _: JobId) -> BoxFuture<'static, Result<()>> {
        Box::pin(async { Err(Error::internal("not asked for here")) })
    }

    fn two_of_one(self: Arc<Self>, runner: RunnerId) -> BoxFuture<'static, Result<()>> {
        self.alarms.lock().unwrap().push(runner);
        Box::pin(async { Ok(()) })
    }

    fn generation(&self) -> Generation {
        Generation::FIRST
    }

    fn now(&self) -> Timestamp {
        Timestamp::from_millis(1)
    }
}

fn spec() -> JobSpec {
    JobSpec {
        organization: "acme".into(),
        environment: "web".into(),
        kind: RunKind::PlanAndApply,
        archive: Digest::from_bytes([0; 32]),
        working_directory: String::new(),
        target: vec![],
        replace: vec![],
        has_state: false,
        engine: String::new(),
        terraform_version: String::new(),
        approved: None,
        queued_by: "ada".into(),
        message: String::new(),
        region: "us-east-1".into(),
    }
}

struct Plane {
    dispatch: Handle,
    decider: Arc<Decider>,
}

fn plane() -> Plane {
    let (dispatch, inbox) = channel();
    let decider = Arc::new(Decider::default());
    let leases: Arc<dyn Leases> = Arc::clone(&decider) as Arc<dyn Leases>;
    tokio::spawn(inbox.run(leases, TERM));
    Plane { dispatch, decider }
}

fn identity(number: u16) -> RunnerIdentity {
    let mut bytes = [7; 16];
    bytes[..2].copy_from_slice(&number.to_be_bytes());
    RunnerIdentity {
        id: RunnerId::from_bytes(bytes),
        name: "builder".into(),
        organization: OrganizationId::from_bytes([1; 16]),
        pool: POOL,
    }
}

fn job(number: u16) -> JobId {
    let mut bytes = [0; 16];
    bytes[..2].copy_from_slice(&number.to_be_bytes());
    JobId { run: RunId::from_bytes(bytes), phase: Phase::Plan }
}

fn place() -> Place {
    Place { pool: POOL, phase: Phase::Plan, labels: BTreeMap::new(), wanted: Wanted::default() }
}

fn standing(drained: bool, version: u64) -> Standing {
    Standing { drained, version: Version::new(version) }
}

fn introduction(slots: u32) -> Introduction {
    Introduction {
        abilities: Abilities { slots, ..Abilities::default() },
        held: vec![],
        standing: standing(false, 1),
        draining: false,
    }
}

type Frames = mpsc::Receiver<ToRunner>;

impl Plane {
    async fn connect(&self, runner: u16, introduction: Introduction) -> (ConnectionId, Frames) {
        let (sender, frames) = mpsc::channel(RUNNER_QUEUE);
        let id = self.dispatch.connect(identity(runner), introduction, sender).await.unwrap();
        (id, frames)
    }

    fn open(&self, number: u16) {
        self.dispatch.open(job(number), place(), Epoch::NONE);
    }

    async fn why(&self) -> Waiting {
        self.dispatch.why_waiting(place()).await.unwrap()
    }
}

#[track_caller]
fn offered(frame: Option<ToRunner>) -> LeaseRef {
    match frame {
        Some(ToRunner::Offer { lease, .. }) => lease,
        other => panic!("{other:?}"),
    }
}

async fn next(frames: &mut Frames) -> Option<ToRunner> {
    tokio::time::timeout(LIMIT, frames.recv()).await.expect("a frame was due")
}

/// Lets the actor do all that it can do now, and asserts that nothing came of it.
async fn silent(plane: &Plane, frames: &mut Frames) {
    for _ in 0..8 {
        plane.why().await;
        tokio::task::yield_now().await;
    }
    let frame = frames.try_recv();
    assert!(matches!(frame, Err(mpsc::error::TryRecvError::Empty)), "{frame:?}");
}

#[tokio::test(start_paused = true)]
async fn a_runner_has_no_more_jobs_than_slots_and_the_oldest_first() {
    let plane = plane();
    for number in [3, 1, 2] {
        plane.open(number);
    }
    let (_, mut frames) = plane.connect(1, introduction(2)).await;
    let first = offered(next(&mut frames).await);
    assert_eq!(first.job, job(1));
    assert_eq!(offered(next(&mut frames).await).job, job(2));
    silent(&plane, &mut frames).await;
    assert_eq!(plane.why().await, Waiting::NobodyIdle);
    plane.dispatch.released(first.job, first.epoch);
    assert_eq!(offered(next(&mut frames).await).job, job(3));
}

#[tokio::test(start_paused = true)]
async fn the_idlest_runner_is_first() {
    let plane = plane();
    let (_, mut small) = plane.connect(1, introduction(1)).await;
    let (_, mut large) = plane.connect(2, introduction(3)).await;
    for number in 1..=3 {
        plane.open(number);
        if number < 3 {
            offered(next(&mut large).await);
        }
    }
    // Both have one left; the elder id is chosen.
    offered(next(&mut small).await);
    silent(&plane, &mut large).await;
}

#[tokio::test(start_paused = true)]
async fn a_job_goes_to_who_suits_and_holds_up_no_other() {
    let plane = plane();
    let demanding = Place { labels: [("gpu".into(), "yes".into())].into(), ..place() };
    plane.dispatch.open(job(1), demanding.clone(), Epoch::NONE);
    plane.open(2);
    let (_, mut plain) = plane.connect(1, introduction(4)).await;
    assert_eq!(offered(next(&mut plain).await).job, job(2));
    silent(&plane, &mut plain).await;
    let lacking = Waiting::NobodySuits { lacking: "with label gpu=yes".into() };
    assert_eq!(plane.dispatch.why_waiting(demanding).await, Some(lacking));
    let mut fitting = introduction(1);
    fitting.abilities.labels = [("gpu".into(), "yes".into())].into();
    let (_, mut frames) = plane.connect(2, fitting).await;
    assert_eq!(offered(next(&mut frames).await).job, job(1));
}

#[tokio::test(start_paused = true)]
async fn an_apply_goes_to_the_engine_that_made_its_plan() {
    let plane = plane();
    let wanted = Wanted { engine: "tofu".into(), version: "1.9.0".into() };
    plane.dispatch.open(job(1), Place { wanted, ..place() }, Epoch::NONE);
    let with = |name: &str, version: &str| {
        let mut introduction = introduction(1);
        introduction.abilities.engines =
            vec![Engine { name: name.into(), version: version.into() }];
        introduction
    };
    let (_, mut other) = plane.connect(1, with("terraform", "1.9.0")).await;
    silent(&plane, &mut other).await;
    let (_, mut right) = plane.connect(2, with("tofu", "*")).await;
    offered(next(&mut right).await);
}

#[tokio::test(start_paused = true)]
async fn a_drained_runner_is_told_and_offered_nothing_until_it_is_resumed() {
    let plane = plane();
    let (_, mut frames) = plane.connect(1, introduction(1)).await;
    plane.dispatch.stand(identity(1).id, standing(true, 5));
    assert!(matches!(next(&mut frames).await, Some(ToRunner::Drain)));
    plane.open(1);
    silent(&plane, &mut frames).await;
    assert_eq!(plane.why().await, Waiting::NobodyIdle);
    // What is older changes nothing.
    plane.dispatch.stand(identity(1).id, standing(false, 4));
    silent(&plane, &mut frames).await;
    // Told again when it is back.
    let drained = Introduction { standing: standing(true, 5), ..introduction(1) };
    let (_, mut frames) = plane.connect(1, drained).await;
    assert!(matches!(next(&mut frames).await, Some(ToRunner::Drain)));
    silent(&plane, &mut frames).await;
    plane.dispatch.stand(identity(1).id, standing(false, 6));
    assert!(matches!(next(&mut frames).await, Some(ToRunner::Resume)));
    offered(next(&mut frames).await);
}

#[tokio::test(start_paused = true)]
async fn a_runner_that_drains_itself_is_offered_nothing_until_it_says_hello_again() {
    let plane = plane();
    let (connection, mut frames) = plane.connect(1, introduction(1)).await;
    plane.dispatch.draining(identity(1).id, connection);
    plane.open(1);
    silent(&plane, &mut frames).await;
    assert!(plane.dispatch.see(vec![identity(1).id]).await[&identity(1).id].draining);
    let still = Introduction { draining: true, ..introduction(1) };
    let (_, mut frames) = plane.connect(1, still).await;
    // Of the stream that was replaced: means nothing any more.
    silent(&plane, &mut frames).await;
    let (_, mut frames) = plane.connect(1, introduction(1)).await;
    plane.dispatch.draining(identity(1).id, connection);
    offered(next(&mut frames).await);
}

#[tokio::test(start_paused = true)]
async fn a_silent_lease_is_ended_within_45_seconds_by_default() {
    let plane = plane();
    let (connection, mut frames) = plane.connect(1, introduction(1)).await;
    plane.open(1);
    let lease = offered(next(&mut frames).await);
    tokio::time::sleep(Duration::from_secs(20)).await;
    let renewed = plane.dispatch.heartbeat(identity(1).id, vec![lease]).await;
    assert_eq!(renewed, [lease]);
    let last = Instant::now();
    plane.dispatch.disconnect(identity(1).id, connection);
    tokio::time::sleep(Duration::from_secs(100)).await;
    let expired = plane.decider.expired.lock().unwrap().clone();
    let [(expired, at)] = expired.as_slice() else { panic!("{expired:?}") };
    assert_eq!(*expired, lease.job);
    let after = at.duration_since(last);
    assert!(after >= TERM && after < Duration::from_secs(45), "{after:?}");
}

#[tokio::test(start_paused = true)]
async fn a_lease_that_was_told_twice_takes_one_slot() {
    let plane = plane();
    let runner = identity(1).id;
    let (_, mut frames) = plane.connect(1, introduction(2)).await;
    plane.open(1);
    let lease = offered(next(&mut frames).await);
    plane.dispatch.watch(lease.job, lease.epoch, runner);
    plane.dispatch.watch_unknown(lease.job, lease.epoch, runner);
    plane.open(2);
    offered(next(&mut frames).await);
    plane.dispatch.released(lease.job, lease.epoch);
    plane.dispatch.released(lease.job, lease.epoch);
    plane.open(3);
    plane.open(4);
    offered(next(&mut frames).await);
    silent(&plane, &mut frames).await;
    assert_eq!(plane.dispatch.see(vec![runner]).await[&runner].held.len(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_runner_that_gave_a_job_back_rests_a_moment() {
    let plane = plane();
    let (_, mut frames) = plane.connect(1, introduction(1)).await;
    plane.dispatch.rest(identity(1).id);
    plane.open(1);
    silent(&plane, &mut frames).await;
    let before = Instant::now();
    offered(next(&mut frames).await);
    assert!(before.elapsed() >= REST && before.elapsed() < 2 * REST);
}

#[tokio::test(start_paused = true)]
async fn streams_that_keep_ending_each_other_are_an_alarm() {
    let plane = plane();
    let mut streams = vec![];
    for _ in 0..=MOST_TAKEOVERS {
        streams.push(plane.connect(1, introduction(1)).await);
    }
    silent(&plane, &mut streams.last_mut().unwrap().1).await;
    assert!(plane.decider.alarms.lock().unwrap().is_empty());
    for (_, frames) in &mut streams[..MOST_TAKEOVERS] {
        assert!(matches!(next(frames).await, Some(ToRunner::Superseded)));
        assert!(next(frames).await.is_none());
    }
    streams.push(plane.connect(1, introduction(1)).await);
    silent(&plane, &mut streams.last_mut().unwrap().1).await;
    assert_eq!(*plane.decider.alarms.lock().unwrap(), [identity(1).id]);
}

#[tokio::test(start_paused = true)]
async fn streams_that_broke_and_came_back_are_no_alarm() {
    let plane = plane();
    for _ in 0..20 {
        let (_, frames) = plane.connect(1, introduction(1)).await;
        drop(frames);
    }
    let (_, mut frames) = plane.connect(1, introduction(1)).await;
    silent(&plane, &mut frames).await;
    assert!(plane.decider.alarms.lock().unwrap().is_empty());
}

#[tokio::test(start_paused = true)]
async fn an_expelled_runner_is_offered_nothing() {
    let plane = plane();
    let (_, mut frames) = plane.connect(1, introduction(1)).await;
    plane.dispatch.expel(identity(1).id);
    plane.open(1);
    assert!(next(&mut frames).await.is_none());
    assert_eq!(plane.why().await, Waiting::NobodyThere);
}

#[tokio::test(start_paused = true)]
async fn a_thousand_runners_at_once_each_get_their_job() {
    let plane = plane();
    for number in 0..2000 {
        plane.open(number);
    }
    // A real deadline: on paused time only work that never ends would pass it unseen.
    let begun = std::time::Instant::now();
    let plane = Arc::new(plane);
    let connecting = (0..1000).map(|number| {
        let plane = Arc::clone(&plane);
        tokio::spawn(async move {
            let (_, mut frames) = plane.connect(number, introduction(2)).await;
            let jobs = [offered(next(&mut frames).await).job, offered(next(&mut frames).await).job];
            (jobs, frames)
        })
    });
    let mut jobs = BTreeSet::new();
    let mut streams = vec![];
    for connected in connecting.collect::<Vec<_>>() {
        let (got, frames) = connected.await.unwrap();
        jobs.extend(got);
        streams.push(frames);
    }
    assert_eq!(jobs.len(), 2000);
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_lease_that_ends_before_it_is_offered_is_offered_to_nobody_and_its_job_is_open() {
    let plane = plane();
    let granting = Arc::clone(&plane.decider.gate).lock_owned().await;
    let (_, mut first) = plane.connect(1, introduction(1)).await;
    plane.open(1);
    silent(&plane, &mut first).await;
    // Its runner was revoked at once: the job is open again, as of the lease being granted.
    plane.dispatch.expel(identity(1).id);
    plane.dispatch.open(job(1), place(), Epoch::new(1));
    let (_, mut second) = plane.connect(2, introduction(1)).await;
    drop(granting);
    let lease = offered(next(&mut second).await);
    assert_eq!((lease.job, lease.epoch), (job(1), Epoch::new(2)));
    assert!(first.recv().await.is_none());
    // One that is told late of what is overtaken opens nothing.
    let watched = plane.dispatch.watched().await;
    assert_eq!(watched, [(job(1), Epoch::new(2), identity(2).id)]);
}

#[tokio::test(start_paused = true)]
async fn a_process_that_stood_still_takes_no_runner_for_silent() {
    let plane = plane();
    let (_, mut frames) = plane.connect(1, introduction(1)).await;
    plane.open(1);
    offered(next(&mut frames).await);
    let expired = || plane.decider.expired.lock().unwrap().len();
    // In one leap, as after a stop: the next tick comes late.
    tokio::time::advance(2 * TERM).await;
    tokio::time::sleep(TERM / 2).await;
    assert_eq!(expired(), 0);
    // The silence that follows is the runner's.
    tokio::time::sleep(2 * TERM).await;
    assert_eq!(expired(), 1);
}
