//! Pools and runners, as programs and people see them.

use std::collections::BTreeMap;

use serde::Serialize;

use latchkey_proto::v1;

use crate::output::{fields, table};
use crate::words::{Word, time};

#[derive(Debug, Serialize)]
pub(crate) struct PoolView {
    pool_id: String,
    organization: String,
    pool: String,
}

impl PoolView {
    pub(crate) fn new(pool: &v1::Pool) -> PoolView {
        PoolView {
            pool_id: pool.pool_id.clone(),
            organization: pool.organization.clone(),
            pool: pool.pool.clone(),
        }
    }

    pub(crate) fn human(&self) -> String {
        crate::log_view::clean(&format!("Created the pool {}\n", self.pool))
    }
}

#[derive(Debug, Serialize)]
pub(crate) struct RunnerView {
    runner_id: String,
    name: String,
    pool: String,
    /// One word for the next four together.
    state: &'static str,
    connected: bool,
    draining: bool,
    drain_time: Option<String>,
    revoke_time: Option<String>,
    enroll_time: Option<String>,
    last_seen_time: Option<String>,
    slots: u32,
    holds: Vec<HeldView>,
    engines: Vec<EngineView>,
    labels: BTreeMap<String, String>,
    accepts: Vec<String>,
    host: Option<HostView>,
    version: Option<String>,
    fight_time: Option<String>,
}

#[derive(Debug, Serialize)]
struct HeldView {
    run_id: String,
    phase: String,
    epoch: u64,
    grant_time: Option<String>,
    start_time: Option<String>,
}

#[derive(Debug, Serialize)]
struct EngineView {
    name: String,
    version: String,
}

#[derive(Debug, Serialize)]
struct HostView {
    kernel: String,
    architecture: String,
    cpus: u32,
    memory_bytes: u64,
    isolation: Vec<String>,
    isolation_missing: Vec<String>,
}

#[derive(Debug, Serialize)]
pub(crate) struct RunnerListView {
    pub(crate) runners: Vec<RunnerView>,
}

/// Says in one word how a runner is.
fn state(runner: &v1::Runner) -> &'static str {
    let drains = runner.drain_time.is_some() || runner.draining;
    match (runner.revoke_time.is_some(), runner.connected, drains, runner.holds.is_empty()) {
        (true, _, _, _) => "revoked",
        (false, true, true, false) => "draining",
        (false, true, true, true) => "drained",
        (false, true, false, _) => "connected",
        (false, false, _, _) => "away",
    }
}

impl RunnerView {
    pub(crate) fn new(runner: &v1::Runner) -> RunnerView {
        RunnerView {
            runner_id: runner.runner_id.clone(),
            name: runner.name.clone(),
            pool: runner.pool.clone(),
            state: state(runner),
            connected: runner.connected,
            draining: runner.draining,
            drain_time: time(runner.drain_time.as_ref()),
            revoke_time: time(runner.revoke_time.as_ref()),
            enroll_time: time(runner.enroll_time.as_ref()),
            last_seen_time: time(runner.last_seen_time.as_ref()),
            slots: runner.slots,
            holds: runner
                .holds
                .iter()
                .map(|held| HeldView {
                    run_id: held.run_id.clone(),
                    phase: held.phase().snake(),
                    epoch: held.epoch,
                    grant_time: time(held.grant_time.as_ref()),
                    start_time: time(held.start_time.as_ref()),
                })
                .collect(),
            engines: runner
                .engines
                .iter()
                .map(|engine| EngineView {
                    name: engine.name.clone(),
                    version: engine.version.clone(),
                })
                .collect(),
            labels: runner.labels.clone().into_iter().collect(),
            accepts: runner.accepts().map(Word::snake).collect(),
            host: runner.host.as_ref().map(|host| HostView {
                kernel: host.kernel.clone(),
                architecture: host.architecture.clone(),
                cpus: host.cpus,
                memory_bytes: host.memory_bytes,
                isolation: host.isolation.clone(),
                isolation_missing: host.isolation_missing.clone(),
            }),
            version: Some(runner.version.clone()).filter(|version| !version.is_empty()),
            fight_time: time(runner.fight_time.as_ref()),
        }
    }

    pub(crate) fn human(&self) -> String {
        let some = |time: &Option<String>| time.clone().unwrap_or_default();
        let takes = match self.accepts.as_slice() {
            [one] if one == "plan" => "plans only",
            [one] if one == "apply" => "applies only",
            _ => "plans and applies",
        };
        let host = self.host.as_ref();
        let size = |host: &HostView| {
            let gib = host.memory_bytes as f64 / f64::from(1 << 30);
            format!("{} CPUs, {gib:.1} GiB", host.cpus)
        };
        let mut text = crate::log_view::clean(&format!("Runner {}\n", self.name));
        text.push_str(&fields(&[
            ("state", self.state.to_owned()),
            ("pool", self.pool.clone()),
            ("busy", format!("{}/{}", self.holds.len(), self.slots)),
            ("takes", takes.to_owned()),
            ("engines", self.engines()),
            ("labels", labels(&self.labels)),
            ("version", some(&self.version)),
            ("kernel", host.map(|host| host.kernel.clone()).unwrap_or_default()),
            ("architecture", host.map(|host| host.architecture.clone()).unwrap_or_default()),
            ("size", host.map(size).unwrap_or_default()),
            ("isolation", host.map(|host| host.isolation.join(", ")).unwrap_or_default()),
            (
                "not isolated",
                host.map(|host| host.isolation_missing.join(", ")).unwrap_or_default(),
            ),
            ("enrolled", some(&self.enroll_time)),
            ("last seen", some(&self.last_seen_time)),
            ("drained since", some(&self.drain_time)),
            ("revoked", some(&self.revoke_time)),
            ("id", self.runner_id.clone()),
        ]));
        if !self.holds.is_empty() {
            let rows = self.holds.iter().map(|held| {
                let started = held.start_time.clone().unwrap_or_else(|| "not yet".to_owned());
                let granted = held.grant_time.clone().unwrap_or_default();
                vec![held.run_id.clone(), held.phase.clone(), granted, started]
            });
            text.push('\n');
            text.push_str(&table(&["HOLDS", "PHASE", "SINCE", "STARTED"], rows.collect(), ""));
        }
        if let Some(at) = &self.fight_time {
            text.push_str(&format!(
                "\nwarning: at {at} two programs fought over this runner's identity, as copies of \
                 one host do. Revoke it, and enroll each host by itself.\n"
            ));
        }
        text
    }

    fn engines(&self) -> String {
        let engine = |engine: &EngineView| match engine.version.as_str() {
            "*" => format!("{} of any version", engine.name),
            version => format!("{} {version}", engine.name),
        };
        self.engines.iter().map(engine).collect::<Vec<_>>().join(", ")
    }
}

/// Writes labels as flags take them.
pub(crate) fn labels(labels: &BTreeMap<String, String>) -> String {
    let pairs = labels.iter().map(|(name, value)| format!("{name}={value}"));
    pairs.collect::<Vec<_>>().join(", ")
}

impl RunnerListView {
    pub(crate) fn human(&self) -> String {
        let rows = self
            .runners
            .iter()
            .map(|runner| {
                vec![
                    runner.name.clone(),
                    runner.pool.clone(),
                    runner.state.to_owned(),
                    format!("{}/{}", runner.holds.len(), runner.slots),
                    runner.engines(),
                    labels(&runner.labels),
                    runner.last_seen_time.clone().unwrap_or_default(),
                    runner.runner_id.clone(),
                ]
            })
            .collect();
        let names = ["RUNNER", "POOL", "STATE", "BUSY", "ENGINES", "LABELS", "LAST SEEN", "ID"];
        table(&names, rows, "no runners yet; `latchkey pool token NAME` makes a token for one")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runner() -> v1::Runner {
        v1::Runner {
            runner_id: "r-1".into(),
            name: "builder".into(),
            pool: "build".into(),
            connected: true,
            slots: 2,
            holds: vec![v1::HeldJob {
                run_id: "run-1".into(),
                phase: v1::Phase::Apply.into(),
                epoch: 3,
                grant_time: Some(prost_types::Timestamp { seconds: 1_767_225_600, nanos: 0 }),
                start_time: None,
            }],
            engines: vec![v1::Engine { name: "tofu".into(), version: "*".into() }],
            labels: [("gpu".into(), "yes".into())].into(),
            accepts: vec![v1::Phase::Apply.into()],
            host: Some(v1::HostFacts {
                kernel: "Linux\u{1b}[2J 6.1".into(),
                cpus: 4,
                memory_bytes: 8 << 30,
                isolation: vec!["no core dumps".into()],
                isolation_missing: vec!["Landlock".into()],
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    #[test]
    fn a_runner_is_shown_with_all_that_it_told() {
        let text = RunnerView::new(&runner()).human();
        let words = text.split_whitespace().collect::<Vec<_>>().join(" ");
        for part in [
            "state connected",
            "busy 1/2",
            "takes applies only",
            "engines tofu of any version",
            "labels gpu=yes",
            "kernel Linux 6.1",
            "size 4 CPUs, 8.0 GiB",
            "not isolated Landlock",
            "run-1 apply 2026-01-01T00:00:00Z not yet",
        ] {
            assert!(words.contains(part), "{part:?} in {text}");
        }
    }

    #[test]
    fn one_word_says_how_a_runner_is() {
        #[track_caller]
        fn check(runner: v1::Runner, word: &str) {
            assert_eq!(RunnerView::new(&runner).state, word);
        }
        let at = Some(prost_types::Timestamp::default());
        check(v1::Runner { connected: false, ..runner() }, "away");
        check(v1::Runner { drain_time: at, ..runner() }, "draining");
        check(v1::Runner { draining: true, holds: vec![], ..runner() }, "drained");
        check(v1::Runner { revoke_time: at, ..runner() }, "revoked");
    }

    #[test]
    fn programs_get_stable_names() {
        let json = serde_json::to_value(RunnerView::new(&runner())).unwrap();
        assert_eq!(json["holds"][0]["phase"], "apply");
        assert_eq!(json["labels"]["gpu"], "yes");
        assert_eq!(json["accepts"][0], "apply");
        assert_eq!(json["host"]["isolation_missing"][0], "Landlock");
    }

    #[test]
    fn a_fight_is_a_warning() {
        let at = Some(prost_types::Timestamp::default());
        let text = RunnerView::new(&v1::Runner { fight_time: at, ..runner() }).human();
        assert!(text.contains("warning: at 1970-01-01T00:00:00Z two programs"), "{text}");
    }
}
