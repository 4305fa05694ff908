//! The rows, by name.

use crate::row::Measurement;

/// All rows, in the order of the table.
const ALL: &[Measurement] = &[];

/// Finds the rows of these names; all, when none is named.
pub(crate) fn chosen(only: &[String]) -> anyhow::Result<Vec<Measurement>> {
    if let Some(unknown) = only.iter().find(|name| !ALL.iter().any(|row| row.name == **name)) {
        anyhow::bail!("find the row {unknown}; `--list` names all");
    }
    let wanted = |row: &&Measurement| only.is_empty() || only.iter().any(|name| name == row.name);
    Ok(ALL.iter().filter(wanted).copied().collect())
}
