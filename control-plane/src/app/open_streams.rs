//! What an open stream stands on: the right to it may end while it is open.
//!
//! A call is looked at when it comes in; a stream may outlive that by days. So each asks again
//! when something changes that its right depends on, in whichever process that was: the
//! membership or the service token's scope, and the token that it was opened with. It is told
//! before what waits in the stream is sent.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use latchkey_domain::id::RunId;
use latchkey_proto::v1::Reason;

use super::App;
use crate::auth::{Caller, Proof, Right};
use crate::error::{Error, Result};
use crate::store::{Seen, keys};

/// What a stream is about.
#[derive(Clone, Debug)]
pub enum Ground {
    /// The right to read a run.
    Run(RunId),
    /// The right to upload to and queue in an environment.
    Environment { organization: String, environment: String },
    /// Owning an organization.
    Organization(String),
}

/// Resolves when the right has ended, with what the stream ends by.
pub type Lost = Pin<Box<dyn Future<Output = Error> + Send>>;

impl App {
    /// Checks a caller's right to a stream, and watches it from now on.
    pub async fn hold(self: &Arc<Self>, proof: &Proof, ground: Ground) -> Result<Lost> {
        let organization = match &ground {
            Ground::Run(run) => {
                let (standing, _) = self.run_for(&proof.caller, *run, Right::Read).await?;
                standing.organization
            }
            Ground::Environment { organization, .. } => {
                self.member(&proof.caller, organization).await?.organization
            }
            Ground::Organization(name) => self.owner(&proof.caller, name).await?.organization,
        };
        let position = match &proof.caller {
            Caller::User { id, .. } => keys::membership(organization, *id),
            Caller::Service { id, .. } => keys::service_token(organization, *id),
        };
        let token = keys::token(proof.token.as_bytes());
        let mut changes = self.store.watch(keys::exactly(&position)).and(keys::exactly(&token));
        // Only now is nothing missed any more.
        self.still_holds(proof, &ground).await?;
        let (app, proof) = (Arc::clone(self), proof.clone());
        Ok(Box::pin(async move {
            loop {
                tokio::select! {
                    seen = changes.next() => match seen {
                        Seen::Change(_) | Seen::Lagged => {}
                        Seen::Closed => {
                            let message = "the control plane stops; come back in a moment";
                            return Error::refused(Reason::StoreUnavailable, message);
                        }
                    },
                    () = app.expiry(&proof) => {}
                }
                // Also where it cannot be asked.
                if let Err(error) = app.still_holds(&proof, &ground).await {
                    return error;
                }
            }
        }))
    }

    async fn still_holds(&self, proof: &Proof, ground: &Ground) -> Result<()> {
        self.live_token(proof.token).await?;
        match ground {
            Ground::Run(run) => self.run_for(&proof.caller, *run, Right::Read).await.map(drop),
            Ground::Environment { organization, environment } => {
                let right = Right::Operate;
                self.on(&proof.caller, organization, environment, right).await.map(drop)
            }
            Ground::Organization(name) => self.owner(&proof.caller, name).await.map(drop),
        }
    }

    async fn expiry(&self, proof: &Proof) {
        match proof.expires_at {
            // Not in a hurry where the clock is set back.
            Some(at) => tokio::time::sleep(at.since(self.now()).max(Duration::from_secs(1))).await,
            None => std::future::pending().await,
        }
    }
}
