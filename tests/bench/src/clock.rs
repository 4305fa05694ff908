//! The time that several processes of this host agree on.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// A moment, comparable between the processes of this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Moment(u64);

impl Moment {
    #[expect(clippy::disallowed_methods, reason = "the one place that reads the host's clock")]
    pub(crate) fn now() -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self(u64::try_from(since.as_nanos()).unwrap_or(u64::MAX))
    }

    /// Reads what [`Self::nanos`] wrote.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        text.trim().parse().ok().map(Self)
    }

    pub(crate) fn nanos(self) -> u64 {
        self.0
    }

    /// How long it is after another; nothing, when it is not.
    pub(crate) fn since(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}
