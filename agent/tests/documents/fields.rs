//! Names of fields in sources: of log lines, and of records that are printed.
//!
//! Owns how such a name is told from the code around it; never knows which names there are.

use std::collections::BTreeSet;

/// The macros that log a line.
const LOG_MACROS: [&str; 5] = ["trace!(", "debug!(", "info!(", "warn!(", "error!("];

/// The fields of all log lines.
pub(crate) fn of_log_lines(sources: &str) -> BTreeSet<String> {
    let mut fields = BTreeSet::new();
    for name in LOG_MACROS {
        for (at, _) in sources.match_indices(name) {
            let arguments = arguments(&sources[at + name.len()..]);
            fields.extend(arguments.into_iter().filter_map(field).map(str::to_owned));
        }
    }
    fields
}

/// The fields of every struct with an attribute that has this in it, such as a derive.
pub(crate) fn of_structs(sources: &str, attribute: &str) -> BTreeSet<String> {
    let mut fields = BTreeSet::new();
    let mut lines = sources.lines();
    while let Some(line) = lines.next() {
        if !line.starts_with("#[") || !line.contains(attribute) {
            continue;
        }
        let Some(head) = lines.find(|line| !line.starts_with("#[") && !line.starts_with("//")) else { break };
        if !head.contains("struct ") || !head.ends_with('{') {
            continue;
        }
        for line in lines.by_ref().take_while(|line| *line != "}") {
            let name = line.trim_start().trim_start_matches("pub(crate) ").trim_start_matches("pub ");
            fields.extend(
                name.split_once(": ").map(|(name, _)| name).filter(|name| is_name(name)).map(str::to_owned),
            );
        }
    }
    fields
}

/// What is between commas, up to the parenthesis that ends a call. Commas within strings and brackets end nothing.
fn arguments(call: &str) -> Vec<&str> {
    let (mut depth, mut in_string, mut is_escaped, mut start) = (0, false, false, 0);
    let mut arguments = Vec::new();
    for (at, c) in call.char_indices() {
        match c {
            _ if is_escaped => is_escaped = false,
            '\\' if in_string => is_escaped = true,
            '"' => in_string = !in_string,
            _ if in_string => {}
            '(' | '[' | '{' => depth += 1,
            ')' if depth == 0 => {
                arguments.push(call[start..at].trim());
                break;
            }
            ')' | ']' | '}' => depth -= 1,
            ',' if depth == 0 => {
                arguments.push(call[start..at].trim());
                start = at + 1;
            }
            _ => {}
        }
    }
    arguments
}

/// The field that an argument of a log macro is.
fn field(argument: &str) -> Option<&str> {
    let name = argument.split_once(" = ").map_or(argument, |(name, _)| name);
    let name = name.trim_start_matches(['%', '?']);
    is_name(name).then_some(name)
}

fn is_name(name: &str) -> bool {
    name.starts_with(|c: char| c.is_ascii_lowercase() || c == '_')
        && name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '_' | '.'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_of_log_lines_are_found_in_every_form() {
        let sources = "info!(pods, \"text, with (commas) and \\\"more\\\"\");\n\
                       warn!(target: \"audit\", %error, ?class, pod.uid = uid(a, b), \"x\"); debug!(\"nothing\", other)\n\
                       tracing::error!(\n    reason = \"a, b\",\n    \"x\"\n);";
        let expected = ["class", "error", "pod.uid", "pods", "reason"];
        let found = of_log_lines(sources);
        assert!(expected.iter().all(|name| found.contains(*name)), "{found:?}");
        assert!(
            ["text", "more", "audit", "target", "a", "b", "uid", "x"]
                .iter()
                .all(|name| !found.contains(*name))
        );
    }

    #[test]
    fn only_structs_with_the_attribute_count() {
        let sources = "#[derive(Debug, Serialize)]\n#[serde(x)]\nstruct A {\n    /// A name: it is.\n    pub one: u8,\n    two: Vec<u8>,\n}\n\
                       #[derive(Serialize)]\nenum B {\n    C { three: u8 },\n}\n\
                       #[derive(Debug)]\nstruct D {\n    four: u8,\n}\n";
        assert_eq!(of_structs(sources, "Serialize"), ["one", "two"].map(str::to_owned).into());
    }
}
