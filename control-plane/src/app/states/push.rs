//! States that people send: from a workstation, under its lock, or brought from elsewhere once.
//!
//! 1. Who may do it is checked, and that the state is free or the sender's, before a byte is taken.
//! 2. The content is stored and looked at: a state of the known format, with serial and lineage.
//! 3. All is checked again in the commit that makes it the newest: the lock may have been taken
//!    away meanwhile, or somebody else's state have come first.

use std::sync::Arc;
use std::time::Duration;

use latchkey_domain::environment::Hold;
use latchkey_proto::v1::Reason;
use tokio::time::Instant;

use super::{ATTEMPTS, StateVersionView, check_lineage, view, with_version};
use crate::app::App;
use crate::app::artifacts::LARGEST_STATE;
use crate::app::claims::{Claim, Settled};
use crate::app::configurations::blob_error;
use crate::app::state_lock::{check_free, locked};
use crate::app::uploads::StatePlace;
use crate::auth::{Caller, Proof, Right};
use crate::blobs::Upload;
use crate::error::{Error, Result};
use crate::store::keys::BlobUser;
use crate::store::record::Text;
use crate::store::record::environment::{Environment, StateHead, StateOrigin, StateVersion};
use crate::store::record::quarantine::StateFacts;
use crate::store::{Batch, CommitError, Expect};

/// How long a sender may be silent, and how long may pass beyond what the slowest need.
const PATIENCE: Duration = Duration::from_secs(60);

/// What the slowest send in a second: none keeps its place by a byte a minute.
const SLOWEST: u64 = 128 << 10;

/// How a person's state comes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Sending {
    /// From a workstation that holds the lock of this id.
    Push {
        lock: String,
    },
    Import,
}

impl Sending {
    const fn action(&self) -> &'static str {
        match self {
            Sending::Push { .. } => "push_state",
            Sending::Import => "import_state",
        }
    }

    const fn origin(&self) -> StateOrigin {
        match self {
            Sending::Push { .. } => StateOrigin::Push,
            Sending::Import => StateOrigin::Import,
        }
    }

    /// Checks that nobody else works on the state.
    fn check(&self, caller: &Caller, hold: &Hold) -> Result<()> {
        let lock = match self {
            Sending::Import => return check_free(hold, caller),
            Sending::Push { lock } => lock,
        };
        if hold.holder.is_some() || hold.frozen.is_some() || hold.state_lock.is_none() {
            check_free(hold, caller)?;
        }
        match &hold.state_lock {
            Some(found) if found.id == *lock && found.user == caller.name() => Ok(()),
            Some(found) => Err(locked(found)),
            None => Err(Error::refused(
                Reason::WrongState,
                "the state is not locked by this terraform: leave locking on and set the lock and \
                 unlock addresses as `latchkey state backend-config` prints them; a lock that was \
                 taken away is taken anew",
            )),
        }
    }
}

/// A state on its way in.
pub struct StateUpload {
    app: Arc<App>,
    proof: Proof,
    organization: String,
    environment: String,
    sending: Sending,
    blob: Upload,
    size: u64,
    began: Instant,
    place: StatePlace,
}

impl std::fmt::Debug for StateUpload {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StateUpload").field("sending", &self.sending).finish_non_exhaustive()
    }
}

impl App {
    /// Begins to take a state.
    pub async fn send_state(
        self: &Arc<Self>,
        proof: &Proof,
        organization: &str,
        environment: &str,
        sending: Sending,
    ) -> Result<StateUpload> {
        let caller = &proof.caller;
        let (standing, found) =
            self.on(caller, organization, environment, Right::Administer).await?;
        self.check_history()?;
        sending.check(caller, &found.value.hold)?;
        let place = self.uploads.state(standing.organization, found.value.id).await?;
        let blob = self.blobs.begin(standing.organization, None, LARGEST_STATE).await;
        Ok(StateUpload {
            app: Arc::clone(self),
            proof: proof.clone(),
            organization: organization.to_owned(),
            environment: environment.to_owned(),
            sending,
            blob: blob.map_err(blob_error)?,
            size: 0,
            began: Instant::now(),
            place,
        })
    }
}

impl StateUpload {
    /// Tells when the next bytes have to be there at the latest.
    pub fn due(&self) -> Instant {
        let earned = Duration::from_secs(self.size / SLOWEST);
        (self.began + PATIENCE + earned).min(Instant::now() + PATIENCE)
    }

    pub async fn write(&mut self, data: &[u8]) -> Result<()> {
        self.size += data.len() as u64;
        self.blob.write(data).await.map_err(blob_error)
    }

    /// Ends the upload, also if nobody waits for it any more. What is refused leaves nothing.
    pub async fn finish(self) -> Result<StateVersionView> {
        tokio::spawn(self.record()).await.map_err(Error::internal)?
    }

    async fn record(self) -> Result<StateVersionView> {
        let Self { app, proof, organization, environment, sending, blob, size, place, .. } = self;
        let (standing, _) =
            app.on(&proof.caller, &organization, &environment, Right::Administer).await?;
        let claim = app.store_blob(standing.organization, blob).await?;
        let subject = (organization.as_str(), environment.as_str());
        let recorded = app.record_sent(&proof, subject, &sending, size, &claim).await;
        if !matches!(recorded, Ok((_, Settled::Kept))) {
            // It is nobody's, unless equal content is somebody's.
            app.release_claim(&claim).await?;
            app.collect_garbage_soon();
        }
        drop(place);
        recorded.map(|(version, _)| version)
    }
}

impl App {
    async fn record_sent(
        &self,
        proof: &Proof,
        (organization, environment): (&str, &str),
        sending: &Sending,
        size: u64,
        claim: &Claim,
    ) -> Result<(StateVersionView, Settled)> {
        let caller = &proof.caller;
        let (standing, _) = self.on(caller, organization, environment, Right::Administer).await?;
        let facts = self.checked_state(standing.organization, claim.digest).await?;
        for _ in 0..ATTEMPTS {
            // The right may have ended while the state came, and may until it is recorded.
            let token = self.live_token(proof.token).await?;
            let (standing, found) =
                self.on(caller, organization, environment, Right::Administer).await?;
            self.check_history()?;
            sending.check(caller, &found.value.hold)?;
            if let Some(head) = &found.value.state {
                if head.digest.0 == claim.digest {
                    return Ok((self.current(&found.value, head).await?, Settled::NotNeeded));
                }
                check_continues(&facts, head)?;
            }
            let version = StateVersion {
                digest: Text(claim.digest),
                lineage: facts.lineage.clone(),
                serial: facts.serial,
                run: None,
                at: self.now().into(),
                origin: sending.origin(),
                user: caller.name().to_owned(),
                size: Some(size),
            };
            let (batch, number) = with_version(Batch::new(), &found, &version);
            let made = StateVersionView { number, version: version.clone(), is_current: true };
            let draft = self.state_draft(
                standing.organization,
                caller,
                sending.action(),
                &found.value,
                &made,
            );
            let user = BlobUser::State(found.value.id);
            let batch = standing.guard(batch).check(token.key, Expect::At(token.version));
            let batch = self.settle_claim(batch.audit(draft), claim, user).await?;
            match self.store.commit(batch).await {
                Ok(_) => return Ok((made, Settled::Kept)),
                Err(CommitError::Conflict { .. }) => {}
                Err(error @ CommitError::Store(_)) => return Err(error.into()),
            }
        }
        Err(Error::refused(Reason::ChangedMeanwhile, "the environment changes too fast; repeat"))
    }

    async fn current(
        &self,
        environment: &Environment,
        head: &StateHead,
    ) -> Result<StateVersionView> {
        let version = self.state_version(environment, head.number).await?.version;
        Ok(view(environment, head.number, version))
    }
}

/// Checks that a state continues the current one.
fn check_continues(facts: &StateFacts, head: &StateHead) -> Result<()> {
    check_lineage(&facts.lineage, head)?;
    if facts.serial > head.serial {
        return Ok(());
    }
    let message = format!(
        "its serial {} is not above the current {}: somebody else's state came first, or it is an \
         old one; `latchkey state rollback` goes back to an old one",
        facts.serial, head.serial
    );
    Err(Error::refused(Reason::WrongState, message))
}
