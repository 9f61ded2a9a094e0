//! Values as bpftool prints them: by their type, down to the last bit.
//!
//! Owns how each type reads and that secrets do not; never asks the kernel. Little-endian, as all EKS nodes are.

use std::io;

use super::{
    btf::{Btf, DEPTH_MAX, Encoding, Int, Member, Type},
    json::Json,
};

/// Stands for what is not printed.
const MASK: &str = "***";

/// Bytes of a key or value; `secret` says of each whether it must not be seen, and is of the same length.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bytes<'a> {
    pub(super) data: &'a [u8],
    pub(super) secret: &'a [bool],
}

/// Why a value is not printed to its end.
pub(super) enum Stop {
    /// It cannot be what its type says. bpftool leaves out what follows, and so does this.
    Odd,
    /// Nobody reads any more.
    Io(io::Error),
}

/// Prints values to one document.
pub(super) struct Printer<'a, W> {
    pub(super) btf: &'a Btf,
    pub(super) json: &'a mut Json<W>,
    /// For people: what is no JSON need not be quoted.
    pub(super) plain: bool,
}

// === impl Bytes ===

impl Bytes<'_> {
    fn from(self, offset: usize) -> Result<Self, Stop> {
        let data = self.data.get(offset..).ok_or(Stop::Odd)?;
        Ok(Self { data, secret: self.secret.get(offset..).ok_or(Stop::Odd)? })
    }

    fn first(self, count: usize) -> Result<Self, Stop> {
        let data = self.data.get(..count).ok_or(Stop::Odd)?;
        Ok(Self { data, secret: self.secret.get(..count).ok_or(Stop::Odd)? })
    }

    /// All bytes as a number; there are 16 at most.
    fn number(self) -> Result<u128, Stop> {
        let mut number = [0; 16];
        number.get_mut(..self.data.len()).ok_or(Stop::Odd)?.copy_from_slice(self.data);
        Ok(u128::from_le_bytes(number))
    }
}

// === impl Stop ===

impl Stop {
    /// Lets an odd value pass: what there is of it is printed.
    pub(super) fn io(self) -> io::Result<()> {
        match self {
            Self::Odd => Ok(()),
            Self::Io(error) => Err(error),
        }
    }
}

impl From<io::Error> for Stop {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

// === impl Printer ===

impl<W: io::Write> Printer<'_, W> {
    /// Prints a value of the type with this number.
    pub(super) fn print(&mut self, number: u32, bytes: Bytes<'_>) -> Result<(), Stop> {
        self.any(number, 0, bytes, DEPTH_MAX)
    }

    fn any(&mut self, number: u32, bit_offset: u32, bytes: Bytes<'_>, depth: usize) -> Result<(), Stop> {
        let depth = depth.checked_sub(1).ok_or(Stop::Odd)?;
        let btf = self.btf;
        match btf.resolve(number).ok_or(Stop::Odd)? {
            Type::Void => Ok(self.json.value("(unknown)")?),
            Type::Int(int) => self.int(*int, bit_offset, bytes),
            Type::Pointer => self.pointer(bytes.first(8)?),
            Type::Array { element, count } => self.array(*element, *count, bytes, depth),
            Type::Struct { members, .. } => self.members(members, bytes, depth),
            Type::Enum { size, values } => {
                self.enumeration(bytes.first(usize::try_from(*size).map_err(|_| Stop::Odd)?)?, values)
            }
            Type::Alias(_) | Type::Other => {
                self.json.value("(unsupported-kind")?;
                Err(Stop::Odd)
            }
        }
    }

    fn members(&mut self, members: &[Member], bytes: Bytes<'_>, depth: usize) -> Result<(), Stop> {
        self.json.begin('{')?;
        let result = members.iter().try_for_each(|member| {
            self.json.name(&member.name)?;
            let bytes = bytes.from(member.offset as usize / 8)?;
            match member.bits {
                0 => self.any(member.kind, member.offset % 8, bytes, depth),
                bits => self.bits(member.offset % 8, bits, bytes),
            }
        });
        self.json.end('}')?;
        result
    }

    fn array(&mut self, element: u32, count: u32, bytes: Bytes<'_>, depth: usize) -> Result<(), Stop> {
        if let Some(text) = self.text(element, count, bytes) {
            return Ok(self.json.string(text)?);
        }
        // Any number of elements fit in no bytes at all.
        let size = self.btf.size(element).filter(|&size| size > 0).ok_or(Stop::Odd)?;
        self.json.begin('[')?;
        let result = (0..count as usize).try_for_each(|index| {
            let offset = index.checked_mul(size).ok_or(Stop::Odd)?;
            self.any(element, 0, bytes.from(offset)?, depth)
        });
        self.json.end(']')?;
        result
    }

    /// What an array of characters says, if it has nothing else before its NUL.
    fn text<'b>(&self, element: u32, count: u32, bytes: Bytes<'b>) -> Option<&'b str> {
        let Type::Int(int) = self.btf.resolve(element)? else { return None };
        if int.size != 1 || !(int.encoding == Encoding::Char || int.name_is_char) {
            return None;
        }
        let bytes = bytes.first(count as usize).ok()?;
        let end = bytes.data.iter().position(|&byte| byte == 0)?;
        let text = &bytes.data[..end];
        let is_printable = text.iter().all(|byte| matches!(byte, b' '..=b'~'));
        if is_printable && !bytes.secret.contains(&true) { str::from_utf8(text).ok() } else { None }
    }

    fn enumeration(&mut self, bytes: Bytes<'_>, values: &[(i64, String)]) -> Result<(), Stop> {
        self.scalar(bytes, |number| {
            let value = signed(number, bytes.data.len())?;
            let name = values.iter().find(|(known, _)| *known == value).map(|(_, name)| name);
            Ok(name.map_or_else(|| value.to_string(), |name| format!("\"{name}\"")))
        })
    }

    fn pointer(&mut self, bytes: Bytes<'_>) -> Result<(), Stop> {
        let plain = self.plain;
        self.scalar(bytes, |address| {
            Ok(match (address, plain) {
                (0, true) => "(nil)".to_owned(),
                (_, true) => format!("{address:#x}"),
                (_, false) => address.to_string(),
            })
        })
    }

    fn int(&mut self, int: Int, bit_offset: u32, bytes: Bytes<'_>) -> Result<(), Stop> {
        let Int { encoding, offset, bits, .. } = int;
        let is_whole = bit_offset == 0 && offset == 0 && bits % 8 == 0;
        let is_usual = matches!(bits, 8 | 16 | 32 | 64);
        let size = bits as usize / 8;
        match encoding {
            Encoding::Unknown => Err(Stop::Odd),
            Encoding::Char if is_whole => self.character(bytes.first(1)?),
            Encoding::Bool if is_whole => {
                self.scalar(bytes.first(1)?, |number| Ok((number != 0).to_string()))
            }
            Encoding::Unsigned if is_whole && is_usual => {
                self.scalar(bytes.first(size)?, |number| Ok(number.to_string()))
            }
            Encoding::Signed if is_whole && is_usual => {
                self.scalar(bytes.first(size)?, |number| Ok(signed(number, size)?.to_string()))
            }
            _ => {
                let first = bit_offset + offset;
                self.bits(first % 8, bits, bytes.from(first as usize / 8)?)
            }
        }
    }

    fn character(&mut self, bytes: Bytes<'_>) -> Result<(), Stop> {
        let plain = self.plain;
        self.scalar(bytes, |number| {
            Ok(match u8::try_from(number) {
                Ok(c @ b' '..=b'~') => format!("\"{}\"", char::from(c)),
                _ if plain => format!("{number:#x}"),
                _ => format!("\"\\u00{number:02x}\""),
            })
        })
    }

    /// Bits that are no number of their own, in hexadecimal.
    fn bits(&mut self, offset: u32, count: u32, bytes: Bytes<'_>) -> Result<(), Stop> {
        let end = offset + count;
        let plain = self.plain;
        self.scalar(bytes.first(end.div_ceil(8) as usize)?, |number| {
            let above = u128::BITS.checked_sub(end).ok_or(Stop::Odd)?;
            let value = number.checked_shl(above).and_then(|bits| bits.checked_shr(u128::BITS - count));
            let value = value.ok_or(Stop::Odd)?;
            Ok(if plain { format!("{value:#x}") } else { format!("\"{value:#x}\"") })
        })
    }

    /// What has no parts, or that it is secret.
    fn scalar(
        &mut self,
        bytes: Bytes<'_>,
        text: impl FnOnce(u128) -> Result<String, Stop>,
    ) -> Result<(), Stop> {
        if bytes.secret.contains(&true) {
            self.json.string(MASK)?;
        } else {
            self.json.value(text(bytes.number()?)?)?;
        }
        Ok(())
    }
}

/// Marks the bytes of a value that belong to a member with one of these `names`.
pub(super) fn mark(btf: &Btf, number: u32, names: &[&str], secret: &mut [bool]) {
    mark_within(btf, number, names, secret, DEPTH_MAX);
}

fn mark_within(btf: &Btf, number: u32, names: &[&str], secret: &mut [bool], depth: usize) {
    let Some(depth) = depth.checked_sub(1) else { return };
    match btf.resolve(number) {
        Some(Type::Struct { members, .. }) => {
            for member in members {
                let Some(secret) = secret.get_mut(member.offset as usize / 8..) else { continue };
                if names.contains(&member.name.as_str()) {
                    let size = btf.size(member.kind).unwrap_or(usize::MAX).min(secret.len());
                    secret[..size].fill(true);
                } else {
                    mark_within(btf, member.kind, names, secret, depth);
                }
            }
        }
        Some(Type::Array { element, count }) => {
            let size = btf.size(*element).filter(|&size| size > 0).unwrap_or(usize::MAX);
            for secret in secret.chunks_mut(size).take(*count as usize) {
                mark_within(btf, *element, names, secret, depth);
            }
        }
        _ => {}
    }
}

/// The same bits as a signed number of `size` bytes, 8 at most.
fn signed(number: u128, size: usize) -> Result<i64, Stop> {
    let number = u64::try_from(number).map_err(|_| Stop::Odd)?;
    let unused = u64::BITS - u32::try_from(size * 8).map_err(|_| Stop::Odd)?.min(u64::BITS);
    let shifted = number.checked_shl(unused).ok_or(Stop::Odd)?.cast_signed();
    Ok(shifted >> unused)
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::{
        super::btf::tests::{PAIR, sample},
        *,
    };

    fn printed(btf: &Btf, number: u32, data: &[u8], secret: &[bool], plain: bool) -> String {
        let mut out = Vec::new();
        let mut json = Json::new(&mut out, false);
        let result = Printer { btf, json: &mut json, plain }.print(number, Bytes { data, secret });
        result.or_else(Stop::io).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn members_with_a_secret_name_are_masked_and_no_others() {
        let btf = Btf::parse(&sample()).unwrap();
        let mut secret = [false; 12];
        mark(&btf, PAIR, &["ticket"], &mut secret);
        let data = [1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 3, 1];
        assert_eq!(printed(&btf, PAIR, &data, &secret, true), r#"{"ticket":"***","list":[2,259]}"#);
        assert_eq!(printed(&btf, PAIR, &data, &[false; 12], true), r#"{"ticket":1,"list":[2,259]}"#);
    }

    #[test]
    fn a_value_that_is_too_short_ends_where_its_bytes_do() {
        let btf = Btf::parse(&sample()).unwrap();
        assert_eq!(
            printed(&btf, PAIR, &[1; 10], &[false; 10], false),
            r#"{"ticket":72340172838076673,"list":[257]}"#
        );
    }

    proptest! {
        #[test]
        fn nothing_is_so_odd_that_it_cannot_be_printed(
            changes in vec((24_usize..120, any::<u8>()), 1..8),
            data in vec(any::<u8>(), 0..24),
            plain: bool,
        ) {
            let mut information = sample();
            for (place, byte) in changes {
                information[place] = byte;
            }
            if let Some(btf) = Btf::parse(&information) {
                for number in 0..6 {
                    let mut secret = vec![false; data.len()];
                    mark(&btf, number, &["ticket"], &mut secret);
                    printed(&btf, number, &data, &secret, plain);
                }
            }
        }
    }
}
