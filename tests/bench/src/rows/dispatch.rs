//! Queue acknowledged → terraform process started, with one runner and among many.

use std::time::Duration;

use crate::physics::{self, Spread};
use crate::row::{Budget, Context, Figure, Limit, Row};
use crate::simulated_runners::SimulatedRunners;
use crate::timed_runs::StubStage;

const LIMIT: &str = "one fdatasync and one bare gRPC round trip";

pub(crate) async fn measure(context: &Context) -> anyhow::Result<Vec<Row>> {
    let count = context.pick(20, 200);
    let others = context.pick(300, 1000);
    let stage = StubStage::start().await?;
    let alone = sample(&stage, count).await?;
    let limit_alone = physics::fsync_and_round_trip(stage.stage.directory()).await?;
    drop(stage);

    let stage = StubStage::start().await?;
    let simulated = SimulatedRunners::connect(&stage.stage, others).await?;
    let crowd = sample(&stage, count).await?;
    let limit_crowd = physics::fsync_and_round_trip(stage.stage.directory()).await?;
    drop(simulated);

    let how = "QueueRun answered → the first instruction of a stub terraform, which is this \
               executable under another name, so about 2 ms of it are fork and exec; one run \
               after the other, plan only";
    let alone_note = format!(
        "{count} runs. {how}. The path is the same for any number of stored runs; with 10 or 100 \
         runs queued at once on one host they share its cores, and each waits for those before it"
    );
    let crowd_note = format!(
        "{count} runs. {how}. Besides the runner that executes, {others} of the same pool are \
         connected over TLS and beat from the bench's own process on the same cores. Every open \
         job is matched against every runner of the control plane and every lease, so the cost \
         of a match grows as runners times leases: small at 1,000 idle ones, and what has to be \
         indexed first at 10,000 busy ones"
    );
    let among = format!("{} runners", others + 1);
    let mut rows = rows("1 runner", alone, limit_alone, &alone_note);
    rows.extend(self::rows(&among, crowd, limit_crowd, &crowd_note));
    Ok(rows)
}

async fn sample(stage: &StubStage, count: usize) -> anyhow::Result<Spread> {
    let plans = stage.plans(count).await?;
    let mut waits: Vec<Duration> =
        plans.iter().map(|plan| plan.started.since(plan.acknowledged)).collect();
    Ok(Spread::of(&mut waits))
}

fn rows(among: &str, spread: Spread, limit: Spread, note: &str) -> Vec<Row> {
    let row = |name: &str, figure, limit, most| Row {
        name: format!("dispatch, {among}, {name}"),
        figure: Figure::millis(figure),
        limit: Some(Limit { what: LIMIT, figure: Figure::millis(limit) }),
        budget: Budget::BeyondLimitAtMost(most),
        note: note.to_owned(),
    };
    vec![row("p50", spread.p50, limit.p50, 10.0), row("p99", spread.p99, limit.p99, 40.0)]
}
