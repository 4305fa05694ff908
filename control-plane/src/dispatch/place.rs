//! Which runner may take which job: what a job demands, what a runner offers, and what is
//! missing when nobody has it.

use std::collections::BTreeMap;
use std::fmt;

use latchkey_domain::id::PoolId;
use latchkey_domain::policy::Phase;

/// Stands for every version: a runner that says it installs what is asked for.
const ANY: &str = "*";

/// A terraform or OpenTofu that a runner has or can have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Engine {
    pub name: String,
    pub version: String,
}

/// What a runner can take.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Abilities {
    pub slots: u32,
    pub engines: Vec<Engine>,
    pub labels: BTreeMap<String, String>,
    /// Empty is both.
    pub accepts: Vec<Phase>,
}

/// The engine that a job asks for; empty parts take what the runner has.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Wanted {
    pub engine: String,
    pub version: String,
}

/// Where an open job may run.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    pub pool: PoolId,
    pub phase: Phase,
    pub labels: BTreeMap<String, String>,
    pub wanted: Wanted,
}

/// Why an open job has no runner.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Waiting {
    /// No runner of the pool is connected.
    NobodyThere,
    /// None that is connected suits; with what it lacks, as a part of a sentence.
    NobodySuits { lacking: String },
    /// All that suit are busy or draining.
    NobodyIdle,
    /// A runner is about to have it.
    Soon,
}

impl Place {
    pub fn admits(&self, pool: PoolId, abilities: &Abilities) -> bool {
        self.pool == pool && self.demands().all(|demand| demand.is_met_by(abilities))
    }

    fn demands(&self) -> impl Iterator<Item = Demand<'_>> {
        let engine = (!self.wanted.engine.is_empty()).then_some(Demand::Engine(&self.wanted));
        let labels = self.labels.iter().map(|(name, value)| Demand::Label(name, value));
        engine.into_iter().chain(labels).chain([Demand::Accepts(self.phase)])
    }

    /// Says what none of these runners of the pool has: each thing that all of them lack, or
    /// everything that is asked for, where each has some and none has all.
    pub(super) fn lacking(&self, runners: &[&Abilities]) -> String {
        let unmet: Vec<Demand<'_>> = self
            .demands()
            .filter(|demand| !runners.iter().any(|runner| demand.is_met_by(runner)))
            .collect();
        let named = if unmet.is_empty() { self.demands().collect() } else { unmet };
        let (phases, things): (Vec<_>, Vec<_>) =
            named.into_iter().partition(|demand| matches!(demand, Demand::Accepts(_)));
        let join = |parts: &[Demand<'_>]| {
            parts.iter().map(Demand::to_string).collect::<Vec<_>>().join(" and ")
        };
        match (things.is_empty(), phases.is_empty()) {
            (false, true) => format!("with {}", join(&things)),
            (false, false) => format!("with {} that takes {}", join(&things), join(&phases)),
            (true, _) => format!("that takes {}", join(&phases)),
        }
    }
}

/// One thing that a job demands of its runner.
#[derive(Clone, Copy, Debug)]
enum Demand<'a> {
    Engine(&'a Wanted),
    Label(&'a str, &'a str),
    Accepts(Phase),
}

impl Demand<'_> {
    fn is_met_by(&self, runner: &Abilities) -> bool {
        match *self {
            Demand::Engine(Wanted { engine, version }) => runner.engines.iter().any(|has| {
                has.name == *engine
                    && (version.is_empty() || has.version == *version || has.version == ANY)
            }),
            Demand::Label(name, value) => runner.labels.get(name).is_some_and(|has| has == value),
            Demand::Accepts(phase) => runner.accepts.is_empty() || runner.accepts.contains(&phase),
        }
    }
}

impl fmt::Display for Demand<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Demand::Engine(Wanted { engine, version }) if version.is_empty() => f.write_str(engine),
            Demand::Engine(Wanted { engine, version }) => write!(f, "{engine} {version}"),
            Demand::Label(name, value) => write!(f, "label {name}={value}"),
            Demand::Accepts(Phase::Plan) => f.write_str("plans"),
            Demand::Accepts(Phase::Apply) => f.write_str("applies"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const POOL: PoolId = PoolId::from_bytes([1; 16]);

    fn labels(labels: &[(&str, &str)]) -> BTreeMap<String, String> {
        labels.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect()
    }

    fn place(engine: &str, version: &str, demanded: &[(&str, &str)]) -> Place {
        Place {
            pool: POOL,
            phase: Phase::Plan,
            labels: labels(demanded),
            wanted: Wanted { engine: engine.into(), version: version.into() },
        }
    }

    fn runner(engines: &[(&str, &str)], has: &[(&str, &str)]) -> Abilities {
        let engine = |(name, version): &(&str, &str)| Engine {
            name: (*name).into(),
            version: (*version).into(),
        };
        let engines = engines.iter().map(engine).collect();
        Abilities { slots: 1, engines, labels: labels(has), accepts: vec![] }
    }

    #[test]
    fn an_engine_is_matched_by_name_and_version() {
        #[track_caller]
        fn check(wanted: (&str, &str), has: &[(&str, &str)], suits: bool) {
            let place = place(wanted.0, wanted.1, &[]);
            assert_eq!(place.admits(POOL, &runner(has, &[])), suits, "{wanted:?} of {has:?}");
        }
        check(("", ""), &[], true);
        check(("terraform", "1.9.0"), &[("terraform", "1.9.0")], true);
        check(("terraform", "1.9.0"), &[("tofu", "1.9.0")], false);
        check(("terraform", "1.9.0"), &[("terraform", "1.9.1")], false);
        check(("tofu", "1.9.0"), &[("terraform", "1.9.0"), ("tofu", "*")], true);
        check(("tofu", "1.9.0"), &[("terraform", "*")], false);
        check(("tofu", ""), &[("tofu", "1.10.0")], true);
    }

    #[test]
    fn every_demanded_label_must_be_equal() {
        let place = place("", "", &[("gpu", "yes"), ("zone", "a")]);
        let has = |labels| place.admits(POOL, &runner(&[], labels));
        assert!(has(&[("gpu", "yes"), ("zone", "a"), ("more", "x")]));
        assert!(!has(&[("gpu", "yes"), ("zone", "b")]));
        assert!(!has(&[("gpu", "yes")]));
    }

    #[test]
    fn a_runner_takes_the_phases_it_accepts() {
        let applies = Abilities { accepts: vec![Phase::Apply], ..runner(&[], &[]) };
        assert!(!place("", "", &[]).admits(POOL, &applies));
        let apply = Place { phase: Phase::Apply, ..place("", "", &[]) };
        assert!(apply.admits(POOL, &applies));
        assert!(!apply.admits(PoolId::from_bytes([2; 16]), &applies));
    }

    #[test]
    fn what_is_lacking_is_named() {
        let place = place("terraform", "1.9.0", &[("gpu", "yes")]);
        let plain = runner(&[("terraform", "1.9.0")], &[]);
        assert_eq!(place.lacking(&[&plain]), "with label gpu=yes");
        let gpu = runner(&[("tofu", "1.9.0")], &[("gpu", "yes")]);
        assert_eq!(place.lacking(&[&gpu]), "with terraform 1.9.0");
        let each = "with terraform 1.9.0 and label gpu=yes that takes plans";
        assert_eq!(place.lacking(&[&plain, &gpu]), each);
        let applies = Abilities { accepts: vec![Phase::Apply], ..plain };
        let place = Place { labels: BTreeMap::new(), ..place };
        assert_eq!(place.lacking(&[&applies]), "that takes plans");
    }
}
