//! BTF, the type information that the kernel keeps with a map.
//!
//! Owns parsing it and looking types up; never sees a value. What cannot be right is `None`: the information may be of
//! another podgate's, or anybody's.

/// First bytes of all BTF.
const MAGIC: u16 = 0xeb9f;
/// Types within types, as in the kernel's `MAX_RESOLVE_DEPTH`.
pub(super) const DEPTH_MAX: usize = 32;

/// Parts within parts of one type, counted as often as they are there. Podgate's have less than a hundred.
const PARTS_MAX: usize = 4096;

/// Every type of one object. A type's number is its place; 0 is void.
#[derive(Debug)]
pub(super) struct Btf(Vec<Type>);

/// What a value can look like.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Type {
    Void,
    Int(Int),
    Pointer,
    Array {
        element: u32,
        count: u32,
    },
    /// A struct or union.
    Struct {
        size: u32,
        members: Vec<Member>,
    },
    Enum {
        size: u32,
        values: Vec<(i64, String)>,
    },
    /// A typedef or qualifier.
    Alias(u32),
    /// What is no value, or none that bpftool prints: functions, floating-point numbers.
    Other,
}

/// A number, character or bool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Int {
    pub(super) name_is_char: bool,
    pub(super) size: u32,
    pub(super) encoding: Encoding,
    /// Bits from the beginning of its bytes.
    pub(super) offset: u32,
    pub(super) bits: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Encoding {
    Unsigned,
    Signed,
    Char,
    Bool,
    /// More than one of these.
    Unknown,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) struct Member {
    pub(super) name: String,
    pub(super) kind: u32,
    /// Bits from the beginning of the struct.
    pub(super) offset: u32,
    /// Bits that it has, or 0 where it is no bit field.
    pub(super) bits: u32,
}

/// Takes numbers off the front.
struct Reader<'a>(&'a [u8]);

/// The part that all types begin with.
struct Header {
    name: String,
    kind: u32,
    /// How many members or the like follow.
    count: u32,
    flag: bool,
    /// Of the value in bytes, or another type's number.
    size_or_type: u32,
}

// === impl Btf ===

impl Btf {
    /// Reads all types.
    pub(super) fn parse(data: &[u8]) -> Option<Self> {
        let mut header = Reader(data);
        let magic = header.u16()?;
        let _version_and_flags = header.u16()?;
        let length = header.u32()?;
        let mut section = || {
            let [offset, size] = [header.u32()?, header.u32()?];
            let start = usize::try_from(length.checked_add(offset)?).ok()?;
            data.get(start..start.checked_add(usize::try_from(size).ok()?)?)
        };
        let (types, strings) = (section()?, section()?);
        if magic != MAGIC {
            return None;
        }
        let mut reader = Reader(types);
        let mut types = vec![Type::Void];
        while !reader.0.is_empty() {
            types.push(reader.type_(strings)?);
        }
        let types = Self(types);
        let mut known = vec![None; types.0.len()];
        for number in 0..u32::try_from(types.0.len()).ok()? {
            types.parts(number, &mut known, DEPTH_MAX)?;
        }
        Some(types)
    }

    /// How many parts a value has. `None` for a type that is within itself, or whose parts double from one type to the
    /// next: walking through it would have no end.
    fn parts(&self, number: u32, known: &mut [Option<usize>], depth: usize) -> Option<usize> {
        let depth = depth.checked_sub(1)?;
        let place = usize::try_from(number).ok()?;
        if let Some(Some(parts)) = known.get(place) {
            return Some(*parts);
        }
        let parts = match self.0.get(place) {
            Some(Type::Alias(other)) => self.parts(*other, known, depth)?,
            Some(Type::Array { element, .. }) => self.parts(*element, known, depth)?,
            Some(Type::Struct { members, .. }) => members.iter().try_fold(1, |sum: usize, member| {
                Some(sum + self.parts(member.kind, known, depth)?).filter(|sum| *sum <= PARTS_MAX)
            })?,
            _ => 1,
        };
        if let Some(known) = known.get_mut(place) {
            *known = Some(parts);
        }
        Some(parts)
    }

    /// The type of that number.
    pub(super) fn get(&self, number: u32) -> Option<&Type> {
        self.0.get(usize::try_from(number).ok()?)
    }

    /// What is behind typedefs and qualifiers.
    pub(super) fn resolve(&self, mut number: u32) -> Option<&Type> {
        for _ in 0..DEPTH_MAX {
            match self.get(number)? {
                Type::Alias(other) => number = *other,
                kind => return Some(kind),
            }
        }
        None
    }

    /// Bytes that a value takes.
    pub(super) fn size(&self, number: u32) -> Option<usize> {
        self.size_within(number, DEPTH_MAX)
    }

    fn size_within(&self, number: u32, depth: usize) -> Option<usize> {
        let depth = depth.checked_sub(1)?;
        match self.resolve(number)? {
            Type::Int(Int { size, .. }) | Type::Struct { size, .. } | Type::Enum { size, .. } => {
                usize::try_from(*size).ok()
            }
            Type::Pointer => Some(size_of::<u64>()),
            Type::Array { element, count } => {
                self.size_within(*element, depth)?.checked_mul(usize::try_from(*count).ok()?)
            }
            Type::Void | Type::Alias(_) | Type::Other => None,
        }
    }
}

// === impl Reader ===

impl<'a> Reader<'a> {
    fn bytes<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (first, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*first)
    }

    fn u16(&mut self) -> Option<u16> {
        self.bytes().map(u16::from_ne_bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.bytes().map(u32::from_ne_bytes)
    }

    /// `count` things that follow each other.
    fn list<T>(&mut self, count: u32, read: impl FnMut(&mut Self) -> Option<T>) -> Option<Vec<T>> {
        let mut read = read;
        (0..count).map(|_| read(self)).collect()
    }

    fn skip(&mut self, words: u32) -> Option<()> {
        self.list(words, Self::u32).map(drop)
    }

    fn header(&mut self, strings: &'a [u8]) -> Option<Header> {
        let (name, info, size_or_type) = (self.u32()?, self.u32()?, self.u32()?);
        Some(Header {
            name: string(strings, name)?,
            kind: info >> 24 & 0x1f,
            count: info & 0xffff,
            flag: info >> 31 == 1,
            size_or_type,
        })
    }

    /// The next type. The numbers are the kernel's `BTF_KIND_*`.
    fn type_(&mut self, strings: &'a [u8]) -> Option<Type> {
        let header = self.header(strings)?;
        let (count, size) = (header.count, header.size_or_type);
        Some(match header.kind {
            1 => Type::Int(int(&header, self.u32()?)),
            2 => Type::Pointer,
            3 => {
                let [element, _index, count] = [self.u32()?, self.u32()?, self.u32()?];
                Type::Array { element, count }
            }
            4 | 5 => {
                let members = self.list(count, |reader| reader.member(strings, header.flag))?;
                Type::Struct { size, members }
            }
            6 => {
                let values = self.list(count, |reader| {
                    let name = string(strings, reader.u32()?)?;
                    Some((i64::from(reader.u32()?.cast_signed()), name))
                })?;
                Type::Enum { size, values }
            }
            19 => {
                let values = self.list(count, |reader| {
                    let name = string(strings, reader.u32()?)?;
                    let [low, high] = [reader.u32()?, reader.u32()?].map(u64::from);
                    Some(((high << 32 | low).cast_signed(), name))
                })?;
                Type::Enum { size, values }
            }
            // Typedef, volatile, const, restrict, type tag.
            8..=11 | 18 => Type::Alias(header.size_or_type),
            kind => {
                self.skip(match kind {
                    // Forward declaration, function, floating-point number.
                    7 | 12 | 16 => 0,
                    // Prototype, variables, section, declaration's tag.
                    13 => count * 2,
                    14 | 17 => 1,
                    15 => count * 3,
                    _ => return None,
                })?;
                Type::Other
            }
        })
    }

    fn member(&mut self, strings: &[u8], bit_fields: bool) -> Option<Member> {
        let (name, kind, offset) = (string(strings, self.u32()?)?, self.u32()?, self.u32()?);
        let (bits, offset) = if bit_fields { (offset >> 24, offset & 0x00ff_ffff) } else { (0, offset) };
        Some(Member { name, kind, offset, bits })
    }
}

fn int(header: &Header, information: u32) -> Int {
    let encoding = match information >> 24 & 0xf {
        0 => Encoding::Unsigned,
        1 => Encoding::Signed,
        2 => Encoding::Char,
        4 => Encoding::Bool,
        _ => Encoding::Unknown,
    };
    Int {
        name_is_char: header.name == "char",
        size: header.size_or_type,
        encoding,
        offset: information >> 16 & 0xff,
        bits: information & 0xff,
    }
}

/// The string at `offset`, up to its NUL.
fn string(strings: &[u8], offset: u32) -> Option<String> {
    let rest = strings.get(usize::try_from(offset).ok()?..)?;
    let end = rest.iter().position(|&byte| byte == 0)?;
    Some(String::from_utf8_lossy(&rest[..end]).into_owned())
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Number of the struct in [`sample`].
    pub(in crate::mapdump) const PAIR: u32 = 4;

    /// `struct { u64 ticket; u16 list[2]; }`.
    pub(in crate::mapdump) fn sample() -> Vec<u8> {
        let strings = b"\0ticket\0list\0";
        let (int, array, structure) = (1 << 24, 3 << 24, 4 << 24);
        let types = [
            &[0, int, 8, 64][..],
            &[0, int, 2, 16],
            &[0, array, 0, 2, 1, 2],
            &[0, structure | 2, 12, 1, 1, 0, 8, 3, 64],
        ];
        let types = types.concat();
        let length = u32::try_from(types.len() * 4).unwrap();
        let header = [0x0001_eb9f, 24, 0, length, length, u32::try_from(strings.len()).unwrap()];
        let words = header.into_iter().chain(types).flat_map(u32::to_ne_bytes);
        words.chain(*strings).collect()
    }

    #[test]
    fn types_are_found_by_their_number() {
        let btf = Btf::parse(&sample()).unwrap();
        assert_eq!(btf.get(3), Some(&Type::Array { element: 2, count: 2 }));
        assert_eq!((btf.size(3), btf.size(PAIR), btf.size(0), btf.size(5)), (Some(4), Some(12), None, None));
    }

    #[test]
    fn information_that_ends_too_soon_is_refused() {
        let data = sample();
        for length in 0..data.len() {
            assert!(Btf::parse(&data[..length]).is_none(), "{length} bytes");
        }
    }

    #[test]
    fn types_that_have_no_end_are_refused() {
        let structure = |kind: u32, members: &[u32]| {
            let count = u32::try_from(members.len()).unwrap();
            let members = members.iter().flat_map(|member| [0, *member, 0]);
            [0, kind << 24 | count, 8].into_iter().chain(members).collect::<Vec<u32>>()
        };
        let int = vec![0, 1 << 24, 8, 64];
        let doubled = (1..20).map(|number| structure(4, &[number, number]));
        let cases = [
            ("a struct within itself", vec![structure(4, &[1, 1])], false),
            ("two unions within each other", vec![structure(5, &[2]), structure(5, &[1])], false),
            ("a million parts", [int.clone()].into_iter().chain(doubled).collect(), false),
            ("a struct twice within another", vec![int, structure(4, &[1]), structure(4, &[2, 2])], true),
        ];
        for (name, types, is_right) in cases {
            let types: Vec<u8> = types.concat().into_iter().flat_map(u32::to_ne_bytes).collect();
            let length = u32::try_from(types.len()).unwrap();
            let header = [0x0001_eb9f, 24, 0, length, length, 1].into_iter().flat_map(u32::to_ne_bytes);
            let data: Vec<u8> = header.chain(types).chain([0]).collect();
            assert_eq!(Btf::parse(&data).is_some(), is_right, "{name}");
        }
    }

    #[test]
    fn a_typedef_of_itself_has_no_end_and_no_size() {
        let btf = Btf(vec![Type::Void, Type::Alias(1)]);
        assert!(btf.resolve(1).is_none() && btf.size(1).is_none());
    }
}
