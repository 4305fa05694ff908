//! Wall-clock time: the only file that asks for it. Waits use tokio's monotonic clock.

use jiff::Timestamp;

/// Answers the present moment.
#[expect(clippy::disallowed_methods, reason = "this file is where time comes from")]
pub(crate) fn now() -> Timestamp {
    Timestamp::now()
}
