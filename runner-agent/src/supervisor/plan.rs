//! The plan phase: init, plan, show, seal.

use std::ffi::OsString;
use std::io;
use std::path::PathBuf;

use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::hooks::Step;
use super::mask::Masker;
use super::output::LARGEST_OUTPUT;
use super::plan_changes::{self, Changes};
use super::terraform::{Cancel, Captured, Ended};
use super::{Error, Running};
use crate::job::{Digests, Failure, JobResult, Kind};
use crate::provider_cache::Loan;
use crate::untrusted::Folder;
use crate::{digest, root_module, workspace};

/// The plugin cache of this job's `init`: in its own HOME, where its programs may write.
const PLUGINS: &str = "home/.latchkey-plugins";

const LOCK_FILE: &str = ".terraform.lock.hcl";

/// How much of what terraform shows people the log takes.
const LONGEST_TEXT: usize = 16 << 20;

/// How much of it is handed to the log at once.
const PIECE_OF_TEXT: usize = 256 << 10;

#[derive(Debug, thiserror::Error)]
#[error("read the plan: terraform shows more than {} MiB of it", LARGEST_OUTPUT >> 20)]
struct TooLarge;

impl Running {
    /// Plans and seals what an apply will need.
    pub(super) async fn plan(&mut self) -> Result<JobResult, Error> {
        // From here on terraform may have run.
        self.executing()?;
        if root_module::stands_in(&self.terraform.root) {
            let message = "the configuration's `cloud` or `remote` block is not used: Latchkey \
                           keeps the state itself and begins with what it has, which may be none";
            self.log.own("diagnostic", "warn", message, Value::Null);
        }
        if let Some(failed) = self.init(&[]).await? {
            return Ok(failed);
        }
        if let Some(failed) = self.before(Step::Plan).await? {
            return Ok(failed);
        }
        self.step("plan");
        let ended = {
            let mut arguments = self.plan_arguments();
            let declared = root_module::declared(&self.terraform.root);
            let var_file = self.variables.of_plan(&declared);
            if var_file.is_some() {
                arguments.push("-var-file=/dev/stdin".into());
            }
            self.terraform.run(&arguments, var_file.as_ref()).await?
        };
        self.log.drain().await?;
        let failed = self.after(Step::Plan, ended).await?;
        match ended {
            Ended::Exited(0 | 2) => {}
            Ended::Exited(_) | Ended::Killed(_) | Ended::NeverStarted => {
                return Ok(self.failed("terraform plan", ended));
            }
        }
        if let Some(failed) = failed {
            return Ok(failed);
        }
        let directory = self.directory.path().to_owned();
        let working_directory = self.spec.working_directory.clone();
        let to = self.directory.join("workspace.tar.gz");
        // Beside `show`, which only reads.
        let sealed = tokio::task::spawn_blocking(move || {
            let workspace = workspace::pack(&directory, &working_directory, &to)?;
            let plan = digest::of_file(&directory.join("plan.bin")).map_err(|source| {
                workspace::Error::Pack { path: directory.join("plan.bin"), source }
            })?;
            Ok::<_, workspace::Error>((workspace, plan))
        });
        let changes = match self.shown().await? {
            Ok(changes) => changes,
            Err(failed) => return Ok(failed),
        };
        self.directory.record_bytes("changes.json", &changes.bytes)?;

        let (packed, plan) = match sealed.await.map_err(Error::Task)? {
            Ok(digests) => digests,
            Err(error) => return Ok(self.refused(Failure::Errored, &error)),
        };
        if !packed.left_out.is_empty() {
            self.log.own_text("console", &left_out(&packed.left_out));
        }
        let workspace = packed.digest;
        if *self.terraform.cancel.borrow() != Cancel::No {
            return Ok(self.failed("terraform plan", Ended::NeverStarted));
        }
        let lock_file = self.lock_file().await?;
        let lock_file = lock_file.map(|bytes| digest::of_bytes(&bytes)).unwrap_or_default();
        let counts = changes.counts;
        Ok(JobResult::Plan {
            digests: Digests { plan, workspace, lock_file, changes: changes.digest },
            applyable: changes.applyable,
            add: counts.add,
            change: counts.change,
            destroy: counts.destroy,
            import: counts.import,
            engine: self.settings.engine,
            terraform_version: self.settings.terraform_version.clone(),
        })
    }

    /// Runs `init`. Answers how the job failed, if it did.
    pub(super) async fn init(&mut self, more: &[&str]) -> Result<Option<JobResult>, Error> {
        if let Some(failed) = self.before(Step::Init).await? {
            return Ok(Some(failed));
        }
        self.step("init");
        let lent = self.lend_providers().await?;
        let mut arguments = words(&["init", "-input=false", "-no-color"]);
        if prints_json_at_init(&self.settings.terraform_version) {
            arguments.push("-json".into());
        }
        arguments.extend(words(more));
        let ended = self.terraform.run(&arguments, None).await?;
        self.log.drain().await?;
        let failed = self.after(Step::Init, ended).await?;
        match ended {
            Ended::Exited(0) => {
                self.take_in_providers(lent).await?;
                Ok(failed)
            }
            Ended::Exited(_) | Ended::Killed(_) | Ended::NeverStarted => {
                Ok(Some(self.failed("terraform init", ended)))
            }
        }
    }

    /// Reads the lock file; the way to it is the job's to change.
    pub(super) async fn lock_file(&self) -> Result<Option<Vec<u8>>, Error> {
        let (work, below) = (self.directory.join("work"), self.spec.working_directory.clone());
        let read = move || match Folder::open(&work, &below) {
            Ok(root) => root.read(LOCK_FILE),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        };
        tokio::task::spawn_blocking(read).await.map_err(Error::Task)?.map_err(Error::Digest)
    }

    /// Gives `init` a plugin cache of its own, filled with the packages that it would take from
    /// a shared one.
    async fn lend_providers(&mut self) -> Result<Option<Loan>, Error> {
        let Some(shared) = self.settings.provider_cache.clone() else { return Ok(None) };
        let lock_file = self.directory.root(&self.spec).join(LOCK_FILE);
        let loan = Loan::new(
            shared,
            self.directory.join(PLUGINS),
            lock_file,
            self.settings.provider_cache_limit,
        );
        let lending = loan.clone();
        let lending = tokio::task::spawn_blocking(move || lending.lend());
        let Some(lent) = unless_canceled(&self.terraform.cancel, lending).await? else {
            return Ok(None);
        };
        match lent {
            Ok(packages) => tracing::debug!(packages, "lent provider packages"),
            // Then `init` fetches them itself.
            Err(error) => {
                tracing::warn!(error = &error as &dyn std::error::Error, "no provider cache");
                return Ok(None);
            }
        }
        let plugins = self.directory.join(PLUGINS).into_os_string();
        self.terraform.environment.insert("TF_PLUGIN_CACHE_DIR".into(), plugins);
        Ok(Some(loan))
    }

    /// Keeps what `init` has fetched for the next one.
    async fn take_in_providers(&mut self, lent: Option<Loan>) -> Result<(), Error> {
        let Some(loan) = lent else { return Ok(()) };
        let taking = tokio::task::spawn_blocking(move || loan.take_in());
        let Some(taken) = unless_canceled(&self.terraform.cancel, taking).await? else {
            return Ok(());
        };
        match taken {
            Ok(packages) => tracing::debug!(packages, "kept provider packages"),
            Err(error) => {
                let error = &error as &dyn std::error::Error;
                tracing::warn!(error, "failed to keep provider packages");
            }
        }
        Ok(())
    }

    fn plan_arguments(&self) -> Vec<OsString> {
        let mut arguments =
            words(&["plan", "-input=false", "-no-color", "-json", "-detailed-exitcode"]);
        let mut out = OsString::from("-out=");
        out.push(self.directory.join("plan.bin"));
        arguments.push(out);
        match self.spec.kind {
            Kind::Destroy => arguments.push("-destroy".into()),
            Kind::RefreshOnly => arguments.push("-refresh-only".into()),
            Kind::PlanAndApply | Kind::PlanOnly => {}
        }
        arguments.extend(self.spec.target.iter().map(|a| format!("-target={a}").into()));
        arguments.extend(self.spec.replace.iter().map(|a| format!("-replace={a}").into()));
        arguments
    }

    /// Reads the saved plan as a program does and, beside it, as people do.
    async fn shown(&mut self) -> Result<Result<Changes, JobResult>, Error> {
        let plan: OsString = self.directory.join("plan.bin").into();
        let mut human = self.terraform.clone();
        let human = async {
            let mut arguments = words(&["show", "-no-color"]);
            arguments.push(plan);
            human.capture(&arguments).await
        };
        // Polled side by side: two processes of terraform on two cores.
        let (changes, human) = {
            let mut json = self.terraform.clone();
            let arguments = show_json(&self.directory);
            tokio::join!(async move { json.capture(&arguments).await }, human)
        };
        let human = human?;
        if human.ended == Ended::Exited(0) {
            self.text(&String::from_utf8_lossy(&human.stdout.bytes), "plan_text");
        }
        self.changes(&changes?)
    }

    /// Writes what terraform showed people into the log, in pieces: it is not held twice.
    fn text(&self, text: &str, kind: &str) {
        let mut rest = &text[..text.floor_char_boundary(LONGEST_TEXT)];
        let left_out = text.len() - rest.len();
        while !rest.is_empty() {
            let limit = rest.floor_char_boundary(PIECE_OF_TEXT);
            let end = match rest[..limit].rfind('\n') {
                Some(newline) if limit < rest.len() => newline + 1,
                Some(_) | None => limit,
            };
            self.log.own_text(kind, &rest[..end]);
            rest = &rest[end..];
        }
        if left_out > 0 {
            let text = format!("{left_out} bytes of this text are left out");
            self.log.own("gap", "warn", &text, json!({"bytes": left_out}));
        }
    }

    /// Reduces what `show -json` printed. The output holds secrets and goes nowhere else.
    pub(super) fn changes(
        &mut self,
        shown: &Captured,
    ) -> Result<Result<Changes, JobResult>, Error> {
        if shown.ended != Ended::Exited(0) {
            self.text(&String::from_utf8_lossy(&shown.stderr.bytes), "console");
            return Ok(Err(self.failed("terraform show", shown.ended)));
        }
        if shown.stdout.left_out > 0 {
            return Ok(Err(self.refused(Failure::Errored, &TooLarge)));
        }
        // Of both phases the same, unlike credentials: so the digests are too.
        let mut masker = Masker::default();
        self.variables.sensitive.iter().for_each(|secret| masker.add(secret));
        match plan_changes::reduce(&shown.stdout.bytes, &masker) {
            Ok(changes) => Ok(Ok(changes)),
            Err(error) => Ok(Err(self.refused(Failure::Errored, &error))),
        }
    }

    fn step(&self, step: &str) {
        let phase = self.lease.phase.name();
        let more = json!({"phase": phase, "step": step});
        self.log.own("phase", "info", &format!("terraform {step}"), more);
    }

    pub(super) fn apply_step(&self) {
        self.step("apply");
    }

    /// Names a failure by how terraform ended and whether somebody asked for it.
    pub(super) fn failed(&self, what: &str, ended: Ended) -> JobResult {
        let cancel = *self.terraform.cancel.borrow();
        let canceled = cancel != Cancel::No;
        let (kind, reason, exit_code) = match ended {
            Ended::NeverStarted => {
                (Failure::Canceled, "canceled before terraform went on".to_owned(), None)
            }
            Ended::Exited(code) if canceled => {
                (Failure::Canceled, format!("canceled; {what} exited with code {code}"), Some(code))
            }
            Ended::Exited(code) => {
                (Failure::Errored, format!("{what} exited with code {code}"), Some(code))
            }
            // A killed apply may have changed what its last state does not say.
            Ended::Killed(signal) if self.applying => {
                let by = if canceled { "by force" } else { "by the host" };
                let reason = format!("{what} was killed {by} (signal {signal}); check the state");
                (Failure::EndedUnknown, reason, None)
            }
            Ended::Killed(signal) if canceled => {
                (Failure::Canceled, format!("canceled by force; {what} got signal {signal}"), None)
            }
            Ended::Killed(signal) => {
                (Failure::Errored, format!("{what} was killed by signal {signal}"), None)
            }
        };
        JobResult::Failed { kind, reason, exit_code }
    }

    /// A failure that is ours to explain: it goes into the log too.
    pub(super) fn refused(&self, kind: Failure, error: &dyn std::error::Error) -> JobResult {
        let mut reason = format!("failed to {error}");
        let mut source = error.source();
        while let Some(error) = source {
            reason = format!("{reason}: {error}");
            source = error.source();
        }
        self.log.own("diagnostic", "error", &reason, Value::Null);
        JobResult::failed(kind, reason)
    }
}

/// Waits for what is done in the background, but no longer once the job is canceled. It ends by
/// itself then.
async fn unless_canceled<T>(
    cancel: &watch::Receiver<Cancel>,
    work: JoinHandle<T>,
) -> Result<Option<T>, Error> {
    let mut cancel = cancel.clone();
    tokio::select! {
        done = work => done.map(Some).map_err(Error::Task),
        Ok(_) = cancel.wait_for(|cancel| *cancel != Cancel::No) => Ok(None),
    }
}

/// Says what the apply will not find. A few names tell enough.
fn left_out(paths: &[PathBuf]) -> String {
    const SHOWN: usize = 20;
    let mut text = String::from("links that lead outside, sockets and devices are not sealed:\n");
    for path in paths.iter().take(SHOWN) {
        text += &format!("  {}\n", path.display());
    }
    if let Some(more) = paths.len().checked_sub(SHOWN).filter(|more| *more > 0) {
        text += &format!("  and {more} more\n");
    }
    text
}

pub(super) fn show_json(directory: &crate::job_directory::JobDirectory) -> Vec<OsString> {
    let mut arguments = words(&["show", "-json"]);
    arguments.push(directory.join("plan.bin").into());
    arguments
}

pub(super) fn words(words: &[&str]) -> Vec<OsString> {
    words.iter().map(OsString::from).collect()
}

/// `init -json` came with terraform 1.9.
fn prints_json_at_init(version: &str) -> bool {
    let mut numbers = version.split('.').map(|part| part.parse::<u32>().unwrap_or(0));
    (numbers.next(), numbers.next()) >= (Some(1), Some(9))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn a_cancel_is_heard_while_the_provider_cache_is_waited_for() {
        let (cancel_to, cancel) = watch::channel(Cancel::No);
        let (release, held) = std::sync::mpsc::sync_channel::<()>(1);
        let work = tokio::task::spawn_blocking(move || held.recv());
        cancel_to.send_replace(Cancel::Graceful);
        let heard = unless_canceled(&cancel, work);
        let heard = tokio::time::timeout(Duration::from_secs(30), heard).await.expect("it ends");
        assert!(heard.unwrap().is_none());
        drop(release);
    }

    #[tokio::test]
    async fn what_nobody_cancels_is_waited_for() {
        let (cancel_to, cancel) = watch::channel(Cancel::No);
        drop(cancel_to);
        let work = tokio::task::spawn_blocking(|| 7);
        assert_eq!(unless_canceled(&cancel, work).await.unwrap(), Some(7));
    }

    #[test]
    fn old_versions_have_no_json_at_init() {
        for (version, expect) in [("1.11.4", true), ("1.9.0", true), ("1.8.5", false), ("", false)]
        {
            assert_eq!(prints_json_at_init(version), expect, "{version}");
        }
    }
}
