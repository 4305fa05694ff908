//! The named points between "decided", "durable" and "told".

/// Who comes by a point.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Who {
    Plane,
    Agent,
    Supervisor,
}

/// When a point is passed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum When {
    EitherPhase,
    Apply,
    /// While a code is spent.
    Code,
}

#[derive(Debug)]
pub(crate) struct Point {
    pub(crate) name: &'static str,
    pub(crate) who: Who,
    pub(crate) when: When,
    /// The n-th time it is passed, at most.
    pub(crate) most: u64,
}

const fn point(name: &'static str, who: Who, when: When, most: u64) -> Point {
    Point { name, who, when, most }
}

/// Each a call of `latchkey_failpoint` in the source.
pub(crate) const POINTS: &[Point] = &[
    point("cp.grant.committed", Who::Plane, When::EitherPhase, 1),
    point("cp.starting.received", Who::Plane, When::EitherPhase, 1),
    point("cp.go.committed", Who::Plane, When::EitherPhase, 1),
    point("cp.finished.received", Who::Plane, When::EitherPhase, 1),
    point("cp.finished.committed", Who::Plane, When::EitherPhase, 1),
    point("cp.log.closed", Who::Plane, When::EitherPhase, 1),
    point("cp.log.durable", Who::Plane, When::EitherPhase, 4),
    point("cp.artifact.stored", Who::Plane, When::EitherPhase, 2),
    point("cp.artifact.recorded", Who::Plane, When::EitherPhase, 2),
    point("cp.code.counting", Who::Plane, When::Code, 1),
    point("cp.code.counted", Who::Plane, When::Code, 1),
    point("cp.code.answered", Who::Plane, When::Code, 1),
    point("cp.store.applied", Who::Plane, When::EitherPhase, 6),
    point("cp.store.flushed", Who::Plane, When::EitherPhase, 6),
    point("cp.store.synced", Who::Plane, When::EitherPhase, 6),
    point("run.accepted", Who::Agent, When::EitherPhase, 1),
    point("run.prepared", Who::Agent, When::EitherPhase, 1),
    point("run.starting.synced", Who::Agent, When::EitherPhase, 1),
    point("run.told", Who::Agent, When::EitherPhase, 1),
    point("run.finished.sending", Who::Agent, When::EitherPhase, 1),
    point("run.finished.sent", Who::Agent, When::EitherPhase, 1),
    point("run.wiping", Who::Agent, When::EitherPhase, 1),
    point("sup.go.received", Who::Supervisor, When::EitherPhase, 1),
    point("sup.exec.synced", Who::Supervisor, When::EitherPhase, 1),
    point("sup.execed", Who::Supervisor, When::EitherPhase, 1),
    point("sup.state.synced", Who::Supervisor, When::Apply, 2),
    point("sup.result.writing", Who::Supervisor, When::EitherPhase, 1),
    point("cp.store.segment.named", Who::Plane, When::EitherPhase, 4),
    point("cp.store.segment.sealed", Who::Plane, When::EitherPhase, 4),
];
