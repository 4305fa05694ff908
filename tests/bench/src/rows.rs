//! The rows, by name.

mod api;
mod build;
mod code;
mod dispatch;
mod fan_in;
mod history;
mod log_in;
mod log_out;
mod size;
mod stub_run;
mod transitions;
mod whole_run;

use crate::row::Measurement;

/// All rows, in the order of the table.
const ALL: &[Measurement] = &[
    Measurement {
        name: "whole_run",
        what: "queue → applied, against the same terraform commands bare",
        measure: |context| Box::pin(whole_run::measure(context)),
    },
    Measurement {
        name: "dispatch",
        what: "queue acknowledged → terraform started, 1 and 1,000 runners",
        measure: |context| Box::pin(dispatch::measure(context)),
    },
    Measurement {
        name: "started",
        what: "queue sent → terraform started",
        measure: |context| Box::pin(stub_run::started(context)),
    },
    Measurement {
        name: "result",
        what: "queue sent → end known, for a terraform that exits at once",
        measure: |context| Box::pin(stub_run::result(context)),
    },
    Measurement {
        name: "code",
        what: "code submitted → plan leased",
        measure: |context| Box::pin(code::measure(context)),
    },
    Measurement {
        name: "log_out",
        what: "a line written by terraform → a follower; 500 followers",
        measure: |context| Box::pin(log_out::measure(context)),
    },
    Measurement {
        name: "build",
        what: "a clean release build, and the size of each program (not with --quick)",
        measure: |context| Box::pin(build::measure(context)),
    },
    Measurement {
        name: "size",
        what: "idle memory",
        measure: |context| Box::pin(size::measure(context)),
    },
    transitions::MEASUREMENT,
    api::MEASUREMENT,
    log_in::MEASUREMENT,
    fan_in::MEASUREMENT,
    history::MEASUREMENT,
];

/// Finds the rows of these names; all, when none is named.
pub(crate) fn chosen(only: &[String]) -> anyhow::Result<Vec<Measurement>> {
    if let Some(unknown) = only.iter().find(|name| !ALL.iter().any(|row| row.name == **name)) {
        anyhow::bail!("find the row {unknown}; `--list` names all");
    }
    let wanted = |row: &&Measurement| only.is_empty() || only.iter().any(|name| name == row.name);
    Ok(ALL.iter().filter(wanted).copied().collect())
}
