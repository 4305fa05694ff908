//! Wall-clock time: the only file that asks for it. Waits use tokio's monotonic clock.

use jiff::Timestamp;

/// Answers the present moment.
#[expect(clippy::disallowed_methods, reason = "this file is where time comes from")]
pub(crate) fn now() -> Timestamp {
    let off = jiff::SignedDuration::from_millis(latchkey_failpoint::clock_offset());
    Timestamp::now().saturating_add(off).unwrap_or(Timestamp::MAX)
}
