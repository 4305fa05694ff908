//! A supervisor in place of one that died while terraform may have lived.
//!
//! 1. It serves the state and the credentials where its predecessor did: terraform knows no
//!    other addresses. What its access needs was recorded beside `exec`; the session was not.
//! 2. It finds terraform: by the record of its process or, where that is of an earlier command,
//!    among the processes of the host.
//! 3. It asks for the secrets again: for terraform, and to mask the log, which goes on then.
//! 4. At terraform's end it reports that the outcome is not known, and brings what there is.

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, sleep_until};

use super::apply::{ErroredState, keep_errored_state};
use super::control::{Order, Stage};
use super::credentials_endpoint::{CredentialsEndpoint, Session};
use super::mask::Masker;
use super::state_endpoint::{self, StateEndpoint};
use super::terraform::{self, Cancel, ProcessRecord};
use super::{Error, LONGEST_WAIT, Supervisor, orphans, variables};
use crate::job::{Failure, JobResult, Phase};

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
        let process = self.find_terraform();
        let leader = process.and_then(|process| Pid::from_raw(process.pid));
        let mut ended = tokio::task::spawn_blocking(move || wait_for(process));
        let mut runs = true;
        let mut interrupted = self.directory.join(terraform::INTERRUPTED).exists();
        let mut log = None;
        // Whether the secrets may still come.
        let mut awaited = true;
        let deadline = sleep_until(Instant::now() + LONGEST_WAIT);
        tokio::pin!(deadline);
        while runs || (log.is_none() && awaited) {
            let order = tokio::select! {
                waited = &mut ended, if runs => {
                    waited.map_err(Error::Task)?;
                    runs = false;
                    deadline.as_mut().reset(Instant::now() + LONGEST_WAIT);
                    continue;
                }
                () = &mut deadline, if !runs => {
                    awaited = false;
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
                        (Some(log), _) => super::log::Log::mask(log, secrets),
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
                    terraform::stop(leader.filter(|_| runs), Cancel::Forced);
                    orphans::end_all_of(&self.directory);
                    credentials.iter().for_each(CredentialsEndpoint::withdraw);
                }
                // A second SIGINT would make terraform give its state up.
                Order::Cancel(false) if !interrupted && runs => {
                    interrupted = true;
                    terraform::note_interrupted(&self.directory);
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
            let text = orphans::sentence("terraform", &left);
            log.own("diagnostic", "warn", &text, serde_json::Value::Null);
        }
        let mut reason =
            "the supervisor was lost; terraform has ended, but how is not known".to_owned();
        match keep_errored_state(&self.directory, &self.directory.root(&self.spec)).await? {
            ErroredState::Absent => {}
            ErroredState::Kept => reason += "; it saved errored.tfstate",
            ErroredState::Unreadable(error) => {
                reason = format!("{reason}; errored.tfstate cannot be read: {error}");
            }
        }
        if log.drain().await?.dumped {
            reason += "; it printed its state, which is kept apart";
        }
        log.own("diagnostic", "error", &reason, serde_json::Value::Null);
        // A plan changes nothing: it can simply be repeated.
        let kind = match self.lease.phase {
            Phase::Plan => Failure::Errored,
            Phase::Apply => Failure::EndedUnknown,
        };
        self.finish(&log, &JobResult::failed(kind, reason)).await
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
                Some(endpoint)
            }
            Err(error) => {
                tracing::error!(%error, "failed to serve credentials in a dead one's place");
                None
            }
        }
    }

    /// Step 2.
    fn find_terraform(&self) -> Option<ProcessRecord> {
        let recorded = self.directory.read::<ProcessRecord>(terraform::PROCESS).ok();
        recorded
            .filter(|process| process.is_alive())
            .or_else(|| ProcessRecord::find(&self.directory, &self.settings.terraform, &self.lease))
    }
}

fn wait_for(process: Option<ProcessRecord>) {
    let Some(process) = process else { return };
    let handle = Pid::from_raw(process.pid).and_then(|p| pidfd_open(p, PidfdFlags::empty()).ok());
    // Checked after the handle is held: the number cannot be given away any more.
    let (Some(handle), true) = (handle, process.is_alive()) else { return };
    let mut wait = [PollFd::new(&handle, PollFlags::IN)];
    while poll(&mut wait, None) == Err(Errno::INTR) {}
}
