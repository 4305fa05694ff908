//! Turns: when an environment is free, the run that has waited longest has its turn.

use std::sync::Arc;

use latchkey_domain::id::{EnvironmentId, OrganizationId, RunId};
use latchkey_domain::run::{Event, Run, RunState};
use latchkey_proto::v1::Reason;

use super::App;
use super::transition::may_start;
use crate::error::{Error, Result};
use crate::store::keys;

impl App {
    /// Gives turns in the run's environment, without holding up who ended it.
    pub(super) fn give_turn_soon(self: &Arc<Self>, run: &Run) {
        let (app, request) = (Arc::clone(self), &run.request);
        let (organization, environment) = (request.organization, request.environment);
        tokio::spawn(async move {
            if let Err(error) = app.give_turns(organization, environment).await {
                tracing::warn!(%environment, error = %error, "turns were not given; the reaper will");
            }
        });
    }

    /// Gives turns everywhere. Idempotent.
    pub async fn give_all_turns(self: &Arc<Self>) -> Result<()> {
        let mut environments: Vec<_> = self
            .open_runs()
            .await?
            .into_iter()
            .filter(|run| run.state == RunState::Pending)
            .map(|run| (run.request.organization, run.request.environment))
            .collect();
        environments.sort_unstable();
        environments.dedup();
        for (organization, environment) in environments {
            if let Err(error) = self.give_turns(organization, environment).await {
                tracing::error!(%environment, error = %error, "turns cannot be given here");
            }
        }
        Ok(())
    }

    /// Gives every pending run of an environment that may start its turn. Idempotent.
    pub async fn give_turns(
        self: &Arc<Self>,
        organization: OrganizationId,
        environment: EnvironmentId,
    ) -> Result<()> {
        let waiting = self.list(keys::pending_runs_of(environment)).await?;
        for (key, _) in waiting {
            let Some(id) = key.last_id().map(RunId::from_bytes) else { continue };
            let hold = self.environment(organization, environment).await?.value.hold;
            if !may_start(&self.run(id).await?.value, &hold) {
                continue;
            }
            let decide = |subject: &super::transition::Subject| {
                if may_start(&subject.run.value, &subject.environment.value.hold) {
                    Ok(Event::TurnCame)
                } else {
                    Err(Error::refused(Reason::WrongState, "it is not its turn any more"))
                }
            };
            match self.advance(id, "system", "give_turn", decide).await {
                Ok(_) => {}
                Err(error) if error.reason() == Reason::WrongState => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
