//! What a runner says of itself, taken as far as it can be kept and shown: few things, short,
//! printable. Shown, never trusted.

use std::collections::BTreeMap;

use latchkey_proto::v1;

use super::convert;
use crate::error::{Error, Result};
use crate::job::is_label;
use crate::store::record::runner::{Accepted, Host, Said};

const MOST_SLOTS: u32 = 256;
const MOST_ENGINES: usize = 32;
const MOST_LABELS: usize = 32;
const MOST_PHRASES: usize = 16;
const LONGEST_WORD: usize = 64;
const LONGEST_PHRASE: usize = 160;

/// Reads a runner's `Hello`.
pub(super) fn said(hello: &v1::Hello) -> Result<Said> {
    if !(1..=MOST_SLOTS).contains(&hello.slots) {
        return Err(Error::field("slots", "a runner has 1 to 256 slots"));
    }
    let mut accepts = vec![];
    for phase in &hello.accepts {
        let accepted = Accepted::from(convert::phase(*phase)?);
        if !accepts.contains(&accepted) {
            accepts.push(accepted);
        }
    }
    let engine = |engine: &v1::Engine| {
        (printable(&engine.name, LONGEST_WORD), printable(&engine.version, LONGEST_WORD))
    };
    // Left out and not refused: the runner may hold jobs, and no environment can demand such.
    let labels: BTreeMap<String, String> = hello
        .labels
        .iter()
        .filter(|(name, value)| is_label(name, value))
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect::<BTreeMap<_, _>>()
        .into_iter()
        .take(MOST_LABELS)
        .collect();
    if labels.len() < hello.labels.len() {
        tracing::warn!("a runner has labels that cannot be demanded, or too many; left out");
    }
    Ok(Said {
        slots: hello.slots,
        engines: hello.engines.iter().take(MOST_ENGINES).map(engine).collect(),
        labels,
        accepts,
        host: hello.host.as_ref().map(host),
        version: printable(&hello.version, LONGEST_WORD),
    })
}

fn host(host: &v1::HostFacts) -> Host {
    let phrases = |phrases: &[String]| {
        phrases.iter().take(MOST_PHRASES).map(|phrase| printable(phrase, LONGEST_PHRASE)).collect()
    };
    Host {
        kernel: printable(&host.kernel, LONGEST_PHRASE),
        architecture: printable(&host.architecture, LONGEST_WORD),
        cpus: host.cpus,
        memory_bytes: host.memory_bytes,
        isolation: phrases(&host.isolation),
        isolation_missing: phrases(&host.isolation_missing),
    }
}

fn printable(text: &str, longest: usize) -> String {
    text.chars().filter(|c| !c.is_control()).take(longest).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn facts_are_bounded_and_printable() {
        let hello = v1::Hello {
            slots: 2,
            version: "1\u{1b}[2J".into(),
            host: Some(v1::HostFacts {
                kernel: "k".repeat(4000),
                isolation: vec!["a\nb".into(); 900],
                ..v1::HostFacts::default()
            }),
            accepts: vec![v1::Phase::Apply.into(); 9],
            ..v1::Hello::default()
        };
        let said = said(&hello).unwrap();
        assert_eq!(said.version, "1[2J");
        assert_eq!(said.accepts, [Accepted::Apply]);
        let host = said.host.unwrap();
        assert_eq!((host.kernel.len(), host.isolation.len()), (160, 16));
        assert_eq!(host.isolation[0], "ab");
    }

    #[test]
    fn what_cannot_be_demanded_is_left_out_and_what_makes_no_sense_refused() {
        let hello = v1::Hello { slots: 1, ..v1::Hello::default() };
        let labels = [("zone".to_owned(), "x".to_owned()), ("a b".to_owned(), "x".to_owned())];
        let kept = said(&v1::Hello { labels: labels.into(), ..hello.clone() }).unwrap().labels;
        assert_eq!(kept.into_keys().collect::<Vec<_>>(), ["zone"]);
        let none = said(&v1::Hello { slots: 0, ..hello.clone() });
        assert_eq!(none.unwrap_err().field_name(), Some("slots"));
        assert!(said(&v1::Hello { accepts: vec![7], ..hello }).is_err());
    }
}
