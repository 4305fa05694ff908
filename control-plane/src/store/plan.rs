//! What a batch would write: expectations judged, audit drafts stamped. Shared by the adapters,
//! so that both judge alike; each calls it where no other commit can come between.

use std::collections::BTreeMap;

use latchkey_domain::id::OrganizationId;

use super::feed::{Change, What};
use super::{Batch, CommitError, Expect, Key, Operation, StoreError, Version, Versioned, keys};
use crate::audit;

/// The records to write (`None` deletes), in the order of their keys.
pub(super) type Writes = BTreeMap<Key, Option<Vec<u8>>>;

/// Judges a batch against the records as they are.
pub(super) fn plan(
    batch: Batch,
    read: impl Fn(&Key) -> Result<Option<Versioned>, StoreError>,
) -> Result<Writes, CommitError> {
    if let Some(what) = batch.invalid {
        return Err(StoreError::Invalid { what }.into());
    }
    let mut writes = Writes::new();
    for (key, (expect, operation)) in batch.operations {
        if expect != Expect::Anything || matches!(operation, Operation::Delete) {
            let found = read(&key)?.map(|found| found.version);
            if !expect.holds(found) {
                return Err(CommitError::Conflict { key });
            }
            if found.is_none() && matches!(operation, Operation::Delete) {
                continue;
            }
        }
        match operation {
            Operation::Check => {}
            Operation::Put(value) => {
                writes.insert(key, Some(value));
            }
            Operation::Delete => {
                writes.insert(key, None);
            }
        }
    }
    stamp(batch.drafts, &mut writes, read)?;
    Ok(writes)
}

fn stamp(
    drafts: Vec<audit::Draft>,
    writes: &mut Writes,
    read: impl Fn(&Key) -> Result<Option<Versioned>, StoreError>,
) -> Result<(), StoreError> {
    let mut heads: BTreeMap<OrganizationId, audit::Head> = BTreeMap::new();
    for draft in drafts {
        let organization = draft.organization;
        let head = match heads.get(&organization) {
            Some(head) => *head,
            None => {
                let key = keys::audit_head(organization);
                match read(&key)? {
                    Some(found) => {
                        audit::Head::decode(&found.value).ok_or(StoreError::Damaged { key })?
                    }
                    None => audit::Head::START,
                }
            }
        };
        let record = audit::Record::stamp(draft, head);
        writes.insert(keys::audit(organization, record.sequence), Some(record.encode()));
        heads.insert(organization, record.head());
    }
    for (organization, head) in heads {
        writes.insert(keys::audit_head(organization), Some(head.encode()));
    }
    Ok(())
}

/// Returns what the feed reports of a commit.
pub(super) fn changes(writes: &Writes, version: Version) -> Vec<Change> {
    let what = |value: &Option<Vec<u8>>| match value {
        Some(_) => What::Put,
        None => What::Deleted,
    };
    writes
        .iter()
        .map(|(key, value)| Change { key: key.clone(), version, what: what(value) })
        .collect()
}
