//! The two streams that a person follows, a run and a phase's log, each read by a task that
//! connects again whenever the connection breaks: the run is answered whole again, the log goes on
//! at the byte where it stopped.

use std::time::Duration;

use tokio::sync::mpsc::{Receiver, Sender, channel};
use tokio::time::{Instant, sleep};
use tonic::Status;

use latchkey_proto::v1;
use latchkey_proto::v1::Phase;

use crate::client::{Backoff, Client};
use crate::failure::{Failure, is_worth_repeating};
use crate::words::end_of;

/// A broken connection is mended for this long before it is a failure.
const LONGEST_OUTAGE: Duration = Duration::from_secs(600);

#[derive(Debug)]
pub(crate) enum Update<T> {
    Item(T),
    /// The connection broke; it is being made again.
    Trouble(String),
    /// Nothing follows.
    Failed(Failure),
}

/// Follows a run until it has ended. The receiver closes then.
pub(crate) fn watch_run(client: &Client, run_id: &str) -> Receiver<Update<v1::Run>> {
    let (sender, receiver) = channel(16);
    let (client, run_id) = (client.clone(), run_id.to_owned());
    tokio::spawn(async move {
        let mut outage = Outage::new();
        loop {
            let read = read_run(&client, &run_id, &sender, &mut outage);
            let result = tokio::select! {
                result = read => result,
                () = sender.closed() => return,
            };
            match result {
                Ok(Stream::Over) => return,
                Ok(Stream::Cut) => sleep(outage.backoff.next()).await,
                Err(status) => match outage.mend(&client, &sender, status).await {
                    Mended::Again => {}
                    Mended::Never => return,
                },
            }
        }
    });
    receiver
}

/// Whether a log is read to what is there, or to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Until {
    Now,
    Finished,
}

/// Reads a phase's log from its begin. The receiver closes when nothing follows.
pub(crate) fn read_log(
    client: &Client,
    run_id: &str,
    phase: Phase,
    until: Until,
) -> Receiver<Update<Vec<u8>>> {
    let (sender, receiver) = channel(16);
    let (client, run_id) = (client.clone(), run_id.to_owned());
    tokio::spawn(async move {
        let mut outage = Outage::new();
        let mut request = v1::ReadLogRequest {
            run_id,
            phase: phase.into(),
            offset: 0,
            follow: until == Until::Finished,
        };
        loop {
            let read = read_bytes(&client, &mut request, &sender, &mut outage);
            let result = tokio::select! {
                result = read => result,
                () = sender.closed() => return,
            };
            match result {
                Ok(()) => return,
                Err(status) => match outage.mend(&client, &sender, status).await {
                    Mended::Again => {}
                    Mended::Never => return,
                },
            }
        }
    });
    receiver
}

enum Stream {
    Over,
    /// Ended by the control plane although the run goes on: it is stopping.
    Cut,
}

async fn read_run(
    client: &Client,
    run_id: &str,
    sender: &Sender<Update<v1::Run>>,
    outage: &mut Outage,
) -> Result<Stream, Status> {
    let request = v1::WatchRunRequest { run_id: run_id.to_owned() };
    let mut stream = client.runs().watch_run(request).await?.into_inner();
    while let Some(answer) = stream.message().await? {
        outage.over();
        let Some(run) = answer.run else { continue };
        let ended = end_of(run.state()).is_some();
        if sender.send(Update::Item(run)).await.is_err() || ended {
            return Ok(Stream::Over);
        }
    }
    Ok(Stream::Cut)
}

async fn read_bytes(
    client: &Client,
    request: &mut v1::ReadLogRequest,
    sender: &Sender<Update<Vec<u8>>>,
    outage: &mut Outage,
) -> Result<(), Status> {
    let mut stream = client.runs().read_log(request.clone()).await?.into_inner();
    while let Some(answer) = stream.message().await? {
        outage.over();
        let mut data = answer.data;
        let end = answer.offset + data.len() as u64;
        // What was shown is not shown again.
        let seen = request.offset.saturating_sub(answer.offset).min(data.len() as u64);
        data.drain(..seen as usize);
        request.offset = request.offset.max(end);
        if !data.is_empty() && sender.send(Update::Item(data)).await.is_err() {
            return Ok(());
        }
    }
    Ok(())
}

/// How long the connection has been broken.
struct Outage {
    since: Option<Instant>,
    backoff: Backoff,
}

enum Mended {
    Again,
    Never,
}

impl Outage {
    fn new() -> Outage {
        Outage { since: None, backoff: Backoff::new() }
    }

    fn over(&mut self) {
        *self = Outage::new();
    }

    /// Waits before the next attempt, or gives up.
    async fn mend<T>(
        &mut self,
        client: &Client,
        sender: &Sender<Update<T>>,
        status: Status,
    ) -> Mended {
        let failure = client.failure(&status);
        let since = *self.since.get_or_insert_with(Instant::now);
        if !is_worth_repeating(&status) || since.elapsed() > LONGEST_OUTAGE {
            drop(sender.send(Update::Failed(failure)).await);
            return Mended::Never;
        }
        let first = since.elapsed() < Duration::from_millis(1);
        if first && sender.send(Update::Trouble(failure.headline())).await.is_err() {
            return Mended::Never;
        }
        sleep(self.backoff.next()).await;
        Mended::Again
    }
}
