//! How big the programs are, idle in memory.

use std::time::Duration;

use anyhow::Context as _;

use crate::observed::resident;
use crate::row::{Budget, Context, Figure, Row};
use crate::timed_runs::StubStage;

pub(crate) async fn measure(context: &Context) -> anyhow::Result<Vec<Row>> {
    let stage = StubStage::start().await?;
    // Once it has worked, it has what it keeps.
    stage.plans(context.pick(2, 20)).await?;
    tokio::time::sleep(Duration::from_millis(500)).await;
    let stage = &stage.stage;
    let mut rows = Vec::new();
    let plane = stage.plane.process().context("find the control plane")?.pid();
    let runner = stage.runners.first().and_then(|runner| runner.process());
    let runner = runner.context("find the runner")?.pid();
    rows.push(memory(
        "control plane",
        resident(plane.as_raw_nonzero().get())?,
        "Grows with connected runners and open jobs, which are in memory (see fan-in), and \
         with the store's cache, which has a bound; not with finished runs (see history)",
    ));
    rows.push(memory(
        "runner",
        resident(runner.as_raw_nonzero().get())?,
        "One agent per build host. A job adds a supervisor of about the same size beside its \
         terraform, which is larger by far",
    ));
    Ok(rows)
}

fn memory(name: &str, bytes: u64, growth: &str) -> Row {
    Row {
        name: format!("size, {name}, idle memory"),
        figure: Figure::mebibytes(bytes as f64),
        limit: None,
        budget: Budget::None,
        note: format!(
            "VmRSS half a second after its last of a few runs, of the executable that holds every \
             program; pages of code that were touched count. {growth}"
        ),
    }
}
