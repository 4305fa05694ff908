//! What goes wrong in a world: drawn from its seed, before anything happens.

use std::time::Duration;

use crate::chance::Chance;

/// Until when things go wrong. After that all is repaired, and every run must come to its end.
pub(crate) const CALM: Duration = Duration::from_secs(16);

/// A defect that is put in on purpose, to show that the simulation sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Plant {
    /// An apply whose runner went silent is granted again, as queues do with any job.
    ApplyAgain,
    /// A grant overwrites what has happened since it was decided: no compare-and-swap.
    BlindGrant,
    /// A code without an answer is sent again, as SDKs do.
    CodeTwice,
    /// The runner executes before its record of that is durable.
    ExecUnsynced,
}

/// One thing that goes wrong.
#[derive(Clone, Debug)]
pub(crate) enum Fault {
    /// Nothing passes between a host and the control plane; both sides hold half-open
    /// connections.
    Cut {
        host: String,
    },
    /// Only one direction is cut.
    CutTo {
        host: String,
    },
    CutFrom {
        host: String,
    },
    /// What is sent is held back, and delivered all at once later.
    Hold {
        host: String,
    },
    /// Messages take long.
    Slow,
    /// The control plane is killed.
    CrashPlane,
    /// A build host loses power.
    CrashBuilder {
        builder: usize,
    },
    /// An agent is killed; supervisors and terraform go on.
    KillAgent {
        builder: usize,
    },
    /// A supervisor is killed; its terraform goes on.
    KillSupervisor {
        builder: usize,
    },
    /// The control plane's wall clock jumps by minutes.
    Jump {
        minutes: i64,
    },
}

/// A fault, when it begins and how long it lasts.
#[derive(Clone, Debug)]
pub(crate) struct Planned {
    pub(crate) at: Duration,
    pub(crate) lasts: Duration,
    pub(crate) fault: Fault,
}

/// How likely it is that a host crashes at one of its named moments.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rates {
    /// Before or after a commit of the control plane.
    pub(crate) commit: f64,
    /// Before or after a record of a build host.
    pub(crate) record: f64,
}

/// All that a seed decides before the start.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) builders: usize,
    /// Whether a further host has the first builder's identity.
    pub(crate) cloned: bool,
    pub(crate) rates: Rates,
    pub(crate) faults: Vec<Planned>,
    pub(crate) latency: Duration,
}

impl Plan {
    pub(crate) fn draw(chance: &Chance) -> Self {
        let builders = usize::try_from(chance.between(1, 3)).expect("small");
        let rates = Rates {
            commit: [0.0, 0.002, 0.008][chance.index(3)],
            record: [0.0, 0.01, 0.05][chance.index(3)],
        };
        let mut faults: Vec<Planned> = (0..chance.between(2, 9))
            .map(|_| Planned {
                at: chance.millis(500, 15_000),
                lasts: [chance.millis(50, 900), chance.millis(900, 7_000)][chance.index(2)],
                fault: draw_fault(chance, builders),
            })
            .collect();
        faults.sort_by_key(|planned| planned.at);
        Self {
            builders,
            cloned: chance.happens(0.1),
            rates,
            faults,
            latency: [chance.millis(10, 30), chance.millis(30, 120)][chance.index(2)],
        }
    }
}

fn draw_fault(chance: &Chance, builders: usize) -> Fault {
    let builder = chance.index(builders);
    let host = if chance.happens(0.12) { "people".to_owned() } else { builder_name(builder) };
    match chance.between(0, 13) {
        0..=2 => Fault::Cut { host },
        3 => Fault::CutTo { host },
        4 => Fault::CutFrom { host },
        5 => Fault::Hold { host },
        6 => Fault::Slow,
        7 | 8 => Fault::CrashPlane,
        9 | 10 => Fault::CrashBuilder { builder },
        11 => Fault::KillAgent { builder },
        12 => Fault::KillSupervisor { builder },
        _ => Fault::Jump { minutes: [-20, -5, 5, 20][chance.index(4)] },
    }
}

pub(crate) fn builder_name(builder: usize) -> String {
    format!("builder-{builder}")
}
