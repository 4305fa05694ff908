//! How far an apply has come, as a table and as JSON.

use serde::Serialize;

use crate::log_view::clean;
use crate::output::table;
use crate::progress::{Progress, Step};
use crate::words::human_duration;

#[derive(Debug, Serialize)]
pub(crate) struct ProgressView {
    resources: Vec<ResourceView>,
    done: usize,
    failed: usize,
    under_way: usize,
    waiting: usize,
}

#[derive(Debug, Serialize)]
struct ResourceView {
    address: String,
    action: String,
    state: &'static str,
    elapsed_seconds: u64,
}

impl ProgressView {
    pub(crate) fn new(progress: &Progress) -> ProgressView {
        let resources = progress.resources().iter().map(|one| ResourceView {
            address: one.address.clone(),
            action: one.action.clone(),
            state: match one.step {
                Step::Waiting => "waiting",
                Step::UnderWay => "under_way",
                Step::Done => "done",
                Step::Failed => "failed",
            },
            elapsed_seconds: one.elapsed,
        });
        ProgressView {
            resources: resources.collect(),
            done: progress.count(Step::Done),
            failed: progress.count(Step::Failed),
            under_way: progress.count(Step::UnderWay),
            waiting: progress.count(Step::Waiting),
        }
    }

    pub(crate) fn human(&self) -> String {
        let rows = self.resources.iter().map(|one| {
            let elapsed = match one.state {
                "waiting" => String::new(),
                _ => human_duration(i64::try_from(one.elapsed_seconds).unwrap_or(i64::MAX)),
            };
            let state = one.state.replace('_', " ");
            vec![clean(&one.address), clean(&one.action), state, elapsed]
        });
        let listed = table(&["RESOURCE", "ACTION", "STATE", "TIME"], rows.collect(), "no changes");
        format!(
            "{listed}{} done, {} failed, {} under way, {} waiting\n",
            self.done, self.failed, self.under_way, self.waiting
        )
    }
}
