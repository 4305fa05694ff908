//! The operator's own programs before and after init, plan and apply.
//!
//! They run in the job's working directory, with the job's environment and confined as terraform
//! is. Credentials they get where terraform gets them: from the endpoint. What they print goes
//! line by line into the log, masked and marked as the hook's.
//!
//! A failing hook before a step fails the phase, and the step is not started. A failing hook
//! after a step is a warning, or fails the phase if the operator wants that; that an apply
//! succeeded is never hidden by the hook after it.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process_group};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};
use tokio::process::Command;

use super::log::Log;
use super::output::Output;
use super::terraform::{Cancel, Ended, changed, ended};
use super::{Error, Running};
use crate::job::{Failure, JobResult};

/// How long a hook may take to obey SIGINT.
const OBEDIENCE: Duration = Duration::from_secs(10);

/// How much of one hook's output the log takes.
const LONGEST_OUTPUT: usize = 1 << 20;
const LONGEST_LINE: usize = 32 * 1024;

/// What the runner's configuration says of hooks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Hooks {
    pub(crate) directory: Option<PathBuf>,
    pub(crate) timeout: Duration,
    pub(crate) after: AfterFailure,
}

impl Default for Hooks {
    fn default() -> Self {
        Self { directory: None, timeout: Duration::from_secs(300), after: AfterFailure::Warn }
    }
}

/// What a failing hook after a step does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub(crate) enum AfterFailure {
    #[value(name = "after=warn")]
    Warn,
    #[value(name = "after=fail")]
    Fail,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    Init,
    Plan,
    Apply,
}

impl Step {
    fn name(self) -> &'static str {
        match self {
            Self::Init => "init",
            Self::Plan => "plan",
            Self::Apply => "apply",
        }
    }
}

/// How a hook ended that did not succeed.
enum Failed {
    Exited(i32),
    Killed(i32),
    TimedOut(Duration),
    Canceled,
    Unusable(io::Error),
}

impl Failed {
    fn sentence(&self, name: &str) -> String {
        match self {
            Self::Exited(code) => format!("the hook {name} exited with code {code}"),
            Self::Killed(signal) => format!("the hook {name} was killed by signal {signal}"),
            Self::TimedOut(limit) => {
                format!("the hook {name} was stopped: it took longer than {} s", limit.as_secs())
            }
            Self::Canceled => format!("canceled; the hook {name} was stopped"),
            Self::Unusable(error) => format!("the hook {name} cannot be run: {error}"),
        }
    }

    fn exit_code(&self) -> Option<i32> {
        match self {
            Self::Exited(code) => Some(*code),
            Self::Killed(_) | Self::TimedOut(_) | Self::Canceled | Self::Unusable(_) => None,
        }
    }
}

impl Running {
    /// Runs the hook before a step. Answers how the job failed, if it did.
    pub(super) async fn before(&mut self, step: Step) -> Result<Option<JobResult>, Error> {
        let name = format!("before-{}", step.name());
        let Err(failed) = self.hook(&name, None).await? else { return Ok(None) };
        let kind = match failed {
            Failed::Canceled => Failure::Canceled,
            Failed::Exited(_) | Failed::Killed(_) | Failed::TimedOut(_) | Failed::Unusable(_) => {
                Failure::Errored
            }
        };
        let unchanged = if step == Step::Apply { "; nothing was changed" } else { "" };
        let reason = format!("{}{unchanged}", failed.sentence(&name));
        self.log.own("diagnostic", "error", &reason, Value::Null);
        Ok(Some(JobResult::Failed { kind, reason, exit_code: failed.exit_code() }))
    }

    /// Runs the hook after a step that ended so. Answers how the job failed by it, if it did.
    pub(super) async fn after(
        &mut self,
        step: Step,
        how: Ended,
    ) -> Result<Option<JobResult>, Error> {
        let Ended::Exited(code) = how else { return Ok(None) };
        if *self.terraform.cancel.borrow() != Cancel::No {
            return Ok(None);
        }
        let name = format!("after-{}", step.name());
        let Err(failed) = self.hook(&name, Some(code)).await? else { return Ok(None) };
        let fails = self.settings.hooks.after == AfterFailure::Fail;
        let level = if fails { "error" } else { "warn" };
        let reason = failed.sentence(&name);
        self.log.own("diagnostic", level, &reason, Value::Null);
        // That changes were made, or that the step itself failed, is what people must hear.
        let succeeded = code == 0 || (step == Step::Plan && code == 2);
        if !fails || !succeeded || step == Step::Apply {
            return Ok(None);
        }
        let exit_code = failed.exit_code();
        Ok(Some(JobResult::Failed { kind: Failure::Errored, reason, exit_code }))
    }

    async fn hook(&mut self, name: &str, code: Option<i32>) -> Result<Result<(), Failed>, Error> {
        let Some(program) = self.settings.hooks.directory.as_ref().map(|d| d.join(name)) else {
            return Ok(Ok(()));
        };
        match is_program(&program) {
            Ok(true) => {}
            Ok(false) => return Ok(Ok(())),
            Err(error) => return Ok(Err(Failed::Unusable(error))),
        }
        if *self.terraform.cancel.borrow() != Cancel::No {
            return Ok(Err(Failed::Canceled));
        }
        let phase = self.lease.phase.name();
        let more = json!({"phase": phase, "step": "hook", "hook": name});
        self.log.own("phase", "info", &format!("hook {name}"), more);

        let mut command = Command::new(&program);
        command.current_dir(&self.terraform.root).process_group(0);
        command.env_clear().envs(&self.terraform.environment);
        command.env("LATCHKEY_HOOK", name);
        command.env("LATCHKEY_PLAN_FILE", self.directory.join("plan.bin"));
        if let Some(code) = code {
            command.env("LATCHKEY_EXIT_CODE", code.to_string());
        }
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = match self.terraform.cage.start(&mut command) {
            Ok(child) => child,
            Err(error) => return Ok(Err(Failed::Unusable(error))),
        };
        let pid = child.id().and_then(|id| i32::try_from(id).ok()).unwrap_or_default();
        self.terraform.running.begins(pid);
        let (over_to, over) = tokio::sync::watch::channel(false);
        let stdout = child.stdout.take().map(|pipe| Output::new(pipe, over.clone()));
        let stderr = child.stderr.take().map(|pipe| Output::new(pipe, over));
        let printing = async {
            tokio::join!(forward(stdout, &self.log, name), forward(stderr, &self.log, name));
        };
        let cancel = self.terraform.cancel.clone();
        let running = self.terraform.running.clone();
        let limit = self.settings.hooks.timeout;
        let watching = async {
            let how = watch(&mut child, Pid::from_raw(pid), cancel, limit).await;
            running.ends(pid);
            let left = running.end_others().await;
            over_to.send_replace(true);
            (how, left)
        };
        let ((how, left), ()) = tokio::join!(watching, printing);
        if !left.is_empty() {
            left.tell(&format!("the hook {name}"), &self.log);
        }
        Ok(how)
    }
}

/// Answers false where there is none.
fn is_program(path: &Path) -> io::Result<bool> {
    match std::fs::metadata(path) {
        Ok(metadata) if metadata.is_file() && metadata.permissions().mode() & 0o111 != 0 => {
            Ok(true)
        }
        Ok(_) => Err(io::Error::new(io::ErrorKind::PermissionDenied, "it is not executable")),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

async fn watch(
    child: &mut tokio::process::Child,
    group: Option<Pid>,
    mut cancel: tokio::sync::watch::Receiver<Cancel>,
    limit: Duration,
) -> Result<(), Failed> {
    let signal = |signal| {
        if let Some(group) = group {
            let _ = kill_process_group(group, signal);
        }
    };
    let mut sent = Cancel::No;
    let mut stopped = None;
    let wait = tokio::time::sleep(limit);
    tokio::pin!(wait);
    let status = loop {
        tokio::select! {
            status = child.wait() => break status,
            () = changed(&mut cancel, sent) => {
                sent = *cancel.borrow();
                stopped = Some(Failed::Canceled);
                signal(if sent == Cancel::Forced { Signal::KILL } else { Signal::INT });
                wait.as_mut().reset(tokio::time::Instant::now() + OBEDIENCE);
            }
            () = &mut wait => {
                let again = stopped.is_some();
                signal(if again { Signal::KILL } else { Signal::INT });
                stopped.get_or_insert(Failed::TimedOut(limit));
                wait.as_mut().reset(tokio::time::Instant::now() + OBEDIENCE);
            }
        }
    };
    match (stopped, status.map(ended)) {
        (Some(failed), _) => Err(failed),
        (None, Ok(Ended::Exited(0))) => Ok(()),
        (None, Ok(Ended::Exited(code))) => Err(Failed::Exited(code)),
        (None, Ok(Ended::Killed(signal))) => Err(Failed::Killed(signal)),
        (None, Ok(Ended::NeverStarted)) => Ok(()),
        (None, Err(error)) => Err(Failed::Unusable(error)),
    }
}

/// Brings what a hook prints into the log, up to a limit, and reads on beyond it.
async fn forward(output: Option<impl AsyncRead + Unpin>, log: &Log, name: &str) {
    let Some(output) = output else { return };
    let mut output = BufReader::with_capacity(64 * 1024, output);
    let more = json!({"hook": name});
    let (mut taken, mut left_out) = (0, 0);
    // Of a line that is too long, only the length goes on.
    let (mut line, mut length) = (Vec::new(), 0);
    while let Ok(buffer) = output.fill_buf().await {
        let read = buffer.len();
        let mut lines = Vec::new();
        let mut end_of_line = |line: &mut Vec<u8>, length: &mut usize| {
            taken += *length;
            // A part of a line might hold a part of a secret.
            if *length > LONGEST_LINE || taken > LONGEST_OUTPUT {
                left_out += *length;
            } else {
                let text = String::from_utf8_lossy(line);
                lines.push(text.trim_end_matches(['\n', '\r']).to_owned());
            }
            line.clear();
            *length = 0;
        };
        for piece in buffer.split_inclusive(|byte| *byte == b'\n') {
            length += piece.len();
            if length <= LONGEST_LINE {
                line.extend_from_slice(piece);
            }
            if piece.ends_with(b"\n") {
                end_of_line(&mut line, &mut length);
            }
        }
        if read == 0 && length > 0 {
            end_of_line(&mut line, &mut length);
        }
        if !lines.is_empty() {
            // All that was there at once: the log is synced once for them.
            log.printed("hook", &lines, &more);
        }
        if read == 0 {
            break;
        }
        output.consume(read);
    }
    if left_out > 0 {
        let text = format!("{left_out} bytes of the hook {name}'s output are left out");
        log.own("gap", "warn", &text, json!({"bytes": left_out, "hook": name}));
    }
}
