//! Names of settings, metrics, annotations and files in a text.
//!
//! Owns how a name is told from the text around it; never knows which names there are.

/// Every word that starts with `prefix` and goes on with such characters. A prefix alone, as in `podgate_*`, is no name.
fn starting_with<'a>(text: &'a str, prefix: &str, goes_on: fn(char) -> bool) -> Vec<&'a str> {
    let is_start =
        |at: usize| !text[..at].chars().next_back().is_some_and(|c| c.is_alphanumeric() || c == '_');
    let starts = text.match_indices(prefix).map(|(at, _)| at).filter(|&at| is_start(at));
    let word = |at: usize| {
        let rest = &text[at + prefix.len()..];
        let end = rest.find(|c| !goes_on(c)).unwrap_or(rest.len());
        &text[at..at + prefix.len() + end]
    };
    starts.map(word).filter(|word| !word.ends_with('_') && !word.ends_with('/')).collect()
}

/// `PODGATE_…`
pub(crate) fn variables(text: &str) -> Vec<&str> {
    starting_with(text, "PODGATE_", |c| c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_')
}

/// `podgate_…`
pub(crate) fn metrics(text: &str) -> Vec<&str> {
    starting_with(text, "podgate_", |c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
}

/// `podgate.dev/…`
pub(crate) fn annotations(text: &str) -> Vec<&str> {
    starting_with(text, "podgate.dev/", |c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-')
}

/// The values of the label `event`.
pub(crate) fn events(text: &str) -> Vec<&str> {
    text.split("event=\"").skip(1).filter_map(|rest| rest.split_once('"')).map(|(event, _)| event).collect()
}

/// The flag that a code span is, or begins with.
pub(crate) fn flag(span: &str) -> Option<&str> {
    let flag = span.strip_prefix("--")?;
    flag.split([' ', '=']).next().filter(|flag| !flag.is_empty())
}

/// A code span that is a file or directory of the repository. One with a placeholder in it is none.
pub(crate) fn path(span: &str) -> Option<&str> {
    let (top, _) = span.split_once('/')?;
    let is_ours = matches!(
        top,
        "agent" | "agent-common" | "agent-ebpf" | "deploy" | "xtask" | ".ci" | ".github" | ".cargo"
    );
    let is_path = span.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '/' | '.' | '-' | '_'));
    let has_placeholder = span.split(['/', '.']).any(|part| part == "NAME");
    (is_ours && is_path && !has_placeholder).then_some(span)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_end_where_the_text_goes_on() {
        let text = "`PODGATE_IMDS=audit`, XPODGATE_NO, podgate_requests_total{status=\"200\"}, podgate_*, \
                    podgate.dev/imds-v1: allow, event=\"denied\"}";
        assert_eq!(variables(text), ["PODGATE_IMDS"]);
        assert_eq!(metrics(text), ["podgate_requests_total"]);
        assert_eq!(annotations(text), ["podgate.dev/imds-v1"]);
        assert_eq!(events(text), ["denied"]);
    }

    #[test]
    fn a_span_is_a_flag_or_begins_with_one() {
        assert_eq!(flag("--imds"), Some("imds"));
        assert_eq!(flag("--target auto"), Some("target"));
        assert_eq!(flag("--imds=off"), Some("imds"));
        assert_eq!(flag("podgate --x"), None);
    }

    #[test]
    fn paths_are_those_of_the_repository() {
        assert_eq!(path("agent/src/lib.rs"), Some("agent/src/lib.rs"));
        for other in ["/sys/fs/bpf", "target/x", "agent/src/dialect/NAME.rs", "agent", "agent/* x"] {
            assert_eq!(path(other), None, "{other}");
        }
    }
}
