//! What a control plane says of how far its history has come, so that it can prove things later.
//!
//! Each start is an *incarnation* of the data, with a random name that is durable before anything
//! is told. A [`Mark`] says: in this generation, this incarnation had come to this commit. A copy
//! of the data goes on under another name than the original does, and knows where the incarnations
//! before it ended: so a mark tells the two apart for ever, however many commits a copy makes of
//! its own. A number alone would not: the copy's own commits soon pass it.
//!
//! Marks are digested under the master key. A runner can repeat one, and cannot make one up.
//!
//! An incarnation belongs to an opening of the database. Where several processes share one, they
//! would have to share its name, too.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use latchkey_domain::id::Generation;
use serde::{Deserialize, Serialize};
use subtle::ConstantTimeEq;

use crate::error::{Error, Result};
use crate::seal::{self, MasterKey};
use crate::store::keys::Kind;
use crate::store::record::{decode, encode};
use crate::store::{Batch, Expect, Store, keys, list};

/// How many incarnations are remembered. A mark of an older one proves nothing any more.
const MOST_KEPT: usize = 1000;

/// Length of an incarnation's name, in hex.
const NAME: usize = 32;

/// How far history had come when this was said. The digest says that it was said by us.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mark {
    pub generation: Generation,
    pub incarnation: String,
    pub history: u64,
    pub mac: Vec<u8>,
}

/// What a mark that was brought back says of the data that are here.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Nothing that is not known here.
    Fits,
    /// More than is known here: the data are an old copy.
    Proof(String),
    /// We never said that.
    MadeUp,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Incarnation {
    generation: u64,
    name: String,
    /// The last commit before it, and the last that belongs to it: known from the next one on.
    begins: u64,
    ends: Option<u64>,
}

/// The incarnation that is told of, and what is known of those before.
#[derive(Debug)]
pub(super) struct Branch {
    generation: Generation,
    own: String,
    /// The last commit before the oldest that is known.
    oldest: u64,
    /// Where each before the own one ended.
    ends: BTreeMap<String, u64>,
    last: Mutex<Option<Mark>>,
}

/// Set once, at a start.
pub(super) type Told = Arc<OnceLock<Branch>>;

impl Branch {
    /// Begins an incarnation, and notes where the last one ended. Those of other generations, and
    /// the oldest beyond a bound, are forgotten.
    pub(super) async fn begin(store: &dyn Store, generation: Generation) -> Result<Self> {
        let now = store.newest().await?.get();
        let mut known = vec![];
        let mut batch = Batch::new();
        for (key, found) in list(store, keys::all(Kind::Incarnation)).await? {
            let incarnation: Incarnation = decode(&key, &found)?;
            match incarnation.generation == generation.get() {
                true => known.push((key, found.version, incarnation)),
                false => batch = batch.delete(key, Expect::At(found.version)),
            }
        }
        let excess = (known.len() + 1).saturating_sub(MOST_KEPT);
        for (key, version, _) in known.drain(..excess) {
            batch = batch.delete(key, Expect::At(version));
        }
        let mut ends = BTreeMap::new();
        for (key, version, mut incarnation) in known.iter().cloned() {
            if incarnation.ends.is_none() {
                incarnation.ends = Some(now);
                batch = batch.put(key, Expect::At(version), encode(&incarnation));
            }
            ends.insert(incarnation.name, incarnation.ends.unwrap_or(now));
        }
        let own = hex::encode(seal::random::<{ NAME / 2 }>());
        let record = Incarnation {
            generation: generation.get(),
            name: own.clone(),
            begins: now,
            ends: None,
        };
        let batch = batch.put(keys::incarnation(now), Expect::Anything, encode(&record));
        store.commit(batch).await.map_err(Error::from)?;
        let oldest = known.first().map_or(now, |(_, _, oldest)| oldest.begins);
        Ok(Self { generation, own, oldest, ends, last: Mutex::default() })
    }

    /// Says how far history has come. Without disk, and as long as it stands still without work.
    pub(super) fn say(&self, master: &MasterKey, history: u64) -> Mark {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        match &*last {
            Some(mark) if mark.history == history => mark.clone(),
            Some(_) | None => {
                let mark = Mark::new(master, self.generation, &self.own, history);
                last.insert(mark).clone()
            }
        }
    }

    pub(super) fn judge(&self, master: &MasterKey, mark: &Mark) -> Verdict {
        if !mark.is_ours(master) {
            return Verdict::MadeUp;
        }
        let (told, own) = (mark.generation.get(), self.generation.get());
        if told > own {
            return Verdict::Proof(format!(
                "it has seen generation {told}, this is {own}; restore with --above {told}"
            ));
        }
        // What came before a restore, or before all that is remembered, says nothing of now.
        if told < own || mark.incarnation == self.own || mark.history < self.oldest {
            return Verdict::Fits;
        }
        match self.ends.get(&mark.incarnation) {
            Some(end) if mark.history <= *end => Verdict::Fits,
            Some(end) => Verdict::Proof(format!(
                "it has seen commit {} of a start that ended at {end} here",
                mark.history
            )),
            None => Verdict::Proof(format!(
                "it has seen commit {} of a start that these data never had",
                mark.history
            )),
        }
    }
}

impl Mark {
    fn new(master: &MasterKey, generation: Generation, incarnation: &str, history: u64) -> Self {
        let mut mark =
            Self { generation, incarnation: incarnation.to_owned(), history, mac: vec![] };
        mark.mac = mark.digest(master).to_vec();
        mark
    }

    fn digest(&self, master: &MasterKey) -> [u8; 32] {
        let numbers = [self.generation.get(), self.history].map(u64::to_be_bytes);
        let said = [numbers.as_flattened(), self.incarnation.as_bytes()].concat();
        master.digest(b"how far history has come", &said)
    }

    fn is_ours(&self, master: &MasterKey) -> bool {
        // Long ones are nobody's, and not worth digesting.
        self.incarnation.len() == NAME && self.mac.ct_eq(&self.digest(master)).into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::memory::Memory;

    const GENERATION: Generation = Generation::new(5);

    #[tokio::test]
    async fn only_so_many_incarnations_are_kept_and_older_ones_prove_nothing() {
        let (store, master) = (Memory::new(), MasterKey::ephemeral());
        let first = Branch::begin(&store, GENERATION).await.unwrap();
        let mark = first.say(&master, store.history().get());
        let mut branch = first;
        for _ in 0..MOST_KEPT + 1 {
            branch = Branch::begin(&store, GENERATION).await.unwrap();
        }
        let kept = list(&store, keys::all(Kind::Incarnation)).await.unwrap();
        assert_eq!(kept.len(), MOST_KEPT);
        assert_eq!(branch.judge(&master, &mark), Verdict::Fits);
        // A restore begins anew.
        Branch::begin(&store, Generation::new(6)).await.unwrap();
        assert_eq!(list(&store, keys::all(Kind::Incarnation)).await.unwrap().len(), 1);
    }

    #[tokio::test]
    async fn a_mark_is_worked_out_once_while_history_stands_still() {
        let (store, master) = (Memory::new(), MasterKey::ephemeral());
        let branch = Branch::begin(&store, GENERATION).await.unwrap();
        let first = branch.say(&master, 7);
        // Under another key it would be another one, were it worked out again.
        assert_eq!(branch.say(&MasterKey::ephemeral(), 7), first);
        assert_ne!(branch.say(&master, 8).mac, first.mac);
    }

    #[tokio::test]
    async fn no_part_of_a_mark_can_be_changed() {
        let (store, master) = (Memory::new(), MasterKey::ephemeral());
        let branch = Branch::begin(&store, GENERATION).await.unwrap();
        let mark = branch.say(&master, 7);
        assert_eq!(branch.judge(&master, &mark), Verdict::Fits);
        let other = "0".repeat(32);
        for changed in [
            Mark { generation: Generation::new(u64::MAX), ..mark.clone() },
            Mark { history: 8, ..mark.clone() },
            Mark { incarnation: other, ..mark.clone() },
            Mark { incarnation: "0".repeat(1 << 20), ..mark.clone() },
            Mark { mac: vec![], ..mark.clone() },
            Mark { mac: vec![0; 32], ..mark },
        ] {
            assert_eq!(branch.judge(&master, &changed), Verdict::MadeUp);
        }
    }
}
