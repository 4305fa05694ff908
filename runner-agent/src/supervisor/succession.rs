//! A supervisor in place of one that died while terraform may have lived.
//!
//! 1. It serves the state and the credentials where its predecessor did: terraform knows no
//!    other addresses. What its access needs was recorded beside `exec`; the session was not.
//! 2. It finds terraform: by the record of its process or, where that is of an earlier command,
//!    by what a supervisor's own commands have in common. It waits until none is left. Where the
//!    outcome of the apply is on record, only a hook can be left: nobody waits for that.
//! 3. It asks for the secrets again: for terraform, and to mask the log, which goes on then.
//! 4. At terraform's end it kills what else is left, and reports the outcome that is on record,
//!    or that it is not known. It brings what there is.

use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Serialize};
use tokio::task::JoinHandle;

use super::apply::OUTCOME;
use super::control::{Order, Stage};
use super::credentials_endpoint::{CredentialsEndpoint, Session};
use super::errored_state::{self, ErroredState};
use super::log::Log;
use super::mask::Masker;
use super::state_endpoint::{self, StateEndpoint};
use super::terraform::{self, Cancel, ProcessRecord};
use super::{Error, Supervisor, orphans, variables};
use crate::job::{Failure, JobResult, Phase};
use crate::job_directory::JobDirectory;

/// How terraform reaches its supervisor: the record `endpoints.json`, for a successor only. The
/// token of the credentials is in a file of its own, for terraform to read.
#[derive(Clone, Serialize, Deserialize)]
pub(super) struct Endpoints {
    state_port: u16,
    /// Also in terraform's environment.
    state_password: String,
    credentials_port: Option<u16>,
}

impl Endpoints {
    pub(super) fn of(state: &StateEndpoint, credentials: Option<&CredentialsEndpoint>) -> Self {
        Self {
            state_port: state.port(),
            state_password: state.password().expose_secret().to_owned(),
            credentials_port: credentials.map(CredentialsEndpoint::port),
        }
    }
}

impl Supervisor {
    pub(super) async fn succeed_a_dead_one(mut self) -> Result<(), Error> {
        let mut known = Masker::default();
        let credentials = self.serve_again(&mut known).await;
        self.status.send_modify(|status| {
            status.set_stage(Stage::Executing);
            status.wants_secrets = true;
        });
        let outcome = self.directory.read::<JobResult>(OUTCOME).ok();
        // Where the outcome is on record, only a hook can be left.
        let mut runs = outcome.is_none();
        let mut ended = wait_for_terraform(&self.directory, runs);
        let mut interrupted = self.directory.join(terraform::INTERRUPTED).exists();
        let mut log: Option<Log> = None;
        // Whether the secrets may still come: as long as the lease is not given up, however long the
        // control plane or the agent is away. What they mask would be lost, and waiting is cheap.
        let mut awaited = true;
        loop {
            if !runs && (log.is_some() || !awaited) {
                // One that was being started when the supervisor died shows late.
                if outcome.is_some() || find_terraform(&self.directory).is_none() {
                    break;
                }
                ended = wait_for_terraform(&self.directory, true);
                runs = true;
            }
            let order = tokio::select! {
                waited = &mut ended, if runs => {
                    waited.map_err(Error::Task)?;
                    runs = false;
                    continue;
                }
                Some(order) = self.orders.recv() => order,
            };
            match order {
                Order::Go(go) => {
                    let session = go.credentials.map(Session::from_wire);
                    let secrets = session.iter().flat_map(Session::secrets);
                    let secrets: Vec<SecretString> = secrets.collect();
                    if let (Some(endpoint), Some(session)) = (&credentials, session) {
                        endpoint.replace(session);
                    }
                    match (&log, variables::sort(go.variables)) {
                        (Some(log), _) => log.mask(secrets),
                        (None, Ok(variables)) => {
                            let mut masker = known.clone();
                            secrets.iter().for_each(|secret| masker.add(secret));
                            variables.sensitive.iter().for_each(|secret| masker.add(secret));
                            log = Some(self.log(masker)?);
                        }
                        // What they hold cannot be told: the log does not go on.
                        (None, Err(error)) => {
                            tracing::warn!(%error, "failed to understand the job's variables");
                            awaited = false;
                        }
                    }
                    self.status.send_modify(|status| status.wants_secrets = false);
                }
                Order::Cancel(true) => {
                    super::note_forced(&self.directory);
                    credentials.iter().for_each(CredentialsEndpoint::close);
                    orphans::end_all_of(&self.directory);
                }
                // A second SIGINT would make terraform give its state up.
                Order::Cancel(false) if !interrupted && runs => {
                    interrupted = true;
                    terraform::note_interrupted(&self.directory);
                    let process = find_terraform(&self.directory);
                    let leader = process.and_then(|process| Pid::from_raw(process.pid));
                    terraform::stop(leader, Cancel::Graceful);
                }
                Order::Withdraw(_) => {
                    credentials.iter().for_each(CredentialsEndpoint::withdraw);
                    awaited = false;
                }
                Order::GiveUp(_) => awaited = false,
                Order::Note(text) => {
                    if let Some(log) = &log {
                        log.own("note", "warn", &text, serde_json::Value::Null);
                    }
                }
                Order::Cancel(false) | Order::Refuse(_) => {}
            }
        }
        self.status.send_modify(|status| status.wants_secrets = false);
        let log = match log {
            Some(log) => log,
            None => {
                let log = self.log(known)?;
                log.leave_out_the_rest();
                log
            }
        };
        let left = orphans::end_all_of(&self.directory);
        if !left.is_empty() {
            left.tell("terraform", &log);
        }
        let result = match outcome {
            Some(outcome) => {
                log.drain().await?;
                let text = "the supervisor was lost after terraform's end, which is known; the \
                            hook after it, if there is one, may not have run";
                log.own("diagnostic", "warn", text, serde_json::Value::Null);
                outcome
            }
            None => self.unknown(&log).await?,
        };
        self.finish(&log, &result).await
    }

    /// Step 4, where nobody has seen terraform end.
    async fn unknown(&self, log: &Log) -> Result<JobResult, Error> {
        let mut reason =
            "the supervisor was lost; terraform has ended, but how is not known".to_owned();
        // A plan changes nothing: it can simply be repeated.
        let kind = match self.lease.phase {
            Phase::Plan => Failure::Errored,
            Phase::Apply => {
                match errored_state::take(&self.directory, &self.spec, None, log).await? {
                    ErroredState::Absent => {}
                    ErroredState::Kept => reason += "; it saved errored.tfstate",
                    ErroredState::Untaken(why) => reason = format!("{reason}; {why}"),
                }
                Failure::EndedUnknown
            }
        };
        if log.drain().await?.dumped {
            reason += "; it printed its state, which is kept apart";
        }
        log.own("diagnostic", "error", &reason, serde_json::Value::Null);
        Ok(JobResult::failed(kind, reason))
    }

    /// Step 1. Terraform may go without: then it saves what it cannot deliver.
    async fn serve_again(&self, known: &mut Masker) -> Option<CredentialsEndpoint> {
        let endpoints = match self.directory.read::<Endpoints>("endpoints.json") {
            Ok(endpoints) => endpoints,
            Err(error) => {
                let error = &error as &dyn std::error::Error;
                tracing::error!(error, "failed to learn where terraform looks for its state");
                return None;
            }
        };
        let access = state_endpoint::Access {
            port: endpoints.state_port,
            password: endpoints.state_password.into(),
        };
        known.add(&access.password);
        if let Err(error) = self.serve_state(access).await {
            let error = &error as &dyn std::error::Error;
            tracing::error!(error, "failed to serve the state in a dead supervisor's place");
        }
        let port = endpoints.credentials_port?;
        match CredentialsEndpoint::take_over(port, &self.directory.join(super::TOKEN_FILE)).await {
            Ok(endpoint) => {
                known.add(endpoint.token());
                if self.directory.join(super::FORCED).exists() {
                    endpoint.close();
                }
                Some(endpoint)
            }
            Err(error) => {
                tracing::error!(%error, "failed to serve credentials in a dead one's place");
                None
            }
        }
    }
}

/// Step 2. Nothing else may be taken for terraform, and terraform for nothing else: what is not
/// found here is killed.
fn find_terraform(directory: &JobDirectory) -> Option<ProcessRecord> {
    let recorded = directory.read::<ProcessRecord>(terraform::PROCESS).ok();
    let others = || orphans::commands_of(directory).into_iter().find_map(ProcessRecord::of);
    recorded.filter(|process| process.is_alive()).or_else(others)
}

/// Waits until none is left, where one may be.
fn wait_for_terraform(directory: &JobDirectory, runs: bool) -> JoinHandle<()> {
    let directory = directory.clone();
    tokio::task::spawn_blocking(move || {
        while let Some(process) = find_terraform(&directory).filter(|_| runs) {
            wait_for(process);
        }
    })
}

fn wait_for(process: ProcessRecord) {
    let handle = Pid::from_raw(process.pid).and_then(|p| pidfd_open(p, PidfdFlags::empty()).ok());
    // Checked after the handle is held: the number cannot be given away any more.
    while process.is_alive() {
        match &handle {
            Some(handle) => {
                let mut wait = [PollFd::new(handle, PollFlags::IN)];
                while poll(&mut wait, None) == Err(Errno::INTR) {}
            }
            None => orphans::pause(Duration::from_millis(100)),
        }
    }
}
