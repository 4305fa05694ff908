//! Reads lineage and serial out of a Terraform state, however large, in little memory.
//!
//! The parser keeps a key, or a value that it was asked for, in memory before anybody can look at
//! how long it is. So what it reads is watched: at the top level of a state, where both are, and
//! one below, where the names of outputs are, no text is long; and nothing is nested deeper than
//! any state is.

use std::io::{self, Read};

use latchkey_domain::id::{Digest, OrganizationId};
use serde::de::{DeserializeOwned, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};

use super::App;
use super::configurations::blob_error;
use crate::error::{Error, Result};
use crate::store::record::quarantine::StateFacts;

const LONGEST_LINEAGE: usize = 256;

/// A lineage of 256 bytes, each of them escaped; what else is at the top is shorter.
const LONGEST_TEXT: usize = 6 * LONGEST_LINEAGE;

/// As deep as keys and values are read that may be kept.
const READ: usize = 2;

const DEEPEST: usize = 512;

/// The format of Terraform since 0.12, and of OpenTofu.
const FORMAT: u64 = 4;

/// The highest serial that a person sends: others have to be able to follow it, and every reader
/// of JSON to read them.
const HIGHEST: u64 = 1 << 53;

/// Why something is no state that could become current.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unfit {
    NoState,
    Lineage,
    Version,
    Serial,
    Beyond,
}

impl Unfit {
    /// Names the field at fault and what to do.
    pub(super) const fn explained(self) -> (&'static str, &'static str) {
        match self {
            Unfit::NoState => ("data", "it is not a Terraform state"),
            Unfit::Lineage => (
                "lineage",
                "a state's lineage has 1 to 256 printable bytes; write the state with a lineage \
                 that Terraform made",
            ),
            Unfit::Version => (
                "data",
                "it is not a state of format version 4; write it with Terraform 0.12 or later, or \
                 with OpenTofu",
            ),
            Unfit::Serial => (
                "data",
                "its serial is above 9,007,199,254,740,992, so that hardly any could follow; write \
                 the state with a lower one",
            ),
            Unfit::Beyond => (
                "data",
                "a state has no key and no text above 1,536 bytes at its top level (its lineage \
                 has up to 256) and no longer name of an output, and nests up to 512 levels deep; \
                 write it with Terraform",
            ),
        }
    }
}

impl App {
    /// Reads what a stored state says of itself.
    pub(super) async fn state_facts(
        &self,
        organization: OrganizationId,
        digest: Digest,
    ) -> Result<std::result::Result<StateFacts, Unfit>> {
        let _place = self.uploads.parse().await?;
        let reader = self.blobs.read(organization, digest).await.map_err(blob_error)?;
        reader.read_with(|reader| facts(reader)).await.map_err(blob_error)
    }

    /// As [`App::state_facts`], of a state that a person sends: it must be of the one format that
    /// is known.
    pub(super) async fn checked_state(
        &self,
        organization: OrganizationId,
        digest: Digest,
    ) -> Result<StateFacts> {
        let _place = self.uploads.parse().await?;
        let reader = self.blobs.read(organization, digest).await.map_err(blob_error)?;
        let checked = reader.read_with(|reader| checked(reader)).await.map_err(blob_error)?;
        checked.map_err(|unfit| {
            let (field, message) = unfit.explained();
            Error::field(field, message)
        })
    }
}

fn facts(state: impl Read) -> std::result::Result<StateFacts, Unfit> {
    with_lineage(read(state)?)
}

fn checked(state: impl Read) -> std::result::Result<StateFacts, Unfit> {
    let Document { version, serial, lineage, .. } = read(state)?;
    if version != FORMAT {
        return Err(Unfit::Version);
    }
    if serial > HIGHEST {
        return Err(Unfit::Serial);
    }
    with_lineage(StateFacts { lineage, serial })
}

/// The top of a state of the current format.
#[derive(Deserialize)]
struct Document {
    version: u64,
    serial: u64,
    lineage: String,
    /// Looked at for its shape only.
    #[serde(rename = "outputs", default)]
    _outputs: Shape<'{'>,
    #[serde(rename = "resources", default)]
    _resources: Shape<'['>,
}

/// A JSON object or array, of which nothing is kept: a state may be large.
#[derive(Default)]
struct Shape<const OPENING: char>;

impl<'de, const OPENING: char> Deserialize<'de> for Shape<OPENING> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        match OPENING {
            '{' => deserializer.deserialize_map(Self),
            _ => deserializer.deserialize_seq(Self),
        }
    }
}

impl<'de, const OPENING: char> Visitor<'de> for Shape<OPENING> {
    type Value = Self;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "what begins with {OPENING}")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Self, A::Error> {
        while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        Ok(self)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> std::result::Result<Self, A::Error> {
        while items.next_element::<IgnoredAny>()?.is_some() {}
        Ok(self)
    }
}

fn read<T: DeserializeOwned>(state: impl Read) -> std::result::Result<T, Unfit> {
    let mut watched = Watched::new(state);
    let read = serde_json::from_reader::<_, T>(&mut watched);
    if watched.beyond {
        return Err(Unfit::Beyond);
    }
    read.map_err(|_| Unfit::NoState)
}

fn with_lineage(facts: StateFacts) -> std::result::Result<StateFacts, Unfit> {
    if !(1..=LONGEST_LINEAGE).contains(&facts.lineage.len())
        || facts.lineage.contains(char::is_control)
    {
        return Err(Unfit::Lineage);
    }
    Ok(facts)
}

/// JSON that is being read, up to what is beyond any state.
struct Watched<R> {
    inner: R,
    within: Within,
    depth: usize,
    /// Of the text or number at hand.
    length: usize,
    beyond: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Within {
    Structure,
    Text,
    Escape,
}

impl<R> Watched<R> {
    fn new(inner: R) -> Self {
        Self { inner, within: Within::Structure, depth: 0, length: 0, beyond: false }
    }

    fn watch(&mut self, byte: u8) {
        self.length += 1;
        self.within = match (self.within, byte) {
            (Within::Structure, b'"') => {
                self.length = 0;
                Within::Text
            }
            (Within::Structure, b'{' | b'[') => {
                self.depth += 1;
                self.length = 0;
                Within::Structure
            }
            (Within::Structure, b'}' | b']') => {
                self.depth = self.depth.saturating_sub(1);
                self.length = 0;
                Within::Structure
            }
            (Within::Structure, b',' | b':' | b' ' | b'\t' | b'\n' | b'\r') => {
                self.length = 0;
                Within::Structure
            }
            (Within::Structure, _) => Within::Structure,
            (Within::Text, b'"') => {
                self.length = 0;
                Within::Structure
            }
            (Within::Text, b'\\') => Within::Escape,
            (Within::Text, _) | (Within::Escape, _) => Within::Text,
        };
        self.beyond |= self.depth > DEEPEST || (self.depth <= READ && self.length > LONGEST_TEXT);
    }
}

impl<R: Read> Read for Watched<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        for byte in buffer.iter().take(read) {
            self.watch(*byte);
            if self.beyond {
                return Err(io::Error::other("it is beyond any state"));
            }
        }
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use latchkey_domain::policy::MfaPolicy;

    use super::*;
    use crate::app::fixture::Fixture;

    /// Counts what was asked of it.
    struct Endless<'a> {
        before: &'a [u8],
        then: u8,
        read: usize,
    }

    impl Read for Endless<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            assert!(self.read < 1 << 20, "it was read on and on");
            let first = self.before.read(buffer)?;
            if first == 0 {
                buffer.fill(self.then);
            }
            let read = if first == 0 { buffer.len() } else { first };
            self.read += read;
            Ok(read)
        }
    }

    #[test]
    fn facts_are_found_among_everything_else() {
        let long = "x".repeat(100_000);
        let state = format!(
            r#"{{"version":4,"outputs":{{"a\"b":{{"value":"{long}\\"}}}},"serial":41,
                "lineage":"a-\u0062","resources":[[[["{long}"]]]],"check_results":null}}"#
        );
        let found = facts(state.as_bytes()).unwrap();
        assert_eq!((found.lineage.as_str(), found.serial), ("a-b", 41));
    }

    #[test]
    fn what_never_ends_is_refused_before_it_fills_memory() {
        for (before, then) in [
            (r#"{"serial":1,"lineage":""#, b'x'),
            (r#"{""#, b'k'),
            (r#"{"serial":"#, b'1'),
            (r#"{"lineage":"a","outputs":"#, b'['),
            ("", b'1'),
        ] {
            let endless = Endless { before: before.as_bytes(), then, read: 0 };
            assert_eq!(facts(endless), Err(Unfit::Beyond), "{before}");
        }
        let rest = r#"{"version":4,"serial":1,"lineage":"l","#;
        for (last, then) in [
            (r#""outputs":{""#, b'k'),
            (r#""outputs":{"a":{},""#, b'k'),
            (r#""outputs":"#, b'['),
            (r#""outputs":""#, b'x'),
            (r#""resources":["#, b'['),
            (r#""re"#, b's'),
        ] {
            let before = format!("{rest}{last}");
            let endless = Endless { before: before.as_bytes(), then, read: 0 };
            let read = checked(endless);
            assert!(matches!(read, Err(Unfit::Beyond | Unfit::NoState)), "{before}: {read:?}");
        }
    }

    #[test]
    fn more_states_than_there_are_threads_do_not_wait_for_each_other() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .max_blocking_threads(2)
            .build()
            .unwrap();
        runtime.block_on(async {
            let fixture = Fixture::new(MfaPolicy::Never).await;
            let organization = fixture.organization().await;
            let long = "x".repeat(1 << 20);
            let state = format!(r#"{{"serial":1,"lineage":"l","outputs":{{"x":["{long}"]}}}}"#);
            let digest = fixture.app.blobs.put(organization, state.as_bytes()).await.unwrap();
            let mut reading = tokio::task::JoinSet::new();
            for _ in 0..40 {
                let app = std::sync::Arc::clone(&fixture.app);
                reading.spawn(async move { app.state_facts(organization, digest).await });
            }
            let all = tokio::time::timeout(std::time::Duration::from_secs(60), reading.join_all());
            let all = all.await.expect("they do not wait for each other");
            assert!(all.into_iter().all(|facts| facts.unwrap().unwrap().serial == 1));
        });
    }

    #[test]
    fn what_a_person_sends_is_of_the_one_format_that_is_known() {
        let of = |state: &str| checked(state.as_bytes()).map(|facts| facts.serial);
        let rest = r#""serial":7,"lineage":"l","outputs":{},"resources":[]"#;
        assert_eq!(of(&format!(r#"{{"version":4,{rest}}}"#)), Ok(7));
        assert_eq!(of(&format!(r#"{{"version":3,{rest}}}"#)), Err(Unfit::Version));
        assert_eq!(of(&format!("{{{rest}}}")), Err(Unfit::NoState));
        for (part, instead) in [("[]", "{}"), ("{}", "[]"), ("[]}", "[]} x"), ("}", "")] {
            let broken = format!(r#"{{"version":4,{rest}}}"#).replacen(part, instead, 1);
            assert_eq!(of(&broken), Err(Unfit::NoState), "{broken}");
        }
    }

    #[test]
    fn what_a_person_sends_leaves_higher_serials_for_those_that_follow() {
        let of = |serial: u64| {
            let state = format!(
                r#"{{"version":4,"serial":{serial},"lineage":"l","outputs":{{}},"resources":[]}}"#
            );
            checked(state.as_bytes()).map(|facts| facts.serial)
        };
        assert_eq!(of(1 << 53), Ok(1 << 53));
        assert_eq!(of((1 << 53) + 1), Err(Unfit::Serial));
        assert_eq!(of(u64::MAX), Err(Unfit::Serial));
    }

    #[test]
    fn a_lineage_has_a_bound_and_is_printable() {
        let of =
            |lineage: &str| facts(format!(r#"{{"serial":1,"lineage":"{lineage}"}}"#).as_bytes());
        assert!(of(&"x".repeat(256)).is_ok());
        for lineage in ["", &"x".repeat(257), r"a\nb"] {
            assert_eq!(of(lineage), Err(Unfit::Lineage));
        }
        assert_eq!(facts(b"{}".as_slice()), Err(Unfit::NoState));
        assert_eq!(facts(b"Error: no".as_slice()), Err(Unfit::NoState));
    }
}
