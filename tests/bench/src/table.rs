//! The rows for people, programs and the page in the repository.

use comfy_table::{ContentArrangement, Table, presets};

use crate::before::Before;
use crate::observed::machine;
use crate::row::{Budget, Row, Verdict};

const HEADER: [&str; 6] = ["row", "figure", "limit measured beside it", "ratio", "budget", ""];

pub(crate) fn human(rows: &[Row]) -> String {
    let mut table = Table::new();
    table
        .load_style(presets::NOTHING)
        .set_content_arrangement(ContentArrangement::Disabled)
        .set_header(HEADER);
    for row in rows {
        table.add_row(cells(row));
    }
    table.to_string()
}

pub(crate) fn markdown(rows: &[Row], before: &Before) -> String {
    let mut page = String::from(
        "# What Latchkey costs\n\nWritten by `cargo budget --markdown`; do not edit. Each figure \
         stands beside the limit that the same machine showed in the same run: judge the ratios, \
         the absolute figures are the machine's. A budget that is missed says so. *Before* is \
         what the row showed before it was worked on, and its ratio.\n\n",
    );
    page.push_str(&format!("Machine, with clients and servers together: {}.\n\n", machine()));
    let [row, rest @ ..] = HEADER;
    page.push_str(&format!("| {row} | before | {} |\n", rest.join(" | ")));
    page.push_str(&format!("|{}\n", "---|".repeat(HEADER.len() + 1)));
    for row in rows {
        let [name, rest @ ..] = cells(row);
        page.push_str(&format!("| {name} | {} | {} |\n", before.of(&name), rest.join(" | ")));
    }
    page.push_str("\n## How each was measured, and how it grows\n\n");
    for alike in rows.chunk_by(|one, other| one.note == other.note) {
        let names: Vec<_> = alike.iter().map(|row| row.name.as_str()).collect();
        page.push_str(&format!("- **{}**: {}\n", names.join("; "), alike[0].note));
    }
    page
}

pub(crate) fn json(rows: &[Row]) -> serde_json::Result<String> {
    let rows: Vec<_> = rows
        .iter()
        .map(|row| {
            serde_json::json!({
                "row": row,
                "ratio": row.ratio(),
                "kept": row.verdict() == Verdict::Kept,
            })
        })
        .collect();
    serde_json::to_string_pretty(&rows)
}

fn cells(row: &Row) -> [String; 6] {
    let limit = row.limit.as_ref();
    [
        row.name.clone(),
        row.figure.to_string(),
        limit.map(|limit| format!("{} ({})", limit.figure, limit.what)).unwrap_or_default(),
        row.ratio().map(|ratio| format!("{ratio:.2}")).unwrap_or_default(),
        budget(row),
        match (&row.budget, row.verdict()) {
            (Budget::None, _) => String::new(),
            (_, Verdict::Kept) => "kept".into(),
            (_, Verdict::Missed) => "MISSED".into(),
        },
    ]
}

fn budget(row: &Row) -> String {
    let unit = row.figure.unit;
    match row.budget {
        Budget::FigureAtMost(most) => format!("at most {most} {unit}"),
        Budget::RatioAtMost(most) => format!("at most {most} times"),
        Budget::RatioAtLeast(least) => format!("at least {least} times"),
        Budget::BeyondLimitAtMost(most) => format!("at most {most} {unit} beyond"),
        Budget::None => String::new(),
    }
}
