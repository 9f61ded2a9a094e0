//! What people read: tables, colors, verdicts.
//!
//! Owns the looks. Colours follow `NO_COLOR` and whether the output is a terminal.

use std::fmt::Display;

use comfy_table::{Cell, Color, ContentArrangement, Table, presets::UTF8_FULL_CONDENSED};
use owo_colors::{OwoColorize as _, Stream};

/// A table with these columns, as wide as the terminal allows.
pub(crate) fn table(columns: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(UTF8_FULL_CONDENSED).set_header(columns);
    // A console on a serial line is a terminal without a width.
    if table.width().is_some_and(|width| width > 0) {
        table.set_content_arrangement(ContentArrangement::Dynamic);
    }
    table
}

/// A table's cell with a verdict: green when right, red when not.
pub(crate) fn verdict(right: bool, text: impl Display) -> Cell {
    let cell = Cell::new(text);
    // The table itself knows about terminals, not about NO_COLOR.
    match (std::env::var_os("NO_COLOR"), right) {
        (Some(_), _) => cell,
        (None, true) => cell.fg(Color::Green),
        (None, false) => cell.fg(Color::Red),
    }
}

/// Something that is as it should be.
pub(crate) fn success(text: impl Display) -> String {
    text.if_supports_color(Stream::Stdout, |text| text.green()).to_string()
}

/// Something that is not.
pub(crate) fn failure(text: impl Display) -> String {
    text.if_supports_color(Stream::Stdout, |text| text.red()).to_string()
}

/// The beginning of something.
pub(crate) fn heading(text: impl Display) -> String {
    text.if_supports_color(Stream::Stdout, |text| text.bold()).to_string()
}
