//! The least that a control plane in two processes can cost: one fsync, one round trip.

use std::fs::OpenOptions;
use std::io::Write;
use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context;
use latchkey_proto::v1;
use latchkey_proto::v1::run_service_client::RunServiceClient;
use tokio::net::TcpListener;
use tonic::service::Routes;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;

use crate::row::percentile;

const SAMPLES: usize = 100;

/// The middle and the slowest of what was measured.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Spread {
    pub(crate) p50: Duration,
    pub(crate) p99: Duration,
}

impl Spread {
    pub(crate) fn of(samples: &mut [Duration]) -> Self {
        Self { p50: percentile(samples, 0.5), p99: percentile(samples, 0.99) }
    }
}

/// One append of a record's size with fdatasync and one empty gRPC call, after each other, on
/// the file system of `directory`.
pub(crate) async fn fsync_and_round_trip(directory: &Path) -> anyhow::Result<Spread> {
    let mut fsyncs = fsyncs(directory).context("measure fdatasync")?;
    let mut trips = round_trips().await?;
    // Not each sorted: a slow one of both seldom meets a slow one of the other.
    let mut both: Vec<_> = fsyncs.drain(..).zip(trips.drain(..)).map(|(a, b)| a + b).collect();
    Ok(Spread::of(&mut both))
}

fn fsyncs(directory: &Path) -> std::io::Result<Vec<Duration>> {
    let mut file = OpenOptions::new().create(true).append(true).open(directory.join("physics"))?;
    (0..SAMPLES)
        .map(|_| {
            let start = Instant::now();
            file.write_all(&[7; 1024])?;
            file.sync_data()?;
            Ok(start.elapsed())
        })
        .collect()
}

/// Calls a server that has no services: the refusal is the round trip.
async fn round_trips() -> anyhow::Result<Vec<Duration>> {
    let listener = TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0))).await?;
    let address = listener.local_addr()?;
    let serving = Server::builder()
        .add_routes(Routes::default())
        .serve_with_incoming(TcpIncoming::from(listener).with_nodelay(Some(true)));
    let serving = tokio::spawn(serving);
    let mut client = RunServiceClient::connect(format!("http://{address}"))
        .await
        .context("connect to a bare server")?;
    let mut trips = Vec::new();
    for _ in 0..SAMPLES {
        let start = Instant::now();
        let refused = client.get_run(v1::GetRunRequest::default()).await;
        trips.push(start.elapsed());
        anyhow::ensure!(
            refused.is_err_and(|status| status.code() == tonic::Code::Unimplemented),
            "get the answer of a bare server"
        );
    }
    serving.abort();
    Ok(trips)
}
