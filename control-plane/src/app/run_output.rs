//! A phase's canonical log: appended by the holder of the lease, read by people.
//!
//! A runner's offsets count from the start of its own lease's log; the lease says where that
//! lies in the phase's. The gate of a job makes sure that no append of an older lease lands
//! after a newer one was granted.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use latchkey_domain::id::{Epoch, JobId, RunId};
use latchkey_domain::policy::Phase;
use latchkey_domain::run::Run;
use latchkey_proto::v1::Reason;
use tokio::sync::mpsc;

use super::App;
use super::lease_job::lease_lost;
use crate::auth::{Caller, Right, RunnerIdentity};
use crate::error::{Error, Result};
use crate::job::LeaseRef;
use crate::run_log::{AppendError, State};
use crate::store::keys;

/// The most that one message carries.
pub const CHUNK: usize = 256 * 1024;

/// Which lease may append to a job's log. Grants and appends share the lock, so that none of an
/// older lease lands behind a newer grant.
#[derive(Debug, Default)]
pub(super) struct Gate {
    pub(super) lock: tokio::sync::Mutex<()>,
    /// The number of the lease that may append; 0 when none may.
    pub(super) epoch: AtomicU64,
}

/// The gates of jobs that are leased.
#[derive(Debug, Default)]
pub struct Gates(Mutex<HashMap<JobId, Arc<Gate>>>);

impl Gates {
    pub(super) fn of(&self, job: JobId) -> Arc<Gate> {
        let mut gates = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(gates.entry(job).or_default())
    }

    /// Ends every lease's right to append to a job's log.
    pub(super) fn close(&self, job: JobId) {
        let gate = self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&job);
        if let Some(gate) = gate {
            gate.epoch.store(Epoch::NONE.get(), Ordering::SeqCst);
        }
    }
}

/// One lease's right to append.
#[derive(Debug)]
pub struct Appender {
    app: Arc<App>,
    lease: LeaseRef,
    base: u64,
    gate: Arc<Gate>,
}

/// Bytes of a log and where they belong.
#[derive(Debug)]
pub struct Piece {
    pub offset: u64,
    pub data: Vec<u8>,
}

/// A part of a log.
#[derive(Debug)]
pub struct LogPart {
    pub offset: u64,
    pub data: Vec<u8>,
}

impl App {
    pub async fn append_log(
        self: &Arc<Self>,
        runner: &RunnerIdentity,
        lease: LeaseRef,
    ) -> Result<Appender> {
        // Asked before there is a gate, so that nobody makes gates for jobs that are not theirs.
        self.leased(runner, lease).await?;
        let gate = self.gates.of(lease.job);
        let locked = gate.lock.lock().await;
        let subject = self.leased(runner, lease).await?;
        let held = subject.run.value.job(lease.job.phase).lease.as_ref().ok_or_else(lease_lost)?;
        gate.epoch.store(held.epoch.get(), Ordering::SeqCst);
        let base = held.log_base;
        drop(locked);
        Ok(Appender { app: Arc::clone(self), lease, base, gate })
    }

    /// Answers how long a phase's log is. What has ended or never began is told by the run's
    /// record alone: most runs that are shown are over, and files that nobody has open are slow
    /// to ask.
    pub(super) async fn log_length(&self, run: &Run, phase: Phase) -> Result<u64> {
        let job = run.job(phase);
        match job.log_length {
            Some(length) => Ok(length),
            None if job.epoch == Epoch::NONE => Ok(0),
            None => self.stored_log_length(run.id, phase).await,
        }
    }

    pub(super) async fn stored_log_length(&self, run: RunId, phase: Phase) -> Result<u64> {
        Ok(self.logs.progress(run, phase).await.map_err(Error::internal)?.length)
    }

    /// Appends a line of our own; the caller holds the job's gate. Answers the new length.
    pub(super) async fn note_in_log(&self, job: JobId, offset: u64, text: &str) -> Result<u64> {
        let time = jiff::Timestamp::from_millisecond(self.now().as_millis())
            .map_err(Error::internal)?
            .to_string();
        let line = serde_json::json!({
            "@level": "info",
            "@message": text,
            "@module": "latchkey",
            "@timestamp": time,
            "type": "lease",
        });
        // What the silent runner sent last may have no line end.
        let line = format!("\n{line}\n");
        self.logs
            .append(job.run, job.phase, offset, line.into_bytes())
            .await
            .map_err(Error::internal)
    }

    /// Sends a log from an offset; with `follow`, until it is finished or nobody listens.
    pub async fn read_log(
        self: &Arc<Self>,
        caller: &Caller,
        run: RunId,
        phase: Phase,
        offset: u64,
        follow: bool,
    ) -> Result<mpsc::Receiver<Result<LogPart>>> {
        self.run_for(caller, run, Right::Read).await?;
        let mut progress = self.logs.follow(run, phase).await.map_err(Error::internal)?;
        let app = Arc::clone(self);
        let (sender, receiver) = mpsc::channel(4);
        // A phase may end without its log ever growing: its run tells.
        let mut moves = self.store.watch(keys::exactly(&keys::run(run)));
        tokio::spawn(async move {
            let mut offset = offset;
            loop {
                // Asked first: what was appended before the end is then surely seen below.
                let over = app.is_over(run, phase).await;
                let seen = *progress.borrow_and_update();
                while offset < seen.length {
                    let read = app.logs.read(run, phase, offset, CHUNK).await;
                    let part = match read {
                        Ok(data) if data.is_empty() => break,
                        Ok(data) => Ok(LogPart { offset, data }),
                        Err(error) => Err(Error::internal(error)),
                    };
                    let failed = part.is_err();
                    offset += part.as_ref().map_or(0, |part| part.data.len() as u64);
                    if sender.send(part).await.is_err() || failed {
                        return;
                    }
                }
                let finished = match seen.state {
                    State::Finished => true,
                    State::Growing => over,
                };
                if !follow || finished {
                    return;
                }
                tokio::select! {
                    changed = progress.changed() => if changed.is_err() { return },
                    () = sender.closed() => return,
                    _ = moves.next() => {}
                }
            }
        });
        Ok(receiver)
    }

    /// Tells whether nothing will be appended any more.
    async fn is_over(&self, run: RunId, phase: Phase) -> bool {
        let Ok(run) = self.run(run).await else { return true };
        run.value.state.is_end() || run.value.job(phase).ended_at.is_some()
    }
}

impl Appender {
    /// Appends pieces that continue each other, at offsets of the lease's own log, and answers
    /// its durable length. All of them are made durable together.
    pub async fn append(&self, pieces: Vec<Piece>) -> Result<u64> {
        if pieces.iter().any(|piece| piece.data.len() > CHUNK) {
            return Err(Error::field("data", "an append has up to 256 KiB"));
        }
        let mut pieces = pieces.into_iter();
        let Some(Piece { offset, mut data }) = pieces.next() else {
            return Err(Error::field("data", "there is nothing to append"));
        };
        pieces.for_each(|piece| data.extend_from_slice(&piece.data));
        let _locked = self.gate.lock.lock().await;
        // What an old copy acknowledges is thrown away with it.
        self.app.check_history()?;
        if self.gate.epoch.load(Ordering::SeqCst) != self.lease.epoch.get() {
            return Err(lease_lost());
        }
        let JobId { run, phase } = self.lease.job;
        let at = self.base.checked_add(offset).ok_or_else(lease_lost)?;
        match self.app.logs.append(run, phase, at, data).await {
            Ok(length) => Ok(length.saturating_sub(self.base)),
            Err(AppendError::Gap { expected }) => {
                let expected = expected.saturating_sub(self.base);
                let message = format!("the log continues at offset {expected}");
                Err(Error::refused(Reason::LogOffset, message)
                    .with("expected", expected.to_string()))
            }
            Err(AppendError::TooLarge { limit }) => {
                let message = format!("the log has reached its limit of {limit} bytes");
                Err(Error::refused(Reason::LimitReached, message).with("limit", limit.to_string()))
            }
            Err(AppendError::Finished { .. }) => Err(lease_lost()),
            Err(AppendError::ZeroByte { .. }) => {
                Err(Error::field("data", "a log holds no zero bytes"))
            }
            Err(AppendError::Diverges { at }) => {
                let at = at.saturating_sub(self.base);
                let message = format!("other bytes are at offset {at}; a log is never changed");
                Err(Error::field("data", message))
            }
            Err(error @ AppendError::Io { .. }) => Err(Error::internal(error)),
        }
    }
}
