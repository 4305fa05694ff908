//! How an agent ends, and what it says of itself.

use std::os::unix::net::UnixDatagram;
use std::process::Stdio;

use rustix::process::{Pid, Signal, kill_process};
use tokio::process::{Child, Command};

use super::*;
use crate::job::Phase;

/// Starts an apply that takes so long, and waits until terraform runs it.
pub(super) async fn apply_begins(plane: &Plane, seconds: &str) {
    let digests = plan(plane, seconds).await;
    plane.offer(v1::Phase::Apply, 2, apply_job(digests));
    plane
        .wait("the apply to start", |world| {
            String::from_utf8_lossy(&world.log).contains("local-exec): begun")
        })
        .await;
}

fn has(world: &World, what: &str) -> bool {
    world.story.iter().any(|said| said == what)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_runner_that_drains_finishes_what_runs_and_takes_nothing_new() {
    let (plane, work_dir) = (Plane::start().await, tempfile::tempdir().unwrap());
    let agent = Running::start(plane.config(work_dir.path()));
    apply_begins(&plane, "1").await;
    agent.wish(Wish::Drain);
    plane.wait("the drain", |world| has(world, "draining")).await;
    assert!(!plane.world().hellos.last().unwrap().draining);
    plane.cut();
    plane.wait("a second hello", |world| world.hellos.last().unwrap().draining).await;
    let finished = plane.finished().await;
    assert!(matches!(finished.result, Some(v1::finished::Result::Apply(_))), "{finished:?}");
    agent.ended().await.unwrap();
    assert!(jobs_left(work_dir.path()).is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_offer_on_its_way_to_a_runner_that_drains_is_handed_back() {
    let (plane, work_dir) = (Plane::start().await, tempfile::tempdir().unwrap());
    plane.world().offers_all_the_same = true;
    let agent = Running::start(plane.config(work_dir.path()));
    plane.wait("a heartbeat", |world| has(world, "heartbeat")).await;
    {
        let lease = v1::LeaseRef {
            run_id: "run1".into(),
            phase: v1::Phase::Plan.into(),
            epoch: 1,
            generation: 1,
        };
        let mut world = plane.world();
        agent.wish(Wish::Drain);
        world.offer = Some(v1::Offer { lease: Some(lease), job: Some(plan_job(&[])) });
    }
    agent.ended().await.unwrap();
    let story = plane.story();
    assert!(story.contains(&"draining".to_owned()), "{story:?}");
    assert!(story.contains(&"never started".to_owned()), "{story:?}");
    assert!(!story.contains(&"accept".to_owned()), "{story:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_signal_cancels_what_runs_and_everything_is_shipped() {
    let (plane, work_dir) = (Plane::start().await, tempfile::tempdir().unwrap());
    let agent = Running::start(plane.config(work_dir.path()));
    apply_begins(&plane, "45").await;
    agent.wish(Wish::Drain);
    plane.wait("the drain", |world| has(world, "draining")).await;
    agent.wish(Wish::Cancel);
    let finished = plane.finished().await;
    let log = String::from_utf8(plane.world().log.clone()).unwrap();
    let Some(v1::finished::Result::Failed(failed)) = finished.result else {
        panic!("{finished:?}\n{log}")
    };
    assert_eq!(failed.kind(), v1::JobFailure::Canceled, "{failed:?}");
    assert_eq!(log.matches("canceled: the runner is shutting down").count(), 1, "{log}");
    assert_eq!(finished.log_length, log.len() as u64);
    agent.ended().await.unwrap();
    assert!(jobs_left(work_dir.path()).is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_runner_without_a_job_ends_after_its_idle_time_out() {
    let (plane, work_dir) = (Plane::start().await, tempfile::tempdir().unwrap());
    let mut config = plane.config(work_dir.path());
    config.idle_timeout = Some(Duration::from_secs(2));
    let agent = Running::start(config);
    // Longer than the time-out: a job is not idleness.
    apply_begins(&plane, "3").await;
    let finished = plane.finished().await;
    assert!(matches!(finished.result, Some(v1::finished::Result::Apply(_))), "{finished:?}");
    assert!(!plane.story().contains(&"draining".to_owned()));
    agent.ended().await.unwrap();
    assert!(plane.story().contains(&"draining".to_owned()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_runner_for_one_job_takes_one_and_says_so() {
    let (plane, work_dir) = (Plane::start().await, tempfile::tempdir().unwrap());
    let mut config = plane.config(work_dir.path());
    config.lifetime = Lifetime::OneJob;
    let agent = Running::start(config);
    plan(&plane, "0").await;
    agent.ended().await.unwrap();
    let story = plane.story();
    let at = |what: &str| story.iter().position(|said| said == what).expect("it was said");
    assert!(at("accept") < at("draining") && at("draining") < at("finished"), "{story:?}");
    assert_eq!(plane.world().hellos[0].slots, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_runner_says_what_it_takes_and_hands_the_rest_back() {
    let (plane, work_dir) = (Plane::start().await, tempfile::tempdir().unwrap());
    let mut config = plane.config(work_dir.path());
    config.labels = BTreeMap::from([("zone".into(), "eu".into())]);
    config.accepts = Some(Phase::Apply);
    let agent = Running::start(config);
    plane.offer(v1::Phase::Plan, 1, plan_job(&[]));
    plane.wait("the hand back", |world| has(world, "never started")).await;
    let hello = plane.world().hellos[0].clone();
    assert_eq!(hello.labels["zone"], "eu");
    assert_eq!(hello.accepts, [i32::from(v1::Phase::Apply)]);
    let host = hello.host.unwrap();
    assert!(host.cpus > 0 && host.memory_bytes > 0 && !host.architecture.is_empty(), "{host:?}");
    assert!(!plane.story().contains(&"accept".to_owned()));
    agent.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_runner_drained_by_a_person_hands_offers_back_until_the_drain_is_over() {
    let (plane, work_dir) = (Plane::start().await, tempfile::tempdir().unwrap());
    plane.world().drains = true;
    let agent = Running::start(plane.config(work_dir.path()));
    plane.offer(v1::Phase::Plan, 1, plan_job(&[]));
    plane.wait("the hand back", |world| has(world, "never started")).await;
    assert!(!plane.story().contains(&"accept".to_owned()));
    plane.world().drains = false;
    // A welcome without a drain behind it.
    plan(&plane, "0").await;
    agent.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_history_that_was_told_is_told_again_by_the_next_agent() {
    let (plane, work_dir) = (Plane::start().await, tempfile::tempdir().unwrap());
    (plane.world().generation, plane.world().history) = (3, 70);
    let agent = Running::start(plane.config(work_dir.path()));
    plane.wait("a heartbeat", |world| has(world, "heartbeat")).await;
    plane.world().history = 80;
    let beats = |world: &World| world.story.iter().filter(|what| *what == "heartbeat").count();
    let so_far = beats(&plane.world());
    plane.wait("more heartbeats", |world| beats(world) >= so_far + 2).await;
    plane.cut();
    plane.wait("a second hello", |world| world.hellos.len() == 2).await;
    agent.stop().await.unwrap();
    (plane.world().generation, plane.world().history) = (2, 900);
    let agent = Running::start(plane.config(work_dir.path()));
    plane.wait("a third hello", |world| world.hellos.len() == 3).await;
    let seen = |hello: &v1::Hello| {
        hello.seen.as_ref().map_or((0, 0), |mark| (mark.generation, mark.history))
    };
    let told: Vec<_> = plane.world().hellos.iter().map(seen).collect();
    assert_eq!(told, [(0, 0), (3, 80), (3, 80)]);
    agent.stop().await.unwrap();
}

/// An agent in a process of its own.
struct Alone {
    child: Child,
    directory: tempfile::TempDir,
    /// What the service manager is told, line by line.
    notified: std::sync::mpsc::Receiver<String>,
}

#[test]
#[ignore = "not a test: the process that other tests start"]
fn agent_process() {
    if std::env::var_os("LATCHKEY_RUNNER_CONTROL_PLANE").is_some() {
        crate::run(["latchkey-runner".into(), "run".into()], program()).unwrap();
    }
}

impl Alone {
    fn start(plane: &Plane) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let (socket, token) = (directory.path().join("notify"), directory.path().join("token"));
        let listening = UnixDatagram::bind(&socket).unwrap();
        let (lines_to, notified) = std::sync::mpsc::sync_channel(10_000);
        // Always read, as a service manager does: whoever tells it would wait.
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(length) = listening.recv(&mut buffer) {
                for line in String::from_utf8_lossy(&buffer[..length]).lines() {
                    if lines_to.send(line.to_owned()).is_err() {
                        return;
                    }
                }
            }
        });
        let fingerprint = hex::encode(sha256(&SHA256, &plane.ca.2));
        std::fs::write(&token, format!("lkp_secret.{fingerprint}")).unwrap();
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "agent::tests::ending::agent_process", "--ignored", "--nocapture"])
            .env("LATCHKEY_RUNNER_CONTROL_PLANE", format!("https://127.0.0.1:{}", plane.port))
            .env("LATCHKEY_RUNNER_WORK_DIR", directory.path().join("work"))
            .env("LATCHKEY_RUNNER_POOL_TOKEN_FILE", token)
            .env("LATCHKEY_RUNNER_LOW_WATER", "0")
            .env("LATCHKEY_RUNNER_TERRAFORM", at_hand().unwrap())
            .env("NOTIFY_SOCKET", socket)
            .env("WATCHDOG_USEC", "600000")
            .stdout(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        Self { child, directory, notified }
    }

    fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.child.id().expect("it runs")).unwrap();
        kill_process(Pid::from_raw(pid).unwrap(), signal).unwrap();
    }

    /// Reads what the service manager is told, until that.
    #[track_caller]
    fn told(&self, what: &str) {
        let since = Instant::now();
        while !self.notified.recv_timeout(LIMIT).expect(what).starts_with(what) {
            assert!(since.elapsed() < LIMIT, "waited too long for {what}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_manager_is_told_and_signals_drain_then_cancel() {
    let plane = Plane::start().await;
    let mut agent = Alone::start(&plane);
    agent.told("READY=1");
    agent.told("STATUS=connected; no job; takes jobs");
    agent.told("WATCHDOG=1");
    apply_begins(&plane, "45").await;
    agent.told("STATUS=connected; 1 job; takes jobs");
    agent.signal(Signal::TERM);
    plane.wait("the drain", |world| has(world, "draining")).await;
    agent.told("STATUS=connected; 1 job; ends when it has none");
    agent.told("WATCHDOG=1");
    agent.signal(Signal::INT);
    let finished = plane.finished().await;
    assert!(matches!(finished.result, Some(v1::finished::Result::Failed(_))), "{finished:?}");
    agent.told("STOPPING=1");
    assert!(agent.child.wait().await.unwrap().success());
    assert!(jobs_left(&agent.directory.path().join("work")).is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_quit_signal_leaves_at_once_and_the_next_agent_takes_the_job_up() {
    let plane = Plane::start().await;
    let mut agent = Alone::start(&plane);
    agent.told("READY=1");
    apply_begins(&plane, "2").await;
    agent.signal(Signal::QUIT);
    agent.told("STOPPING=1");
    assert!(agent.child.wait().await.unwrap().success());
    let work_dir = agent.directory.path().join("work");
    assert_eq!(jobs_left(&work_dir).len(), 1);
    let next = Running::start(plane.config(&work_dir));
    let finished = plane.finished().await;
    assert!(matches!(finished.result, Some(v1::finished::Result::Apply(_))), "{finished:?}");
    next.stop().await.unwrap();
}

/// An engine that does not answer when it is asked for its version.
struct Slow(tempfile::TempDir);

impl Slow {
    fn new() -> Self {
        let host = tempfile::tempdir().unwrap();
        let engine = host.path().join("terraform");
        let text = "#!/bin/sh\necho $$ > \"${0%/*}/own/pid.new\"\n\
                    mv \"${0%/*}/own/pid.new\" \"${0%/*}/own/pid\"\nsleep 600\n";
        std::fs::create_dir(host.path().join("own")).unwrap();
        std::fs::write(&engine, text).unwrap();
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(&engine, mode).unwrap();
        Self(host)
    }

    /// Starts an agent, and answers once the engine is being asked.
    async fn agent(&self, plane: &Plane, work_dir: &Path) -> (Running, i32) {
        let engine = self.0.path().join("terraform").display().to_string();
        let engines = EngineSettings::of(&["--terraform", &engine], work_dir);
        let agent = Running::start(Config { engines, ..plane.config(work_dir) });
        let asked = async {
            loop {
                match std::fs::read_to_string(self.0.path().join("own/pid")) {
                    Ok(pid) => return pid.trim().parse::<i32>().unwrap(),
                    Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
                }
            }
        };
        let pid = tokio::time::timeout(LIMIT, asked).await.expect("the engine is asked");
        (agent, pid)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signal_is_heard_while_an_engine_takes_its_time_to_answer() {
    let (plane, work_dir) = (Plane::start().await, tempfile::tempdir().unwrap());
    let engine = Slow::new();
    let (agent, pid) = engine.agent(&plane, work_dir.path()).await;
    let begun = Instant::now();
    agent.wish(Wish::Drain);
    agent.ended().await.unwrap();
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    assert!(!Path::new(&format!("/proc/{pid}")).exists(), "the engine that was asked lives");
    assert!(plane.story().is_empty(), "{:?}", plane.story());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signal_at_the_start_of_an_agent_that_has_a_job_drains_or_cancels_or_leaves_it() {
    let (plane, work_dir) = (Plane::start().await, tempfile::tempdir().unwrap());
    let first = Running::start(plane.config(work_dir.path()));
    apply_begins(&plane, "2").await;
    first.stop().await.unwrap();
    let engine = Slow::new();
    let (agent, _) = engine.agent(&plane, work_dir.path()).await;
    agent.stop().await.unwrap();
    assert_eq!(jobs_left(work_dir.path()).len(), 1);
    let engine = Slow::new();
    let (agent, pid) = engine.agent(&plane, work_dir.path()).await;
    agent.wish(Wish::Drain);
    agent.ended().await.unwrap();
    assert!(!Path::new(&format!("/proc/{pid}")).exists(), "the engine that was asked lives");
    let finished = plane.finished().await;
    assert!(matches!(finished.result, Some(v1::finished::Result::Apply(_))), "{finished:?}");
    assert!(plane.world().hellos.last().unwrap().draining);
    assert!(jobs_left(work_dir.path()).is_empty());

    let first = Running::start(plane.config(work_dir.path()));
    apply_begins(&plane, "600").await;
    first.stop().await.unwrap();
    let engine = Slow::new();
    let (agent, _) = engine.agent(&plane, work_dir.path()).await;
    agent.wish(Wish::Cancel);
    agent.ended().await.unwrap();
    let finished = plane.finished().await;
    let Some(v1::finished::Result::Failed(failed)) = finished.result else {
        panic!("{finished:?}")
    };
    assert_eq!(failed.kind(), v1::JobFailure::Canceled, "{failed:?}");
    assert!(jobs_left(work_dir.path()).is_empty());
}
