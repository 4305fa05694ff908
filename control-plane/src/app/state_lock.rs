//! The lock that a workstation's terraform takes on a state, and who may write meanwhile.
//!
//! A run excludes others by its hold on the environment; a workstation by this lock. Both stand in
//! the environment's record, so one commit decides who came first: no run has its turn while a
//! workstation holds the lock, and no workstation gets it from a run that holds the environment.
//!
//! The lock that a person puts on the environment ([`super::locks`]) keeps all others from the
//! state, too. As a run goes on under it, so does a workstation that had the state's lock before:
//! to refuse what it writes would lose what it did.

use std::sync::Arc;

use latchkey_domain::environment::{Hold, Locked, StateLock};
use latchkey_domain::id::RunId;
use latchkey_domain::time::Timestamp;
use latchkey_proto::v1::Reason;

use super::App;
use super::finish_job::printable;
use crate::auth::{Caller, Right, Standing};
use crate::error::{Error, Result, rfc3339};
use crate::store::record::environment::{Environment, EnvironmentRecord};
use crate::store::record::{Loaded, encode};
use crate::store::{Batch, CommitError, Expect};

const ATTEMPTS: usize = 16;

const LONGEST_ID: usize = 128;
const LONGEST_TEXT: usize = 256;

/// What terraform says of itself when it asks for the lock. Shown, never trusted.
#[derive(Clone, Debug, Default)]
pub struct LockRequest {
    pub id: String,
    pub operation: String,
    pub workstation: String,
    pub info: String,
    pub engine_version: String,
}

impl LockRequest {
    /// Takes it as far as it can be kept and shown.
    fn checked(self) -> Result<Self> {
        let Self { id, operation, workstation, info, engine_version } = self;
        let is_plain = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
        if !(1..=LONGEST_ID).contains(&id.len()) || !id.bytes().all(is_plain) {
            let message = "a lock's id has 1 to 128 letters, digits, `.`, `_` and `-`";
            return Err(Error::field("lock_id", message));
        }
        let shown = |text: String| printable(&text, LONGEST_TEXT);
        Ok(Self {
            id,
            operation: shown(operation),
            workstation: shown(workstation),
            info: shown(info),
            engine_version: shown(engine_version),
        })
    }
}

/// Who has the state, as terraform is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// All that terraform shows of it, so it says more than an id.
    pub id: String,
    pub operation: String,
    pub who: String,
    pub info: String,
    pub version: String,
    pub since: Timestamp,
}

/// What became of a wish to lock or unlock.
#[derive(Debug, PartialEq, Eq)]
pub enum LockAnswer {
    Done,
    /// Somebody else has it.
    Held(Holder),
}

impl App {
    /// Locks a state for a workstation. A repeat with the same id changes nothing.
    pub async fn lock_state(
        &self,
        caller: &Caller,
        organization: &str,
        environment: &str,
        request: LockRequest,
    ) -> Result<LockAnswer> {
        let request = request.checked()?;
        for _ in 0..ATTEMPTS {
            let (standing, found) =
                self.on(caller, organization, environment, Right::Administer).await?;
            // An old state would be worked on.
            self.check_history()?;
            let hold = &found.value.hold;
            if let Some(lock) = hold.state_lock.as_ref() {
                if lock.id == request.id && lock.user == caller.name() {
                    return Ok(LockAnswer::Done);
                }
                return Ok(LockAnswer::Held(of_workstation(lock)));
            }
            if let Some(frozen) = &hold.frozen {
                let holder = self.run_as_holder(frozen.run, "which froze the environment").await?;
                return Ok(LockAnswer::Held(holder));
            }
            if let Some(run) = hold.holder {
                return Ok(LockAnswer::Held(self.run_as_holder(run, "").await?));
            }
            if let Some(locked) = of_another(hold, caller) {
                return Ok(LockAnswer::Held(of_person(locked)));
            }
            let mut next = found.value.clone();
            next.hold.state_lock = Some(StateLock {
                id: request.id.clone(),
                user: caller.name().to_owned(),
                operation: request.operation.clone(),
                workstation: request.workstation.clone(),
                info: request.info.clone(),
                engine_version: request.engine_version.clone(),
                at: self.now(),
            });
            let details = [("lock", request.id.as_str()), ("operation", &request.operation)];
            if self.commit_lock(&standing, &found, &next, "lock_state", &details).await? {
                return Ok(LockAnswer::Done);
            }
        }
        Err(too_fast())
    }

    /// Gives a workstation's lock back. What is not locked stays so.
    pub async fn unlock_state(
        self: &Arc<Self>,
        caller: &Caller,
        organization: &str,
        environment: &str,
        id: &str,
    ) -> Result<LockAnswer> {
        for _ in 0..ATTEMPTS {
            let (standing, found) =
                self.on(caller, organization, environment, Right::Administer).await?;
            let Some(lock) = &found.value.hold.state_lock else { return Ok(LockAnswer::Done) };
            if lock.id != id || lock.user != caller.name() {
                return Ok(LockAnswer::Held(of_workstation(lock)));
            }
            if self.release(&standing, &found, "unlock_state").await? {
                return Ok(LockAnswer::Done);
            }
        }
        Err(too_fast())
    }

    /// Takes the lock of this id away from whoever has it. One that is gone stays so.
    pub async fn force_unlock_state(
        self: &Arc<Self>,
        caller: &Caller,
        organization: &str,
        environment: &str,
        id: &str,
    ) -> Result<()> {
        for _ in 0..ATTEMPTS {
            let (standing, found) =
                self.on(caller, organization, environment, Right::Administer).await?;
            let Some(lock) = &found.value.hold.state_lock else { return Ok(()) };
            if lock.id != id {
                let message = format!("another lock is held: {}; type its id", told(lock));
                return Err(Error::field("lock_id", message));
            }
            if self.release(&standing, &found, "force_unlock_state").await? {
                return Ok(());
            }
        }
        Err(too_fast())
    }

    async fn release(
        self: &Arc<Self>,
        standing: &Standing,
        found: &Loaded<Environment>,
        action: &str,
    ) -> Result<bool> {
        let mut next = found.value.clone();
        let Some(lock) = next.hold.state_lock.take() else { return Ok(true) };
        let details = [("lock", lock.id.as_str()), ("user", &lock.user)];
        let done = self.commit_lock(standing, found, &next, action, &details).await?;
        if done {
            let (app, environment) = (Arc::clone(self), next.id);
            let organization = standing.organization;
            tokio::spawn(async move {
                if let Err(error) = app.give_turns(organization, environment).await {
                    tracing::warn!(%environment, %error, "turns were not given; the reaper will");
                }
            });
        }
        Ok(done)
    }

    async fn commit_lock(
        &self,
        standing: &Standing,
        found: &Loaded<Environment>,
        next: &Environment,
        action: &str,
        details: &[(&'static str, &str)],
    ) -> Result<bool> {
        let subject = format!("environment {}", next.name);
        let draft =
            self.draft(standing.organization, standing.caller.audit_name(), action, subject);
        let draft = details.iter().fold(draft, |draft, (name, value)| draft.with(*name, *value));
        let record = encode(&EnvironmentRecord::from(next));
        let batch =
            Batch::new().put(found.key.clone(), Expect::At(found.version), record).audit(draft);
        match self.store.commit(batch).await {
            Ok(_) => Ok(true),
            Err(CommitError::Conflict { .. }) => Ok(false),
            Err(error @ CommitError::Store(_)) => Err(error.into()),
        }
    }

    async fn run_as_holder(&self, id: RunId, then: &str) -> Result<Holder> {
        let run = self.run(id).await?.value;
        let by = run.request.queued_by.name();
        let state = run.state.as_str();
        let then = if then.is_empty() { String::new() } else { format!(", {then}") };
        Ok(Holder {
            id: format!("run {id} of {by} ({state}){then}"),
            operation: "run".into(),
            who: by.to_owned(),
            info: format!("`latchkey run show {id}`"),
            version: String::new(),
            since: run.updated_at,
        })
    }
}

/// Refuses where a run or a workstation works on the state, a person has to look first, or another
/// has locked the environment.
pub(super) fn check_free(hold: &Hold, caller: &Caller) -> Result<()> {
    if let Some(frozen) = &hold.frozen {
        let message = format!(
            "the environment is frozen by the remains of run {}; `latchkey env show` tells what to \
             do",
            frozen.run
        );
        let holder = format!("run {}, which froze the environment", frozen.run);
        return Err(Error::refused(Reason::WrongState, message).with("holder", holder));
    }
    if let Some(run) = hold.holder {
        return Err(held(run));
    }
    if let Some(lock) = &hold.state_lock {
        return Err(locked(lock));
    }
    match of_another(hold, caller) {
        Some(Locked { by, reason, .. }) => {
            let message =
                format!("{by} has locked it: {reason}; `latchkey env unlock` takes the lock away");
            Err(Error::refused(Reason::WrongState, message).with("holder", by.clone()))
        }
        None => Ok(()),
    }
}

/// Finds the lock of the environment that keeps a caller out: whoever has put it works on.
fn of_another<'a>(hold: &'a Hold, caller: &Caller) -> Option<&'a Locked> {
    hold.locked.as_ref().filter(|locked| locked.by != caller.name())
}

fn of_person(Locked { by, reason, at }: &Locked) -> Holder {
    Holder {
        id: format!("{by} has locked the environment: {reason}"),
        operation: "env lock".into(),
        who: by.clone(),
        info: reason.clone(),
        version: String::new(),
        since: *at,
    }
}

/// The refusal while a run has the environment.
fn held(run: RunId) -> Error {
    let message =
        format!("run {run} has the environment and may write its state; wait for its end");
    Error::refused(Reason::WrongState, message).with("holder", format!("run {run}"))
}

/// The refusal while a workstation has the state.
pub(super) fn locked(lock: &StateLock) -> Error {
    let message = format!("the state is locked: {}", told(lock));
    Error::refused(Reason::WrongState, message).with("holder", of_workstation(lock).id)
}

/// Says who has a lock, and what to do about one that is left.
pub(super) fn told(lock: &StateLock) -> String {
    format!(
        "{} ({}) works on it from {} since {}, lock {}; one that was left behind ends with \
         `latchkey state unlock`",
        lock.user,
        lock.operation,
        lock.workstation,
        rfc3339(lock.at),
        lock.id
    )
}

fn of_workstation(lock: &StateLock) -> Holder {
    let StateLock { id, user, operation, workstation, info, engine_version, at } = lock.clone();
    Holder {
        id: format!("{id} of {user} ({workstation})"),
        operation,
        who: workstation,
        info,
        version: engine_version,
        since: at,
    }
}

fn too_fast() -> Error {
    Error::refused(Reason::ChangedMeanwhile, "the environment changes too fast; repeat")
}
