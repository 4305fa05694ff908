//! Who holds an environment, and what keeps it from starting anything.

use crate::id::RunId;

/// The part of an environment that runs change as they move.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hold {
    /// The run between its turn and its end.
    pub holder: Option<RunId>,
    /// Set by a run whose remains a person must deal with.
    pub frozen: Option<Frozen>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frozen {
    pub run: RunId,
    pub reason: String,
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
        self.frozen.is_none() && self.holder.is_none_or(|holder| holder == run)
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
                next.frozen = Some(Frozen { run, reason: reason.clone() });
            }
        }
        next
    }
}
