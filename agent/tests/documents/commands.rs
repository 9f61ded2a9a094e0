//! Command lines in the pages against the command that they call.
//!
//! Owns how a line is read; never runs anything.

use clap::Command;

use super::markdown::{Block, Kind, spans};

/// What a block has to run: each code span, or the whole of a line of code.
pub(crate) fn lines(block: &Block) -> Vec<&str> {
    match block.kind {
        Kind::Commands => vec![&block.text],
        Kind::Verbatim => Vec::new(),
        Kind::Prose | Kind::Heading | Kind::Row => spans(&block.text),
    }
}

/// The arguments of every call of `program` in a line.
pub(crate) fn calls<'a>(line: &'a str, program: &[&str]) -> Vec<Vec<&'a str>> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let starts = (0..words.len()).filter(|&at| words[at..].starts_with(program));
    let arguments = |at: usize| {
        let arguments = words[at + program.len()..].iter().copied();
        arguments.take_while(|word| !matches!(*word, "|" | "&&" | ";" | "--")).collect()
    };
    starts.map(arguments).collect()
}

/// What of these arguments the command does not have.
pub(crate) fn unknown(command: &Command, arguments: &[&str]) -> Option<String> {
    let mut path = vec![command];
    let mut values = 0;
    let mut words = arguments.iter().map(|word| word.trim_end_matches(',')).peekable();
    while let Some(word) = words.next() {
        let current = path.last().copied().unwrap_or(command);
        if let Some(flag) = word.strip_prefix("--") {
            let (name, value) =
                flag.split_once('=').map_or((flag, None), |(name, value)| (name, Some(value)));
            let argument = path.iter().rev().enumerate().find_map(|(above, command)| {
                command.get_arguments().find(|argument| {
                    argument.get_long() == Some(name) && (above == 0 || argument.is_global_set())
                })
            });
            let Some(argument) = argument.filter(|argument| !argument.is_hide_set()) else {
                return Some(format!("`{}` has no --{name}", current.get_name()));
            };
            if !argument.get_action().takes_values() {
                continue;
            }
            let value = value.or_else(|| words.next_if(|word| !word.starts_with('-')));
            let allowed = argument.get_possible_values();
            if let Some(value) = value.filter(|value| !is_placeholder(value))
                && !allowed.is_empty()
                && !allowed.iter().any(|allowed| allowed.matches(value, false))
            {
                return Some(format!("--{name} of `{}` is never {value}", current.get_name()));
            }
        } else if word == "#" {
            // A comment: flags in it are checked, words are not.
            values = usize::MAX;
        } else if values == 0 && current.has_subcommands() {
            if is_placeholder(word) {
                return None;
            }
            match current.find_subcommand(word).filter(|command| !command.is_hide_set()) {
                Some(command) => path.push(command),
                None => return Some(format!("`{}` has no command {word}", current.get_name())),
            }
        } else {
            values = values.saturating_add(1);
        }
    }
    None
}

/// Whether something stands for what the reader puts there: `PID`, `…`.
fn is_placeholder(word: &str) -> bool {
    !word.chars().any(|c| c.is_ascii_lowercase() || c.is_ascii_digit())
}

/// Every flag of a command and those below it.
pub(crate) fn flags(command: &Command) -> Vec<&str> {
    let own = command.get_arguments().filter(|argument| !argument.is_hide_set());
    let own = own.filter_map(|argument| argument.get_long());
    own.chain(command.get_subcommands().flat_map(flags)).collect()
}

/// Every command that does something, with the words that call it.
pub(crate) fn leaves(command: &Command) -> Vec<String> {
    let shown =
        || command.get_subcommands().filter(|command| !command.is_hide_set() && command.get_name() != "help");
    if shown().next().is_none() {
        return vec![command.get_name().to_owned()];
    }
    let below = shown().flat_map(leaves);
    below.map(|below| format!("{} {below}", command.get_name())).collect()
}

#[cfg(test)]
mod tests {
    use clap::Arg;

    use super::*;

    fn command() -> Command {
        let format = Arg::new("format").long("format").value_parser(["json", "text"]);
        let maps = Command::new("maps")
            .arg(Arg::new("json").long("json").action(clap::ArgAction::SetTrue).global(true))
            .subcommand(Command::new("dump").arg(Arg::new("name")));
        let mut command =
            Command::new("podgate").subcommand(Command::new("run").arg(format)).subcommand(maps);
        command.build();
        command
    }

    #[test]
    fn calls_are_found_wherever_they_are_in_a_line() {
        let line = "kubectl exec POD -- podgate maps dump X | grep podgate";
        assert_eq!(calls(line, &["podgate"]), [vec!["maps", "dump", "X"], vec![]]);
        assert_eq!(
            calls("cargo xtask test --tier unit -- x", &["cargo", "xtask"]),
            [["test", "--tier", "unit"]]
        );
    }

    #[test]
    fn what_the_command_has_is_known() {
        for line in [
            "run --format json",
            "run --format=text",
            "run --format FORMAT",
            "maps dump X --json",
            "maps dump",
            "NAME",
            "",
        ] {
            let words: Vec<_> = line.split_whitespace().collect();
            assert_eq!(unknown(&command(), &words), None, "{line}");
        }
    }

    #[test]
    fn what_the_command_has_not_is_told() {
        for (line, told) in [
            ("walk", "`podgate` has no command walk"),
            ("run --pace 2", "`run` has no --pace"),
            ("run --json", "`run` has no --json"),
            ("run --format xml", "--format of `run` is never xml"),
            ("maps eat", "`maps` has no command eat"),
            ("maps dump # --yaml", "`dump` has no --yaml"),
        ] {
            let words: Vec<_> = line.split_whitespace().collect();
            assert_eq!(unknown(&command(), &words).as_deref(), Some(told), "{line}");
        }
    }

    #[test]
    fn every_command_and_flag_is_listed() {
        let mut command =
            Command::new("podgate").subcommand(Command::new("maps").subcommand(Command::new("dump")));
        command = command.subcommand(Command::new("run").arg(Arg::new("imds").long("imds")));
        assert_eq!(leaves(&command), ["podgate maps dump", "podgate run"]);
        assert_eq!(flags(&command), ["imds"]);
    }
}
