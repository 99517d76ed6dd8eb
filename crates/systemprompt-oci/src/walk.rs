//! Reads the headers of a tar archive made by a stranger, in constant memory.
//!
//! It is no unpacker: it answers whether the archive can be taken apart in one way only and what its entries are
//! called. Tar has four ways to name an entry (the header, its prefix field, a GNU `L` record, a PAX `path`), and
//! readers differ in which wins, so every one of them is checked.

use crate::is_never_in_an_image;
use std::io::{self, Read};

const BLOCK: usize = 512;
/// Names and PAX records longer than this are an attack on memory, not a file system.
const MAX_RECORD: u64 = 1 << 20;
const MAX_ENTRIES: u64 = 1_000_000;

/// A path that must never be in an image.
#[derive(Debug)]
pub(crate) struct Forbidden(pub(crate) String);

#[derive(Debug)]
pub(crate) enum WalkError {
    Read(io::Error),
    Forbidden(Forbidden),
    Malformed(String),
}

/// Walks the archive up to its end marker (or its end) and returns the number of entries.
pub(crate) fn walk(reader: &mut impl Read) -> Result<u64, WalkError> {
    let mut entries = 0;
    let mut pending = Extensions::default();
    let mut block = [0; BLOCK];
    while read_block(reader, &mut block)? {
        if block.iter().all(|&byte| byte == 0) {
            return Ok(entries);
        }
        let header = Header(&block);
        header.verify_checksum()?;
        let size = header.size()?;
        match header.kind() {
            b'L' | b'K' | b'x' => pending.take(header.kind(), &read_record(reader, size)?)?,
            // Some readers hold a global record against every later entry, some drop it.
            b'g' => {
                if Extensions::parse_pax(&read_record(reader, size)?)?.says_where_or_how_long() {
                    return Err(malformed("a global PAX record that names or measures entries"));
                }
            }
            b'S' => return Err(malformed("a sparse file")),
            _ => {
                entries += 1;
                if entries > MAX_ENTRIES {
                    return Err(malformed(format!("more than {MAX_ENTRIES} entries")));
                }
                let extensions = std::mem::take(&mut pending);
                extensions.check_against(&header, size)?;
                skip(reader, padded(size))?;
            }
        }
    }
    Ok(entries)
}

struct Header<'a>(&'a [u8; BLOCK]);

impl Header<'_> {
    fn kind(&self) -> u8 {
        self.0[156]
    }

    fn size(&self) -> Result<u64, WalkError> {
        number(&self.0[124..136]).ok_or_else(|| malformed("a size field that is no number"))
    }

    fn verify_checksum(&self) -> Result<(), WalkError> {
        let field = 148..156;
        let sum: u64 =
            self.0.iter().enumerate().map(|(at, &byte)| u64::from(if field.contains(&at) { b' ' } else { byte })).sum();
        if number(&self.0[field]) == Some(sum) { Ok(()) } else { Err(malformed("a header with a wrong checksum")) }
    }

    /// Every reading of the header's own name: alone, and behind the ustar prefix.
    fn names(&self) -> [Vec<u8>; 2] {
        let name = until_nul(&self.0[..100]).to_vec();
        let prefix = until_nul(&self.0[345..500]);
        let joined = [prefix, b"/", &name].concat();
        [name, joined]
    }
}

/// What the records before an entry say about it.
#[derive(Default)]
struct Extensions {
    names: Vec<Vec<u8>>,
    size: Option<u64>,
    /// A PAX `linkpath` was there.
    leads: bool,
}

impl Extensions {
    fn take(&mut self, kind: u8, record: &[u8]) -> Result<(), WalkError> {
        match kind {
            b'L' => self.names.push(until_nul(record).to_vec()),
            b'x' => {
                let pax = Self::parse_pax(record)?;
                self.names.extend(pax.names);
                self.size = pax.size.or(self.size);
            }
            _ => {} // the target of a link is not a file in this layer
        }
        Ok(())
    }

    /// PAX: `LENGTH KEY=VALUE\n`, the length counting the whole line (POSIX.1-2001).
    fn parse_pax(mut record: &[u8]) -> Result<Self, WalkError> {
        let mut found = Self::default();
        while let Some(&first) = record.first() {
            if first == 0 {
                break; // padding some writers count in
            }
            let (line, rest) = split_pax(record).ok_or_else(|| malformed("a PAX record that is not well-formed"))?;
            record = rest;
            let Some(equals) = line.iter().position(|&byte| byte == b'=') else {
                return Err(malformed("a PAX record without a value"));
            };
            let (key, value) = (&line[..equals], &line[equals + 1..]);
            if key == b"path" {
                found.names.push(value.to_vec());
            } else if key == b"size" {
                found.size = Some(decimal(value).ok_or_else(|| malformed("a PAX size that is no number"))?);
            } else if key == b"linkpath" {
                found.leads = true;
            } else if key.starts_with(b"GNU.sparse") {
                return Err(malformed("a sparse file"));
            }
        }
        Ok(found)
    }

    fn says_where_or_how_long(&self) -> bool {
        !self.names.is_empty() || self.size.is_some() || self.leads
    }

    fn check_against(self, header: &Header<'_>, size: u64) -> Result<(), WalkError> {
        if self.size.is_some_and(|stated| stated != size) {
            return Err(malformed("an entry whose size is stated twice and differently"));
        }
        for name in self.names.into_iter().chain(header.names()) {
            // Every part: `secrets.json/.` is the file too, and what lies below such a name is no better.
            if name.split(|&byte| byte == b'/').any(is_never_in_an_image) {
                let shown: String = String::from_utf8_lossy(&name).chars().take(300).collect();
                return Err(WalkError::Forbidden(Forbidden(shown.trim_start_matches('/').to_owned())));
            }
        }
        Ok(())
    }
}

fn split_pax(record: &[u8]) -> Option<(&[u8], &[u8])> {
    let space = record.iter().take(12).position(|&byte| byte == b' ')?;
    let length = usize::try_from(decimal(&record[..space])?).ok()?;
    let line = record.get(space + 1..length)?.strip_suffix(b"\n")?;
    Some((line, &record[length..]))
}

/// Octal text, or base 256 when the first bit is set (GNU).
fn number(field: &[u8]) -> Option<u64> {
    if field[0] & 0x80 != 0 {
        let mut value = u64::from(field[0] & 0x7f);
        for &byte in &field[1..] {
            value = value.checked_mul(256)?.checked_add(u64::from(byte))?;
        }
        return Some(value);
    }
    let text = std::str::from_utf8(until_nul(field)).ok()?.trim_matches(' ');
    if text.is_empty() { Some(0) } else { u64::from_str_radix(text, 8).ok() }
}

fn decimal(text: &[u8]) -> Option<u64> {
    if text.is_empty() || !text.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(text).ok()?.parse().ok()
}

fn until_nul(field: &[u8]) -> &[u8] {
    field.split(|&byte| byte == 0).next().unwrap_or_default()
}

fn padded(size: u64) -> u64 {
    size.saturating_add(BLOCK as u64 - 1) / BLOCK as u64 * BLOCK as u64
}

fn read_record(reader: &mut impl Read, size: u64) -> Result<Vec<u8>, WalkError> {
    if size > MAX_RECORD {
        return Err(malformed(format!("a name or attribute of {size} bytes")));
    }
    let mut record = Vec::new();
    reader.take(padded(size)).read_to_end(&mut record).map_err(WalkError::Read)?;
    if record.len() as u64 != padded(size) {
        return Err(malformed("an archive that ends within an entry"));
    }
    record.truncate(usize::try_from(size).expect("checked against MAX_RECORD"));
    Ok(record)
}

/// False at a clean end.
fn read_block(reader: &mut impl Read, block: &mut [u8; BLOCK]) -> Result<bool, WalkError> {
    let mut filled = 0;
    while filled < BLOCK {
        match reader.read(&mut block[filled..]) {
            Ok(0) if filled == 0 => return Ok(false),
            Ok(0) => return Err(malformed("an archive that ends within a header")),
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(WalkError::Read(error)),
        }
    }
    Ok(true)
}

fn skip(reader: &mut impl Read, size: u64) -> Result<(), WalkError> {
    let skipped = io::copy(&mut reader.take(size), &mut io::sink()).map_err(WalkError::Read)?;
    if skipped == size { Ok(()) } else { Err(malformed("an archive that ends within an entry")) }
}

fn malformed(what: impl Into<String>) -> WalkError {
    WalkError::Malformed(format!("found {}", what.into()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn pax_line(key: &str, value: &str) -> String {
        let mut length = key.len() + value.len() + 3;
        while length.to_string().len() + key.len() + value.len() + 3 != length {
            length = length.to_string().len() + key.len() + value.len() + 3;
        }
        format!("{length} {key}={value}\n")
    }

    fn archive(records: &[(u8, &str, &[u8])]) -> Vec<u8> {
        let mut archive = Vec::new();
        for (kind, name, content) in records {
            let mut header = tar::Header::new_ustar();
            header.set_path(name).expect("short name");
            header.set_size(content.len() as u64);
            header.set_entry_type(tar::EntryType::new(*kind));
            header.set_cksum();
            archive.extend_from_slice(header.as_bytes());
            archive.extend_from_slice(content);
            archive.resize(archive.len().div_ceil(BLOCK) * BLOCK, 0);
        }
        archive.resize(archive.len() + 2 * BLOCK, 0);
        archive
    }

    fn walk_bytes(archive: &[u8]) -> Result<u64, WalkError> {
        walk(&mut &archive[..])
    }

    #[test]
    fn every_way_to_say_a_name_is_checked() {
        let pax = pax_line("path", "x/secrets.json");
        for hidden in [
            archive(&[(b'x', "pax", pax.as_bytes()), (b'0', "harmless", b"x")]),
            archive(&[(b'L', "././@LongLink", b"a/tenants.json\0"), (b'0', "harmless", b"x")]),
            archive(&[(b'0', "credentials.json", b"x")]),
            archive(&[(b'2', "etc/secrets.json", b"")]),
            archive(&[(b'L', "././@LongLink", b"a/secrets.json/.\0"), (b'0', "harmless", b"x")]),
            archive(&[(b'0', "secrets.json/below", b"x")]),
            // The name a reader sees that does not know the PAX record.
            archive(&[(b'x', "pax", pax_line("path", "ok").as_bytes()), (b'0', "secrets.json", b"x")]),
        ] {
            assert!(matches!(walk_bytes(&hidden), Err(WalkError::Forbidden(_))));
        }
    }

    #[test]
    fn what_two_readers_would_read_differently_is_refused() {
        let two_sizes = pax_line("size", "1024");
        for ambiguous in [
            archive(&[(b'x', "pax", two_sizes.as_bytes()), (b'0', "file", b"x")]),
            archive(&[(b'x', "pax", b"99 path=x\n"), (b'0', "file", b"x")]),
            archive(&[(b'S', "sparse", b"x")]),
            archive(&[(b'x', "pax", pax_line("GNU.sparse.size", "1").as_bytes()), (b'0', "file", b"x")]),
            archive(&[(b'g', "pax", pax_line("path", "elsewhere").as_bytes()), (b'0', "file", b"x")]),
            archive(&[(b'g', "pax", pax_line("size", "1").as_bytes()), (b'0', "file", b"x")]),
            archive(&[(b'g', "pax", pax_line("linkpath", "/etc").as_bytes()), (b'2', "link", b"")]),
        ] {
            assert!(matches!(walk_bytes(&ambiguous), Err(WalkError::Malformed(_))));
        }
        let comment = pax_line("comment", "as `git archive` writes it");
        let harmless = archive(&[(b'g', "pax", comment.as_bytes()), (b'0', "file", b"x")]);
        assert_eq!(walk_bytes(&harmless).expect("says nothing of entries"), 1);
        let same_size = pax_line("size", "1");
        let agreeing = archive(&[(b'x', "pax", same_size.as_bytes()), (b'0', "file", b"x")]);
        assert_eq!(walk_bytes(&agreeing).expect("agrees"), 1);
    }

    #[test]
    fn a_huge_name_does_not_reach_memory() {
        let mut header = tar::Header::new_gnu();
        header.set_path("././@LongLink").expect("short");
        header.set_entry_type(tar::EntryType::GNULongName);
        header.set_size(1 << 40);
        header.set_cksum();
        let endless = header.as_bytes().chain(io::repeat(b'a'));
        assert!(matches!(walk(&mut { endless }), Err(WalkError::Malformed(_))));
    }

    proptest! {
        #[test]
        fn any_bytes_are_answered_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..3000)) {
            let _ = walk_bytes(&bytes);
        }

        #[test]
        fn a_flipped_header_byte_never_panics(at in 0usize..1024, value in any::<u8>()) {
            let pax = pax_line("path", "some/where");
            let mut bytes = archive(&[(b'x', "pax", pax.as_bytes()), (b'0', "file", b"content")]);
            bytes[at] = value;
            let _ = walk_bytes(&bytes);
        }
    }
}
