//! Whether who submitted a code may still decide once AWS has answered.
//!
//! Rights are asked for before a code is spent. AWS takes its time, and to learn whose a session
//! is may take as long as the session lives: a person who was removed meanwhile approves nothing.

use latchkey_domain::id::{RunId, UserId};
use latchkey_proto::v1::Reason;

use super::{App, Authentication};
use crate::auth::{Caller, Right};
use crate::error::{Error, Result};
use crate::store::{Expect, Key};

impl App {
    /// Finds the person whose code it is, if they may still decide.
    pub(super) async fn decider(&self, record: &Authentication) -> Result<UserId> {
        let user = self.user_named(&record.user).await?.ok_or_else(lost_right)?.value.id.0;
        self.decider_guard(record.run.0, user).await?;
        Ok(user)
    }

    /// What the commit that a code buys rests on.
    pub(in crate::app) async fn decider_guard(
        &self,
        run: RunId,
        user: UserId,
    ) -> Result<(Key, Expect)> {
        // No name is needed to have a right.
        let caller = Caller::User { id: user, name: String::new() };
        match self.run_for(&caller, run, Right::Decide).await {
            Ok((standing, _)) => {
                let (key, version) = standing.rests_on;
                Ok((key, Expect::At(version)))
            }
            Err(error) if matches!(error.reason(), Reason::NotFound | Reason::NotAllowed) => {
                Err(lost_right())
            }
            Err(error) => Err(error),
        }
    }
}

fn lost_right() -> Error {
    let message = "whoever submitted the code may not decide here any more: their rights were \
                   changed while AWS looked at it. The code is spent and its session is dropped";
    Error::refused(Reason::NotAllowed, message)
}
