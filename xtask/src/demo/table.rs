//! The demo's rows as people read them: a table where it fits, else two lines for each.
//!
//! Owns the layout. The verdict comes first; words, and with them addresses, are never broken.

use comfy_table::{Cell, Table};

use super::case::Row;
use crate::report;

/// Where the second line of a row begins: after mark and number.
const INDENT: usize = 6;

/// Prints the rows and one line of verdict.
pub(super) fn print(rows: &[Row]) {
    let table = table(rows);
    if fits(&table, report::width()) {
        println!("{table}");
    } else {
        let width = report::width().unwrap_or(80);
        for row in rows {
            println!("{}", lines(row, width));
        }
    }
    let unexpected = rows.iter().filter(|row| !row.is_expected()).count();
    if unexpected == 0 {
        println!("{}", report::success(format!("all {} rows are as expected", rows.len())));
    } else {
        println!("{}", report::failure(format!("{unexpected} of {} rows are not as expected", rows.len())));
    }
}

/// Whether the table fits a terminal; what is no terminal takes any width.
fn fits(table: &Table, width: Option<usize>) -> bool {
    let needed = table.lines().map(|line| report::visible_width(&line)).max().unwrap_or_default();
    width.is_none_or(|width| needed <= width)
}

/// One line a row.
fn table(rows: &[Row]) -> Table {
    let mut table = report::unwrapped_table(&[
        "",
        "verdict",
        "pod",
        "client",
        "dialect",
        "original destination",
        "role",
        "access key id",
        "ms",
    ]);
    for row in rows {
        table.add_row([
            Cell::new(row.number),
            report::verdict(row.is_expected(), &row.verdict),
            Cell::new(caller(row)),
            Cell::new(&row.client),
            Cell::new(row.dialect),
            Cell::new(row.original_destination),
            Cell::new(row.role.as_deref().unwrap_or("-")),
            Cell::new(row.access_key_id.as_deref().unwrap_or("-")),
            Cell::new(format!("{:.0}", row.milliseconds)),
        ]);
    }
    table
}

/// The verdict and what the client got; below it, who asked how. More lines only where a text is longer than a line.
fn lines(row: &Row, width: usize) -> String {
    let mark = if row.is_expected() { report::success("✓") } else { report::failure("✗") };
    let mut first = vec![row.verdict.clone()];
    first.extend(row.role.clone());
    first.extend(row.access_key_id.clone());
    let second = format!(
        "{}, {}, {} to {}, {:.0} ms",
        caller(row),
        row.client,
        row.dialect,
        row.original_destination,
        row.milliseconds
    );
    let text = report::wrap(&first.join(", "), width.saturating_sub(INDENT));
    let text = text.into_iter().chain(report::wrap(&second, width.saturating_sub(INDENT)));
    let mut lines = Vec::new();
    for (index, line) in text.enumerate() {
        lines.push(if index == 0 {
            format!("{mark} {:<3} {line}", row.number)
        } else {
            format!("{:INDENT$}{line}", "")
        });
    }
    lines.join("\n")
}

/// The pod, and its service account where that has another name.
fn caller(row: &Row) -> String {
    if row.service_account == row.pod || row.service_account == "-" {
        row.pod.clone()
    } else {
        format!("{} as {}", row.pod, row.service_account)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows() -> Vec<Row> {
        let row = |number, pod: &str, dialect, destination, verdict: &str| Row {
            number,
            pod: pod.to_owned(),
            service_account: pod.to_owned(),
            client: "boto3 1.28.85".to_owned(),
            original_destination: destination,
            dialect,
            role: Some("catalog-role".to_owned()),
            access_key_id: Some("ASIAPODGATE000000012".to_owned()),
            milliseconds: 1234.5,
            expected: true,
            verdict: verdict.to_owned(),
        };
        vec![
            row("5", "shop/catalog", "Pod Identity, token", "::ffff:169.254.169.254", "its own role"),
            row(
                "7a",
                "shop/unassociated",
                "Pod Identity",
                "169.254.170.23",
                "refused (403), naming shop and unassociated",
            ),
        ]
    }

    #[test]
    fn a_narrow_terminal_gets_two_lines_a_row_and_no_broken_word() {
        for width in [80, 120] {
            for row in rows() {
                let text = lines(&row, width);
                // Two where the verdict is short, three at most.
                assert!(text.lines().count() <= 3, "{width}:\n{text}");
                for line in text.lines() {
                    assert!(report::visible_width(line) <= width, "{width}: {line}");
                }
                for word in [row.original_destination, "ASIAPODGATE000000012", &row.pod] {
                    assert!(text.contains(word), "{width}: {word}:\n{text}");
                }
                assert!(text.lines().next().unwrap().contains(&row.verdict[..12]), "{text}");
            }
        }
        assert_eq!(lines(&rows()[0], 120).lines().count(), 2);
    }

    #[test]
    fn a_table_is_shown_where_it_fits() {
        let table = table(&rows());
        for (width, expected) in [(Some(80), false), (Some(120), false), (Some(200), true), (None, true)] {
            assert_eq!(fits(&table, width), expected, "{width:?}:\n{table}");
        }
        for line in table.to_string().lines() {
            assert!(!line.ends_with(' '), "{line}");
        }
    }
}
