//! Tells each owner what was done by break-glass, until they acknowledge it: an owner has no
//! address, and no subscription need exist.

use latchkey_domain::id::{GlassId, OrganizationId, UserId};

use crate::app::App;
use crate::auth::Caller;
use crate::error::{Error, Result};
use crate::store::record::glass::BrokenGlass;
use crate::store::record::{Loaded, Text, decode, encode};
use crate::store::{Batch, CommitError, Expect, Scan, keys};

/// How many an owner is told of at once.
const MOST_TOLD: usize = 20;
const ATTEMPTS: usize = 16;

impl App {
    /// Adds to the batch of what was done that owners are told of it.
    pub(super) fn tell_owners(
        &self,
        batch: Batch,
        organization: OrganizationId,
        what: &str,
        reason: &str,
    ) -> Batch {
        let id = GlassId::from_uuid(self.new_id());
        let record = BrokenGlass {
            id: Text(id),
            at: self.now().into(),
            what: what.to_owned(),
            reason: reason.to_owned(),
        };
        batch.put(keys::broken_glass(organization, id), Expect::Absent, encode(&record))
    }

    /// Lists what an owner has not acknowledged, oldest first.
    pub(in crate::app) async fn unseen_glass(
        &self,
        organization: OrganizationId,
        owner: UserId,
    ) -> Result<Vec<BrokenGlass>> {
        let seen: Option<Loaded<Text<GlassId>>> =
            self.fetch(keys::glass_seen(organization, owner)).await?;
        let seen = seen.map(|seen| seen.value.0);
        let scan = Scan::descending(keys::broken_glass_of(organization), MOST_TOLD);
        let mut unseen: Vec<BrokenGlass> = vec![];
        for (key, found) in self.scan(scan).await? {
            let glass: BrokenGlass = decode(&key, &found)?;
            if seen.is_some_and(|seen| glass.id.0 <= seen) {
                break;
            }
            unseen.push(glass);
        }
        unseen.reverse();
        Ok(unseen)
    }

    /// Notes that an owner has read of a broken glass, and of those before it.
    pub async fn acknowledge_glass(
        &self,
        caller: &Caller,
        organization: &str,
        glass: GlassId,
    ) -> Result<()> {
        let organization = self.owner(caller, organization).await?.organization;
        let (owner, _) = caller.person()?;
        let known: Option<Loaded<BrokenGlass>> =
            self.fetch(keys::broken_glass(organization, glass)).await?;
        known.ok_or_else(|| Error::not_found("broken glass"))?;
        let key = keys::glass_seen(organization, owner);
        for _ in 0..ATTEMPTS {
            let seen: Option<Loaded<Text<GlassId>>> = self.fetch(key.clone()).await?;
            if seen.as_ref().is_some_and(|seen| glass <= seen.value.0) {
                return Ok(());
            }
            let expect = seen.map_or(Expect::Absent, |seen| Expect::At(seen.version));
            let subject = format!("break-glass {glass}");
            let draft =
                self.draft(organization, caller.audit_name(), "acknowledge_break_glass", subject);
            let batch = Batch::new().put(key.clone(), expect, encode(&Text(glass))).audit(draft);
            match self.store.commit(batch).await {
                Ok(_) => return Ok(()),
                Err(CommitError::Conflict { .. }) => {}
                Err(error @ CommitError::Store(_)) => return Err(error.into()),
            }
        }
        Err(CommitError::Conflict { key }.into())
    }
}
