//! Settles all that a run left behind, in one go.
//!
//! 1. The caller is an owner, the run has ended, and the name of its environment was typed.
//! 2. With [`Settlement::Accept`] the newest kept state becomes the environment's.
//! 3. All that is kept of the run is dropped; what was accepted last, so that a repeat after a
//!    crash knows it.
//! 4. The freeze is lifted if this run is its reason, and nothing came meanwhile.
//!
//! Each step is a use case of its own, audited as such, and does nothing where it was done.

use std::sync::Arc;

use latchkey_domain::id::{OrganizationId, QuarantinedId, RunId};
use latchkey_domain::run::RunState;
use latchkey_proto::v1::Reason;

use crate::app::App;
use crate::auth::Caller;
use crate::error::{Error, Result};
use crate::store::keys;
use crate::store::record::environment::Environment;
use crate::store::record::quarantine::{Quarantined, StateFacts};
use crate::store::record::{Loaded, Text, decode};

/// What becomes of the state that a run left behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Settlement {
    /// The newest is made current; with `older` also one that is not above the current one.
    Accept {
        older: bool,
    },
    Drop,
}

/// What was done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settled {
    pub state: Option<StateFacts>,
    pub dropped: u32,
    pub unfrozen: bool,
}

impl App {
    pub async fn settle_quarantine(
        self: &Arc<Self>,
        caller: &Caller,
        organization: &str,
        run: RunId,
        confirmation: &str,
        settlement: Settlement,
    ) -> Result<Settled> {
        let id = self.owner(caller, organization).await?.organization;
        let environment = self.settleable(id, run).await?;
        if environment.name != confirmation {
            let message = "type the name of the environment that the run belongs to";
            return Err(Error::field("environment_confirmation", message));
        }
        let state = match settlement {
            Settlement::Accept { older } => Some(
                self.accept_newest(caller, organization, (id, run), &environment, older).await?,
            ),
            Settlement::Drop => None,
        };
        let mut remains = self.remains(id, run).await?;
        remains.sort_by_key(|kept| kept.accepted.is_some());
        for kept in &remains {
            self.drop_quarantined(caller, organization, kept.id.0).await?;
        }
        let froze = environment.hold.frozen.is_some_and(|frozen| frozen.run == run);
        // What came since is nobody's decision yet.
        let unfrozen = froze && self.remains(id, run).await?.is_empty();
        if unfrozen {
            self.unfreeze_environment(caller, organization, &environment.name, run).await?;
        }
        let dropped = u32::try_from(remains.len()).unwrap_or(u32::MAX);
        Ok(Settled { state, dropped, unfrozen })
    }

    /// Finds the environment of a run whose remains can be settled.
    async fn settleable(&self, organization: OrganizationId, run: RunId) -> Result<Environment> {
        let missing = || Error::not_found("run");
        let run = match self.run(run).await {
            Ok(run) => run.value,
            Err(error) if error.reason() == Reason::NotFound => return Err(missing()),
            Err(error) => return Err(error),
        };
        if run.request.organization != organization {
            return Err(missing());
        }
        if run.state == RunState::Lost {
            let message = format!(
                "the run is lost but not given up: its runner may still be applying. End it with \
                 `latchkey discard {}` first",
                run.id
            );
            return Err(Error::refused(Reason::WrongState, message));
        }
        if !run.state.is_end() {
            let message = "the run has not ended: what it leaves is not known yet; things of an \
                           old lease are accepted or dropped one by one, by their id";
            return Err(Error::refused(Reason::WrongState, message));
        }
        Ok(self.environment(organization, run.request.environment).await?.value)
    }

    async fn remains(&self, organization: OrganizationId, run: RunId) -> Result<Vec<Quarantined>> {
        let mut remains = vec![];
        for (key, found) in self.list(keys::quarantine_of(organization, run)).await? {
            let id: Text<QuarantinedId> = decode(&key, &found)?;
            let kept: Option<Loaded<Quarantined>> =
                self.fetch(keys::quarantined(organization, id.0)).await?;
            remains.extend(kept.map(|kept| kept.value));
        }
        Ok(remains)
    }

    async fn accept_newest(
        self: &Arc<Self>,
        caller: &Caller,
        name: &str,
        (organization, run): (OrganizationId, RunId),
        environment: &Environment,
        older: bool,
    ) -> Result<StateFacts> {
        let remains = self.remains(organization, run).await?;
        let states = || remains.iter().filter_map(|kept| Some((kept, kept.state.as_ref()?)));
        if let Some(accepted) = remains.iter().find_map(|kept| kept.accepted.as_ref()) {
            return Ok(accepted.state.clone());
        }
        let Some((newest, facts)) = states().max_by_key(|(kept, facts)| (facts.serial, kept.id.0))
        else {
            let message = "nothing that was kept of the run is a Terraform state; to keep the \
                           environment's own, drop what there is";
            return Err(Error::refused(Reason::WrongState, message));
        };
        let rival = states().find(|(kept, other)| {
            (other.serial, &other.lineage) == (facts.serial, &facts.lineage)
                && kept.digest != newest.digest
        });
        if let Some((rival, _)) = rival {
            let message = format!(
                "two states of serial {} were kept that differ, {} and {}; accept one of them by \
                 its id, then repeat",
                facts.serial, rival.id.0, newest.id.0
            );
            return Err(Error::refused(Reason::WrongState, message));
        }
        if let Some(head) = &environment.state
            && head.digest == newest.digest
        {
            return Ok(facts.clone());
        }
        self.accept_state(caller, name, newest.id.0, &environment.name, older).await
    }
}
