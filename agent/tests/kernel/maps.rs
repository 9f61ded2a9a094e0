//! `podgate maps` against bpftool itself, byte for byte, on a bpffs of the test's own.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    thread,
};

use agent::mapdump::{self, Error, Format};
use agent_common::abi::{ABI_VERSION, PIN_DIRECTORY, map, program};
use aya::{
    Ebpf, EbpfLoader,
    maps::{HashMap, Map, MapData, MapInfo, PerCpuArray, PerCpuValues},
    programs::SockOps,
    util::nr_cpus,
};
use nix::{
    mount::{MsFlags, mount, umount},
    sched::{CloneFlags, unshare},
};

use self::btf::Btf;

mod btf;

static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/podgate.o"));

/// Every format, with bpftool's option for it.
const FORMATS: [(Format, &[&str]); 3] =
    [(Format::Plain, &[]), (Format::Json, &["--json"]), (Format::Pretty, &["--pretty"])];

/// Tickets as unlike anything else in the output as can be.
const TICKETS: [u64; 3] = [0x8123_4567_89ab_cdef, 0x9f3d_5b79_1357_9bdf, 0xfedc_ba98_7654_3210];

/// A mount of bpffs that only this thread sees, with the directory of the pins.
struct Bpffs {
    mount: tempfile::TempDir,
    pins: PathBuf,
}

/// What somebody sees who asks.
#[derive(Debug, PartialEq, Eq)]
struct Answer {
    stdout: String,
    status: i32,
}

// === impl Bpffs ===

impl Bpffs {
    /// Runs a test on a thread of its own: the mount is the thread's.
    fn run(test: fn(&Self)) {
        let thread = thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNS).expect("kernel tests need root");
            let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
            mount(None::<&str>, "/", None::<&str>, private, None::<&str>).unwrap();
            let directory = tempfile::tempdir().unwrap();
            mount(Some("bpf"), directory.path(), Some("bpf"), MsFlags::empty(), None::<&str>).unwrap();
            let pins = directory.path().join(PIN_DIRECTORY).join(format!("v{ABI_VERSION}/maps"));
            fs::create_dir_all(&pins).unwrap();
            fs::create_dir_all(directory.path().join(PIN_DIRECTORY).join("shared/maps")).unwrap();
            test(&Self { mount: directory, pins });
        });
        if let Err(panic) = thread.join() {
            std::panic::resume_unwind(panic);
        }
    }

    fn path(&self) -> &Path {
        self.mount.path()
    }

    /// Pins every map of the programs' object that an agent may pin; their names.
    fn pin_all(&self) -> Vec<String> {
        let ebpf = EbpfLoader::new().load(OBJECT).unwrap();
        let maps: Vec<_> = ebpf.maps().filter(|(name, _)| !name.starts_with('.')).collect();
        for (name, map) in &maps {
            map.pin(self.pins.join(name)).unwrap();
        }
        maps.into_iter().map(|(name, _)| name.to_owned()).collect()
    }

    /// Gives each entry of a map bytes of its own.
    fn fill(&self, name: &str) {
        let map = MapData::from_pin(self.pins.join(name)).and_then(Map::from_map_data).unwrap();
        let info = MapInfo::from_pin(self.pins.join(name)).unwrap();
        let size = info.value_size() as usize;
        let keys: Vec<_> = match map {
            Map::HashMap(_) => {
                let mut keys = TICKETS.map(|ticket| ticket.to_le_bytes().to_vec());
                for key in &mut keys {
                    key.resize(info.key_size() as usize, 0);
                }
                keys.into()
            }
            Map::Array(_) => (0..info.max_entries()).map(|index| index.to_le_bytes().to_vec()).collect(),
            Map::PerCpuArray(_) => return fill_per_cpu(map),
            _ => return,
        };
        for (number, key) in keys.iter().enumerate() {
            let mut value: Vec<_> = (0..size).map(|index| distinct(number * size + index)).collect();
            if name == map::TICKETS {
                value[24..32].copy_from_slice(key);
            }
            let pin = self.pins.join(name);
            let mut update = Command::new("bpftool");
            update.args(["map", "update", "pinned"]).arg(pin).args(["key", "hex"]).args(hex(key));
            assert!(update.args(["value", "hex"]).args(hex(&value)).status().unwrap().success());
        }
    }

    /// What bpftool says of a pinned map.
    fn bpftool(&self, options: &[&str], command: &str, name: &str) -> Answer {
        let path = self.pins.join(name);
        bpftool(options, &["map", command, "pinned", path.to_str().unwrap()])
    }

    /// What podgate says of it.
    fn podgate(&self, format: Format, command: &str, name: &str) -> Answer {
        let mut out = Vec::new();
        let result = match command {
            "show" => mapdump::show(self.path(), name, format, &mut out),
            _ => mapdump::dump(self.path(), name, format, &mut out),
        };
        let status = result.map_or_else(|error| i32::from(error.exit_status()), |()| 0);
        Answer { stdout: String::from_utf8(out).unwrap(), status }
    }

    /// Both say the same of a map that has no secrets.
    fn compare(&self, name: &str) {
        for (format, options) in FORMATS {
            for command in ["show", "dump"] {
                let ours = self.podgate(format, command, name);
                assert_eq!(ours, self.bpftool(options, command, name), "{command} {name} {format:?}");
            }
        }
    }
}

impl Drop for Bpffs {
    fn drop(&mut self) {
        umount(self.path()).unwrap();
    }
}

#[test]
fn every_map_reads_as_bpftool_prints_it_but_for_secrets() {
    Bpffs::run(|bpffs| {
        let names = bpffs.pin_all();
        assert!(names.iter().any(|name| name == map::ORIGINS), "there are maps that cannot be listed");
        for name in names {
            bpffs.fill(&name);
            for (format, options) in FORMATS {
                let ours = bpffs.podgate(format, "show", &name);
                assert_eq!(ours, bpffs.bpftool(options, "show", &name), "show {name} {format:?}");
                let ours = bpffs.podgate(format, "dump", &name);
                let mut theirs = bpffs.bpftool(options, "dump", &name);
                theirs.stdout = masked(&name, theirs.stdout);
                assert_eq!(ours, theirs, "dump {name} {format:?}");
            }
        }
    });
}

#[test]
fn no_secret_is_printed() {
    Bpffs::run(|bpffs| {
        bpffs.pin_all();
        let ticket = TICKETS[0].to_le_bytes().to_vec();
        for (name, secret) in [(map::TICKETS, ticket), (map::IMDS_KEY, imds_key())] {
            bpffs.fill(name);
            for (format, options) in FORMATS {
                let theirs = bpffs.bpftool(options, "dump", name).stdout;
                let ours = bpffs.podgate(format, "dump", name).stdout;
                let shown = |text: &str| notations(&secret).iter().any(|secret| text.contains(secret));
                assert!(shown(&theirs) && !shown(&ours), "{name} {format:?}:\n{ours}");
            }
        }
    });
}

#[test]
fn the_list_has_what_bpftool_shows_of_each_map() {
    Bpffs::run(|bpffs| {
        let mut names = bpffs.pin_all();
        names.sort_by_key(|name| MapInfo::from_pin(bpffs.pins.join(name)).unwrap().id());
        // Not bpftool's own list, which is of everybody's maps. On Linux 6.18 that has mistakes, too: a map without
        // types gets the btf_id of the one before it.
        for (format, options) in FORMATS {
            let shown = names.iter().map(|name| bpffs.bpftool(options, "show", name).stdout);
            let theirs = match format {
                Format::Plain => shown.collect(),
                Format::Json => format!("[{}]\n", list(shown.map(|map| map.trim_end().to_owned()))),
                Format::Pretty => {
                    format!("[{}\n]\n", list(shown.map(|map| map.trim_end().replace('\n', "\n    "))))
                }
            };
            let mut ours = Vec::new();
            mapdump::list(bpffs.path(), format, &mut ours).unwrap();
            assert_eq!(String::from_utf8(ours).unwrap(), theirs, "{format:?}");
        }
    });
}

#[test]
fn values_of_every_type_read_as_bpftool_prints_them() {
    Bpffs::run(|bpffs| {
        let btf = Btf::load_samples();
        let mut map = btf.array("samples", 4);
        let fills: [fn(usize) -> u8; 4] =
            [|_| 0, |_| 0xff, distinct, |index| b"'so' \"a\" a way\0"[(index + 1) % 15]];
        for (index, fill) in (0..).zip(fills) {
            map.set(index, std::array::from_fn(fill), 0).unwrap();
        }
        map.pin(bpffs.pins.join("samples")).unwrap();
        bpffs.compare("samples");
        let shown = bpffs.podgate(Format::Plain, "dump", "samples").stdout;
        assert!(shown.contains(r#""text": "'so' \"a\""#), "there is a text: {shown}");
        assert_eq!(shown.matches("\"float\": (unsupported-kind").count(), 4, "all of it is printed: {shown}");
    });
}

#[test]
fn maps_without_types_read_as_bpftool_prints_them() {
    Bpffs::run(|bpffs| {
        let mut short = HashMap::<_, u64, [u8; 8]>::create(4, 0).unwrap();
        short.insert(1, [0xab; 8], 0).unwrap();
        let mut shared = HashMap::<_, [u8; 12], [u8; 14]>::create(4, 0).unwrap();
        shared.insert([7; 12], [9; 14], 0).unwrap();
        let mut long = HashMap::<_, u32, [u8; 40]>::create(4, 0).unwrap();
        long.insert(1, [1; 40], 0).unwrap();
        long.insert(2, [2; 40], 0).unwrap();
        short.pin(bpffs.pins.join("short")).unwrap();
        shared.pin(bpffs.pins.join("shared")).unwrap();
        long.pin(bpffs.pins.join("long")).unwrap();
        PerCpuArray::<_, u32>::create(2, 0).unwrap().pin(bpffs.pins.join("cpus")).unwrap();
        PerCpuArray::<_, [u8; 24]>::create(2, 0).unwrap().pin(bpffs.pins.join("longcpus")).unwrap();
        for name in ["short", "shared", "long", "cpus", "longcpus"] {
            bpffs.compare(name);
        }
    });
}

#[test]
fn tickets_without_types_are_secret_as_a_whole() {
    Bpffs::run(|bpffs| {
        let shape = aya_obj::Map::new_from_params(1, 8, 4, 1, 0);
        let data = MapData::create(shape, map::TICKETS, None).unwrap();
        let mut tickets: HashMap<_, u64, u32> = Map::HashMap(data).try_into().unwrap();
        tickets.insert(TICKETS[0], 0x1234_5678, 0).unwrap();
        tickets.pin(bpffs.pins.join("renamed")).unwrap();
        let answer = bpffs.podgate(Format::Plain, "dump", "renamed");
        assert_eq!(answer.stdout, "key: ** ** ** ** ** ** ** **  value: ** ** ** **\nFound 1 element\n");
    });
}

#[test]
fn what_is_not_there_is_said_with_what_is() {
    Bpffs::run(|bpffs| {
        let nowhere = bpffs.path().join("nowhere");
        let error = mapdump::list(&nowhere, Format::Plain, Vec::new()).unwrap_err();
        assert!(error.to_string().contains("nowhere/podgate/v1/maps: podgate has not run"), "{error}");

        bpffs.pin_all();
        for name in ["tickets", "../maps/TICKETS", ".", ""] {
            let error = mapdump::dump(bpffs.path(), name, Format::Plain, Vec::new()).unwrap_err();
            let text = error.to_string();
            assert!(
                text.contains("ORIGINS, POD_LISTENERS, POD_TICKETS, POLICIES") && error.exit_status() == 1,
                "{text}"
            );
        }
    });
}

#[test]
fn a_pinned_program_is_no_map() {
    Bpffs::run(|bpffs| {
        let mut ebpf = Ebpf::load(OBJECT).unwrap();
        let program: &mut SockOps = ebpf.program_mut(program::ACTIVE).unwrap().try_into().unwrap();
        program.load().unwrap();
        program.pin(bpffs.pins.join("program")).unwrap();
        let error = mapdump::show(bpffs.path(), "program", Format::Plain, Vec::new()).unwrap_err();
        assert!(matches!(error, Error::Open { .. }) && error.to_string().contains("no map"), "{error}");
    });
}

/// Gives each processor a value of its own.
fn fill_per_cpu(map: Map) {
    let mut map = PerCpuArray::<_, u64>::try_from(map).unwrap();
    for index in 0..map.len() {
        let values = (0..nr_cpus().unwrap() as u64).map(|cpu| u64::from(index) << 33 | cpu);
        map.set(index, PerCpuValues::try_from(values.collect::<Vec<_>>()).unwrap(), 0).unwrap();
    }
}

fn bpftool(options: &[&str], arguments: &[&str]) -> Answer {
    let output = Command::new("bpftool").args(options).args(arguments).output();
    let output = output.expect("bpftool is not installed: it is in Debian's package bpftool");
    // It says nothing there of anything that it is asked here, refusals included.
    assert_eq!(String::from_utf8_lossy(&output.stderr), "", "bpftool {arguments:?}");
    Answer { stdout: String::from_utf8(output.stdout).unwrap(), status: output.status.code().unwrap() }
}

/// What bpftool has printed, with `***` for secrets.
fn masked(name: &str, text: String) -> String {
    let secrets = match name {
        map::TICKETS => TICKETS.map(|ticket| ticket.to_le_bytes().to_vec()).into(),
        map::IMDS_KEY => vec![imds_key()],
        _ => vec![],
    };
    secrets.iter().fold(text, |text, secret| {
        let masks = [
            vec!["\"0x**\""; secret.len()].join(","),
            vec!["\"***\""; secret.len()].join(","),
            "\"***\"".to_owned(),
        ];
        std::iter::zip(notations(secret), masks)
            .fold(text, |text, (secret, mask)| text.replace(&secret, &mask))
    })
}

/// How a secret may be printed: as bytes, in hexadecimal and decimal, and as a number.
fn notations(secret: &[u8]) -> Vec<String> {
    let mut notations = vec![
        list(secret.iter().map(|byte| format!("\"{byte:#04x}\""))),
        list(secret.iter().map(u8::to_string)),
    ];
    notations.extend(<[u8; 8]>::try_from(secret).map(|ticket| u64::from_le_bytes(ticket).to_string()));
    notations
}

fn list(items: impl Iterator<Item = String>) -> String {
    items.collect::<Vec<_>>().join(",")
}

/// The bytes that every array's first entry begins with.
fn imds_key() -> Vec<u8> {
    (0..32).map(distinct).collect()
}

/// Bytes that do not repeat soon.
fn distinct(index: usize) -> u8 {
    (index * 37 + 11).to_le_bytes()[0]
}

fn hex(bytes: &[u8]) -> Vec<String> {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
