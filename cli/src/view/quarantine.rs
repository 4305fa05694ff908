//! What is in quarantine, as programs and people see it.

use serde::Serialize;

use latchkey_proto::v1;

use crate::log_view::clean;
use crate::output::{fields, table};
use crate::view::state::StateDiffView;
use crate::words::{Word, human_time, time};

#[derive(Debug, Serialize)]
pub(crate) struct QuarantinedView {
    quarantined_id: String,
    run_id: String,
    phase: String,
    epoch: u64,
    generation: u64,
    kind: String,
    digest: String,
    size: u64,
    runner_id: String,
    create_time: Option<String>,
    lineage: Option<String>,
    serial: Option<u64>,
    summary: String,
    #[serde(flatten)]
    pub(crate) content: Content,
    #[serde(skip)]
    human_time: String,
}

/// What is shown of the thing itself, where one is shown.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Content {
    /// From the current state to the quarantined one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) diff: Option<StateDiffView>,
    /// The last lines of a log.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) log: Option<Vec<String>>,
}

#[derive(Debug, Serialize)]
pub(crate) struct QuarantinedListView {
    pub(crate) quarantined: Vec<QuarantinedView>,
}

#[derive(Debug, Serialize)]
pub(crate) struct AcceptedView {
    state_lineage: String,
    state_serial: u64,
}

impl QuarantinedView {
    pub(crate) fn new(found: &v1::Quarantined) -> QuarantinedView {
        let lineage = Some(found.lineage.clone()).filter(|lineage| !lineage.is_empty());
        QuarantinedView {
            quarantined_id: found.quarantined_id.clone(),
            run_id: found.run_id.clone(),
            phase: found.phase().snake(),
            epoch: found.epoch,
            generation: found.generation,
            kind: found.kind().snake(),
            digest: found.digest.clone(),
            size: found.size,
            runner_id: found.runner_id.clone(),
            create_time: time(found.create_time.as_ref()),
            serial: lineage.is_some().then_some(found.serial),
            lineage,
            summary: found.summary.clone(),
            content: Content::default(),
            human_time: human_time(found.create_time.as_ref()),
        }
    }

    pub(crate) fn human(&self) -> String {
        let lease = format!("{}, lease {}", self.phase, self.epoch);
        let state = match (&self.lineage, self.serial) {
            (Some(lineage), Some(serial)) => format!("serial {serial} of {lineage}"),
            (None, _) | (_, None) => String::new(),
        };
        let mut text = clean(&format!("Quarantined {}\n", self.quarantined_id));
        text.push_str(&fields(&[
            ("what", self.kind.replace('_', " ")),
            ("summary", self.summary.clone()),
            ("state", state),
            ("run", self.run_id.clone()),
            ("phase", lease),
            ("runner", self.runner_id.clone()),
            ("came", self.human_time.clone()),
            ("size", format!("{} bytes", self.size)),
            ("digest", self.digest.clone()),
        ]));
        if let Some(diff) = &self.content.diff {
            text.push_str("\nFrom the current state to this one:\n");
            text.push_str(&diff.human());
        }
        if let Some(log) = &self.content.log {
            text.push_str("\nThe end of its log:\n");
            log.iter().for_each(|line| text.push_str(&format!("{line}\n")));
        }
        text
    }
}

impl QuarantinedListView {
    pub(crate) fn human(&self) -> String {
        let rows = self
            .quarantined
            .iter()
            .map(|found| {
                vec![
                    found.quarantined_id.clone(),
                    found.run_id.clone(),
                    found.phase.clone(),
                    found.kind.replace('_', " "),
                    found.human_time.clone(),
                    found.summary.clone(),
                ]
            })
            .collect();
        table(&["ID", "RUN", "PHASE", "WHAT", "CAME", "SUMMARY"], rows, "nothing is in quarantine")
    }
}

impl AcceptedView {
    pub(crate) fn new(accepted: &v1::AcceptStateResponse) -> AcceptedView {
        AcceptedView {
            state_lineage: accepted.state_lineage.clone(),
            state_serial: accepted.state_serial,
        }
    }

    pub(crate) fn human(&self) -> String {
        let AcceptedView { state_lineage, state_serial } = self;
        clean(&format!("The environment's state is now serial {state_serial} of {state_lineage}\n"))
    }
}

#[derive(Debug, Serialize)]
pub(crate) struct SettledView {
    /// What was made current; absent where nothing was.
    state: Option<AcceptedView>,
    dropped: u32,
    unfrozen: bool,
}

impl SettledView {
    pub(crate) fn new(settled: &v1::SettleQuarantineResponse) -> SettledView {
        let state = AcceptedView {
            state_lineage: settled.state_lineage.clone(),
            state_serial: settled.state_serial,
        };
        SettledView {
            state: Some(state).filter(|state| !state.state_lineage.is_empty()),
            dropped: settled.dropped,
            unfrozen: settled.unfrozen,
        }
    }

    pub(crate) fn human(&self) -> String {
        let mut text = self.state.as_ref().map(AcceptedView::human).unwrap_or_default();
        text.push_str(&format!("Dropped: {}\n", self.dropped));
        text.push_str(match self.unfrozen {
            true => "The environment is no longer frozen\n",
            false => "No freeze was lifted\n",
        });
        text
    }
}
