//! Bulk data beside the lease stream: artifacts up and down, and logs.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use latchkey_proto::v1;
use latchkey_proto::v1::upload_artifact_request::Part;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Response, Status, Streaming};
use zeroize::Zeroizing;

use super::wire::{artifact_header, encoded_result, needed};
use crate::app::App;
use crate::app::artifacts::{Destination, Made};
use crate::app::run_output::Piece;
use crate::auth::RunnerIdentity;
use crate::error::Error;
use crate::grpc::places::Place;
use crate::grpc::{Service, convert, next_part_within, send_within, silent_for};

/// How many appends of one stream may share a sync.
const MOST_IN_ONE_SYNC: usize = 16;

impl Service {
    /// Sends what a leased job needs, part by part.
    pub(super) async fn send_artifact(
        &self,
        runner: &RunnerIdentity,
        request: v1::FetchArtifactRequest,
        place: Place,
    ) -> Result<ReceiverStream<Result<v1::FetchArtifactResponse, Status>>, Status> {
        let v1::FetchArtifactRequest { lease, kind } = request;
        let needed = needed(kind)?;
        let mut reader = self.app.fetch_artifact(runner, convert::lease(lease)?, needed).await?;
        let (sender, parts) = mpsc::channel(4);
        tokio::spawn(async move {
            loop {
                let part = match reader.next().await {
                    Ok(Some(data)) => Ok(v1::FetchArtifactResponse { data }),
                    Ok(None) => return,
                    Err(error) => Err(Error::internal(error).into()),
                };
                let failed = part.is_err();
                if send_within(place.patience(), &sender, part).await.is_err() || failed {
                    return;
                }
            }
        });
        Ok(ReceiverStream::new(parts))
    }

    pub(super) async fn take_upload(
        &self,
        runner: &RunnerIdentity,
        mut parts: Streaming<v1::UploadArtifactRequest>,
        place: &Place,
    ) -> Result<Response<v1::UploadArtifactResponse>, Status> {
        let first = next_part_within(place.patience(), &mut parts).await?;
        let header = match first.and_then(|first| first.part) {
            Some(Part::Header(header)) => artifact_header(header)?,
            Some(Part::Data(_)) | None => {
                return Err(Error::field("header", "the first message carries the header").into());
            }
        };
        let mut upload = self.app.upload_artifact(runner, header).await?;
        // It may hold outputs; its size was judged with the header.
        let size = usize::try_from(header.size).unwrap_or(0);
        let mut result =
            (header.kind == Made::Result).then(|| Zeroizing::new(Vec::with_capacity(size)));
        while let Some(message) = next_part_within(place.patience(), &mut parts).await? {
            match message.part {
                Some(Part::Data(data)) => {
                    upload.write(&data).await?;
                    if let Some(result) = &mut result {
                        result.extend_from_slice(&data);
                    }
                }
                Some(Part::Header(_)) | None => {
                    let message = "only the first message carries a header";
                    return Err(Error::field("data", message).into());
                }
            }
        }
        if let Some(result) = result {
            upload.says(&encoded_result(&result)?);
        }
        let quarantined = upload.finish().await? == Destination::Quarantine;
        Ok(Response::new(v1::UploadArtifactResponse { quarantined }))
    }
}

/// Appends what a runner sends of a job's log, and answers each chunk once it is durable. A stream
/// that brings nothing for a while is ended: when there is more, its runner goes on by offset.
pub(super) async fn append(
    app: Arc<App>,
    runner: RunnerIdentity,
    mut chunks: Streaming<v1::AppendLogRequest>,
    sender: mpsc::Sender<Result<v1::AppendLogResponse, Status>>,
    patience: Duration,
) -> Result<(), Status> {
    let Some(mut chunk) = next_part_within(patience, &mut chunks).await? else { return Ok(()) };
    let lease = convert::lease(chunk.lease.take())?;
    let appender = app.append_log(&runner, lease).await?;
    let (ahead, mut arrived) = mpsc::channel(16);
    // How many chunks are not answered yet.
    let (unanswered, answered) = watch::channel(0_usize);
    let count = &unanswered;
    let reading = async move {
        let mut next = Some(chunk);
        while let Some(chunk) = next {
            count.send_modify(|count| *count += 1);
            if ahead.send(chunk).await.is_err() {
                break;
            }
            next = unless_silent(patience, answered.clone(), chunks.message()).await?;
        }
        Ok::<(), Status>(())
    };
    let appending = async {
        let mut held = None;
        loop {
            let first = match held.take() {
                Some(chunk) => Some(chunk),
                None => arrived.recv().await,
            };
            let Some(first) = first else { return Ok::<(), Status>(()) };
            let (run, after) = contiguous(first, &mut arrived);
            held = after;
            let count = run.len();
            let durable_length = appender.append(run).await?;
            latchkey_failpoint::reach("cp.log.durable");
            for _ in 0..count {
                let answer = v1::AppendLogResponse { durable_length };
                if sender.is_closed() {
                    return Err(Status::cancelled("the caller is gone"));
                }
                send_within(patience, &sender, Ok(answer)).await?;
            }
            unanswered.send_modify(|unanswered| *unanswered -= count);
        }
    };
    tokio::try_join!(reading, appending).map(drop)
}

/// Waits for a message. The sender is silent only while all that it sent is answered: one that
/// waits for an answer has no reason to say more.
async fn unless_silent<T>(
    patience: Duration,
    mut unanswered: watch::Receiver<usize>,
    message: impl Future<Output = Result<T, Status>>,
) -> Result<T, Status> {
    let silent = async {
        // Whoever waits for a message is the one that counts it.
        if unanswered.wait_for(|count| *count == 0).await.is_err() {
            std::future::pending::<()>().await;
        }
        tokio::time::sleep(patience).await;
    };
    tokio::select! {
        biased;
        message = message => message,
        () = silent => Err(silent_for(patience)),
    }
}

/// Takes what has arrived behind a chunk and continues it, so that all of it shares one sync.
/// Answers it with the first chunk that does not, if there is one.
fn contiguous(
    first: v1::AppendLogRequest,
    arrived: &mut mpsc::Receiver<v1::AppendLogRequest>,
) -> (Vec<Piece>, Option<v1::AppendLogRequest>) {
    let mut end = first.offset.saturating_add(first.data.len() as u64);
    let mut run = vec![Piece { offset: first.offset, data: first.data }];
    while run.len() < MOST_IN_ONE_SYNC {
        let Ok(next) = arrived.try_recv() else { break };
        if next.offset != end {
            return (run, Some(next));
        }
        end = end.saturating_add(next.data.len() as u64);
        run.push(Piece { offset: next.offset, data: next.data });
    }
    (run, None)
}

#[cfg(test)]
mod tests {
    use tonic::Code;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_sender_that_waits_for_an_answer_is_not_silent() {
        let patience = Duration::from_secs(2);
        let (unanswered, answered) = watch::channel(1_usize);
        let nothing = std::future::pending::<Result<(), Status>>();
        let mut waiting = Box::pin(unless_silent(patience, answered, nothing));
        assert!(tokio::time::timeout(patience * 99, &mut waiting).await.is_err());
        unanswered.send_modify(|count| *count -= 1);
        assert!(tokio::time::timeout(patience * 9 / 10, &mut waiting).await.is_err());
        let ended = tokio::time::timeout(patience, waiting).await.unwrap();
        assert_eq!(ended.unwrap_err().code(), Code::DeadlineExceeded);
    }
}
