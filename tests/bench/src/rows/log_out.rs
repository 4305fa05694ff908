//! From terraform's write to whoever follows the log.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Context as _;
use latchkey_harness::{Person, Stage, is_ended};
use latchkey_proto::v1::{self, Phase, RunKind};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

use crate::clock::Moment;
use crate::physics::{self, Spread};
use crate::row::{Budget, Context, Figure, Limit, Row};
use crate::stub::{self, Script};
use crate::timed_runs::{StubStage, watch};

const FOLLOWERS: usize = 500;

/// Of the followers: the control plane allows 256 streams on each.
const CONNECTIONS: usize = 10;

pub(crate) async fn measure(context: &Context) -> anyhow::Result<Vec<Row>> {
    let stage = StubStage::start().await?;
    let mut rows = latency(context, &stage).await?;
    rows.push(fan_out(context, &stage).await?);
    Ok(rows)
}

async fn latency(context: &Context, stage: &StubStage) -> anyhow::Result<Vec<Row>> {
    let count = context.pick(200, 2000);
    let owner = &stage.stage.owner;
    let prepared = stage.prepared("ticks").await?;
    // No multiple of what anything here is polled with.
    stage.stub.play(Script::Ticks { count, pause: Duration::from_micros(7_300) })?;
    let run = prepared.queue(owner, RunKind::PlanOnly).await?;
    let mut log = follow(owner, &run.run_id).await?;
    let (mut samples, mut text) = (Vec::new(), String::new());
    while let Some(piece) = log.message().await.context("follow a log")? {
        let now = Moment::now();
        text.push_str(&String::from_utf8_lossy(&piece.data));
        let whole = text.rfind('\n').map_or(0, |end| end + 1);
        let lines: String = text.drain(..whole).collect();
        samples.extend(stub::ticks(&lines).map(|printed| now.since(printed)));
    }
    anyhow::ensure!(samples.len() == count, "follow {count} lines: {} came", samples.len());
    watch(owner, &run.run_id, is_ended).await?;
    stage.stub.play(Script::Nothing)?;
    let spread = Spread::of(&mut samples);
    let limit = physics::fsync_and_round_trip(stage.stage.directory()).await?;
    let note = format!(
        "{count} lines, one every 7.3 ms, each with the moment of its write → ReadLog with \
         `follow` has it. On the way the line is masked and made durable on the build host, \
         shipped, and made durable again: two fsyncs and two hops, the limit has one of each. \
         With more lines per second a message carries more of them; runs beside it share fsyncs"
    );
    let row = |quantile: &str, figure, limit, budget| Row {
        name: format!("log out, {quantile}"),
        figure: Figure::millis(figure),
        limit: Some(Limit {
            what: "one fdatasync and one bare gRPC round trip",
            figure: Figure::millis(limit),
        }),
        budget,
        note: note.clone(),
    };
    Ok(vec![
        row("p50", spread.p50, limit.p50, Budget::None),
        row("p99", spread.p99, limit.p99, Budget::FigureAtMost(50.0)),
    ])
}

async fn follow(
    owner: &Person,
    run_id: &str,
) -> anyhow::Result<tonic::Streaming<v1::ReadLogResponse>> {
    let request = v1::ReadLogRequest {
        run_id: run_id.to_owned(),
        phase: Phase::Plan.into(),
        offset: 0,
        follow: true,
    };
    Ok(owner.runs().read_log(request).await.context("follow a log")?.into_inner())
}

async fn fan_out(context: &Context, stage: &StubStage) -> anyhow::Result<Row> {
    let bytes = context.pick(512 << 10, 4 << 20);
    let owner = &stage.stage.owner;
    let prepared = stage.prepared("bulk").await?;
    stage.stub.play(Script::Bulk { bytes })?;
    let run = prepared.queue(owner, RunKind::PlanOnly).await?;
    let mut people = Vec::new();
    for _ in 0..CONNECTIONS {
        let plane = &stage.stage.plane;
        people.push(Person::with_token(plane, Stage::ORGANIZATION, Stage::OWNER, owner.token())?);
    }
    let mut followers = JoinSet::new();
    for number in 0..FOLLOWERS {
        let mut log = follow(&people[number % CONNECTIONS], &run.run_id).await?;
        followers.spawn(async move {
            let mut received = 0;
            while received < bytes {
                let piece = log.message().await?.context("follow a log to its end")?;
                received += piece.data.len();
            }
            anyhow::Ok(Moment::now())
        });
    }
    let start = Moment::now();
    stage.stub.release()?;
    let mut last = start;
    while let Some(end) = followers.join_next().await {
        last = last.max(end??);
    }
    watch(owner, &run.run_id, is_ended).await?;
    stage.stub.play(Script::Nothing)?;
    let total = (bytes * FOLLOWERS) as u64;
    let copied = loopback_copy(total).await.context("copy over loopback")?;
    Ok(Row {
        name: format!("log out, {FOLLOWERS} followers"),
        figure: Figure::megabytes_per_second(total, last.since(start)),
        limit: Some(Limit {
            what: "the same bytes over plain TCP on loopback",
            figure: Figure::megabytes_per_second(total, copied),
        }),
        budget: Budget::None,
        note: format!(
            "A log of {:.1} MB, printed at once by terraform and read by {FOLLOWERS} live \
             followers over {CONNECTIONS} TLS connections; both ends of each, with encryption and \
             decryption, on the same cores. The limit is {CONNECTIONS} plain TCP connections. \
             The time is that of the last follower, with the log's way in. Grows with followers \
             times bytes: at 5,000 followers the network card is the limit, and a second reader \
             of the same log would be split off first",
            bytes as f64 / 1e6
        ),
    })
}

/// Sends so many bytes through as many connections as the followers had.
async fn loopback_copy(total: u64) -> anyhow::Result<Duration> {
    let each = total / CONNECTIONS as u64;
    let listener = TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0))).await?;
    let address = listener.local_addr()?;
    let start = std::time::Instant::now();
    let mut ends = JoinSet::new();
    for _ in 0..CONNECTIONS {
        let mut sender = TcpStream::connect(address).await?;
        let (mut receiver, _) = listener.accept().await?;
        ends.spawn(async move {
            let block = vec![7u8; 256 << 10];
            let mut left = each;
            while left > 0 {
                let size = left.min(block.len() as u64);
                sender.write_all(&block[..usize::try_from(size).unwrap_or(0)]).await?;
                left -= size;
            }
            sender.shutdown().await
        });
        ends.spawn(async move {
            let mut block = vec![0u8; 256 << 10];
            while receiver.read(&mut block).await? > 0 {}
            Ok(())
        });
    }
    while let Some(end) = ends.join_next().await {
        end??;
    }
    Ok(start.elapsed())
}
