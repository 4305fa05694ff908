//! What a person waits for around a terraform that takes no time.

use std::time::Duration;

use crate::physics::{self, Spread};
use crate::row::{Budget, Context, Figure, Limit, Row};
use crate::timed_runs::{Plan, StubStage};

/// Buildbot on 2 cores, from trigger to the first line of a step, in milliseconds.
const PEER_FIRST_LINE: f64 = 380.0;

/// Slurm's `srun true` on 2 cores, whole.
const PEER_WHOLE: f64 = 30.0;

/// QueueRun sent → process started.
pub(crate) async fn started(context: &Context) -> anyhow::Result<Vec<Row>> {
    let note = "QueueRun sent → the first instruction of a stub terraform. What people would use \
                instead: Buildbot, 380 ms from trigger to a step's first line. Grows as dispatch \
                does";
    measure(context, ("started", PEER_FIRST_LINE), note, |plan| plan.started.since(plan.sent)).await
}

/// QueueRun sent → result known.
pub(crate) async fn result(context: &Context) -> anyhow::Result<Vec<Row>> {
    let note = "QueueRun sent → a watcher of the run has its end. Plan only, with a stub that \
                exits at once and is started four times: init, plan, and show twice. The archive \
                is fetched, the directory sealed and uploaded, the log made durable on both \
                sides. The budget is Slurm's `srun true`, about 30 ms whole, which starts one \
                process and keeps nothing; Buildbot takes 560 ms. Grows with the bytes of \
                archive, log and plan, not with what is stored";
    measure(context, ("result", PEER_WHOLE), note, |plan| plan.result.since(plan.sent)).await
}

async fn measure(
    context: &Context,
    (name, budget): (&str, f64),
    note: &str,
    took: impl Fn(&Plan) -> Duration,
) -> anyhow::Result<Vec<Row>> {
    let count = context.pick(15, 200);
    let stage = StubStage::start().await?;
    let plans = stage.plans(count).await?;
    let mut samples: Vec<Duration> = plans.iter().map(took).collect();
    let spread = Spread::of(&mut samples);
    let limit = physics::fsync_and_round_trip(stage.stage.directory()).await?;
    let row = |quantile: &str, figure, limit, budget| Row {
        name: format!("{name}, {quantile}"),
        figure: Figure::millis(figure),
        limit: Some(Limit {
            what: "one fdatasync and one bare gRPC round trip",
            figure: Figure::millis(limit),
        }),
        budget,
        note: format!("{count} runs, one after the other. {note}. {}", steps(&plans)),
    };
    Ok(vec![
        row("p50", spread.p50, limit.p50, Budget::FigureAtMost(budget)),
        row("p99", spread.p99, limit.p99, Budget::None),
    ])
}

/// Where the time goes, in the middle.
fn steps(plans: &[Plan]) -> String {
    let middle = |step: fn(&Plan) -> Duration| {
        let mut samples: Vec<Duration> = plans.iter().map(step).collect();
        Spread::of(&mut samples).p50.as_secs_f64() * 1e3
    };
    format!(
        "Medians: queued {:.1} ms, to init {:.1} ms, to plan {:.1} ms, to show {:.1} ms, to the \
         result known {:.1} ms",
        middle(|plan| plan.acknowledged.since(plan.sent)),
        middle(|plan| plan.started.since(plan.acknowledged)),
        middle(|plan| plan.plan.since(plan.started)),
        middle(|plan| plan.show.since(plan.plan)),
        middle(|plan| plan.result.since(plan.show)),
    )
}
