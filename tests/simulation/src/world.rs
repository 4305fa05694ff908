//! One simulated world: its hosts, what goes wrong, and how it ends.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use latchkey_control_plane::clock::Clock;
use latchkey_control_plane::seal::MasterKey;
use latchkey_domain::id::RunnerId;
use latchkey_domain::time::Timestamp;
use secrecy::SecretString;
use turmoil::Sim;

use crate::chance::Chance;
use crate::clock::WallClock;
use crate::machine::Machine;
use crate::model::{Counts, Model};
use crate::net::PLANE;
use crate::plan::{CALM, Fault, Plan, Planned, Plant, builder_name};
use crate::sts::WRONG;
use crate::watched::Watched;
use crate::{agent, people, plane};

const TICK: Duration = Duration::from_millis(20);

/// How long after the last fault every run must have come to its end.
const PATIENCE: Duration = Duration::from_secs(90);

/// What the first start of the control plane has made.
#[derive(Debug)]
pub(crate) struct Furniture {
    pub(crate) token: SecretString,
    pub(crate) configuration: String,
}

/// What all hosts share: nothing here dies with a host.
pub(crate) struct World {
    pub(crate) chance: Chance,
    pub(crate) model: Model,
    pub(crate) clock: Arc<WallClock>,
    pub(crate) plant: Option<Plant>,
    pub(crate) directory: PathBuf,
    pub(crate) master: Arc<MasterKey>,
    pub(crate) furniture: OnceLock<Furniture>,
    /// How many runs people will queue.
    pub(crate) wanted: u64,
    plan: Plan,
    machines: OnceLock<Vec<Arc<Machine>>>,
    store: OnceLock<Arc<Watched>>,
    calm: AtomicBool,
    queued: AtomicBool,
    codes: AtomicU64,
    /// Runners that people have drained, and may have to resume.
    drained: Mutex<BTreeSet<RunnerId>>,
    /// Runners whose identity people have ended, or tried to.
    revoked: Mutex<BTreeSet<RunnerId>>,
    /// Hosts that lose power at the end of this step.
    crashing: Mutex<Vec<String>>,
}

/// What became of a world.
#[derive(Debug)]
pub(crate) struct Report {
    pub(crate) counts: Counts,
    pub(crate) violations: Vec<String>,
    pub(crate) trace: Vec<String>,
    pub(crate) runs: usize,
    pub(crate) lasted: Duration,
}

impl World {
    pub(crate) fn now(&self) -> Timestamp {
        self.clock.now()
    }

    pub(crate) fn store(&self) -> Arc<Watched> {
        Arc::clone(self.store.get().expect("set before the first host starts"))
    }

    pub(crate) fn machines(&self) -> &[Arc<Machine>] {
        self.machines.get().expect("set before the first host starts")
    }

    pub(crate) fn logs_directory(&self) -> PathBuf {
        self.directory.join("logs")
    }

    pub(crate) fn is_calm(&self) -> bool {
        self.calm.load(Ordering::SeqCst)
    }

    pub(crate) fn is_troubled(&self) -> bool {
        !self.is_calm()
    }

    pub(crate) fn queued(&self) {
        self.queued.store(true, Ordering::SeqCst);
    }

    /// Answers a code that nobody has submitted yet.
    pub(crate) fn next_code(&self, wrong: bool) -> String {
        loop {
            let code = format!("{:06}", 100_000 + self.codes.fetch_add(1, Ordering::SeqCst));
            if code.ends_with(WRONG) == wrong {
                return code;
            }
        }
    }

    pub(crate) fn is_drained(&self, runner: RunnerId) -> bool {
        lock(&self.drained).contains(&runner)
    }

    pub(crate) fn drained(&self, machine: &Machine, drained: bool) {
        if drained {
            lock(&self.drained).insert(machine.runner);
        } else {
            lock(&self.drained).remove(&machine.runner);
        }
    }

    /// Tells whether another runner would be left, and notes that this one's identity ends.
    pub(crate) fn may_revoke(&self, machine: &Machine) -> bool {
        let mut revoked = lock(&self.revoked);
        let may = revoked.is_empty() && self.plan.builders > 1;
        if may {
            revoked.insert(machine.runner);
        }
        may
    }

    fn is_revoked(&self, machine: &Machine) -> bool {
        lock(&self.revoked).contains(&machine.runner)
    }

    /// A named moment of the control plane. Does not return when its host loses power there.
    pub(crate) async fn plane_may_crash(&self, at: &str) {
        if self.is_troubled() && self.chance.happens(self.plan.rates.commit) {
            self.crash_here(PLANE, at).await;
        }
    }

    /// A named moment of a build host, as [`World::plane_may_crash`].
    pub(crate) async fn builder_may_crash(&self, host: &str, side: &str, record: &str) {
        if self.is_troubled() && self.chance.happens(self.plan.rates.record) {
            self.crash_here(host, &format!("{side} {record}")).await;
        }
    }

    async fn crash_here(&self, host: &str, at: &str) {
        self.model.fault(format!("{host} loses power {at}"));
        lock(&self.crashing).push(host.to_owned());
        std::future::pending::<()>().await;
    }

    fn take_crashing(&self) -> Vec<String> {
        std::mem::take(&mut *lock(&self.crashing))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs the world of a seed to its end.
pub(crate) fn run(seed: u64, plant: Option<Plant>, directory: PathBuf) -> anyhow::Result<Report> {
    let chance = Chance::of(seed);
    let plan = Plan::draw(&chance);
    let wanted = chance.between(1, 6);
    let world = Arc::new(World {
        model: Model::new(),
        clock: Arc::default(),
        plant,
        directory,
        master: Arc::new(MasterKey::ephemeral()),
        furniture: OnceLock::new(),
        wanted,
        plan: plan.clone(),
        machines: OnceLock::new(),
        store: OnceLock::new(),
        calm: AtomicBool::new(false),
        queued: AtomicBool::new(false),
        codes: AtomicU64::new(0),
        drained: Mutex::default(),
        revoked: Mutex::default(),
        crashing: Mutex::default(),
        chance,
    });
    let builders = (0..plan.builders).map(|builder| {
        let identity = u8::try_from(builder).expect("a few builders");
        Arc::new(Machine::new(&world, builder_name(builder), identity))
    });
    let clone = plan.cloned.then(|| Arc::new(Machine::new(&world, "clone".to_owned(), 0)));
    let _ = world.machines.set(builders.chain(clone).collect());
    let _ = world.store.set(Arc::new(Watched::new(Arc::clone(&world))));

    let mut sim = turmoil::Builder::new()
        .rng_seed(seed)
        .tick_duration(TICK)
        .simulation_duration(Duration::from_secs(3600))
        .max_message_latency(plan.latency)
        .tcp_capacity(65_536)
        .enable_random_order()
        .build();
    let plane_world = Arc::clone(&world);
    sim.host(PLANE, move || plane::host(Arc::clone(&plane_world)));
    for machine in world.machines() {
        let machine = Arc::clone(machine);
        sim.host(machine.name.clone(), move || agent::host(Arc::clone(&machine)));
    }
    let people_world = Arc::clone(&world);
    sim.host("people", move || people::host(Arc::clone(&people_world)));

    let mut course = Course { world: &world, plan, down: BTreeMap::new(), lasting: vec![] };
    course.run(&mut sim)?;
    Ok(Report {
        counts: world.model.counts(),
        violations: world.model.violations(),
        trace: world.model.trace(),
        runs: world.model.runs().len(),
        lasted: sim.elapsed(),
    })
}

/// The course of a world: steps, faults as they are due, checks.
struct Course<'a> {
    world: &'a World,
    plan: Plan,
    /// Hosts without power, and when they get it back.
    down: BTreeMap<String, Duration>,
    /// Faults of the network that last, and until when.
    lasting: Vec<(Duration, Fault)>,
}

impl Course<'_> {
    fn run(&mut self, sim: &mut Sim<'_>) -> anyhow::Result<()> {
        let world = self.world;
        let (mut due, mut settled_at) = (0, None);
        loop {
            let now = sim.elapsed();
            world.model.set_now(now);
            if !world.is_calm() {
                while let Some(planned) = self.plan.faults.get(due).filter(|p| p.at <= now) {
                    let planned = planned.clone();
                    due += 1;
                    self.begin(sim, &planned, now);
                }
            }
            self.repair(sim, now);
            if now >= CALM && !world.is_calm() {
                self.calm(sim);
            }
            sim.step().map_err(|error| anyhow::anyhow!("step the simulation: {error}"))?;
            for host in world.take_crashing() {
                let pause = world.chance.millis(50, 3500);
                self.crash(sim, &host, now + pause);
            }
            if now.as_millis() % 1000 == 0 {
                world.model.check_logs(&world.logs_directory());
            }
            if !world.model.violations().is_empty() {
                return Ok(());
            }
            if settled_at.is_none()
                && world.queued.load(Ordering::SeqCst)
                && world.model.unsettled().is_empty()
                && world.machines().iter().all(|m| m.leases().is_empty() || world.is_revoked(m))
            {
                settled_at = Some(now);
            }
            // A moment more, in case something still changes what has ended.
            if settled_at.is_some_and(|at| now > at + Duration::from_secs(1)) {
                break;
            }
            if now > CALM + PATIENCE {
                self.complain();
                break;
            }
        }
        world.model.check_logs(&world.logs_directory());
        world.model.check_whole_logs();
        Ok(())
    }

    fn complain(&self) {
        let world = self.world;
        for open in world.model.unsettled() {
            world.model.violated("liveness", open);
        }
        // A revoked runner keeps what it has.
        for machine in world.machines().iter().filter(|machine| !world.is_revoked(machine)) {
            for lease in machine.leases() {
                let text = format!(
                    "{} still has {} {} epoch {}",
                    machine.name,
                    world.model.name(lease.run),
                    lease.phase,
                    lease.epoch
                );
                world.model.violated("liveness", text);
            }
        }
        if !world.queued.load(Ordering::SeqCst) {
            world.model.violated("liveness", "not all runs could be queued");
        }
    }

    fn begin(&mut self, sim: &mut Sim<'_>, planned: &Planned, now: Duration) {
        let Planned { lasts, fault, .. } = planned;
        let until = now + *lasts;
        let model = &self.world.model;
        match fault {
            Fault::Cut { host } => sim.partition(host.as_str(), PLANE),
            Fault::CutTo { host } => sim.partition_oneway(PLANE, host.as_str()),
            Fault::CutFrom { host } => sim.partition_oneway(host.as_str(), PLANE),
            Fault::Hold { host } => {
                // Turmoil cannot hold a link of which one direction is cut.
                if !self.lasting.is_empty() {
                    return;
                }
                sim.hold(host.as_str(), PLANE);
            }
            Fault::Slow => sim.set_max_message_latency(Duration::from_millis(900)),
            Fault::CrashPlane => {
                model.fault("the plane is killed");
                self.crash(sim, PLANE, until);
                return;
            }
            Fault::CrashBuilder { builder } => {
                let host = builder_name(*builder);
                model.fault(format!("{host} loses power"));
                self.crash(sim, &host, until);
                return;
            }
            Fault::KillAgent { builder } => {
                self.world.machines()[*builder].kill.notify_one();
                return;
            }
            Fault::KillSupervisor { builder } => {
                let machine = &self.world.machines()[*builder];
                if machine.kill_supervisor() {
                    model.fault(format!("a supervisor of {} is killed", machine.name));
                }
                return;
            }
            Fault::Jump { minutes } => {
                model.fault(format!("the wall clock jumps by {minutes} minutes"));
                self.world.clock.jump(minutes * 60_000);
                return;
            }
        }
        model.fault(format!("{fault:?} for {lasts:?}"));
        self.lasting.push((until, fault.clone()));
    }

    /// Ends what has lasted long enough.
    fn repair(&mut self, sim: &mut Sim<'_>, now: Duration) {
        let over: Vec<Fault> =
            self.lasting.extract_if(.., |(until, _)| *until <= now).map(|(_, f)| f).collect();
        for fault in over {
            self.world.model.note(format!("{fault:?} is over"));
            match &fault {
                Fault::Cut { host } | Fault::CutTo { host } | Fault::CutFrom { host } => {
                    sim.repair(host.as_str(), PLANE);
                }
                Fault::Hold { host } => sim.release(host.as_str(), PLANE),
                Fault::Slow => sim.set_max_message_latency(self.plan.latency),
                Fault::CrashPlane
                | Fault::CrashBuilder { .. }
                | Fault::KillAgent { .. }
                | Fault::KillSupervisor { .. }
                | Fault::Jump { .. } => {}
            }
        }
        let up: Vec<String> =
            self.down.iter().filter(|(_, at)| **at <= now).map(|(host, _)| host.clone()).collect();
        for host in up {
            self.down.remove(&host);
            self.world.model.note(format!("{host} starts"));
            sim.bounce(host.as_str());
        }
    }

    fn crash(&mut self, sim: &mut Sim<'_>, host: &str, until: Duration) {
        if self.down.insert(host.to_owned(), until).is_none() {
            sim.crash(host);
        }
    }

    /// Repairs all, and gives every host its power back.
    fn calm(&mut self, sim: &mut Sim<'_>) {
        self.world.calm.store(true, Ordering::SeqCst);
        self.world.model.note("all is calm");
        self.repair(sim, Duration::MAX);
        sim.set_max_message_latency(Duration::from_millis(20));
    }
}
