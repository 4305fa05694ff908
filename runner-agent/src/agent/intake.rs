//! Whether this runner takes a job that it is offered. The control plane is told what it would
//! take; what comes all the same, an offer that was on its way for instance, is handed back.

use crate::job::Phase;

#[derive(Debug)]
pub(super) struct Intake {
    /// The only phase it takes; `None` for both.
    phase: Option<Phase>,
    /// By a person at the control plane, until `Resume` or the next `Welcome`.
    drained: bool,
    /// For good: by a signal, the idle time-out, or since `--once` has had its job.
    leaving: bool,
    /// For good: the host lacks what the operator requires to keep jobs apart.
    unfit: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Answer {
    Takes,
    /// It takes nothing now.
    Closed,
    /// It takes nothing of this phase.
    OtherPhase,
}

impl Intake {
    pub(super) fn new(phase: Option<Phase>) -> Self {
        Self { phase, drained: false, leaving: false, unfit: false }
    }

    pub(super) fn judge(&self, phase: Phase) -> Answer {
        if self.drained || self.leaving || self.unfit {
            return Answer::Closed;
        }
        match self.phase {
            Some(only) if only != phase => Answer::OtherPhase,
            Some(_) | None => Answer::Takes,
        }
    }

    pub(super) fn is_leaving(&self) -> bool {
        self.leaving
    }

    pub(super) fn is_unfit(&self) -> bool {
        self.unfit
    }

    /// What the runner holds goes on to its end all the same.
    pub(super) fn refuse_all(&mut self) {
        self.unfit = true;
    }

    pub(super) fn is_drained(&self) -> bool {
        self.drained
    }

    /// Answers whether that is news.
    pub(super) fn leave(&mut self) -> bool {
        !std::mem::replace(&mut self.leaving, true)
    }

    pub(super) fn drain(&mut self) {
        self.drained = true;
    }

    /// By `Resume`, and by each `Welcome`: a drain that still holds is said again behind it.
    pub(super) fn resume(&mut self) {
        self.drained = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_drain_is_taken_back_and_leaving_is_not() {
        let mut intake = Intake::new(None);
        assert_eq!(intake.judge(Phase::Plan), Answer::Takes);
        intake.drain();
        assert_eq!(intake.judge(Phase::Plan), Answer::Closed);
        intake.resume();
        assert_eq!(intake.judge(Phase::Apply), Answer::Takes);
        assert!(intake.leave() && !intake.leave());
        intake.resume();
        assert_eq!(intake.judge(Phase::Apply), Answer::Closed);
    }

    #[test]
    fn a_host_that_lacks_what_is_required_takes_nothing() {
        let mut intake = Intake::new(None);
        intake.refuse_all();
        intake.resume();
        assert_eq!(intake.judge(Phase::Plan), Answer::Closed);
        assert!(intake.is_unfit() && !intake.is_leaving());
    }

    #[test]
    fn a_runner_for_one_phase_takes_no_other() {
        let intake = Intake::new(Some(Phase::Apply));
        assert_eq!(intake.judge(Phase::Plan), Answer::OtherPhase);
        assert_eq!(intake.judge(Phase::Apply), Answer::Takes);
    }
}
