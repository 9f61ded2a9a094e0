//! What a command will install, build and take, said before any of it begins.
//!
//! Owns the list, the check that there is room for it, and the packages of the system, which are installed at once. Which
//! things a command needs, their own modules say; what does not come from the system they install themselves.

use std::{fmt::Write as _, path::Path, thread::available_parallelism, time::Duration};

use crate::{apt, cmd, disk, workspace};

/// The most that a build which is up to date but for a change of ours takes, in MiB.
const REBUILD_MIB: u64 = 300;
/// Debian's packages, with what they depend on, that are worth counting: the beginnings of their names, and MiB.
const PACKAGE_MIB: [(&str, u64); 9] = [
    ("rustc-web", 350),
    ("libstd-rust-web-dev-bpf", 110),
    ("llvm-", 420),
    ("qemu-system-x86", 250),
    ("default-jdk-headless", 300),
    ("golang-go", 450),
    ("maven", 60),
    ("nodejs", 200),
    ("npm", 100),
];
/// Everything that takes longer than this deserves to be announced with its time.
const LONG: Duration = Duration::from_mins(1);

/// What a command will do to this machine.
#[derive(Debug)]
pub(crate) struct Plan {
    /// The command, and what it does in the end.
    title: String,
    needs: Vec<Need>,
    builds: Vec<Build>,
    /// What the command itself takes once everything is there.
    runs: Duration,
}

/// Something that is missing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Need {
    pub(crate) name: String,
    pub(crate) source: Source,
    /// What needs it.
    pub(crate) purpose: String,
    pub(crate) seconds: u64,
    pub(crate) mib: u64,
}

/// Where something comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Source {
    /// A package of Debian's, for the whole system.
    Apt,
    /// An archive of Debian's that is unpacked below the target directory and not installed.
    AptDownload,
    /// Below the target directory, as everything that follows.
    Rustup,
    Cargo,
    Pip,
    /// What the other languages' own package managers fetch.
    Registries,
}

/// Something that cargo builds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Build {
    KernelPrograms,
    Agent,
    /// With kernel programs of its own.
    UndefendedAgent,
    ReleaseAgent,
    Tests,
    VmTests,
    Lints,
    FuzzTargets,
    /// Those of the agent's library, without optimization.
    MutantTests,
}

/// What a build takes on a machine where nothing is built yet.
struct Cost {
    cpu_seconds: u64,
    mib: u64,
}

// === impl Plan ===

impl Plan {
    pub(crate) fn new(title: &str, runs: Duration) -> Self {
        Self { title: title.to_owned(), needs: Vec::new(), builds: Vec::new(), runs }
    }

    /// Adds what is missing; nothing is in the list twice.
    pub(crate) fn needs(mut self, needs: impl IntoIterator<Item = Need>) -> Self {
        for need in needs {
            if !self.needs.iter().any(|known| known.name == need.name && known.source == need.source) {
                self.needs.push(need);
            }
        }
        self
    }

    pub(crate) fn builds(mut self, builds: impl IntoIterator<Item = Build>) -> Self {
        for build in builds {
            if !self.builds.contains(&build) {
                self.builds.push(build);
            }
        }
        self
    }

    /// Says what will be done, makes sure that there is room for it, and installs the packages of the system.
    pub(crate) fn begin(mut self) -> anyhow::Result<()> {
        self.needs.sort_by_key(|need| need.source);
        let fresh: Vec<Build> = self.builds.iter().copied().filter(|build| !build.is_built()).collect();
        let processors = available_parallelism().map_or(1, |count| count.get() as u64);
        eprint!("{}", self.announcement(&fresh, processors, disk::free_mib()?));
        let packages = self.packages();
        if !packages.is_empty() && !apt::is_usable() {
            return Err(cmd::Missing(by_hand(&packages)).into());
        }
        disk::require(self.target_mib(&fresh))?;
        cmd::set_steps(self.steps());
        if packages.is_empty() { Ok(()) } else { apt::install_all(&packages) }
    }

    /// The text for a person.
    fn announcement(&self, fresh: &[Build], processors: u64, free_mib: u64) -> String {
        let mut text = format!("{}\n", self.title);
        if !self.needs.is_empty() {
            let width = self.needs.iter().map(|need| need.name.chars().count()).max().unwrap_or_default();
            text.push_str("These will be installed:\n");
            for need in &self.needs {
                let _ =
                    writeln!(text, "  {:width$}  {}, for {}", need.name, need.source.text(), need.purpose);
            }
        }
        if !fresh.is_empty() {
            let names: Vec<_> = fresh.iter().map(|build| build.name()).collect();
            let target = workspace::target_directory();
            let _ = writeln!(text, "These will be built, in {}: {}", target.display(), names.join(", "));
        }
        let takes = self.takes(fresh, processors);
        if self.needs.is_empty() && fresh.is_empty() {
            let _ = writeln!(text, "Everything is there. It takes {} unless sources changed.", about(takes));
        } else {
            let _ = writeln!(
                text,
                "Takes {} with {processors} processor{}, and about {} of disk; {} are free.",
                about(takes),
                if processors == 1 { "" } else { "s" },
                disk::size(self.mib(fresh)),
                disk::size(free_mib),
            );
            let _ = writeln!(text, "Later runs take {} unless sources changed.", about(self.runs));
        }
        text
    }

    fn takes(&self, fresh: &[Build], processors: u64) -> Duration {
        // Some crates wait for others: more processors than these have little to do.
        let processors = processors.clamp(1, 8);
        let installs: u64 = self.needs.iter().map(|need| need.seconds).sum();
        let builds: u64 = fresh.iter().map(|build| build.cost().cpu_seconds / processors).sum();
        self.runs + Duration::from_secs(installs + builds)
    }

    /// What all of it takes on the disk.
    fn mib(&self, fresh: &[Build]) -> u64 {
        let packages = self.needs.iter().filter(|need| need.source == Source::Apt);
        self.target_mib(fresh) + packages.map(|need| need.mib).sum::<u64>()
    }

    /// What it takes in the target directory.
    fn target_mib(&self, fresh: &[Build]) -> u64 {
        let needs = self.needs.iter().filter(|need| need.source != Source::Apt).map(|need| need.mib);
        let builds = fresh.iter().map(|build| build.cost().mib);
        let rebuilds = if fresh.len() < self.builds.len() { REBUILD_MIB } else { 0 };
        needs.chain(builds).sum::<u64>() + rebuilds
    }

    fn packages(&self) -> Vec<&str> {
        let packages = self.needs.iter().filter(|need| need.source == Source::Apt);
        packages.map(|need| need.name.as_str()).collect()
    }

    /// The commands that will run, by their names: packages first, then what the builds need, the builds, the rest.
    fn steps(&self) -> Vec<String> {
        let of = |wanted: &[Source]| {
            let needs = self.needs.iter().filter(|need| wanted.contains(&need.source));
            needs.map(|need| need.name.clone()).collect::<Vec<_>>()
        };
        let mut steps = Vec::new();
        if !self.packages().is_empty() {
            steps.push(apt::STEP.to_owned());
        }
        steps.extend(of(&[Source::Rustup, Source::Cargo]));
        steps.extend(self.builds.iter().flat_map(|build| build.steps()).map(|&step| step.to_owned()));
        steps.extend(of(&[Source::AptDownload, Source::Pip]));
        steps
    }
}

// === impl Need ===

impl Need {
    /// A package of Debian's.
    pub(crate) fn apt(name: impl Into<String>, purpose: &str) -> Self {
        let name = name.into();
        let known = PACKAGE_MIB.iter().find(|(package, _)| name.starts_with(package));
        let mib = known.map_or(10, |(_, mib)| *mib);
        Self { name, source: Source::Apt, purpose: purpose.to_owned(), seconds: 3 + mib / 10, mib }
    }

    /// A program that cargo installs in so many seconds.
    pub(crate) fn cargo(name: String, purpose: &str, seconds: u64) -> Self {
        Self { name, source: Source::Cargo, purpose: purpose.to_owned(), seconds, mib: 300 }
    }
}

// === impl Source ===

impl Source {
    fn text(self) -> &'static str {
        match self {
            Self::Apt => "with apt-get",
            Self::AptDownload => "from Debian's archive into target/vm",
            Self::Rustup => "with rustup into target/tools",
            Self::Cargo => "with cargo into target/tools",
            Self::Pip => "with pip into target/clients",
            Self::Registries => "into target/clients",
        }
    }
}

// === impl Build ===

impl Build {
    /// As people call it.
    fn name(self) -> &'static str {
        match self {
            Self::KernelPrograms => "the kernel programs",
            Self::Agent => "podgate",
            Self::UndefendedAgent => "podgate without defenses",
            Self::ReleaseAgent => "podgate (release)",
            Self::Tests => "the tests",
            Self::VmTests => "the tests for virtual machines",
            Self::Lints => "what the lints and the documentation need",
            Self::FuzzTargets => "the fuzz targets",
            Self::MutantTests => "the tests without optimization",
        }
    }

    /// The names under which `cmd::run` runs it.
    fn steps(self) -> &'static [&'static str] {
        match self {
            Self::KernelPrograms => &["eBPF programs (ebpf)"],
            Self::Agent => &["podgate"],
            Self::UndefendedAgent => &["eBPF programs (ebpf-undefended)", "podgate-undefended"],
            Self::ReleaseAgent => &["podgate (release)"],
            Self::FuzzTargets => &["fuzz targets"],
            Self::Tests | Self::VmTests | Self::Lints | Self::MutantTests => &[],
        }
    }

    fn is_built(self) -> bool {
        let target = workspace::target_directory();
        let is_there = |path: &str| target.join(path).exists();
        match self {
            Self::KernelPrograms => is_there("ebpf/bpfel-unknown-none/ebpf/podgate-ebpf"),
            Self::Agent => is_there("debug/podgate"),
            Self::UndefendedAgent => is_there("debug/podgate-undefended"),
            Self::ReleaseAgent => is_there("release/podgate"),
            Self::Tests => has_tests(&target.join("debug/deps")),
            Self::VmTests => is_there("vm/6.1.cpio") || is_there("vm/6.12.cpio"),
            Self::Lints => is_there("doc/podgate"),
            Self::FuzzTargets => is_there("fuzz/corpus"),
            Self::MutantTests => is_there("xtask/mutants"),
        }
    }

    /// Roughly, with two processors; this command and what it shares with the agent are built already.
    fn cost(self) -> Cost {
        let (cpu_seconds, mib) = match self {
            Self::KernelPrograms => (40, 400),
            Self::Agent => (300, 900),
            Self::UndefendedAgent => (120, 500),
            Self::ReleaseAgent => (1000, 1300),
            Self::Tests => (400, 1500),
            Self::VmTests => (60, 400),
            Self::Lints => (300, 1500),
            Self::FuzzTargets => (600, 1500),
            Self::MutantTests => (60, 600),
        };
        Cost { cpu_seconds, mib }
    }
}

/// Whether the agent's tests were compiled: cargo puts a hash behind their names.
fn has_tests(directory: &Path) -> bool {
    let names = directory.read_dir().into_iter().flatten().flatten().map(|entry| entry.file_name());
    names.into_iter().any(|name| name.as_encoded_bytes().starts_with(b"pipeline-"))
}

/// What a person does who cannot use apt-get here.
fn by_hand(packages: &[&str]) -> String {
    format!(
        "these packages must be installed first, with this system's package manager; on Debian:\n    \
         sudo apt-get install --no-install-recommends {}",
        packages.join(" ")
    )
}

/// A rough duration, said roughly.
fn about(duration: Duration) -> String {
    if duration >= LONG {
        format!("about {} min", duration.as_secs().div_ceil(60))
    } else if duration.as_secs() > 10 {
        format!("about {} s", duration.as_secs().div_ceil(10) * 10)
    } else {
        "a few seconds".to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn need(name: &str, source: Source) -> Need {
        Need { name: name.to_owned(), source, purpose: "a test".to_owned(), seconds: 30, mib: 100 }
    }

    fn plan() -> Plan {
        Plan::new("cargo xtask demo: shows something.", Duration::from_secs(20))
            .needs([need("boto3 1.2", Source::Pip), Need::apt("nftables", "the packet filter")])
            .needs([Need::apt("nftables", "something else"), need("bpf-linker 0.13.0", Source::Cargo)])
            .builds([Build::KernelPrograms, Build::Agent])
            .builds([Build::KernelPrograms])
    }

    #[test]
    fn everything_is_named_once_before_it_is_installed() {
        let text = plan().announcement(&[Build::Agent], 2, 5 * 1024);
        for (part, times) in [
            ("nftables", 1),
            ("with apt-get, for the packet filter", 1),
            ("boto3 1.2          with pip into target/clients, for a test", 1),
            ("bpf-linker 0.13.0  with cargo into target/tools", 1),
            (": podgate\n", 1),
            ("with 2 processors", 1),
            ("; 5.0 GiB are free.", 1),
            ("Later runs take about 20 s", 1),
        ] {
            assert_eq!(text.matches(part).count(), times, "{part}:\n{text}");
        }
    }

    #[test]
    fn a_run_that_needs_nothing_is_announced_in_two_lines() {
        let text = Plan::new("title", Duration::from_secs(20)).announcement(&[], 2, 0);
        assert_eq!(text, "title\nEverything is there. It takes about 20 s unless sources changed.\n");
    }

    #[test]
    fn packages_of_the_system_take_no_room_in_the_target_directory() {
        let plan = plan();
        assert_eq!(plan.target_mib(&[]), 200 + REBUILD_MIB);
        assert_eq!(plan.mib(&[]), 210 + REBUILD_MIB);
    }

    #[test]
    fn steps_are_in_the_order_in_which_they_run() {
        let expected = [apt::STEP, "bpf-linker 0.13.0", "eBPF programs (ebpf)", "podgate", "boto3 1.2"];
        assert_eq!(plan().steps(), expected);
    }

    #[test]
    fn more_processors_make_builds_shorter_and_nothing_else() {
        let plan = plan();
        let [one, two] = [1, 2].map(|processors| plan.takes(&[Build::Agent], processors));
        assert_eq!(one.checked_sub(two).unwrap().as_secs(), Build::Agent.cost().cpu_seconds / 2);
    }

    #[test]
    fn durations_are_rough() {
        let texts = [3, 14, 59, 61, 600].map(|seconds| about(Duration::from_secs(seconds)));
        assert_eq!(texts, ["a few seconds", "about 20 s", "about 60 s", "about 2 min", "about 10 min"]);
    }

    #[test]
    fn who_cannot_install_is_given_one_command_for_all() {
        let text = by_hand(&["curl", "nftables"]);
        assert!(text.ends_with("sudo apt-get install --no-install-recommends curl nftables"), "{text}");
    }
}
