//! How much quarantine takes, and of whom.
//!
//! What was brought by those who were seen to hold a job, and what rests on a runner's word alone,
//! are counted apart: no amount of words takes room from a state that may be all there is.
//!
//! Where the bound of an organization alone is reached, [`super::room`] makes room first.
//!
//! A refusal of a state of who held the job is one that its runner tries again: it keeps what it
//! has until a person has made room.

use latchkey_domain::id::{OrganizationId, RunId, RunnerId};
use latchkey_proto::v1::Reason;

use super::room::is_kept;
use crate::app::App;
use crate::app::artifacts::Made;
use crate::auth::RunnerIdentity;
use crate::error::{Error, Result};
use crate::store::keys::QuarantineSlot;
use crate::store::record::quarantine::{Quarantined, Tally, Witness};
use crate::store::record::{Loaded, Text, encode};
use crate::store::{Batch, Expect, Key, keys};

/// What may be kept of bulky things; and beyond it, of states and of how jobs ended.
#[derive(Clone, Copy, Debug)]
struct Limit {
    entries: u64,
    bulky: u64,
    all: u64,
}

/// What is too much of an organization, or what there is of it that gives way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Excess {
    pub(super) entries: u64,
    pub(super) bytes: u64,
}

impl Limit {
    const fn bytes(self, kind: Made) -> u64 {
        if is_kept(kind) { self.all } else { self.bulky }
    }

    fn excess(self, kind: Made, tally: &Tally) -> Option<Excess> {
        let excess = Excess {
            entries: tally.entries.saturating_sub(self.entries),
            bytes: tally.bytes.saturating_sub(self.bytes(kind)),
        };
        (excess.entries > 0 || excess.bytes > 0).then_some(excess)
    }
}

const OF_RUN: Limit = Limit { entries: u64::MAX, bulky: 4 << 30, all: 32 << 30 };
const OF_RUNNER: Limit = Limit { entries: u64::MAX, bulky: 16 << 30, all: 32 << 30 };
const OF_ORGANIZATION: Limit = Limit { entries: 10_000, bulky: 64 << 30, all: 128 << 30 };

/// On words alone. A run's is counted for each runner.
const WORD_OF_RUN: Limit = Limit { entries: 16, bulky: 1 << 30, all: 1 << 30 };
const WORD_OF_RUNNER: Limit = Limit { entries: u64::MAX, bulky: 4 << 30, all: 4 << 30 };
const WORD_OF_ORGANIZATION: Limit = Limit { entries: 4096, bulky: 16 << 30, all: 16 << 30 };
const WORD_RUNS: usize = 64;

/// How often one thing of a lease may be replaced: each is told in the audit trail.
const MOST_REPLACED: u32 = 1024;

/// The tallies that one thing is counted in: of its run, its runner and its organization.
#[derive(Debug)]
pub(super) struct Tallies {
    witness: Witness,
    run: (Key, Expect, Tally),
    runner: (Key, Expect, Tally),
    organization: (Key, Expect, Tally),
}

impl App {
    pub(super) async fn tallies(&self, slot: QuarantineSlot, witness: Witness) -> Result<Tallies> {
        let QuarantineSlot { organization, run, runner, .. } = slot;
        let number = witness.number();
        Ok(Tallies {
            witness,
            run: self.tally(tally_of(witness, organization, run, runner)).await?,
            runner: self.tally(keys::quarantine_total(organization, number, Some(runner))).await?,
            organization: self.tally(keys::quarantine_total(organization, number, None)).await?,
        })
    }

    async fn tally(&self, key: Key) -> Result<(Key, Expect, Tally)> {
        let found: Option<Loaded<Tally>> = self.fetch(key.clone()).await?;
        Ok(match found {
            Some(found) => (key, Expect::At(found.version), found.value),
            None => (key, Expect::Absent, Tally::default()),
        })
    }

    /// Counts a replacement, and refuses the one too many.
    pub(super) fn check_replaced(
        &self,
        slot: QuarantineSlot,
        before: Option<&Quarantined>,
    ) -> Result<u32> {
        let replaced = before.map_or(0, |before| before.replaced.saturating_add(1));
        if replaced > MOST_REPLACED {
            let message = format!(
                "this lease of the run {} has replaced it {MOST_REPLACED} times; drop it first",
                slot.run
            );
            return Err(Error::refused(Reason::LimitReached, message));
        }
        Ok(replaced)
    }

    /// Fetches of which runs a runner has brought things on its word alone, if this one may be
    /// among them.
    pub(super) async fn quota(
        &self,
        runner: &RunnerIdentity,
        run: RunId,
    ) -> Result<(Vec<Text<RunId>>, Expect)> {
        let found: Option<Loaded<Vec<Text<RunId>>>> =
            self.fetch(keys::quarantine_quota(runner.id)).await?;
        let (runs, expect) = match found {
            Some(found) => (found.value, Expect::At(found.version)),
            None => (vec![], Expect::Absent),
        };
        if runs.len() >= WORD_RUNS && !runs.contains(&Text(run)) {
            return Err(refused(format!(
                "this runner has {WORD_RUNS} runs of before the restore in quarantine; drop some"
            )));
        }
        Ok((runs, expect))
    }
}

fn tally_of(witness: Witness, organization: OrganizationId, run: RunId, runner: RunnerId) -> Key {
    match witness {
        Witness::Record => keys::quarantine_tally(organization, run),
        Witness::Word => keys::quarantine_tally_on_word(organization, run, runner),
    }
}

impl Tallies {
    /// Counts a thing, in place of what was in its slot before.
    pub(super) fn with(mut self, before: Option<&Quarantined>, size: u64) -> Self {
        // What was there rested on something else: it is counted where it was.
        let before = before.filter(|before| before.witness == self.witness);
        for (_, _, tally) in [&mut self.run, &mut self.runner, &mut self.organization] {
            let without = tally.bytes.saturating_sub(before.map_or(0, |before| before.size));
            tally.bytes = without.saturating_add(size);
            tally.entries += u64::from(before.is_none());
        }
        self
    }

    /// Counts a thing no more.
    pub(super) fn without(mut self, gone: &Quarantined) -> Self {
        for (_, _, tally) in [&mut self.run, &mut self.runner, &mut self.organization] {
            tally.bytes = tally.bytes.saturating_sub(gone.size);
            tally.entries = tally.entries.saturating_sub(1);
        }
        self
    }

    pub(super) fn check(&self, kind: Made) -> Result<()> {
        let of = ["of this run", "that this runner brought", "of this organization"];
        for ((tally, limit), of) in self.limited().into_iter().zip(of) {
            if limit.excess(kind, tally).is_none() {
                continue;
            }
            let reason = match (is_kept(kind), self.witness) {
                (true, Witness::Record) => Reason::StoreUnavailable,
                (false, Witness::Record) | (_, Witness::Word) => Reason::LimitReached,
            };
            let message = format!(
                "too much {of} is in quarantine; an owner makes room with `latchkey quarantine drop`"
            );
            let bytes = limit.bytes(kind).to_string();
            return Err(Error::refused(reason, message).with("limit", bytes));
        }
        Ok(())
    }

    /// Says what is too much of the organization, where that alone is in the way and where
    /// anything gives way. To something bulky nothing does, unless all else fits: room that
    /// states took is not its to make.
    pub(super) fn excess(&self, kind: Made, size: u64) -> Option<Excess> {
        let [run, runner, (tally, limit)] = self.limited();
        let fits = |(tally, limit): (&Tally, Limit)| limit.excess(kind, tally).is_none();
        let excess = match self.witness {
            Witness::Record if fits(run) && fits(runner) => limit.excess(kind, tally)?,
            Witness::Record | Witness::Word => return None,
        };
        let is_its_own = excess.bytes <= size && excess.entries <= 1;
        (is_kept(kind) || is_its_own).then_some(excess)
    }

    fn limited(&self) -> [(&Tally, Limit); 3] {
        let [run, runner, organization] = match self.witness {
            Witness::Record => [OF_RUN, OF_RUNNER, OF_ORGANIZATION],
            Witness::Word => [WORD_OF_RUN, WORD_OF_RUNNER, WORD_OF_ORGANIZATION],
        };
        [(&self.run.2, run), (&self.runner.2, runner), (&self.organization.2, organization)]
    }

    pub(super) fn write(self, mut batch: Batch) -> Batch {
        for (key, expect, tally) in [self.run, self.runner, self.organization] {
            batch = match expect {
                Expect::Absent if tally.entries == 0 => batch.check(key, expect),
                Expect::At(_) | Expect::Anything if tally.entries == 0 => batch.delete(key, expect),
                Expect::Absent | Expect::At(_) | Expect::Anything => {
                    batch.put(key, expect, encode(&tally))
                }
            };
        }
        batch
    }

    pub(super) const fn nothing_of_run(&self) -> bool {
        self.run.2.entries == 0
    }
}

fn refused(message: String) -> Error {
    Error::refused(Reason::LimitReached, message)
}
