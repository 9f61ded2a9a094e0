//! The parts of a Markdown page that can be wrong: code, links, headings and tables.
//!
//! Owns the little of Markdown that the pages use; never reads a file.

/// A paragraph, a heading, a row of a table, or code.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Block {
    /// The line that it starts at, from 1.
    pub(crate) line: usize,
    pub(crate) kind: Kind,
    pub(crate) text: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Prose,
    Heading,
    Row,
    /// Commands: indented, or fenced as `sh`.
    Commands,
    /// Anything else between fences.
    Verbatim,
}

/// A table: its header, and its rows with their lines.
#[derive(Debug)]
pub(crate) struct Table {
    pub(crate) header: Vec<String>,
    pub(crate) rows: Vec<(usize, Vec<String>)>,
}

/// Splits a page. Code comes line by line, with lines that end in `\` joined.
pub(crate) fn blocks(page: &str) -> Vec<Block> {
    let mut blocks: Vec<Block> = Vec::new();
    let mut fence: Option<Kind> = None;
    let mut is_paragraph_open = false;
    for (line, text) in (1..).zip(page.lines()) {
        let trimmed = text.trim();
        if let Some(language) = trimmed.strip_prefix("```") {
            let opened = if language.trim() == "sh" { Kind::Commands } else { Kind::Verbatim };
            fence = if fence.is_some() { None } else { Some(opened) };
            is_paragraph_open = false;
            continue;
        }
        let kind = match fence {
            Some(kind) => kind,
            None if trimmed.is_empty() => {
                is_paragraph_open = false;
                continue;
            }
            None if text.starts_with("    ") && !is_paragraph_open => Kind::Commands,
            None if trimmed.starts_with('#') => Kind::Heading,
            None if trimmed.starts_with('|') => Kind::Row,
            None => Kind::Prose,
        };
        match blocks.last_mut() {
            Some(last) if kind == Kind::Prose && is_paragraph_open => {
                last.text.push(' ');
                last.text.push_str(trimmed);
            }
            Some(last) if kind == Kind::Commands && last.kind == kind && last.text.ends_with('\\') => {
                last.text.pop();
                last.text.push_str(trimmed);
            }
            _ => blocks.push(Block { line, kind, text: trimmed.to_owned() }),
        }
        is_paragraph_open = kind == Kind::Prose;
    }
    blocks
}

/// What stands between backticks.
pub(crate) fn spans(text: &str) -> Vec<&str> {
    text.split('`').skip(1).step_by(2).collect()
}

/// The text with nothing between its backticks.
fn without_spans(text: &str) -> String {
    text.split('`').step_by(2).collect::<Vec<_>>().join("``")
}

/// Where a block's links lead to.
pub(crate) fn links(block: &Block) -> Vec<String> {
    if matches!(block.kind, Kind::Commands | Kind::Verbatim) {
        return Vec::new();
    }
    let text = without_spans(&block.text);
    let inline =
        text.split("](").skip(1).filter_map(|rest| rest.split_once(')')).map(|(target, _)| target.to_owned());
    let definition = text
        .strip_prefix('[')
        .and_then(|rest| rest.split_once("]: "))
        .map(|(_, target)| target.trim().to_owned());
    inline.chain(definition).collect()
}

/// The anchors that a page's headings make, as GitHub names them.
pub(crate) fn anchors(page: &str) -> Vec<String> {
    let headings = blocks(page).into_iter().filter(|block| block.kind == Kind::Heading);
    headings.map(|block| anchor(block.text.trim_start_matches('#').trim())).collect()
}

fn anchor(heading: &str) -> String {
    let kept = heading.chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
    kept.flat_map(char::to_lowercase).map(|c| if c == ' ' { '-' } else { c }).collect()
}

/// The cells of a row.
pub(crate) fn cells(row: &str) -> Vec<String> {
    let row = row.trim().trim_start_matches('|').trim_end_matches('|');
    let (mut cells, mut is_code) = (vec![String::new()], false);
    for c in row.chars() {
        is_code ^= c == '`';
        match cells.last_mut() {
            Some(cell) if c != '|' || is_code => cell.push(c),
            _ => cells.push(String::new()),
        }
    }
    cells.into_iter().map(|cell| cell.trim().to_owned()).collect()
}

/// A page's tables.
pub(crate) fn tables(page: &str) -> Vec<Table> {
    let mut tables: Vec<Table> = Vec::new();
    let mut previous = 0;
    for block in blocks(page).into_iter().filter(|block| block.kind == Kind::Row) {
        let cells = cells(&block.text);
        match tables.last_mut() {
            Some(table) if block.line == previous + 1 => {
                let is_rule = cells.iter().all(|cell| cell.chars().all(|c| matches!(c, '-' | ':')));
                if !is_rule || !table.rows.is_empty() {
                    table.rows.push((block.line, cells));
                }
            }
            _ => tables.push(Table { header: cells, rows: Vec::new() }),
        }
        previous = block.line;
    }
    tables
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: &str = "\
# The `A` flag, and more

Some text with `code` that goes
on here, [a link](b.md#c) and `[none](x.md)`.

```sh
podgate run \\
    --imds off
```

    cargo xtask demo

| a | b |
|---|---|
| `x|y` | z |

[Unreleased]: podgate.yaml
";

    #[test]
    fn a_page_is_split_into_what_it_is_made_of() {
        let blocks: Vec<_> = blocks(PAGE).into_iter().map(|block| (block.line, block.kind)).collect();
        let expected = [
            (1, Kind::Heading),
            (3, Kind::Prose),
            (7, Kind::Commands),
            (11, Kind::Commands),
            (13, Kind::Row),
            (14, Kind::Row),
            (15, Kind::Row),
            (17, Kind::Prose),
        ];
        assert_eq!(blocks, expected);
    }

    #[test]
    fn continued_commands_are_one_line() {
        assert_eq!(blocks(PAGE)[2].text, "podgate run --imds off");
    }

    #[test]
    fn links_are_found_outside_code_only() {
        let links: Vec<_> = blocks(PAGE).iter().flat_map(links).collect();
        assert_eq!(links, ["b.md#c", "podgate.yaml"]);
    }

    #[test]
    fn headings_have_the_anchors_that_github_gives_them() {
        assert_eq!(anchors(PAGE), ["the-a-flag-and-more"]);
    }

    #[test]
    fn a_bar_in_code_does_not_end_a_cell() {
        let tables = tables(PAGE);
        assert_eq!(tables[0].header, ["a", "b"]);
        assert_eq!(tables[0].rows, [(15, vec!["`x|y`".to_owned(), "z".to_owned()])]);
    }
}
