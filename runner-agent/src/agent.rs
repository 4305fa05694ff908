//! The agent: one task that owns the jobs' table and the connection, and one task per job.
//!
//! It holds no policy and nothing that outlives a job. When it dies, supervisors and terraform
//! go on; its successor finds the jobs on disk. On SIGTERM it takes nothing new, wipes what is
//! not asked for yet, and leaves.

mod job;
mod link;
mod prepare;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use latchkey_proto::v1;
use latchkey_proto::v1::lease_request::Frame as Request;
use latchkey_proto::v1::lease_response::Frame as Response;
use latchkey_proto::v1::runner_service_client::RunnerServiceClient;
use rustix::fs::{FlockOperation, flock};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tonic::transport::Channel;

use self::job::{Event, Inbox, Job, Origin, Rest, Told};
use crate::backoff::Backoff;
use crate::config::{Config, Lifetime};
use crate::engine::{self, Engine};
use crate::enroll::{self, Identity};
use crate::job::{Lease, Spec};
use crate::job_directory::{
    self, JobDirectory, Settings, Stage, create_private, private_directory,
};
use crate::lease::{self, Connection, Incoming};
use crate::random;
use crate::ship::Shipper;

/// A `Go` with many variables is larger than tonic's default.
const LARGEST_FRAME: usize = 16 << 20;

/// How long a connection lives before the next failure counts as the first: one that is welcomed
/// and dropped, again and again, must not be dialled without pause.
const STABLE: Duration = Duration::from_secs(30);

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
        let mut terminate = signal(SignalKind::terminate()).map_err(Error::Runtime)?;
        let mut interrupt = signal(SignalKind::interrupt()).map_err(Error::Runtime)?;
        let (stop, stopped) = watch::channel(false);
        tokio::spawn(async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            stop.send_replace(true);
            // Kept open: a closed channel would read as never stopped.
            stop.closed().await;
        });
        serve(config, stopped).await
    });
    // Jobs' tasks wait for things that outlive this process.
    runtime.shutdown_background();
    done.map(|()| ExitCode::SUCCESS)
}

/// Runs the agent until `stopped` is true, or one job is done with `--once`.
pub(crate) async fn serve(config: Config, stopped: watch::Receiver<bool>) -> Result<(), Error> {
    private_directory(&config.work_dir)?;
    let lock = create_private(&config.work_dir.join("lock")).map_err(Error::Runtime)?;
    flock(&lock, FlockOperation::NonBlockingLockExclusive)
        .map_err(|_| Error::InUse(config.work_dir.clone()))?;
    let engine = Engine::find(config.terraform.as_deref()).await?;
    let mut first = Backoff::new(Duration::from_millis(250), Duration::from_secs(30));
    let identity = loop {
        match Identity::obtain(&config).await {
            Ok(identity) => break identity,
            Err(error) if error.may_pass() => {
                let wait = first.next(random::fraction());
                tracing::warn!(error = &error as &dyn std::error::Error, ?wait, "failed to enrol");
                let mut stopped = stopped.clone();
                tokio::select! {
                    () = tokio::time::sleep(wait) => {}
                    _ = stopped.wait_for(|stopped| *stopped) => return Ok(()),
                }
            }
            Err(error) => return Err(error.into()),
        }
    };
    let client = RunnerServiceClient::new(identity.channel(&config)?)
        .max_decoding_message_size(LARGEST_FRAME);
    tracing::info!(
        runner_id = %identity.runner_id,
        engine = engine.name,
        version = %engine.version,
        "the runner starts"
    );
    let (events_to, events) = mpsc::channel(64);
    let jobs_path = config.work_dir.join("jobs");
    private_directory(&jobs_path)?;
    let mut agent = Agent {
        settings: Settings {
            terraform: engine.path.clone(),
            terraform_version: engine.version.clone(),
            pass_env: config.pass_env.clone(),
            terraform_cli_config: config.terraform_cli_config.clone(),
            longest_log: config.longest_log,
        },
        engine,
        client,
        jobs_path,
        jobs: HashMap::new(),
        events_to,
        events,
        intake: Intake::Open,
        rest: Rest::default(),
        config,
        _lock: lock,
    };
    agent.find_jobs()?;
    agent.run(stopped).await;
    Ok(())
}

struct Agent {
    config: Config,
    settings: Settings,
    engine: Engine,
    client: RunnerServiceClient<Channel>,
    jobs_path: PathBuf,
    /// Every job of this host; changed by `take_up` and by its task's end.
    jobs: HashMap<Lease, Held>,
    events_to: mpsc::Sender<Event>,
    events: mpsc::Receiver<Event>,
    intake: Intake,
    /// Grows with every job in a row that this host could not prepare.
    rest: Rest,
    /// Held as long as the process lives.
    _lock: File,
}

struct Held {
    directory: JobDirectory,
    told: mpsc::Sender<Told>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Intake {
    Open,
    /// By `Drain`, or since `--once` has had its job.
    Closed,
}

/// What becomes of an offer that this runner could prepare.
enum Answer {
    Accept,
    /// For another runner.
    HandBack,
    /// For another runner, after a pause: this host has a fault, and would be asked again at
    /// once.
    HandBackAfter(Duration),
}

/// Why the agent's loop goes on or ends.
enum Turn {
    Stopped,
    Done,
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
        let (told, inbox) = mpsc::channel(32);
        let job = Job {
            shipper: Shipper::new(self.client.clone(), lease.clone(), directory.clone()),
            directory: directory.clone(),
            lease: lease.clone(),
            spec,
            origin,
            program: self.config.program.clone(),
            told: Inbox::new(inbox),
            events: self.events_to.clone(),
            rest: self.rest.clone(),
            lock: None,
        };
        tokio::spawn(job.run());
        self.jobs.insert(lease, Held { directory, told });
    }

    async fn run(&mut self, mut stopped: watch::Receiver<bool>) {
        let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(20));
        loop {
            let failed = match self.connected(&mut stopped, &mut backoff).await {
                Ok(Turn::Stopped) => break,
                Ok(Turn::Done) => return,
                Err(error) => error,
            };
            let wait = backoff.next(random::fraction());
            tracing::warn!(
                error = &failed as &dyn std::error::Error,
                ?wait,
                "lost the control plane"
            );
            let until = Instant::now() + wait;
            let turn = loop {
                tokio::select! {
                    () = tokio::time::sleep_until(until) => break None,
                    Some(event) = self.events.recv() => {
                        // Frames are said again after the next welcome.
                        if let Some(turn) = self.done(event) {
                            break Some(turn);
                        }
                    }
                    _ = stopped.wait_for(|stopped| *stopped) => break Some(Turn::Stopped),
                }
            };
            match turn {
                Some(Turn::Stopped) => break,
                Some(Turn::Done) => return,
                None => {}
            }
        }
        self.leave().await;
    }

    /// Holds one connection until it breaks.
    async fn connected(
        &mut self,
        stopped: &mut watch::Receiver<bool>,
        backoff: &mut Backoff,
    ) -> Result<Turn, lease::Error> {
        let opening = Connection::open(self.client.clone(), self.hello());
        let (mut connection, welcome) = tokio::select! {
            opened = opening => opened?,
            _ = stopped.wait_for(|stopped| *stopped) => return Ok(Turn::Stopped),
        };
        tracing::info!(runner_id = %welcome.runner_id, generation = welcome.generation, "welcomed");
        if self.config.lifetime == Lifetime::UntilStopped {
            self.intake = Intake::Open;
        }
        let since = Instant::now();
        let ended = self.talk(stopped, &mut connection, &welcome).await;
        if since.elapsed() >= STABLE {
            backoff.reset();
        }
        ended
    }

    async fn talk(
        &mut self,
        stopped: &mut watch::Receiver<bool>,
        connection: &mut Connection,
        welcome: &v1::Welcome,
    ) -> Result<Turn, lease::Error> {
        self.welcomed(welcome)?;
        loop {
            tokio::select! {
                incoming = connection.next() => match incoming? {
                    Incoming::Frame(frame) => self.frame(*frame, connection)?,
                    Incoming::Heartbeat => {
                        let held = self.held();
                        connection.send(Request::Heartbeat(v1::Heartbeat { held }))?;
                    }
                },
                Some(event) = self.events.recv() => match event {
                    Event::Send(frame) => connection.send(frame)?,
                    event @ Event::Done(_) => if let Some(turn) = self.done(event) {
                        return Ok(turn);
                    },
                },
                _ = stopped.wait_for(|stopped| *stopped) => return Ok(Turn::Stopped),
            }
        }
    }

    fn hello(&self) -> v1::Hello {
        v1::Hello {
            slots: match self.config.lifetime {
                Lifetime::UntilStopped => self.config.slots,
                Lifetime::OneJob => 1,
            },
            engines: vec![v1::Engine {
                name: self.engine.name.into(),
                version: self.engine.version.clone(),
            }],
            labels: HashMap::new(),
            held: self.held(),
            version: env!("CARGO_PKG_VERSION").into(),
            ..Default::default()
        }
    }

    fn held(&self) -> Vec<v1::LeaseRef> {
        self.jobs.keys().map(Lease::to_wire).collect()
    }

    fn welcomed(&mut self, welcome: &v1::Welcome) -> Result<(), lease::Error> {
        let given_up: Vec<Lease> =
            welcome.give_up.iter().filter_map(|lease| Lease::from_wire(lease).ok()).collect();
        for (lease, held) in &self.jobs {
            let told = if given_up.contains(lease) { Told::GiveUp } else { Told::Keep };
            held.tell(told)?;
        }
        Ok(())
    }

    fn frame(&mut self, frame: Response, connection: &Connection) -> Result<(), lease::Error> {
        match frame {
            Response::Offer(offer) => {
                let lease = offer.lease.clone();
                let answer = match self.accept(offer) {
                    Ok(Answer::Accept) => Request::Accept(v1::Accept { lease }),
                    Ok(Answer::HandBack) => Request::NeverStarted(v1::NeverStarted { lease }),
                    Ok(Answer::HandBackAfter(wait)) => {
                        let events = self.events_to.clone();
                        tokio::spawn(async move {
                            tokio::time::sleep(wait).await;
                            let frame = Request::NeverStarted(v1::NeverStarted { lease });
                            let _ = events.send(Event::Send(frame)).await;
                        });
                        return Ok(());
                    }
                    Err(reason) => {
                        tracing::warn!(%reason, "declined an offer");
                        Request::Decline(v1::Decline { lease, reason })
                    }
                };
                connection.send(answer)
            }
            Response::Go(go) => self.tell(go.lease.clone(), Told::Go(go)),
            Response::Cancel(cancel) => {
                self.tell(cancel.lease, Told::Cancel { force: cancel.force })
            }
            Response::Revoke(revoke) => {
                tracing::info!(reason = %revoke.reason, "a lease is revoked");
                self.tell(revoke.lease, Told::Revoke)
            }
            Response::Recorded(recorded) => self.tell(recorded.lease, Told::Recorded),
            Response::Drain(v1::Drain {}) => {
                self.intake = Intake::Closed;
                Ok(())
            }
            Response::Resume(v1::Resume {}) => {
                if self.config.lifetime == Lifetime::UntilStopped {
                    self.intake = Intake::Open;
                }
                Ok(())
            }
            Response::Renewed(renewed) => {
                let renewed: Vec<Lease> =
                    renewed.lease.iter().filter_map(|lease| Lease::from_wire(lease).ok()).collect();
                for (_, held) in self.jobs.iter().filter(|(lease, _)| !renewed.contains(lease)) {
                    held.tell(Told::NotRenewed)?;
                }
                Ok(())
            }
            // It is the first frame, and was.
            Response::Welcome(_) => Ok(()),
        }
    }

    /// Step 3. Answers why the job cannot be prepared on a runner like this one: that ends it.
    ///
    /// Slots are counted by the control plane alone: jobs that it has given up take none, while
    /// here they may still have something to bring.
    fn accept(&mut self, offer: v1::Offer) -> Result<Answer, String> {
        let lease =
            Lease::from_wire(&offer.lease.unwrap_or_default()).map_err(|e| e.to_string())?;
        if self.jobs.contains_key(&lease) {
            return Ok(Answer::Accept);
        }
        if self.intake == Intake::Closed {
            return Ok(Answer::HandBack);
        }
        let job = offer.job.unwrap_or_default();
        let spec = Spec::from_wire(lease.phase, job).map_err(|error| error.to_string())?;
        let (wanted, own) = (&spec.terraform_version, &self.engine.version);
        if !wanted.is_empty() && wanted != own {
            return Err(format!("the run needs version {wanted}; this runner has {own}"));
        }
        let created = JobDirectory::create(&self.jobs_path, &lease, &spec, &self.settings);
        let directory = match created {
            Ok(directory) => directory,
            Err(error) => {
                let error = &error as &dyn std::error::Error;
                tracing::error!(error, "failed to make a job directory");
                return Ok(Answer::HandBackAfter(self.rest.after_a_failure()));
            }
        };
        tracing::info!(?lease, "accepted");
        if self.config.lifetime == Lifetime::OneJob {
            self.intake = Intake::Closed;
        }
        latchkey_failpoint::reach("run.accepted");
        self.take_up(directory, lease, spec, Origin::Offered);
        Ok(Answer::Accept)
    }

    fn tell(&self, lease: Option<v1::LeaseRef>, told: Told) -> Result<(), lease::Error> {
        let held = Lease::from_wire(&lease.unwrap_or_default())
            .ok()
            .and_then(|lease| self.jobs.get(&lease));
        match held {
            Some(held) => held.tell(told),
            // Of an older epoch, or already gone.
            None => Ok(()),
        }
    }

    /// Takes a finished job from the table. Answers whether that was all to do.
    fn done(&mut self, event: Event) -> Option<Turn> {
        match event {
            Event::Send(_) => None,
            Event::Done(lease) => {
                self.jobs.remove(&lease);
                let all = self.config.lifetime == Lifetime::OneJob
                    && self.intake == Intake::Closed
                    && self.jobs.is_empty();
                all.then_some(Turn::Done)
            }
        }
    }

    /// Lets jobs go that nobody has asked `Go` for; the others stay for the next start.
    async fn leave(&mut self) {
        let unasked = |held: &Held| held.directory.stage() == Stage::Accepted;
        for held in self.jobs.values().filter(|held| unasked(held)) {
            let _ = held.tell(Told::GiveUp);
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

impl Held {
    fn tell(&self, told: Told) -> Result<(), lease::Error> {
        match self.told.try_send(told) {
            Ok(()) => Ok(()),
            // Its task has ended; the event is on its way.
            Err(mpsc::error::TrySendError::Closed(_)) => Ok(()),
            // Nothing may be dropped: after a reconnect everything is said again.
            Err(mpsc::error::TrySendError::Full(_)) => Err(lease::Error::Stuck),
        }
    }
}
