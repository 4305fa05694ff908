//! What each scenario breaks. A round's faults follow from its seed alone.

use std::time::Duration;

use latchkey_aws_simulator::{Effect, Fault as AwsFault};
use latchkey_harness::stub::{OnInterrupt, Script};
use latchkey_harness::{Flow, Network};

use crate::bed::{Engine, Hosts};
use crate::old_copy::How;
use crate::points::{POINTS, Point, When, Who};
use crate::random::Random;
use crate::story::{Action, Expect, Fault, Plan};

/// How a scenario is played.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Kind {
    /// A run through the real runner.
    Story(fn(&mut Random, u64) -> Plan),
    /// A runner that misorders its frames.
    Frames,
    /// A control plane with an older copy of its data.
    OldCopy(How),
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct Scenario {
    pub(crate) name: &'static str,
    pub(crate) about: &'static str,
    pub(crate) engine: Engine,
    pub(crate) hosts: Hosts,
    pub(crate) kind: Kind,
    /// Rounds of `--short`.
    pub(crate) short: u64,
}

const fn story(
    name: &'static str,
    about: &'static str,
    short: u64,
    plan: fn(&mut Random, u64) -> Plan,
) -> Scenario {
    Scenario {
        name,
        about,
        engine: Engine::Stub,
        hosts: Hosts::One,
        kind: Kind::Story(plan),
        short,
    }
}

pub(crate) const SCENARIOS: &[Scenario] = &[
    story("calm", "nothing at all", 1, |random, _| quiet(random)),
    story("kill-control-plane", "SIGKILL at random moments", 2, kill_plane),
    story("kill-agent", "SIGKILL at random moments", 2, kill_agent),
    story("kill-supervisor", "SIGKILL of the supervisor alone", 2, kill_supervisor),
    story("kill-terraform", "SIGKILL of terraform", 1, kill_terraform),
    story("kill-several", "two or three of them, in any order", 2, kill_several),
    story("points", "SIGKILL at each named point", POINTS.len() as u64, at_a_point),
    story("cut", "connections cut, for less and more than a term", 2, cut),
    story("half-open", "one or both directions stall, unnoticed", 1, half_open),
    story("slow-network", "delays and trickles", 1, slow),
    story("disk-full-runner", "ENOSPC in the job directory", 1, disk_full_runner),
    story("disk-full-control-plane", "ENOSPC in the store or the logs", 1, disk_full_plane),
    story("sts", "slow, failing, resetting, answering too late", 2, sts),
    story("clock", "wall clocks jump by 20 minutes", 1, clock),
    story("twins", "two agents with one identity", 1, twins),
    story("upgrade", "another copy of the agent in the middle of an apply", 1, upgrade),
    story("cancel", "a person cancels while something dies", 2, cancel),
    story("flood", "megabytes of output while something dies or is cut", 1, flood),
    story("pauses", "whoever passes a named point waits there for up to two terms", 3, pauses),
    Scenario {
        name: "two-hosts",
        about: "the first of two build hosts is away long enough to lose what it holds",
        engine: Engine::Stub,
        hosts: Hosts::Two,
        kind: Kind::Story(two_hosts),
        short: 2,
    },
    Scenario {
        name: "frames",
        about: "a runner that repeats, delays and reorders its frames",
        engine: Engine::Stub,
        hosts: Hosts::One,
        kind: Kind::Frames,
        short: 2,
    },
    Scenario {
        name: "old-copy",
        about: "the control plane returns with an older copy of its data",
        engine: Engine::Stub,
        hosts: Hosts::One,
        kind: Kind::OldCopy(How::Raw),
        short: 1,
    },
    Scenario {
        name: "restore",
        about: "the control plane is restored from a backup",
        engine: Engine::Stub,
        hosts: Hosts::One,
        kind: Kind::OldCopy(How::Restored),
        short: 1,
    },
    real("real-kill-control-plane", kill_plane),
    real("real-kill-agent", kill_agent),
    real("real-kill-supervisor", kill_supervisor),
];

const fn real(name: &'static str, plan: fn(&mut Random, u64) -> Plan) -> Scenario {
    Scenario {
        name,
        about: "the same with a real terraform",
        engine: Engine::Real,
        hosts: Hosts::One,
        kind: Kind::Story(plan),
        short: 0,
    }
}

fn quiet(random: &mut Random) -> Plan {
    let hold = random.once_in(3);
    Plan {
        engine: Engine::Stub,
        gated: random.once_in(4),
        script: Script {
            lines: 10 + random.below(120),
            pause: Duration::from_micros(random.below(8_000)),
            padding: usize::try_from(random.below(300)).unwrap_or(0),
            states: 1 + random.below(4),
            hold,
            ..Script::default()
        },
        away: random.millis(20, 900),
        release: random.millis(50, 1_500),
        in_plan: Vec::new(),
        in_apply: Vec::new(),
        expect: Expect::Success,
    }
}

/// Makes terraform work for a second or two, so that it can be struck.
fn busy(random: &mut Random, plan: &mut Plan) {
    plan.script.lines = 60 + random.below(100);
    plan.script.pause = random.millis(8, 16);
}

/// Puts a fault into one of the phases, or both.
fn somewhere(random: &mut Random, plan: &mut Plan, action: &Action) {
    let after = random.millis(0, 900);
    let fault = Fault { after, action: action.clone() };
    if random.once_in(3) {
        plan.in_plan.push(fault);
    } else {
        plan.in_apply.push(fault);
    }
}

fn kill_plane(random: &mut Random, _: u64) -> Plan {
    let mut plan = quiet(random);
    for _ in 0..=random.below(2) {
        somewhere(random, &mut plan, &Action::KillPlane);
    }
    // Sometimes for longer than a term.
    if random.once_in(5) {
        plan.away = random.millis(3_000, 5_000);
    }
    plan
}

fn kill_agent(random: &mut Random, _: u64) -> Plan {
    let mut plan = quiet(random);
    for _ in 0..=random.below(2) {
        somewhere(random, &mut plan, &Action::KillAgent);
    }
    if random.once_in(5) {
        plan.away = random.millis(3_000, 5_000);
    }
    plan
}

fn kill_supervisor(random: &mut Random, _: u64) -> Plan {
    let mut plan = quiet(random);
    plan.expect = Expect::AnyEnd;
    busy(random, &mut plan);
    somewhere(random, &mut plan, &Action::KillSupervisor);
    // Its successor may die as well.
    if random.once_in(3) {
        somewhere(random, &mut plan, &Action::KillSupervisor);
    }
    plan
}

fn kill_terraform(random: &mut Random, _: u64) -> Plan {
    let mut plan = quiet(random);
    plan.expect = Expect::AnyEnd;
    busy(random, &mut plan);
    plan.script.child = random.once_in(2);
    somewhere(random, &mut plan, &Action::KillTerraform);
    plan
}

fn kill_several(random: &mut Random, _: u64) -> Plan {
    let mut plan = quiet(random);
    busy(random, &mut plan);
    for _ in 0..2 + random.below(2) {
        let action = match random.below(5) {
            0 | 1 => Action::KillPlane,
            2 | 3 => Action::KillAgent,
            _ => {
                plan.expect = Expect::AnyEnd;
                Action::KillSupervisor
            }
        };
        somewhere(random, &mut plan, &action);
    }
    plan
}

fn at_a_point(random: &mut Random, seed: u64) -> Plan {
    let mut plan = quiet(random);
    let count = POINTS.len() as u64;
    let Point { name, who, when, most } =
        &POINTS[usize::try_from(seed % count).unwrap_or_default()];
    let hit = 1 + random.below(*most);
    let fault = Fault { after: Duration::ZERO, action: Action::KillAt { point: name, hit } };
    plan.gated = *when == When::Code || random.once_in(4);
    plan.script.states = 3;
    let in_apply = match when {
        When::Apply => true,
        When::EitherPhase | When::Code => !random.once_in(3),
    };
    if in_apply {
        plan.in_apply.push(fault);
    } else {
        plan.in_plan.push(fault);
    }
    if *who == Who::Supervisor {
        plan.expect = Expect::AnyEnd;
    }
    // Then something else dies as well.
    if random.once_in(3) {
        let more = if *who == Who::Plane { Action::KillAgent } else { Action::KillPlane };
        somewhere(random, &mut plan, &more);
    }
    plan
}

fn cut(random: &mut Random, _: u64) -> Plan {
    let mut plan = quiet(random);
    for _ in 0..=random.below(3) {
        let lasts =
            if random.once_in(3) { random.millis(3_000, 5_000) } else { random.millis(10, 900) };
        somewhere(random, &mut plan, &Action::Network { network: Network::Cut, lasts });
    }
    plan
}

fn half_open(random: &mut Random, _: u64) -> Plan {
    let mut plan = quiet(random);
    let (there, back) = match random.below(3) {
        0 => (Flow::Stalled, Flow::Open),
        1 => (Flow::Open, Flow::Stalled),
        _ => (Flow::Stalled, Flow::Stalled),
    };
    let network = Network::Up { there, back };
    let lasts = random.millis(500, 6_000);
    somewhere(random, &mut plan, &Action::Network { network, lasts });
    plan
}

fn slow(random: &mut Random, _: u64) -> Plan {
    let mut plan = quiet(random);
    let flow = |random: &mut Random| match random.below(3) {
        0 => Flow::Open,
        1 => Flow::Delayed(random.millis(5, 250)),
        _ => Flow::Trickle {
            bytes: usize::try_from(20 + random.below(400)).unwrap_or(20),
            pause: random.millis(1, 10),
        },
    };
    let network = Network::Up { there: flow(random), back: flow(random) };
    let lasts = random.millis(500, 4_000);
    somewhere(random, &mut plan, &Action::Network { network, lasts });
    plan
}

fn disk_full_runner(random: &mut Random, _: u64) -> Plan {
    let mut plan = quiet(random);
    // A state that cannot be written on the host makes terraform save it: an end, and a true one.
    plan.expect = Expect::AnyEnd;
    let lasts = random.millis(100, 2_500);
    somewhere(random, &mut plan, &Action::NoSpace { point: "run.disk", lasts });
    plan
}

fn disk_full_plane(random: &mut Random, _: u64) -> Plan {
    let mut plan = quiet(random);
    plan.away = random.millis(200, 900);
    let point = *random.pick(&["cp.store.disk", "cp.log.disk"]);
    let lasts = random.millis(50, 800);
    somewhere(random, &mut plan, &Action::NoSpace { point, lasts });
    plan
}

fn sts(random: &mut Random, _: u64) -> Plan {
    let mut plan = quiet(random);
    plan.gated = true;
    let mut faults = Vec::new();
    for _ in 0..=random.below(2) {
        let fault = match random.below(6) {
            0 => AwsFault::delay(random.millis(200, 3_000)),
            1 => AwsFault::new(Effect::Reset),
            2 => AwsFault::new(Effect::ServiceUnavailable),
            3 => AwsFault::new(Effect::Throttle),
            // The code is spent, and the answer is lost.
            4 => AwsFault::new(Effect::Reset).after_processing(),
            // It comes when nobody waits any more.
            _ => AwsFault::new(Effect::Proceed)
                .delayed(random.millis(11_000, 12_000))
                .after_processing(),
        };
        faults.push(fault.on("GetSessionToken"));
    }
    plan.in_plan.push(Fault { after: Duration::ZERO, action: Action::Aws(faults) });
    if random.once_in(3) {
        somewhere(random, &mut plan, &Action::KillPlane);
    }
    plan
}

fn clock(random: &mut Random, _: u64) -> Plan {
    let mut plan = quiet(random);
    plan.gated = false;
    let minutes = if random.once_in(2) { 20 } else { -20 };
    let jump = Action::Clock { millis: minutes * 60_000 };
    somewhere(random, &mut plan, &jump);
    if random.once_in(2) {
        somewhere(random, &mut plan, &Action::Clock { millis: 0 });
    }
    plan
}

fn twins(random: &mut Random, _: u64) -> Plan {
    let mut plan = quiet(random);
    let lasts = random.millis(500, 4_000);
    somewhere(random, &mut plan, &Action::Twin { lasts });
    // Who of the two is offered a job is chance, and one of them goes away.
    plan.expect = Expect::AnyEnd;
    plan
}

fn upgrade(random: &mut Random, _: u64) -> Plan {
    let mut plan = quiet(random);
    plan.script.hold = true;
    plan.script.on_interrupt = OnInterrupt::Stop;
    plan.release = random.millis(500, 2_500);
    let after = random.millis(100, 900);
    plan.in_apply.push(Fault { after, action: Action::UpgradeAgent });
    plan
}

fn pauses(random: &mut Random, seed: u64) -> Plan {
    let mut plan = quiet(random);
    let count = POINTS.len() as u64;
    let Point { name, when, .. } = &POINTS[usize::try_from(seed % count).unwrap_or_default()];
    plan.gated = *when == When::Code;
    plan.script.states = 3;
    let lasts = random.millis(100, 6_000);
    let fault = Fault { after: Duration::ZERO, action: Action::PauseAt { point: name, lasts } };
    if *when == When::Apply || random.once_in(2) {
        plan.in_apply.push(fault);
    } else {
        plan.in_plan.push(fault);
    }
    plan
}

fn two_hosts(random: &mut Random, _: u64) -> Plan {
    let mut plan = quiet(random);
    plan.gated = false;
    busy(random, &mut plan);
    plan.away = random.millis(3_500, 6_000);
    let lasts = random.millis(3_500, 6_000);
    let mut count = 1 + random.below(2);
    while count > 0 {
        count -= 1;
        let points = [
            "run.accepted",
            "run.prepared",
            "run.starting.synced",
            "run.told",
            "run.finished.sending",
        ];
        let point = *random.pick(&points);
        let action = match random.below(4) {
            0 => Action::KillAgent,
            1 => Action::Network { network: Network::Cut, lasts },
            2 => Action::KillAt { point, hit: 1 },
            _ => Action::PauseAt { point, lasts },
        };
        let after = random.millis(0, 900);
        let fault = Fault { after, action };
        if random.once_in(2) {
            plan.in_plan.push(fault);
        } else {
            plan.in_apply.push(fault);
        }
    }
    plan
}

fn cancel(random: &mut Random, _: u64) -> Plan {
    let mut plan = quiet(random);
    busy(random, &mut plan);
    plan.expect = Expect::AnyEnd;
    if random.once_in(4) {
        plan.script.on_interrupt = *random.pick(&[OnInterrupt::Ignore, OnInterrupt::Die]);
    }
    let after = random.millis(50, 1_200);
    plan.in_apply.push(Fault { after, action: Action::Cancel });
    let action = match random.below(4) {
        0 => Action::KillPlane,
        1 => Action::KillAgent,
        2 => Action::KillSupervisor,
        _ => Action::Network { network: Network::Cut, lasts: random.millis(100, 4_000) },
    };
    somewhere(random, &mut plan, &action);
    plan
}

fn flood(random: &mut Random, _: u64) -> Plan {
    let mut plan = quiet(random);
    plan.script.lines = 5_000 + random.below(20_000);
    plan.script.pause = Duration::ZERO;
    plan.script.padding = usize::try_from(random.below(400)).unwrap_or(0);
    for _ in 0..=random.below(2) {
        let action = match random.below(4) {
            0 => Action::KillPlane,
            1 => Action::KillAgent,
            2 => {
                plan.expect = Expect::AnyEnd;
                Action::KillSupervisor
            }
            _ => Action::Network { network: Network::Cut, lasts: random.millis(100, 4_000) },
        };
        somewhere(random, &mut plan, &action);
    }
    plan
}
