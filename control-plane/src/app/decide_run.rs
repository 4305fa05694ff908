//! What a person decides about a run without a code: confirm, discard, cancel, kill, give up.

use std::sync::Arc;

use latchkey_domain::id::{Digest, RunId};
use latchkey_domain::run::{Event, Run, RunState};
use latchkey_proto::v1::Reason;

use super::App;
use super::transition::Decision;
use crate::auth::{Caller, Right};
use crate::error::{Error, Result};
use crate::store::{Batch, Expect, keys};

impl App {
    /// Confirms the apply of exactly the plan that the person was shown.
    pub async fn confirm_run(
        self: &Arc<Self>,
        caller: &Caller,
        id: RunId,
        seen: Digest,
    ) -> Result<Run> {
        self.run_for(caller, id, Right::Decide).await?;
        let (_, by) = caller.person()?;
        let advance = self
            .advance(id, &caller.audit_name(), "confirm_run", |subject| {
                let current = subject.environment.value.settings.demands();
                Ok(Event::Confirmed { by: by.to_owned(), seen, current })
            })
            .await?;
        Ok(advance.into_run())
    }

    /// Gives a plan up, or a lost apply with all that it may have done: that is for owners, and
    /// nothing else that anybody asks for does it.
    pub async fn discard_run(self: &Arc<Self>, caller: &Caller, id: RunId) -> Result<Run> {
        let (_, run) = self.run_for(caller, id, Right::Decide).await?;
        let seen = run.value.state;
        let action = if seen == RunState::Lost {
            self.run_for(caller, id, Right::Own).await?;
            "give_up_run"
        } else {
            "discard_run"
        };
        let (_, by) = caller.person()?;
        let advance = self
            .advance(id, &caller.audit_name(), action, |subject| {
                if subject.run.value.state == RunState::Lost && seen != RunState::Lost {
                    let message = "the run was lost at this very moment; look at it again";
                    return Err(Error::refused(Reason::WrongState, message));
                }
                Ok(Event::Discarded { by: by.to_owned() })
            })
            .await?;
        Ok(advance.into_run())
    }

    /// Stops a run: at once while it waits, gracefully while terraform runs. The runner of a
    /// lost one is told when it comes back.
    pub async fn cancel_run(self: &Arc<Self>, caller: &Caller, id: RunId) -> Result<Run> {
        self.run_for(caller, id, Right::Operate).await?;
        let advance = self
            .advance(id, &caller.audit_name(), "cancel_run", |subject| {
                can_be_told(&subject.run.value)?;
                Ok(Event::CancelRequested { by: caller.name().to_owned() })
            })
            .await?;
        Ok(advance.into_run())
    }

    /// Has terraform and all that it started killed, once a graceful cancel had its grace. Its
    /// credentials are withdrawn in the same commit; the run ends by its runner's word alone.
    pub async fn force_cancel_run(self: &Arc<Self>, caller: &Caller, id: RunId) -> Result<Run> {
        self.run_for(caller, id, Right::Own).await?;
        let (_, by) = caller.person()?;
        let advance = self
            .advance_with(id, &caller.audit_name(), "force_cancel_run", |subject| {
                let run = &subject.run.value;
                can_be_told(run)?;
                // Nothing is killed of a run that does not run.
                let phase = run.running_phase();
                let batch = phase
                    .map(|phase| keys::session(id, phase))
                    .map_or_else(Batch::new, |session| {
                        Batch::new().delete(session, Expect::Anything)
                    });
                let details = phase.map(|phase| ("phase", phase.to_string().into()));
                Ok(Decision {
                    event: Event::ForceRequested {
                        by: by.to_owned(),
                        grace: self.force_cancel_grace,
                    },
                    batch,
                    details: details.into_iter().collect(),
                })
            })
            .await?;
        Ok(advance.into_run())
    }
}

/// Refuses to ask for what nobody would ever hear.
fn can_be_told(run: &Run) -> Result<()> {
    if run.state == RunState::Lost && run.apply.lease.is_none() {
        let message = "the run is lost and its runner was revoked: nobody can be told to stop; an \
                       owner gives it up with `latchkey discard`";
        return Err(Error::refused(Reason::WrongState, message));
    }
    Ok(())
}
