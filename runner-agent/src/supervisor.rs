//! The supervisor: the small process beside one terraform process. It outlives the agent.
//!
//! ```text
//! waiting ──Go──► preparing ──exec synced──► executing ──result synced──► ended
//!    │                │
//!    └── give up, or no Go in time: it leaves without a trace
//! ```
//!
//! It has a session of its own and holds the secrets of the job in memory only. The agent talks
//! to it through a socket in the job directory (`control`) and may come and go. A supervisor
//! that finds `exec` has a dead predecessor (`succession`).

mod apply;
mod assumed_roles;
pub(crate) mod confine;
pub(crate) mod control;
mod credentials_endpoint;
pub(crate) mod environment;
mod errored_state;
pub(crate) mod hooks;
pub(crate) mod isolation;
pub(crate) mod limits;
mod listener;
pub(crate) mod log;
#[cfg(test)]
pub(crate) mod loopback;
mod mask;
pub(crate) mod orphans;
mod output;
mod plan;
mod plan_changes;
mod state_endpoint;
mod succession;
mod terraform;
#[cfg(test)]
pub(crate) mod tests;
mod variables;

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use latchkey_proto::v1;
use rustix::fs::Mode;
use rustix::process::{
    DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit, setsid, umask,
};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};

use self::confine::Cage;
use self::control::{Order, Stage, Status};
use self::credentials_endpoint::{CredentialsEndpoint, Session};
use self::environment::{CredentialsAccess, Sources, StateAccess};
use self::log::Log;
use self::mask::Masker;
use self::state_endpoint::StateEndpoint;
use self::succession::Endpoints;
use self::terraform::{Cancel, Terraform};
use self::variables::Variables;
use crate::agent::ENGINE_NOTE;
use crate::job::{Failure, JobResult, Lease, Phase, Spec};
use crate::job_directory::{self, JobDirectory, Settings, create_private};
use crate::spool;

/// How long to wait for `Go`; the control plane may have to come back first.
const LONGEST_WAIT: Duration = Duration::from_secs(15 * 60);

/// What terraform shows to get its credentials.
const TOKEN_FILE: &str = "credentials-token";

/// Terraform's own configuration, where the runner names none: an empty one, so that the host's is
/// never used.
const CLI_CONFIG: &str = "terraformrc";

/// Says that the job was canceled by force: a successor gives out no credentials.
const FORCED: &str = "forced";

/// What the supervisor prints when it listens.
pub(crate) const READY: &str = "supervisor ready";

#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("leave the agent's session")]
    Isolate(#[source] io::Error),
    #[error("listen for the agent")]
    Listen(#[source] io::Error),
    #[error("serve terraform")]
    Endpoint(#[source] io::Error),
    #[error("keep the job apart from others")]
    Confine(#[source] io::Error),
    #[error("digest what was planned")]
    Digest(#[source] io::Error),
    #[error("finish a background task")]
    Task(#[source] tokio::task::JoinError),
    #[error(transparent)]
    Directory(#[from] job_directory::Error),
    #[error(transparent)]
    Log(#[from] log::Error),
    #[error(transparent)]
    Terraform(#[from] terraform::Error),
}

/// Runs the program `supervise <dir>`.
pub(crate) fn supervise(directory: &Path) -> Result<ExitCode, Error> {
    isolate().map_err(Error::Isolate)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(Error::Isolate)?;
    runtime.block_on(serve(JobDirectory::open(directory)))?;
    Ok(ExitCode::SUCCESS)
}

fn isolate() -> io::Result<()> {
    // Signals of the agent's terminal or session end the agent, not the job.
    setsid()?;
    umask(Mode::from_raw_mode(0o077));
    harden()?;
    limits::raise_open_files()?;
    rustix::thread::set_no_new_privs(true)?;
    // What leaves its parent, and even its session, is found and ended.
    orphans::adopt()?;
    Ok(())
}

/// Keeps what is in memory there: credentials on their way, and the runner's key.
pub(crate) fn harden() -> io::Result<()> {
    setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) })?;
    // A core would hold them. So would a debugger, and whatever terraform runs has our user. What
    // we start is dumpable again.
    set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    Ok(())
}

async fn serve(directory: JobDirectory) -> Result<(), Error> {
    let Some(lock) = directory.claim()? else {
        tracing::info!("another supervisor holds the job");
        return Ok(());
    };
    let (lease, spec, settings) = (directory.lease()?, directory.spec()?, directory.settings()?);
    let stage = directory.stage();
    if stage == job_directory::Stage::Ended {
        return Ok(());
    }
    // What a predecessor made durable is told from the first frame on.
    let states = directory.states()?.last().copied().unwrap_or(0);
    let begin = Status { states, protocol: control::PROTOCOL, ..Status::default() };
    let (status, _) = watch::channel(begin);
    let (orders_to, orders) = mpsc::channel(16);
    let listener = control::listen(directory.path()).map_err(Error::Listen)?;
    let serving = tokio::spawn(control::serve(listener, orders_to, status.subscribe()));
    // The agent may be gone already: then nobody needs to know.
    let mut stdout = io::stdout();
    let _ = writeln!(stdout, "{READY}").and_then(|()| stdout.flush());

    let supervisor = Supervisor { directory, lease, spec, settings, status, orders, _lock: lock };
    let done = if stage == job_directory::Stage::Executed {
        supervisor.succeed_a_dead_one().await
    } else {
        supervisor.wait_for_go().await
    };
    // The result is on disk; an attached agent is told, if it listens.
    tokio::time::sleep(Duration::from_millis(20)).await;
    serving.abort();
    done
}

struct Supervisor {
    directory: JobDirectory,
    lease: Lease,
    spec: Spec,
    settings: Settings,
    status: watch::Sender<Status>,
    orders: mpsc::Receiver<Order>,
    _lock: File,
}

/// A job that has its secrets. What its phases need is here.
struct Running {
    directory: JobDirectory,
    lease: Lease,
    spec: Spec,
    settings: Settings,
    status: watch::Sender<Status>,
    log: Log,
    terraform: Terraform,
    variables: Variables,
    endpoints: Endpoints,
    /// Whether `terraform apply` may have been started.
    applying: bool,
}

impl Supervisor {
    async fn wait_for_go(mut self) -> Result<(), Error> {
        let mut terminate = signal(SignalKind::terminate()).map_err(Error::Isolate)?;
        let mut interrupt = signal(SignalKind::interrupt()).map_err(Error::Isolate)?;
        let deadline = tokio::time::sleep(LONGEST_WAIT);
        tokio::pin!(deadline);
        let order = loop {
            let order = tokio::select! {
                order = self.orders.recv() => order,
                () = &mut deadline => None,
                _ = terminate.recv() => None,
                _ = interrupt.recv() => None,
            };
            // There is no log to say it in yet.
            if !matches!(order, Some(Order::Note(_))) {
                break order;
            }
        };
        match order {
            Some(Order::Go(go)) => self.go(go).await,
            Some(Order::Refuse(refused)) => {
                let log = self.log(Masker::default())?;
                let reason = refused.reason.clone();
                log.own("diagnostic", "error", &reason, serde_json::Value::Null);
                let kind = Failure::from_wire(refused.kind());
                self.finish(&log, &JobResult::failed(kind, reason)).await
            }
            Some(Order::Cancel(_)) => {
                let log = self.log(Masker::default())?;
                let reason = "canceled before terraform was started";
                self.finish(&log, &JobResult::failed(Failure::Canceled, reason)).await
            }
            Some(Order::Withdraw(_) | Order::GiveUp(_) | Order::Note(_)) | None => Ok(()),
        }
    }

    async fn go(mut self, go: v1::Go) -> Result<(), Error> {
        latchkey_failpoint::reach("sup.go.received");
        self.stage(Stage::Preparing);
        let Err(error) = self.work(go).await else { return Ok(()) };
        tracing::error!(error = &error as &dyn std::error::Error, "failed to begin the job");
        // Without a result the job would be given out again, to fail in the same way.
        let reason = sentence(&error);
        let result = JobResult::failed(Failure::Errored, reason.as_str());
        match self.log(Masker::default()) {
            Ok(log) => {
                log.own("diagnostic", "error", &reason, serde_json::Value::Null);
                self.finish(&log, &result).await
            }
            Err(_) => {
                self.end(0, &result).await;
                Ok(())
            }
        }
    }

    /// Fails only before anything of terraform's has run, and before there is a log.
    async fn work(&mut self, go: v1::Go) -> Result<(), Error> {
        let session = go.credentials.map(Session::from_wire);
        let mut masker = Masker::default();
        session.iter().flat_map(Session::secrets).for_each(|secret| masker.add(&secret));
        let variables = match variables::sort(go.variables) {
            Ok(variables) => variables,
            Err(error) => {
                let log = self.log(masker)?;
                let reason = format!("failed to {error}");
                log.own("diagnostic", "error", &reason, serde_json::Value::Null);
                return self.finish(&log, &JobResult::failed(Failure::Errored, reason)).await;
            }
        };
        variables.sensitive.iter().for_each(|secret| masker.add(secret));

        let state = self.serve_state(state_endpoint::Access::new()).await?;
        masker.add(state.password());
        let token_file = self.directory.join(TOKEN_FILE);
        let credentials = match session {
            Some(session) => Some(
                CredentialsEndpoint::start(session, &token_file).await.map_err(Error::Endpoint)?,
            ),
            None => None,
        };
        credentials.iter().for_each(|endpoint| masker.add(endpoint.token()));

        let (cancel_to, cancel) = watch::channel(Cancel::No);
        // Whoever stops the host signals terraform too; it must find its endpoints to the end.
        let mut terminate = signal(SignalKind::terminate()).map_err(Error::Isolate)?;
        let mut interrupt = signal(SignalKind::interrupt()).map_err(Error::Isolate)?;
        let environment =
            self.environment(&variables, &state, credentials.as_ref(), &token_file)?;
        let cage = Cage::of(&self.directory, &self.settings).map_err(Error::Confine)?;
        let log = self.log(masker)?;
        if let Ok(note) = std::fs::read_to_string(self.directory.join(ENGINE_NOTE)) {
            log.own("note", "info", &note, serde_json::Value::Null);
        }
        let terraform = Terraform {
            program: self.settings.terraform.clone(),
            root: self.directory.root(&self.spec),
            directory: self.directory.clone(),
            environment,
            cage,
            cancel,
            running: orphans::Running::default(),
            log: log.clone(),
        };
        let mut running = Running {
            directory: self.directory.clone(),
            lease: self.lease.clone(),
            spec: self.spec.clone(),
            settings: self.settings.clone(),
            status: self.status.clone(),
            log: log.clone(),
            terraform,
            variables,
            endpoints: Endpoints::of(&state, credentials.as_ref()),
            applying: false,
        };
        let job = async {
            match running.lease.phase {
                Phase::Plan => running.plan().await,
                Phase::Apply => running.apply().await,
            }
        };
        tokio::pin!(job);
        let mut given_up = false;
        let result = loop {
            let order = tokio::select! {
                result = &mut job => break result,
                Some(order) = self.orders.recv() => order,
                _ = terminate.recv() => continue,
                _ = interrupt.recv() => continue,
            };
            match order {
                Order::Go(go) => {
                    let session = go.credentials.map(Session::from_wire);
                    if let (Some(endpoint), Some(session)) = (&credentials, session) {
                        log.mask(session.secrets());
                        endpoint.replace(session);
                    }
                }
                Order::Cancel(force) => {
                    if force {
                        // Before anything is killed: something may survive.
                        note_forced(&self.directory);
                        credentials.iter().for_each(CredentialsEndpoint::close);
                    }
                    let wanted = if force { Cancel::Forced } else { Cancel::Graceful };
                    cancel_to.send_if_modified(|cancel| {
                        let more = wanted > *cancel;
                        *cancel = wanted.max(*cancel);
                        more
                    });
                }
                Order::Withdraw(_) => credentials.iter().for_each(CredentialsEndpoint::withdraw),
                Order::GiveUp(_) => {
                    if self.status.borrow().stage() < Stage::Executing {
                        given_up = true;
                        cancel_to.send_replace(Cancel::Forced);
                        credentials.iter().for_each(CredentialsEndpoint::withdraw);
                    }
                }
                Order::Note(text) => log.own("note", "warn", &text, serde_json::Value::Null),
                Order::Refuse(_) => {}
            }
        };
        if given_up && self.status.borrow().stage() < Stage::Executing {
            return Ok(());
        }
        let result = match result {
            Ok(result) => result,
            Err(error) => {
                // Ours, not terraform's: whether it changed anything is known by `exec` only.
                tracing::error!(error = &error as &dyn std::error::Error, "failed to run the job");
                let executed = self.status.borrow().stage() >= Stage::Executing;
                let unknown = executed && self.lease.phase == Phase::Apply;
                let kind = if unknown { Failure::EndedUnknown } else { Failure::Errored };
                let reason = sentence(&error);
                log.own("diagnostic", "error", &reason, serde_json::Value::Null);
                JobResult::failed(kind, reason)
            }
        };
        self.finish(&log, &result).await
    }

    /// Writes how the job ended, however long the disk is full, and tells it.
    async fn finish(&self, log: &Log, result: &JobResult) -> Result<(), Error> {
        let length = match log.drain().await {
            Ok(drained) => drained.length,
            Err(error) => {
                tracing::error!(error = &error as &dyn std::error::Error, "failed to end the log");
                self.status.borrow().log_length
            }
        };
        self.end(length, result).await;
        Ok(())
    }

    async fn end(&self, log_length: u64, result: &JobResult) {
        latchkey_failpoint::reach("sup.result.writing");
        record_at_last(&self.directory, "result.json", result).await;
        self.status.send_modify(|status| {
            status.log_length = log_length;
            status.set_stage(Stage::Ended);
        });
    }

    async fn serve_state(&self, access: state_endpoint::Access) -> Result<StateEndpoint, Error> {
        let states = self.status.clone();
        let (states_to, mut written) = watch::channel(0);
        let phase = self.lease.phase;
        let state = StateEndpoint::start(&self.directory, phase, states_to, access)
            .await
            .map_err(Error::Endpoint)?;
        tokio::spawn(async move {
            while written.changed().await.is_ok() {
                let newest = *written.borrow_and_update();
                states.send_modify(|status| status.states = status.states.max(newest));
            }
        });
        Ok(state)
    }

    fn log(&self, masker: Masker) -> Result<Log, Error> {
        let status = self.status.clone();
        let (told, mut length) = watch::channel(0);
        tokio::spawn(async move {
            while length.changed().await.is_ok() {
                let length = *length.borrow_and_update();
                status.send_modify(|status| status.log_length = status.log_length.max(length));
            }
        });
        let Settings { longest_log: cap, spool_limit, low_water, .. } = self.settings;
        let host = spool::Limits { spool: spool_limit, low_water };
        Ok(Log::start(&self.directory, masker, told, log::Limits { cap, host })?)
    }

    fn stage(&self, stage: Stage) {
        self.status.send_modify(|status| status.set_stage(stage));
    }

    fn environment(
        &self,
        variables: &Variables,
        state: &StateEndpoint,
        credentials: Option<&CredentialsEndpoint>,
        token_file: &Path,
    ) -> Result<std::collections::BTreeMap<String, std::ffi::OsString>, Error> {
        let own_config = self.directory.join(CLI_CONFIG);
        create_private(&own_config).map_err(Error::Endpoint)?;
        let passed = self.settings.pass_env.iter();
        Ok(environment::build(Sources {
            lease: &self.lease,
            spec: &self.spec,
            home: &self.directory.join("home"),
            tmpdir: &self.directory.tmpdir(),
            cli_config: self.settings.terraform_cli_config.as_deref().unwrap_or(&own_config),
            passed: passed
                .filter_map(|name| Some((name.clone(), std::env::var_os(name)?)))
                .collect(),
            user: &variables.environment,
            state: Some(StateAccess { address: state.address(), password: state.password() }),
            credentials: credentials
                .map(|endpoint| CredentialsAccess { uri: endpoint.uri(), token_file }),
        }))
    }
}

impl Running {
    /// Passes the point of no return: durable before it is told, told before terraform runs.
    fn executing(&self) -> Result<(), Error> {
        // A successor is needed from here on.
        self.directory.record("endpoints.json", &self.endpoints)?;
        if latchkey_failpoint::defect("exec.unrecorded") {
            return Ok(());
        }
        self.directory.record("exec", &self.lease)?;
        latchkey_failpoint::reach("sup.exec.synced");
        self.status.send_modify(|status| status.set_stage(Stage::Executing));
        Ok(())
    }
}

fn note_forced(directory: &JobDirectory) {
    if let Err(error) = directory.note(FORCED, b"") {
        let error = &error as &dyn std::error::Error;
        tracing::warn!(error, "failed to note that the job was canceled by force");
    }
}

/// Writes how the job ended, however long the disk is full.
async fn record_at_last(directory: &JobDirectory, name: &str, result: &JobResult) {
    while let Err(error) = directory.record(name, result) {
        let error = &error as &dyn std::error::Error;
        tracing::error!(error, "failed to write the result; it is tried again");
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

fn sentence(error: &Error) -> String {
    let mut text = format!("the runner failed to {error}");
    let mut source = std::error::Error::source(error);
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}
