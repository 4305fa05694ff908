//! Who holds an environment, and what keeps it from starting anything.

use crate::id::RunId;
use crate::time::Timestamp;

/// The part of an environment that runs change as they move.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hold {
    /// The run between its turn and its end.
    pub holder: Option<RunId>,
    /// Set by a run whose remains a person must deal with; the first of several.
    pub frozen: Option<Frozen>,
    /// Set while a workstation works on the state: no run may hold the environment meanwhile.
    pub state_lock: Option<StateLock>,
    /// Set by a person, who gives the reason: no run that would change anything has its turn.
    pub locked: Option<Locked>,
}

/// A lock that a person has put on an environment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Locked {
    pub by: String,
    pub reason: String,
    pub at: Timestamp,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frozen {
    pub run: RunId,
    pub reason: String,
}

/// The lock that a workstation's terraform took on the state, as it told it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StateLock {
    pub id: String,
    /// The name of the person whose token it was.
    pub user: String,
    pub operation: String,
    /// User and host.
    pub workstation: String,
    pub info: String,
    pub engine_version: String,
    pub at: Timestamp,
}

/// What a run's step does to its environment; committed in the same batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    Keep,
    /// The run takes the environment, or takes it back from being frozen by itself.
    Hold,
    Free,
    /// The run ends after all, and takes back that it froze the environment.
    Thaw,
    /// The run ends or is lost with remains.
    Freeze {
        reason: String,
    },
}

impl Hold {
    /// Tells whether `run` may have its turn.
    pub fn admits(&self, run: RunId) -> bool {
        let mine = self.holder.is_some_and(|holder| holder == run);
        let free = self.holder.is_none() && self.state_lock.is_none();
        self.frozen.is_none() && self.locked.is_none() && (mine || free)
    }

    /// Applies what a step of `run` does. Another run's hold is never touched.
    pub fn after(&self, run: RunId, change: &Change) -> Hold {
        let mut next = self.clone();
        match change {
            Change::Keep => {}
            Change::Hold => {
                next.holder = Some(run);
                next.frozen.take_if(|frozen| frozen.run == run);
            }
            Change::Free => {
                next.holder.take_if(|holder| *holder == run);
            }
            Change::Thaw => {
                next.holder.take_if(|holder| *holder == run);
                next.frozen.take_if(|frozen| frozen.run == run);
            }
            Change::Freeze { reason } => {
                next.holder.take_if(|holder| *holder == run);
                match &mut next.frozen {
                    // What that run left must be dealt with first, or it would be forgotten.
                    Some(frozen) if frozen.run != run => frozen.add(run, reason),
                    Some(_) | None => next.frozen = Some(Frozen { run, reason: reason.clone() }),
                }
            }
        }
        next
    }
}

impl Frozen {
    /// The longest that a reason grows: a person reads it, and each restore may add to it.
    const LONGEST: usize = 2000;

    fn add(&mut self, run: RunId, reason: &str) {
        let added = format!("; and run {run}: {reason}");
        if !self.reason.contains(&added) && self.reason.len() + added.len() <= Self::LONGEST {
            self.reason.push_str(&added);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_workstation_keeps_runs_from_their_turn_but_takes_none_away() {
        let (run, other) = (RunId::from_bytes([1; 16]), RunId::from_bytes([2; 16]));
        let lock = StateLock {
            id: "id".into(),
            user: "ada".into(),
            operation: "OperationTypeApply".into(),
            workstation: "ada@desk".into(),
            info: String::new(),
            engine_version: "1.11.4".into(),
            at: Timestamp::from_millis(1),
        };
        let locked = Hold { state_lock: Some(lock), ..Hold::default() };
        assert!(Hold::default().admits(run) && !locked.admits(run));
        let held = locked.after(run, &Change::Hold);
        assert!(held.admits(run) && !held.admits(other));
        assert_eq!(held.after(run, &Change::Free), locked);
    }

    #[test]
    fn a_lock_admits_nobody_and_no_run_takes_it_away() {
        let run = RunId::from_bytes([1; 16]);
        let at = Timestamp::from_millis(0);
        let locked = Some(Locked { by: "ada".into(), reason: "an audit".into(), at });
        let hold = Hold { locked: locked.clone(), ..Hold::default() };
        assert!(!hold.admits(run));
        for change in [
            Change::Keep,
            Change::Hold,
            Change::Free,
            Change::Thaw,
            Change::Freeze { reason: "lost".into() },
        ] {
            assert_eq!(hold.after(run, &change).locked, locked);
        }
    }

    #[test]
    fn a_freeze_never_hides_what_another_run_left() {
        let (first, second) = (RunId::from_bytes([1; 16]), RunId::from_bytes([2; 16]));
        let freeze = |reason: &str| Change::Freeze { reason: reason.into() };
        let hold = Hold::default().after(first, &freeze("a state was not delivered"));
        let hold = hold.after(second, &freeze("it was restored"));
        let frozen = hold.frozen.clone().unwrap();
        assert_eq!(frozen.run, first);
        assert!(frozen.reason.starts_with("a state was not delivered"), "{}", frozen.reason);
        assert!(frozen.reason.contains(&format!("run {second}: it was restored")));
        // A repeat says nothing new, and no number of runs makes it too long to be kept.
        assert_eq!(hold.after(second, &freeze("it was restored")), hold);
        let many = (3..200).fold(hold, |hold, number| {
            hold.after(RunId::from_bytes([number; 16]), &freeze("it was restored"))
        });
        assert!(many.frozen.clone().unwrap().reason.len() <= Frozen::LONGEST);
        // Its own freeze, a run replaces; that of another it cannot take back.
        assert_eq!(many.after(second, &Change::Thaw), many);
        let own = many.after(first, &freeze("recovered")).frozen.unwrap();
        assert_eq!((own.run, own.reason.as_str()), (first, "recovered"));
    }
}
