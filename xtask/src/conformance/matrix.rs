//! The matrix: clients by situations, and what is to be said about it.
//!
//! Owns the looks of what was found; never decides whether a cell is right.

use super::{
    Report,
    cell::{Cell, Verdict},
    column::{Best, Column},
};
use crate::report;

/// What is said of cells, each thing once; a cell refers to it by its number.
#[derive(Default)]
struct Notes {
    notes: Vec<String>,
}

/// Prints the matrix, its footnotes and the counts.
pub(super) fn print(found: &Report) {
    let mut notes = Notes::default();
    let (served, not): (Vec<_>, Vec<_>) =
        Column::ALL.into_iter().partition(|column| column.best() == Best::OwnRole);
    for columns in [served, not] {
        println!("{}", table(found, &columns, &mut notes));
    }
    for (index, note) in notes.notes.iter().enumerate() {
        println!("({}) {note}", index + 1);
    }
    let count =
        |verdicts: &[Verdict]| found.cells.iter().filter(|cell| verdicts.contains(&cell.verdict)).count();
    let right = count(&[Verdict::OwnRole, Verdict::Refused, Verdict::FallsThrough]);
    let (cannot, wrong, not_run) =
        (count(&[Verdict::Cannot]), count(&[Verdict::Wrong]), count(&[Verdict::NotRun]));
    let line = format!("{right} cells right, {cannot} cannot, {wrong} wrong, {not_run} not run");
    println!("{}", if found.is_good() { report::success(line) } else { report::failure(line) });
    if found.leaks > 0 {
        println!(
            "{}",
            report::failure(format!("pods in intercept read the node's role {} times", found.leaks))
        );
    }
}

fn table(found: &Report, columns: &[Column], notes: &mut Notes) -> comfy_table::Table {
    let mut titles = vec!["client"];
    titles.extend(columns.iter().map(|column| column.title()));
    let mut table = report::table(&titles);
    for name in &found.clients {
        let mut row = vec![comfy_table::Cell::new(name)];
        row.extend(columns.iter().map(|column| {
            let cell = found.cells.iter().find(|cell| cell.client == *name && cell.column == *column);
            cell.map_or_else(|| comfy_table::Cell::new(""), |cell| notes.cell(cell))
        }));
        table.add_row(row);
    }
    table
}

// === impl Notes ===

impl Notes {
    fn cell(&mut self, cell: &Cell) -> comfy_table::Cell {
        let text = cell.text();
        let text = match cell.note() {
            Some(note) => format!("{text} ({})", self.number(note)),
            None => text,
        };
        match cell.verdict {
            Verdict::Cannot => comfy_table::Cell::new(text),
            verdict => report::verdict(!verdict.is_failure(), text),
        }
    }

    fn number(&mut self, note: String) -> usize {
        let known = self.notes.iter().position(|other| *other == note);
        1 + known.unwrap_or_else(|| {
            self.notes.push(note);
            self.notes.len() - 1
        })
    }
}
