//! Maps and their entries in bpftool's formats.
//!
//! Owns what stands where; what a value looks like is `value`'s, and what the kernel says `pinned`'s.

use std::{io, iter};

use super::{
    Error, Format,
    json::Json,
    pinned::{Layout, Pinned, Types},
    value::{Bytes, Printer, Stop},
};

/// Names of map types by their number, as libbpf has them.
const KINDS: [&str; 34] = [
    "unspec",
    "hash",
    "array",
    "prog_array",
    "perf_event_array",
    "percpu_hash",
    "percpu_array",
    "stack_trace",
    "cgroup_array",
    "lru_hash",
    "lru_percpu_hash",
    "lpm_trie",
    "array_of_maps",
    "hash_of_maps",
    "devmap",
    "sockmap",
    "cpumap",
    "xskmap",
    "sockhash",
    "cgroup_storage",
    "reuseport_sockarray",
    "percpu_cgroup_storage",
    "queue",
    "stack",
    "sk_storage",
    "devmap_hash",
    "struct_ops",
    "ringbuf",
    "inode_storage",
    "task_storage",
    "bloom_filter",
    "user_ringbuf",
    "cgrp_storage",
    "arena",
];

/// Keys and values of at most so many bytes stand on one line with their name.
const LINE: usize = 16;
/// A key and its value of at most so many bytes together share one line.
const SHARED_LINE: usize = 24;

/// An entry: the values are one, or one for each processor.
struct Entry<'a> {
    key: &'a [u8],
    values: &'a [Vec<u8>],
    is_per_cpu: bool,
    layout: &'a Layout,
}

// === impl Entry ===

impl Entry<'_> {
    fn key(&self) -> Bytes<'_> {
        Bytes { data: self.key, secret: &self.layout.key_secret }
    }

    fn values(&self) -> impl Iterator<Item = Bytes<'_>> {
        self.values.iter().map(|data| Bytes { data, secret: &self.layout.value_secret })
    }

    /// Its bytes, then what they mean.
    fn json(&self, json: &mut Json<impl io::Write>) -> io::Result<()> {
        json.begin('{')?;
        json.name("key")?;
        hex_json(self.key(), json)?;
        // No value is so odd that its bytes cannot be printed.
        self.values_json(json, |bytes, json| Ok(hex_json(bytes, json)?)).or_else(Stop::io)?;
        if let Some(types) = &self.layout.types {
            json.name("formatted")?;
            self.typed(types, false, json)?;
        }
        json.end('}')
    }

    /// What it means.
    fn typed(&self, types: &Types, plain: bool, json: &mut Json<impl io::Write>) -> io::Result<()> {
        json.begin('{')?;
        let result = self.typed_members(types, plain, json);
        result.or_else(Stop::io)?;
        json.end('}')
    }

    fn typed_members(&self, types: &Types, plain: bool, json: &mut Json<impl io::Write>) -> Result<(), Stop> {
        if types.key != 0 {
            json.name("key")?;
            Printer { btf: &types.btf, json, plain }.print(types.key, self.key())?;
        }
        self.values_json(json, |bytes, json| {
            Printer { btf: &types.btf, json, plain }.print(types.value, bytes)
        })
    }

    /// Its values, each as `print` does it.
    fn values_json<W: io::Write>(
        &self,
        json: &mut Json<W>,
        print: impl Fn(Bytes<'_>, &mut Json<W>) -> Result<(), Stop>,
    ) -> Result<(), Stop> {
        if !self.is_per_cpu {
            json.name("value")?;
            return self.values().try_for_each(|bytes| print(bytes, json));
        }
        json.name("values")?;
        json.begin('[')?;
        let result = self.values().enumerate().try_for_each(|(cpu, bytes)| {
            json.begin('{')?;
            json.field("cpu", cpu)?;
            json.name("value")?;
            let result = print(bytes, json);
            json.end('}')?;
            result
        });
        json.end(']')?;
        result
    }

    /// Its bytes, for people.
    fn plain(&self, out: &mut impl io::Write) -> io::Result<()> {
        let (key, value) = (self.key.len(), self.layout.value_secret.len());
        if self.is_per_cpu {
            writeln!(out, "key:\n{}", hex(self.key()))?;
            return self.values().enumerate().try_for_each(|(cpu, bytes)| {
                writeln!(out, "value (CPU {cpu:02}):{}{}", after_name(value > LINE), hex(bytes))
            });
        }
        let is_long = key > LINE || value > LINE;
        let between = if !is_long && key + value <= SHARED_LINE { "  " } else { "\n" };
        write!(out, "key:{}{}{between}", after_name(is_long), hex(self.key()))?;
        self.values().try_for_each(|bytes| writeln!(out, "value:{}{}", after_name(is_long), hex(bytes)))
    }
}

/// Prints what the kernel says of each map: `bpftool map list`.
pub(super) fn list(maps: &[Pinned], format: Format, mut out: impl io::Write) -> io::Result<()> {
    if format == Format::Plain {
        return maps.iter().try_for_each(|map| show_plain(map, &mut out));
    }
    let mut json = Json::new(out, format == Format::Pretty);
    json.begin('[')?;
    maps.iter().try_for_each(|map| show_json(map, &mut json))?;
    json.end(']')?;
    json.finish()
}

/// Prints what the kernel says of one map: `bpftool map show`.
pub(super) fn show(map: &Pinned, format: Format, mut out: impl io::Write) -> io::Result<()> {
    if format == Format::Plain {
        return show_plain(map, &mut out);
    }
    let mut json = Json::new(out, format == Format::Pretty);
    show_json(map, &mut json)?;
    json.finish()
}

/// Prints every entry: `bpftool map dump`. Where the kernel lists none, that of no entries, and then the error.
pub(super) fn dump(map: &Pinned, format: Format, mut out: impl io::Write) -> Result<(), Error> {
    let layout = map.layout()?;
    let listed = map.keys();
    let keys = listed.as_deref().unwrap_or_default();
    match (&layout.types, format) {
        (None, Format::Plain) => {
            let mut count = 0;
            each(map, &layout, keys, |key, entry| match entry {
                Ok(entry) => {
                    count += 1;
                    entry.plain(&mut out)
                }
                Err(reason) => unread_plain(key, reason, &mut out),
            })?;
            writeln!(out, "Found {count} element{}", if count == 1 { "" } else { "s" })?;
        }
        (types, format) => {
            let mut json = Json::new(out, format != Format::Json);
            json.begin('[')?;
            each(map, &layout, keys, |key, entry| match (entry, types) {
                (Ok(entry), Some(types)) if format == Format::Plain => entry.typed(types, true, &mut json),
                (Ok(entry), _) => entry.json(&mut json),
                (Err(reason), _) => unread_json(key, reason, &mut json),
            })?;
            json.end(']')?;
            json.finish()?;
        }
    }
    match listed {
        Ok(_) => Ok(()),
        Err(source) => {
            let kind = kind(map.info().kind);
            Err(Error::Unlisted { map: map.name.clone(), kind, source })
        }
    }
}

/// Prints the entries at these keys, or why the kernel does not tell one: it tells no socket. What has gone since they
/// were listed is no entry.
fn each(
    map: &Pinned,
    layout: &Layout,
    keys: &[Vec<u8>],
    mut print: impl FnMut(Bytes<'_>, Result<&Entry<'_>, &str>) -> io::Result<()>,
) -> Result<(), Error> {
    for key in keys {
        let bytes = Bytes { data: key, secret: &layout.key_secret };
        match map.values(key) {
            Ok(None) => {}
            Ok(Some(values)) => {
                print(bytes, Ok(&Entry { key, values: &values, is_per_cpu: map.is_per_cpu(), layout }))?;
            }
            Err(error) => {
                // The C library's words alone.
                let reason = error.to_string();
                print(bytes, Err(reason.split(" (os error").next().unwrap_or_default()))?;
            }
        }
    }
    Ok(())
}

fn unread_plain(key: Bytes<'_>, reason: &str, out: &mut impl io::Write) -> io::Result<()> {
    let is_long = key.data.len() > LINE || reason.len() > LINE;
    let between = if !is_long && key.data.len() + reason.len() <= SHARED_LINE { "  " } else { "\n" };
    let after = after_name(is_long);
    writeln!(out, "key:{after}{}{between}value:{after}{reason}", hex(key))
}

fn unread_json(key: Bytes<'_>, reason: &str, json: &mut Json<impl io::Write>) -> io::Result<()> {
    json.begin('{')?;
    json.name("key")?;
    hex_json(key, json)?;
    json.name("value")?;
    json.begin('{')?;
    json.name("error")?;
    json.string(reason)?;
    json.end('}')?;
    json.end('}')
}

fn kind(number: u32) -> String {
    let name = usize::try_from(number).ok().and_then(|number| KINDS.get(number));
    name.map_or_else(|| format!("type {number}"), |&name| name.to_owned())
}

fn show_plain(map: &Pinned, out: &mut impl io::Write) -> io::Result<()> {
    let info = map.info();
    write!(out, "{}: {}  ", info.id, kind(info.kind))?;
    if !info.name().is_empty() {
        write!(out, "name {}  ", info.name())?;
    }
    writeln!(out, "flags {:#x}", info.flags)?;
    write!(out, "\tkey {}B  value {}B  max_entries {}", info.key_size, info.value_size, info.max_entries)?;
    if let Some(memlock) = &map.memlock {
        write!(out, "  memlock {memlock}B")?;
    }
    match (info.btf_id, map.frozen) {
        (0, false) => {}
        (0, true) => write!(out, "\n\tfrozen")?,
        (id, false) => write!(out, "\n\tbtf_id {id}")?,
        (id, true) => write!(out, "\n\tbtf_id {id}  frozen")?,
    }
    writeln!(out)
}

fn show_json(map: &Pinned, json: &mut Json<impl io::Write>) -> io::Result<()> {
    let info = map.info();
    json.begin('{')?;
    json.field("id", info.id)?;
    json.name("type")?;
    match usize::try_from(info.kind).ok().and_then(|number| KINDS.get(number)) {
        Some(name) => json.string(name)?,
        None => json.value(info.kind)?,
    }
    if !info.name().is_empty() {
        json.name("name")?;
        json.string(&info.name())?;
    }
    json.field("flags", info.flags)?;
    json.field("bytes_key", info.key_size)?;
    json.field("bytes_value", info.value_size)?;
    json.field("max_entries", info.max_entries)?;
    if let Some(memlock) = &map.memlock {
        json.field("bytes_memlock", memlock)?;
    }
    json.field("frozen", u8::from(map.frozen))?;
    if info.btf_id != 0 {
        json.field("btf_id", info.btf_id)?;
    }
    json.end('}')
}

fn hex_json(bytes: Bytes<'_>, json: &mut Json<impl io::Write>) -> io::Result<()> {
    json.begin('[')?;
    for (byte, &secret) in iter::zip(bytes.data, bytes.secret) {
        if secret { json.string("0x**")? } else { json.value(format_args!("\"{byte:#04x}\""))? }
    }
    json.end(']')
}

/// Bytes in lines of 16, with a gap after eight.
fn hex(bytes: Bytes<'_>) -> String {
    let bytes = iter::zip(bytes.data, bytes.secret).enumerate();
    let text = bytes.flat_map(|(index, (byte, &secret))| {
        let gap = match index {
            0 => "",
            index if index % 16 == 0 => "\n",
            index if index % 8 == 0 => "  ",
            _ => " ",
        };
        [gap.to_owned(), if secret { "**".to_owned() } else { format!("{byte:02x}") }]
    });
    text.collect()
}

fn after_name(is_long: bool) -> char {
    if is_long { '\n' } else { ' ' }
}
