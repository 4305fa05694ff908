//! Reads and verifies an organization's audit chain.

use super::{App, Page, PageRequest};
use crate::audit::{self, Record, VerifyError};
use crate::auth::Caller;
use crate::error::{Error, Result};
use crate::store::{Scan, keys};

/// How many records one listing looks through for those about one run.
const LOOK_THROUGH: usize = 1000;

/// What a walk of the chain found.
#[derive(Debug)]
pub enum ChainState {
    Intact { records: u64, head: [u8; 32] },
    Broken { at: u64, problem: String },
}

impl App {
    /// Lists records, oldest first; with `run_id`, only those about it.
    pub async fn list_audit(
        &self,
        caller: &Caller,
        organization: &str,
        run_id: &str,
        page: PageRequest,
    ) -> Result<Page<Record>> {
        let standing = self.owner(caller, organization).await?;
        let organization = standing.organization;
        let size = page.size()?;
        let mut after = page.after::<u64>()?;
        let subject = format!("run {run_id}");
        let mut items: Vec<Record> = vec![];
        loop {
            let scan = Scan::ascending(keys::audit_of(organization), LOOK_THROUGH)
                .after(after.map(|sequence| keys::audit(organization, sequence)));
            let found = self.scan(scan).await?;
            let last = found.len() < LOOK_THROUGH;
            for (_, value) in found {
                let record = Record::decode(&value.value)
                    .ok_or_else(|| Error::internal("an audit record is damaged"))?;
                if items.len() == size {
                    let next = items.last().map(|record| record.sequence.to_string());
                    return Ok(Page { items, next });
                }
                after = Some(record.sequence);
                if run_id.is_empty() || record.draft.subject == subject {
                    items.push(record);
                }
            }
            if last {
                return Ok(Page { items, next: None });
            }
        }
    }

    pub async fn verify_audit(&self, caller: &Caller, organization: &str) -> Result<ChainState> {
        let standing = self.owner(caller, organization).await?;
        match audit::verify_stored(&*self.store, standing.organization).await {
            Ok(verified) => {
                Ok(ChainState::Intact { records: verified.count, head: verified.head.digest })
            }
            Err(VerifyError::Broken(broken)) => {
                Ok(ChainState::Broken { at: broken.sequence, problem: broken.to_string() })
            }
            Err(VerifyError::Store(error)) => Err(error.into()),
        }
    }
}
