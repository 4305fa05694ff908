//! An export of the audit chain: JSON lines, and their check without a control plane.
//!
//! One line per record, in the order of the chain, each ended by a line feed. A line is a JSON
//! object without spaces whose fields stand in this order and no other:
//!
//! | field | what it is |
//! |---|---|
//! | `format` | `latchkey audit 1` |
//! | `organization` | id of the organization, a UUID |
//! | `sequence` | number of the record, from 1, without gaps |
//! | `time` | RFC 3339 in UTC, to the millisecond, without trailing zeros |
//! | `previous` | digest of the predecessor, hex; zeros for the first |
//! | `actor`, `action`, `subject` | who, what, to what |
//! | `details` | an object with sorted keys |
//! | `digest` | SHA-256 of all the above in the form of [`latchkey_proto::audit`], hex |
//!
//! So a line holds all that its digest covers. The check writes every line again from what it
//! read and compares the bytes, so nothing in a line is beyond the digest either: not the form of
//! a number, not an escape, not a space.

use std::io::{BufRead, Read};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use uuid::Uuid;

use latchkey_proto::audit::{Chain, Entry, Fault, from_hex, to_hex};
use latchkey_proto::v1;

const FORMAT: &str = "latchkey audit 1";

/// The longest line that is read: a record has up to 32 KiB, and escapes make up to six bytes of
/// one.
const LONGEST: u64 = 256 << 10;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    format: String,
    organization: String,
    sequence: u64,
    time: String,
    previous: String,
    actor: String,
    action: String,
    subject: String,
    details: Box<RawValue>,
    digest: String,
}

/// Writes a record as a line, with its end.
pub(crate) fn line(record: &v1::AuditRecord) -> Option<String> {
    let time = record.time.as_ref()?;
    let line = Line {
        format: FORMAT.to_owned(),
        organization: record.organization_id.clone(),
        sequence: record.sequence,
        time: Timestamp::new(time.seconds, time.nanos).ok()?.to_string(),
        previous: record.previous_digest.clone(),
        actor: record.actor.clone(),
        action: record.action.clone(),
        subject: record.subject.clone(),
        details: RawValue::from_string(record.details_json.clone()).ok()?,
        digest: record.digest.clone(),
    };
    line.write()
}

impl Line {
    fn write(&self) -> Option<String> {
        serde_json::to_string(self).ok().map(|text| text + "\n")
    }

    /// Reads a line, if it is exactly what [`Line::write`] writes.
    fn read(text: &[u8]) -> Option<Line> {
        let line: Line = serde_json::from_slice(text).ok()?;
        let same = line.format == FORMAT && line.write()?.as_bytes() == text;
        same.then_some(line)
    }

    fn entry(&self) -> Option<Entry<'_>> {
        // Both have several forms; only the one that is written counts.
        let organization: Uuid = self.organization.parse().ok()?;
        let time: Timestamp = self.time.parse().ok()?;
        let time_ms = time.as_millisecond();
        let written = Timestamp::from_millisecond(time_ms).ok()?.to_string();
        if organization.to_string() != self.organization || written != self.time {
            return None;
        }
        Some(Entry {
            organization: *organization.as_bytes(),
            sequence: self.sequence,
            time_ms,
            previous: from_hex(&self.previous)?,
            actor: &self.actor,
            action: &self.action,
            subject: &self.subject,
            details: self.details.get(),
        })
    }
}

/// What a check found that held.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Checked {
    /// Whose chain it is.
    pub(crate) organization: String,
    /// The first number; the records before it were not looked at.
    pub(crate) first: u64,
    pub(crate) records: u64,
    /// Digest of the last record.
    pub(crate) head: String,
    /// The number of the record that has the digest that was asked for.
    pub(crate) head_at: Option<u64>,
}

/// Why an export is not confirmed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Unconfirmed {
    /// The number that the first record that does not hold should have.
    #[error("record {sequence}: {fault}")]
    Broken { sequence: u64, fault: Fault },
    #[error("read the export")]
    Read(#[from] std::io::Error),
}

/// What is known elsewhere of an export.
#[derive(Clone, Debug, Default)]
pub(crate) struct Known {
    /// The digest of a record. Where none has it, records at the end are missing, or all of it was
    /// written anew.
    pub(crate) head: Option<String>,
    /// Whose records they are: another organization's hold for themselves just as well.
    pub(crate) organization: Option<Uuid>,
}

/// Walks an export.
pub(crate) fn check(mut export: impl BufRead, known: &Known) -> Result<Checked, Unconfirmed> {
    let Known { head, organization } = known;
    let mut chain: Option<Chain> = None;
    let mut whose = String::new();
    let (mut first, mut records, mut head_at) = (1, 0, None);
    loop {
        let mut text = Vec::new();
        export.by_ref().take(LONGEST).read_until(b'\n', &mut text)?;
        let sequence = chain.as_ref().map_or(1, Chain::next);
        let broken = |fault| Unconfirmed::Broken { sequence, fault };
        if text.is_empty() {
            let digest = chain.map_or([0; 32], |chain| chain.digest());
            if records == 0 || (head.is_some() && head_at.is_none()) {
                return Err(broken(Fault::Truncated));
            }
            let head = to_hex(&digest);
            return Ok(Checked { organization: whose, first, records, head, head_at });
        }
        let line = Line::read(&text).ok_or_else(|| broken(Fault::Malformed))?;
        let entry = line.entry().ok_or_else(|| broken(Fault::Malformed))?;
        let digest = from_hex(&line.digest).ok_or_else(|| broken(Fault::Malformed))?;
        let chain = match &mut chain {
            Some(chain) => chain,
            None => {
                // A chain of which the beginning was left out is taken up where it says.
                let before =
                    line.sequence.checked_sub(1).ok_or_else(|| broken(Fault::Malformed))?;
                let previous = if before == 0 { [0; 32] } else { entry.previous };
                first = line.sequence;
                whose.clone_from(&line.organization);
                let organization = organization.map_or(entry.organization, Uuid::into_bytes);
                chain.insert(Chain::after(organization, before, previous))
            }
        };
        chain.follow(&entry, &digest).map_err(broken)?;
        records += 1;
        if head.as_ref() == Some(&line.digest) {
            head_at = Some(line.sequence);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{any, prop_assert, proptest};
    use proptest::sample::Index;

    use super::*;

    /// An export of records from a number on, and the digests of all.
    fn export(from: u64, to: u64) -> (Vec<String>, Vec<String>) {
        let organization = Uuid::from_bytes([7; 16]);
        let (mut previous, mut lines, mut digests) = ([0; 32], vec![], vec![]);
        for sequence in 1..=to {
            let time_ms = 1_767_225_600_000 + i64::try_from(sequence).unwrap() * 77;
            let details = r#"{"name":"ü\n\"x\"","serial":18446744073709551615}"#;
            let entry = Entry {
                organization: *organization.as_bytes(),
                sequence,
                time_ms,
                previous,
                actor: "user ada",
                action: "confirm_run",
                subject: "run \"1\"\u{7f}\t",
                details,
            };
            let digest = entry.digest();
            let time = Timestamp::from_millisecond(time_ms).unwrap();
            let record = v1::AuditRecord {
                sequence,
                time: Some(prost_types::Timestamp {
                    seconds: time.as_second(),
                    nanos: time.subsec_nanosecond(),
                }),
                actor: entry.actor.into(),
                action: entry.action.into(),
                subject: entry.subject.into(),
                details_json: details.into(),
                digest: to_hex(&digest),
                previous_digest: to_hex(&previous),
                organization_id: organization.to_string(),
            };
            if sequence >= from {
                lines.push(line(&record).unwrap());
            }
            digests.push(to_hex(&digest));
            previous = digest;
        }
        (lines, digests)
    }

    fn sequence_of(outcome: Result<Checked, Unconfirmed>) -> u64 {
        match outcome.unwrap_err() {
            Unconfirmed::Broken { sequence, .. } => sequence,
            Unconfirmed::Read(error) => panic!("{error}"),
        }
    }

    fn check_lines(lines: &[String], head: Option<&str>) -> Result<Checked, Unconfirmed> {
        check(lines.concat().as_bytes(), &of_head(head))
    }

    fn of_head(head: Option<&str>) -> Known {
        Known { head: head.map(str::to_owned), organization: None }
    }

    #[test]
    fn an_untouched_export_is_confirmed_from_any_number_on() {
        for from in [1, 4] {
            let (lines, digests) = export(from, 9);
            let checked = check_lines(&lines, Some(&digests[6])).unwrap();
            assert_eq!((checked.first, checked.records), (from, 10 - from));
            assert_eq!((&checked.head, checked.head_at), (&digests[8], Some(7)));
        }
    }

    #[test]
    fn a_removed_line_and_swapped_lines_are_found_where_they_were() {
        let (lines, _) = export(1, 6);
        for at in 1..5 {
            let mut removed = lines.clone();
            removed.remove(at);
            assert_eq!(sequence_of(check_lines(&removed, None)), at as u64 + 1);
            let mut swapped = lines.clone();
            swapped.swap(at - 1, at);
            // The first of an export may have any number: the second then does not follow it.
            let expect = if at == 1 { 3 } else { at as u64 };
            assert_eq!(sequence_of(check_lines(&swapped, None)), expect);
        }
    }

    #[test]
    fn missing_ends_are_found_by_the_noted_head() {
        let (lines, digests) = export(1, 6);
        assert!(check_lines(&lines[..4], None).is_ok());
        let outcome = check_lines(&lines[..4], Some(&digests[5]));
        let told = outcome.as_ref().unwrap_err().to_string();
        assert_eq!(told, "record 5: records at the end are missing");
        assert_eq!(sequence_of(outcome), 5);
        assert_eq!(sequence_of(check_lines(&[], None)), 1);
    }

    #[test]
    fn it_is_told_whose_an_export_is_and_another_organizations_is_not_confirmed() {
        for from in [1, 4] {
            let (lines, _) = export(from, 6);
            let of = |organization: [u8; 16]| {
                let organization = Some(Uuid::from_bytes(organization));
                check(lines.concat().as_bytes(), &Known { head: None, organization })
            };
            let whose = Uuid::from_bytes([7; 16]).to_string();
            assert_eq!(of([7; 16]).unwrap().organization, whose);
            assert_eq!(check_lines(&lines, None).unwrap().organization, whose);
            let told = of([8; 16]).unwrap_err().to_string();
            assert!(told.ends_with("the record belongs to another organization"), "{told}");
        }
    }

    proptest! {
        #[test]
        fn any_byte_that_is_changed_left_out_or_added_is_found(
            at in any::<Index>(), other in any::<u8>(), how in 0..3
        ) {
            let (lines, digests) = export(1, 3);
            let mut bytes = lines.concat().into_bytes();
            let at = at.index(bytes.len());
            match how {
                0 if bytes[at] == other => bytes[at] ^= 1,
                0 => bytes[at] = other,
                1 => drop(bytes.remove(at)),
                _ => bytes.insert(at, other),
            }
            prop_assert!(check(bytes.as_slice(), &of_head(Some(&digests[2]))).is_err());
        }
    }
}
