//! Running other programs so that a person can follow: what is run, how far it is, what went wrong.
//!
//! Owns the echo and the logs under `target/xtask`; never decides what to run. Progress goes to stderr, so that a
//! command's own output can be read by programs.

mod command_progress;

use std::{
    env,
    fmt::Write as _,
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Command, ExitStatus, Stdio},
    sync::mpsc,
    thread,
    time::Instant,
};

use anyhow::{Context as _, bail};
use owo_colors::{OwoColorize as _, Stream};

use self::command_progress::{CARGO_VARIABLES, Progress, in_all, numbered, say};
pub(crate) use self::command_progress::{clock, set_steps, start_clock};
use crate::{disk, workspace};

/// How much of a log is shown when a command fails; the rest is in the file.
const LOG_TAIL_LINES: usize = 60;

/// Something that is missing on this machine and that this command does not set up by itself: exit status 2.
#[derive(Debug)]
pub(crate) struct Missing(pub(crate) String);

// === impl Missing ===

impl std::fmt::Display for Missing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Missing {}

/// Runs `command`, which does `what`. Its output goes to a log, the end of which is shown if it fails.
pub(crate) fn run(what: &str, command: &mut Command) -> anyhow::Result<()> {
    let (log_path, log) = open_log(what)?;
    let line = format!("$ {}", echo(command));
    say(line.if_supports_color(Stream::Stderr, |line| line.dimmed()));
    let started = Instant::now();
    let program = command.get_program().display().to_string();
    let status = watch(what, command, log)
        .with_context(|| format!("{what}: cannot run {program}; is it installed and in PATH?"))?;
    let took = clock(started.elapsed());
    if !status.success() {
        let log = fs::read_to_string(&log_path).unwrap_or_default();
        let hint = disk::explain_failure(&log).map_or_else(String::new, |hint| format!("\n{hint}"));
        bail!("{what} failed ({status}, {took})\n{}\nwhole log: {}{hint}", tail(&log), log_path.display());
    }
    let mark = "✓".if_supports_color(Stream::Stderr, |mark| mark.green());
    say(format_args!("{mark} {}: {took}, {} in all", numbered(what), clock(in_all())));
    Ok(())
}

/// Runs the command to its end while its progress is shown.
fn watch(what: &str, command: &mut Command, mut log: File) -> anyhow::Result<ExitStatus> {
    let is_cargo = is_cargo(Path::new(command.get_program()));
    command.stdin(Stdio::null()).stdout(log.try_clone().context("cannot share the log")?);
    if is_cargo {
        command.envs(CARGO_VARIABLES).stderr(Stdio::piped());
    } else {
        command.stderr(log.try_clone().context("cannot share the log")?);
    }
    let mut child = command.spawn()?;
    let output = child.stderr.take();
    let progress = Progress::new(what);
    let (ended, until_ended) = mpsc::channel();
    thread::scope(|scope| {
        let progress = &progress;
        scope.spawn(move || progress.keep_writing(&until_ended));
        let _ended = ended;
        if let Some(output) = output {
            progress.follow_cargo(output, &mut log).context("cannot log what it says")?;
        }
        Ok(child.wait()?)
    })
}

/// Whether a program is cargo or one of its subcommands, which show their progress as cargo does.
fn is_cargo(program: &Path) -> bool {
    program.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"cargo"))
}

/// What `command` prints, without its last line break. For questions that take no time: nothing is shown.
pub(crate) fn ask(command: &mut Command) -> anyhow::Result<String> {
    let echo = echo(command);
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("cannot run {echo}"))?;
    if !output.status.success() {
        bail!("{echo}: {}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim_end());
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim_end().to_owned())
}

/// Whether a command can be run and succeeds. For questions that take no time.
pub(crate) fn succeeds(command: &[&str]) -> bool {
    let [program, arguments @ ..] = command else { return false };
    Command::new(program).args(arguments).output().is_ok_and(|output| output.status.success())
}

/// Whether there is such a program.
pub(crate) fn is_in_path(program: &str) -> bool {
    find_in_path(program).is_some()
}

/// Where there is such a program.
pub(crate) fn find_in_path(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path).map(|directory| directory.join(program)).find(|path| path.is_file())
}

/// The command as one would type it, with the variables that it is given.
fn echo(command: &Command) -> String {
    let mut line = String::new();
    for (name, value) in command.get_envs() {
        if let Some(value) = value {
            let _ = write!(line, "{}={} ", name.display(), quote(&value.to_string_lossy()));
        }
    }
    line.push_str(&quote(&command.get_program().to_string_lossy()));
    for argument in command.get_args() {
        line.push(' ');
        line.push_str(&quote(&argument.to_string_lossy()));
    }
    line
}

/// Quotes a word for a shell where it needs to be.
fn quote(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_=/.,:+@%^".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

/// What the last run that did `what` has written.
pub(crate) fn log_of(what: &str) -> anyhow::Result<String> {
    let path = log_path(what);
    fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
}

fn log_path(what: &str) -> PathBuf {
    let name: String = what.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
    workspace::target_directory().join("xtask").join(format!("{name}.log"))
}

fn open_log(what: &str) -> anyhow::Result<(PathBuf, File)> {
    let path = log_path(what);
    let directory = path.parent().context("BUG: a log is in a directory")?;
    fs::create_dir_all(directory).with_context(|| format!("cannot create {}", directory.display()))?;
    let log = File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
    Ok((path, log))
}

fn tail(log: &str) -> String {
    let lines: Vec<_> = log.lines().collect();
    lines[lines.len().saturating_sub(LOG_TAIL_LINES)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_echoed_command_can_be_pasted_into_a_shell() {
        let mut command = Command::new("cargo");
        command
            .args(["build", "--cfg", "a b", "", "it's"])
            .env("RUSTFLAGS", "-C debuginfo=2")
            .env_remove("RUSTC");
        assert_eq!(echo(&command), r"RUSTFLAGS='-C debuginfo=2' cargo build --cfg 'a b' '' 'it'\''s'");
    }

    #[test]
    fn a_failure_shows_the_end_of_the_output() {
        let error =
            run("a failing command", Command::new("sh").args(["-c", "echo out; echo err >&2; exit 3"]));
        let error = error.unwrap_err().to_string();
        for part in ["a failing command failed", "exit status: 3", "out\nerr", "a-failing-command.log"] {
            assert!(error.contains(part), "{part}: {error}");
        }
    }

    #[test]
    fn a_missing_program_is_named() {
        let error = format!("{:#}", run("something", &mut Command::new("no-such-program-here")).unwrap_err());
        assert!(error.contains("no-such-program-here"), "{error}");
    }

    #[test]
    fn an_answer_comes_without_its_line_break() {
        assert_eq!(ask(Command::new("echo").arg("yes")).unwrap(), "yes");
        let error = ask(Command::new("sh").args(["-c", "echo no >&2; false"])).unwrap_err().to_string();
        assert!(error.ends_with("no"), "{error}");
    }
}
