//! JSON, laid out as bpftool's writer does.
//!
//! Owns commas, line breaks and quoting; never knows what is written.

use std::{fmt::Display, io};

/// Spaces for each level.
const INDENTATION: usize = 4;

/// Writes one document.
pub(super) struct Json<W> {
    out: W,
    pretty: bool,
    depth: usize,
    /// Whether something stands before what comes next in the same object or array.
    separate: bool,
}

// === impl Json ===

impl<W: io::Write> Json<W> {
    /// `pretty` gives each member of an object a line of its own.
    pub(super) fn new(out: W, pretty: bool) -> Self {
        Self { out, pretty, depth: 0, separate: false }
    }

    /// Begins an object or array.
    pub(super) fn begin(&mut self, bracket: char) -> io::Result<()> {
        self.separator()?;
        write!(self.out, "{bracket}")?;
        self.depth += 1;
        self.separate = false;
        Ok(())
    }

    /// Ends what was begun last.
    pub(super) fn end(&mut self, bracket: char) -> io::Result<()> {
        self.depth -= 1;
        if self.separate {
            self.line()?;
        }
        write!(self.out, "{bracket}")?;
        self.separate = true;
        Ok(())
    }

    /// The name of a member, whose value follows.
    pub(super) fn name(&mut self, name: &str) -> io::Result<()> {
        self.separator()?;
        self.line()?;
        self.separate = false;
        self.quote(name)?;
        write!(self.out, ":{}", if self.pretty { " " } else { "" })
    }

    /// A number, or anything else that is not quoted.
    pub(super) fn value(&mut self, value: impl Display) -> io::Result<()> {
        self.separator()?;
        write!(self.out, "{value}")
    }

    /// A string.
    pub(super) fn string(&mut self, text: &str) -> io::Result<()> {
        self.separator()?;
        self.quote(text)
    }

    /// A member with a number.
    pub(super) fn field(&mut self, name: &str, value: impl Display) -> io::Result<()> {
        self.name(name)?;
        self.value(value)
    }

    /// Ends the document.
    pub(super) fn finish(mut self) -> io::Result<()> {
        writeln!(self.out)
    }

    fn separator(&mut self) -> io::Result<()> {
        if self.separate {
            write!(self.out, ",")?;
        }
        self.separate = true;
        Ok(())
    }

    fn line(&mut self) -> io::Result<()> {
        if self.pretty { write!(self.out, "\n{:1$}", "", self.depth * INDENTATION) } else { Ok(()) }
    }

    fn quote(&mut self, text: &str) -> io::Result<()> {
        write!(self.out, "\"")?;
        for c in text.chars() {
            match c {
                '\t' => write!(self.out, "\\t")?,
                '\n' => write!(self.out, "\\n")?,
                '\r' => write!(self.out, "\\r")?,
                '\u{c}' => write!(self.out, "\\f")?,
                '\u{8}' => write!(self.out, "\\b")?,
                '\\' | '"' => write!(self.out, "\\{c}")?,
                _ => write!(self.out, "{c}")?,
            }
        }
        write!(self.out, "\"")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn document(pretty: bool) -> String {
        let mut out = Vec::new();
        let mut json = Json::new(&mut out, pretty);
        let mut write = || {
            json.begin('[')?;
            json.begin('{')?;
            json.field("a", 1)?;
            json.name("b")?;
            json.begin('[')?;
            json.value(2)?;
            json.string("3\n\"\\")?;
            json.end(']')?;
            json.name("c")?;
            json.begin('[')?;
            json.end(']')?;
            json.end('}')?;
            json.end(']')
        };
        write().unwrap();
        json.finish().unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn members_have_lines_of_their_own_where_it_is_pretty_and_elements_never() {
        assert_eq!(document(false), "[{\"a\":1,\"b\":[2,\"3\\n\\\"\\\\\"],\"c\":[]}]\n");
        let pretty = "[{\n        \"a\": 1,\n        \"b\": [2,\"3\\n\\\"\\\\\"\n        ],\n        \"c\": []\n    }\n]\n";
        assert_eq!(document(true), pretty);
    }
}
