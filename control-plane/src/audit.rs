//! The chained record of who did what.
//!
//! A use case hands over a [`Draft`] in the same batch as the change it tells of. There it is
//! written as it will be stored ([`Unplaced`]). The committer of the store, who alone knows the
//! order of commits, stamps it: [`Unplaced::stamp`] gives it the next sequence number of its
//! organization and the digest of its predecessor. The head of each chain is kept as a record of
//! its own. So an edited, dropped, moved or added record breaks the
//! chain ([`Verifier::push`]), and one cut from the end misses the head ([`Verifier::finish`]).
//!
//! The chain doesn't stop someone who can rewrite all of it and the head; compare the head with
//! one noted elsewhere for that.
//!
//! The form under the digest is [`latchkey_proto::audit`]'s, which readers of an export share. On
//! disk its digest follows it.

use std::fmt;

use latchkey_domain::id::OrganizationId;
use latchkey_domain::time::Timestamp;
use latchkey_proto::audit::{Chain, DIGEST, Entry, MAGIC, place};
use serde_json::{Map, Value};

use crate::store::{self, Scan, Store, StoreError, keys};

pub use latchkey_proto::audit::Fault;

/// What a use case tells: an audit record before it has its place in the chain. Secrets don't
/// belong in it, in no form.
#[derive(Clone, Debug, PartialEq)]
pub struct Draft {
    pub organization: OrganizationId,
    pub at: Timestamp,
    /// Who did it, as a kind and a name or id: `user ada`, `runner 0190...`, `system`.
    pub actor: String,
    /// What was done: a verb and a noun, `confirm_run`.
    pub action: String,
    /// What it was done to: `run 0190...`.
    pub subject: String,
    pub details: Map<String, Value>,
}

impl Draft {
    pub fn new(
        organization: OrganizationId,
        at: Timestamp,
        actor: impl Into<String>,
        action: impl Into<String>,
        subject: impl Into<String>,
    ) -> Self {
        Self {
            organization,
            at,
            actor: actor.into(),
            action: action.into(),
            subject: subject.into(),
            details: Map::new(),
        }
    }

    pub fn with(mut self, name: impl Into<String>, value: impl Into<Value>) -> Self {
        self.details.insert(name.into(), value.into());
        self
    }

    /// Writes the details as the digest covers them.
    pub fn details_json(&self) -> String {
        let mut details = String::new();
        encode_object(&self.details, &mut details);
        details
    }
}

/// A draft as it will be stored, but for its place. Whoever hands it over writes it, since many
/// do that at once, while there is one committer.
#[derive(Clone)]
pub struct Unplaced {
    organization: OrganizationId,
    canonical: Vec<u8>,
}

impl Unplaced {
    pub fn organization(&self) -> OrganizationId {
        self.organization
    }

    /// Returns how many bytes the record takes.
    pub fn size(&self) -> usize {
        self.canonical.len() + DIGEST
    }

    /// Gives the record its place behind the head; returns it as it is stored, and the new head.
    pub fn stamp(self, head: Head) -> (Vec<u8>, Head) {
        let mut bytes = self.canonical;
        let sequence = head.sequence + 1;
        let digest = place(&mut bytes, sequence, &head.digest);
        bytes.extend_from_slice(&digest);
        (bytes, Head { sequence, digest })
    }
}

impl From<Draft> for Unplaced {
    fn from(mut draft: Draft) -> Self {
        draft.details.values_mut().for_each(settle);
        let nowhere = Record { sequence: 0, previous: [0; DIGEST], digest: [0; DIGEST], draft };
        let canonical = nowhere.entry(&nowhere.draft.details_json()).canonical();
        Self { organization: nowhere.draft.organization, canonical }
    }
}

impl fmt::Debug for Unplaced {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Unplaced({} bytes)", self.size())
    }
}

/// An audit record in its place.
#[derive(Clone, Debug, PartialEq)]
pub struct Record {
    /// 1 for the first of an organization, then without gaps.
    pub sequence: u64,
    /// The digest of the predecessor; zeros for the first.
    pub previous: [u8; DIGEST],
    pub digest: [u8; DIGEST],
    pub draft: Draft,
}

/// The end of a chain: what the next record follows, and what a verifier must arrive at.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Head {
    pub sequence: u64,
    pub digest: [u8; DIGEST],
}

impl Head {
    /// The head of a chain without records.
    pub const START: Head = Head { sequence: 0, digest: [0; DIGEST] };

    pub fn encode(&self) -> Vec<u8> {
        [&self.sequence.to_be_bytes()[..], &self.digest].concat()
    }

    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let (sequence, digest) = bytes.split_first_chunk()?;
        let digest = digest.try_into().ok()?;
        Some(Self { sequence: u64::from_be_bytes(*sequence), digest })
    }
}

impl fmt::Debug for Head {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Head({}, {})", self.sequence, hex::encode(self.digest))
    }
}

impl Record {
    fn entry<'a>(&'a self, details: &'a str) -> Entry<'a> {
        Entry {
            organization: *self.draft.organization.as_bytes(),
            sequence: self.sequence,
            time_ms: self.draft.at.as_millis(),
            previous: self.previous,
            actor: &self.draft.actor,
            action: &self.draft.action,
            subject: &self.draft.subject,
            details,
        }
    }

    /// Writes the record as it is stored.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = self.entry(&self.draft.details_json()).canonical();
        bytes.extend_from_slice(&self.digest);
        bytes
    }

    /// Reads a record as it was stored; `None` if it is anything but exactly what
    /// [`Record::encode`] writes. Whether its digest is right is for the [`Verifier`].
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let mut rest = bytes.strip_prefix(MAGIC)?;
        let organization = OrganizationId::from_bytes(*take(&mut rest)?);
        let sequence = u64::from_be_bytes(*take(&mut rest)?);
        let at = Timestamp::from_millis(i64::from_be_bytes(*take(&mut rest)?));
        let previous: [u8; DIGEST] = *take(&mut rest)?;
        let actor = take_text(&mut rest)?;
        let action = take_text(&mut rest)?;
        let subject = take_text(&mut rest)?;
        let details = serde_json::from_str(&take_text(&mut rest)?).ok()?;
        let digest: [u8; DIGEST] = rest.try_into().ok()?;
        let draft = Draft { organization, at, actor, action, subject, details };
        let record = Self { sequence, previous, digest, draft };
        (record.encode() == bytes).then_some(record)
    }
}

/// Says that the chain held, and how far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verified {
    pub count: u64,
    pub head: Head,
}

/// The first place where the chain doesn't hold.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("verify the audit chain at record {sequence}: {what}")]
pub struct Broken {
    pub sequence: u64,
    pub what: Fault,
}

/// Walks one organization's chain from its first record.
#[derive(Debug)]
pub struct Verifier {
    chain: Chain,
}

impl Verifier {
    pub fn new(organization: OrganizationId) -> Self {
        Self { chain: Chain::begin(*organization.as_bytes()) }
    }

    /// Judges the next record.
    pub fn push(&mut self, stored: &[u8]) -> Result<Record, Broken> {
        let sequence = self.chain.next();
        let broken = |what| Broken { sequence, what };
        let record = Record::decode(stored).ok_or_else(|| broken(Fault::Malformed))?;
        let details = record.draft.details_json();
        self.chain.follow(&record.entry(&details), &record.digest).map_err(broken)?;
        Ok(record)
    }

    fn head(&self) -> Head {
        Head { sequence: self.chain.sequence(), digest: self.chain.digest() }
    }

    /// Judges the end of the chain.
    pub fn finish(self, expected: Head) -> Result<Verified, Broken> {
        let at = |sequence, what| Err(Broken { sequence, what });
        let head = self.head();
        if head.sequence < expected.sequence {
            return at(head.sequence + 1, Fault::Truncated);
        }
        if head != expected {
            return at(head.sequence, Fault::WrongHead);
        }
        Ok(Verified { count: head.sequence, head })
    }
}

/// Verifies a whole chain given as stored records.
pub fn verify<'a>(
    organization: OrganizationId,
    stored: impl IntoIterator<Item = &'a [u8]>,
    expected: Head,
) -> Result<Verified, Broken> {
    let mut verifier = Verifier::new(organization);
    for record in stored {
        verifier.push(record)?;
    }
    verifier.finish(expected)
}

/// Why a stored chain could not be confirmed.
#[derive(Clone, Debug, thiserror::Error)]
pub enum VerifyError {
    #[error(transparent)]
    Broken(#[from] Broken),
    #[error("read the audit chain")]
    Store(#[from] StoreError),
}

/// Verifies an organization's chain in the store, up to the head of the moment it is called.
pub async fn verify_stored(
    store: &dyn Store,
    organization: OrganizationId,
) -> Result<Verified, VerifyError> {
    let head_key = keys::audit_head(organization);
    let expected = match store.fetch(&head_key).await? {
        Some(found) => Head::decode(&found.value).ok_or(StoreError::Damaged { key: head_key })?,
        None => Head::START,
    };
    let mut verifier = Verifier::new(organization);
    let mut after = None;
    let mut limit = store::SCAN_LIMIT;
    loop {
        let scan = Scan::ascending(keys::audit_of(organization), limit);
        let page = match store.scan(scan.after(after.clone())).await {
            Ok(page) => page,
            Err(StoreError::Damaged { key }) if key.kind() == Some(keys::Kind::Audit) => {
                if limit > 1 {
                    // Those before it are judged first: the chain may be broken earlier.
                    limit = 1;
                    continue;
                }
                let sequence = verifier.chain.next();
                return Err(Broken { sequence, what: Fault::Malformed }.into());
            }
            Err(error) => return Err(error.into()),
        };
        for (_, stored) in &page {
            // Appended since the head was read; or, with a chain that never had a head, added.
            if verifier.chain.sequence() == expected.sequence && expected != Head::START {
                break;
            }
            verifier.push(&stored.value)?;
        }
        if page.len() < limit || verifier.chain.sequence() == expected.sequence {
            return Ok(verifier.finish(expected)?);
        }
        after = page.last().map(|(key, _)| key.clone());
    }
}

/// Turns fractions into text: they are the one kind of value that need not survive being
/// written and read, and a digest must.
fn settle(value: &mut Value) {
    match value {
        Value::Number(number) if number.is_f64() => *value = Value::String(number.to_string()),
        Value::Array(values) => values.iter_mut().for_each(settle),
        Value::Object(values) => values.values_mut().for_each(settle),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

/// Writes JSON with sorted keys, whatever order the map keeps.
fn encode_object(object: &Map<String, Value>, text: &mut String) {
    let mut entries: Vec<_> = object.iter().collect();
    entries.sort_unstable_by_key(|(name, _)| *name);
    text.push('{');
    for (index, (name, value)) in entries.into_iter().enumerate() {
        if index > 0 {
            text.push(',');
        }
        text.push_str(&Value::String(name.clone()).to_string());
        text.push(':');
        encode_value(value, text);
    }
    text.push('}');
}

fn encode_value(value: &Value, text: &mut String) {
    match value {
        Value::Object(object) => encode_object(object, text),
        Value::Array(values) => {
            text.push('[');
            for (index, value) in values.iter().enumerate() {
                if index > 0 {
                    text.push(',');
                }
                encode_value(value, text);
            }
            text.push(']');
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {
            text.push_str(&value.to_string());
        }
    }
}

fn take<'a, const N: usize>(rest: &mut &'a [u8]) -> Option<&'a [u8; N]> {
    let (part, after) = rest.split_first_chunk()?;
    *rest = after;
    Some(part)
}

fn take_text(rest: &mut &[u8]) -> Option<String> {
    let length = usize::try_from(u32::from_be_bytes(*take(rest)?)).ok()?;
    let (text, after) = rest.split_at_checked(length)?;
    *rest = after;
    String::from_utf8(text.to_vec()).ok()
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::{
        Just, Strategy, any, prop_assert, prop_assert_eq, prop_oneof, proptest,
    };
    use proptest::sample::Index;

    use super::*;

    fn organization() -> OrganizationId {
        OrganizationId::from_bytes([1; 16])
    }

    fn value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<f64>().prop_map(Value::from),
            ".{0,12}".prop_map(Value::from),
        ];
        leaf.prop_recursive(2, 12, 4, |inner| {
            prop_oneof![
                vec(inner.clone(), 0..4).prop_map(Value::from),
                vec((".{0,6}", inner), 0..4)
                    .prop_map(|entries| Value::Object(entries.into_iter().collect())),
            ]
        })
    }

    fn draft() -> impl Strategy<Value = Draft> {
        (any::<i64>(), ".{0,12}", "[a-z_]{1,12}", ".{0,12}", vec((".{0,6}", value()), 0..4))
            .prop_map(|(at, actor, action, subject, details)| Draft {
                organization: organization(),
                at: Timestamp::from_millis(at),
                actor,
                action,
                subject,
                details: details.into_iter().collect(),
            })
    }

    fn chain(drafts: Vec<Draft>) -> (Vec<Vec<u8>>, Head) {
        let mut head = Head::START;
        let mut stored = Vec::new();
        for draft in drafts {
            let (record, next) = Unplaced::from(draft).stamp(head);
            head = next;
            stored.push(record);
        }
        (stored, head)
    }

    fn check(stored: &[Vec<u8>], head: Head) -> Result<Verified, Broken> {
        verify(organization(), stored.iter().map(Vec::as_slice), head)
    }

    proptest! {
        #[test]
        fn a_record_survives_being_written_and_read(draft in draft()) {
            let mut settled = draft.clone();
            settled.details.values_mut().for_each(settle);
            let head = Head { sequence: 7, digest: [3; DIGEST] };
            let (stored, after) = Unplaced::from(draft).stamp(head);
            let record = Record::decode(&stored).unwrap();
            prop_assert_eq!(&record.encode(), &stored);
            prop_assert_eq!((record.sequence, record.digest), (after.sequence, after.digest));
            prop_assert_eq!((record.sequence, record.previous), (8, head.digest));
            prop_assert_eq!(record.draft, settled);
        }

        #[test]
        fn an_untouched_chain_verifies(drafts in vec(draft(), 0..8)) {
            let count = drafts.len() as u64;
            let (stored, head) = chain(drafts);
            prop_assert_eq!(check(&stored, head), Ok(Verified { count, head }));
        }

        #[test]
        fn any_flipped_bit_is_found(
            drafts in vec(draft(), 1..5), which in any::<Index>(), at in any::<Index>(), bit in 0..8_u32
        ) {
            let (mut stored, head) = chain(drafts);
            let which = which.index(stored.len());
            let at = at.index(stored[which].len());
            stored[which][at] ^= 1_u8 << bit;
            let broken = check(&stored, head).unwrap_err();
            prop_assert!(broken.sequence <= which as u64 + 2);
        }

        #[test]
        fn a_dropped_record_is_found(drafts in vec(draft(), 1..6), which in any::<Index>()) {
            let (mut stored, head) = chain(drafts);
            let which = which.index(stored.len());
            stored.remove(which);
            let broken = check(&stored, head).unwrap_err();
            prop_assert_eq!(broken.sequence, which as u64 + 1);
        }

        #[test]
        fn swapped_records_are_found(
            drafts in vec(draft(), 2..6), a in any::<Index>(), b in any::<Index>()
        ) {
            let (mut stored, head) = chain(drafts);
            let (a, b) = (a.index(stored.len()), b.index(stored.len()));
            stored.swap(a, b);
            let found = check(&stored, head);
            prop_assert_eq!(found.is_ok(), a == b);
        }

        #[test]
        fn a_repeated_record_is_found(drafts in vec(draft(), 1..6), which in any::<Index>()) {
            let (mut stored, head) = chain(drafts);
            let which = which.index(stored.len());
            stored.insert(which, stored[which].clone());
            prop_assert!(check(&stored, head).is_err());
        }

        #[test]
        fn a_rewritten_tail_misses_the_head(
            drafts in vec(draft(), 1..6), which in any::<Index>(), other in draft()
        ) {
            let (stored, head) = chain(drafts.clone());
            let which = which.index(stored.len());
            let mut forged = drafts;
            forged[which] = other;
            let (forged, _) = chain(forged);
            prop_assert_eq!(check(&forged, head).is_ok(), forged == stored);
        }

        #[test]
        fn malformed_bytes_are_refused(bytes in vec(any::<u8>(), 0..200)) {
            prop_assert_eq!(Record::decode(&bytes), None);
        }
    }

    #[test]
    fn truncation_is_told_from_other_damage() {
        let draft = Draft::new(organization(), Timestamp::from_millis(5), "user ada", "a", "b");
        let (stored, head) = chain(vec![draft; 3]);
        let broken = check(&stored[..2], head).unwrap_err();
        assert_eq!(broken, Broken { sequence: 3, what: Fault::Truncated });
    }

    #[test]
    fn a_record_of_another_tenant_is_refused() {
        let other = OrganizationId::from_bytes([2; 16]);
        let draft = Draft::new(other, Timestamp::from_millis(5), "a", "b", "c");
        let (record, head) = Unplaced::from(draft).stamp(Head::START);
        let broken = check(&[record], head).unwrap_err();
        assert_eq!(broken.what, Fault::Foreign);
    }

    #[test]
    fn the_order_of_details_is_of_no_account() {
        let draft = Draft::new(organization(), Timestamp::from_millis(5), "a", "b", "c");
        let one = draft.clone().with("x", 1).with("a", "2");
        let two = draft.with("a", "2").with("x", 1);
        let stamp = |draft| Unplaced::from(draft).stamp(Head::START);
        assert_eq!(stamp(one), stamp(two));
    }
}
