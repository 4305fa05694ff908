//! What the rows showed in an earlier run, for the page.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Context;
use serde::Deserialize;

use crate::row::written;

/// Rows of an earlier `--json`, by name.
#[derive(Debug, Default)]
pub(crate) struct Before(BTreeMap<String, Told>);

#[derive(Debug, Deserialize)]
struct Told {
    row: Row,
    ratio: Option<f64>,
}

#[derive(Debug, Deserialize)]
struct Row {
    name: String,
    figure: Figure,
}

#[derive(Debug, Deserialize)]
struct Figure {
    value: f64,
    unit: String,
}

impl Before {
    pub(crate) fn read(path: &Path) -> anyhow::Result<Self> {
        let text = std::fs::read(path).with_context(|| format!("read {}", path.display()))?;
        let rows: Vec<Told> = serde_json::from_slice(&text).context("understand earlier rows")?;
        Ok(Self(rows.into_iter().map(|told| (told.row.name.clone(), told)).collect()))
    }

    /// Returns the earlier figure of a row, with its ratio; empty where there is none.
    pub(crate) fn of(&self, name: &str) -> String {
        let Some(Told { row, ratio }) = self.0.get(name) else { return String::new() };
        let figure = written(row.figure.value, &row.figure.unit);
        match ratio {
            Some(ratio) => format!("{figure} ({ratio:.2})"),
            None => figure,
        }
    }
}
