//! The time of day, for flags that say how long ago. The only place that asks for it.

use jiff::Timestamp;

pub(crate) fn now() -> Timestamp {
    #[expect(clippy::disallowed_methods, reason = "this is the place")]
    Timestamp::now()
}
