//! What a row of the table says.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

use serde::Serialize;

/// A way to measure: its name, what it is about, and how.
#[derive(Clone, Copy)]
pub(crate) struct Measurement {
    pub(crate) name: &'static str,
    pub(crate) what: &'static str,
    pub(crate) measure: for<'a> fn(&'a Context) -> Measuring<'a>,
}

pub(crate) type Measuring<'a> = Pin<Box<dyn Future<Output = anyhow::Result<Vec<Row>>> + 'a>>;

/// How much to measure.
#[derive(Debug)]
pub(crate) struct Context {
    pub(crate) quick: bool,
}

impl Context {
    pub(crate) fn new(quick: bool) -> anyhow::Result<Self> {
        Ok(Self { quick })
    }

    /// Chooses a size or a number of repeats.
    pub(crate) fn pick(&self, quick: usize, whole: usize) -> usize {
        if self.quick { quick } else { whole }
    }
}

/// One figure with its unit.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Figure {
    pub(crate) value: f64,
    pub(crate) unit: &'static str,
}

impl Figure {
    pub(crate) fn millis(duration: Duration) -> Self {
        Self { value: duration.as_secs_f64() * 1e3, unit: "ms" }
    }

    pub(crate) fn per_second(count: usize, taken: Duration) -> Self {
        Self { value: count as f64 / taken.as_secs_f64(), unit: "/s" }
    }

    pub(crate) fn megabytes_per_second(bytes: u64, taken: Duration) -> Self {
        Self { value: bytes as f64 / 1e6 / taken.as_secs_f64(), unit: "MB/s" }
    }

    pub(crate) fn kibibytes(bytes: f64) -> Self {
        Self { value: bytes / 1024.0, unit: "KiB" }
    }

    pub(crate) fn mebibytes(bytes: f64) -> Self {
        Self { value: bytes / 1024.0 / 1024.0, unit: "MiB" }
    }
}

impl fmt::Display for Figure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&written(self.value, self.unit))
    }
}

/// Writes a value with as many digits as it is good for.
pub(crate) fn written(value: f64, unit: &str) -> String {
    let digits = match value.abs() {
        value if value >= 100.0 => 0,
        value if value >= 10.0 => 1,
        _ => 2,
    };
    format!("{value:.digits$} {unit}")
}

/// What a figure is held against.
#[derive(Clone, Debug, Serialize)]
pub(crate) enum Budget {
    /// The figure, in its own unit.
    FigureAtMost(f64),
    /// The figure over its limit.
    RatioAtMost(f64),
    RatioAtLeast(f64),
    /// The figure less its limit, in their unit.
    BeyondLimitAtMost(f64),
    /// For the record.
    None,
}

/// The physics beside a figure, measured in the same run.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Limit {
    pub(crate) what: &'static str,
    pub(crate) figure: Figure,
}

#[derive(Clone, Debug, Serialize)]
pub(crate) struct Row {
    pub(crate) name: String,
    pub(crate) figure: Figure,
    pub(crate) limit: Option<Limit>,
    pub(crate) budget: Budget,
    /// How it was measured, what was raised, how it grows.
    pub(crate) note: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Kept,
    Missed,
}

impl Row {
    pub(crate) fn ratio(&self) -> Option<f64> {
        self.limit.as_ref().map(|limit| self.figure.value / limit.figure.value)
    }

    pub(crate) fn verdict(&self) -> Verdict {
        let ratio = self.ratio();
        let beyond = self.limit.as_ref().map(|limit| self.figure.value - limit.figure.value);
        let kept = match self.budget {
            Budget::FigureAtMost(most) => self.figure.value <= most,
            Budget::RatioAtMost(most) => ratio.is_some_and(|ratio| ratio <= most),
            Budget::RatioAtLeast(least) => ratio.is_some_and(|ratio| ratio >= least),
            Budget::BeyondLimitAtMost(most) => beyond.is_some_and(|beyond| beyond <= most),
            Budget::None => true,
        };
        if kept { Verdict::Kept } else { Verdict::Missed }
    }
}

/// The value below which `share` of the samples lie.
pub(crate) fn percentile(samples: &mut [Duration], share: f64) -> Duration {
    samples.sort_unstable();
    let last = samples.len().saturating_sub(1);
    let at = (last as f64 * share).round() as usize;
    samples.get(at).copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(value: f64, limit: f64, budget: Budget) -> Row {
        let figure = |value| Figure { value, unit: "ms" };
        Row {
            name: "x".into(),
            figure: figure(value),
            limit: Some(Limit { what: "physics", figure: figure(limit) }),
            budget,
            note: String::new(),
        }
    }

    #[test]
    fn each_budget_is_held_against_what_it_is_about() {
        assert_eq!(row(3.0, 2.0, Budget::RatioAtMost(1.5)).verdict(), Verdict::Kept);
        assert_eq!(row(3.1, 2.0, Budget::RatioAtMost(1.5)).verdict(), Verdict::Missed);
        assert_eq!(row(1.0, 2.0, Budget::RatioAtLeast(0.5)).verdict(), Verdict::Kept);
        assert_eq!(row(0.9, 2.0, Budget::RatioAtLeast(0.5)).verdict(), Verdict::Missed);
        assert_eq!(row(12.0, 2.0, Budget::BeyondLimitAtMost(10.0)).verdict(), Verdict::Kept);
        assert_eq!(row(5.0, 2.0, Budget::FigureAtMost(4.0)).verdict(), Verdict::Missed);
    }

    #[test]
    fn percentiles_are_of_the_sorted_samples() {
        let mut samples: Vec<_> = (1..=100).rev().map(Duration::from_millis).collect();
        assert_eq!(percentile(&mut samples, 0.5), Duration::from_millis(51));
        assert_eq!(percentile(&mut samples, 0.99), Duration::from_millis(99));
    }
}
