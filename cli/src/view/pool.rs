//! Pools and runners, as programs and people see them.

use serde::Serialize;

use latchkey_proto::v1;

use crate::output::table;
use crate::words::time;

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
    connected: bool,
    enroll_time: Option<String>,
    last_seen_time: Option<String>,
    slots: u32,
    holds_run_ids: Vec<String>,
    engines: Vec<EngineView>,
}

#[derive(Debug, Serialize)]
struct EngineView {
    name: String,
    version: String,
}

#[derive(Debug, Serialize)]
pub(crate) struct RunnerListView {
    pub(crate) runners: Vec<RunnerView>,
}

impl RunnerView {
    pub(crate) fn new(runner: &v1::Runner) -> RunnerView {
        RunnerView {
            runner_id: runner.runner_id.clone(),
            name: runner.name.clone(),
            pool: runner.pool.clone(),
            connected: runner.connected,
            enroll_time: time(runner.enroll_time.as_ref()),
            last_seen_time: time(runner.last_seen_time.as_ref()),
            slots: runner.slots,
            holds_run_ids: runner.holds.iter().map(|held| held.run_id.clone()).collect(),
            engines: runner
                .engines
                .iter()
                .map(|engine| EngineView {
                    name: engine.name.clone(),
                    version: engine.version.clone(),
                })
                .collect(),
        }
    }
}

impl RunnerListView {
    pub(crate) fn human(&self) -> String {
        let rows = self
            .runners
            .iter()
            .map(|runner| {
                let engines: Vec<String> = runner
                    .engines
                    .iter()
                    .map(|engine| format!("{} {}", engine.name, engine.version))
                    .collect();
                vec![
                    runner.name.clone(),
                    runner.pool.clone(),
                    if runner.connected { "connected".into() } else { "away".into() },
                    format!("{}/{}", runner.holds_run_ids.len(), runner.slots),
                    engines.join(", "),
                    runner.last_seen_time.clone().unwrap_or_default(),
                    runner.runner_id.clone(),
                ]
            })
            .collect();
        let names = ["RUNNER", "POOL", "STATE", "BUSY", "ENGINES", "LAST SEEN", "ID"];
        table(&names, rows, "no runners yet; `latchkey pool token NAME` makes a token for one")
    }
}
