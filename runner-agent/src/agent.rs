//! The agent: one task that owns the jobs' table and the connection, and one task per job.
//!
//! It holds no policy and nothing that outlives a job. When it dies, supervisors and terraform
//! go on; its successor finds the jobs on disk.
//!
//! How it ends: a signal, the idle time-out or `--once` close the intake for good; what runs goes
//! on, is shipped, and then it leaves. A second signal cancels what runs. It can also leave at
//! once (`wish`): then it wipes what is not asked for yet, and its jobs go on.

mod frames;
mod intake;
mod job;
mod leftovers;
mod link;
mod mailbox;
mod prepare;
mod seen;
mod service;
mod start;
#[cfg(test)]
mod tests;
mod told;
mod wish;

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use latchkey_proto::v1;
use latchkey_proto::v1::lease_request::Frame as Request;
use latchkey_proto::v1::runner_service_client::RunnerServiceClient;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, Interval, sleep_until};
use tonic::transport::Channel;

use self::intake::Intake;
use self::job::{Job, Origin};
use self::mailbox::mailbox;
pub(crate) use self::prepare::ENGINE_NOTE;
use self::seen::Seen;
use self::service::Service;
use self::start::serve;
use self::told::{Event, Rest, Told};
pub(crate) use self::wish::OnSigterm;
use self::wish::Wish;
use crate::backoff::Backoff;
use crate::config::Config;
use crate::engine::{self, Engines};
use crate::enroll;
use crate::job::{Lease, Spec};
use crate::job_directory::{self, JobDirectory, Settings, Stage};
use crate::lease::{self, Connection, Incoming};
use crate::random;
use crate::ship::Shipper;
use crate::spool::Room;
use crate::supervisor::isolation;

/// A `Go` with many variables is larger than tonic's default.
const LARGEST_FRAME: usize = 16 << 20;

/// How long a connection lives before the next failure counts as the first: one that is welcomed
/// and dropped, again and again, must not be dialled without pause.
const STABLE: Duration = Duration::from_secs(30);

const FIRST_WAIT: Duration = Duration::from_millis(200);

/// Between two connections.
const LONGEST_WAIT: Duration = Duration::from_secs(20);

/// How long to let unasked jobs leave at the end.
const FLUSH: Duration = Duration::from_secs(3);

#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("start the runtime")]
    Runtime(#[source] io::Error),
    #[error("use the work directory {0}: another runner uses it")]
    InUse(PathBuf),
    #[error(transparent)]
    Directory(#[from] job_directory::Error),
    #[error(transparent)]
    Engine(#[from] engine::Error),
    #[error(transparent)]
    Enroll(#[from] enroll::Error),
}

/// Runs the agent until it is stopped.
pub(crate) fn run(config: Config) -> Result<ExitCode, Error> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(Error::Runtime)?;
    let done = runtime.block_on(async {
        let wish = wish::listen(config.on_sigterm).map_err(Error::Runtime)?;
        serve(config, wish).await
    });
    // Jobs' tasks wait for things that outlive this process.
    runtime.shutdown_background();
    done.map(|()| ExitCode::SUCCESS)
}

struct Agent {
    config: Config,
    settings: Settings,
    engines: Arc<Engines>,
    client: RunnerServiceClient<Channel>,
    jobs_path: PathBuf,
    /// Every job of this host; changed by `take_up` and by its task's end.
    jobs: HashMap<Lease, Held>,
    /// The jobs that the last heartbeat named.
    named: Vec<Lease>,
    events_to: mpsc::Sender<Event>,
    events: mpsc::Receiver<Event>,
    wish: watch::Receiver<Wish>,
    intake: Intake,
    /// The heartbeat whose answer says that no offer is on its way any more: with this connection,
    /// since it was told that nothing more is taken.
    settles: Option<u64>,
    /// Since when there is no job.
    idle_since: Instant,
    /// Grows with every job in a row that this host could not prepare.
    rest: Rest,
    room: watch::Receiver<Room>,
    seen: Seen,
    service: Service,
    pulse: Interval,
    /// What keeps jobs apart here, as it was tried out at start.
    isolation: isolation::Facts,
    /// Why the control plane was lost, said last: the same again and again is said once.
    said: String,
    /// Held as long as the process lives.
    _lock: File,
}

struct Held {
    directory: JobDirectory,
    told: mailbox::Sender<Told>,
    /// As the control plane has said last: the lease is not held any more.
    is_lost: bool,
}

/// Why the agent's loop ends.
enum Turn {
    /// At once; jobs go on.
    Leave,
    /// There is nothing left to do.
    Done,
}

/// What the agent hears besides the control plane.
enum Heard {
    Event(Event),
    Wish(Wish),
    Idle,
    Pulse,
}

impl Agent {
    fn find_jobs(&mut self) -> Result<(), Error> {
        for directory in JobDirectory::list(&self.jobs_path)? {
            let found = directory.lease().and_then(|lease| Ok((lease, directory.spec()?)));
            match found {
                Ok((lease, spec)) => {
                    tracing::info!(?lease, stage = ?directory.stage(), "found a job");
                    self.take_up(directory, lease, spec, Origin::Found);
                }
                Err(error) => {
                    let error = &error as &dyn std::error::Error;
                    tracing::error!(error, "failed to take up a job; its directory stays");
                }
            }
        }
        Ok(())
    }

    fn take_up(&mut self, directory: JobDirectory, lease: Lease, spec: Spec, origin: Origin) {
        let (told, inbox) = mailbox();
        let job = Job {
            shipper: Shipper::new(self.client.clone(), lease.clone(), directory.clone()),
            directory: directory.clone(),
            lease: lease.clone(),
            spec,
            origin,
            program: self.config.program.clone(),
            told: inbox,
            events: self.events_to.clone(),
            rest: self.rest.clone(),
            engines: self.engines.clone(),
            most_kept: self.config.spool.spool / 4,
            lock: None,
        };
        tokio::spawn(job.run());
        self.jobs.insert(lease, Held { directory, told, is_lost: false });
    }

    async fn run(&mut self) {
        let mut backoff = Backoff::new(FIRST_WAIT, LONGEST_WAIT);
        let turn = loop {
            let failed = match self.connected(&mut backoff).await {
                Ok(turn) => break turn,
                Err(error) => error,
            };
            self.settles = None;
            if let Some(turn) = self.turn(None) {
                break turn;
            }
            let wait = backoff.next(random::fraction());
            self.lost(&failed, wait);
            let until = Instant::now() + wait;
            let turn = loop {
                tokio::select! {
                    () = sleep_until(until) => break None,
                    // Frames are said again after the next welcome.
                    heard = self.hear() => match self.heard(heard, None) {
                        Ok(None) | Err(_) => {}
                        Ok(Some(turn)) => break Some(turn),
                    },
                }
            };
            if let Some(turn) = turn {
                break turn;
            }
        };
        match turn {
            Turn::Leave => self.leave().await,
            Turn::Done => {
                self.service.stopping("ended");
                tracing::info!("the runner ends; it holds no job");
            }
        }
    }

    /// Holds one connection until it breaks.
    async fn connected(&mut self, backoff: &mut Backoff) -> Result<Turn, lease::Error> {
        let hello = self.hello();
        let says_so = hello.draining;
        let opening = Connection::open(self.client.clone(), hello);
        tokio::pin!(opening);
        let (mut connection, welcome) = loop {
            tokio::select! {
                opened = &mut opening => break opened?,
                heard = self.hear() => if let Some(turn) = self.heard(heard, None)? {
                    return Ok(turn);
                },
            }
        };
        tracing::info!(runner_id = %welcome.runner_id, generation = welcome.generation, "welcomed");
        self.said.clear();
        self.service.ready();
        // Before the leases lapse that this connection has renewed.
        backoff.hold_to(connection.interval().min(LONGEST_WAIT));
        let since = Instant::now();
        let ended = self.talk(&mut connection, &welcome, says_so).await;
        if since.elapsed() >= STABLE {
            backoff.reset();
        }
        if let Ok(Turn::Done) = ended {
            connection.close().await;
        }
        ended
    }

    async fn talk(
        &mut self,
        connection: &mut Connection,
        welcome: &v1::Welcome,
        says_so: bool,
    ) -> Result<Turn, lease::Error> {
        self.welcomed(welcome);
        if self.intake.is_leaving() && !says_so {
            self.say_draining(connection)?;
        }
        if *self.wish.borrow() >= Wish::Cancel {
            self.shut_down();
        }
        loop {
            self.say_status(true);
            if let Some(turn) = self.turn(Some(connection)) {
                return Ok(turn);
            }
            tokio::select! {
                incoming = connection.next() => match incoming? {
                    Incoming::Frame(frame) => self.frame(*frame, connection)?,
                    Incoming::Heartbeat => drop(self.beat(connection)?),
                },
                heard = self.hear() => if let Some(turn) = self.heard(heard, Some(connection))? {
                    return Ok(turn);
                },
            }
        }
    }

    /// Waits for what happens on this side. Safe to abandon and call again.
    async fn hear(&mut self) -> Heard {
        let idle = match self.config.idle_timeout {
            Some(limit) if self.jobs.is_empty() && !self.intake.is_leaving() => {
                Some(self.idle_since + limit)
            }
            Some(_) | None => None,
        };
        let idle = async {
            match idle {
                Some(moment) => sleep_until(moment).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            Some(event) = self.events.recv() => Heard::Event(event),
            wish = wish::changed(&mut self.wish) => Heard::Wish(wish),
            () = idle => Heard::Idle,
            _ = self.pulse.tick() => Heard::Pulse,
        }
    }

    fn heard(
        &mut self,
        heard: Heard,
        connection: Option<&mut Connection>,
    ) -> Result<Option<Turn>, lease::Error> {
        match heard {
            Heard::Event(Event::Send(frame)) => {
                if let Some(connection) = connection {
                    if let Request::NeverStarted(never) = &*frame {
                        // The answer to an earlier heartbeat does not say that this was heard.
                        self.named.retain(|lease| never.lease.as_ref() != Some(&lease.to_wire()));
                    }
                    connection.send(*frame)?;
                }
                Ok(None)
            }
            Heard::Event(Event::Done(lease)) => {
                self.jobs.remove(&lease);
                self.idle_since = Instant::now();
                Ok(self.turn(connection.as_deref()))
            }
            Heard::Wish(Wish::Stay) => Ok(None),
            Heard::Wish(Wish::Leave) => Ok(Some(Turn::Leave)),
            Heard::Wish(wish @ (Wish::Drain | Wish::Cancel)) => {
                tracing::info!(?wish, jobs = self.jobs.len(), "asked to end");
                if wish == Wish::Cancel {
                    self.shut_down();
                }
                self.drain_and_turn(connection)
            }
            Heard::Idle => {
                tracing::info!("no job for the idle time-out");
                self.drain_and_turn(connection)
            }
            Heard::Pulse => {
                self.service.alive();
                self.seen.keep_now_and_then(Instant::now());
                Ok(None)
            }
        }
    }

    fn drain_and_turn(
        &mut self,
        mut connection: Option<&mut Connection>,
    ) -> Result<Option<Turn>, lease::Error> {
        self.drain(connection.as_deref_mut())?;
        Ok(self.turn(connection.as_deref()))
    }

    /// Takes nothing new from now on, for good.
    fn drain(&mut self, connection: Option<&mut Connection>) -> Result<(), lease::Error> {
        match connection {
            Some(connection) if self.intake.leave() => self.say_draining(connection),
            Some(_) => Ok(()),
            // `Hello` will say it.
            None => {
                self.intake.leave();
                Ok(())
            }
        }
    }

    fn say_draining(&mut self, connection: &mut Connection) -> Result<(), lease::Error> {
        connection.send(Request::Draining(v1::Draining {}))?;
        // An offer that was on its way comes before the answer.
        self.settles = Some(self.beat(connection)?);
        Ok(())
    }

    /// Asks all jobs to stop.
    fn shut_down(&self) {
        self.jobs.values().for_each(|held| held.told.send(Told::ShutDown));
    }

    /// Answers whether that was all to do.
    fn turn(&self, connection: Option<&Connection>) -> Option<Turn> {
        let settled = match (connection, self.settles) {
            (Some(connection), Some(number)) => connection.renewals() >= number,
            (None, _) | (_, None) => true,
        };
        let done = self.intake.is_leaving() && self.jobs.is_empty() && settled;
        done.then_some(Turn::Done)
    }

    /// Says why there is no control plane: each reason once in a row.
    fn lost(&mut self, failed: &lease::Error, wait: Duration) {
        self.say_status(false);
        let reason = failed.to_string();
        let error = failed as &dyn std::error::Error;
        if self.said == reason {
            tracing::debug!(error, ?wait, "lost the control plane, still");
        } else if matches!(failed, lease::Error::HistoryLost(_)) {
            tracing::error!(
                error,
                "refused by the control plane; everything is kept until it is \
                restored, and tried again"
            );
        } else {
            tracing::warn!(error, ?wait, "lost the control plane");
        }
        self.said = reason;
    }

    fn say_status(&mut self, connected: bool) {
        let jobs = match self.jobs.len() {
            0 => "no job".to_owned(),
            1 => "1 job".to_owned(),
            jobs => format!("{jobs} jobs"),
        };
        let taking = match (self.intake.is_leaving(), self.intake.is_drained()) {
            (true, _) => "ends when it has none",
            (false, true) => "drained by a person",
            (false, false) if *self.room.borrow() != Room::Enough => "the spool is full",
            (false, false) => "takes jobs",
        };
        let link = if connected { "connected" } else { "not connected" };
        self.service.status(&format!("{link}; {jobs}; {taking}"));
    }

    /// Lets jobs go that nobody has asked `Go` for; the others stay for the next start.
    async fn leave(&mut self) {
        self.service.stopping("leaves; its jobs go on");
        let unasked = |held: &Held| held.directory.stage() == Stage::Accepted;
        for held in self.jobs.values().filter(|held| unasked(held)) {
            held.told.send(Told::GiveUp);
        }
        let flushed = async {
            while self.jobs.values().any(unasked) {
                match self.events.recv().await {
                    Some(Event::Done(lease)) => drop(self.jobs.remove(&lease)),
                    Some(Event::Send(_)) => {}
                    None => return,
                }
            }
        };
        let _ = tokio::time::timeout(FLUSH, flushed).await;
        tracing::info!(jobs = self.jobs.len(), "the runner leaves; its jobs go on");
    }
}
