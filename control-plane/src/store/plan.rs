//! What a batch would write: expectations judged, audit drafts stamped. Shared by the adapters,
//! so that both judge alike; each calls it where no other commit can come between.

use std::collections::BTreeMap;

use latchkey_domain::id::OrganizationId;

use super::feed::{Change, What};
use super::{Batch, CommitError, Expect, Key, Operation, StoreError, Version, keys};
use crate::audit;

/// The records to write (`None` deletes), in the order of their keys.
pub(super) type Writes = BTreeMap<Key, Option<Vec<u8>>>;

/// The records as they are, with all that was judged before.
pub(super) trait Records {
    /// Looks at a record where it lies: most are asked for their version alone.
    fn look<T>(
        &self,
        key: &Key,
        at: impl FnOnce(Version, &[u8]) -> T,
    ) -> Result<Option<T>, StoreError>;
}

/// Judges a batch against the records as they are.
pub(super) fn plan(batch: Batch, records: &impl Records) -> Result<Writes, CommitError> {
    if let Some(what) = batch.invalid {
        return Err(StoreError::Invalid { what }.into());
    }
    let mut writes = Writes::new();
    for (key, (expect, operation)) in batch.operations {
        if expect != Expect::Anything || matches!(operation, Operation::Delete) {
            let found = records.look(&key, |version, _| version)?;
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
    stamp(batch.told, &mut writes, records)?;
    Ok(writes)
}

fn stamp(
    told: Vec<audit::Unplaced>,
    writes: &mut Writes,
    records: &impl Records,
) -> Result<(), StoreError> {
    let mut heads: BTreeMap<OrganizationId, audit::Head> = BTreeMap::new();
    for record in told {
        let organization = record.organization();
        let head = match heads.get(&organization) {
            Some(head) => *head,
            None => {
                let key = keys::audit_head(organization);
                match records.look(&key, |_, value| audit::Head::decode(value))? {
                    Some(head) => head.ok_or(StoreError::Damaged { key })?,
                    None => audit::Head::START,
                }
            }
        };
        let (record, head) = record.stamp(head);
        writes.insert(keys::audit(organization, head.sequence), Some(record));
        heads.insert(organization, head);
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
