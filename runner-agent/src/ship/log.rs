//! The log, as it grows: by offset, whole lines, acknowledged as far as it is durable.
//!
//! A control plane ends streams that bring nothing for a minute. That terraform is quiet is no
//! failure, so the stream is closed from here before, and another opened when there is more.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use latchkey_proto::v1;
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;

use super::attempts::Attempts;
use super::{Delivery, Error, Failure, Shipper, in_time, understand};
use crate::supervisor::control::{Stage, Status};
use crate::supervisor::log::LONGEST_LINE;

/// How long the end of a stream that was closed from here may take; what comes next waits for it.
const FAREWELL: Duration = Duration::from_secs(1);

/// Why a stream ended well.
enum Closed {
    /// Everything is acknowledged, and there will be no more.
    Whole,
    /// Everything is acknowledged, and nothing new came for a while.
    Quiet,
}

impl Shipper {
    /// Answers how much of the log was taken, too.
    pub(super) async fn follow_log(
        &self,
        mut status: watch::Receiver<Status>,
    ) -> Result<(Delivery, u64), Error> {
        let mut acknowledged = self.directory.shipped("log");
        let mut attempts = Attempts::at("append to the log");
        loop {
            let before = acknowledged;
            match self.log_stream(&mut status, &mut acknowledged).await {
                Ok(Closed::Whole) => return Ok((Delivery::Acknowledged, acknowledged)),
                Ok(Closed::Quiet) => attempts.reset(),
                Err(Failure::Refused(reason)) => {
                    return self.without_log(status, reason, acknowledged).await;
                }
                Err(Failure::Local(error)) => return Err(error),
                Err(Failure::Offset(expected)) => {
                    let endless = expected == acknowledged;
                    if endless {
                        let failure = Failure::Offset(expected);
                        self.pause(&mut attempts, &failure).await;
                    } else {
                        tracing::warn!(expected, acknowledged, "the log goes on elsewhere");
                    }
                    acknowledged = expected;
                }
                Err(failure @ (Failure::Again(_) | Failure::LeaseLost)) => {
                    if acknowledged > before {
                        attempts.reset();
                    }
                    self.pause(&mut attempts, &failure).await;
                }
            }
        }
    }

    /// Waits for the end of a job whose log is not taken any more.
    async fn without_log(
        &self,
        mut status: watch::Receiver<Status>,
        reason: String,
        acknowledged: u64,
    ) -> Result<(Delivery, u64), Error> {
        if status.wait_for(|status| status.stage() == Stage::Ended).await.is_err() {
            std::future::pending::<()>().await;
        }
        Ok((Delivery::Refused(reason), acknowledged))
    }

    async fn log_stream(
        &self,
        status: &mut watch::Receiver<Status>,
        acknowledged: &mut u64,
    ) -> Result<Closed, Failure> {
        let from = *acknowledged;
        let something = status
            .wait_for(|status| status.log_length > from || status.stage() == Stage::Ended)
            .await
            .map(|status| status.log_length > from);
        match something {
            Ok(true) => {}
            Ok(false) => return Ok(Closed::Whole),
            // The job is being left behind with the agent.
            Err(_) => std::future::pending().await,
        }
        let read = |error| Failure::Local(Error::Read(error));
        let log = File::open(self.directory.join("log")).map_err(read)?;
        let mut sent = from;
        let (chunks, inbox) = mpsc::channel(8);
        let mut first = Some(self.lease.to_wire());
        let mut chunk = |offset: u64, until: u64| -> Result<v1::AppendLogRequest, Failure> {
            let data = lines_at(&log, offset, until).map_err(read)?;
            Ok(v1::AppendLogRequest { lease: first.take(), offset, data })
        };
        // The first chunk goes before the answer is waited for: it names the lease.
        let opening = chunk(sent, status.borrow().log_length)?;
        sent += opening.data.len() as u64;
        let _ = chunks.try_send(opening);
        let mut client = self.client.clone();
        let mut answers =
            in_time(client.append_log(ReceiverStream::new(inbox))).await?.into_inner();
        loop {
            let now = *status.borrow_and_update();
            if now.stage() == Stage::Ended && *acknowledged >= now.log_length {
                return Ok(Closed::Whole);
            }
            let quiet = *acknowledged >= sent && sent >= now.log_length;
            tokio::select! {
                permit = chunks.reserve(), if sent < now.log_length => {
                    let Ok(permit) = permit else {
                        // The call has ended: its answer says why.
                        match in_time(answers.message()).await? {
                            Some(_) => continue,
                            None => return Err(Failure::Again("the stream ended".into())),
                        }
                    };
                    let next = chunk(sent, now.log_length)?;
                    sent += next.data.len() as u64;
                    permit.send(next);
                }
                answer = answers.message() => match answer {
                    Ok(Some(answer)) => {
                        *acknowledged = answer.durable_length.min(now.log_length);
                        // More than was sent is there when an earlier connection sent it.
                        sent = sent.max(*acknowledged);
                        self.directory.set_shipped("log", *acknowledged);
                    }
                    Ok(None) => return Err(Failure::Again("the stream ended".into())),
                    Err(refusal) => return Err(understand(&refusal)),
                },
                // From the last that happened on.
                () = tokio::time::sleep(self.quiet), if quiet => break,
                changed = status.changed() => if changed.is_err() {
                    std::future::pending::<()>().await;
                },
            }
        }
        drop(chunks);
        // However it ends: nothing is on its way.
        let _ = timeout(FAREWELL, answers.message()).await;
        Ok(Closed::Quiet)
    }
}

/// Reads whole lines, as many as one message holds.
fn lines_at(log: &File, offset: u64, until: u64) -> io::Result<Vec<u8>> {
    let length = usize::try_from(until.saturating_sub(offset)).unwrap_or(usize::MAX);
    let mut data = vec![0u8; length.min(LONGEST_LINE)];
    log.read_exact_at(&mut data, offset)?;
    // Lines are shorter than a message, so there is an end in it.
    let end = data.iter().rposition(|byte| *byte == b'\n').map_or(data.len(), |at| at + 1);
    data.truncate(end);
    Ok(data)
}
