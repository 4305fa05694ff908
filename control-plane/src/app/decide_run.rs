//! What a person decides about a run without a code: confirm, discard, cancel.

use std::sync::Arc;

use latchkey_domain::id::{Digest, RunId};
use latchkey_domain::run::{Event, Run, RunState};

use super::App;
use crate::auth::{Caller, Right};
use crate::error::Result;

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
                let current = subject.environment.value.settings.policy;
                Ok(Event::Confirmed { by: by.to_owned(), seen, current })
            })
            .await?;
        Ok(advance.into_run())
    }

    pub async fn discard_run(self: &Arc<Self>, caller: &Caller, id: RunId) -> Result<Run> {
        self.run_for(caller, id, Right::Decide).await?;
        let (_, by) = caller.person()?;
        let advance = self
            .advance(id, &caller.audit_name(), "discard_run", |_| {
                Ok(Event::Discarded { by: by.to_owned() })
            })
            .await?;
        Ok(advance.into_run())
    }

    /// Stops a run: at once while it waits, gracefully while terraform runs.
    pub async fn cancel_run(self: &Arc<Self>, caller: &Caller, id: RunId) -> Result<Run> {
        let (_, run) = self.run_for(caller, id, Right::Operate).await?;
        if run.value.state == RunState::Lost {
            // To give a lost apply up is to decide about its remains.
            caller.person()?;
        }
        let advance = self
            .advance(id, &caller.audit_name(), "cancel_run", |_| {
                Ok(Event::CancelRequested { by: caller.name().to_owned() })
            })
            .await?;
        Ok(advance.into_run())
    }
}
