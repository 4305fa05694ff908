//! Reads, exports and verifies an organization's audit chain.
//!
//! The chain is ordered by number and has no index: what a filter wants is looked for in it, a
//! bounded part per call. Times rise with the numbers but for clocks that were set back, so a
//! listing by time begins where halving finds it, [`SLACK`] earlier.

use latchkey_domain::id::OrganizationId;
use latchkey_domain::time::Timestamp;

use super::{App, Page, PageRequest};
use crate::audit::{self, Head, Record, VerifyError};
use crate::auth::Caller;
use crate::error::{Error, Result};
use crate::store::{Key, Scan, StoreError, Versioned, keys};

/// How many records one scan of a listing reads.
const SCAN: usize = 1000;

/// How many records one call of a listing looks through.
const LOOK_THROUGH: usize = 5 * SCAN;

/// Records of one part of an export: at 32 KiB each they still fit a message.
const EXPORTED: usize = 64;

/// How far behind its predecessors the time of a record may be.
const SLACK: std::time::Duration = std::time::Duration::from_secs(300);

/// Which records to list; what is empty or absent does not select.
#[derive(Clone, Debug, Default)]
pub struct AuditFilter {
    pub run_id: String,
    /// As the record names it, or its name alone.
    pub actor: String,
    pub action: String,
    pub subject_prefix: String,
    /// Name of an environment: itself and its runs.
    pub environment: String,
    pub from: Option<Timestamp>,
    /// The first moment that is too late.
    pub until: Option<Timestamp>,
}

impl AuditFilter {
    fn admits(&self, record: &Record) -> bool {
        let draft = &record.draft;
        let is = |kind: &str, name: &str| draft.subject.split_once(' ') == Some((kind, name));
        let name = draft.actor.split_once(' ').map_or("", |(_, name)| name);
        let told = || draft.details.get("environment").and_then(serde_json::Value::as_str);
        (self.run_id.is_empty() || is("run", &self.run_id))
            && (self.actor.is_empty() || draft.actor == self.actor || name == self.actor)
            && (self.action.is_empty() || draft.action == self.action)
            && draft.subject.starts_with(&self.subject_prefix)
            && (self.environment.is_empty()
                || is("environment", &self.environment)
                || told() == Some(&self.environment))
            && self.from.is_none_or(|from| draft.at >= from)
            && self.until.is_none_or(|until| draft.at < until)
    }

    fn is_past(&self, record: &Record) -> bool {
        self.until.is_some_and(|until| record.draft.at >= until + SLACK)
    }
}

/// What a walk of the chain found.
#[derive(Debug)]
pub enum ChainState {
    Intact { records: u64, head: [u8; 32] },
    Broken { at: u64, problem: String },
}

/// An export under way: the records up to the head of the moment it began.
#[derive(Debug)]
pub struct Export {
    organization: OrganizationId,
    /// The number of the last record that was handed out.
    after: u64,
    last: u64,
}

impl App {
    /// Lists records, oldest first. A page may be short of what was asked for and still have a
    /// next one.
    pub async fn list_audit(
        &self,
        caller: &Caller,
        organization: &str,
        filter: AuditFilter,
        page: PageRequest,
    ) -> Result<Page<Record>> {
        let organization = self.owner(caller, organization).await?.organization;
        let size = page.size()?;
        let mut after = match (page.after::<u64>()?, filter.from) {
            (Some(after), _) => after,
            (None, Some(from)) => self.last_audit_before(organization, from).await?,
            (None, None) => 0,
        };
        let mut items: Vec<Record> = vec![];
        let mut seen = 0;
        while seen < LOOK_THROUGH {
            let scan = Scan::ascending(keys::audit_of(organization), SCAN)
                .after(Some(keys::audit(organization, after)));
            let found = self.audit_records(scan).await?;
            let last = found.len() < SCAN;
            seen += found.len();
            for (_, value) in found {
                let record = Record::decode(&value.value).ok_or_else(|| damaged(after + 1))?;
                if filter.is_past(&record) {
                    return Ok(Page { items, next: None });
                }
                if filter.admits(&record) {
                    if items.len() == size {
                        return Ok(Page { items, next: Some(after.to_string()) });
                    }
                    after = record.sequence;
                    items.push(record);
                } else {
                    after = record.sequence;
                }
            }
            if last {
                return Ok(Page { items, next: None });
            }
        }
        Ok(Page { items, next: Some(after.to_string()) })
    }

    /// Begins an export at a record's number.
    pub async fn export_audit(
        &self,
        caller: &Caller,
        organization: &str,
        from: u64,
    ) -> Result<Export> {
        let organization = self.owner(caller, organization).await?.organization;
        let last = self.audit_head(organization).await?.sequence;
        Ok(Export { organization, after: from.saturating_sub(1), last })
    }

    /// Reads the next records of an export; none at its end. They are not judged, but that there
    /// are no more before that.
    pub async fn read_export(&self, export: &mut Export) -> Result<Vec<Record>> {
        if export.after >= export.last {
            return Ok(vec![]);
        }
        let scan = Scan::ascending(keys::audit_of(export.organization), EXPORTED)
            .after(Some(keys::audit(export.organization, export.after)));
        let mut records = vec![];
        for (_, value) in self.audit_records(scan).await? {
            let record = Record::decode(&value.value).ok_or_else(|| damaged(export.after + 1))?;
            if record.sequence > export.last {
                break;
            }
            export.after = record.sequence;
            records.push(record);
        }
        if records.is_empty() {
            return Err(damaged(export.after + 1));
        }
        Ok(records)
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

    async fn audit_records(&self, scan: Scan) -> Result<Vec<(Key, Versioned)>> {
        self.store.scan(scan).await.map_err(unread)
    }

    async fn audit_head(&self, organization: OrganizationId) -> Result<Head> {
        let Some(found) = self.store.fetch(&keys::audit_head(organization)).await? else {
            return Ok(Head::START);
        };
        Head::decode(&found.value).ok_or_else(|| Error::internal("the audit head is damaged"))
    }

    /// Finds by halving the number behind which all records of a time and later are.
    async fn last_audit_before(
        &self,
        organization: OrganizationId,
        time: Timestamp,
    ) -> Result<u64> {
        let earlier =
            time.as_millis().saturating_sub(i64::try_from(SLACK.as_millis()).unwrap_or(0));
        let (mut low, mut high) = (0, self.audit_head(organization).await?.sequence);
        while low < high {
            let middle = low + (high - low).div_ceil(2);
            let found = self.store.fetch(&keys::audit(organization, middle)).await;
            let found = found.map_err(unread)?;
            let record = found.and_then(|found| Record::decode(&found.value));
            if record.ok_or_else(|| damaged(middle))?.draft.at.as_millis() < earlier {
                low = middle;
            } else {
                high = middle - 1;
            }
        }
        Ok(low)
    }
}

/// Names the record that can't be read: whoever asks is its owner, and has to know which it is.
fn unread(error: StoreError) -> Error {
    match &error {
        StoreError::Damaged { key } => match keys::audit_number(key) {
            Some(sequence) => Error::internal(error).saying(format!(
                "the audit record {sequence} is damaged; an export can go on behind it, and \
                 the operator's guide to backups says how to mend it"
            )),
            None => error.into(),
        },
        StoreError::Failed { .. } | StoreError::Unreadable { .. } | StoreError::Invalid { .. } => {
            error.into()
        }
    }
}

fn damaged(sequence: u64) -> Error {
    Error::internal(format!("the audit record {sequence} or the one behind it is damaged"))
}

#[cfg(test)]
mod tests;
