//! The rows for people, programs and the page in the repository.

use comfy_table::{ContentArrangement, Table, presets};

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

pub(crate) fn markdown(rows: &[Row]) -> String {
    let mut page = String::from(
        "# What Latchkey costs\n\nWritten by `cargo budget --markdown`; do not edit. Each figure \
         stands beside the limit that the same machine showed in the same run: judge the ratios, \
         the absolute figures are the machine's. A budget that is missed says so.\n\n",
    );
    page.push_str(&format!(
        "Machine: {} cores, Linux, client and servers together.\n\n",
        std::thread::available_parallelism().map_or(0, usize::from)
    ));
    page.push_str(&format!("| {} |\n|{}\n", HEADER.join(" | "), "---|".repeat(HEADER.len())));
    for row in rows {
        page.push_str(&format!("| {} |\n", cells(row).join(" | ")));
    }
    page.push_str("\n## How each was measured, and how it grows\n\n");
    for row in rows {
        page.push_str(&format!("- **{}**: {}\n", row.name, row.note));
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
