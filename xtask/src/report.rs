//! What people read: tables, colors, verdicts.
//!
//! Owns the looks. Colors follow `NO_COLOR` and whether the output is a terminal.

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

/// The same, but never narrower than its contents.
pub(crate) fn unwrapped_table(columns: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(UTF8_FULL_CONDENSED).set_header(columns);
    table
}

/// The width of the terminal, if standard output is one and has one.
pub(crate) fn width() -> Option<usize> {
    Table::new().width().filter(|width| *width > 0).map(usize::from)
}

/// How many columns a line takes, colors aside.
pub(crate) fn visible_width(line: &str) -> usize {
    let mut chars = line.chars();
    let mut width = 0;
    while let Some(c) = chars.next() {
        if c == '\u{1b}' {
            // A color: `ESC [ … m`.
            chars.by_ref().find(char::is_ascii_alphabetic);
        } else {
            width += 1;
        }
    }
    width
}

/// Breaks a text into lines between words; a word that is longer than a line has one of its own.
pub(crate) fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split_whitespace() {
        match lines.last_mut() {
            Some(line) if visible_width(line) + 1 + visible_width(word) <= width => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}

/// A table's cell with a verdict: green when good, red when not.
pub(crate) fn verdict(good: bool, text: impl Display) -> Cell {
    let cell = Cell::new(text);
    // The table itself knows about terminals, not about NO_COLOR.
    match (std::env::var_os("NO_COLOR"), good) {
        (Some(_), _) => cell,
        (None, true) => cell.fg(Color::Green),
        (None, false) => cell.fg(Color::Red),
    }
}

/// A success, in green.
pub(crate) fn success(text: impl Display) -> String {
    text.if_supports_color(Stream::Stdout, |text| text.green()).to_string()
}

/// A failure, in red.
pub(crate) fn failure(text: impl Display) -> String {
    text.if_supports_color(Stream::Stdout, |text| text.red()).to_string()
}

/// A heading, in bold.
pub(crate) fn heading(text: impl Display) -> String {
    text.if_supports_color(Stream::Stdout, |text| text.bold()).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_never_broken() {
        assert_eq!(wrap("to ::ffff:169.254.169.254, 3 ms", 10), ["to", "::ffff:169.254.169.254,", "3 ms"]);
        assert_eq!(wrap("", 10), Vec::<String>::new());
    }

    #[test]
    fn colors_take_no_room() {
        assert_eq!(visible_width("\u{1b}[32m✓\u{1b}[0m done"), 6);
    }
}
