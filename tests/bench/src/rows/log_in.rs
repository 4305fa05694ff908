//! `log_in`: logs from runners to the disk, beside a bare stream that is written and synced, and
//! beside the disk alone.

use std::fs::File;
use std::io::Write;
use std::time::{Duration, Instant};

use latchkey_harness::Configuration;
use latchkey_proto::v1;
use latchkey_proto::v1::runner_service_client::RunnerServiceClient;
use tokio::task::JoinSet;
use tonic::transport::Channel;

use crate::bare::Bare;
use crate::bed::Bed;
use crate::row::{Budget, Context, Figure, Limit, Measurement, Row};
use latchkey_harness::simulated_runner::{Identity, SimulatedRunner, append_log};

pub(crate) const MEASUREMENT: Measurement = Measurement {
    name: "log_in",
    what: "durable bytes of logs per second, 1 and 100 runs at once",
    measure: |context| Box::pin(measure(context)),
};

/// Messages of a quarter MiB.
const QUARTERS: u64 = 4;
const MANY: usize = 100;

type Stream = (RunnerServiceClient<Channel>, v1::LeaseRef);

async fn measure(context: &Context) -> anyhow::Result<Vec<Row>> {
    let bed = Bed::start().await?;
    let bare = Bare::start(bed.plane.ca_file()).await?;
    let environments = bed.environments(MANY + 1).await?;
    let identities = bed.enroll(MANY + 1).await?;
    let main = r#"resource "terraform_data" "one" {}"#;
    let archive = Configuration::of(&[("main.tf", main)]);
    let digest = bed.owner.upload(&environments[0], &archive).await?;
    let disk = disk_alone(bed.directory.path(), context.pick(64, 256) as u64)?;

    let mut free = identities.into_iter().zip(&environments);
    let mut rows = Vec::new();
    for (streams, mebibytes) in [(1, context.pick(48, 192)), (MANY, context.pick(1, 4))] {
        let messages = mebibytes as u64 * QUARTERS;
        let (identities, environments): (Vec<_>, Vec<_>) = free.by_ref().take(streams).unzip();
        let started = start_all(&bed, identities, environments, &digest).await?;
        let ours =
            started.iter().map(|(runner, lease)| (runner.client.clone(), lease.clone())).collect();
        let mut theirs = Vec::new();
        for _ in 0..streams {
            let channel = bare.listener.endpoint(None)?.connect().await?;
            theirs.push((RunnerServiceClient::new(channel), v1::LeaseRef::default()));
        }
        let limit = append_all(theirs, messages).await?;
        let figure = append_all(ours, messages).await?;
        rows.push(Row {
            name: format!("log_in, {streams} runs"),
            figure,
            limit: Some(Limit { what: "bare tonic stream, fdatasync", figure: limit }),
            budget: Budget::RatioAtLeast(0.5),
            note: format!(
                "{streams} simulated runners, each with its TLS connection, lease and one \
                 `AppendLog` of {mebibytes} MiB in messages of 256 KiB, sent as fast as they are \
                 taken; the clock stops at the last acknowledgement, which follows an fdatasync. \
                 The limit takes the same messages on a bare server that writes what has come, \
                 syncs once, answers. The disk alone, sequential writes of 256 KiB with an \
                 fdatasync each: {}; with one at the end: {}. Every log is a file with syncs of \
                 its own: 10 times the runs share the same bytes per second in 10 times the \
                 syncs, which a disk with slow syncs feels first; a log's length changes \
                 nothing.",
                disk.0, disk.1
            ),
        });
    }
    Ok(rows)
}

/// Connects runners with a slot each, and brings a plan per environment as far as its log.
async fn start_all(
    bed: &Bed,
    identities: Vec<Identity>,
    environments: Vec<&String>,
    digest: &str,
) -> anyhow::Result<Vec<(SimulatedRunner, v1::LeaseRef)>> {
    let listener = bed.listener()?;
    let mut starting = JoinSet::new();
    for identity in identities {
        let mut runner = SimulatedRunner::connect(&listener, &identity, 1).await?;
        starting.spawn(async move {
            let (lease, _) = runner.offer().await?;
            runner.start(&lease).await?;
            anyhow::Ok((runner, lease))
        });
    }
    for environment in environments {
        bed.owner.runs().queue_run(Bed::queue(environment, digest)).await?;
    }
    let mut started = Vec::new();
    while let Some(one) = starting.join_next().await {
        started.push(one??);
    }
    Ok(started)
}

async fn append_all(streams: Vec<Stream>, messages: u64) -> anyhow::Result<Figure> {
    let begun = Instant::now();
    let mut appending = JoinSet::new();
    for (client, lease) in streams {
        appending.spawn(append_log(client, lease, messages));
    }
    let mut bytes = 0;
    while let Some(appended) = appending.join_next().await {
        bytes += appended??;
    }
    Ok(Figure::megabytes_per_second(bytes, begun.elapsed()))
}

/// Writes a file in order: synced after every piece, and once.
fn disk_alone(directory: &std::path::Path, mebibytes: u64) -> anyhow::Result<(Figure, Figure)> {
    let piece = vec![b'x'; 256 * 1024];
    let pieces = mebibytes * QUARTERS;
    let write = |each: bool| -> anyhow::Result<Duration> {
        let path = directory.join("disk");
        let mut file = File::create(&path)?;
        let begun = Instant::now();
        for _ in 0..pieces {
            file.write_all(&piece)?;
            if each {
                file.sync_data()?;
            }
        }
        file.sync_data()?;
        let taken = begun.elapsed();
        std::fs::remove_file(path)?;
        Ok(taken)
    };
    let bytes = pieces * piece.len() as u64;
    Ok((
        Figure::megabytes_per_second(bytes, write(true)?),
        Figure::megabytes_per_second(bytes, write(false)?),
    ))
}
